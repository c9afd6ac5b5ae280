"""A pool of lazy disks, the repository that fills them, and archives back into it; a byte array is the oracle.

The region fails or lies now and then, processes are killed, snapshots are deleted in both tiers. Whatever is read
is right or an error, errors come only while something is wrong, and nothing that a disk needs can be deleted.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from snapcore import Error, MemoryStore, NotFoundError, RefusedError, Repository, StoreError
from snapcore.persist import Buffer
from snapcore.pool import Pool, Region
from snapcore.repository import create
from snapcore.service import Archives, Regions
from snapcore.service.base import origin_of
from tests.support.pools import quick_folder
from tests.support.recorder import FastMedium
from tests.support.tiers import archived_bytes, local_bytes

CHUNK = 16 << 10
SIZES = (5 * CHUNK + 77, 12 * CHUNK, 3 * CHUNK + 4096)
NAMES = st.sampled_from(["a", "b", "c"])
SEEDS = st.integers(0, 2**32)


class Trouble(MemoryStore):
    """A store that goes wrong in one way, until told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = ""
        self.puts_left: int | None = None
        self._turn = 0
        self._turning = threading.Lock()

    @property
    def well(self) -> bool:
        """Whether nothing is wrong."""
        return not self.kind and self.puts_left is None

    def _answer(self, data: bytes) -> bytes:
        if self.kind == "fails":
            raise StoreError("the region cannot be reached")
        if self.kind == "truncates":
            return data[: len(data) // 2]
        if self.kind == "corrupts" and data:
            with self._turning:
                self._turn += 1
                at = self._turn * 7919 % len(data)
            return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if self.kind == "now and then":
            with self._turning:
                self._turn += 1
                if self._turn % 3 == 0:
                    raise StoreError("the region cannot be reached now")
        return data

    def get(self, name: str, limit_bytes: int) -> bytes:
        return self._answer(super().get(name, limit_bytes))

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        return self._answer(super().get_range(name, offset_bytes, length_bytes))

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        if self.kind in ("fails", "now and then"):
            self._answer(b"")
        return super().list(prefix, after)

    def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
        if self.kind == "fails":
            raise StoreError("the region cannot be reached")
        if self.puts_left is not None:
            if self.puts_left == 0:
                raise StoreError("the region is gone")
            self.puts_left -= 1
        return super().put_new(name, buffers)

    def delete(self, name: str) -> None:
        if self.kind == "fails" or self.puts_left == 0:
            raise StoreError("the region is gone")
        super().delete(name)


class LazyTiers(RuleBasedStateMachine):
    """Disks, local and archived snapshots, and what they should hold."""

    @initialize()
    def begin(self) -> None:
        """A repository with an image of each size, and an empty pool."""
        self.folder = quick_folder()
        os.environ["XDG_CACHE_HOME"] = str(self.folder / "cache")
        self.store = Trouble()
        # Of the oracle: it sees no trouble.
        self.repository = Repository.create(self.store, chunk_bytes=CHUNK)
        self.pool = Pool.create(
            self.folder / "pool", log_bytes=65536, background=False, regions=self._regions(), medium=FastMedium()
        )
        self.lives: dict[str, bytearray] = {}
        self.local: dict[str, bytes] = {}
        self.archived: dict[str, bytes] = {}
        self.cuts: dict[str, bytes] = {}
        for number, size in enumerate(SIZES):
            self._image(number, size)

    def _image(self, number: int, size: int) -> None:
        dice = random.Random(number)
        data = bytearray(dice.randbytes(size))
        data[CHUNK : 2 * CHUNK] = bytes(CHUNK)
        path = self.folder / "image"
        path.write_bytes(data)
        self.archived[self.repository.snapshot(path, disk=f"image{number}").snapshot.id] = bytes(data)

    def _regions(self) -> Regions:
        return Regions(open_repository=lambda _: Repository.open(self.store))

    def teardown(self) -> None:
        """Nothing is left."""
        if hasattr(self, "pool"):
            self.pool._engine.abandon()
            self.pool._closed = True
            shutil.rmtree(self.folder)

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[None]:
        """Errors are fine while something is wrong, and no others."""
        try:
            yield
        except Error:
            if self.store.well:
                raise

    def _region(self, snapshot: str) -> Region:
        return Region(self.repository.url, self.repository.id, snapshot, CHUNK)

    @rule(kind=st.sampled_from(["", "", "fails", "truncates", "corrupts", "now and then"]))
    def trouble(self, kind: str) -> None:
        """The region goes wrong, or is well again."""
        self.store.kind = kind

    @precondition(lambda self: self.archived)
    @rule(name=NAMES, seed=SEEDS)
    def make(self, name: str, seed: int) -> None:
        """A disk from any archived snapshot; or, where there is one of that name, it is rolled back to it."""
        snapshot = random.Random(seed).choice(sorted(self.archived))
        with self._may_fail():
            if name in self.lives:
                self.pool.rollback_disk(self.pool.open_disk(name), self._region(snapshot))
            else:
                self.pool.create_disk(name, source=self._region(snapshot))
            self.lives[name] = bytearray(self.archived[snapshot])

    @precondition(lambda self: self.lives)
    @rule(name=NAMES, seed=SEEDS)
    def write(self, name: str, seed: int) -> None:
        """Write, zero, or drop something."""
        if name not in self.lives:
            return
        dice, data = random.Random(seed), self.lives[name]
        at = dice.randrange(len(data))
        part = dice.randbytes(min(dice.choice([1, 700, 4096, 9000]), len(data) - at))
        if dice.random() < 0.3:
            part = bytes(len(part))
        disk = self.pool.open_disk(name)
        for _ in range(2):
            try:
                disk.pwrite(part, at) if any(part) else disk.discard(at, len(part))
            except StoreError:
                # Blocks of the range hold old or new bytes: it is written again when it can be.
                assert not self.store.well
                self.store.kind = ""
            else:
                break
        data[at : at + len(part)] = part

    @precondition(lambda self: self.lives)
    @rule(name=NAMES, seed=SEEDS)
    def read(self, name: str, seed: int) -> None:
        """What comes is right."""
        if name in self.lives:
            dice, data = random.Random(seed), self.lives[name]
            at = dice.randrange(len(data))
            length = dice.choice([1, 5000, len(data)])
            with self._may_fail():
                assert self.pool.open_disk(name).pread(length, at) == data[at : at + length]

    @rule(name=NAMES, other=NAMES)
    def clone(self, name: str, other: str) -> None:
        """A disk from a live one."""
        if name in self.lives and other not in self.lives:
            self.pool.open_disk(name).clone(other)
            self.lives[other] = bytearray(self.lives[name])

    @rule(name=NAMES, left=st.none() | st.integers(0, 6), archive=st.booleans())
    def cut(self, name: str, left: int | None, archive: bool) -> None:
        """A snapshot, archived with a region that may fail meanwhile."""
        if name not in self.lives:
            return
        made = self.pool.open_disk(name).snapshot()
        self.local[made.id] = self.cuts[origin_of(self.pool, made)] = bytes(self.lives[name])
        if archive:
            self.store.puts_left = left
            with self._may_fail(), Archives(self.pool) as archives:
                done = archives.archive(self.repository, made).result()
                self.archived[done.archived.id] = self.local[made.id]
            self.store.puts_left = None

    @precondition(lambda self: self.local)
    @rule(seed=SEEDS)
    def roll_back(self, seed: int) -> None:
        """A disk to one of its local snapshots."""
        item = self.pool.snapshot(random.Random(seed).choice(sorted(self.local)))
        with contextlib.suppress(NotFoundError, RefusedError):
            self.pool.open_disk(item.disk).rollback(item)
            self.lives[item.disk] = bytearray(self.local[item.id])

    @rule(name=NAMES, whole=st.booleans())
    def hydrate(self, name: str, whole: bool) -> None:
        """Fetch all; and forget the region."""
        if name in self.lives:
            disk = self.pool.open_disk(name)
            with self._may_fail():
                disk.hydrate(wait=True)
                if whole:
                    disk.decouple()
                    assert disk.hydration() is None
            if disk._lazy() is not None:
                self.pool.plan_hydration(disk, None)

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        """A disk goes."""
        if name in self.lives:
            self.pool.open_disk(name).delete()
            del self.lives[name]

    @precondition(lambda self: self.local)
    @rule(seed=SEEDS)
    def delete_local(self, seed: int) -> None:
        """Any local snapshot."""
        gone = random.Random(seed).choice(sorted(self.local))
        self.pool.delete_snapshot(gone)
        del self.local[gone]

    @precondition(lambda self: len(self.archived) > 1)
    @rule(seed=SEEDS, collect=st.booleans())
    def delete_archived(self, seed: int, collect: bool) -> None:
        """Any archived snapshot, unless a lazy disk needs it."""
        self.store.kind = ""
        gone = random.Random(seed).choice(sorted(self.archived))
        needed = {region.snapshot for region in self.pool._engine.versions.regions_needed()}
        refused = ""
        try:
            self.repository.delete(gone)
        except RefusedError as error:
            refused = str(error)
        else:
            del self.archived[gone]
        assert self.pool.path in refused if refused else gone not in needed
        if collect:
            self.repository.collect()

    @rule(clean=st.booleans())
    def reopen(self, clean: bool) -> None:
        """The process ends; what was written was flushed."""
        self.pool.flush()
        if clean:
            self.pool.close()
        else:
            self.pool._engine.abandon()
            self.pool._closed = True
        self.pool = Pool.open(self.folder / "pool", background=False, regions=self._regions(), medium=FastMedium())

    @rule()
    def everything_is_right(self) -> None:
        """In both tiers, once the region is well; and what nobody needs is pinned no more."""
        self.store.kind = ""
        for name, data in self.lives.items():
            assert local_bytes(self.pool.open_disk(name)) == data
        for number, held in self.local.items():
            assert local_bytes(self.pool.snapshot(number)) == held
        listed = {item.id: item for item in self.repository.snapshots()}
        assert {*self.archived} <= {*listed}
        for item in listed.values():
            expected = self.archived.get(item.id) or self.cuts[str(item.origin)]
            assert archived_bytes(self.repository, item) == expected
        self.pool.checkpoint()
        holds = self.pool._engine.holds
        assert holds is not None
        for _ in range(2):
            holds.settle()
            holds.wait()
        needed = {region.snapshot for region in self.pool._engine.versions.regions_needed()}
        assert {pin.snapshot for pin in self.repository.pins()} == needed

    @invariant()
    def what_is_there_is_listed(self) -> None:
        """The pool knows what it should."""
        if hasattr(self, "pool"):
            assert {disk.name for disk in self.pool.disks()} == {*self.lives}
            assert {item.id for item in self.pool.snapshots()} == {*self.local}


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    # What is compared beside the list of changes would cover up a list that is wrong.
    monkeypatch.setattr(create, "_CHECKED_AT_LEAST", 0)
    monkeypatch.setattr("snapcore.pool.hydration._PAUSES_S", (0.01,))


def test_lazy_disks_hold_what_they_should_whatever_happens_in_either_tier() -> None:
    run_state_machine_as_test(LazyTiers, settings=settings(settings(), max_examples=25, stateful_step_count=30))


@pytest.mark.campaign
def test_lazy_disks_hold_what_they_should_for_long() -> None:
    examples = int(os.environ.get("SNAPCORE_CAMPAIGN_EXAMPLES", "1500"))
    run_state_machine_as_test(
        LazyTiers,
        settings=settings(
            settings(),
            max_examples=examples,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=[*HealthCheck],
        ),
    )
