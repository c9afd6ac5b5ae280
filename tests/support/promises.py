"""A pool whose every primitive is recorded, with what was promised about it, and the check of what a crash left.

After each step the whole content is remembered, and for each block of each disk where it lies in the data file: as
long as it lies there it is written in place, and a crash may leave any mix of old and new sectors; when it comes to lie
elsewhere it is redirected, and is there as a whole or not at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from snapcore import space
from snapcore.persist import Medium
from snapcore.pool import Disk, Pool, Snapshot
from tests.support.pools import SMALL_LOG_BYTES, reached
from tests.support.recorder import FastMedium, Recorder

BLOCK_BYTES = 4096
SECTOR_BYTES = 512
_FIRST_BLOCK = 2
_LOWEST_SLOTS = 7


@dataclass(frozen=True)
class DiskState:
    """What a disk holds: its bytes, padded to whole blocks, and where each block lies."""

    size_bytes: int
    content: bytes
    places: tuple[int, ...]


@dataclass(frozen=True)
class State:
    """All that a user sees of a pool: disks by name, and of each snapshot the disk, name, size and content by id."""

    disks: dict[str, DiskState]
    snapshots: dict[str, tuple[str, str, bytes]]

    def names(self) -> object:
        """Everything but the content of disks."""
        return {name: disk.size_bytes for name, disk in self.disks.items()}, self.snapshots


@dataclass
class Step:
    """Something that was done: noted in the record when it begins, and again (as `Finished`) when it returns.

    Attributes
    ----------
    durable : bool
        What was done up to here survives when this has returned.
    after : State or None
        None where the step failed or was never finished.
    """

    name: str
    durable: bool
    after: State | None = None


@dataclass(frozen=True)
class Finished:
    """A step returned."""

    step: Step


@dataclass
class Work:
    """Works on a pool and remembers what it was promised.

    Attributes
    ----------
    contents : dict of name to bytearray
        Of each disk, as of now.
    """

    root: Path
    medium: Medium | None = None
    log_bytes: int = SMALL_LOG_BYTES
    limit_bytes: int = 0
    pool: Pool = field(init=False)
    recorder: Recorder = field(init=False)
    contents: dict[str, bytearray] = field(default_factory=dict)
    snapshots: dict[str, tuple[str, str, bytes]] = field(default_factory=dict)
    state: State = field(default_factory=lambda: State({}, {}))

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.recorder = Recorder(self.root)

    @property
    def place(self) -> Path:
        """The pool's folder."""
        return self.root / "pool"

    def disk(self, name: str) -> Disk:
        """A live disk."""
        return self.pool.open_disk(name)

    def _step(self, name: str, work: Callable[[], None], *, durable: bool = True) -> None:
        step = Step(name, durable)
        self.recorder.note(step)
        work()
        self.state = step.after = self._look()
        self.recorder.note(Finished(step))

    def _look(self) -> State:
        disks = {}
        for name, content in self.contents.items():
            places = self.state.disks[name].places if name in self.state.disks else ()
            if not self.pool._closed:
                volume = self.disk(name)._volume
                blocks = (len(content) + BLOCK_BYTES - 1) // BLOCK_BYTES
                places = tuple(self.pool._engine.core.page_file.lookup(volume.root, 0, blocks).tolist())
            disks[name] = DiskState(len(content), padded(content), places)
        return State(disks, dict(self.snapshots))

    def create(self) -> None:
        """Make the pool."""

        def work() -> None:
            self.pool = Pool.create(
                self.place,
                log_bytes=self.log_bytes,
                limit_bytes=self.limit_bytes,
                medium=self.recorder,
                background=False,
            )

        self._step("create", work)

    def record_from_here(self, *, closed: bool = True) -> None:
        """Take what is there for durable, and forget how it came to be; open it anew, after a crash if not `closed`."""
        if closed:
            self.close()
        else:
            self.pool._engine.abandon()
        self.recorder = Recorder(self.root)
        self.reopen()

    def reopen(self) -> None:
        """Open the pool, which was closed."""

        def work() -> None:
            self.pool = Pool.open(self.place, medium=self.recorder, background=False)

        self._step("open", work)

    def close(self) -> None:
        """Close the pool."""
        self._step("close", self.pool.close)

    def make(self, name: str, size_bytes: int, snapshot: str | None = None) -> None:
        """A new disk, empty or from a snapshot (its id)."""

        def work() -> None:
            source = None if snapshot is None else self.pool.snapshot(snapshot)
            self.pool.create_disk(name, size_bytes, source=source)
            content = b"" if snapshot is None else self.snapshots[snapshot][2]
            self.contents[name] = bytearray(content.ljust(size_bytes, b"\0"))

        self._step(f"make {name}", work)

    def write(self, name: str, data: bytes, offset_bytes: int, *, fua: bool = False) -> None:
        """Write to a disk."""

        def work() -> None:
            self.disk(name).pwrite(data, offset_bytes, fua=fua)
            self.contents[name][offset_bytes : offset_bytes + len(data)] = data

        self._step(f"write {name} {offset_bytes}+{len(data)}", work, durable=fua)

    def discard(self, name: str, offset_bytes: int, length_bytes: int) -> None:
        """Drop a range of a disk."""

        def work() -> None:
            self.disk(name).discard(offset_bytes, length_bytes)
            self.contents[name][offset_bytes : offset_bytes + length_bytes] = bytes(length_bytes)

        self._step(f"discard {name} {offset_bytes}+{length_bytes}", work, durable=False)

    def flush(self, name: str) -> None:
        """Flush a disk, and with it all."""
        self._step(f"flush {name}", lambda: self.disk(name).flush())

    def checkpoint(self) -> None:
        """Write the maps."""
        self._step("checkpoint", lambda: self.pool.checkpoint())

    def reclaim(self) -> None:
        """Flush, and let what was freed be used again without a checkpoint, as the pool's own thread would."""

        def work() -> None:
            self.pool.flush()
            space.reclaim(self.pool._engine.core)

        self._step("reclaim", work)

    def cut(self, *names: str, name: str | None = None) -> list[str]:
        """Snapshots of disks at one instant; their ids."""
        made: list[Snapshot] = []

        def work() -> None:
            made.extend(self.pool.snapshot_group([*names], name))
            for disk, snapshot in zip(names, made, strict=True):
                self.snapshots[snapshot.id] = (disk, snapshot.name, bytes(self.contents[disk]))

        self._step(f"cut {' '.join(names)}", work)
        return [snapshot.id for snapshot in made]

    def rollback(self, name: str, snapshot: str) -> None:
        """Go back to a snapshot."""

        def work() -> None:
            self.disk(name).rollback(snapshot)
            self.contents[name] = bytearray(self.snapshots[snapshot][2])

        self._step(f"rollback {name} {snapshot}", work)

    def clone(self, name: str, new: str) -> None:
        """A disk beside a disk."""

        def work() -> None:
            self.disk(name).clone(new)
            self.contents[new] = bytearray(self.contents[name])

        self._step(f"clone {name} {new}", work)

    def resize(self, name: str, size_bytes: int) -> None:
        """A longer disk."""

        def work() -> None:
            self.disk(name).resize(size_bytes)
            self.contents[name].extend(bytes(size_bytes - len(self.contents[name])))

        self._step(f"resize {name} {size_bytes}", work)

    def delete(self, *snapshots: str) -> None:
        """Delete snapshots."""

        def work() -> None:
            self.pool.delete_snapshots(snapshots)
            for snapshot in snapshots:
                del self.snapshots[snapshot]

        self._step(f"delete {' '.join(snapshots)}", work)

    def delete_disk(self, name: str) -> None:
        """Delete a disk."""

        def work() -> None:
            self.pool.delete_disk(name)
            del self.contents[name]

        self._step(f"delete disk {name}", work)

    def kept_by(self, disk: str) -> list[str]:
        """Snapshots that a disk can be rolled back to."""
        number = self.disk(disk).id
        return [snapshot.id for snapshot in self.pool.snapshots() if snapshot.disk_id == number]

    def random_step(self, dice: random.Random, *, most_blocks: int = 12) -> None:
        """One of all that can be done."""
        names = sorted(self.contents)
        if not names:
            return self.make("first", dice.randrange(1, most_blocks * BLOCK_BYTES))
        name, kept = dice.choice(names), sorted(self.snapshots)
        size = len(self.contents[name])
        at = dice.randrange(size)
        length = min(dice.choice((1, 512, 700, 4096, 4096, 8192, 20000)), size - at)
        if dice.random() < 0.5:
            at = at // BLOCK_BYTES * BLOCK_BYTES
        what = dice.choice(_CHOICES)
        if what == "write":
            self.write(name, dice.randbytes(length), at, fua=dice.random() < 0.1)
        elif what == "discard":
            self.discard(name, at, length)
        elif what == "flush":
            self.flush(name)
        elif what == "checkpoint":
            self.checkpoint()
        elif what == "reclaim":
            self.reclaim()
        elif what == "cut" and len(kept) < 6:
            self.cut(name)
        elif what == "group" and len(kept) < 5:
            self.cut(*names)
        elif what == "rollback" and (own := self.kept_by(name)):
            self.rollback(name, dice.choice(own))
        elif what == "clone" and len(names) < 4:
            self.clone(name, f"clone{dice.randrange(10**9)}")
        elif what == "make" and len(names) < 4 and kept:
            source = dice.choice(kept)
            self.make(f"made{dice.randrange(10**9)}", len(self.snapshots[source][2]), source)
        elif what == "resize" and size < most_blocks * BLOCK_BYTES:
            self.resize(name, dice.randrange(size, most_blocks * BLOCK_BYTES + 1))
        elif what == "delete" and kept:
            self.delete(*dice.sample(kept, dice.randrange(1, min(3, len(kept) + 1))))
        elif what == "delete disk" and len(names) > 1:
            self.delete_disk(name)
        elif what == "reopen":
            self.close()
            self.reopen()
        return None


