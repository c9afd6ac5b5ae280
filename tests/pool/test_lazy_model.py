"""Whatever is done to lazy disks while their region fails and comes back, they hold what bytes in memory hold.

A crash at any instant of such work leaves nothing that is read wrongly, and keeps what was saved.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from snapcore import NotFoundError, SourceChangedError, StoreError
from snapcore.pool import Disk, Pool, Region, Snapshot
from tests.support.lazy_regions import Regions
from tests.support.pools import BLOCK_BYTES, MIB, check_space, quick_folder
from tests.support.recorder import FastMedium, Recorder, crashes

CHUNK_BYTES = 8192
SIZES = (MIB + 5000, 3 * MIB, 70000)
places = st.integers(0, 3 * MIB + 9000)
lengths = st.one_of(st.integers(1, 3 * BLOCK_BYTES), st.integers(1, 2 * MIB), st.just(BLOCK_BYTES))


def image(seed: int) -> bytes:
    """A snapshot, of which about half is zeros."""
    source = random.Random(seed)
    size = SIZES[seed % len(SIZES)]
    parts = [source.choice((bytes(CHUNK_BYTES), source.randbytes(CHUNK_BYTES))) for _ in range(size // CHUNK_BYTES)]
    return b"".join(parts) + source.randbytes(size % CHUNK_BYTES)


@dataclass
class Live:
    """A disk, and what it holds."""

    disk: Disk
    data: bytearray
    origin: bytes | None
    lazy: bool = True


class LazyMachine(RuleBasedStateMachine):
    """A byte array is the oracle. While the region fails, what is done succeeds wholly or fails with its error."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = quick_folder()
        self.regions = Regions(CHUNK_BYTES)
        self.pool = Pool.create(
            self.folder / "pool", log_bytes=65536, background=False, regions=self.regions, medium=FastMedium()
        )
        self.lives: list[Live] = []
        self.taken: list[tuple[Snapshot, bytes, str]] = []
        self.count = 0

    def teardown(self) -> None:
        if not self.pool._closed:
            self.pool._engine.abandon()
        shutil.rmtree(self.folder)

    def _name(self) -> str:
        self.count += 1
        return f"name{self.count}"

    def _region(self, seed: int) -> Region:
        return self.regions.put(f"snapshot{seed}", image(seed))

    def _live(self, which: int) -> Live:
        return self.lives[which % len(self.lives)]

    @initialize(seed=st.integers(0, 4))
    def begin(self, seed: int) -> None:
        self.make(seed, 0)

    @precondition(lambda self: len(self.lives) < 4)
    @rule(seed=st.integers(0, 4), more=st.sampled_from((0, 5, 9000)))
    def make(self, seed: int, more: int) -> None:
        data = image(seed)
        try:
            disk = self.pool.create_disk(self._name(), len(data) + more, source=self._region(seed))
        except StoreError:
            # What it needs could not be pinned.
            assert self.regions.failing
            return
        self.lives.append(Live(disk, bytearray(data + bytes(more)), data))

    @rule(which=places, at=places, length=lengths)
    def read(self, which: int, at: int, length: int) -> None:
        live = self._live(which)
        at %= len(live.data)
        try:
            assert live.disk.pread(length, at) == live.data[at : at + length]
        except StoreError:
            assert self.regions.failing

    @rule(which=places, at=places, length=lengths, seed=places)
    def write(self, which: int, at: int, length: int, seed: int) -> None:
        live = self._live(which)
        at %= len(live.data)
        data = random.Random(seed).randbytes(min(length, len(live.data) - at))
        try:
            live.disk.pwrite(data, at)
        except StoreError:
            assert self.regions.failing and (at % BLOCK_BYTES or len(data) % BLOCK_BYTES)
            # Blocks of the range may hold old or new bytes: it is written again when it can be.
            self.regions.failing = False
            live.disk.pwrite(data, at)
        live.data[at : at + len(data)] = data

    @rule(which=places, at=places, length=lengths)
    def discard(self, which: int, at: int, length: int) -> None:
        live = self._live(which)
        at %= len(live.data)
        length = min(length, len(live.data) - at)
        try:
            live.disk.discard(at, length)
        except StoreError:
            assert self.regions.failing
            self.regions.failing = False
            live.disk.discard(at, length)
        live.data[at : at + length] = bytes(length)

    @precondition(lambda self: len(self.taken) < 5)
    @rule(which=places)
    def cut(self, which: int) -> None:
        live = self._live(which)
        self.taken.append((live.disk.snapshot(), bytes(live.data), live.disk.id))

    @precondition(lambda self: len(self.lives) < 4)
    @rule(which=places)
    def clone(self, which: int) -> None:
        live = self._live(which)
        self.lives.append(Live(live.disk.clone(self._name()), bytearray(live.data), None))

    @rule(which=places)
    def roll_back(self, which: int) -> None:
        live = self._live(which)
        for snapshot, data, disk in self.taken:
            if disk == live.disk.id:
                live.disk.rollback(snapshot)
                live.data[:] = data
                return

    @rule(which=places, seed=st.integers(0, 4))
    def roll_back_to_a_region(self, which: int, seed: int) -> None:
        live = self._live(which)
        try:
            self.pool.rollback_disk(live.disk, self._region(seed))
        except StoreError:
            assert self.regions.failing
            return
        live.data = bytearray(image(seed))

    @rule(which=places)
    def reset(self, which: int) -> None:
        live = self._live(which)
        if live.origin is not None:
            live.disk.reset()
            live.data[:] = live.origin.ljust(len(live.data), b"\0")[: len(live.data)]

    @precondition(lambda self: len(self.lives) > 1)
    @rule(which=places)
    def delete(self, which: int) -> None:
        live = self._live(which)
        self.lives.remove(live)
        live.disk.delete()

    @precondition(lambda self: self.taken)
    @rule(which=places)
    def delete_a_snapshot(self, which: int) -> None:
        self.taken.pop(which % len(self.taken))[0].delete()

    @rule(fails=st.booleans())
    def region(self, fails: bool) -> None:
        self.regions.failing = fails

    @rule(which=places)
    def hydrate(self, which: int) -> None:
        self.regions.failing = False
        live = self._live(which)
        live.disk.hydrate(wait=True)
        found = live.disk.hydration()
        assert found is None or found.here_bytes == found.total_bytes

    @rule(which=places)
    def decouple(self, which: int) -> None:
        self.regions.failing = False
        self._live(which).disk.decouple()

    @rule()
    def save(self) -> None:
        self.pool._engine.versions.backings.save()

    @rule()
    def checkpoint(self) -> None:
        check_space(self.pool)

    @rule(crash=st.booleans())
    def reopen(self, crash: bool) -> None:
        if crash:
            self.pool.flush()
            self.pool._engine.abandon()
        else:
            self.pool.close()
        self.pool = Pool.open(self.folder / "pool", background=False, regions=self.regions, medium=FastMedium())
        for live in self.lives:
            live.disk = self.pool.open_disk(live.disk.id)
        self.taken = [(self.pool.snapshot(snapshot.id), data, disk) for snapshot, data, disk in self.taken]

    @rule()
    def compare_everything(self) -> None:
        self.regions.failing = False
        for live in self.lives:
            assert live.disk.pread(len(live.data), 0) == live.data
        for snapshot, data, _ in self.taken:
            assert snapshot.pread(len(data), 0) == data

    @rule()
    def pins_are_those_that_are_needed(self) -> None:
        self.regions.failing = False
        self.pool.checkpoint()
        holds = self.pool._engine.holds
        assert holds is not None
        holds.wait()
        needed = {region.snapshot for region in self.pool._engine.versions.regions_needed()}
        assert needed == {*self.regions.pinned}

    @invariant()
    def what_is_needed_is_pinned(self) -> None:
        needed = {region.snapshot for region in self.pool._engine.versions.regions_needed()}
        assert needed <= {*self.regions.pinned}

    @invariant()
    def sizes_are_right(self) -> None:
        assert [live.disk.size_bytes for live in self.lives] == [len(live.data) for live in self.lives]


