# ruff: noqa: B023 - the functions in loops are called within the turn that makes them
"""Whatever others do meanwhile, and wherever work stops: what was acknowledged stays, and nothing half-made shows."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapcore import (
    BusyError,
    CancelledError,
    DamagedError,
    Error,
    FencedError,
    NotFoundError,
    Repository,
    StoreError,
)
from snapcore.persist import Buffer, Medium
from snapcore.repository import collect, damage, generations, index, pack, session
from snapcore.repository.domain import PLAIN
from snapcore.repository.table import Table
from snapcore.store import LocalStore, MemoryStore, Store
from tests.support.disks import changed, disk
from tests.support.small import Bytes

Hook = Callable[[str], None]


@pytest.fixture(autouse=True)
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of a few chunks, so that every step has several."""
    monkeypatch.setattr(pack, "PACK_BYTES", 16 << 10)
    monkeypatch.setattr(collect, "_SMALL_BYTES", 4 << 10)


class HookedStore:
    """A store that calls `hook(what)` before each call to the one inside."""

    def __init__(self, store: Store, hook: Hook) -> None:
        self._store = store
        self._hook = hook
        self.url = store.url
        self.folder = store.folder

    def get(self, name: str, limit_bytes: int) -> bytes:
        self._hook(f"get {name}")
        return self._store.get(name, limit_bytes)

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        self._hook(f"get_range {name}")
        return self._store.get_range(name, offset_bytes, length_bytes)

    def size(self, name: str) -> int:
        self._hook(f"size {name}")
        return self._store.size(name)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        self._hook(f"list {prefix}")
        yield from list(self._store.list(prefix))

    def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
        self._hook(f"put_new {name}")
        return self._store.put_new(name, buffers)

    def delete(self, name: str) -> None:
        self._hook(f"delete {name}")
        self._store.delete(name)

    def settle(self, prefix: str) -> None:
        self._hook(f"settle {prefix}")
        self._store.settle(prefix)

    def sweep(self) -> int:
        self._hook("sweep")
        return self._store.sweep()


class AtCall:
    """Runs `action` once, before the n-th call; `done` says whether there was one."""

    def __init__(self, number: int, action: Callable[[], object]) -> None:
        self._left = number
        self._action = action
        self.done = False

    def __call__(self, what: str) -> None:
        del what
        self._left -= 1
        if self._left == 0:
            self.done = True
            self._action()


class AtFirst:
    """Runs `action` once, before the first call that begins so."""

    def __init__(self, beginning: str, action: Callable[[], object]) -> None:
        self._beginning = beginning
        self._action: Callable[[], object] | None = action

    def __call__(self, what: str) -> None:
        if self._action is not None and what.startswith(self._beginning):
            action, self._action = self._action, None
            action()


def read(repository: Repository, snapshot: str) -> bytes:
    reader = repository.open_snapshot(snapshot)
    buffer = bytearray(reader.size_bytes)
    reader.pread_into(buffer, 0)
    return bytes(buffer)


def check(store: Store, held: dict[str, bytes]) -> None:
    """Exactly these snapshots, whole, before and after a collection."""
    repository = Repository.open(store)
    for _ in range(2):
        verified = repository.verify()
        assert verified.ok, verified
        assert {snapshot.id for snapshot in repository.snapshots()} == held.keys()
        for snapshot, content in held.items():
            assert read(repository, snapshot) == content
        repository.collect()
    assert repository.sessions() == []


def take(repository: Repository, content: bytes, disk: str = "disk", **options: object) -> str:
    return repository.snapshot(Bytes(content), disk=disk, **options).snapshot.id  # type: ignore[arg-type]


def new(chunk_bytes: int = 4096) -> tuple[MemoryStore, Repository]:
    store = MemoryStore()
    return store, Repository.create(store, chunk_bytes=chunk_bytes)


