"""Ten thousand snapshots cost names, and the work on one more costs what it costs with ten."""

from __future__ import annotations

import os

import pytest

from snapcore import Repository
from snapcore.repository import index, manifest, summaries
from snapcore.repository.domain import PLAIN
from snapcore.repository.envelope import Kind
from snapcore.store import MemoryStore
from tests.support.counting import CountingStore
from tests.support.disks import changed, disk
from tests.support.forge import with_members
from tests.support.small import Bytes

COUNT = 10_000
DISKS = 100


def crowded(count: int) -> tuple[CountingStore, bytes]:
    """A repository with so many snapshots of one content, on a hundred disks, and one of a disk of its own."""
    store = MemoryStore()
    repository = Repository.create(store, chunk_bytes=4096)
    content = disk(1, 16)
    first = repository.snapshot(Bytes(content), disk="disk").snapshot
    (name,) = [name for name, _ in store.list("snapshots/")]
    data = store.get(name, 1 << 20)
    for number in range(count - 1):
        snapshot_id, name_of_disk, sequence = os.urandom(16).hex(), f"disk {number % DISKS}", number // DISKS + 1
        head = data[:40] + bytes.fromhex(snapshot_id) + data[56:]
        made = with_members(head, id=snapshot_id, disk=name_of_disk, sequence=sequence)
        store.put_new(manifest.name(PLAIN, name_of_disk, sequence, snapshot_id), [made])
    assert first.id
    return CountingStore(store), content


@pytest.fixture(scope="module")
def many() -> tuple[CountingStore, bytes]:
    return crowded(COUNT)


def calls_of_an_addition(store: CountingStore, content: bytes) -> dict[str, int]:
    repository = Repository.open(store)
    store.reset()
    repository.snapshot(Bytes(content), disk="disk")
    return {method: store.total(method) for method in ("list", "get", "get_range", "put_new", "delete", "size")}


def test_one_more_snapshot_costs_what_it_costs_with_ten(many: tuple[CountingStore, bytes]) -> None:
    store, content = many
    few, _ = crowded(10)
    after = changed(content, 2)
    calls, calls_with_few = calls_of_an_addition(store, after), calls_of_an_addition(few, after)
    # Two threads that want the same node at once may both read it.
    assert abs(calls.pop("get_range") - calls_with_few.pop("get_range")) <= 2
    assert calls == calls_with_few
    assert sum(calls_of_an_addition(store, changed(after, 3)).values()) <= 40
    assert not any(kind == "packs" for method, kind in store.calls if method == "list")


def test_a_list_costs_names_and_a_few_objects_once_they_are_summarised(many: tuple[CountingStore, bytes]) -> None:
    store, _ = many
    repository = Repository.open(store)
    assert summaries.refresh(store) and not summaries.refresh(store)
    store.reset()
    listed = repository.snapshots()
    assert len(listed) >= COUNT
    assert store.total("get") <= 2 and store.total("list") <= COUNT // 1000 + 3
    wanted = listed[COUNT // 2]
    store.reset()
    assert repository.find(wanted.id[:12]) == wanted
    assert store.total("get") == 1


def test_what_is_deleted_is_not_listed_though_a_summary_holds_it() -> None:
    store, _ = crowded(40)
    repository = Repository.open(store)
    assert summaries.refresh(store)
    gone = repository.snapshots()[7]
    repository.delete(gone)
    assert gone.id not in {item.id for item in repository.snapshots()}
    # Its writer died before it ended its session, which somebody ends now.
    manifest.write_tombstone(store, manifest.name(PLAIN, gone.disk, gone.sequence, gone.id))
    assert gone.id not in {item.id for item in repository.snapshots()}


@pytest.mark.parametrize("at", [0, 70, 200, -1])
def test_a_damaged_summary_is_as_good_as_none(at: int) -> None:
    store, _ = crowded(40)
    repository = Repository.open(store)
    before = repository.snapshots()
    summaries.refresh(store)
    ((name, size_bytes),) = store.list("summaries/")
    data = bytearray(store.get(name, size_bytes))
    assert data[8] == Kind.SUMMARY
    data[at] ^= 1
    store.delete(name)
    store.put_new(name, [data])
    assert repository.snapshots() == before
    assert summaries.refresh(store)
    assert repository.snapshots() == before and name not in dict(store.list("summaries/"))


def test_the_index_stays_small_without_a_collector() -> None:
    store = CountingStore(MemoryStore())
    repository = Repository.create(store, chunk_bytes=4096)
    content = disk(1, 32)
    held = {}
    for number in range(120):
        content = changed(content, number, pages=2)
        held[repository.snapshot(Bytes(content), disk="disk").snapshot.id] = content
    assert len(list(store.list("index/"))) <= index.MERGE_ABOVE + 2
    # The chain is summarised now and then.
    assert len(list(store.list("summaries/"))) == 1
    assert repository.verify().ok
    repository.collect()
    for snapshot, expected in list(held.items())[::17]:
        buffer = bytearray(len(expected))
        repository.open_snapshot(snapshot).pread_into(buffer, 0)
        assert bytes(buffer) == expected
