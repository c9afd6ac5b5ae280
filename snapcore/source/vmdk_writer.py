"""Writing VMDK, stream-optimised: what OVA files hold and hypervisors import. Front to back, every grain packed."""

from __future__ import annotations

import functools
import secrets
import struct

import numpy as np

from snapcore.errors import UsageError
from snapcore.source import packing, vmdk
from snapcore.source.sink import Sink
from snapcore.source.writer import Piece

_SECTOR = vmdk.SECTOR_BYTES
_GRAIN_BYTES = 64 << 10
_GRAIN_SECTORS = _GRAIN_BYTES // _SECTOR
_DESCRIPTOR_SECTORS = 20
_OVERHEAD_SECTORS = 128
# Of a second copy of the tables, which there is not.
_NO_TABLE = 0
_VERSION = 3
_FLAGS = vmdk.NEWLINES | vmdk.COMPRESSED | vmdk.MARKERS
_PLACE_LIMIT = 1 << 32
# Of markers that are no grains: sectors that follow, 0, and what they are.
_MARKER = struct.Struct("<QII496x")
_END, _TABLE, _DIRECTORY, _FOOTER = 0, 1, 2, 3

_DESCRIPTOR = """\
# Disk DescriptorFile
version=1
CID={cid:08x}
parentCID=ffffffff
createType="streamOptimized"

# Extent description
RW {sectors} SPARSE "{name}"

# The Disk Data Base
#DDB

ddb.virtualHWVersion = "4"
ddb.geometry.cylinders = "{cylinders}"
ddb.geometry.heads = "{heads}"
ddb.geometry.sectors = "63"
ddb.adapterType = "lsilogic"
"""


class VmdkWriter:
    """See `snapcore.source.writer.Writer`.

    Parameters
    ----------
    size_bytes : int
        Of the disk, whole sectors.
    name : str
        Of the file, for the descriptor.
    """

    unit_bytes = _GRAIN_BYTES

    def __init__(self, size_bytes: int, name: str) -> None:
        self.size_bytes = size_bytes
        self._sectors = size_bytes // _SECTOR
        tables = -(-size_bytes // (_GRAIN_BYTES * vmdk.TABLE_ENTRIES))
        if not 0 < self._sectors < _PLACE_LIMIT:
            raise UsageError(
                f"a VMDK has less than {_PLACE_LIMIT * _SECTOR} bytes, not {size_bytes}; write qcow2 or raw"
            )
        self._name = "".join(sign for sign in name if sign.isprintable() and sign != '"')[:200] or "disk.vmdk"
        self._directory = np.zeros(tables, dtype="<u4")
        self._table = np.zeros(vmdk.TABLE_ENTRIES, dtype="<u4")
        self._number = 0
        self.pack = functools.partial(packing.deflate, window=packing.VMDK_WINDOW)

    def begin(self, sink: Sink) -> None:
        """See `Writer.begin`."""
        heads = 255 if self._sectors >= 1 << 21 else 64
        text = _DESCRIPTOR.format(
            # The numbers that stand for "none" are not drawn.
            cid=secrets.randbelow(0xFFFF_FFF0),
            sectors=self._sectors,
            name=self._name,
            cylinders=self._sectors // (heads * 63),
            heads=heads,
        )
        sink.append(self._header(vmdk.AT_END))
        sink.append(text.encode().ljust(_DESCRIPTOR_SECTORS * _SECTOR, b"\0"))
        sink.append(bytes(_OVERHEAD_SECTORS * _SECTOR - sink.position))

    def put(self, sink: Sink, piece: Piece) -> None:
        """See `Writer.put`."""
        first = piece.offset_bytes // _GRAIN_BYTES
        for grain, packed in enumerate(piece.packed, first):
            number, slot = divmod(grain, vmdk.TABLE_ENTRIES)
            if number != self._number:
                self._end_table(sink)
                self._number = number
            self._table[slot] = _place(sink)
            _put_padded(sink, vmdk.MARKER.pack(grain * _GRAIN_SECTORS, len(packed)) + packed)

    def end(self, sink: Sink) -> None:
        """See `Writer.end`."""
        self._end_table(sink)
        directory = self._directory.tobytes()
        sink.append(_MARKER.pack(-(-len(directory) // _SECTOR), 0, _DIRECTORY))
        place = _place(sink)
        _put_padded(sink, directory)
        sink.append(_MARKER.pack(1, 0, _FOOTER))
        sink.append(self._header(place))
        sink.append(_MARKER.pack(0, 0, _END))

    def _end_table(self, sink: Sink) -> None:
        if self._table.any():
            sink.append(_MARKER.pack(self._table.nbytes // _SECTOR, 0, _TABLE))
            self._directory[self._number] = _place(sink)
            sink.append(self._table.tobytes())
            self._table[:] = 0

    def _header(self, directory: int) -> bytes:
        descriptor = (1, _DESCRIPTOR_SECTORS) if directory == vmdk.AT_END else (0, 0)
        tables = (vmdk.TABLE_ENTRIES, _NO_TABLE, directory, _OVERHEAD_SECTORS)
        disk = (self._sectors, _GRAIN_SECTORS, *descriptor)
        return vmdk.HEADER.pack(vmdk.MAGIC, _VERSION, _FLAGS, *disk, *tables, 0, vmdk.LINE_ENDS, vmdk.DEFLATE)


def _place(sink: Sink) -> int:
    sector = sink.position // _SECTOR
    if sector >= _PLACE_LIMIT:
        raise UsageError("the packed disk is longer than the 2 TiB that a VMDK can hold; write qcow2 or raw")
    return sector


def _put_padded(sink: Sink, data: bytes) -> None:
    sink.append(data)
    sink.append(bytes(-len(data) % _SECTOR))
