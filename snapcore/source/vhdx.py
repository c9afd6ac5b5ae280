"""Reading VHDX, as Microsoft's [MS-VHDX] describes it: no log to replay, no parent.

| where | what |
| --- | --- |
| 0 | file identifier |
| 64 KiB, 128 KiB | two headers; the one with the higher number that matches its checksum counts |
| 192 KiB, 256 KiB | two copies of the region table: where the block table and the metadata are |

The block table has an entry for each block and, after each `ratio` of them, one for the bitmap of their sectors, which
only differencing disks use. All numbers are little-endian, checksums are CRC-32C.
"""

from __future__ import annotations

import functools
import struct
import uuid
from typing import NamedTuple

import numpy as np

from snapcore.errors import RefusedError, UnsupportedFormatError
from snapcore.source.container import Container
from snapcore.source.mapped import BELOW, DATA, MappedImage, Units

MAGIC = b"vhdxfile"

_HEADERS = (64 << 10, 128 << 10)
_HEADER_BYTES = 4096
_HEADER = struct.Struct("<4sIQ16s16s16sHHIQ")
_REGIONS = (192 << 10, 256 << 10)
_REGION_TABLE_BYTES = 64 << 10
_TABLE_HEAD = struct.Struct("<4sIII")
_REGION_ENTRY = struct.Struct("<16sQII")
_REGION_LIMIT = 2047
_METADATA_HEAD = struct.Struct("<8sHH20x")
_METADATA_ENTRY = struct.Struct("<16sIII4x")
_METADATA_LIMIT = 2047
_METADATA_TABLE_BYTES = 64 << 10
_METADATA_ITEM_LIMIT_BYTES = 1 << 20
_METADATA_REQUIRED = 1 << 2
_MIB = 1 << 20
_PAGE_ENTRIES = 8192

_BLOCK_TABLE = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_FILE_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_DISK_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
_DISK_ID = uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
_SECTOR_SIZE = uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
_PHYSICAL_SECTOR_SIZE = uuid.UUID("cda348c7-445d-4471-9cc9-e9885251c556")
_PARENT = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
_KNOWN_ITEMS = {_FILE_PARAMETERS, _DISK_SIZE, _DISK_ID, _SECTOR_SIZE, _PHYSICAL_SECTOR_SIZE, _PARENT}
_HAS_PARENT = 1 << 1

# States of a block: in the file, or one of those that read as zeros (absent, undefined, zero, unmapped; 5 is what
# drafts of the format had for 3).
_PRESENT = 6
_ABSENT = (0, 1, 2, 3, 5)


class Region(NamedTuple):
    """A part of the file."""

    offset: int
    length: int


class Parameters(NamedTuple):
    """What the metadata say."""

    size_bytes: int
    block_bytes: int
    sector_bytes: int