@pytest.fixture(params=[4096, 16 << 10], ids=["chunks", "patches"])
def chunk_bytes(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


# Two at once, at every point where the one may interrupt the other.


def prepared(chunk_bytes: int) -> tuple[MemoryStore, dict[str, bytes], bytes]:
    """A repository with garbage that looks tempting: all that the next snapshot needs is there, and dead."""
    store, repository = new(chunk_bytes)
    base, coming = disk(1, 12), changed(disk(1, 12), 2, pages=8)
    held = {take(repository, base): base}
    gone = take(repository, coming)
    other = disk(3, 8)
    held[take(repository, other, "other")] = other
    repository.delete(gone)
    return store, held, coming


def test_a_collection_at_any_instant_of_a_create_harms_neither(chunk_bytes: int) -> None:
    number = 0
    while True:
        number += 1
        store, held, coming = prepared(chunk_bytes)
        hook = AtCall(number, lambda: attempt(Repository.open(store).collect))
        try:
            snapshot = take(Repository.open(HookedStore(store, hook)), coming)
        except BusyError:
            pass
        else:
            held[snapshot] = coming
        check(store, held)
        if not hook.done:
            break
    assert number > 10


def test_a_create_at_any_instant_of_a_collection_harms_neither(chunk_bytes: int) -> None:
    number = 0
    while True:
        number += 1
        store, held, coming = prepared(chunk_bytes)

        def create() -> None:
            snapshot = attempt(lambda: take(Repository.open(store), coming))
            if snapshot is not None:
                held[snapshot] = coming

        hook = AtCall(number, create)
        attempt(Repository.open(HookedStore(store, hook)).collect)
        check(store, held)
        if not hook.done:
            break
    assert number > 10


@pytest.mark.parametrize("same", ["disk", "other"])
def test_a_create_at_any_instant_of_a_create_harms_neither(same: str, chunk_bytes: int) -> None:
    number = 0
    while True:
        number += 1
        store, held, coming = prepared(chunk_bytes)

        def create() -> None:
            held[take(Repository.open(store), coming, same)] = coming

        hook = AtCall(number, create)
        held[take(Repository.open(HookedStore(store, hook)), coming)] = coming
        check(store, held)
        if not hook.done:
            break
    assert number > 10


def test_a_deletion_and_a_collection_at_any_instant_of_a_create_harm_neither(chunk_bytes: int) -> None:
    """The snapshot that is deleted is the parent of the one under way."""
    number = 0
    while True:
        number += 1
        store, held, coming = prepared(chunk_bytes)
        parent = Repository.open(store).snapshots("disk")[-1].id

        def delete() -> None:
            repository = Repository.open(store)
            repository.delete(parent)
            del held[parent]
            attempt(repository.collect)

        hook = AtCall(number, delete)
        try:
            snapshot = take(Repository.open(HookedStore(store, hook)), coming)
        except BusyError:
            pass
        else:
            held[snapshot] = coming
        check(store, held)
        if not hook.done:
            break
    assert number > 10


def test_a_rebuild_at_any_instant_of_a_create_harms_neither(chunk_bytes: int) -> None:
    number = 0
    while True:
        number += 1
        store, held, coming = prepared(chunk_bytes)
        hook = AtCall(number, lambda: attempt(Repository.open(store).rebuild_index))
        snapshot = attempt(lambda: take(Repository.open(HookedStore(store, hook)), coming))
        if snapshot is not None:
            held[snapshot] = coming
        check(store, held)
        if not hook.done:
            break
    assert number > 10


def attempt(work: Callable[[], object]) -> str | None:
    """What it returned as text; None when somebody else was at it."""
    try:
        return str(work())
    except BusyError:
        return None


def test_many_creates_at_once_are_all_right(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "repository"))
    repository = Repository.create(store, chunk_bytes=4096)
    contents = {f"disk {number % 3}": [] for number in range(3)}
    jobs = [(f"disk {number % 3}", changed(disk(1, 40), number)) for number in range(12)]

    def run(job: tuple[str, bytes]) -> tuple[str, bytes]:
        return take(Repository.open(str(tmp_path / "repository")), job[1], job[0]), job[1]

    with ThreadPoolExecutor(6) as threads:
        held = dict(threads.map(run, jobs))
    assert len(contents) == len({manifest.disk for manifest in repository.snapshots()})
    check(store, held)


