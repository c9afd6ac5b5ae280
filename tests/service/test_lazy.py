"""Lazy disks over real repositories: what they need stays, what fails is an error, and far ones are asked seldom."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapcore import KeyFile, LockedError, NotFoundError, RefusedError, Repository, StoreError
from snapcore.pool import Disk, Pool, RegionEvent
from snapcore.service import Archives, Regions
from snapcore.store import MemoryStore, Store, open_store
from tests.support.counting import CountingStore
from tests.support.disks import changed
from tests.support.faulty import Fault, FaultyStore, Plan
from tests.support.pools import MIB
from tests.support.s3 import new_place, s3, s3_server
from tests.support.tiers import archived_bytes, local_bytes

__all__ = ["s3", "s3_server"]
SIZE = 6 * MIB + 777
CHUNK = 64 << 10


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Noise with a hole."""
    made = tmp_path / "disk.img"
    data = bytearray(random.Random(1).randbytes(SIZE))
    data[2 * MIB : 3 * MIB] = bytes(MIB)
    made.write_bytes(data)
    return made


@pytest.fixture
def home(tmp_path: Path) -> Repository:
    return Repository.create(tmp_path / "repo")


class Heard(list[RegionEvent]):
    """Events."""


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def lazy(folder: Path, heard: Heard) -> Iterator[Pool]:
    """A pool with regions."""
    pool = Pool.create(folder / "lazy", background=False, regions=Regions(on_event=heard.append))
    yield pool
    pool.close()


def taken(repository: Repository, image: Path, **options: str) -> str:
    """`REPO:SNAPSHOT` of an image."""
    return f"{repository.url}:{repository.snapshot(image, disk='web', **options).snapshot.id}"


def made(pool: Pool, name: str, where: str) -> Disk:
    """A lazy disk."""
    regions = pool._engine.versions.backings.regions
    assert isinstance(regions, Regions)
    region = regions.find(where)
    assert region is not None
    return pool.create_disk(name, source=region)


def reopened(pool: Pool, regions: Regions) -> Pool:
    """The same pool with other regions."""
    pool.close()
    return Pool.open(pool.path, background=False, regions=regions)


def settled(pool: Pool) -> None:
    """Pins are as they should be."""
    pool.checkpoint()
    assert pool._engine.holds is not None
    pool._engine.holds.wait()


# Pins


def test_a_snapshot_that_lazy_disks_need_is_not_deleted_until_the_last_one_is_gone(
    lazy: Pool, home: Repository, image: Path
) -> None:
    where = taken(home, image)
    disks = [made(lazy, name, where) for name in ("one", "two")]
    cut = disks[0].snapshot("cut")
    snapshot = where.rpartition(":")[2]
    for gone in (*disks, cut):
        with pytest.raises(RefusedError, match=f"needed by the pool {lazy.path} on .*ecouple"):
            home.delete(snapshot)
        gone.delete()
        settled(lazy)
    assert home.pins() == []
    home.delete(snapshot)


def test_a_decoupled_disk_lets_its_snapshot_go(lazy: Pool, home: Repository, image: Path) -> None:
    where = taken(home, image)
    disk = made(lazy, "web", where)
    disk.hydrate(wait=True)
    with pytest.raises(RefusedError):
        home.delete(where.rpartition(":")[2])
    disk.decouple()
    settled(lazy)
    home.delete(where.rpartition(":")[2])
    home.collect()
    assert local_bytes(disk) == image.read_bytes()


def test_pins_of_pools_are_their_own(lazy: Pool, folder: Path, home: Repository, image: Path) -> None:
    where = taken(home, image)
    with Pool.create(folder / "other", background=False, regions=Regions()) as other:
        disk = made(other, "web", where)
        made(lazy, "web", where)
        assert len(home.pins()) == 2
        disk.delete()
        settled(other)
    assert [lazy.path in pin.who for pin in home.pins()] == [True]


def test_what_a_crash_left_pinned_is_let_go_at_the_next_opening(
    lazy: Pool, folder: Path, home: Repository, image: Path
) -> None:
    where = taken(home, image)
    region = Regions().find(where)
    assert region is not None
    holds = lazy._engine.holds
    assert holds is not None
    holds._note(region)
    home.pin(region.snapshot, "nobody")
    Regions().pin(region, lazy.id, "this pool, before it crashed")
    again = reopened(lazy, Regions())
    with again:
        settled(again)
    assert [pin.who for pin in home.pins()] == ["nobody"]


