"""Checks a pool: every page, both bitmaps against the trees, the log, the superblock; and repairs what can be repaired.

A repair rebuilds the bitmaps from the trees, marks what cannot be read as lost, and ends the log where it is damaged.
It invents nothing: reads of what is lost fail from then on, and the report lists it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from snapcore import space
from snapcore.blockmap import Trees
from snapcore.core import BLOCK_BYTES
from snapcore.errors import DamagedError, from_os_error
from snapcore.pages import KIND_BITMAP, Failure
from snapcore.persist import Medium
from snapcore.pool import files, recovery
from snapcore.pool.catalog import Version
from snapcore.pool.engine import Engine
from snapcore.pool.failures import typed
from snapcore.pool.versions import Versions

_CACHE_BYTES = 256 << 20
_SLOT_MASK = np.uint64((1 << 48) - 1)
_LOST = 2
_ALL = 1 << 35
PAGE_ENTRIES = 128
_RUNS = 1 << 16
_PROBLEMS = {
    1: "{what}: the page of block {position} (slot {ref} of the map) cannot be read",
    2: "{what}: the page of block {position} (slot {ref} of the map) is used at another place too",
    3: "{what}: block {position} refers to place {ref}, which is outside of the data",
    4: "{what}: block {position} refers to place {ref}, which is used at another place too",
}


@dataclass(slots=True)
class Checked:
    """What a check found.

    Attributes
    ----------
    problems : list of str
        What is not as it should be; after a repair, what was not.
    lost : list of str
        Byte ranges of disks and snapshots that cannot be read.
    repaired : bool
        The problems are gone, apart from what is lost.
    versions, pages, blocks : int
        How much was looked at.
    """

    problems: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    repaired: bool = False
    versions: int = 0
    pages: int = 0
    blocks: int = 0


def check(path: str | os.PathLike[str], *, repair: bool = False, medium: Medium | None = None) -> Checked:
    """Look at everything in a pool that no process owns.

    Parameters
    ----------
    path : path
    repair : bool
        Put right what can be, and list what is lost.

    Raises
    ------
    BusyError, NotFoundError
        The pool is open elsewhere, or there is none.
    DamagedError
        Superblock or catalog are gone, without which nothing can be found.
    """
    found = Checked()
    opened_files = files.open_files(os.fspath(path), medium or Medium(), read_only=not repair)
    try:
        opened = _open(opened_files, found, repair=repair)
        if opened is None:
            return found
        # Of images only their names are of interest.
        opened.versions.close()
        found.problems += [
            f"the copy of the superblock at offset {offset} is damaged; the other one counts"
            for offset in opened.damaged_copies
        ]
        _look(opened.versions, opened.checkpointer.catalog_refs, found)
        # Where pages cannot be read that is among the problems, and a repair tells what is lost by it.
        with contextlib.suppress(Failure):
            found.lost = _lost_in(opened.versions)
        if repair and found.problems:
            _repair(opened_files, found)
    except OSError as error:
        raise from_os_error(error, f"checking the pool {os.fspath(path)}") from error
    finally:
        opened_files.close()
    return found


def _open(opened_files: files.Files, found: Checked, *, repair: bool) -> recovery.Opened | None:
    """The pool in memory; without the log where that is damaged."""
    try:
        return recovery.open_state(opened_files, _CACHE_BYTES)
    except DamagedError as error:
        found.problems.append(str(error))
    try:
        return recovery.open_state(opened_files, _CACHE_BYTES, give_up_log=True)
    except DamagedError as error:
        if str(error) not in found.problems:
            found.problems.append(str(error))
    if repair:
        _repair(opened_files, found)
    return None


def _look(versions: Versions, catalog_refs: list[int], found: Checked) -> None:
    """Compare the bitmaps with what is reached."""
    core, pages = versions.core, versions.core.page_file
    marks = Marks(versions, catalog_refs, found)
    used_slots, used_blocks = pages.used_slots(), space.used_bitmap(core)
    found.pages, found.blocks = _count(marks.slots), _count(marks.blocks)
    for name, used, reached in (("slot", used_slots, marks.slots), ("block", used_blocks, marks.blocks)):
        length = min(len(used), len(reached))
        leaked, missing = used[:length] & ~reached[:length], reached[:length] & ~used[:length]
        if name == "slot":
            # The numbers below the first slot stand for entries that refer to nothing.
            leaked[0] &= ~np.uint64(7)
        if leaked.any():
            found.problems.append(f"{_count(leaked)} {name}s are marked as used but belong to nothing: {_some(leaked)}")
        if missing.any():
            found.problems.append(f"{_count(missing)} {name}s are in use but marked as free: {_some(missing)}")


class Marks:
    """What is reached from all versions, and from the tree of space and the catalog.

    Attributes
    ----------
    slots, blocks : uint64 arrays
        Bitmaps.
    """

    def __init__(self, versions: Versions, catalog_refs: list[int], found: Checked) -> None:
        core, pages = versions.core, versions.core.page_file
        blocks = max(len(space.used_bitmap(core)) * 64, 64)
        self.slots = np.zeros((pages.slots + 63) // 64, dtype=np.uint64)
        self.blocks = np.zeros(blocks // 64, dtype=np.uint64)
        owners = np.zeros(blocks + pages.slots, dtype=np.uint32)
        for record in versions.catalog.versions.values():
            root, family = versions.root(record.id), versions.catalog.family(record.id)
            problems = pages.mark(root, family % (1 << 32), self.slots, self.blocks, owners, core.end_blocks)
            found.versions += 1
            for kind, position, ref in problems.tolist():
                found.problems.append(_PROBLEMS[kind].format(what=_called(record), position=position, ref=ref))
        self._mark_slots(np.array(catalog_refs, dtype=np.uint64))
        try:
            pieces, tree = pages.exclusive(core.space_root, [])
            for ref in pieces.tolist():
                pages.get(KIND_BITMAP, ref)
            self._mark_slots(pieces)
            self._mark_slots(tree)
        except Failure as failure:
            found.problems.append(f"the bitmap of used blocks cannot be read (slot {failure.slot} of the map)")

    def _mark_slots(self, refs: npt.NDArray[np.uint64]) -> None:
        for ref in (refs & _SLOT_MASK).tolist():
            self.slots[ref >> 6] |= np.uint64(1 << (ref & 63))


def _called(record: Version) -> str:
    name = record.name or record.id
    if record.kind == "snapshot":
        return f"snapshot {name} of disk {record.disk_name}"
    return f"disk {record.disk}" if record.kind == "head" else f"deleted version {record.id}"


def _count(words: npt.NDArray[np.uint64]) -> int:
    return int(np.unpackbits(words.view(np.uint8)).sum())


def _some(words: npt.NDArray[np.uint64]) -> str:
    """The first few numbers of a bitmap."""
    numbers = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
    return ", ".join(str(number) for number in numbers[:8]) + (", …" if len(numbers) > 8 else "")


def _repair(opened_files: files.Files, found: Checked) -> None:
    opened = recovery.rebuild_state(opened_files, _CACHE_BYTES)
    try:
        found.lost = _lost_in(opened.versions)
        engine = Engine(opened_files, opened, read_only=True, background=False)
        engine.checkpoint(clean=True)
        found.repaired = True
    except Failure as failure:
        raise typed(failure, opened_files.folder, f"repairing the pool {opened_files.folder}") from None
    finally:
        opened.versions.close()


def _lost_in(versions: Versions) -> list[str]:
    """What disks and snapshots cannot be read of, since a repair."""
    return [
        f"{_called(record)}: {length} bytes at offset {start}"
        for record in versions.catalog.versions.values()
        if record.kind != "ghost"
        for start, length in _lost_extents(versions.core.page_file, versions.root(record.id))
    ]


def _lost_extents(pages: Trees, root: int) -> Iterator[tuple[int, int]]:
    at, found = 0, 0
    # A forged tree may hold a page many times, and have no end in this life.
    while at < _ALL and found < pages.slots * PAGE_ENTRIES:
        runs, at = pages.runs(root, at, _ALL, _RUNS)
        found += len(runs)
        for position, count, _ in runs[runs[:, 2] == _LOST].tolist():
            yield position * BLOCK_BYTES, count * BLOCK_BYTES
