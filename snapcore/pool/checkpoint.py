"""Checkpoints: what is in memory becomes what is on the medium, without overwriting anything that the last one needs.

| step | a crash after it leaves |
| --- | --- |
| freeze (a commit) | the old checkpoint and a log that leads up to here |
| write pages and catalog to free slots, sync the map | the same |
| write superblock copy A, sync | A counts |
| write superblock copy B, sync | both are the new one |
| release slots, log, and blocks | nothing: memory only |
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from snapcore import log
from snapcore.core import PIECE_BLOCKS, Core
from snapcore.pages import KIND_CATALOG, SLOT_BYTES, PageFile
from snapcore.pool.catalog import Catalog
from snapcore.pool.files import Files
from snapcore.pool.superblock import COPY_BYTES, COPY_OFFSETS, Superblock, checksum
from snapcore.pool.versions import Versions

_FIRST_SLOT = 3
_PIECE_BYTES = 1016
_WRITE_SLOTS = 1000
_PAGE_ENTRIES = 128
# For the ways to what a sweep prunes, and to pieces of the bitmap.
_SPARE_SLOTS = 64


@dataclasses.dataclass(slots=True)
class Frozen:
    """The state at the moment when a checkpoint began."""

    generation: int
    dirty: npt.NDArray[np.uint64]
    log_next: int
    commit_number: int
    end_blocks: int
    space_root: int
    catalog: bytes
    used: npt.NDArray[np.uint64]

    def slots(self, more: npt.NDArray[np.uint64]) -> int:
        """How many slots of the map file the checkpoint needs: up to the last one that is used."""
        words = np.flatnonzero(self.used)
        last = int(words[-1]) * 64 + int(self.used[words[-1]]).bit_length() - 1 if len(words) else 0
        return max(last, int(more.max())) + 1


class Checkpointer:
    """Makes checkpoints of one pool, one at a time.

    Attributes
    ----------
    superblock : Superblock
        Of the last checkpoint.
    catalog_refs : list of int
        Pages of its catalog.
    must_read : int
        Feature bits that the next one has.
    written_bytes : int
        To the map and the superblock, in all checkpoints so far.
    """

    def __init__(self, files: Files, superblock: Superblock, catalog_refs: list[int]) -> None:
        self.files = files
        self.superblock = superblock
        self.catalog_refs = catalog_refs
        self.must_read = superblock.must_read
        self.written_bytes = 0

    def keep_back(self, core: Core) -> None:
        """Keep the slots back that a checkpoint takes beside those of changed trees: for the catalog and the bitmap."""
        pieces = core.end_blocks // PIECE_BLOCKS + 1
        core.page_file.spare = 2 * len(self.catalog_refs) + pieces + pieces // _PAGE_ENTRIES + _SPARE_SLOTS

    def freeze(self, versions: Versions) -> Frozen:
        """Begin; the caller holds the lock of versions."""
        generation, dirty, slots, log_next, commit_number, end_blocks, space_root = log.freeze(versions.core)
        for ref in self.catalog_refs:
            slot = np.uint64(ref & ((1 << 48) - 1))
            slots[slot >> np.uint64(6)] &= ~(np.uint64(1) << (slot & np.uint64(63)))
        roots = {version: volume.frozen_root for version, volume in versions.volumes.items()}
        catalog = versions.catalog.encode(roots, slots.tobytes())
        return Frozen(generation, dirty, log_next, commit_number, end_blocks, space_root, catalog, slots)

    def write(self, versions: Versions, frozen: Frozen, limit_bytes: int, *, clean: bool) -> None:
        """Make it durable. OSError when there was no space: the last checkpoint still counts, and one may try again."""
        core = versions.core
        pages = core.page_file
        seed = self.superblock.seed
        refs = put_catalog(pages, frozen.catalog)
        try:
            slots = np.array([ref & ((1 << 48) - 1) for ref in refs], dtype=np.uint64)
            self._write_pages(pages, np.union1d(frozen.dirty, slots))
            self._sync_map(core)
        except BaseException:
            pages.free_pages(np.array(refs, dtype=np.uint64))
            raise
        superblock = dataclasses.replace(
            self.superblock,
            generation=frozen.generation,
            log_next=frozen.log_next,
            commit_number=frozen.commit_number,
            catalog_ref=refs[0],
            catalog_bytes=len(frozen.catalog),
            catalog_xxh64=checksum(frozen.catalog, seed),
            slots=frozen.slots(slots),
            end_blocks=frozen.end_blocks,
            space_root=frozen.space_root,
            limit_bytes=limit_bytes,
            clean=clean,
            must_read=self.must_read,
        )
        self._write_superblock(core, superblock)
        pages.free_pages(np.array(self.catalog_refs, dtype=np.uint64))
        log.release(core, frozen.log_next)
        self.superblock, self.catalog_refs = superblock, refs
        self.keep_back(core)

    def reopen(self, versions: Versions) -> None:
        """Say that the pool is in use, before anything is logged: what the log holds counts from now on."""
        self.superblock = dataclasses.replace(
            self.superblock, clean=False, log_next=versions.core.log_next, commit_number=versions.core.commit_number
        )
        self._write_superblock(versions.core, self.superblock)

    def settle(self, core: Core) -> None:
        """Bring both copies of the superblock to the one that counts.

        A crash may have left an older one, or a damaged one. Before slots and blocks are used again that only the
        older one needs, either copy alone must do.
        """
        encoded = self.superblock.encode()
        offsets = [offset for offset in COPY_OFFSETS if os.pread(self.files.superblock, COPY_BYTES, offset) != encoded]
        self._write_superblock(core, self.superblock, offsets)

    def _write_superblock(self, core: Core, superblock: Superblock, offsets: Sequence[int] = COPY_OFFSETS) -> None:
        try:
            for offset in offsets:
                self.files.medium.write_at(self.files.superblock, [superblock.encode()], offset)
                self.files.medium.sync(self.files.superblock)
        except OSError as error:
            # Which of the two checkpoints counts is not known, so nothing may be written that either one needs.
            core.stop(error.errno or errno.EIO)
            raise
        self.written_bytes += len(offsets) * COPY_BYTES

    def _sync_map(self, core: Core) -> None:
        try:
            self.files.medium.sync(self.files.map)
        except OSError as error:
            core.stop(error.errno or errno.EIO)
            raise

    def _write_pages(self, pages: PageFile, slots: npt.NDArray[np.uint64]) -> None:
        for run in _runs(slots):
            self.files.medium.write_at(self.files.map, [pages.stage(run).data], int(run[0]) * SLOT_BYTES)
            pages.written(run)
            self.written_bytes += len(run) * SLOT_BYTES


def _runs(slots: npt.NDArray[np.uint64]) -> Iterator[npt.NDArray[np.uint64]]:
    """Slots that follow one another, a MiB at the most."""
    for run in np.split(slots, np.flatnonzero(np.diff(slots) != 1) + 1):
        for start in range(0, len(run), _WRITE_SLOTS):
            yield run[start : start + _WRITE_SLOTS]


def put_catalog(pages: PageFile, data: bytes) -> list[int]:
    """Pages that hold the catalog, the first one first."""
    refs: list[int] = []
    try:
        for start in range((len(data) - 1) // _PIECE_BYTES * _PIECE_BYTES, -1, -_PIECE_BYTES):
            following = refs[-1] if refs else 0
            refs.append(pages.put(KIND_CATALOG, following.to_bytes(8, "little") + data[start : start + _PIECE_BYTES]))
    except BaseException:
        pages.free_pages(np.array(refs, dtype=np.uint64))
        raise
    return refs[::-1]


def get_catalog(pages: PageFile, ref: int, size_bytes: int) -> tuple[bytes, list[int]]:
    """The catalog's bytes and its pages."""
    pieces: list[bytes] = []
    refs: list[int] = []
    while ref and len(refs) * _PIECE_BYTES < size_bytes:
        page = pages.get(KIND_CATALOG, ref)
        refs.append(ref)
        pieces.append(page[8:])
        ref = int.from_bytes(page[:8], "little")
    return b"".join(pieces)[:size_bytes], refs


def first_map(seed: int) -> tuple[bytes, int, bytes]:
    """The map of a new pool: its bytes, the reference of the catalog, the catalog."""
    data = Catalog().encode({}, b"")
    body = (1 | KIND_CATALOG << 56).to_bytes(8, "little") + bytes(8) + data.ljust(_PIECE_BYTES, b"\0")
    slot = checksum(body, (seed + _FIRST_SLOT) % (1 << 64)).to_bytes(8, "little") + body
    return bytes(_FIRST_SLOT * SLOT_BYTES) + slot, _FIRST_SLOT | 1 << 48, data