# Sessions that others end.


def test_a_writer_whose_session_was_ended_goes_on_wherever_it_was(chunk_bytes: int) -> None:
    """And a collection runs right after, so that all that it stored or counted on may be gone."""
    number = fenced = 0
    while True:
        number += 1
        store, held, coming = prepared(chunk_bytes)

        def end() -> None:
            repository = Repository.open(store)
            for found in repository.sessions():
                repository.end_session(found.id)
            repository.collect()

        hook = AtCall(number, end)
        held[take(Repository.open(HookedStore(store, hook)), coming)] = coming
        fenced += len(list(store.list("snapshots/"))) - len(held)
        check_found(store, held)
        # What it left behind does not deceive the next one.
        held[take(Repository.open(store), coming)] = coming
        check(store, held)
        if not hook.done:
            break
    assert fenced > 10


def test_a_writer_that_is_ended_again_and_again_says_so_and_leaves_nothing_visible() -> None:
    store, repository = new()

    def end(what: str) -> None:
        if what.startswith("put_new snapshots/"):
            for found in repository.sessions():
                repository.end_session(found.id)

    with pytest.raises(FencedError, match="take the snapshot again"):
        take(Repository.open(HookedStore(store, end)), disk(1, 12))
    assert repository.snapshots() == []
    check(store, {})


def check_found(store: Store, held: dict[str, bytes]) -> None:
    repository = Repository.open(store)
    assert {snapshot.id for snapshot in repository.snapshots()} == held.keys()
    verified = repository.verify()
    assert verified.ok, verified


def test_a_writer_that_was_ended_cannot_deceive_the_next_with_its_late_index() -> None:
    store, repository = new()
    content = disk(1, 12)

    def end() -> None:
        for found in repository.sessions():
            repository.end_session(found.id)
        assert repository.collect().removed_packs > 0

    own = session.register(store, session.CREATE)
    first = take(Repository.open(HookedStore(store, AtFirst("put_new index/", end))), content)
    named = {pack_id for contents in index.Index.load(store).tables() for pack_id in contents.packs}
    assert named - pack.sizes(store).keys(), "the late index object is there, and its packs are not"
    assert repository.verify().ok
    repository.delete(first)
    session.withdraw(store, own)
    check(store, {take(repository, content, "other"): content})


def test_a_tombstone_cannot_be_deleted() -> None:
    store, repository = new()
    names: list[str] = []

    def end() -> None:
        (found,) = repository.sessions()
        assert found.manifest is not None
        names.append(found.manifest)
        repository.end_session(found.id)
        with pytest.raises(NotFoundError):
            repository.delete(found.manifest[-32:])

    taken = take(Repository.open(HookedStore(store, AtFirst("put_new index/", end))), disk(1, 12))
    assert [item.id for item in repository.snapshots()] == [taken] and taken != names[0][-32:]
    with pytest.raises(NotFoundError):
        repository.delete(names[0][-32:])


def test_a_session_that_was_ended_after_the_commit_leaves_the_snapshot() -> None:
    store, repository = new()
    content = disk(1, 12)

    def end() -> None:
        for found in repository.sessions():
            repository.end_session(found.id)

    snapshot = take(Repository.open(HookedStore(store, AtFirst("delete sessions/", end))), content)
    check(store, {snapshot: content})


def test_a_collection_says_whom_it_waits_for_and_the_next_one_goes_on() -> None:
    store, repository = new()
    repository.delete(take(repository, disk(1, 12)))
    own = session.register(store, session.CREATE)
    first = repository.collect()
    assert (first.removed_packs, [found.id for found in first.waiting_for]) == (0, [own.id])
    assert first.condemned_packs == len(pack.sizes(store)) > 0 and first.condemned_bytes > 0
    assert repository.collect(wait_s=0.01).waiting_for == first.waiting_for
    session.withdraw(store, own)
    done = repository.collect()
    assert done.removed_packs == first.condemned_packs and done.waiting_for == ()
    assert pack.sizes(store) == {}


