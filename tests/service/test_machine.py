"""A pool and a repository under everything that users do, with crashes and a failing store; a byte array is the oracle.

A crash ends the process with the pool as it is, and the region fails from any put on, as for who was killed: what
it took before stays. Everything that is listed must hold its bytes, and what was acknowledged must be listed.
"""

from __future__ import annotations

import contextlib
import random
import shutil

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

from snapcore import MemoryStore, Repository, StoreError
from snapcore.persist import Buffer
from snapcore.pool import Pool
from snapcore.repository import create
from snapcore.service import Archives, group, into_disk
from snapcore.service.base import origin_of
from tests.support.pools import quick_folder
from tests.support.tiers import archived_bytes, local_bytes

SIZE = 6 * (16 << 10) + 5
NAMES = st.sampled_from(["web", "log"])
SEEDS = st.integers(0, 2**32)


class Region(MemoryStore):
    """A store that fails for ever from the n-th put on, as a process does that was killed."""

    def __init__(self) -> None:
        super().__init__()
        self.left: int | None = None

    def put_new(self, name: str, buffers: list[Buffer]) -> int:  # type: ignore[override]
        if self.left is not None:
            if self.left == 0:
                raise StoreError("the region is gone")
            self.left -= 1
        return super().put_new(name, buffers)

    def delete(self, name: str) -> None:
        if self.left == 0:
            raise StoreError("the region is gone")
        super().delete(name)


