"""A pool under random work is compared with an oracle that keeps each version as a dict of blocks.

The oracle knows contents, and which write each block of each version comes from: two versions share a block exactly
when both have the same write there. From that follow the differences, the unique sizes and the number of blocks that
must be allocated. It knows nothing of trees, ghosts, logs or sweeps.

After a crash (here: of the process; writes that reached the file stay there) a version has the writes of the last
commit; a block that was overwritten in place since may hold any state that it had since then, a redirected one the
old state. The oracle goes on from what it finds.

The long profile (`-m campaign`) makes at least 100,000 steps.
"""

from __future__ import annotations

import random
import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from snapcore.errors import OutOfSpaceError, RefusedError, UsageError
from snapcore.pool import Disk, Pool, Snapshot
from tests.support.pools import BLOCK_BYTES, INNER_BLOCKS, LEAF_BLOCKS, SMALL_LOG_BYTES, check_space, quick_folder
from tests.support.sparse import extents_of

Thing = TypeVar("Thing")

MOST_DISKS = 4
MOST_SNAPSHOTS = 10
LIMIT_BLOCKS = 200
# A full comparison comes every so many steps, and so with the last one (the first one begins).
EVERY = 10
STEPS = 41
LONG_STEPS = 100_000
ZEROS = bytes(BLOCK_BYTES)
NOISE = random.Random(3).randbytes(4 << 20)
# Spread, for small numbers are drawn most often and would all stand for the same place.
number = st.integers(0, 1 << 20).map(lambda drawn: drawn * 2654435761 % (1 << 32))
steps_made = count()


@dataclass(frozen=True)
class Variant:
    """What kind of pool is put to the test."""

    name: str
    limit_blocks: int = 0
    cache_bytes: int = 256 << 20


VARIANTS = [Variant("plain"), Variant("limit", limit_blocks=LIMIT_BLOCKS), Variant("no-cache", cache_bytes=0)]


class Cell(NamedTuple):
    """A block: which write made it, and what it holds. Write 0 stands for zeros without a block."""

    write: int
    data: bytes


ZERO = Cell(0, ZEROS)
State = Cell | None


