"""Opens a pool: the newest superblock, its catalog and bitmaps, then the log once more over them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapcore.blockmap import Failure, PageFile
from snapcore.errors import DamagedError
from snapcore.persist import Medium
from snapcore.pool import catalog as catalogs
from snapcore.pool import journal, superblock
from snapcore.pool.checkpoint import KIND_BITMAP, PIECE_BLOCKS, Checkpointer, get_catalog
from snapcore.pool.failures import typed
from snapcore.pool.files import SLOT_BYTES, Files
from snapcore.pool.superblock import Superblock
from snapcore.pool.versions import Versions
from snapcore.volume import Core

BLOCK_BYTES = 4096
_SLOT_MASK = (1 << 48) - 1
# Blocks that were taken for writes that had not reached the file.
_SLACK_BLOCKS = 1 << 17


@dataclass(frozen=True, slots=True)
class Opened:
    """A pool in memory.

    Attributes
    ----------
    replayed : int
        Commits that were done again.
    damaged_copies : list of int
        Offsets of copies of the superblock that are not whole; the next checkpoint writes them anew.
    """

    versions: Versions
    checkpointer: Checkpointer
    replayed: int
    damaged_copies: list[int]


def open_state(files: Files, cache_bytes: int, *, give_up_log: bool = False) -> Opened:
    """Bring a pool into memory; nothing is written.

    Parameters
    ----------
    give_up_log : bool
        Leave out the log from where it is damaged on, for a repair.
    """
    block, damaged = superblock.read(files.path("superblock"))
    try:
        log = _read_log(files, block, give_up=give_up_log)
        versions, refs = _load(files, block, log, cache_bytes)
        _replay(versions, log, files.path("log"))
    except Failure as failure:
        raise typed(failure, files.folder, f"opening the pool {files.folder}") from None
    return Opened(versions, Checkpointer(files, block, refs), len(log.commits), damaged)


def _load(files: Files, block: Superblock, log: journal.Journal, cache_bytes: int) -> tuple[Versions, list[int]]:
    """The state of the checkpoint."""
    where = files.path("map")
    if os.fstat(files.map).st_size < block.slots * SLOT_BYTES:
        raise DamagedError(f"{where} is shorter than its {block.slots} slots; restore the pool from a backup")
    # The catalog says which slots are used, so it is read with all of them taken for used.
    every = np.full((block.slots + 63) // 64, (1 << 64) - 1, dtype=np.uint64)
    pages = PageFile(files.map, block.seed, block.generation + 1, block.slots, every, cache_bytes)
    data, refs = get_catalog(pages, block.catalog_ref, block.catalog_bytes)
    if len(data) != block.catalog_bytes or superblock.checksum(data, block.seed) != block.catalog_xxh64:
        raise DamagedError(f"{where}: the catalog does not match the superblock; restore the pool from a backup")
    catalog, slots = catalogs.decode(data, where)
    used = _words(slots, block.slots)
    for ref in refs:
        slot = ref & _SLOT_MASK
        used[slot >> 6] |= np.uint64(1 << (slot & 63))
    pages = PageFile(files.map, block.seed, block.generation + 1, block.slots, used, cache_bytes)
    core = Core(
        pages,
        files.data,
        files.log,
        None if type(files.medium) is Medium else files.medium,
        seed=block.seed,
        used=_space(files, pages, block),
        end=block.end_blocks,
        limit_blocks=block.limit_bytes // 4096,
        log_sectors=block.log_sectors,
        # Sectors of a torn commit may stand behind the end: they must never look like a part of what comes now.
        log_next=log.log_next + (0 if block.clean else block.log_sectors),
        commit_number=log.commit_number + 1,
        space_root=block.space_root,
    )
    return Versions(catalog, core), refs


def _words(data: bytes, bits: int) -> npt.NDArray[np.uint64]:
    """Bytes of a bitmap as words, for so many bits."""
    out = np.zeros((bits + 63) // 64, dtype="<u8")
    part = data[: len(out) * 8]
    out.view(np.uint8)[: len(part)] = np.frombuffer(part, dtype=np.uint8)
    return out


def _space(files: Files, pages: PageFile, block: Superblock) -> npt.NDArray[np.uint64]:
    """The bitmap of used blocks."""
    where = files.path("data")
    if block.end_blocks > os.fstat(files.data).st_size // BLOCK_BYTES + _SLACK_BLOCKS:
        raise DamagedError(f"{where} is shorter than its {block.end_blocks} blocks; restore the pool from a backup")
    pieces = (block.end_blocks + PIECE_BLOCKS - 1) // PIECE_BLOCKS
    out = np.zeros((pieces, PIECE_BLOCKS // 64), dtype="<u8")
    for number, ref in enumerate(pages.lookup(block.space_root, 0, pieces).tolist()):
        if ref > 1:
            out[number] = np.frombuffer(pages.get(KIND_BITMAP, ref), dtype="<u8")
    flat = out.reshape(-1)
    if np.bitwise_or.reduce(_beyond(flat, block.end_blocks), initial=0):
        raise DamagedError(f"{where}: the bitmap of used blocks goes beyond its end; restore the pool from a backup")
    return flat


def _beyond(words: npt.NDArray[np.uint64], bits: int) -> npt.NDArray[np.uint64]:
    """The words with only the bits from `bits` on."""
    rest = words[bits // 64 :].copy()
    if len(rest):
        rest[0] = int(rest[0]) >> (bits % 64)
    return rest


def _read_log(files: Files, block: Superblock, *, give_up: bool) -> journal.Journal:
    if block.clean:
        # Nothing was committed behind this checkpoint; old sectors in the log say nothing.
        return journal.Journal([], block.log_next, block.commit_number)
    try:
        return journal.read(files.path("log"), files.log, block)
    except DamagedError:
        if give_up:
            return journal.read(files.path("log"), files.log, block, leniently=True)
        raise


def _replay(versions: Versions, log: journal.Journal, where: str) -> None:
    for record in log.records(where):
        try:
            if isinstance(record, journal.Map):
                versions.core.replay(versions.volumes[record.version], record.position, record.count, record.entry)
            else:
                versions.apply(record)
        except (KeyError, ValueError, OverflowError) as error:
            raise DamagedError(
                f"{where}: a record does not fit what was before it ({type(error).__name__}: {error}); "
                "restore the pool from a backup"
            ) from None