class VhdxImage(MappedImage):
    """An open VHDX."""

    def __init__(self, container: Container) -> None:
        if container.read(0, len(MAGIC), "the file identifier") != MAGIC:
            raise container.error(0, "there is no file identifier")
        _check_header(container)
        regions = _read_regions(container)
        self._table = regions[_BLOCK_TABLE]
        parameters = _read_metadata(container, regions[_METADATA])
        self._ratio = (parameters.sector_bytes << 23) // parameters.block_bytes
        blocks = -(-parameters.size_bytes // parameters.block_bytes)
        if self._slot(max(0, blocks - 1)) * 8 + 8 > self._table.length:
            raise container.error(self._table.offset, f"a block table of {self._table.length} bytes is too short")
        super().__init__(container, parameters.size_bytes, parameters.block_bytes, _PAGE_ENTRIES)

    def _slot(self, block: int) -> int:
        return block + block // self._ratio

    def load(self, page: int) -> Units:
        """See `MappedImage.load`."""
        first = page * _PAGE_ENTRIES
        blocks = first + np.arange(min(_PAGE_ENTRIES, -(-self._size_bytes // self._unit_bytes) - first))
        slots = blocks + blocks // self._ratio
        at = self._table.offset + int(slots[0]) * 8
        found = self.container.array(at, int(slots[-1] - slots[0]) + 1, "<u8", "the block table")[slots - slots[0]]
        states, places = found & 7, (found >> 20 & (1 << 44) - 1) * _MIB
        data = states == _PRESENT
        needed = np.minimum(self._unit_bytes, self._size_bytes - blocks * self._unit_bytes)
        bad = (found & 0xF_FFF8 != 0) | ~(data | np.isin(states, _ABSENT))
        # A place below the first MiB is where headers are; the sum cannot wrap: places have 64 bits less 20 of them.
        bad |= data & ((places < _MIB) | (places < 0) | (places > self.container.size_bytes - needed))
        if bad.any():
            slot = int(bad.argmax())
            entry = int(found[slot]) & (1 << 64) - 1
            raise self.container.error(
                self._table.offset + int(slots[slot]) * 8, f"the entry of block {first + slot} is {entry:#x}"
            )
        return Units(np.where(data, DATA, BELOW).astype(np.uint8), places)


def _check_header(container: Container) -> None:
    """ImageError without a valid header; RefusedError when the log has something in it."""
    newest: tuple[int, ...] | None = None
    for at in _HEADERS:
        record = container.read(at, _HEADER_BYTES, "a header")
        fields = _HEADER.unpack_from(record)
        valid = fields[0] == b"head" and fields[1] == _crc32c(record[:4] + bytes(4) + record[8:])
        if valid and (newest is None or fields[2] > newest[2]):
            newest = fields
    if newest is None:
        raise container.error(_HEADERS[0], "neither header matches its checksum")
    *_, log_id, _, version, _, _ = newest
    if version != 1:
        raise UnsupportedFormatError(f"{container.name} is VHDX of version {version}, and only version 1 is read")
    if any(log_id):  # type: ignore[arg-type]
        raise RefusedError(
            f"{container.name} has a log that was not replayed: it was not closed well. Open it once for writing "
            "where it came from, or with `qemu-img check -r all`, and try again"
        )


def _read_regions(container: Container) -> dict[uuid.UUID, Region]:
    for at in _REGIONS:
        record = container.read(at, _REGION_TABLE_BYTES, "the region table")
        signature, found, count, _ = _TABLE_HEAD.unpack_from(record)
        if signature == b"regi" and found == _crc32c(record[:4] + bytes(4) + record[8:]) and count <= _REGION_LIMIT:
            break
    else:
        raise container.error(_REGIONS[0], "neither region table matches its checksum")
    regions: dict[uuid.UUID, Region] = {}
    for number in range(count):
        place = _TABLE_HEAD.size + number * _REGION_ENTRY.size
        raw, offset, length, required = _REGION_ENTRY.unpack_from(record, place)
        name = uuid.UUID(bytes_le=raw)
        if name not in (_BLOCK_TABLE, _METADATA):
            if required & 1:
                raise UnsupportedFormatError(f"{container.name} needs the region {name}, which is unknown")
            continue
        if name in regions or offset < _MIB or offset + length > container.size_bytes:
            raise container.error(at + place, f"the region {name} of {length} bytes at {offset} cannot be")
        regions[name] = Region(offset, length)
    if len(regions) < 2:
        raise container.error(at, "the region table lacks the block table or the metadata")
    return regions


def _read_metadata(container: Container, region: Region) -> Parameters:
    items = _read_items(container, region)

    def number(name: uuid.UUID, layout: str) -> tuple[int, ...]:
        if name not in items or items[name].length < struct.calcsize(layout):
            raise container.error(region.offset, f"the metadata lack the item {name}")
        return container.fields(struct.Struct(layout), items[name].offset, f"the item {name}")

    block_bytes, flags = number(_FILE_PARAMETERS, "<II")
    (size_bytes,) = number(_DISK_SIZE, "<Q")
    (sector_bytes,) = number(_SECTOR_SIZE, "<I")
    if flags & _HAS_PARENT:
        raise UnsupportedFormatError(f"{container.name} is a differencing disk; merge it into its parent first")
    if not _MIB <= block_bytes <= 256 * _MIB or block_bytes & (block_bytes - 1):
        raise container.error(items[_FILE_PARAMETERS].offset, f"stands a block of {block_bytes} bytes")
    if sector_bytes not in (512, 4096):
        raise container.error(items[_SECTOR_SIZE].offset, f"stands a sector of {sector_bytes} bytes")
    if size_bytes > 64 << 40 or size_bytes % sector_bytes:
        raise container.error(items[_DISK_SIZE].offset, f"stands a disk of {size_bytes} bytes")
    return Parameters(size_bytes, block_bytes, sector_bytes)


def _read_items(container: Container, region: Region) -> dict[uuid.UUID, Region]:
    """Where the items of the metadata are."""
    if region.length < _METADATA_TABLE_BYTES:
        raise container.error(region.offset, f"the metadata have {region.length} bytes, too few for their table")
    record = container.read(region.offset, _METADATA_TABLE_BYTES, "the metadata table")
    signature, _, count = _METADATA_HEAD.unpack_from(record)
    if signature != b"metadata" or count > _METADATA_LIMIT:
        raise container.error(region.offset, "there is no metadata table")
    items: dict[uuid.UUID, Region] = {}
    for number in range(count):
        place = _METADATA_HEAD.size + number * _METADATA_ENTRY.size
        raw, offset, length, flags = _METADATA_ENTRY.unpack_from(record, place)
        name = uuid.UUID(bytes_le=raw)
        if name not in _KNOWN_ITEMS:
            if flags & _METADATA_REQUIRED:
                raise UnsupportedFormatError(f"{container.name} needs the metadata {name}, which are unknown")
            continue
        inside = offset >= _METADATA_TABLE_BYTES and offset + length <= region.length
        if name in items or not inside or length > _METADATA_ITEM_LIMIT_BYTES:
            raise container.error(region.offset + place, f"the item {name} of {length} bytes at {offset} cannot be")
        items[name] = Region(region.offset + offset, length)
    return items


@functools.cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F6_3B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def _crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), of tables of up to 64 KiB."""
    table = _crc_table()
    value = 0xFFFF_FFFF
    for byte in data:
        value = value >> 8 ^ table[(value ^ byte) & 0xFF]
    return value ^ 0xFFFF_FFFF