class BothTiers(RuleBasedStateMachine):
    """What is in the pool, what is in the repository, and what should be."""

    @initialize()
    def begin(self) -> None:
        """An empty pool with two disks."""
        self.folder = quick_folder()
        self.region = Region()
        self.repository = Repository.create(self.region, chunk_bytes=16 << 10)
        self.pool = Pool.create(self.folder / "pool", background=False)
        self.disks = {name: bytearray(SIZE) for name in ("web", "log")}
        for name in self.disks:
            self.pool.create_disk(name, SIZE)
        self.local: dict[str, bytes] = {}
        self.archived: dict[str, bytes] = {}
        # By origin, what every snapshot held that was ever cut.
        self.cuts: dict[str, bytes] = {}

    def teardown(self) -> None:
        """Nothing is left."""
        if hasattr(self, "pool"):
            self.pool.close()
            shutil.rmtree(self.folder)

    @rule(name=NAMES, seed=SEEDS)
    def write(self, name: str, seed: int) -> None:
        """Write, zero, or drop something."""
        dice = random.Random(seed)
        at = dice.randrange(SIZE)
        data = dice.randbytes(min(dice.choice([1, 700, 9000]), SIZE - at))
        if dice.random() < 0.3:
            data = bytes(len(data))
            self.pool.open_disk(name).discard(at, len(data))
        else:
            self.pool.open_disk(name).pwrite(data, at)
        self.disks[name][at : at + len(data)] = data

    @rule(name=NAMES)
    def cut(self, name: str) -> None:
        """A local snapshot that nobody archives."""
        self._cut([name])

    def _cut(self, names: list[str]) -> list:
        made = self.pool.snapshot_group(names)
        for item in made:
            self.local[item.id] = self.cuts[origin_of(self.pool, item)] = bytes(self.disks[item.disk])
        return made

    @rule(name=NAMES, left=st.none() | st.integers(0, 6), keep=st.none() | st.integers(1, 2))
    def archive(self, name: str, left: int | None, keep: int | None) -> None:
        """Cut and archive, with a region that may fail meanwhile."""
        (made,) = self._cut([name])
        self.region.left = left
        with contextlib.suppress(StoreError), Archives(self.pool) as archives:
            done = archives.archive(self.repository, made).result()
            self.archived[done.archived.id] = self.local[made.id]
            if keep is not None:
                for gone in archives.keep_local(self.repository, made.disk_id, keep):
                    del self.local[gone.id]
        self.region.left = None

    @rule(left=st.none() | st.integers(0, 12))
    def archive_group(self, left: int | None) -> None:
        """Both disks at one instant, all or nothing."""
        made = self._cut(["web", "log"])
        self.region.left = left
        with contextlib.suppress(StoreError), Archives(self.pool) as archives:
            done = group.archive(archives, self.repository, made)
            for member, item in zip(done.members, made, strict=True):
                self.archived[member.snapshot] = self.local[item.id]
        self.region.left = None

    @rule()
    def finish(self) -> None:
        """What was wanted and failed is made good."""
        with Archives(self.pool) as archives:
            for begun in archives.finish(self.repository):
                done = begun.result()
                self.archived[done.archived.id] = self.local[done.local.id]
            for made in group.finish(archives, self.repository):
                for member in made.members:
                    found = self.repository.find(member.snapshot)
                    self.archived[found.id] = self.cuts[str(found.origin)]
            assert archives.journal.wanted() == []
        groups = {item.id for item in self.repository.groups()}
        assert {item.group for item in self.repository.snapshots() if item.group} <= groups

    @precondition(lambda self: self.local)
    @rule(seed=SEEDS, cleanly=st.booleans())
    def delete_local(self, seed: int, cleanly: bool) -> None:
        """Any local snapshot, by the service or behind its back."""
        gone = random.Random(seed).choice(sorted(self.local))
        if cleanly:
            with Archives(self.pool) as archives:
                archives.delete_snapshots([self.pool.snapshot(gone)])
        else:
            self.pool.delete_snapshot(gone)
        del self.local[gone]

    @precondition(lambda self: self.archived)
    @rule(seed=SEEDS, collect=st.booleans())
    def delete_archived(self, seed: int, collect: bool) -> None:
        """Any archived snapshot."""
        gone = random.Random(seed).choice(sorted(self.archived))
        self.repository.delete(gone)
        del self.archived[gone]
        if collect:
            self.repository.collect()

    @precondition(lambda self: self.local)
    @rule(seed=SEEDS)
    def rollback(self, seed: int) -> None:
        """A disk to one of its snapshots."""
        item = self.pool.snapshot(random.Random(seed).choice(sorted(self.local)))
        self.pool.open_disk(item.disk).rollback(item)
        self.disks[item.disk][:] = self.local[item.id]

    @precondition(lambda self: self.archived)
    @rule(name=NAMES, seed=SEEDS)
    def restore(self, name: str, seed: int) -> None:
        """Any archived snapshot into any disk."""
        wanted = random.Random(seed).choice(sorted(self.archived))
        into_disk(self.pool, self.pool.open_disk(name), self.repository, self.repository.find(wanted))
        self.disks[name][:] = self.archived[wanted]

    @rule(clean=st.booleans())
    def crash(self, clean: bool) -> None:
        """The process ends; what was written was flushed."""
        self.pool.flush()
        if clean:
            self.pool.close()
        else:
            self.pool._engine.abandon()
            self.pool._closed = True
        self.pool = Pool.open(self.folder / "pool", background=False)

    @invariant()
    def everything_holds_its_bytes(self) -> None:
        """In both tiers."""
        if not hasattr(self, "pool"):
            return
        for name, content in self.disks.items():
            assert local_bytes(self.pool.open_disk(name)) == content
        assert {item.id for item in self.pool.snapshots()} == {*self.local}
        for number, content in self.local.items():
            assert local_bytes(self.pool.snapshot(number)) == content
        listed = {item.id: item for item in self.repository.snapshots()}
        assert {*self.archived} <= {*listed}
        for item in listed.values():
            assert archived_bytes(self.repository, item) == self.cuts[str(item.origin)]
        for made in self.repository.groups():
            assert len(made.members) == 2


def test_both_tiers_hold_what_was_written_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is compared beside the list of changes would cover up a list that is wrong.
    monkeypatch.setattr(create, "_CHECKED_AT_LEAST", 0)
    run_state_machine_as_test(BothTiers, settings=settings(settings(), stateful_step_count=25))
