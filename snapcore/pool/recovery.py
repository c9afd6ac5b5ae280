"""Opens a pool: the newest superblock, its catalog and bitmaps, then the log once more over them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapcore import space
from snapcore.blockmap import Trees
from snapcore.core import BLOCK_BYTES, OUT_OF_RANGE, PIECE_BLOCKS, Core
from snapcore.errors import DamagedError
from snapcore.pages import KIND_BITMAP, SLOT_BYTES, Failure
from snapcore.persist import Medium
from snapcore.pool import catalog as catalogs
from snapcore.pool import events, journal, superblock
from snapcore.pool.backings import Backings
from snapcore.pool.catalog import MAX_ID, Backing, Catalog
from snapcore.pool.checkpoint import Checkpointer, get_catalog
from snapcore.pool.failures import typed
from snapcore.pool.files import Files
from snapcore.pool.regions import Regions
from snapcore.pool.superblock import Superblock
from snapcore.pool.versions import Versions

LEVELS = 5
LOST = 2
_SLOT_MASK = (1 << 48) - 1


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


def open_state(files: Files, cache_bytes: int, *, give_up_log: bool = False, regions: Regions | None = None) -> Opened:
    """Bring a pool into memory; nothing is written, but for empty files of images that fill up and were lost.

    Parameters
    ----------
    regions : Regions, optional
    give_up_log : bool
        Leave out the log from where it is damaged on, for a repair.
    """
    block, damaged = superblock.read(files.path("superblock"))
    try:
        log = _read_log(files, block, give_up=give_up_log)
        versions, refs = _load(files, block, log, cache_bytes, regions)
        try:
            _replay(versions, log, files.path("log"))
        except BaseException:
            versions.close()
            raise
    except Failure as failure:
        raise typed(failure, files.folder, f"opening the pool {files.folder}") from None
    return Opened(versions, Checkpointer(files, block, refs), len(log.commits), damaged)


def _load(
    files: Files, block: Superblock, log: journal.Journal, cache_bytes: int, regions: Regions | None
) -> tuple[Versions, list[int]]:
    """The state of the checkpoint."""
    catalog, refs, slots = _load_catalog(files, block, cache_bytes)
    # What the file has behind the last used slot is there to be used: a full host may give no more.
    count = max(block.slots, os.fstat(files.map).st_size // SLOT_BYTES)
    used = _words(slots, count)
    for ref in refs:
        slot = ref & _SLOT_MASK
        used[slot >> 6] |= np.uint64(1 << (slot & 63))
    pages = Trees(files.map, block.seed, _next_generation(block), count, used, cache_bytes)
    core = _core(files, pages, block, log, _space(files, pages, block), block.space_root)
    backings = Backings(files, regions, _decoupled(block, log, files.path("log")))
    return Versions(catalog, core, backings, writable=not files.read_only), refs


def _decoupled(block: Superblock, log: journal.Journal, where: str) -> frozenset[int]:
    """Images that are all here by what the log says, though the checkpoint still knows a region of theirs.

    They are opened as what they will be once the log was done again: what says how much of them is here counts no
    more, and nothing that is wrong about it may empty them.
    """
    found: set[int] = set()
    # What a log in repair has behind the damage is not done again.
    with contextlib.suppress(DamagedError):
        records = log.records(where) if block.must_read & superblock.LAZY else ()
        found.update(record.backing for record in records if isinstance(record, events.Decouple))
    return frozenset(found)


def _load_catalog(files: Files, block: Superblock, cache_bytes: int) -> tuple[Catalog, list[int], bytes]:
    """The catalog, its pages, and the bitmap of used slots."""
    where = files.path("map")
    if os.fstat(files.map).st_size < block.slots * SLOT_BYTES:
        raise DamagedError(f"{where} is shorter than its {block.slots} slots; restore the pool from a backup")
    pages = _with_all_slots(files, block, cache_bytes)
    data, refs = get_catalog(pages, block.catalog_ref, block.catalog_bytes)
    if len(data) != block.catalog_bytes or superblock.checksum(data, block.seed) != block.catalog_xxh64:
        raise DamagedError(f"{where}: the catalog does not match the superblock; restore the pool from a backup")
    catalog, slots = catalogs.decode(data, where)
    return catalog, refs, slots


def _with_all_slots(files: Files, block: Superblock, cache_bytes: int) -> Trees:
    """For reading before it is known which slots are used."""
    every = np.full((block.slots + 63) // 64, (1 << 64) - 1, dtype=np.uint64)
    return Trees(files.map, block.seed, _next_generation(block), block.slots, every, cache_bytes)


def _core(
    files: Files,
    pages: Trees,
    block: Superblock,
    log: journal.Journal,
    used: npt.NDArray[np.uint64],
    space_root: int,
) -> Core:
    return Core(
        pages,
        files.data,
        files.log,
        None if type(files.medium) is Medium else files.medium,
        seed=block.seed,
        used=used,
        end=block.end_blocks,
        limit_blocks=block.limit_bytes // BLOCK_BYTES,
        log_sectors=block.log_sectors,
        # Sectors of a torn commit may stand behind the end: they must never look like a part of what comes now.
        log_next=log.log_next + (0 if block.clean else block.log_sectors),
        commit_number=log.commit_number + 1,
        space_root=space_root,
    )


def _words(data: bytes, bits: int) -> npt.NDArray[np.uint64]:
    """Bytes of a bitmap as words, for so many bits."""
    out = np.zeros((bits + 63) // 64, dtype="<u8")
    part = data[: len(out) * 8]
    out.view(np.uint8)[: len(part)] = np.frombuffer(part, dtype=np.uint8)
    return out


def _space(files: Files, pages: Trees, block: Superblock) -> npt.NDArray[np.uint64]:
    """The bitmap of used blocks."""
    where = files.path("data")
    if block.end_blocks > os.fstat(files.data).st_size // BLOCK_BYTES:
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


def _next_generation(block: Superblock) -> int:
    """A generation that no page in the file is of.

    A checkpoint that a crash cut short has written pages of the one that would come next, and they must not be taken
    for what is written there now; so after a crash some are skipped, and by chance, since there may be several crashes.
    """
    return block.generation + 1 + (0 if block.clean else secrets.randbelow(1 << 15))


def _read_log(files: Files, block: Superblock, *, give_up: bool) -> journal.Journal:
    if os.fstat(files.log).st_size < block.log_sectors * journal.SECTOR_BYTES:
        # A commit that ended here could not be read back.
        raise DamagedError(
            f"{files.path('log')} is shorter than its {block.log_sectors} sectors; restore the pool from a backup"
        )
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
                versions.volumes[record.version].replay(record.position, record.count, record.entry)
            else:
                _check_event(record, versions.catalog)
                versions.apply(record)
        except (KeyError, ValueError, OverflowError) as error:
            raise _misfit(where, f"{type(error).__name__}: {error}") from None
        except Failure as failure:
            if failure.result == OUT_OF_RANGE:
                raise _misfit(where, f"block {failure.slot} is not inside of its disk") from None
            raise
    space.settle_freed(versions.core)
    if log.commits:
        catalogs.check(versions.catalog, where)


def _misfit(where: str, why: str) -> DamagedError:
    return DamagedError(
        f"{where}: a record does not fit what was before it ({why}); restore the pool from a backup, or give up what "
        "comes behind it with `snapcore pool check --repair`"
    )


def _check_event(event: events.Event, catalog: Catalog) -> None:
    """Numbers are new where they must be, and versions are of the kind that the event is for."""
    new: list[int] = []
    kinds: list[tuple[int, str]] = []
    match event:
        case events.MakeDisk() | events.MakeDisks():
            disks = event.disks if isinstance(event, events.MakeDisks) else [event]
            images = {image for disk in disks for image in _new_image(disk.backing, catalog)}
            new = [number for disk in disks for number in (disk.disk, disk.version)] + [*images]
            kinds = [(disk.parent, "snapshot") for disk in disks if disk.parent]
        case events.Cut():
            new = [version for _, version, _ in event.cuts] + ([event.group] if event.group else [])
        case events.Clone():
            new = [event.ghost, event.disk, event.version]
        case events.Rehead():
            new = [event.version, *_new_image(event.image, catalog)]
            kinds = [(event.parent, "snapshot")] if event.parent else []
        case events.Delete():
            kinds = [(version, "snapshot") for version in event.versions]
        case events.Sweep():
            kinds = [(event.version, "ghost")]
    if not all(catalog.next_id <= number < MAX_ID for number in new) or len({*new}) < len(new):
        raise ValueError("a number is taken, or is none")
    if any(catalog.versions[version].kind != kind for version, kind in kinds):
        raise ValueError("a version is of another kind")


def _new_image(image: Backing | None, catalog: Catalog) -> list[int]:
    """Its number, unless it is one that others use already."""
    if image is None or (image.region is not None and catalog.backings.get(image.id) == image):
        return []
    return [image.id]


def rebuild_state(files: Files, cache_bytes: int) -> Opened:
    """Bring a damaged pool into memory with bitmaps made from its trees; what cannot be read is lost from now on.

    The log is done again up to where it is damaged or fits no more. Nothing is written.
    """
    block, damaged = superblock.read(files.path("superblock"))
    # Blocks behind the end of the file are lost, and cost no memory.
    in_file = os.fstat(files.data).st_size // BLOCK_BYTES
    block = dataclasses.replace(block, end_blocks=min(block.end_blocks, in_file))
    try:
        log = _read_log(files, block, give_up=True)
        catalog, refs = _load_catalog(files, block, cache_bytes)[:2]
        reached, blocks, lost = _reach(files, block, catalog, refs, cache_bytes)
        pages = Trees(files.map, block.seed, _next_generation(block), block.slots, reached, cache_bytes)
        if lost:
            cut = _Cut(pages, block.end_blocks)
            for record in catalog.versions.values():
                record.root = cut.readable(record.root, LEVELS - 1)
            now = np.zeros((pages.slots + 63) // 64, dtype=np.uint64)
            _mark(pages, block, catalog, refs, now)
            pages.free_pages(_numbers(pages.used_slots() & ~now))
        core = _core(files, pages, block, log, blocks, 0)
        space.rewrite(core)
        backings = Backings(files, None, _decoupled(block, log, files.path("log")))
        versions = Versions(catalog, core, backings)
    except Failure as failure:
        raise typed(failure, files.folder, f"repairing the pool {files.folder}") from None
    with contextlib.suppress(DamagedError, Failure):
        _replay(versions, log, files.path("log"))
    # A record that fits nothing may have been done in part.
    catalogs.check(versions.catalog, files.path("log"))
    return Opened(versions, Checkpointer(files, block, refs), len(log.commits), damaged)


def _reach(
    files: Files, block: Superblock, catalog: Catalog, refs: list[int], cache_bytes: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], bool]:
    """Bitmaps of slots and blocks that the versions of a checkpoint reach, and whether something cannot be read."""
    slots = np.zeros((block.slots + 63) // 64, dtype=np.uint64)
    blocks, lost = _mark(_with_all_slots(files, block, cache_bytes), block, catalog, refs, slots)
    return slots, blocks, lost


def _mark(
    pages: Trees, block: Superblock, catalog: Catalog, refs: list[int], slots: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.uint64], bool]:
    """Set the bits of slots that are reached; the bitmap of blocks, and whether something cannot be read."""
    blocks = np.zeros((block.end_blocks + 63) // 64 + 1, dtype=np.uint64)
    owners = np.zeros(block.end_blocks + pages.slots, dtype=np.uint32)
    lost = False
    for record in catalog.versions.values():
        family = catalog.family(record.id)
        lost = bool(len(pages.mark(record.root, family, slots, blocks, owners, block.end_blocks))) or lost
    for ref in refs:
        slots[(ref & _SLOT_MASK) >> 6] |= np.uint64(1 << (ref & 63))
    return blocks, lost


def _numbers(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Those whose bits are set, from the first slot on."""
    numbers = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).astype(np.uint64)
    return numbers[numbers > LOST]


class _Cut:
    """Makes trees without what cannot be read. Pages that versions share are made once."""

    def __init__(self, pages: Trees, end_blocks: int) -> None:
        self._pages = pages
        self._end_blocks = end_blocks
        self._made: dict[int, int] = {}

    def readable(self, ref: int, level: int) -> int:
        """The tree under a reference."""
        if ref <= LOST:
            return ref
        if ref not in self._made:
            self._made[ref] = self._make(ref, level)
        return self._made[ref]

    def _make(self, ref: int, level: int) -> int:
        try:
            entries = np.frombuffer(self._pages.get(level, ref), dtype="<u8")
        except Failure:
            return LOST
        if level:
            kept = np.array([self.readable(entry, level - 1) for entry in entries.tolist()], dtype="<u8")
        else:
            kept = np.where(entries < self._end_blocks, entries, np.uint64(LOST)).astype("<u8")
        return ref if np.array_equal(kept, entries) else self._pages.put(level, kept.tobytes())
