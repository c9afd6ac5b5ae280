"""Many disks are made at once: all or none, whatever ends the work, and lazy ones share what is fetched."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapcore import ExistsError, NotFoundError, UsageError
from snapcore.pool import NewDisk, Pool, Region, check
from snapcore.pool.pool import MAX_MADE
from snapcore.pool.superblock import LAZY, read
from tests.support.lazy_regions import Regions
from tests.support.pools import BLOCK_BYTES, MIB, check_space, quick_folder
from tests.support.recorder import Recorder, crashes

DATA = random.Random(1).randbytes(2 * MIB + 777)
OTHER = random.Random(2).randbytes(9 * BLOCK_BYTES)


@pytest.fixture
def folder() -> Iterator[Path]:
    found = quick_folder()
    yield found
    shutil.rmtree(found)


@pytest.fixture
def regions() -> Regions:
    return Regions()


def wanted(pool: Pool, regions: Regions, count: int) -> list[NewDisk]:
    """Machines of four disks: two from a region, one from a snapshot, an empty one."""
    system, data = regions.put("system", DATA), regions.put("data", OTHER)
    (local,) = pool.snapshots()
    found = []
    for number in range(count):
        found += [
            NewDisk(f"m{number}", 4 * MIB, system),
            NewDisk(f"m{number}-b", None, data),
            NewDisk(f"m{number}-c", None, local),
            NewDisk(f"m{number}-d", MIB),
        ]
    return found


def started(folder: Path, regions: Regions, **words: object) -> Pool:
    """A pool with a snapshot."""
    pool = Pool.create(folder / "pool", log_bytes=65536, background=False, regions=regions, **words)  # type: ignore[arg-type]
    disk = pool.create_disk("base", MIB)
    disk.pwrite(OTHER, 0)
    disk.snapshot("base")
    return pool


def holds(pool: Pool, count: int) -> None:
    """All machines are there with what they should hold."""
    for number in range(count):
        system, data, local, empty = (pool.open_disk(f"m{number}{suffix}") for suffix in ("", "-b", "-c", "-d"))
        assert system.pread(system.size_bytes, 0) == DATA + bytes(4 * MIB - len(DATA))
        assert data.pread(data.size_bytes, 0) == OTHER
        assert local.pread(local.size_bytes, 0) == OTHER + bytes(MIB - len(OTHER))
        assert empty.pread(MIB, 0) == bytes(MIB)


def test_they_hold_what_they_are_made_from_and_what_is_shared_is_fetched_once(folder: Path, regions: Regions) -> None:
    with started(folder, regions) as pool:
        made = pool.create_disks(wanted(pool, regions, 5))
        assert [disk.name for disk in made[:5]] == ["m0", "m0-b", "m0-c", "m0-d", "m1"]
        holds(pool, 5)
        assert regions.fetched_bytes <= len(DATA) + len(OTHER)
        made[0].pwrite(b"mine", 0)
        assert made[4].pread(4, 0) == DATA[:4]
        made[0].reset()
        assert made[0].pread(4, 0) == DATA[:4]
        check_space(pool)
    with Pool.open(folder / "pool", background=False, regions=regions) as pool:
        holds(pool, 5)
        assert len(pool.disks()) == 21
    assert check(folder / "pool").problems == []


def test_what_is_refused_makes_none(folder: Path, regions: Regions) -> None:
    with started(folder, regions) as pool:
        good = wanted(pool, regions, 1)
        for bad, error in (
            ([NewDisk("base", MIB)], ExistsError),
            ([NewDisk("m0", MIB)], UsageError),
            ([NewDisk("a/b", MIB)], UsageError),
            ([NewDisk("x")], UsageError),
            ([NewDisk("x", 5, regions.put("system", DATA))], UsageError),
            ([NewDisk("x", 0)], UsageError),
            ([NewDisk(f"x{number}", MIB) for number in range(MAX_MADE)], UsageError),
            ([NewDisk("x", None, Region("nowhere", "r" * 32, "gone", 65536))], Exception),
        ):
            with pytest.raises(error):
                pool.create_disks([*good, *bad])
            assert [disk.name for disk in pool.disks()] == ["base"]
        with pytest.raises(UsageError):
            pool.create_disks([])
        snapshot = pool.snapshots()[0]
        snapshot.delete()
        with pytest.raises(NotFoundError):
            pool.create_disks([NewDisk("x", None, snapshot)])
        pool.create_disks([NewDisk(f"x{number}", MIB) for number in range(MAX_MADE // 4)])


def test_a_pool_whose_log_tells_of_them_is_marked_and_a_clean_one_is_not(folder: Path, regions: Regions) -> None:
    pool = started(folder, regions)
    pool.create_disks([NewDisk("a", MIB), NewDisk("b", MIB)])
    block, _ = read(str(folder / "pool" / "superblock"))
    assert block.must_read & LAZY
    pool._engine.abandon()
    pool._closed = True
    with Pool.open(folder / "pool", background=False) as again:
        assert {disk.name for disk in again.disks()} == {"a", "b", "base"}
    block, _ = read(str(folder / "pool" / "superblock"))
    assert not block.must_read


def test_a_crash_at_any_instant_leaves_all_of_them_or_none(folder: Path, regions: Regions) -> None:
    place = folder / "work"
    place.mkdir()
    started(place, regions).close()
    recorder = Recorder(place)
    pool = Pool.open(place / "pool", medium=recorder, background=False, regions=regions)
    recorder.note("begun")
    pool.create_disks(wanted(pool, regions, 3))
    recorder.note("made")
    pool._engine.abandon()
    pool._closed = True
    counts = set()
    for crash in crashes(recorder, 3):
        crash.build(folder / "crashed")
        try:
            with Pool.open(folder / "crashed" / "pool", background=False, regions=regions) as found:
                made = len(found.disks()) - 1
                counts.add(made)
                assert made in (0, 12) and (made == 12 or "made" not in crash.facts)
                if made:
                    holds(found, 3)
                check_space(found)
        finally:
            shutil.rmtree(folder / "crashed")
    assert counts == {0, 12}
