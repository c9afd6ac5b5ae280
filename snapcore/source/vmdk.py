"""Reading VMDK of one file, sparse or stream-optimised, as VMware's "Virtual Disk Format 5.0" describes it.

A header, a text that describes the disk, a directory of tables, tables of 32-bit sector numbers of grains. In a
stream-optimised file grains are packed, each behind a marker that says where in the disk it belongs, and the header
that counts is a second one at the end. All numbers are little-endian, all places count sectors.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from snapcore.errors import UnsupportedFormatError
from snapcore.source import packing
from snapcore.source.container import TABLE_LIMIT_BYTES, Container
from snapcore.source.mapped import BELOW, DATA, PACKED, ZERO, MappedImage, Units

MAGIC = b"KDMV"
DESCRIPTOR_MAGIC = b"# Disk DescriptorFile"
SECTOR_BYTES = 512
# Magic, version, flags, capacity, grain, descriptor and its size, entries a table, second directory, directory,
# overhead, unclean, line ends, algorithm.
HEADER = struct.Struct("<4sIIQQQQIQQQB4sH433x")
MARKER = struct.Struct("<QI")
LINE_ENDS = b"\n \r\n"
NEWLINES, ZERO_GRAINS, COMPRESSED, MARKERS = 1 << 0, 1 << 2, 1 << 16, 1 << 17
DEFLATE = 1
AT_END = (1 << 64) - 1
TABLE_ENTRIES = 512
# At the end of a stream-optimised file: the marker of the footer, the footer, the marker of the end.
FOOTER_FROM_END = 2 * SECTOR_BYTES

_KNOWN_FLAGS = NEWLINES | 1 << 1 | ZERO_GRAINS | COMPRESSED | MARKERS
_DESCRIPTOR_LIMIT_BYTES = 64 << 10
_PACKED_LIMIT_BYTES = 2 << 20
_GRAIN_LIMIT_SECTORS = 1 << 21
_KINDS = {"monolithicSparse", "streamOptimized"}


class Header(NamedTuple):
    """What is read of a header, places in bytes."""

    flags: int
    size_bytes: int
    grain_bytes: int
    descriptor: int
    descriptor_bytes: int
    directory: int


def read_header(container: Container) -> Header:
    """The header that counts, checked."""
    at = 0
    header = _read_header(container, at)
    if header.directory == AT_END * SECTOR_BYTES:
        at = container.size_bytes - FOOTER_FROM_END
        footer = _read_header(container, at)
        header = footer._replace(descriptor=header.descriptor, descriptor_bytes=header.descriptor_bytes)
    if header.directory > container.size_bytes:
        raise container.error(at + 56, f"the directory is said to lie at {header.directory}, not in the file")
    return header


def _read_header(container: Container, at: int) -> Header:
    if container.read(0, 4, "the header") == DESCRIPTOR_MAGIC[:4]:
        raise UnsupportedFormatError(f"{container.name} names other files; only VMDK of one file is read")
    magic, version, flags, capacity, grain, descriptor, length, entries, _, directory, _, _, ends, algorithm = (
        HEADER.unpack(container.read(at, HEADER.size, "the header"))
    )
    if magic != MAGIC:
        raise container.error(at, "there is no header: the file was cut off, or it is no VMDK")
    if not 1 <= version <= 3 or flags & ~_KNOWN_FLAGS:
        raise UnsupportedFormatError(f"{container.name} is VMDK of version {version}, flags {flags:#x}: not known")
    if flags & NEWLINES and ends != LINE_ENDS:
        raise container.error(at + 73, "the line ends are damaged: the file was copied as text")
    if bool(flags & COMPRESSED) != bool(flags & MARKERS) or algorithm != (DEFLATE if flags & COMPRESSED else 0):
        raise UnsupportedFormatError(f"{container.name} packs its grains in a way that is not known")
    limit = _PACKED_LIMIT_BYTES // SECTOR_BYTES if flags & COMPRESSED else _GRAIN_LIMIT_SECTORS
    if not 1 <= grain <= limit or grain & (grain - 1):
        raise container.error(at + 20, f"stands a grain of {grain} sectors")
    if entries != TABLE_ENTRIES:
        raise container.error(at + 44, f"stands a table of {entries} entries")
    if -(-capacity // (grain * TABLE_ENTRIES)) * 4 > TABLE_LIMIT_BYTES:
        raise container.error(at + 12, f"stands a disk of {capacity} sectors")
    if descriptor and not 0 < length * SECTOR_BYTES <= _DESCRIPTOR_LIMIT_BYTES:
        raise container.error(at + 36, f"stands a descriptor of {length} sectors")
    places = (capacity, grain, descriptor, length, directory)
    return Header(flags, *(place * SECTOR_BYTES for place in places))


class VmdkImage(MappedImage):
    """An open VMDK."""

    def __init__(self, container: Container) -> None:
        self._header = header = read_header(container)
        _check_descriptor(container, header)
        super().__init__(container, header.size_bytes, header.grain_bytes, TABLE_ENTRIES)
        count = self._page_count()
        sectors = container.array(header.directory, count, "<u4", "the directory")
        used = np.sort(sectors[sectors != 0])
        if len(used) > 1 and (used[1:] == used[:-1]).any():
            # Work would not be bounded by the size of the file.
            raise container.error(header.directory, "two entries of the directory name one table")
        self._directory = sectors * SECTOR_BYTES

    def present(self) -> Iterable[int]:
        """Tables that are there."""
        pages: list[int] = np.flatnonzero(self._directory).tolist()
        return pages

    def load(self, page: int) -> Units | None:
        """See `MappedImage.load`."""
        at = int(self._directory[page])
        if at == 0:
            return None
        count = min(TABLE_ENTRIES, -(-self._size_bytes // self._unit_bytes) - page * TABLE_ENTRIES)
        sectors = self.container.array(at, count, "<u4", "a table of grains")
        zero = (sectors == 1) & bool(self._header.flags & ZERO_GRAINS)
        data = (sectors != 0) & ~zero
        places = sectors * SECTOR_BYTES
        units = page * TABLE_ENTRIES + np.arange(count)
        needed = np.minimum(self._unit_bytes, self._size_bytes - units * self._unit_bytes)
        if self._header.flags & COMPRESSED:
            needed = np.full(count, MARKER.size)
        bad = data & (places > self.container.size_bytes - needed)
        if bad.any():
            slot = int(bad.argmax())
            raise self.container.error(
                at + slot * 4,
                f"grain {int(units[slot])} is said to lie at sector {int(sectors[slot])}, not in the file",
            )
        kinds = np.full(count, BELOW, dtype=np.uint8)
        kinds[zero], kinds[data] = ZERO, PACKED if self._header.flags & COMPRESSED else DATA
        return Units(kinds, places)

    def unpack(self, place: int, unit: int) -> bytes:
        """See `MappedImage.unpack`."""
        sector, length = self.container.fields(MARKER, place, "the marker of a grain")
        if sector * SECTOR_BYTES != unit * self._unit_bytes:
            raise self.container.error(place, f"stands the grain of sector {sector}, not that of grain {unit}")
        # Deflate adds little to what it cannot pack.
        if not 0 < length <= 2 * self._unit_bytes + 1024:
            raise self.container.error(place + 8, f"stands a packed grain of {length} bytes")
        packed = self.container.read(place + MARKER.size, length, "a packed grain")
        try:
            plain = packing.inflate(packed, self._unit_bytes, packing.VMDK_WINDOW)
        except packing.PackingError as error:
            raise self.container.error(place, f"a packed grain does not unpack: {error}") from error
        wanted = min(self._unit_bytes, self._size_bytes - unit * self._unit_bytes)
        if len(plain) < wanted:
            raise self.container.error(place, f"a packed grain has {len(plain)} bytes, not {wanted}")
        return plain


def _check_descriptor(container: Container, header: Header) -> None:
    """That the text describes a disk of this file alone."""
    if header.descriptor == 0:
        raise UnsupportedFormatError(f"{container.name} is a part of a VMDK of several files; only one file is read")
    data = container.read(header.descriptor, header.descriptor_bytes, "the descriptor")
    text = data.split(b"\0", 1)[0].decode("utf-8", "replace")
    found = re.search(r'^\s*createType\s*=\s*"([^"\n]*)"', text, re.MULTILINE)
    kind = found[1] if found else ""
    if kind not in _KINDS:
        raise UnsupportedFormatError(
            f"{container.name} is VMDK of the type {kind!r}; the types {' and '.join(sorted(_KINDS))} are read"
        )
    parent = re.search(r"^\s*parentCID\s*=\s*([0-9a-fA-F]+)", text, re.MULTILINE)
    if parent and parent[1].lower() != "ffffffff":
        raise UnsupportedFormatError(f"{container.name} is a difference to another disk; merge it into that first")
    if len(re.findall(r"^\s*(?:RW|RDONLY|NOACCESS)\s+\d+\s", text, re.MULTILINE)) != 1:
        raise UnsupportedFormatError(f"{container.name} is VMDK of several files; only one file is read")