def test_who_has_been_at_work_for_longer_than_patience_allows_is_fenced() -> None:
    store, repository = new()
    repository.delete(take(repository, disk(1, 12)))
    own = session.register(store, session.CREATE, "snapshots/0123456789abcdef/00000001-" + "ab" * 16)
    assert repository.collect(patience_s=0.0).waiting_for == ()
    assert pack.sizes(store) == {} and repository.sessions() == []
    assert own.manifest in dict(store.list("snapshots/"))


def test_a_writer_that_began_after_what_was_condemned_is_not_waited_for() -> None:
    store, repository = new()
    repository.delete(take(repository, disk(1, 12)))
    old = session.register(store, session.CREATE)
    repository.collect()
    seen = generations.latest_number(store, PLAIN)
    new_one = session.register(store, session.CREATE, generation=seen)
    session.withdraw(store, old)
    assert repository.collect().removed_packs > 0
    assert [found.id for found in repository.sessions()] == [new_one.id]


def test_a_session_of_an_earlier_boot_of_this_machine_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut kills the process, and after it the boot is another one."""
    store, repository = new()
    monkeypatch.setattr(session, "_machine", lambda: "0123456789abcdef0123456789abcdef")
    session.register(store, session.CREATE)
    monkeypatch.setattr(session, "_kernel", lambda: "another-boot pid:[1]")
    repository.collect()
    assert repository.sessions() == []


def test_a_collector_that_is_killed_is_gone_on_from(chunk_bytes: int) -> None:
    """At any call of it; then another one, and a create in between."""
    number = 0
    while True:
        number += 1
        store, held, coming = prepared(chunk_bytes)

        def die() -> None:
            raise KeyboardInterrupt

        hook = AtCall(number, die)
        with contextlib.suppress(KeyboardInterrupt):
            Repository.open(HookedStore(store, hook)).collect()
        if number % 2:
            held[take(Repository.open(store), coming)] = coming
        check(store, held)
        if not hook.done:
            break
    assert number > 20


def test_a_collector_that_was_overtaken_at_any_call_harms_nobody(chunk_bytes: int) -> None:
    """Another one runs through, a snapshot is taken, and another one again; then the slow one goes on."""
    number = 0
    while True:
        number += 1
        store, held, coming = prepared(chunk_bytes)

        def overtake() -> None:
            repository = Repository.open(store)
            repository.collect()
            held[take(repository, coming)] = coming
            gone = take(repository, disk(5, 8), "passing")
            repository.collect()
            repository.delete(gone)
            repository.collect()

        hook = AtCall(number, overtake)
        Repository.open(HookedStore(store, hook)).collect()
        check(store, held)
        if not hook.done:
            break
    assert number > 20


def test_a_snapshot_whose_parent_was_committed_late_and_deleted_early_is_whole(chunk_bytes: int) -> None:
    """Garbage is condemned, a writer from before revives it, another one begins from there; then that is deleted."""
    store, held, coming = prepared(chunk_bytes)
    repository = Repository.open(store)
    late: list[str] = []

    def condemn() -> None:
        assert repository.collect().waiting_for
        assert generations.latest(store, PLAIN).condemned

    late.append(take(Repository.open(HookedStore(store, AtFirst("put_new snapshots/", condemn))), coming))

    def delete() -> None:
        repository.delete(late[0])
        repository.collect()

    final = changed(coming, 7, pages=2)
    held[take(Repository.open(HookedStore(store, AtFirst("put_new snapshots/", delete))), final)] = final
    check(store, held)


@pytest.mark.parametrize("resident", [0, 1 << 19])
def test_a_collection_at_any_instant_of_a_verification_is_no_damage(
    chunk_bytes: int, resident: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "RESIDENT_ENTRIES", resident)
    number = 0
    while True:
        number += 1
        store, repository = new(chunk_bytes)
        data = disk(1, 12)
        gone = take(repository, data)
        held = changed(data, 2, pages=3)
        kept = take(repository, held)

        def clean() -> None:
            repository.delete(gone)
            repository.collect()

        hook = AtCall(number, clean)
        with ThreadPoolExecutor(1) as hands:
            verified = Repository.open(HookedStore(store, hook)).verify(executor=hands)
        assert verified.ok, (number, verified)
        assert list(store.list(damage.PREFIX)) == []
        if not hook.done:
            break
        assert read(repository, kept) == held


def test_damage_is_not_marked_while_collections_never_end() -> None:
    store, repository = new()
    take(repository, disk(1, 8))
    name, size_bytes = next(iter(store.list("packs/")))
    data = bytearray(store.get(name, size_bytes))
    data[200] ^= 1
    store.delete(name)
    store.put_new(name, [data])

    going = [f"packs/{number:032x}" for number in range(1, 20)]
    for other in going:
        store.put_new(other, [data])

    def replace(what: str) -> None:
        if what == f"get {name}" and going:
            store.delete(going.pop())

    with pytest.raises(BusyError, match="a collection is at work"):
        Repository.open(HookedStore(store, replace)).verify()
    assert list(store.list(damage.PREFIX)) == []
    verified = repository.verify()
    assert not verified.ok and verified.marked > 0


def test_a_new_index_says_nothing_of_packs_that_are_not_there() -> None:
    store, repository = new()
    first = take(repository, disk(1, 4))
    take(repository, disk(2, 4))
    (known,) = index.Index.load(store).tables()
    rows = known.entries.copy()
    rows["pack"] = 0
    index.write(store, Table((b"x" * 16,), rows, known.bases))
    assert b"x" * 16 in index.Index.load(store).packs()
    repository.delete(first)
    repository.collect()
    assert index.Index.load(store).packs() == pack.sizes(store).keys()


@pytest.mark.parametrize("nodes_known", [False, True])
def test_whoever_reads_by_a_paged_index_reads_on_when_a_collection_replaces_it(
    nodes_known: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index, "RESIDENT_ENTRIES", 0)
    monkeypatch.setattr(index, "_PAGES_KEPT", 0)
    store, repository = new()
    data = disk(1, 16)
    first = take(repository, disk(3, 8) + data[: 8 * 4096])
    second = take(repository, data)
    reader = repository.open_snapshot(second)
    if nodes_known:
        reader.pread_into(bytearray(4096), 0)
    repository.delete(first)
    old = {name for name, _ in store.list("index/")}
    repository.collect()
    assert not old & {name for name, _ in store.list("index/")}
    buffer = bytearray(len(data))
    reader.pread_into(buffer, 0)
    assert bytes(buffer) == data


@pytest.mark.parametrize("unlike", ["_machine", "space", "none"])
def test_a_session_that_may_live_is_not_ended(unlike: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine of this name, in another process space of this boot, or where neither can be told."""
    store, repository = new()
    monkeypatch.setattr(session, "_machine", lambda: "" if unlike == "none" else "one")
    monkeypatch.setattr(session, "_kernel", lambda: "this-boot pid:[1]")
    session.register(store, session.CREATE)
    if unlike == "_machine":
        monkeypatch.setattr(session, "_machine", lambda: "two")
    monkeypatch.setattr(session, "_kernel", lambda: "this-boot pid:[2]" if unlike == "space" else "next-boot pid:[1]")
    repository.collect()
    assert len(repository.sessions()) == 1


