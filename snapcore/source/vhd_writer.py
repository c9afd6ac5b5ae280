"""Writing VHD, fixed: the disk and a footer."""

from __future__ import annotations

import struct
import time
import uuid

from snapcore.errors import UsageError
from snapcore.source import vhd
from snapcore.source.sink import Sink
from snapcore.source.writer import Piece

# 2040 GiB: what programs that read VHD take.
_SIZE_LIMIT_BYTES = 0xFF00_0000 * vhd.SECTOR_BYTES
# Who "win " wrote: programs then believe the size and do not compute another one from the geometry.
_CREATOR, _CREATOR_VERSION, _CREATOR_HOST = b"win ", 0x0006_0001, b"Wi2k"
_RESERVED_FEATURE = 2
_NO_HEADER = (1 << 64) - 1
# Time counts from the first of January 2000.
_EPOCH_S = 946_684_800


class VhdWriter:
    """See `snapcore.source.writer.Writer`.

    Parameters
    ----------
    size_bytes : int
        Of the disk, whole sectors.
    """

    unit_bytes = 4096
    pack = None

    def __init__(self, size_bytes: int) -> None:
        if not 0 < size_bytes <= _SIZE_LIMIT_BYTES:
            raise UsageError(f"a VHD has 1 to {_SIZE_LIMIT_BYTES} bytes, not {size_bytes}; write qcow2 or raw")
        self.size_bytes = size_bytes

    def begin(self, sink: Sink) -> None:
        """See `Writer.begin`."""

    def put(self, sink: Sink, piece: Piece) -> None:
        """See `Writer.put`."""
        sink.append_zeros(piece.offset_bytes - sink.position)
        sink.append(piece.data)

    def end(self, sink: Sink) -> None:
        """See `Writer.end`."""
        sink.append_zeros(self.size_bytes - sink.position)
        sink.append(_footer(self.size_bytes))


def _footer(size_bytes: int) -> bytes:
    cylinders, heads, sectors = geometry(size_bytes // vhd.SECTOR_BYTES)
    now_s = max(0, int(time.time()) - _EPOCH_S) & 0xFFFF_FFFF
    creator = (_CREATOR, _CREATOR_VERSION, _CREATOR_HOST)
    head = (vhd.COOKIE, _RESERVED_FEATURE, vhd.VERSION, _NO_HEADER, now_s, *creator)
    disk = (size_bytes, size_bytes, cylinders, heads, sectors, vhd.FIXED)
    record = bytearray(vhd.FOOTER.pack(*head, *disk, 0, uuid.uuid4().bytes, 0))
    struct.pack_into(">I", record, vhd.CHECKSUM_OFFSET, vhd.checksum(bytes(record), vhd.CHECKSUM_OFFSET))
    return bytes(record)


def geometry(sectors: int) -> tuple[int, int, int]:
    """(cylinders, heads, sectors a track) as the appendix of the specification computes them."""
    sectors = min(sectors, 65535 * 16 * 255)
    if sectors >= 65535 * 16 * 63:
        return sectors // 255 // 16, 16, 255
    per_track = 17
    tracks = sectors // per_track
    heads = max(4, (tracks + 1023) // 1024)
    if tracks >= heads * 1024 or heads > 16:
        per_track, heads = 31, 16
        tracks = sectors // per_track
    if tracks >= heads * 1024:
        per_track, heads = 63, 16
        tracks = sectors // per_track
    return tracks // heads, heads, per_track
