"""The two copies of the root of a pool (docs/FORMAT.md, "Superblock copy"): reading, choosing, making."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from snapcore.digest import xxh64_blocks
from snapcore.errors import DamagedError, UnsupportedFormatError

COPY_BYTES = 512
COPY_OFFSETS = (0, 4096)
FILE_BYTES = 8192
_MAGIC = b"SNAPPOOL"
_VERSION = 1
_BLOCK_BYTES = 4096
_PAGE_ENTRIES = 128
_CLEAN = 1
# Feature bits without which a pool cannot be read: there are images that fill up from a region.
LAZY = 1
_FIELDS = struct.Struct("<8sIIII16s11QIIQ")


@dataclass(frozen=True, slots=True)
class Superblock:
    """What one copy says; fields as in docs/FORMAT.md, in its order."""

    uuid: bytes
    generation: int
    log_sectors: int
    log_next: int
    commit_number: int
    catalog_ref: int
    catalog_bytes: int
    catalog_xxh64: int
    slots: int
    end_blocks: int
    space_root: int
    limit_bytes: int
    clean: bool
    must_read: int = 0

    @property
    def seed(self) -> int:
        """Of all checksums in the pool."""
        return int.from_bytes(self.uuid[:8], "little")

    def encode(self) -> bytes:
        """The 512 bytes of a copy."""
        numbers = (
            self.generation,
            self.log_sectors,
            self.log_next,
            self.commit_number,
            self.catalog_ref,
            self.catalog_bytes,
            self.catalog_xxh64,
            self.slots,
            self.end_blocks,
            self.space_root,
            self.limit_bytes,
        )
        flags = _CLEAN if self.clean else 0
        fields = (_MAGIC, _VERSION, self.must_read, 0, 0, self.uuid, *numbers, _BLOCK_BYTES, _PAGE_ENTRIES, flags)
        body = _FIELDS.pack(*fields).ljust(COPY_BYTES - 8, b"\0")
        return body + checksum(body, 0).to_bytes(8, "little")


def new_uuid() -> bytes:
    """Of a new pool."""
    return os.urandom(16)


def checksum(data: bytes, seed: int) -> int:
    """XXH64 of one piece."""
    return int(xxh64_blocks(data, len(data), seed)[0])


def decode(data: bytes, where: str) -> Superblock | None:
    """One copy; None when it is not whole. A whole copy of another format is an error."""
    if len(data) != COPY_BYTES or not data.startswith(_MAGIC):
        return None
    if int.from_bytes(data[-8:], "little") != checksum(data[:-8], 0):
        return None
    fields = _FIELDS.unpack_from(data)
    _, version, must_read, must_write, _, uuid = fields[:6]
    block_bytes, entries, flags = fields[17:]
    if version != _VERSION or must_read & ~LAZY or must_write:
        raise UnsupportedFormatError(
            f"{where}: format {version} with features {must_read:#x} and {must_write:#x}; "
            f"this snapcore knows format {_VERSION} with features {LAZY:#x} and none; use a newer one"
        )
    copy = Superblock(*(uuid, *fields[6:17], bool(flags & _CLEAN), must_read))
    if (
        (block_bytes, entries, flags & ~_CLEAN) != (_BLOCK_BYTES, _PAGE_ENTRIES, 0)
        or not 16 <= copy.log_sectors <= 1 << 32
        or not 4 <= copy.slots <= 1 << 40
        or not 1 <= copy.generation < 1 << 56
        or not 0 < copy.catalog_bytes <= copy.slots * 1016
        or copy.end_blocks > 1 << 40
        or max(copy.log_next, copy.commit_number) > 1 << 62
        or any(data[_FIELDS.size : -8])
    ):
        raise DamagedError(f"{where}: the superblock has values that no pool has; restore the pool from a backup")
    return copy


def read(path: str) -> tuple[Superblock, list[int]]:
    """The copy that counts, and the offsets of copies that are not whole.

    One damaged copy is harmless: the other one with the log gives the same state.
    """
    with open(path, "rb") as file:
        data = file.read(FILE_BYTES)
    copies = [decode(data[offset : offset + COPY_BYTES], path) for offset in COPY_OFFSETS]
    whole = [copy for copy in copies if copy is not None]
    if not whole:
        raise DamagedError(
            f"{path}: neither copy of the superblock (offsets 0 and 4096) is whole; restore the pool from a backup"
        )
    if len({(copy.uuid, copy.log_sectors) for copy in whole}) > 1:
        raise DamagedError(f"{path}: the copies of the superblock are of two pools; restore the pool from a backup")
    damaged = [offset for offset, copy in zip(COPY_OFFSETS, copies, strict=True) if copy is None]
    return max(whole, key=lambda copy: (copy.generation, not copy.clean)), damaged