@dataclass
class View:
    """What a version holds. Absent blocks read from the image, if there is one."""

    size_bytes: int
    family: int
    cells: dict[int, Cell] = field(default_factory=dict)
    image: bytes | None = None

    def copy(self) -> View:
        """A version beside this one."""
        return View(self.size_bytes, self.family, dict(self.cells), self.image)

    @property
    def blocks(self) -> int:
        """Of the whole disk."""
        return -(-self.size_bytes // BLOCK_BYTES)

    def content(self, position: int, state: State) -> bytes:
        """What a block reads as, in a state that it had or has."""
        if state is not None:
            return state.data
        if self.image is None:
            return ZEROS
        return self.image[position * BLOCK_BYTES : (position + 1) * BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0")

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Bytes of a range, less at the end."""
        stop = max(offset_bytes, min(offset_bytes + length_bytes, self.size_bytes))
        first, last = offset_bytes // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
        joined = b"".join(self.content(at, self.cells.get(at)) for at in range(first, last))
        return joined[offset_bytes - first * BLOCK_BYTES : stop - first * BLOCK_BYTES]

    def allocated(self) -> dict[int, int]:
        """The write that each block with a place of its own comes from."""
        return {position: cell.write for position, cell in self.cells.items() if cell.write}


@dataclass
class Live:
    """A disk, and the states that each block has had since the last commit, the one of the commit first."""

    disk: Disk
    view: View
    # What reset goes back to: a snapshot's id, an image's bytes, None for nothing.
    origin: str | bytes | None
    resettable: bool = True
    since_commit: dict[int, list[State]] = field(default_factory=dict)

    def put(self, position: int, state: State) -> None:
        """A block changes."""
        before = self.view.cells.get(position)
        self.since_commit.setdefault(position, [before]).append(state)
        if state is None:
            self.view.cells.pop(position, None)
        else:
            self.view.cells[position] = state


@dataclass
class Taken:
    """A snapshot, and what the disk held then."""

    snapshot: Snapshot
    view: View


class PoolMachine(RuleBasedStateMachine):
    """The rules are what users do; each compares what it gets with the oracle."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.folder = quick_folder()
        self.path = self.folder / "pool"
        self.pool = Pool.create(
            self.path,
            limit_bytes=variant.limit_blocks * BLOCK_BYTES,
            log_bytes=SMALL_LOG_BYTES,
            background=False,
        )
        self.commits = self.pool._engine.core.commits
        self.lives: list[Live] = []
        self.taken: list[Taken] = []
        self.numbers = count(1)
        self.steps = -1
        self.chance = random.Random(0)

    def teardown(self) -> None:
        self.pool._engine.abandon()
        shutil.rmtree(self.folder)

    # Disks

    @initialize(sizes=st.lists(number, min_size=1, max_size=2), seed=number, things=st.integers(0, 60))
    def begin(self, sizes: list[int], seed: int, things: int) -> None:
        for drawn in sizes:
            self._make(drawn)
        self._work(seed, things)

    @precondition(lambda self: len(self.lives) < MOST_DISKS)
    @rule(drawn=number)
    def make_an_empty_disk(self, drawn: int) -> None:
        self._make(drawn)

    @precondition(lambda self: len(self.lives) < MOST_DISKS)
    @rule(drawn=number, grow=number)
    def make_a_disk_over_an_image(self, drawn: int, grow: int) -> None:
        length = [1, BLOCK_BYTES, 5 * BLOCK_BYTES + 17, LEAF_BLOCKS * BLOCK_BYTES - 3, 300 * BLOCK_BYTES][drawn % 5]
        image = _noise(length, drawn)
        name = self._name("over")
        path = self.folder / name
        path.write_bytes(image)
        more = [0, 1, 3 * BLOCK_BYTES, 2 * INNER_BLOCKS * BLOCK_BYTES + 5][grow % 4]
        disk = self.pool.create_disk(name, length + more if more else None, source=path)
        self.lives.append(Live(disk, View(length + more, next(self.numbers), image=image), image))

    @precondition(lambda self: self.taken and len(self.lives) < MOST_DISKS)
    @rule(which=number, grow=number)
    def make_a_disk_from_a_snapshot(self, which: int, grow: int) -> None:
        taken = _one_of(self.taken, which)
        view = taken.view.copy()
        more = [0, 1, 5 * BLOCK_BYTES][grow % 3]
        view.size_bytes += more
        source: Snapshot | str = [taken.snapshot, taken.snapshot.id][which % 2]
        disk = self.pool.create_disk(self._name("from"), view.size_bytes if more else None, source=source)
        self.lives.append(Live(disk, view, taken.snapshot.id))

    @precondition(lambda self: self.lives and len(self.lives) < MOST_DISKS)
    @rule(which=number)
    def clone_a_live_disk(self, which: int) -> None:
        live = self._live(which)
        disk = live.disk.clone(self._name("clone"))
        self.lives.append(Live(disk, live.view.copy(), None, resettable=False))

    @precondition(lambda self: self.lives)
    @rule(which=number, grow=number)
    def resize(self, which: int, grow: int) -> None:
        live = self._live(which)
        size = live.view.size_bytes + [0, 1, 4095, 3 * BLOCK_BYTES, LEAF_BLOCKS * BLOCK_BYTES][grow % 5]
        live.disk.resize(size)
        live.view.size_bytes = size
        with pytest.raises(UsageError):
            live.disk.resize(size - 1)

    @precondition(lambda self: self.lives)
    @rule(which=number)
    def rename(self, which: int) -> None:
        live = self._live(which)
        name = self._name("renamed")
        self.pool.rename_disk(live.disk, name)
        assert live.disk.name == name
        assert self.pool.open_disk(name).id == live.disk.id

    @precondition(lambda self: len(self.lives) > 1)
    @rule(which=number)
    def delete_a_disk(self, which: int) -> None:
        live = self._live(which)
        self.lives.remove(live)
        live.disk.delete()

    # Bytes

    @precondition(lambda self: self.lives)
    @rule(which=number, at=number, length=number, fua=st.integers(0, 7))
    def write(self, which: int, at: int, length: int, fua: int) -> None:
        self._write(self._live(which), at, _length(length), fua == 0)

    @precondition(lambda self: self.lives)
    @rule(which=number, at=number, blocks=st.integers(1, 4))
    def write_whole_blocks(self, which: int, at: int, blocks: int) -> None:
        self._write(self._live(which), at, blocks * BLOCK_BYTES, False, aligned=True)

    @precondition(lambda self: self.lives)
    @rule(which=number, at=number, lengths=st.lists(number, min_size=2, max_size=6))
    def write_here_and_there(self, which: int, at: int, lengths: list[int]) -> None:
        for step, length in enumerate(lengths):
            self._write(self._live(which), at + step * 77, 1 + length % (3 * BLOCK_BYTES), False)

    @precondition(lambda self: self.lives)
    @rule(which=number, at=number, length=number, discards=st.booleans())
    def zero_a_range(self, which: int, at: int, length: int, discards: bool) -> None:
        self._zero_somewhere(self._live(which), at, length, discards)

    @precondition(lambda self: self.lives)
    @rule(which=number, at=number)
    def discard_much(self, which: int, at: int) -> None:
        """Whole subtrees at once; of a disk over an image each block is kept in mind, so there it is less."""
        live = self._live(which)
        length = [LEAF_BLOCKS, 3 * LEAF_BLOCKS + 1, INNER_BLOCKS + LEAF_BLOCKS, 1 << 34][at % 4]
        if live.view.image is not None:
            length = min(length, INNER_BLOCKS + LEAF_BLOCKS)
        start = self._place(live.view, at) if at % 8 < 6 else 0
        start -= start % [1, BLOCK_BYTES, LEAF_BLOCKS * BLOCK_BYTES][at % 3]
        self._zero(live, start, length * BLOCK_BYTES, True)

    @precondition(lambda self: self.lives)
    @rule(which=number, whole=st.booleans())
    def flush(self, which: int, whole: bool) -> None:
        if whole:
            self.pool.flush()
        else:
            self._live(which).disk.flush()
        assert not any(live.since_commit for live in self.lives) or self._committed()

    @rule()
    def checkpoint(self) -> None:
        self.pool.checkpoint()

    # Versions

    @precondition(lambda self: self.lives and len(self.taken) < MOST_SNAPSHOTS)
    @rule(which=number, named=st.booleans())
    def take_a_snapshot(self, which: int, named: bool) -> None:
        live = self._live(which)
        name = self._name("cut") if named else None
        snapshot = live.disk.snapshot(name)
        assert (snapshot.name, snapshot.disk_id, snapshot.group) == (name or snapshot.id, live.disk.id, None)
        self.taken.append(Taken(snapshot, live.view.copy()))

    @precondition(lambda self: len(self.lives) > 1 and len(self.taken) < MOST_SNAPSHOTS)
    @rule(mask=number)
    def take_snapshots_of_a_group(self, mask: int) -> None:
        chosen = [live for place, live in enumerate(self.lives) if mask >> place & 1] or self.lives
        snapshots = self.pool.snapshot_group([live.disk for live in chosen], self._name("group"))
        assert [snapshot.disk_id for snapshot in snapshots] == [live.disk.id for live in chosen]
        assert len({snapshot.group for snapshot in snapshots}) == 1
        self.taken.extend(Taken(found, live.view.copy()) for found, live in zip(snapshots, chosen, strict=True))

    @precondition(lambda self: self._own_snapshots())
    @rule(which=number)
    def roll_back(self, which: int) -> None:
        live, taken = _one_of(self._own_snapshots(), which)
        live.disk.rollback([taken.snapshot, taken.snapshot.id][which % 2])
        live.view = taken.view.copy()
        assert live.disk.size_bytes == live.view.size_bytes

    @precondition(lambda self: self.lives)
    @rule(which=number)
    def reset(self, which: int) -> None:
        live = self._live(which)
        origin = next((taken for taken in self.taken if taken.snapshot.id == live.origin), None)
        if not live.resettable or (isinstance(live.origin, str) and origin is None):
            with pytest.raises(RefusedError):
                live.disk.reset()
            return
        live.disk.reset()
        size = live.view.size_bytes
        if origin is not None:
            live.view = origin.view.copy()
            live.view.size_bytes = size
        else:
            image = live.origin if isinstance(live.origin, bytes) else None
            live.view = View(size, next(self.numbers), image=image)

    @precondition(lambda self: self.taken)
    @rule(which=number)
    def delete_a_snapshot(self, which: int) -> None:
        taken = _one_of(self.taken, which)
        self.taken.remove(taken)
        self.pool.delete_snapshot([taken.snapshot, taken.snapshot.id][which % 2])

    @precondition(lambda self: self.taken)
    @rule(mask=number)
    def delete_several_snapshots(self, mask: int) -> None:
        gone = [taken for place, taken in enumerate(self.taken) if mask >> place & 1]
        self.taken = [taken for taken in self.taken if taken not in gone]
        self.pool.delete_snapshots([taken.snapshot for taken in gone])

    # Opening

    @rule()
    def reopen(self) -> None:
        self._close()
        self._open()

    @rule()
    def reopen_for_reading_only(self) -> None:
        self._close()
        self._open(read_only=True)
        self._check_contents()
        self._check_differences()
        with pytest.raises(RefusedError):
            self.pool.flush()
        self._close()
        self._open()

    @rule(look=st.integers(0, 3))
    def crash(self, look: int) -> None:
        self._committed()
        self.pool._engine.abandon()
        self._open(read_only=look == 0)
        self._go_on_from_what_is_there()
        if look == 0:
            self._check_contents()
            self._close()
            self._open()

    def _close(self) -> None:
        """What was written before is durable."""
        self.pool.close()
        for live in self.lives:
            live.since_commit.clear()

    def _open(self, *, read_only: bool = False) -> None:
        self.pool = Pool.open(self.path, read_only=read_only, cache_bytes=self.variant.cache_bytes, background=False)
        self.commits = self.pool._engine.core.commits
        for live in self.lives:
            live.disk = self.pool.open_disk(live.disk.id)
        for taken in self.taken:
            taken.snapshot = self.pool.snapshot(taken.snapshot.id)

    def _go_on_from_what_is_there(self) -> None:
        """Each block is of the write of the last commit; in place, it may hold what was written since."""
        for live in self.lives:
            for position, states in live.since_commit.items():
                if states[0] is None:
                    live.view.cells.pop(position, None)
                else:
                    live.view.cells[position] = states[0]
        shared = self._holders_of_writes()
        for live in self.lives:
            view = live.view
            for position, states in live.since_commit.items():
                found = live.disk.pread(BLOCK_BYTES, position * BLOCK_BYTES).ljust(BLOCK_BYTES, b"\0")
                durable = states[0]
                if durable is None or not durable.write or len(shared[durable.write]) > 1:
                    assert found == view.content(position, durable)
                else:
                    assert found in [view.content(position, state) for state in states]
                    view.cells[position] = Cell(durable.write, found)
            live.since_commit.clear()

    # Much at once

    @rule(seed=number, things=st.integers(1, 30))
    def work(self, seed: int, things: int) -> None:
        """Leads to pools that hold more than a few single steps make."""
        self._work(seed, things)

    @rule(seed=number)
    def work_and_crash(self, seed: int) -> None:
        self._work(seed, 5 + seed % 20)
        self.crash(1)

    def _work(self, seed: int, things: int) -> None:
        chance = random.Random(seed)

        def draw() -> int:
            return chance.getrandbits(32)

        for _ in range(things):
            doings: list[Callable[[], None]] = [
                *[lambda: self._write(self._live(draw()), draw(), _length(draw()), draw() % 9 == 0)] * 9,
                *[lambda: self._zero_somewhere(self._live(draw()), draw(), draw())] * 3,
                lambda: self.resize(draw(), draw()),
            ]
            if len(self.lives) < MOST_DISKS:
                doings.append(lambda: self.clone_a_live_disk(draw()))
            if len(self.lives) > 1:
                doings.append(lambda: self.delete_a_disk(draw()))
            if len(self.lives) > 1 and len(self.taken) < MOST_SNAPSHOTS:
                doings.append(lambda: self.take_snapshots_of_a_group(draw()))
            if len(self.taken) < MOST_SNAPSHOTS:
                doings += [lambda: self.take_a_snapshot(draw(), True)] * 4
            if len(self.taken) > 2:
                doings += [lambda: self.delete_a_snapshot(draw())] * 3
            if self.taken and len(self.lives) < MOST_DISKS:
                doings.append(lambda: self.make_a_disk_from_a_snapshot(draw(), draw()))
            if self._own_snapshots():
                doings.append(lambda: self.roll_back(draw()))
            chance.choice(doings)()
            self._committed()

    # What users see

    @precondition(lambda self: self.lives)
    @rule(which=number, places=st.lists(number, min_size=1, max_size=5), length=st.integers(1, 3 * BLOCK_BYTES))
    def read_many_at_once(self, which: int, places: list[int], length: int) -> None:
        view, thing = self._any_version(which)
        length = min(length, view.size_bytes)
        offsets = [min(self._place(view, at), view.size_bytes - length) for at in places]
        rows = np.empty((len(places), length), dtype=np.uint8)
        assert thing.pread_many(np.array(offsets, dtype=np.int64), rows) == rows.size
        assert [row.tobytes() for row in rows] == [view.read(offset, length) for offset in offsets]

    @precondition(lambda self: self.taken)
    @rule(mask=number)
    def unique_is_what_deletion_would_free(self, mask: int) -> None:
        versions = self._versions()
        chosen = [thing for place, (_, thing) in enumerate(versions) if mask >> place & 1]
        found = self.pool.unique_bytes([thing if len(chosen) % 2 else thing.id for thing in chosen])
        assert found == BLOCK_BYTES * self._unique(chosen)

    @rule()
    def look_at_everything(self) -> None:
        self._check_all()

    @invariant()
    def a_random_part_is_right(self) -> None:
        self._committed()
        self.steps += 1
        if self.steps:
            next(steps_made)
        if self.steps and self.steps % EVERY == 0:
            self._check_all()
        elif self.lives:
            self.chance.seed(self.steps)
            view, thing = self._any_version(self.chance.getrandbits(16))
            offset = self._place(view, self.chance.getrandbits(32))
            length = self.chance.randrange(5 * BLOCK_BYTES)
            buffer = bytearray(length)
            got = thing.pread_into(buffer, offset)
            assert bytes(buffer[:got]) == view.read(offset, length)

    def _check_all(self) -> None:
        self._check_contents()
        self._check_differences()
        self._check_sizes()
        check_space(self.pool, len(self._holders_of_writes()))
        self._committed()

    def _check_contents(self) -> None:
        assert [disk.id for disk in self.pool.disks()] == [
            live.disk.id for live in sorted(self.lives, key=lambda live: live.disk.name)
        ]
        assert [found.id for found in self.pool.snapshots()] == [taken.snapshot.id for taken in self.taken]
        for view, thing in self._versions():
            assert thing.size_bytes == view.size_bytes
            allocated = sorted(view.allocated())
            found = thing.extents()
            assert found.allocated.tolist() == extents_of(allocated, BLOCK_BYTES, view.size_bytes)
            zero = sorted(position for position, cell in view.cells.items() if not cell.write)
            assert found.zero.tolist() == extents_of(zero, BLOCK_BYTES, view.size_bytes)
            for offset, length in found.allocated.tolist():
                assert thing.pread(length, offset) == view.read(offset, length)
            if view.image is not None:
                length = len(view.image) + BLOCK_BYTES
                assert thing.pread(length, 0) == view.read(0, length)
            for offset, length in zero and found.zero.tolist():
                assert thing.pread(min(length, 1 << 20), offset).count(0) == min(length, 1 << 20)

    def _check_differences(self) -> None:
        """Every two versions that come from one another are compared; others are refused."""
        for (a, one), (b, two) in pairwise(sorted(self._versions(), key=lambda item: item[0].family)):
            if a.family != b.family:
                with pytest.raises(UsageError):
                    self.pool.diff(one, two)
        for a, one in self._versions():
            for b, two in self._versions():
                if one is two or a.family != b.family:
                    continue
                differing = sorted(
                    position
                    for position in a.cells.keys() | b.cells.keys()
                    if _write_of(a, position) != _write_of(b, position)
                )
                whole = max(a.size_bytes, b.size_bytes)
                assert self.pool.diff(one, two).tolist() == extents_of(differing, BLOCK_BYTES, whole)
                if differing:
                    middle = differing[len(differing) // 2]
                    part = differing[bisect_left(differing, middle) :]
                    later = self.pool.diff(one, two, start=middle * BLOCK_BYTES)
                    assert later.tolist() == extents_of(part, BLOCK_BYTES, whole)

    def _check_sizes(self) -> None:
        usage = self.pool.usage()
        found = {(row.kind, row.id): row for row in usage.versions}
        assert len(found) == len(self._versions()) == len(usage.versions)
        for view, thing in self._versions():
            row = found["disk" if isinstance(thing, Disk) else "snapshot", thing.id]
            assert (row.name, row.size_bytes) == (thing.name, view.size_bytes)
            assert row.mapped_bytes == BLOCK_BYTES * len(view.allocated())
            assert row.unique_bytes == BLOCK_BYTES * self._unique([thing])
        assert usage.allocated_bytes == BLOCK_BYTES * len(self._holders_of_writes())

    # Helpers

    def _make(self, drawn: int) -> None:
        size = self._size(drawn)
        disk = self.pool.create_disk(self._name("disk"), size)
        self.lives.append(Live(disk, View(size, next(self.numbers)), None))

    def _name(self, word: str) -> str:
        return f"{word}-{next(self.numbers)}"

    def _live(self, drawn: int) -> Live:
        return _one_of(self.lives, drawn)

    def _versions(self) -> list[tuple[View, Disk | Snapshot]]:
        lives: list[tuple[View, Disk | Snapshot]] = [(live.view, live.disk) for live in self.lives]
        return lives + [(taken.view, taken.snapshot) for taken in self.taken]

    def _any_version(self, drawn: int) -> tuple[View, Disk | Snapshot]:
        return _one_of(self._versions(), drawn)

    def _own_snapshots(self) -> list[tuple[Live, Taken]]:
        return [(live, taken) for live in self.lives for taken in self.taken if taken.snapshot.disk_id == live.disk.id]

    def _holders_of_writes(self) -> dict[int, set[int]]:
        """For each write that some version holds a block of: which ones do, by their place."""
        found: dict[int, set[int]] = {}
        for place, (view, _) in enumerate(self._versions()):
            for write in view.allocated().values():
                found.setdefault(write, set()).add(place)
        return found

    def _unique(self, chosen: Iterable[Disk | Snapshot]) -> int:
        places = {place for place, (_, thing) in enumerate(self._versions()) if any(thing is one for one in chosen)}
        return sum(holders <= places for holders in self._holders_of_writes().values())

    def _committed(self) -> bool:
        """When a commit came, what was written before it is durable."""
        now = self.pool._engine.core.commits
        if now == self.commits:
            return False
        self.commits = now
        for live in self.lives:
            live.since_commit.clear()
        return True

    def _size(self, drawn: int) -> int:
        blocks = [1, 3, LEAF_BLOCKS, 5 * LEAF_BLOCKS, INNER_BLOCKS, LEAF_BLOCKS**3, (10 << 40) // BLOCK_BYTES]
        less = [0, 0, 1, 513, 4095]
        return blocks[drawn % 7] * BLOCK_BYTES - less[drawn // 7 % 5]

    def _place(self, view: View, drawn: int) -> int:
        """An offset near the start, the end, or the borders of pages of each level."""
        near = [0, 3, view.blocks, LEAF_BLOCKS, 2 * LEAF_BLOCKS, INNER_BLOCKS, LEAF_BLOCKS**3, view.blocks // 2]
        offset = near[drawn % 8] * BLOCK_BYTES + drawn // 8 % (12 * BLOCK_BYTES) - 6 * BLOCK_BYTES
        return offset % view.size_bytes

    def _write(self, live: Live, at: int, length: int, fua: bool, *, aligned: bool = False) -> None:
        view = live.view
        offset = self._place(view, at)
        if aligned:
            offset -= offset % BLOCK_BYTES
        data = _noise(min(length, view.size_bytes - offset), at ^ length)
        first, last = offset // BLOCK_BYTES, (offset + len(data) - 1) // BLOCK_BYTES
        try:
            assert live.disk.pwrite(data, offset, fua=fua) == len(data)
        except OutOfSpaceError:
            # A write of up to 1,024 blocks takes all its space first.
            assert self.variant.limit_blocks
            assert len(self._holders_of_writes()) + last - first + 1 > self.variant.limit_blocks
            assert live.disk.pread(len(data), offset) == view.read(offset, len(data))
            return
        # What committed, unless it was asked for, came before the write: to make room in the log or the data file.
        self._committed()
        whole = view.read(first * BLOCK_BYTES, (last - first + 1) * BLOCK_BYTES)
        whole = whole.ljust((last - first + 1) * BLOCK_BYTES, b"\0")
        skip = offset - first * BLOCK_BYTES
        whole = whole[:skip] + data + whole[skip + len(data) :]
        for position in range(first, last + 1):
            part = whole[(position - first) * BLOCK_BYTES : (position - first + 1) * BLOCK_BYTES]
            live.put(position, Cell(next(self.numbers), part))
        if fua:
            live.since_commit.clear()

    def _zero_somewhere(self, live: Live, at: int, length: int, discards: bool = True) -> None:
        self._zero(live, self._place(live.view, at), _length(length), discards)

    def _zero(self, live: Live, offset: int, length: int, discards: bool) -> None:
        view = live.view
        stop = min(offset + length, view.size_bytes)
        if self.variant.limit_blocks:
            # Parts of blocks may need new ones.
            offset -= offset % BLOCK_BYTES
            stop = view.size_bytes if stop + BLOCK_BYTES > view.size_bytes else stop - stop % BLOCK_BYTES
            stop = max(offset, stop)
        (live.disk.discard if discards else live.disk.write_zeroes)(offset, stop - offset)
        if self._committed():
            # It made room in the log when it had done a part, perhaps: which one is not known.
            live.disk.flush()
        first = -(-offset // BLOCK_BYTES)
        last = -(-stop // BLOCK_BYTES) if stop == view.size_bytes else stop // BLOCK_BYTES
        for position in {offset // BLOCK_BYTES, stop // BLOCK_BYTES}:
            start = max(offset, position * BLOCK_BYTES) - position * BLOCK_BYTES
            end = min(stop, (position + 1) * BLOCK_BYTES) - position * BLOCK_BYTES
            state = view.cells.get(position)
            if first <= position < last or start >= end:
                continue
            if state == ZERO or (state is None and view.image is None):
                continue
            before = view.content(position, state)
            live.put(position, Cell(next(self.numbers), before[:start] + bytes(end - start) + before[end:]))
        if view.image is not None:
            for position in range(first, last):
                live.put(position, ZERO)
        else:
            for position in [position for position in view.cells if first <= position < last]:
                live.put(position, None)
        self._committed()


def _write_of(view: View, position: int) -> int | None:
    cell = view.cells.get(position)
    return None if cell is None else cell.write


def _one_of(things: list[Thing], drawn: int) -> Thing:
    return things[drawn % len(things)]


def _length(drawn: int) -> int:
    """A few bytes, about a block, a few blocks, or up to 300 of them."""
    kind, rest = drawn % 8, drawn // 8
    if kind < 3:
        return 1 + rest % BLOCK_BYTES
    if kind < 5:
        return BLOCK_BYTES * (1 + rest % 4)
    return 1 + rest % ([20, 20, 300][kind - 5] * BLOCK_BYTES)


def _noise(length_bytes: int, seed: int) -> bytes:
    """Bytes that are others for another seed."""
    at = seed * 2654435761 % (len(NOISE) - length_bytes)
    return NOISE[at : at + length_bytes]


def _run(variant: Variant, examples: int | None = None, steps: int = STEPS) -> None:
    machine: Callable[[], PoolMachine] = lambda: PoolMachine(variant)  # noqa: E731
    chosen = settings(settings(), stateful_step_count=steps)
    run_state_machine_as_test(machine, settings=settings(chosen, max_examples=examples or chosen.max_examples))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_pool_under_random_work_does_what_the_oracle_says(variant: Variant) -> None:
    _run(variant)


@pytest.mark.campaign
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_many_steps_of_random_work(variant: Variant) -> None:
    """At least 100,000 in all variants together."""
    before = next(steps_made)
    _run(variant, examples=580, steps=2 * (STEPS - 1) + 1)
    made = next(steps_made) - before
    print(f"{made} steps")
    assert made >= LONG_STEPS / len(VARIANTS)
