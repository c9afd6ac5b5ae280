"""Writers, readers, cutters, cloners and deleters at once; every snapshot is checked by a rule without clocks.

A writer does one thing after the other, and what its nth thing is follows from n alone. So in a snapshot each writer's
work must be a beginning of its sequence: the highest number found says what every place of that writer holds, on all
disks of a group. That number is at least what had returned before the cut was asked for, and at most what had begun
when it was done; only what was under way at the cut may be there in part (as when it waited for room in the log).
Places are no multiples of a block, so neighbours share blocks.

`-m campaign` runs for SNAPCORE_CAMPAIGN_SECONDS (600).
"""

from __future__ import annotations

import faulthandler
import os
import random
import struct
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import xxhash

from snapcore.errors import NotFoundError
from snapcore.pool import Disk, Pool, Snapshot
from tests.support.pools import check_space

NOISE = random.Random(5).randbytes(1 << 20)
RECORD_BYTES = 1000
PARTS = 7
PLACE_BYTES = PARTS * RECORD_BYTES
PLACES = 24
HEAD = struct.Struct("<QIIII")
SUM = struct.Struct("<Q")
DISKS = 3
WRITERS = 4
# Groups of snapshots: the deleter leaves so many, and at so many more the cutters wait for it.
FEW_KEPT = 8
MOST_KEPT = 50
HANGS_AFTER_S = 300.0


@dataclass
class Writer:
    """One sequence of writes and discards over all disks.

    Attributes
    ----------
    begun, returned : int
        Numbers of things that were begun, and that have returned.
    history : dict
        For each place (disk and number) the numbers of what was done there, in order.
    """

    number: int
    begun: int = 0
    returned: int = 0
    history: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def where(self, n: int) -> tuple[int, int]:
        """Disk and place of the nth thing: the disks in turn, so that a group must keep the order across them."""
        return n % DISKS, xxhash.xxh3_64_intdigest(SUM.pack(n), seed=self.number) % PLACES

    def discards(self, n: int) -> bool:
        """Whether the nth thing is a discard."""
        return n % 11 == 10

    def offset(self, place: int) -> int:
        """Places of the writers take turns."""
        return (place * WRITERS + self.number) * PLACE_BYTES

    def content(self, n: int) -> bytes:
        """What a place holds after the nth thing."""
        if n == 0 or self.discards(n):
            return bytes(PLACE_BYTES)
        disk, place = self.where(n)
        parts = []
        for part in range(PARTS):
            start = (n * 7919 + part * 104729) % (len(NOISE) - RECORD_BYTES)
            body = HEAD.pack(n, disk, self.number, place, part) + NOISE[start : start + RECORD_BYTES - 32]
            parts.append(body + SUM.pack(xxhash.xxh3_64_intdigest(body)))
        return b"".join(parts)

    def expected(self, disk: int, place: int, upto: int) -> int:
        """The last thing at a place of the first `upto`; 0 is none."""
        done = self.history.get((disk, place), [])
        at = bisect_right(done, upto)
        return done[at - 1] if at else 0


@dataclass
class Kept:
    """A group of snapshots that was checked, and the sum of each."""

    snapshots: list[Snapshot]
    sums: list[int]


