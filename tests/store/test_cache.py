"""The cache gives the answers of the store, costs fewer requests, and is never believed when it is damaged."""

from __future__ import annotations

import os
import random
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import Repository
from snapcore.errors import DamagedError, NotFoundError, UsageError
from snapcore.store import CacheStore, MemoryStore, with_cache
from tests.support.counting import CountingStore
from tests.support.small import Bytes, restored

REPOSITORY = "ab" * 16
WINDOW = 64 << 10
PACK = random.Random(1).randbytes(5 * WINDOW + 1000)


def cached(store: CountingStore | MemoryStore, folder: Path, limit: int = 64 << 20) -> CacheStore:
    return CacheStore(store, REPOSITORY, str(folder), limit)


def filled() -> CountingStore:
    """A store with a pack and an index object."""
    store = MemoryStore()
    store.put_new("packs/a", [PACK])
    store.put_new("index/a", [PACK[:1000]])
    store.put_new("sessions/a", [b"session"])
    return CountingStore(store)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@given(st.lists(st.tuples(st.integers(0, len(PACK) + 10), st.integers(0, 3 * WINDOW)), max_size=20))
def test_a_range_is_that_of_the_store_whatever_was_read_before(
    tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]]
) -> None:
    store = cached(filled(), tmp_path_factory.mktemp("cache"))
    for offset, length in ranges:
        if offset + length <= len(PACK):
            assert store.get_range("packs/a", offset, length) == PACK[offset : offset + length]
        else:
            with pytest.raises(DamagedError, match="packs/a ends"):
                store.get_range("packs/a", offset, length)


def test_what_is_read_again_costs_no_request_in_this_process_or_another(tmp_path: Path) -> None:
    store = filled()
    first = cached(store, tmp_path)
    assert first.get_range("packs/a", 70_000, 4000) == PACK[70_000:74_000]
    assert first.get("index/a", 1000) == PACK[:1000]
    assert first.get_range("index/a", 64, 100) == PACK[64:164]
    store.reset()
    for again in (first, cached(store, tmp_path)):
        # Another range of the same window.
        assert again.get_range("packs/a", 100_000, 5000) == PACK[100_000:105_000]
        assert again.get("index/a", 1000) == PACK[:1000]
        assert again.get_range("index/a", 500, 500) == PACK[500:1000]
    assert not store.calls


def test_a_range_over_several_windows_is_one_request(tmp_path: Path) -> None:
    store = filled()
    cached(store, tmp_path).get_range("packs/a", WINDOW - 10, WINDOW + 20)
    assert store.calls == {("size", "packs"): 1, ("get_range", "packs"): 1}


def test_long_ranges_and_whole_packs_do_not_go_through_the_cache(tmp_path: Path) -> None:
    store = cached(filled(), tmp_path)
    assert store.get_range("packs/a", 0, 3 * WINDOW) == PACK[: 3 * WINDOW]
    assert store.get("packs/a", len(PACK)) == PACK
    assert files(tmp_path) == []


def test_whether_something_is_there_is_asked_of_the_store(tmp_path: Path) -> None:
    store = filled()
    here = cached(store, tmp_path)
    assert here.get("sessions/a", 100) == b"session" and here.get("index/a", 1000)
    for name in ("sessions/a", "index/a"):
        # By somebody else.
        store.delete(name)
        with pytest.raises(NotFoundError):
            here.size(name)
    with pytest.raises(NotFoundError):
        here.get("sessions/a", 100)
    assert dict(here.list("")) == {"packs/a": len(PACK)}


def test_what_was_removed_through_the_cache_is_gone(tmp_path: Path) -> None:
    here = cached(filled(), tmp_path)
    assert here.get("index/a", 1000)
    here.delete("index/a")
    with pytest.raises(NotFoundError):
        here.get("index/a", 1000)


def test_an_object_larger_than_the_limit_is_refused_from_the_cache_too(tmp_path: Path) -> None:
    here = cached(filled(), tmp_path)
    for _ in range(2):
        assert here.get("index/a", 1000)
        with pytest.raises(DamagedError, match="1000 bytes where 999 are the most"):
            here.get("index/a", 999)


@given(st.data())
def test_a_damaged_torn_or_misplaced_entry_costs_a_request_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    store = filled()
    here = cached(store, folder)
    here.get_range("packs/a", 0, WINDOW)
    here.get_range("packs/a", 5 * WINDOW, 1000)
    here.get("index/a", 1000)
    found = files(folder)
    chosen = data.draw(st.sampled_from(found))
    content = bytearray(chosen.read_bytes())
    how = data.draw(st.sampled_from(("flip", "cut", "empty", "longer", "other", "gone", "folder")))
    if how == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif how in ("cut", "empty"):
        del content[0 if how == "empty" else data.draw(st.integers(0, len(content) - 1)) :]
    elif how == "longer":
        content += b"x"
    elif how == "other":
        content[:] = data.draw(st.sampled_from([path for path in found if path != chosen])).read_bytes()
    if how in ("gone", "folder"):
        chosen.unlink()
        if how == "folder":
            chosen.mkdir()
    else:
        chosen.write_bytes(content)
    store.reset()
    for again in range(2):
        assert here.get_range("packs/a", 0, WINDOW) == PACK[:WINDOW]
        assert here.get_range("packs/a", 5 * WINDOW, 1000) == PACK[5 * WINDOW :]
        assert here.get("index/a", 1000) == PACK[:1000]
        assert sum(store.calls.values()) == 1 or (how == "folder" and again)


