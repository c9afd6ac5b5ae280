"""Reading VHD, fixed and dynamic, as Microsoft's "Virtual Hard Disk Image Format Specification" of 2006 describes it.

A fixed disk is the disk and a footer of 512 bytes. A dynamic one has a copy of the footer in front, a header, a table
of 32-bit sector numbers, and for each block that is there a bitmap of its sectors and the block. A sector that was
never written is zero in its block too, so the bitmap says nothing that reading needs. All numbers are big-endian.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from snapcore import extents
from snapcore.errors import UnsupportedFormatError
from snapcore.extents import Extents
from snapcore.source.container import Container
from snapcore.source.mapped import BELOW, DATA, MappedImage, Units

COOKIE = b"conectix"
FOOTER_BYTES = 512
SECTOR_BYTES = 512
VERSION = 0x0001_0000
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
# Cookie, features, version, data offset, time, creator and its version and host, original and current size, geometry,
# type, checksum, id, saved state.
FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427x")
CHECKSUM_OFFSET = 64

_HEADER = struct.Struct(">8sQQIIII")
_HEADER_BYTES = 1024
_HEADER_CHECKSUM_OFFSET = 36
_HEADER_COOKIE = b"cxsparse"
_NO_BLOCK = 0xFFFF_FFFF
_PAGE_ENTRIES = 8192


class Footer(NamedTuple):
    """What is read of a footer."""

    kind: int
    size_bytes: int
    header_offset: int


def checksum(record: bytes, at: int) -> int:
    """The sum over a footer or header, its own four bytes left out, with all bits turned over."""
    return ~(sum(record) - sum(record[at : at + 4])) & 0xFFFF_FFFF


def read_footer(container: Container) -> Footer:
    """The footer at the end or, of a dynamic disk, its copy in front; checked."""
    at = max(0, container.size_bytes - FOOTER_BYTES)
    if container.read(0, len(COOKIE), "the footer's copy") == COOKIE:
        at = 0
    record = container.read(at, FOOTER_BYTES, "the footer")
    cookie, _, version, header_offset, _, _, _, _, _, size, _, _, _, kind, found, *_ = FOOTER.unpack(record)
    if cookie != COOKIE:
        raise container.error(at, "there is no footer: the file was cut off, or it is no VHD")
    if found != checksum(record, CHECKSUM_OFFSET):
        raise container.error(at, "the footer does not match its checksum")
    if version != VERSION:
        raise UnsupportedFormatError(f"{container.name} is VHD of version {version:#x}, and only {VERSION:#x} is read")
    if kind == DIFFERENCING:
        raise UnsupportedFormatError(f"{container.name} is a differencing disk; merge it into its parent first")
    if kind not in (FIXED, DYNAMIC):
        raise container.error(at + 60, f"stands the disk type {kind}")
    if size > (1 << 62):
        raise container.error(at + 48, f"stands a disk of {size} bytes")
    if kind == FIXED and size > container.size_bytes - FOOTER_BYTES:
        raise container.error(at + 48, f"a disk of {size} bytes does not fit a file of {container.size_bytes}")
    return Footer(kind, size, header_offset)


class VhdImage(MappedImage):
    """An open VHD."""

    def __init__(self, container: Container) -> None:
        footer = read_footer(container)
        self._fixed = footer.kind == FIXED
        self._table_offset = 0
        # A fixed disk is one unit.
        unit_bytes, self._bitmap_bytes = max(SECTOR_BYTES, footer.size_bytes), 0
        if not self._fixed:
            self._table_offset, unit_bytes = _read_header(container, footer)
            # A bit a sector, in whole sectors.
            self._bitmap_bytes = -(-unit_bytes // SECTOR_BYTES // 8 // SECTOR_BYTES) * SECTOR_BYTES
        super().__init__(container, footer.size_bytes, unit_bytes, _PAGE_ENTRIES)

    def data_extents(self) -> Extents:
        """Where data may be; see `Source.data_extents`."""
        if self._fixed:
            return extents.clipped(self.container.data_extents(), 0, self._size_bytes)
        return super().data_extents()

    def load(self, page: int) -> Units:
        """See `MappedImage.load`."""
        if self._fixed:
            return Units(np.array([DATA], dtype=np.uint8), np.zeros(1, dtype=np.int64))
        first = page * _PAGE_ENTRIES
        count = min(_PAGE_ENTRIES, -(-self._size_bytes // self._unit_bytes) - first)
        at = self._table_offset + first * 4
        sectors = self.container.array(at, count, ">u4", "the table of blocks")
        data = sectors != _NO_BLOCK
        places = sectors * SECTOR_BYTES + self._bitmap_bytes
        needed = np.minimum(self._unit_bytes, self._size_bytes - (first + np.arange(count)) * self._unit_bytes)
        bad = data & ((sectors == 0) | (places + needed > self.container.size_bytes))
        if bad.any():
            slot = int(bad.argmax())
            raise self.container.error(
                at + slot * 4, f"block {first + slot} is said to lie at sector {int(sectors[slot])}, not in the file"
            )
        return Units(np.where(data, DATA, BELOW).astype(np.uint8), places)


def _read_header(container: Container, footer: Footer) -> tuple[int, int]:
    """(offset of the table, bytes of a block) of a dynamic disk."""
    at = footer.header_offset
    record = container.read(at, _HEADER_BYTES, "the header of a dynamic disk")
    cookie, _, table, version, entries, block_bytes, found = _HEADER.unpack_from(record)
    if cookie != _HEADER_COOKIE:
        raise container.error(at, "there is no header of a dynamic disk")
    if found != checksum(record, _HEADER_CHECKSUM_OFFSET):
        raise container.error(at, "the header does not match its checksum")
    if version != VERSION:
        raise UnsupportedFormatError(f"{container.name} has a header of version {version:#x}, which is unknown")
    if block_bytes < SECTOR_BYTES or block_bytes & (block_bytes - 1):
        raise container.error(at + 32, f"stands a block of {block_bytes} bytes")
    if entries * block_bytes < footer.size_bytes:
        raise container.error(at + 28, f"{entries} blocks are too few for a disk of {footer.size_bytes} bytes")
    if table + -(-footer.size_bytes // block_bytes) * 4 > container.size_bytes:
        raise container.error(at + 16, f"the table of blocks at {table} reaches behind the end of the file")
    return table, block_bytes
