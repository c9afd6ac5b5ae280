"""A disk from a snapshot in a region is used at once: what it reads is fetched, and never anything but right."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapcore import CancelledError, NotFoundError, SourceChangedError, StoreError, UnsupportedFormatError, UsageError
from snapcore.pool import Disk, Pool, Region, check
from snapcore.pool.lazy import LazyImage
from snapcore.pool.superblock import LAZY, read
from tests.support.lazy_regions import Regions
from tests.support.pools import BLOCK_BYTES, MIB, check_space, quick_folder

WINDOW = MIB
SIZE = 6 * MIB + 777


def content(seed: int = 1, size: int = SIZE) -> bytes:
    """Bytes with zero chunks here and there, a whole zero window among them."""
    data = bytearray(random.Random(seed).randbytes(size))
    data[2 * MIB : 3 * MIB] = bytes(MIB)
    data[5 * MIB : 5 * MIB + 3 * BLOCK_BYTES] = bytes(3 * BLOCK_BYTES)
    return bytes(data)


DATA = content()


@pytest.fixture
def regions() -> Iterator[Regions]:
    made = Regions()
    yield made
    # Nobody waits for a test that is over.
    made.go_on.set()


@pytest.fixture
def folder() -> Iterator[Path]:
    found = quick_folder()
    yield found
    shutil.rmtree(found)


@pytest.fixture
def pool(folder: Path, regions: Regions) -> Iterator[Pool]:
    made = Pool.create(folder / "pool", log_bytes=65536, background=False, regions=regions)
    yield made
    if not made._closed:
        crash(made)


def crash(pool: Pool) -> None:
    """Let go of a pool as a crash does."""
    pool._engine.abandon()
    pool._closed = True


def image_of(disk: Disk) -> LazyImage:
    found = disk._lazy()
    assert found is not None
    return found


@contextmanager
def reopened(folder: Path, regions: Regions | None, *, read_only: bool = False) -> Iterator[Pool]:
    with Pool.open(folder / "pool", background=False, regions=regions, read_only=read_only) as found:
        yield found


def eventually(holds: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_lazy_disk_reads_as_its_snapshot_and_fetches_what_is_read(pool: Pool, regions: Regions) -> None:
    disk = pool.create_disk("web", source=regions.put("one", DATA))
    assert (disk.size_bytes, disk.origin) == (SIZE, ("region", "memory:region:one"))
    assert regions.reads == []
    assert disk.pread(100, MIB + 5) == DATA[MIB + 5 : MIB + 105]
    assert regions.reads == [(MIB, WINDOW)]
    assert disk.pread(WINDOW, MIB) == DATA[MIB : 2 * MIB]
    assert regions.reads == [(MIB, WINDOW)]
    assert disk.pread(SIZE, 0) == DATA
    assert regions.fetched_bytes == SIZE
    assert disk.hydration() == (SIZE, SIZE, False, "")


def test_zeros_take_no_space(pool: Pool, regions: Regions) -> None:
    disk = pool.create_disk("web", source=regions.put("one", bytes(4 * MIB) + b"x" * BLOCK_BYTES))
    disk.pread(5 * MIB, 0)
    assert os.stat(Path(pool.path) / "lazy" / "3.data").st_blocks * 512 <= 4 * BLOCK_BYTES
    assert 0 < pool.usage().lazy_bytes <= 16 * BLOCK_BYTES


def test_a_write_of_whole_blocks_fetches_nothing_and_one_of_a_part_its_block(pool: Pool, regions: Regions) -> None:
    disk = pool.create_disk("web", source=regions.put("one", DATA))
    disk.pwrite(b"y" * 2 * BLOCK_BYTES, BLOCK_BYTES)
    disk.write_zeroes(4 * MIB, 8 * BLOCK_BYTES)
    assert regions.reads == []
    disk.pwrite(b"part", 3 * MIB + 10)
    assert regions.reads == [(3 * MIB, WINDOW)]
    expected = bytearray(DATA)
    expected[BLOCK_BYTES : 3 * BLOCK_BYTES] = b"y" * 2 * BLOCK_BYTES
    expected[4 * MIB : 4 * MIB + 8 * BLOCK_BYTES] = bytes(8 * BLOCK_BYTES)
    expected[3 * MIB + 10 : 3 * MIB + 14] = b"part"
    assert disk.pread(SIZE, 0) == expected


def test_disks_from_one_snapshot_share_what_is_fetched(pool: Pool, regions: Regions) -> None:
    region = regions.put("one", DATA)
    disks = [pool.create_disk(f"web{number}", source=region) for number in range(5)]
    other = pool.create_disk("other", source=regions.put("two", content(2)))
    for disk in disks:
        assert disk.pread(SIZE, 0) == DATA
    assert regions.fetched_bytes == SIZE
    assert other.pread(SIZE, 0) == content(2)
    assert len({id(image_of(disk)) for disk in disks}) == 1


def test_one_fetch_serves_all_who_wait_for_the_same_bytes(pool: Pool, regions: Regions) -> None:
    disk = pool.create_disk("web", source=regions.put("one", DATA))
    regions.stalled = {(0, 1 << 62)}
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(disk.pread(50, 4 * MIB + 1))) for _ in range(6)]
    for thread in threads:
        thread.start()
    eventually(lambda: bool(regions.reads))
    regions.go_on.set()
    for thread in threads:
        thread.join()
    assert found == [DATA[4 * MIB + 1 : 4 * MIB + 51]] * 6
    assert regions.reads == [(4 * MIB, WINDOW)]


def test_who_reads_on_finds_what_comes_next_fetched_ahead(pool: Pool, regions: Regions) -> None:
    disk = pool.create_disk("web", source=regions.put("one", DATA))
    disk.pread(1, 0)
    disk.pread(1, WINDOW)
    # Two windows more.
    eventually(lambda: image_of(disk).presence.here == 4 * WINDOW // BLOCK_BYTES)
    disk.pread(1, 4 * WINDOW)
    eventually(lambda: image_of(disk).presence.here == image_of(disk).presence.chunks)


# Failures


def test_a_region_that_fails_gives_an_error_and_the_next_request_tries_again(pool: Pool, regions: Regions) -> None:
    disk = pool.create_disk("web", source=regions.put("one", DATA))
    disk.pread(1, 0)
    regions.failing = True
    for doing in (lambda: disk.pread(10, 4 * MIB), lambda: disk.pwrite(b"part", 4 * MIB + 1)):
        with pytest.raises(StoreError, match=r"offset 4194304 could not be fetched .*one in memory:region.*reached"):
            doing()
    with pytest.raises(StoreError):
        disk.discard(4 * MIB + 100, 10)
    assert disk.pread(10, 0) == DATA[:10]
    disk.pwrite(b"whole" + bytes(BLOCK_BYTES - 5), 4 * MIB)
    assert disk.pread(5, 4 * MIB) == b"whole"
    regions.failing = False
    assert disk.pread(10, 5 * MIB - 10) == DATA[5 * MIB - 10 : 5 * MIB]


def test_a_region_that_stalls_costs_its_own_requests_a_bounded_time_and_others_nothing(
    pool: Pool, regions: Regions
) -> None:
    disk = pool.create_disk("web", source=regions.put("one", DATA))
    regions.stalled = {(4 * MIB, 5 * MIB)}
    stuck = threading.Thread(target=lambda: disk.pread(10, 4 * MIB))
    stuck.start()
    eventually(lambda: bool(regions.reads))
    # A cut, writes, deletions and checkpoints go on, and so do reads of other windows.
    snapshot = disk.snapshot("cut")
    assert disk.pread(10, MIB) == DATA[MIB : MIB + 10]
    disk.pwrite(b"beside", 6 * MIB)
    assert snapshot.pread(6, 6 * MIB) == DATA[6 * MIB : 6 * MIB + 6]
    disk.clone("clone").delete()
    pool.checkpoint()
    image_of(disk).budget_s = 0.05
    with pytest.raises(StoreError, match=r"no answer within 0\.05 s"):
        snapshot.pread(10, 4 * MIB)
    assert stuck.is_alive()
    regions.stalled = set()
    regions.go_on.set()
    stuck.join()
    image_of(disk).budget_s = 30
    assert snapshot.pread(10, 4 * MIB) == DATA[4 * MIB : 4 * MIB + 10]


def test_a_pool_that_is_closed_ends_requests_that_wait_for_a_region(pool: Pool, regions: Regions) -> None:
    disk = pool.create_disk("web", source=regions.put("one", DATA))
    regions.stalled = {(0, 1 << 62)}
    errors: list[BaseException] = []

    def work() -> None:
        try:
            disk.pread(10, 0)
        except NotFoundError as error:
            errors.append(error)

    stuck = threading.Thread(target=work)
    stuck.start()
    eventually(lambda: bool(regions.reads))
    pool.close()
    stuck.join(30)
    assert len(errors) == 1


def test_another_snapshot_behind_the_same_id_is_noticed(pool: Pool, regions: Regions, folder: Path) -> None:
    pool.create_disk("web", source=regions.put("one", DATA))
    pool.close()
    regions.put("one", DATA[:-1])
    with reopened(folder, regions) as again, pytest.raises(StoreError, match="not the one that the disk was made from"):
        again.open_disk("web").pread(1, 0)


def test_without_regions_and_for_reading_only_there_is_what_is_here(pool: Pool, regions: Regions, folder: Path) -> None:
    region = regions.put("one", DATA)
    pool.create_disk("web", source=region).pread(1, 0)
    pool.close()
    for found, read_only, why in ((None, False, "without regions"), (regions, True, "reading only")):
        with reopened(folder, found, read_only=read_only) as again:
            disk = again.open_disk("web")
            assert disk.pread(MIB, 0) == DATA[:MIB]
            with pytest.raises(StoreError, match=why):
                disk.pread(1, MIB)
    with reopened(folder, None) as again:
        for doing in (lambda: again.create_disk("b", source=region), lambda: again.open_disk("web").hydrate()):
            with pytest.raises(UsageError, match="without regions"):
                doing()
    assert check(folder / "pool").problems == []


# Versions


def test_snapshots_clones_and_rollbacks_of_a_lazy_disk_are_exact(pool: Pool, regions: Regions) -> None:
    disk = pool.create_disk("web", source=regions.put("one", DATA))
    disk.pwrite(b"a" * BLOCK_BYTES, MIB)
    cut = disk.snapshot("cut")
    disk.pwrite(b"b" * 10, 2 * MIB + 5)
    clone = disk.clone("clone")
    clone.discard(0, 3 * BLOCK_BYTES)
    assert pool.diff(cut, disk).tolist() == [[2 * MIB, BLOCK_BYTES]]
    disk.hydrate(wait=True)
    assert pool.diff(cut, disk).tolist() == [[2 * MIB, BLOCK_BYTES]]
    expected = bytearray(DATA)
    expected[MIB : MIB + BLOCK_BYTES] = b"a" * BLOCK_BYTES
    assert cut.pread(SIZE, 0) == expected
    disk.rollback(cut)
    assert disk.pread(SIZE, 0) == expected
    expected[2 * MIB + 5 : 2 * MIB + 15] = b"b" * 10
    expected[: 3 * BLOCK_BYTES] = bytes(3 * BLOCK_BYTES)
    assert clone.pread(SIZE, 0) == expected
    disk.reset()
    assert disk.pread(SIZE, 0) == DATA
    check_space(pool)


def test_a_disk_rolls_back_to_a_snapshot_that_is_only_in_a_region(pool: Pool, regions: Regions, folder: Path) -> None:
    disk = pool.create_disk("web", 3 * MIB)
    disk.pwrite(b"before", 0)
    kept = disk.snapshot("kept")
    pool.rollback_disk(disk, regions.put("one", DATA))
    assert regions.reads == [] and disk.size_bytes == SIZE
    assert disk.pread(100, MIB) == DATA[MIB : MIB + 100]
    disk.pwrite(b"on", 0)
    assert kept.pread(6, 0) == b"before"
    pool.flush()
    crash(pool)
    with reopened(folder, regions) as again:
        assert again.open_disk("web").pread(SIZE, 0) == b"on" + DATA[2:]
        again.open_disk("web").rollback("kept")
        assert again.open_disk("web").pread(6, 0) == b"before"
        again.checkpoint()
        assert os.listdir(folder / "pool" / "lazy") == []


# Hydration


def test_hydration_brings_all_and_fetches_no_zeros(pool: Pool, regions: Regions) -> None:
    disk = pool.create_disk("web", source=regions.put("one", DATA))
    seen: list[float] = []
    disk.hydrate(wait=True, progress=lambda step: seen.append(step.percent))
    assert disk.hydration() == (SIZE, SIZE, False, "")
    assert seen[-1] == 100
    assert regions.fetched_bytes == SIZE - MIB - 3 * BLOCK_BYTES
    regions.failing = True
    assert disk.pread(SIZE, 0) == DATA


def test_hydration_goes_on_when_the_region_is_back(
    pool: Pool, regions: Regions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snapcore.pool.hydration._PAUSES_S", (0.01,))
    disk = pool.create_disk("web", source=regions.put("one", DATA))
    regions.failing = True
    with pytest.raises(StoreError, match="goes on when the region can be reached"):
        disk.hydrate(wait=True)
    regions.failing = False
    eventually(lambda: disk.hydration() == (SIZE, SIZE, False, ""))


def test_hydration_is_stopped_by_its_progress_and_keeps_to_its_rate(pool: Pool, regions: Regions) -> None:
    disk = pool.create_disk("web", source=regions.put("one", DATA))

    def cancel(step: object) -> None:
        if regions.reads:
            raise CancelledError("enough")

    with pytest.raises(CancelledError):
        disk.hydrate(1, wait=True, progress=cancel)
    found = disk.hydration()
    assert found is not None and not found.running and len(regions.reads) == 1


def test_demand_goes_before_what_waits_in_the_background(pool: Pool, regions: Regions) -> None:
    data = random.Random(5).randbytes(14 * MIB)
    disk = pool.create_disk("web", source=regions.put("one", data))
    regions.stalled = {(0, 8 * MIB)}
    disk.hydrate()
    eventually(lambda: len(regions.reads) == 2)
    # Both threads of the background wait, and the windows from the eighth MiB on are among those that wait for them.
    assert disk.pread(10, 9 * MIB) == data[9 * MIB : 9 * MIB + 10]
    assert disk.pread(10, 13 * MIB) == data[13 * MIB : 13 * MIB + 10]
    regions.stalled = set()
    regions.go_on.set()
    disk.hydrate(wait=True)
    assert disk.pread(len(data), 0) == data


def test_what_was_to_be_hydrated_is_gone_on_with_after_reopening(pool: Pool, regions: Regions, folder: Path) -> None:
    disks = [pool.create_disk(name, source=regions.put(name, DATA)) for name in ("slow", "fast", "off", "never")]
    disks[0].hydrate(1)
    pool.plan_hydration(disks[1], 0)
    disks[2].hydrate(1)
    pool.plan_hydration(disks[2], None)
    assert [item.hydration().running for item in disks] == [True, False, False, False]  # type: ignore[union-attr]
    crash(pool)
    with reopened(folder, regions) as again:
        again.resume_hydration()
        eventually(lambda: again.open_disk("fast").hydration() == (SIZE, SIZE, False, ""))
        found = {disk.name: disk.hydration() for disk in again.disks()}
        assert {name: state.running for name, state in found.items() if state is not None} == {
            "fast": False,
            "never": False,
            "off": False,
            "slow": True,
        }
        with pytest.raises(UsageError, match="rate"):
            again.plan_hydration(again.open_disk("slow"), -1)


def test_what_a_pool_wants_of_regions_is_read_as_it_is_documented(pool: Pool, regions: Regions, folder: Path) -> None:
    region = regions.put("one", DATA)
    pool.create_disk("web", source=region)
    pool.close()
    wants = (
        '{"version":1,"pinned":[{"url":"memory:region","repository":"%s","snapshot":"%s","chunk_bytes":4096}],'
        '"hydrate":[{"repository":"%s","snapshot":"one","rate_bytes_s":0.0}]}'
    )
    (folder / "pool" / "regions").write_text(wants % ("r" * 32, "stale", "r" * 32))
    regions.pins = {("stale", pool.id)}
    with reopened(folder, regions) as again:
        again.resume_hydration()
        eventually(lambda: again.open_disk("web").hydration() == (SIZE, SIZE, False, ""))
        # What is needed is pinned though nobody had noted it, and what is not is let go.
        eventually(lambda: regions.pinned == ["one"])
    (folder / "pool" / "regions").write_text("damaged")
    with reopened(folder, regions) as again:
        assert again.open_disk("web").pread(SIZE, 0) == DATA
    assert regions.pinned == ["one"]
    assert f'"snapshot":"one","chunk_bytes":{BLOCK_BYTES}' in (folder / "pool" / "regions").read_text()


def test_what_disks_read_first_is_fetched_first(pool: Pool, regions: Regions, folder: Path) -> None:
    regions.trace_path = str(folder / "shared.trace")
    region = regions.put("one", DATA)
    disk = pool.create_disk("web", source=region)
    for offset in (4 * MIB, MIB):
        disk.pread(1, offset)
    pool.close()
    assert (folder / "shared.trace").read_bytes() == f"{4 * MIB}\n{MIB}\n".encode()
    regions.reads.clear()
    other = Pool.create(folder / "other", background=False, regions=regions)
    with other:
        other.create_disk("web", source=region).hydrate(1)
        eventually(lambda: bool(regions.reads))
    assert regions.reads[0] == (4 * MIB, WINDOW)


def test_a_decoupled_disk_needs_its_region_no_more(pool: Pool, regions: Regions, folder: Path) -> None:
    region = regions.put("one", DATA)
    disk = pool.create_disk("web", source=region)
    disk.pwrite(b"own", 0)
    cut = disk.snapshot("cut")
    disk.decouple()
    assert disk.hydration() is None
    regions.failing = True
    assert cut.pread(SIZE, 0) == b"own" + DATA[3:]
    crash(pool)
    shutil.move(folder / "pool", folder / "moved")
    shutil.move(folder / "moved", folder / "pool")
    for _ in range(2):
        with reopened(folder, None) as again:
            assert again.open_disk("web").pread(SIZE, 0) == b"own" + DATA[3:]
            assert again.snapshot("cut").pread(SIZE, 0) == b"own" + DATA[3:]
    with reopened(folder, regions) as again:
        regions.failing = False
        fresh = again.create_disk("fresh", source=region)
        assert fresh.pread(10, 0) == DATA[:10]
        assert image_of(fresh).record.id != again._engine.catalog.disks[int(disk.id)].origin
        # A crash between is harmless: what is decoupled already is not done again.
        again.open_disk("web").decouple()


# What stays


def test_what_was_fetched_is_there_after_closing_and_what_was_saved_after_a_crash(
    pool: Pool, regions: Regions, folder: Path
) -> None:
    pool.create_disk("web", source=regions.put("one", DATA)).pread(1, 0)
    pool.close()
    regions.reads.clear()
    with reopened(folder, regions) as again:
        assert again.open_disk("web").pread(MIB, 0) == DATA[:MIB]
        assert regions.reads == []
        again.open_disk("web").pread(1, MIB)
        again._engine.versions.backings.save()
        again.open_disk("web").pread(1, 4 * MIB)
        crash(again)
    regions.reads.clear()
    with reopened(folder, regions) as again:
        assert again.open_disk("web").pread(SIZE, 0) == DATA
    assert sum(length for _, length in regions.reads) == SIZE - 2 * MIB


@pytest.mark.parametrize("damage", ["bits", "header", "short", "long", "gone", "data gone", "data short"])
def test_a_bitmap_or_file_that_is_not_right_costs_fetches_only(
    pool: Pool, regions: Regions, folder: Path, damage: str
) -> None:
    pool.create_disk("web", source=regions.put("one", DATA)).pread(SIZE, 0)
    pool.close()
    present, data = folder / "pool" / "lazy" / "3.present", folder / "pool" / "lazy" / "3.data"
    stored = bytearray(present.read_bytes())
    if damage == "bits":
        stored[-9] ^= 1
    elif damage == "header":
        stored[100] ^= 1
    elif damage == "long":
        stored += b"\0"
    present.write_bytes(stored[:-1] if damage == "short" else stored)
    if damage == "gone":
        present.unlink()
    elif damage == "data gone":
        data.unlink()
    elif damage == "data short":
        os.truncate(data, 5)
    regions.reads.clear()
    if damage == "data gone":
        with reopened(folder, regions, read_only=True) as again, pytest.raises(SourceChangedError):
            again.open_disk("web").pread(1, 0)
    with reopened(folder, regions) as again:
        assert again.open_disk("web").pread(SIZE, 0) == DATA
    assert regions.fetched_bytes == SIZE


def test_a_failed_sync_is_followed_by_errors_and_never_by_wrong_bytes(
    pool: Pool, regions: Regions, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = pool.create_disk("web", source=regions.put("one", DATA))
    disk.pread(1, 0)
    image = image_of(disk)

    def fail(descriptor: int) -> None:
        raise OSError(5, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(image._medium, "sync", fail)
        pool._engine.versions.backings.save()
    with pytest.raises(SourceChangedError):
        disk.pread(1, 0)
    with pytest.raises((StoreError, SourceChangedError, NotFoundError)):
        disk.pread(1, MIB)
    pool.close()
    with reopened(folder, regions) as again:
        assert again.open_disk("web").pread(SIZE, 0) == DATA


def test_files_of_images_that_nobody_needs_go(pool: Pool, regions: Regions, folder: Path) -> None:
    lazy = folder / "pool" / "lazy"
    disk = pool.create_disk("web", source=regions.put("one", DATA))
    disk.pread(1, 0)
    pool._engine.versions.backings.save()
    snapshot = disk.snapshot("kept")
    disk.delete()
    pool.checkpoint()
    assert snapshot.pread(10, 4 * MIB) == DATA[4 * MIB : 4 * MIB + 10]
    snapshot.delete()
    # The log may be done again from the last checkpoint on.
    assert {path.suffix for path in lazy.iterdir()} == {".data", ".present", ".trace"}
    pool.checkpoint()
    assert [*lazy.iterdir()] == []
    (lazy / "99.data").write_bytes(b"left by a crash")
    pool.close()
    with reopened(folder, regions):
        assert [*lazy.iterdir()] == []


def test_pools_with_lazy_disks_are_marked_and_others_are_as_they_were(
    pool: Pool, regions: Regions, folder: Path
) -> None:
    where = str(folder / "pool" / "superblock")
    assert read(where)[0].must_read == 0
    disk = pool.create_disk("web", source=regions.put("one", DATA))
    assert read(where)[0].must_read == LAZY
    pool.close()
    assert read(where)[0].must_read == LAZY
    with reopened(folder, regions) as again:
        again.open_disk(disk.name).delete()
    assert read(where)[0].must_read == 0


def test_a_feature_that_is_not_known_is_refused(pool: Pool, regions: Regions, folder: Path) -> None:
    import dataclasses

    pool.close()
    path = folder / "pool" / "superblock"
    copy = dataclasses.replace(read(str(path))[0], must_read=2).encode()
    path.write_bytes((copy + bytes(4096 - len(copy))) * 2)
    with pytest.raises(UnsupportedFormatError):
        Pool.open(folder / "pool")


def test_a_snapshot_of_nothing_and_names_that_are_taken_are_refused(pool: Pool, regions: Regions) -> None:
    with pytest.raises(UsageError, match="0 bytes"):
        pool.create_disk("web", source=regions.put("empty", b""))
    with pytest.raises(UsageError, match="less than"):
        pool.create_disk("web", MIB, source=regions.put("one", DATA))
    disk = pool.create_disk("web", 2 * SIZE, source=Region("memory:region", "r" * 32, "one", BLOCK_BYTES))
    assert disk.pread(2 * SIZE, 0) == DATA + bytes(SIZE)