TestLazyDisks = LazyMachine.TestCase
TestLazyDisks.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


DAMAGES = {
    "present gone": lambda lazy: (lazy / "3.present").unlink(missing_ok=True),
    "present empty": lambda lazy: (lazy / "3.present").write_bytes(b""),
    "present bad": lambda lazy: (lazy / "3.present").write_bytes(b"SNAPHERE" + bytes(300)),
    "data gone": lambda lazy: (lazy / "3.data").unlink(missing_ok=True),
    "data short": lambda lazy: os.truncate(lazy / "3.data", 4096) if (lazy / "3.data").exists() else None,
    "copy A bad": lambda lazy: _flip(lazy.parent / "superblock", 40),
    "copy B bad": lambda lazy: _flip(lazy.parent / "superblock", 4096 + 40),
}


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_no_crash_of_a_decouple_together_with_one_damage_loses_or_zeroes_anything() -> None:
    folder = quick_folder()
    try:
        _decouple_everywhere(folder)
    finally:
        shutil.rmtree(folder)


def _decouple_everywhere(folder: Path) -> None:
    regions = Regions(CHUNK_BYTES)
    data = image(2)
    (folder / "work").mkdir()
    recorder = Recorder(folder / "work")
    pool = Pool.create(folder / "work" / "pool", log_bytes=65536, background=False, regions=regions, medium=recorder)
    disk = pool.create_disk("web", source=regions.put("one", data))
    disk.hydrate(wait=True)
    pool.checkpoint()
    begun = len(recorder.operations)
    disk.decouple()
    recorder.note("decoupled")
    disk.pwrite(b"later", 0)
    pool.close()
    expected = (data, b"later" + data[5:])
    seen, dice = dict.fromkeys(DAMAGES, 0), random.Random(3)
    for crash in crashes(recorder, 9, seed=2, since=begun):
        for name, harm in DAMAGES.items():
            crash.build(folder / "crashed")
            harm(folder / "crashed" / "pool" / "lazy")
            # What was decoupled needs no region, whatever happened to what says how much is here.
            regions.failing = "decoupled" in crash.facts
            # What the first one that opens it recovers, without a look at the disk, the next one reads.
            for reads in (dice.random() < 0.5, True):
                with Pool.open(
                    folder / "crashed" / "pool", background=False, regions=regions, medium=FastMedium()
                ) as again:
                    try:
                        assert not reads or again.open_disk("web").pread(len(data), 0) in expected
                    except SourceChangedError:
                        # The bytes themselves are gone, and nobody is told anything else.
                        assert name in ("data gone", "data short")
            seen[name] += 1
            shutil.rmtree(folder / "crashed")
    assert min(seen.values()) > 25