@pytest.mark.parametrize("signal", ["reaches", "is forbidden"])
def test_a_process_that_proc_hides_is_not_taken_for_dead(signal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, repository = new()
    own = session.register(store, session.CREATE)
    monkeypatch.setattr(session, "_started", lambda process: None)

    def kill(process: int, number: int) -> None:
        assert (process, number) == (own.process, 0)
        if signal == "is forbidden":
            raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(os, "getpid", lambda: own.process + 1)
    repository.collect()
    assert [found.id for found in repository.sessions()] == [own.id]

    def gone(process: int, number: int) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", gone)
    repository.collect()
    assert repository.sessions() == []


@pytest.mark.parametrize("name", [32 * "a", "rubbish"])
def test_a_damaged_session_is_named_with_the_command_that_removes_it(name: str) -> None:
    store, repository = new()
    held = {take(repository, disk(1, 4)): disk(1, 4)}
    store.put_new(f"sessions/{name}", [b"no session"])
    for work in (repository.collect, lambda: take(repository, disk(2, 4))):
        with pytest.raises(DamagedError, match=f"snapcore repo sessions {store.url} --end {name}`"):
            work()
    assert repository.end_session(name) == name
    check(store, held)


def test_of_what_an_interrupted_writer_stored_few_packs_are_not_found_though_nobody_knows_whether_it_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It writes an index object now and then; what it has not named is taken up on its own host only."""
    store, repository = new()
    uploaded = 0

    def die(what: str) -> None:
        nonlocal uploaded
        uploaded += what.startswith("put_new packs/")
        if uploaded > 20:
            raise StoreError("no more")

    content = random.Random(1).randbytes(120 * 4096)
    with pytest.raises(StoreError):
        take(Repository.open(HookedStore(store, die)), content)
    monkeypatch.setattr(session, "is_gone", lambda found: False)
    before = pack.sizes(store).keys()
    hooked = HookedStore(store, lambda what: None)
    listed: list[str] = []
    hooked._hook = listed.append
    snapshot = take(Repository.open(hooked), content)
    assert "list packs/" not in listed
    named = index.Index.load(store).packs()
    assert len(before - named) <= 8 < len(before & named)
    monkeypatch.undo()
    for left in repository.sessions():
        repository.end_session(left.id)
    check(store, {snapshot: content})


def test_a_session_that_could_not_be_written_blocks_nobody() -> None:
    """The name may be there all the same: a store may fail after it has published."""
    store, repository = new()

    class Failing(HookedStore):
        def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
            super().put_new(name, buffers)
            raise StoreError("the answer was lost")

    with pytest.raises(StoreError):
        take(Repository.open(Failing(store, lambda what: None)), disk(1, 4))
    assert len(repository.sessions()) == 1
    repository.collect()
    assert repository.sessions() == []


def test_housekeeping_that_fails_after_the_commit_does_not_fail_the_snapshot() -> None:
    store, _ = new()

    def fail() -> None:
        raise StoreError("no more")

    content = disk(1, 12)
    snapshot = take(Repository.open(HookedStore(store, AtFirst("delete sessions/", fail))), content)
    check(store, {snapshot: content})


# Work that stops: by the caller, or by a store that fails.


@pytest.mark.parametrize("error", [CancelledError, KeyboardInterrupt])
def test_a_create_that_is_cancelled_at_any_call_leaves_nothing_visible(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snapcore.repository.create.SPAN_BYTES", 32 << 10)
    content = disk(1, 64)
    number = 0
    stopped = True
    while stopped:
        number += 1
        store, repository = new()
        base = disk(9, 8)
        held = {take(repository, base): base}
        stopped = False

        def stop() -> None:
            nonlocal stopped
            stopped = True
            raise error

        at = AtCall(number, stop)
        with contextlib.suppress(error):
            held[take(repository, content, progress=lambda step: at(step.stage))] = content
        assert repository.sessions() == []
        assert len(repository.snapshots()) == len(held)
        if stopped:
            held[take(repository, content)] = content
        check(store, held)
    assert number > 5


def test_a_collection_that_is_cancelled_at_any_call_loses_nothing(chunk_bytes: int) -> None:
    number = 0
    stopped = True
    while stopped:
        number += 1
        store, held, _ = prepared(chunk_bytes)
        stopped = False

        def stop() -> None:
            nonlocal stopped
            stopped = True
            raise CancelledError

        at = AtCall(number, stop)
        with contextlib.suppress(CancelledError):
            Repository.open(store).collect(progress=lambda step: at(step.stage))
        check(store, held)
    assert number > 1


@pytest.mark.parametrize("work", ["create", "collect", "rebuild"])
def test_a_store_that_fails_at_any_call_loses_nothing(work: str, chunk_bytes: int) -> None:
    number = 0
    while True:
        number += 1
        store, held, coming = prepared(chunk_bytes)

        def fail() -> None:
            raise StoreError("the store failed")

        hook = AtCall(number, fail)
        repository = Repository.open(store)
        hooked = HookedStore(store, lambda what: None)
        victim = Repository.open(hooked)
        hooked._hook = hook
        try:
            if work == "create":
                held[take(victim, coming)] = coming
            elif work == "collect":
                victim.collect()
            else:
                victim.rebuild_index()
        except Error:
            pass
        found = {snapshot.id for snapshot in repository.snapshots()}
        assert held.keys() <= found
        for unacknowledged in found - held.keys():
            assert read(repository, unacknowledged) == coming
            held[unacknowledged] = coming
        held[take(repository, coming)] = coming
        check(store, held)
        if not hook.done:
            break
    assert number > 10


# What one record may stand for.


def test_what_two_writers_stored_full_and_as_a_patch_can_be_the_base_of_a_third(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever copy the index finds first: a collection moves the full one to a pack of another name."""
    monkeypatch.setattr(pack, "PACK_BYTES", 16 << 20)
    for seed in range(8):
        store, repository = new(16 << 10)
        old = disk(1, 96)
        coming = changed(old, seed, pages=16)
        held = {take(repository, old, "patched"): old}

        def patched() -> None:
            held[take(Repository.open(store), coming, "patched")] = coming

        # "full" has nothing to compare with: it stores all of `coming` that is not there yet full.
        full = take(Repository.open(HookedStore(store, AtFirst("put_new packs/", patched))), coming, "full")
        third = changed(coming, seed, pages=16)
        third = third[: 48 * 4096] + disk(seed + 99, 48)
        held[take(repository, third, "full")] = third
        repository.delete(full)
        check(store, held)


def test_a_dead_patch_whose_base_was_collected_is_not_taken_for_the_chunk() -> None:
    """A pack is kept for what lives in it, and holds dead patches too."""
    for seed in range(8):
        store, repository = new(16 << 10)
        base = disk(1, 48)
        first = take(repository, base)
        patched = changed(base, seed, pages=6)
        second = take(repository, patched)
        lives = patched[: 24 * 4096] + disk(7 + seed, 24)
        held = {take(repository, lives): lives}
        repository.delete(first)
        repository.delete(second)
        repository.collect()
        fresh = take(repository, patched, "fresh")
        held[fresh] = patched
        check(store, held)


# What a process may have open, or have seen.


def test_a_parent_that_is_deleted_by_another_process_is_noticed(tmp_path: Path) -> None:
    """Its manifest was read a moment ago, and its file may still be open."""
    place = str(tmp_path / "repository")
    Repository.create(place, chunk_bytes=4096)
    store = LocalStore(place)
    content = disk(1, 300)
    first = take(Repository.open(store), content)

    def delete() -> None:
        elsewhere = Repository.open(place)
        elsewhere.delete(first)
        elsewhere.collect()

    second = take(Repository.open(HookedStore(store, AtFirst("put_new sessions/", delete))), content)
    check(LocalStore(place), {second: content})


def test_what_was_deleted_by_another_process_is_gone_here_too(tmp_path: Path) -> None:
    place = str(tmp_path / "repository")
    repository = Repository.create(place, chunk_bytes=4096)
    snapshot = take(repository, disk(1, 4))
    assert repository.find(snapshot).id == snapshot
    Repository.open(place).delete(snapshot)
    assert repository.snapshots() == []


def test_a_create_makes_what_it_relies_on_durable_before_its_commit(tmp_path: Path) -> None:
    """Another process may have died between a name and the sync of its folder."""
    done: list[str] = []

    class Watched(Medium):
        def sync_folder(self, path: str) -> None:
            done.append(f"sync {os.path.relpath(path, place)}")
            super().sync_folder(path)

        def link(self, source: str, target: str) -> None:
            done.append(f"link {os.path.relpath(target, place)}")
            super().link(source, target)

    place = str(tmp_path / "repository")
    take(Repository.create(place, chunk_bytes=4096), disk(1, 8), "one")
    take(Repository.open(LocalStore(place, medium=Watched())), disk(1, 8), "two")
    commit = next(number for number, what in enumerate(done) if what.startswith("link snapshots/"))
    assert {"sync packs", "sync index", "sync .", "sync snapshots"} <= set(done[:commit])


def test_a_collection_makes_deletions_durable_before_it_removes_packs(tmp_path: Path) -> None:
    done: list[str] = []

    class Watched(Medium):
        def sync_folder(self, path: str) -> None:
            done.append(f"sync {os.path.relpath(path, place)}")
            super().sync_folder(path)

        def unlink(self, path: str) -> None:
            done.append(f"unlink {os.path.relpath(path, place)}")
            super().unlink(path)

    place = str(tmp_path / "repository")
    repository = Repository.create(place, chunk_bytes=4096)
    repository.delete(take(repository, disk(1, 8)))
    (folder,) = os.listdir(os.path.join(place, "snapshots"))
    Repository.open(LocalStore(place, medium=Watched())).collect()
    removal = next(number for number, what in enumerate(done) if what.startswith("unlink packs/"))
    assert {f"sync snapshots/{folder}", "sync index"} <= set(done[:removal])


# Fingerprints of this host.


def test_two_creates_of_one_disk_do_not_read_each_others_fingerprints(tmp_path: Path) -> None:
    """One edits the file in place; the other one opened it before and compares with the parent still."""
    store, repository = new()
    content = disk(1, 16)
    take(repository, content)
    after = content[:8192] + b"new!" + content[8196:]
    held: dict[str, bytes] = {}

    def edit() -> None:
        held[take(Repository.open(store), after, changed=[(8192, 4)])] = after

    fired = False

    def once() -> None:
        nonlocal fired
        if not fired:
            fired = True
            edit()

    parent = repository.snapshots()[0]
    held[parent.id] = content
    created = repository.snapshot(Bytes(after, once), disk="disk", parent=parent)
    held[created.snapshot.id] = after
    check(store, held)


def test_a_restore_does_not_take_over_what_another_one_has_just_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = new()[1]
    first, second = disk(1, 8), disk(2, 4)
    one, two = take(repository, first), take(repository, second)
    target = tmp_path / "target"
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        repository.restore(one, target)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BusyError, match="start the restore again"):
        repository.restore(two, target)
    assert target.read_bytes() == first


def test_whoever_reads_while_a_collection_moves_records_reads_on(tmp_path: Path) -> None:
    store = MemoryStore()
    repository = Repository.create(store, chunk_bytes=4096)
    image = tmp_path / "disk.img"
    contents = []
    for generation in range(3):
        contents.append(random.Random(generation).randbytes(16 * 4096))
        if generation:
            contents[-1] = contents[0][: 8 * 4096] + contents[-1][8 * 4096 :]
        image.write_bytes(contents[-1])
        repository.snapshot(image, disk="d", label=f"generation {generation}")
    reader = repository.open_snapshot("generation 2")
    buffer = bytearray(8 * 4096)
    assert reader.pread_into(buffer, 8 * 4096) == len(buffer)
    packs = {name for name, _ in store.list("packs/")}
    repository.delete("generation 0")
    repository.collect()
    assert packs - {name for name, _ in store.list("packs/")}
    whole = bytearray(len(contents[2]))
    reader.pread_into(whole, 0)
    assert bytes(whole) == contents[2]