class Crowd:
    """All threads and what they share."""

    def __init__(self, pool: Pool, seconds: float, things: int) -> None:
        self.pool = pool
        self.size_bytes = PLACES * WRITERS * PLACE_BYTES
        self.disks = [pool.create_disk(f"disk-{place}", self.size_bytes) for place in range(DISKS)]
        self.writers = [Writer(number) for number in range(WRITERS)]
        self.kept: list[Kept] = []
        self.lock = threading.Lock()
        self.errors: list[BaseException] = []
        self.stop = threading.Event()
        self.seconds = seconds
        self.until = time.monotonic() + seconds if seconds else float("inf")
        self.things = things
        self.cuts = self.deleted = self.cloned = self.reads = 0
        self.names = iter(range(1 << 60))

    def goes_on(self, done: int) -> bool:
        """Whether a thread that did so many things does another."""
        return not self.stop.is_set() and done < self.things and time.monotonic() < self.until

    def run(self) -> None:
        """All at once; raises what the first thread that failed did."""
        doings: list[Callable[[], None]] = [lambda writer=writer: self._write(writer) for writer in self.writers]
        doings += [self._cut, self._cut, self._delete, self._clone, self._read]
        threads = [threading.Thread(target=self._guarded, args=(doing,), daemon=True) for doing in doings]
        faulthandler.dump_traceback_later(self.seconds + HANGS_AFTER_S, exit=True)
        for thread in threads:
            thread.start()
        for thread in threads[: WRITERS + 2]:
            thread.join()
        self.stop.set()
        for thread in threads:
            thread.join()
        faulthandler.cancel_dump_traceback_later()
        for error in self.errors:
            raise error

    def _guarded(self, doing: Callable[[], None]) -> None:
        try:
            doing()
        except BaseException as error:  # noqa: BLE001
            self.errors.append(error)
            self.stop.set()

    def _write(self, writer: Writer) -> None:
        while self.goes_on(writer.returned):
            n = writer.returned + 1
            disk, place = writer.where(n)
            writer.history.setdefault((disk, place), []).append(n)
            writer.begun = n
            if writer.discards(n):
                self.disks[disk].discard(writer.offset(place), PLACE_BYTES)
            else:
                self.disks[disk].pwrite(writer.content(n), writer.offset(place), fua=n % 53 == 0)
            writer.returned = n
            if n % 5 == 0:
                assert self.disks[disk].pread(PLACE_BYTES, writer.offset(place)) == writer.content(n)

    def _cut(self) -> None:
        done = 0
        while self.goes_on(done * 10):
            if len(self.kept) > MOST_KEPT:
                self.stop.wait(0.001)
                continue
            before = [writer.returned for writer in self.writers]
            snapshots = self.pool.snapshot_group(self.disks)
            after = [writer.begun for writer in self.writers]
            kept = self.check(snapshots, before, after)
            done += 1
            with self.lock:
                self.kept.append(kept)
                self.cuts += 1

    def check(self, snapshots: list[Snapshot], least: list[int], most: list[int]) -> Kept:
        """A group holds a beginning of each writer's work, of a length within the bounds."""
        images = [snapshot.pread(self.size_bytes, 0) for snapshot in snapshots]
        for writer in self.writers:
            returned, begun = least[writer.number], most[writer.number]
            found = max(self._highest(writer, image) for image in images)
            assert found <= begun, (writer.number, found, begun)
            upto = max(found, returned)
            # What was under way at the cut may be there in part: the last thing found, or a discard right behind it.
            loose = {writer.where(n): n for n in (upto, upto + 1) if returned < n <= begun}
            for disk, image in enumerate(images):
                for place in range(PLACES):
                    start = writer.offset(place)
                    held = image[start : start + PLACE_BYTES]
                    if held == writer.content(writer.expected(disk, place, upto)):
                        continue
                    n = loose.get((disk, place), 0)
                    before = writer.content(writer.expected(disk, place, n - 1))
                    mixed = n and _is_mixture(held, before, writer.content(n))
                    assert mixed, (writer.number, returned, upto, begun, disk, place)
        return Kept(snapshots, [xxhash.xxh3_64_intdigest(image) for image in images])

    def _highest(self, writer: Writer, image: bytes) -> int:
        """Number of the last write of which a record is there."""
        rows = np.frombuffer(image, dtype=np.uint8).reshape(PLACES, WRITERS, PARTS, RECORD_BYTES)
        return int(np.ascontiguousarray(rows[:, writer.number, :, :8]).view("<u8").max())

    def _check_again(self, kept: Kept) -> None:
        for snapshot, wanted in zip(kept.snapshots, kept.sums, strict=True):
            assert xxhash.xxh3_64_intdigest(snapshot.pread(self.size_bytes, 0)) == wanted

    def _delete(self) -> None:
        chance = random.Random(1)
        while not self.stop.is_set():
            with self.lock:
                many = len(self.kept) > FEW_KEPT
                kept = self.kept.pop(chance.randrange(len(self.kept))) if many else None
            if kept is None:
                self.stop.wait(0.001)
                continue
            self._check_again(kept)
            if chance.random() < 0.5:
                self.pool.delete_snapshots(kept.snapshots)
            else:
                for snapshot in chance.sample(kept.snapshots, DISKS):
                    snapshot.delete()
            self.deleted += 1
            with pytest.raises(NotFoundError):
                kept.snapshots[0].pread(1, 0)

    def _clone(self) -> None:
        """Disks of snapshots, and of live disks, that are written, cut and deleted again."""
        chance = random.Random(2)
        while not self.stop.is_set():
            with self.lock:
                kept = self.kept.pop(chance.randrange(len(self.kept))) if self.kept else None
            if kept is None:
                self.stop.wait(0.001)
                continue
            which = chance.randrange(DISKS)
            copy = self.pool.create_disk(f"copy-{next(self.names)}", source=kept.snapshots[which])
            with self.lock:
                self.kept.append(kept)
            self._play(copy, kept.sums[which], chance)
            twin = chance.choice(self.disks).clone(f"twin-{next(self.names)}")
            self._play(twin, None, chance)
            self.cloned += 1

    def _play(self, disk: Disk, wanted: int | None, chance: random.Random) -> None:
        first = disk.pread(self.size_bytes, 0)
        assert wanted is None or xxhash.xxh3_64_intdigest(first) == wanted
        own = disk.snapshot()
        for _ in range(5):
            disk.pwrite(NOISE[: chance.randrange(1, 50_000)], chance.randrange(self.size_bytes - 50_000))
        assert own.pread(self.size_bytes, 0) == first
        disk.rollback(own)
        assert disk.pread(self.size_bytes, 0) == first
        if chance.random() < 0.5:
            disk.delete()
            own.delete()
        else:
            own.delete()
            disk.delete()

    def _read(self) -> None:
        """Reads of what is written meanwhile: any mix of old and new, no failure. Usage and differences too."""
        chance = random.Random(3)
        buffer = bytearray(100_000)
        while not self.stop.is_set():
            disk = chance.choice(self.disks)
            assert disk.pread_into(buffer, chance.randrange(self.size_bytes - len(buffer))) == len(buffer)
            self.reads += 1
            if self.reads % 50 == 0:
                assert len(self.pool.usage().versions) >= DISKS
                assert self.pool.unique_bytes(self.disks) >= 0
            if self.reads % 20 == 0:
                one, two = self.pool.snapshots(disk)[-2:] if len(self.pool.snapshots(disk)) > 1 else (disk, disk)
                self._differ(one, two)

    def _differ(self, one: Snapshot | Disk, two: Snapshot | Disk) -> None:
        """Outside of the difference both hold the same, unless one was deleted meanwhile."""
        try:
            extents = self.pool.diff(one, two)
            a, b = bytearray(one.pread(self.size_bytes, 0)), bytearray(two.pread(self.size_bytes, 0))
        except NotFoundError:
            return
        if isinstance(one, Disk):
            return
        for start, length in extents.tolist():
            a[start : start + length] = b[start : start + length] = bytes(length)
        assert a == b