def test_what_a_decouple_cannot_make_durable_it_does_not_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, regions = quick_folder(), Regions(CHUNK_BYTES)
    try:
        with Pool.create(folder / "pool", log_bytes=65536, background=False, regions=regions) as pool:
            disk = pool.create_disk("web", source=regions.put("one", image(2)))
            disk.hydrate(wait=True)
            found = disk._lazy()
            assert found is not None

            def fail(descriptor: int) -> None:
                raise OSError(5, "broken")

            with monkeypatch.context() as patch:
                patch.setattr(found._medium, "sync", fail)
                with pytest.raises(StoreError):
                    disk.decouple()
            # Nor does the next try, which finds the medium well again and the file given up.
            with pytest.raises(StoreError, match="could not be synced"):
                disk.decouple()
        with Pool.open(folder / "pool", background=False, regions=regions) as pool:
            assert pool.open_disk("web").pread(len(image(2)), 0) == image(2)
    finally:
        shutil.rmtree(folder)


def test_a_crash_at_any_instant_leaves_nothing_that_is_read_wrongly() -> None:
    folder = quick_folder()
    try:
        _crash_everywhere(folder)
    finally:
        shutil.rmtree(folder)


def _crash_everywhere(folder: Path) -> None:
    regions = Regions(CHUNK_BYTES)
    one, two = image(2), image(5)[::-1]
    region, other = regions.put("one", one), regions.put("two", two)
    (folder / "work").mkdir()
    recorder = Recorder(folder / "work")
    regions.on_pins = lambda pins: recorder.note(pins)
    pool = Pool.create(folder / "work" / "pool", log_bytes=65536, background=False, regions=regions, medium=recorder)
    disk = pool.create_disk("web", source=region)
    recorder.note("made")
    disk.pread(1, 0)
    pool._engine.versions.backings.save()
    recorder.note("saved")
    pool.rollback_disk(disk, other)
    recorder.note("back")
    disk.pread(CHUNK_BYTES, 0)
    pool.create_disk("second", source=other).decouple()
    recorder.note("decoupled")
    pool.checkpoint()
    disk.delete()
    recorder.note("deleted")
    pool.checkpoint()
    pool.close()
    assert regions.pinned == []
    regions.on_pins = lambda pins: None
    seen = 0
    for crash in crashes(recorder, 3, seed=1):
        crash.build(folder / "crashed")
        regions.reads.clear()
        regions.pins = {*next((fact for fact in reversed(crash.facts) if isinstance(fact, frozenset)), ())}
        before = {*regions.pinned}
        try:
            again = Pool.open(folder / "crashed" / "pool", background=False, regions=regions, medium=FastMedium())
        except NotFoundError:
            assert not crash.facts
        else:
            seen += 1
            needed = {found.snapshot for found in again._engine.versions.regions_needed()}
            holds = again._engine.holds
            assert holds is not None and needed <= before
            holds.wait()
            assert {*regions.pinned} == needed
            _holds_what_it_should(again, crash.facts, regions, one, two)
            again._engine.abandon()
        shutil.rmtree(folder / "crashed")
    assert seen > 100


def _holds_what_it_should(pool: Pool, facts: tuple[object, ...], regions: Regions, one: bytes, two: bytes) -> None:
    disks = {disk.name: disk for disk in pool.disks()}
    assert "made" not in facts or "web" in disks or "decoupled" in facts
    assert "deleted" not in facts or "web" not in disks
    if "web" in disks:
        held = disks["web"].pread(len(one), 0)
        assert held == two if "back" in facts else held in (one, two)
        if "saved" in facts and held == one:
            assert regions.reads == []
    if "second" in disks:
        regions.failing = "decoupled" in facts
        assert disks["second"].pread(len(two), 0) == two
        regions.failing = False
    assert "decoupled" not in facts or "second" in disks
