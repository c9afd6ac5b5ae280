"""A snapshot that somebody needs is not deleted by mistake, whoever comes first and whatever crashes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import (
    BusyError,
    Error,
    KeyFile,
    LockedError,
    MemoryStore,
    NotFoundError,
    RefusedError,
    Repository,
    StoreError,
    UsageError,
)
from snapcore.persist import Buffer

WHO = "the pool /srv/pool on host"
ID = "ab" * 16


class Stepped(MemoryStore):
    """A store in memory that asks before each call."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[], None] = lambda: None

    def get(self, name: str, limit_bytes: int) -> bytes:
        self.before()
        return super().get(name, limit_bytes)

    def size(self, name: str) -> int:
        self.before()
        return super().size(name)

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        self.before()
        return iter([*super().list(prefix, after)])

    def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
        self.before()
        return super().put_new(name, buffers)

    def delete(self, name: str) -> None:
        self.before()
        super().delete(name)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pins") / "disk.img"
    made.write_bytes(bytes(range(256)) * 1024)
    return made


def filled(image: Path) -> tuple[Stepped, Repository, str]:
    """A repository with one snapshot."""
    store = Stepped()
    repository = Repository.create(store)
    return store, repository, repository.snapshot(image, disk="web").snapshot.id


def test_a_pinned_snapshot_is_deleted_only_when_forced_and_who_needs_it_is_told(image: Path) -> None:
    store, repository, snapshot = filled(image)
    pin = repository.pin(snapshot[:8], WHO)
    with pytest.raises(RefusedError, match=f"needed by {WHO}.*{pin.id}.*snapcore pin remove.*--force"):
        repository.delete(snapshot)
    assert [item.id for item in repository.snapshots()] == [snapshot]
    repository.collect()
    assert repository.open_snapshot(snapshot).read() == image.read_bytes()
    assert repository.pins() == repository.pins(snapshot) == [pin]
    assert repository.delete(snapshot, force=True) == snapshot
    assert repository.snapshots() == [] and [*store.list("pins/")] == []
    repository.unpin(snapshot, pin.id)


def test_a_pin_is_made_once_under_its_id_and_goes_when_it_is_taken_back(image: Path) -> None:
    _, repository, snapshot = filled(image)
    for _ in range(2):
        repository.pin(snapshot, WHO, pin_id=ID)
    other = repository.pin(snapshot, "somebody else")
    assert len(repository.pins()) == 2
    repository.unpin(snapshot, ID)
    with pytest.raises(RefusedError, match="somebody else"):
        repository.delete(snapshot)
    assert repository.remove_pin(other.id[:6]) == other.id
    repository.delete(snapshot)
    with pytest.raises(NotFoundError):
        repository.pin(snapshot, WHO)
    with pytest.raises(NotFoundError):
        repository.remove_pin(other.id)


def test_what_is_no_pin_is_refused(image: Path) -> None:
    _, repository, snapshot = filled(image)
    for who, pin_id in (("", None), ("a\nb", None), ("x" * 2000, None), (WHO, "../..")):
        with pytest.raises(UsageError):
            repository.pin(snapshot, who, pin_id=pin_id)
    assert repository.pins() == []


def test_pins_of_sealed_snapshots_are_sealed_and_hold_without_the_key(image: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    repository = Repository.create(store)
    holder = KeyFile.create(tmp_path / "key")
    repository.keyring.create("k", holder)
    snapshot = repository.snapshot(image, disk="web", key="k").snapshot.id
    pin = repository.pin(snapshot, WHO)
    assert WHO.encode() not in store.get(pin.name, 10000)
    assert repository.pins() == [pin]
    locked = Repository.open(store)
    assert [(item.id, item.who) for item in locked.pins()] == [(pin.id, "")]
    with pytest.raises(LockedError):
        locked.delete(snapshot, force=True)
    with pytest.raises(RefusedError):
        repository.delete(snapshot)


def test_a_pin_that_is_damaged_holds_and_can_be_removed(image: Path) -> None:
    store, repository, snapshot = filled(image)
    pin = repository.pin(snapshot, WHO)
    data = bytearray(store.get(pin.name, 10000))
    data[80] ^= 1
    store.delete(pin.name)
    store.put_new(pin.name, [bytes(data)])
    with pytest.raises(RefusedError, match="cannot be read"):
        repository.delete(snapshot)
    repository.remove_pin(pin.id)
    repository.delete(snapshot)


@given(st.lists(st.booleans(), max_size=40))
def test_of_a_pin_and_a_deletion_at_once_never_both_succeed(image: Path, turns: list[bool]) -> None:
    store, repository, snapshot = filled(image)
    gates = {"pin": threading.Semaphore(0), "delete": threading.Semaphore(0)}
    arrived = {"pin": threading.Semaphore(0), "delete": threading.Semaphore(0)}
    done: dict[str, object] = {}

    def work(name: str, doing: Callable[[], object]) -> None:
        try:
            done[name] = doing()
        except Error as error:
            done[name] = error
        arrived[name].release()

    def before() -> None:
        name = threading.current_thread().name
        if name in gates:
            arrived[name].release()
            gates[name].acquire()

    store.before = before
    doings = {"pin": lambda: repository.pin(snapshot, WHO), "delete": lambda: repository.delete(snapshot)}
    threads = [threading.Thread(target=work, args=item, name=item[0]) for item in doings.items()]
    for thread in threads:
        thread.start()
        arrived[thread.name].acquire()
    for turn in [*turns, *[True] * 60, *[False] * 60]:
        name = "pin" if turn else "delete"
        if name not in done:
            gates[name].release()
            arrived[name].acquire()
    for thread in threads:
        thread.join()
    store.before = lambda: None
    pinned, deleted = done["pin"], done["delete"]
    there = [item.id for item in repository.snapshots()]
    assert isinstance(pinned, (BusyError, NotFoundError)) or isinstance(deleted, RefusedError)
    assert there == ([snapshot] if isinstance(deleted, Error) else [])
    assert repository.pins() == ([] if isinstance(pinned, Error) else [pinned])


@pytest.mark.parametrize("doing", ["pin", "unpin", "delete", "forced"])
def test_a_crash_at_any_step_leaves_what_can_be_told_and_tidied(image: Path, doing: str) -> None:
    ended = False
    step = 0
    while not ended:
        store, repository, snapshot = filled(image)
        if doing in ("unpin", "forced"):
            repository.pin(snapshot, WHO, pin_id=ID)
        left = step

        def before() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise StoreError("the process is gone")

        store.before = before
        with contextlib.suppress(StoreError):
            if doing == "pin":
                repository.pin(snapshot, WHO, pin_id=ID)
            elif doing == "unpin":
                repository.unpin(snapshot, ID)
            else:
                repository.delete(snapshot, force=doing == "forced")
            ended = True
        store.before = lambda: None
        again = Repository.open(store)
        there = [item.id for item in again.snapshots()]
        assert there == [snapshot] or doing in ("delete", "forced")
        for left_over in again.pins():
            assert left_over.deletes or doing != "delete"
            if left_over.deletes and there:
                with pytest.raises(BusyError, match="being deleted"):
                    again.pin(snapshot, "another")
            elif not left_over.deletes:
                again.remove_pin(left_over.id)
        if there:
            again.delete(snapshot)
            assert again.pins() == []
        again.collect()
        step += 1
    assert step > (1 if doing == "unpin" else 4)