def test_the_cache_stays_below_its_limit_and_keeps_what_is_used(tmp_path: Path) -> None:
    store = MemoryStore()
    limit = 20 * WINDOW
    here = cached(store, tmp_path, limit)
    store.put_new("packs/hot", [bytes(WINDOW)])
    for number in range(80):
        store.put_new(f"packs/p{number}", [bytes([number]) * WINDOW])
        here.get_range(f"packs/p{number}", 0, 100)
        here.get_range("packs/hot", 0, 100)
        # Files carry the time of their use in ticks of the kernel's clock.
        for path in files(tmp_path):
            earlier = path.stat().st_mtime_ns - 10_000_000
            os.utime(path, ns=(earlier, earlier))
        assert sum(path.stat().st_size for path in files(tmp_path)) <= limit * 17 // 16 + WINDOW
    counting = CountingStore(store)
    cached(counting, tmp_path, limit).get_range("packs/hot", 0, 100)
    assert not counting.calls


def test_repositories_do_not_see_each_others_entries_and_share_the_limit(tmp_path: Path) -> None:
    stores = [MemoryStore(), MemoryStore()]
    for number, store in enumerate(stores):
        store.put_new("index/a", [bytes([number]) * 100_000])
    both = [CacheStore(store, f"{number:032x}", str(tmp_path), 1 << 20) for number, store in enumerate(stores)]
    for _ in range(2):
        assert [store.get("index/a", 1 << 20)[0] for store in both] == [0, 1]


def test_entries_are_for_the_user_alone(tmp_path: Path) -> None:
    cached(filled(), tmp_path / "cache").get("index/a", 1000)
    for path in files(tmp_path / "cache"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    here = cached(filled(), tmp_path / "file")
    for _ in range(2):
        assert here.get("index/a", 1000) == PACK[:1000]
        assert here.get_range("packs/a", 10, 10) == PACK[10:20]


def test_many_readers_at_once_in_a_cache_that_is_far_too_small(tmp_path: Path) -> None:
    store = MemoryStore()
    for number in range(16):
        store.put_new(f"packs/p{number}", [bytes([number]) * 3 * WINDOW])
    start = threading.Barrier(8)

    def read(seed: int) -> None:
        random_ = random.Random(seed)
        here = cached(store, tmp_path, 8 * WINDOW)
        start.wait(60)
        for _ in range(40):
            number, offset = random_.randrange(16), random_.randrange(2 * WINDOW)
            assert here.get_range(f"packs/p{number}", offset, 5000) == bytes([number]) * 5000

    with ThreadPoolExecutor(8) as hands:
        list(hands.map(read, range(8)))


def test_only_a_far_store_gets_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Far(MemoryStore):
        @property
        def url(self) -> str:
            return "s3://far/away"

    near, far = MemoryStore(), Far()
    assert with_cache(near, REPOSITORY) is near
    assert isinstance(with_cache(far, REPOSITORY), CacheStore)
    monkeypatch.setenv("SNAPCORE_CACHE_MIB", "0")
    assert with_cache(far, REPOSITORY) is far
    monkeypatch.setenv("SNAPCORE_CACHE_MIB", "1 GB")
    with pytest.raises(UsageError, match="SNAPCORE_CACHE_MIB is a number of MiB, not '1 GB'"):
        with_cache(far, REPOSITORY)


def test_a_far_repository_is_read_with_fewer_requests_and_checked_without_the_cache(
    tmp_path: Path, own_cache: Path
) -> None:
    class Far(CountingStore):
        @property
        def url(self) -> str:
            return "s3://far/away"

    inner = MemoryStore()
    store = Far(inner)
    content = random.Random(2).randbytes(1 << 20)
    repository = Repository.create(store)
    taken = [repository.snapshot(Bytes(content), disk="disk").snapshot.id for _ in range(5)]
    repository.snapshots()
    store.reset()
    assert [item.id for item in Repository.open(store).snapshots()] == taken
    assert store.calls == {("get", "config"): 1, ("list", "snapshots"): 1}
    assert restored(Repository.open(store), taken[0], tmp_path) == content
    # Rotten in the store, whole in the cache.
    name = next(name for name, _ in inner.list("snapshots/"))
    body = inner.get(name, 1 << 20)
    inner.delete(name)
    inner.put_new(name, [body[:-1] + bytes([body[-1] ^ 1])])
    assert not Repository.open(store).verify().ok