def test_a_forced_deletion_makes_errors_of_what_was_not_fetched_and_never_zeros(
    lazy: Pool, home: Repository, image: Path, heard: Heard
) -> None:
    where = taken(home, image)
    disk = made(lazy, "web", where)
    data = image.read_bytes()
    assert disk.pread(10, 0) == data[:10]
    home.delete(where.rpartition(":")[2], force=True)
    home.collect()
    again = reopened(lazy, Regions(on_event=heard.append))
    with again:
        disk = again.open_disk("web")
        assert disk.pread(MIB, 0) == data[:MIB]
        for _ in range(2):
            with pytest.raises(StoreError, match="could not be fetched"):
                disk.pread(10, 5 * MIB)
        with pytest.raises(StoreError):
            disk.hydrate(wait=True)
        disk.pwrite(bytes(4096), 5 * MIB)
        assert disk.pread(10, 5 * MIB) == bytes(10)
        disk.delete()
    assert [event.kind for event in heard] == ["failed"] * 2 and "no snapshot" in heard[0].reason


# Keys


def test_a_region_under_a_key_is_read_with_it_and_not_without(
    lazy: Pool, home: Repository, image: Path, tmp_path: Path
) -> None:
    holder = KeyFile.create(tmp_path / "key")
    home.keyring.create("k", holder)
    where = taken(home, image, key="k")
    with pytest.raises(LockedError):
        Regions().find(where)
    again = reopened(lazy, Regions([holder]))
    with again:
        disk = made(again, "web", where)
        assert disk.pread(100, MIB) == image.read_bytes()[MIB : MIB + 100]
    assert len(home.pins()) == 1
    with Pool.open(again.path, background=False, regions=Regions()) as locked:
        disk = locked.open_disk("web")
        assert disk.pread(100, MIB) == image.read_bytes()[MIB : MIB + 100]
        with pytest.raises(StoreError, match="not unlocked"):
            disk.pread(1, 5 * MIB)
        # To let go needs no key.
        disk.delete()
    assert home.pins() == []


# Far away


def far(store: Store) -> tuple[CountingStore, Regions]:
    counting = CountingStore(store)
    return counting, Regions(open_repository=lambda _: Repository.open(counting))


@pytest.mark.parametrize("place", ["memory", "s3"])
def test_the_first_read_of_a_new_disk_takes_three_requests_at_most(
    lazy: Pool, image: Path, place: str, request: pytest.FixtureRequest
) -> None:
    if place == "s3":
        request.getfixturevalue("s3")
    store = MemoryStore() if place == "memory" else open_store(new_place())
    repository = Repository.create(store)
    where = taken(repository, image)
    counting, regions = far(store)
    with reopened(lazy, regions) as again:
        disk = made(again, "web", where)
        counting.reset()
        assert disk.pread(4096, 4 * MIB) == image.read_bytes()[4 * MIB : 4 * MIB + 4096]
        assert 1 <= sum(counting.calls.values()) <= 3
        # Its neighbours came with it.
        counting.reset()
        assert disk.pread(MIB, 4 * MIB) == image.read_bytes()[4 * MIB : 5 * MIB]
        assert not counting.calls
        disk.hydrate(wait=True)
        assert local_bytes(disk) == image.read_bytes()


def test_a_disk_of_a_long_chain_reads_right_where_all_is_fetched_at_once(lazy: Pool, image: Path) -> None:
    store = MemoryStore()
    repository = Repository.create(store)
    where = taken(repository, image)
    for number in range(4):
        image.write_bytes(changed(image.read_bytes(), number, 40))
        where = taken(repository, image)
    _, regions = far(store)
    with reopened(lazy, regions) as again:
        disk = made(again, "web", where)
        dice = random.Random(7)
        for _ in range(20):
            at = dice.randrange(SIZE - 5000)
            assert disk.pread(5000, at) == image.read_bytes()[at : at + 5000]
        assert local_bytes(disk) == image.read_bytes()


def test_what_disks_read_first_is_known_to_all_pools_of_a_host(
    lazy: Pool, folder: Path, home: Repository, image: Path
) -> None:
    where = taken(home, image)
    disk = made(lazy, "web", where)
    for offset in (5 * MIB, 0):
        disk.pread(1, offset)
    lazy.close()
    with Pool.create(folder / "other", background=False, regions=Regions()) as other:
        disk = made(other, "web", where)
        found = disk._lazy()
        assert found is not None and found.first_windows() == [5, 0]


# Faults