_CHOICES = (
    *["write"] * 10, *["discard"] * 3, *["flush"] * 3, "checkpoint", *["reclaim"] * 2, *["cut"] * 3,
    "group", "rollback", "clone", "make",
    "resize", *["delete"] * 3, "delete disk", "reopen",
)  # fmt: skip


def padded(content: bytes | bytearray) -> bytes:
    """Up to a whole number of blocks."""
    return bytes(content).ljust((len(content) + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES, b"\0")


def exact(pool: Pool) -> None:
    """Of a pool that was just opened: what is used is what versions reach, to the block and to the page."""
    core = pool._engine.core
    assert core.held_blocks == 0
    found = reached(pool)
    assert np.array_equal(found.blocks, found.used_blocks), "blocks are used that no version reaches, or the reverse"
    found.slots[0] |= np.uint64(_LOWEST_SLOTS)
    found.used_slots[0] |= np.uint64(_LOWEST_SLOTS)
    assert np.array_equal(found.slots, found.used_slots), "pages are used that nothing reaches, or the reverse"


def read_all(version: Disk | Snapshot) -> bytes:
    """What a disk or snapshot holds."""
    return version.pread(version.size_bytes, 0)


def promised(pool: Pool, facts: tuple[object, ...]) -> None:
    """What is durable is there, what came later is there or not, and there is nothing else."""
    steps = [fact for fact in facts if isinstance(fact, Step)]
    finished = {id(fact.step) for fact in facts if isinstance(fact, Finished)}
    first = max((n for n, step in enumerate(steps) if step.durable and id(step) in finished), default=None)
    possible = [State({}, {})] if first is None else []
    possible += [step.after for step in steps[first or 0 :] if step.after is not None]
    sizes = {disk.name: disk.size_bytes for disk in pool.disks()}
    snapshots = {found.id: (found.disk, found.name, read_all(found)) for found in pool.snapshots()}
    fitting = [n for n, state in enumerate(possible) if state.names() == (sizes, snapshots)]
    assert fitting, (sizes, {number: (disk, name) for number, (disk, name, _) in snapshots.items()}, steps)
    found = {disk.name: padded(read_all(disk)) for disk in pool.disks()}
    wrong = [_misfit(possible, n, found) for n in fitting]
    assert None in wrong, (wrong, [step.name for step in steps[first or 0 :]])


def _misfit(possible: list[State], cut: int, found: dict[str, bytes]) -> str | None:
    """Why the content is not what a crash may leave when the log ends behind a step, or in the one after it."""
    for name, data in found.items():
        for block in range(len(data) // BLOCK_BYTES):
            value = data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
            # The step that was being done may have been cut in two by a commit.
            ends = [cut, cut + 1] if cut + 2 == len(possible) else [cut]
            if not any(_fits(possible, end, name, block, value) for end in ends):
                return f"block {block} of {name} holds what was never there, if all up to step {cut} is"
    return None


def _fits(possible: list[State], cut: int, name: str, block: int, value: bytes) -> bool:
    disk = possible[cut].disks.get(name)
    if disk is None or block >= len(disk.places):
        return False
    place = disk.places[block]
    if place < _FIRST_BLOCK:
        return value == bytes(BLOCK_BYTES)
    start = block * BLOCK_BYTES
    versions = {
        other.content[start : start + BLOCK_BYTES]
        for state in possible
        if (other := state.disks.get(name)) is not None and block < len(other.places) and other.places[block] == place
    }
    return value in versions or all(
        any(version[at : at + SECTOR_BYTES] == value[at : at + SECTOR_BYTES] for version in versions)
        for at in range(0, BLOCK_BYTES, SECTOR_BYTES)
    )


def open_again(place: Path, medium: Medium | None = None) -> Pool:
    """Open what a crash left."""
    return Pool.open(place, medium=medium or FastMedium(), background=False)


def works_on(place: Path, dice: random.Random) -> None:
    """Whoever comes after the crash can write, cut, flush, and finds it again."""
    pool = open_again(place)
    exact(pool)
    expected = {}
    for disk in pool.disks():
        before = read_all(disk)
        at = dice.randrange(disk.size_bytes)
        data = dice.randbytes(min(5000, disk.size_bytes - at))
        disk.pwrite(data, at)
        after = expected[disk.name] = before[:at] + data + before[at + len(data) :]
        disk.snapshot("after")
        assert read_all(disk) == after
        disk.discard(0, min(4096, disk.size_bytes))
        expected[disk.name] = bytes(min(4096, len(after))) + after[4096:]
    pool.flush()
    # As a crash would leave it: the log must do it again.
    pool._engine.abandon()
    pool = open_again(place)
    exact(pool)
    assert {disk.name: read_all(disk) for disk in pool.disks()} == expected
    for snapshot in pool.snapshots():
        snapshot.delete()
    pool.close()
    pool = open_again(place)
    exact(pool)
    assert {disk.name: read_all(disk) for disk in pool.disks()} == expected
    pool.close()