def _is_mixture(held: bytes, before: bytes, after: bytes) -> bool:
    """Each byte is of one or the other."""
    rows = [np.frombuffer(data, dtype=np.uint8) for data in (held, before, after)]
    return bool(np.all((rows[0] == rows[1]) | (rows[0] == rows[2])))


def _run(folder: Path, *, seconds: float, things: int) -> Crowd:
    path = folder / "pool"
    with Pool.create(path, log_bytes=1 << 18) as pool:
        crowd = Crowd(pool, seconds, things)
        crowd.run()
        done = [writer.returned for writer in crowd.writers]
        last = crowd.check(pool.snapshot_group(crowd.disks), done, done)
        crowd.kept.append(last)
        for kept in crowd.kept:
            crowd._check_again(kept)
        check_space(pool)
    with Pool.open(path) as pool:
        for kept in crowd.kept:
            again = [pool.snapshot(snapshot.id) for snapshot in kept.snapshots]
            crowd._check_again(Kept(again, kept.sums))
        disks = [pool.open_disk(disk.id) for disk in crowd.disks]
        crowd._check_again(Kept(disks, last.sums))  # type: ignore[arg-type]
        check_space(pool)
        pool.delete_snapshots(pool.snapshots())
        for disk in pool.disks():
            disk.delete()
        check_space(pool, 0)
    return crowd


def test_every_snapshot_holds_a_beginning_of_each_writers_work(tmp_path: Path) -> None:
    crowd = _run(tmp_path, seconds=0, things=400)
    assert crowd.cuts == 2 * 40


@pytest.mark.campaign
def test_ten_minutes_of_writers_cutters_cloners_and_deleters(tmp_path: Path) -> None:
    crowd = _run(tmp_path, seconds=float(os.environ.get("SNAPCORE_CAMPAIGN_SECONDS", "600")), things=1 << 60)
    print(
        f"{sum(writer.returned for writer in crowd.writers)} writes, {crowd.cuts} groups of {DISKS} snapshots, "
        f"{crowd.deleted} groups deleted, {crowd.cloned} pairs of clones, {crowd.reads} reads"
    )