@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.LOSE, Fault.TRUNCATE, Fault.LIE, Fault.TWICE, Fault.AFTER_NEXT])
@pytest.mark.parametrize("method", ["get", "get_range", "list"])
def test_a_region_that_goes_wrong_gives_errors_or_the_right_bytes(
    lazy: Pool, image: Path, heard: Heard, fault: Fault, method: str
) -> None:
    store = MemoryStore()
    where = taken(Repository.create(store), image)
    faulty = FaultyStore(store)
    with reopened(lazy, Regions(on_event=heard.append, open_repository=lambda _: Repository.open(faulty))) as pool:
        made(pool, "web", where)
    # A new process opens all anew.
    with reopened(pool, Regions(on_event=heard.append, open_repository=lambda _: Repository.open(faulty))) as pool:
        disk = pool.open_disk("web")
        faulty.plan = Plan(fault, method, faulty.counts[method], 3)
        data, failures = image.read_bytes(), 0
        for number in range(12):
            at = number % 6 * MIB + 123
            try:
                assert disk.pread(5000, at) == data[at : at + 5000]
            except (StoreError, NotFoundError):
                failures += 1
        assert failures == len([event for event in heard if event.kind == "failed"])
        faulty.plan = None
        assert local_bytes(disk) == data
        assert not failures or heard[-1].kind == "back"


def test_a_region_with_changed_bytes_gives_an_error_and_goes_on_when_it_is_well(
    lazy: Pool, home: Repository, image: Path, tmp_path: Path, heard: Heard
) -> None:
    disk = made(lazy, "web", taken(home, image))
    packs = [path for path in (tmp_path / "repo" / "packs").rglob("*") if path.is_file()]
    stored = {path: path.read_bytes() for path in packs}
    for path, data in stored.items():
        os.chmod(path, 0o600)
        path.write_bytes(bytes(byte ^ 255 for byte in data))
    with pytest.raises(StoreError, match="could not be fetched"):
        disk.pread(10, 0)
    for path, data in stored.items():
        path.write_bytes(data)
    assert local_bytes(disk) == image.read_bytes()
    assert [event.kind for event in heard] == ["failed", "back"]


def test_a_region_that_is_gone_and_comes_back(
    lazy: Pool, home: Repository, image: Path, tmp_path: Path, heard: Heard
) -> None:
    disk = made(lazy, "web", taken(home, image))
    lazy.close()
    shutil.move(tmp_path / "repo", tmp_path / "away")
    with Pool.open(lazy.path, background=False, regions=Regions(on_event=heard.append)) as again:
        disk = again.open_disk("web")
        with pytest.raises(StoreError):
            disk.pread(10, 0)
        assert disk.snapshot("cut").name == "cut"
        shutil.move(tmp_path / "away", tmp_path / "repo")
        assert local_bytes(disk) == image.read_bytes()
    assert [event.kind for event in heard] == ["failed", "back"]


# Archives


def test_a_disk_is_archived_while_it_is_lazy_and_only_what_changed_is_read(
    lazy: Pool, home: Repository, image: Path
) -> None:
    disk = made(lazy, "web", taken(home, image))
    disk.pwrite(b"changed" * 1000, 5 * MIB + 9)
    expected = bytearray(image.read_bytes())
    expected[5 * MIB + 9 : 5 * MIB + 7009] = b"changed" * 1000
    with Archives(lazy) as archives:
        first = archives.archive(home, disk.snapshot("first")).result()
        assert archived_bytes(home, first.archived) == expected
        disk.discard(0, CHUNK)
        expected[:CHUNK] = bytes(CHUNK)
        second = archives.archive(home, disk.snapshot("second")).result()
    assert archived_bytes(home, second.archived) == expected
    assert second.read_bytes <= 4 * CHUNK


def test_a_disk_rolls_back_to_its_own_snapshot_that_is_only_in_a_region(
    lazy: Pool, home: Repository, image: Path
) -> None:
    regions = lazy._engine.versions.backings.regions
    assert isinstance(regions, Regions)
    disk = lazy.import_image("web", image)
    other = lazy.create_disk("other", MIB)
    with Archives(lazy) as archives:
        local = disk.snapshot("first")
        archived = archives.archive(home, local).result().archived
    where = f"{home.url}:{archived.id}"
    assert regions.find_own(where, lazy, disk) == local
    local.delete()
    disk.pwrite(b"x" * 9000, 77)
    found = regions.find_own(where, lazy, disk)
    assert found is not None and not isinstance(found, type(local))
    lazy.rollback_disk(disk, found)
    assert local_bytes(disk) == image.read_bytes()
    assert len(home.pins()) == 1
    with pytest.raises(RefusedError, match="not cut from disk 'other'"):
        regions.find_own(where, lazy, other)
    with pytest.raises(RefusedError):
        regions.find_own(taken(home, image), lazy, disk)
    assert regions.find_own("first", lazy, disk) is None
