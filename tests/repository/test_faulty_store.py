"""Every call of every job goes wrong once, in every way: a clear error or success, and never a wrong snapshot.

Each job runs on a copy of one small repository in memory, with one fault at the n-th call of a kind, for all n and
kinds. Then a store without faults must hold every snapshot that was acknowledged, byte for byte, and nothing may be
left that a later job cannot clear up.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count

import pytest

from snapcore import Repository
from snapcore.errors import DamagedError, Error
from snapcore.store import MemoryStore, RetryStore, Store
from tests.support.faulty import Fault, FaultyStore, Plan
from tests.support.forge import Objects, objects_of, store_of
from tests.support.small import Bytes, changed_pages

CHUNK_BYTES = 4096
DISK = "disk"

READS = ("get", "get_range", "size", "list", "settle")
WRITES = ("put_new", "delete")
FAULTS: dict[Fault, tuple[str, ...]] = {
    Fault.FAIL: (*READS, *WRITES),
    Fault.TRUNCATE: ("list",),
    Fault.LIE: ("get", "get_range"),
    Fault.LOSE: WRITES,
    Fault.TWICE: WRITES,
    Fault.LATE: WRITES,
    Fault.LAST: WRITES,
    Fault.AFTER_NEXT: WRITES,
}


class Base:
    """The repository before the job: three snapshots of one disk and what a fourth would hold, and garbage."""

    def __init__(self) -> None:
        random_ = random.Random(7)
        store = MemoryStore()
        repository = Repository.create(store, chunk_bytes=CHUNK_BYTES)
        content = random_.randbytes(10 * CHUNK_BYTES) + bytes(4 * CHUNK_BYTES)
        self.content: dict[str, bytes] = {}
        for step in range(4):
            taken = repository.snapshot(Bytes(content), disk=DISK).snapshot.id
            self.content[taken] = content
            content = changed_pages(content, random_, [step, 5 + step, 11 + step % 3])
        first = next(iter(self.content))
        repository.delete(first)
        del self.content[first]
        self.next = content
        self.objects: Objects = objects_of(store)


@cache
def base() -> Base:
    return Base()


def take(repository: Repository) -> None:
    repository.snapshot(Bytes(base().next), disk=DISK)


def restore(repository: Repository) -> None:
    for snapshot_id, content in base().content.items():
        assert read(repository, snapshot_id) == content


def delete(repository: Repository) -> None:
    repository.delete(next(iter(base().content)))


def collect(repository: Repository) -> None:
    repository.collect()


def verify(repository: Repository) -> None:
    repository.verify()


JOBS: dict[str, Callable[[Repository], None]] = {
    "take": take,
    "restore": restore,
    "delete": delete,
    "collect": collect,
    "verify": verify,
}


def read(repository: Repository, snapshot_id: str) -> bytes:
    with repository.open_snapshot(snapshot_id) as reader:
        return reader.read(reader.size_bytes)


def plans(faults: dict[Fault, tuple[str, ...]]) -> list[Plan]:
    """Faults and kinds of calls; the number of the call is for `hit_every_call`."""
    return [Plan(fault, method) for fault, methods in faults.items() for method in methods]


def hit_every_call(job: str, plan: Plan, outside: Callable[[Store], Store]) -> Iterator[tuple[MemoryStore, bool]]:
    """Runs of a job with the fault at its first call of a kind, its second, …; what is in the store, and success."""
    for number in count():
        inner = store_of(base().objects)
        faulty = FaultyStore(inner)
        repository = Repository.open(outside(faulty))
        faulty.counts.clear()
        faulty.plan = Plan(plan.fault, plan.method, number)
        done = True
        try:
            JOBS[job](repository)
        except Error:
            done = False
        if not faulty.hit:
            return
        faulty.settle_late()
        yield inner, done


def check(store: MemoryStore, job: str, done: bool, *, believed_a_lie: bool = False) -> None:
    """Everything that was acknowledged is there; what is there is right, and can be gone on with."""
    repository = Repository.open(store)
    if believed_a_lie:
        # Marks of damage that is none: the next verify takes them back.
        repository.verify()
    gone = next(iter(base().content)) if job == "delete" else None
    wanted = {snapshot_id: content for snapshot_id, content in base().content.items() if snapshot_id != gone}
    found = {snapshot.id for snapshot in repository.snapshots()}
    assert wanted.keys() <= found
    if done:
        assert gone not in found
        assert len(found) == len(wanted) + (job == "take")
    for snapshot_id in found:
        assert read(repository, snapshot_id) == base().content.get(snapshot_id, base().next)
    taken = repository.snapshot(Bytes(base().next), disk=DISK).snapshot.id
    repository.collect()
    assert repository.verify().ok
    for snapshot_id in {*found, taken}:
        assert read(repository, snapshot_id) == base().content.get(snapshot_id, base().next)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("plan", plans(FAULTS), ids=lambda plan: f"{plan.method}-{plan.fault.name.lower()}")
def test_a_fault_is_an_error_or_harmless_and_never_a_wrong_snapshot(job: str, plan: Plan) -> None:
    for store, done in hit_every_call(job, plan, lambda faulty: faulty):
        check(store, job, done, believed_a_lie=plan.fault is Fault.LIE)


# A request that somebody on the way repeats is answered as the second one, and cannot be told from another's.
CURED = {fault: methods for fault, methods in FAULTS.items() if fault not in (Fault.LIE, Fault.TWICE)}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("plan", plans(CURED), ids=lambda plan: f"{plan.method}-{plan.fault.name.lower()}")
def test_one_fault_of_a_store_behind_a_network_is_not_noticed_at_all(job: str, plan: Plan) -> None:
    for store, done in hit_every_call(job, plan, lambda faulty: RetryStore(faulty, first_wait_s=0.0)):
        assert done
        check(store, job, done)


@pytest.mark.parametrize("method", WRITES)
@pytest.mark.parametrize("job", JOBS)
def test_a_store_that_fails_from_some_call_on_loses_nothing(job: str, method: str) -> None:
    for number in count():
        inner = store_of(base().objects)
        faulty = FaultyStore(inner)
        repository = Repository.open(faulty)
        faulty.plan = Plan(Fault.FAIL, method, number, times=1 << 30)
        try:
            JOBS[job](repository)
        except Error:
            done = False
        else:
            done = True
        if not faulty.hit:
            break
        check(inner, job, done)


def test_a_commit_that_arrives_after_a_collection_never_brings_a_snapshot_with_missing_blocks() -> None:
    for number in count():
        inner = store_of(base().objects)
        faulty = FaultyStore(inner)
        repository = Repository.open(faulty)
        faulty.plan = Plan(Fault.LAST, "put_new", number)
        try:
            take(repository)
        except Error:
            pass
        else:
            assert not faulty.hit
            break
        with_out = Repository.open(inner)
        with_out.collect()
        faulty.settle_late()
        for snapshot in with_out.snapshots():
            assert read(with_out, snapshot.id) == base().content.get(snapshot.id, base().next)
        assert with_out.verify().ok


def test_the_faults_are_seen_without_the_code_that_looks_for_them() -> None:
    """A lie about a chunk is noticed by its id; without that look it would be wrong bytes."""
    noticed = 0
    for number in range(20):
        repository = Repository.open(FaultyStore(store_of(base().objects), Plan(Fault.LIE, "get_range", number)))
        try:
            restore(repository)
        except DamagedError:
            noticed += 1
    assert noticed > 3
