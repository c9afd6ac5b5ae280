"""A disk and its snapshots as users hold them: reading, writing, arguments, errors that name the thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore.errors import (
    BusyError,
    NotFoundError,
    RefusedError,
    SourceChangedError,
    UsageError,
)
from snapcore.pool import Disk, Pool
from tests.support.pools import BLOCK_BYTES, MIB, SMALL_LOG_BYTES, quick_folder

BLOCK = BLOCK_BYTES


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    made = Pool.create(tmp_path / "pool", log_bytes=SMALL_LOG_BYTES, background=False)
    yield made
    made.close()


@pytest.fixture
def disk(pool: Pool) -> Disk:
    """10 blocks and 100 bytes, of which blocks 2 to 4 are written."""
    made = pool.create_disk("disk", 10 * BLOCK + 100)
    made.pwrite(b"abc" * BLOCK, 2 * BLOCK)
    return made


# Reading


def test_what_was_never_written_reads_as_zeros(disk: Disk) -> None:
    assert disk.pread(2 * BLOCK + 2, 0) == bytes(2 * BLOCK) + b"ab"


def test_a_read_ends_where_the_disk_ends(disk: Disk) -> None:
    buffer = bytearray(b"x" * 200)
    assert disk.pread_into(buffer, 10 * BLOCK + 50) == 50
    assert buffer == bytes(50) + b"x" * 150
    assert disk.pread_into(buffer, 10 * BLOCK + 100) == 0
    assert disk.pread_into(buffer, 1 << 60) == 0
    assert disk.pread(5, 1 << 40) == disk.pread(0, 0) == b""


def test_buffers_of_any_shape_are_filled_and_written(disk: Disk) -> None:
    grid = np.zeros((3, 4), dtype=np.uint32)
    assert disk.pread_into(grid, 2 * BLOCK) == 48
    assert grid.tobytes() == b"abc" * 16
    assert disk.pwrite(np.arange(6, dtype=np.int16), 7) == 12
    assert disk.pread(12, 7) == np.arange(6, dtype=np.int16).tobytes()
    assert disk.pwrite(memoryview(b"xyz")[1:], 0) == 2
    assert disk.pread(3, 0) == b"yz\0"


def test_many_reads_in_one_call(disk: Disk) -> None:
    rows = np.empty((3, 6), dtype=np.uint8)
    offsets = np.array([2 * BLOCK, 0, 10 * BLOCK + 94], dtype=np.int64)
    assert disk.pread_many(offsets, rows) == 18
    assert [row.tobytes() for row in rows] == [b"abcabc", bytes(6), bytes(6)]
    assert disk.pread_many(offsets[:0], rows[:0]) == 0
    assert disk.snapshot().pread_many(offsets, rows) == 18


def test_many_reads_must_all_lie_inside(disk: Disk) -> None:
    with pytest.raises(UsageError, match=r"disk 'disk'.*offset 41057 "):
        disk.pread_many(np.array([0, 10 * BLOCK + 97]), np.empty((2, 4), dtype=np.uint8))
    with pytest.raises(UsageError, match=r"disk 'disk': 1 offsets and 2 buffers"):
        disk.pread_many(np.array([0]), np.empty((2, 4), dtype=np.uint8))
    with pytest.raises(UsageError, match=r"disk 'disk'"):
        disk.pread_many(np.array([0], dtype=np.int32), np.empty((1, 4), dtype=np.uint8))
    with pytest.raises(UsageError, match=r"disk 'disk'"):
        disk.pread_many(np.array([-1]), np.empty((1, 4), dtype=np.uint8))


# Writing


def test_writes_of_nothing_do_nothing(disk: Disk) -> None:
    assert disk.pwrite(b"", 5) == 0
    disk.discard(10 * BLOCK + 100, 0)
    assert disk.extents().allocated.tolist() == [[2 * BLOCK, 3 * BLOCK]]


OUTSIDE: list[tuple[str, Callable[[Disk], object]]] = [
    ("a write across the end", lambda disk: disk.pwrite(b"12", 10 * BLOCK + 99)),
    ("a write behind the end", lambda disk: disk.pwrite(b"1", 10 * BLOCK + 100)),
    ("a discard across the end", lambda disk: disk.discard(0, 10 * BLOCK + 101)),
    ("zeros across the end", lambda disk: disk.write_zeroes(10 * BLOCK + 99, 2)),
    ("a negative offset of a write", lambda disk: disk.pwrite(b"1", -1)),
    ("a negative offset of a read", lambda disk: disk.pread_into(bytearray(1), -1)),
    ("a negative offset of a discard", lambda disk: disk.discard(-1, 5)),
    ("a negative length", lambda disk: disk.discard(5, -1)),
    ("an offset beyond all numbers", lambda disk: disk.pwrite(b"1", 1 << 80)),
    ("text", lambda disk: disk.pwrite("text", 0)),  # type: ignore[arg-type]
    ("memory with gaps", lambda disk: disk.pwrite(memoryview(b"abcdef")[::2], 0)),
    ("a target that cannot be written", lambda disk: disk.pread_into(b"abc", 0)),
    ("extents behind the end", lambda disk: disk.extents(10 * BLOCK + 101)),
    ("extents from below zero", lambda disk: disk.extents(-1)),
    ("a smaller size", lambda disk: disk.resize(10 * BLOCK)),
    ("more than 128 TiB", lambda disk: disk.resize((1 << 47) + 1)),
]


@pytest.mark.parametrize(("what", "doing"), OUTSIDE, ids=[what for what, _ in OUTSIDE])
def test_what_cannot_be_meant_is_refused_by_name_and_changes_nothing(
    disk: Disk, what: str, doing: Callable[[Disk], object]
) -> None:
    before = disk.pread(11 * BLOCK, 0), disk.extents().allocated.tolist(), disk.size_bytes
    with pytest.raises(UsageError, match="disk 'disk'"):
        doing(disk)
    assert (disk.pread(11 * BLOCK, 0), disk.extents().allocated.tolist(), disk.size_bytes) == before, what


def test_snapshots_cannot_be_written(disk: Disk) -> None:
    snapshot = disk.snapshot()
    assert not hasattr(snapshot, "pwrite")
    disk.pwrite(b"new", 2 * BLOCK)
    assert snapshot.pread(3, 2 * BLOCK) == b"abc"


@pytest.mark.parametrize("fua", [False, True])
def test_only_what_was_flushed_is_promised(tmp_path: Path, fua: bool) -> None:
    """A write with `fua` survives the end of the process, one to a new block without it does not."""
    pool = Pool.create(tmp_path / "other", background=False)
    disk = pool.create_disk("disk", MIB)
    assert disk.pwrite(b"kept", 100, fua=fua) == 4
    pool._engine.abandon()
    with Pool.open(tmp_path / "other", background=False) as again:
        assert again.open_disk("disk").pread(4, 100) == (b"kept" if fua else bytes(4))


def test_a_flush_of_one_disk_is_one_of_all(tmp_path: Path) -> None:
    pool = Pool.create(tmp_path / "other", background=False)
    one, two = pool.create_disk("one", MIB), pool.create_disk("two", MIB)
    one.pwrite(b"1", 0)
    two.pwrite(b"2", 0)
    one.flush()
    pool._engine.abandon()
    with Pool.open(tmp_path / "other", background=False) as again:
        assert [disk.pread(1, 0) for disk in again.disks()] == [b"1", b"2"]


# What is where


def test_extents_tell_apart_what_was_written_dropped_and_never_written(pool: Pool, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"i" * 6 * BLOCK)
    disk = pool.create_disk("over", 8 * BLOCK + 10, source=image)
    disk.pwrite(b"x", BLOCK + 5)
    disk.discard(3 * BLOCK, 2 * BLOCK)
    found = disk.extents()
    assert found.allocated.tolist() == [[BLOCK, BLOCK]]
    assert found.zero.tolist() == [[3 * BLOCK, 2 * BLOCK]]
    assert found.absent.tolist() == [[0, BLOCK], [2 * BLOCK, BLOCK], [5 * BLOCK, 3 * BLOCK + 10]]
    part = disk.extents(BLOCK + 1, 3 * BLOCK)
    assert part.allocated.tolist() == [[BLOCK + 1, BLOCK - 1]]
    assert part.zero.tolist() == [[3 * BLOCK, BLOCK + 1]]
    assert part.absent.tolist() == [[2 * BLOCK, BLOCK]]
    assert disk.data_extents().tolist() == [[0, 3 * BLOCK], [5 * BLOCK, 3 * BLOCK + 10]]


def test_discarded_blocks_of_a_disk_without_an_image_are_absent_again(disk: Disk) -> None:
    disk.discard(0, 4 * BLOCK)
    found = disk.extents()
    assert found.allocated.tolist() == disk.data_extents().tolist() == [[4 * BLOCK, BLOCK]]
    assert found.zero.tolist() == []


@given(
    edits=st.lists(st.tuples(st.booleans(), st.integers(0, 39_000), st.integers(1, 9_000)), min_size=1, max_size=12),
    size=st.integers(1, 40_000),
)
def test_a_disk_is_bytes_at_offsets(edits: list[tuple[bool, int, int]], size: int) -> None:
    """Any writes and zeros at any places: what is read is what a row of bytes would hold."""
    folder = quick_folder()
    with Pool.create(folder / "pool", background=False) as pool:
        disk = pool.create_disk("disk", size)
        wanted = bytearray(size)
        for number, (writes, offset, length) in enumerate(edits):
            start = offset % size
            stop = min(size, start + length)
            if writes:
                wanted[start:stop] = bytes([number + 1]) * (stop - start)
                disk.pwrite(wanted[start:stop], start)
            else:
                wanted[start:stop] = bytes(stop - start)
                disk.write_zeroes(start, stop - start)
            if number % 3 == 2:
                disk.snapshot()
        assert disk.pread(size, 0) == wanted


# Size


def test_what_a_disk_grows_by_reads_as_zeros(disk: Disk) -> None:
    disk.pwrite(b"e" * 100, 10 * BLOCK)
    disk.resize(12 * BLOCK)
    assert disk.size_bytes == 12 * BLOCK
    assert disk.pread(3 * BLOCK, 10 * BLOCK) == b"e" * 100 + bytes(2 * BLOCK - 100)
    disk.pwrite(b"z", 12 * BLOCK - 1)


def test_a_rollback_takes_the_size_back_too(disk: Disk) -> None:
    snapshot = disk.snapshot()
    disk.resize(20 * BLOCK)
    disk.rollback(snapshot)
    assert disk.size_bytes == 10 * BLOCK + 100
    with pytest.raises(UsageError):
        disk.pwrite(b"1", 11 * BLOCK)


# Going back


def test_newer_snapshots_outlive_a_rollback(disk: Disk) -> None:
    old = disk.snapshot()
    disk.pwrite(b"new", 0)
    new = disk.snapshot()
    disk.rollback(old)
    assert disk.pread(3, 0) == bytes(3)
    assert new.pread(3, 0) == b"new"
    disk.rollback(new)
    assert disk.pread(3, 0) == b"new"


def test_a_rollback_to_another_disks_snapshot_is_refused(pool: Pool, disk: Disk) -> None:
    other = pool.create_disk("other", MIB).snapshot("theirs")
    with pytest.raises(RefusedError, match=r"snapshot theirs is of disk 'other', not of 'disk'"):
        disk.rollback(other)


@pytest.mark.parametrize("doing", ["rollback", "reset", "delete"])
def test_an_attached_disk_is_not_pulled_away_and_the_holder_is_named(disk: Disk, doing: str) -> None:
    snapshot = disk.snapshot()
    act = {"rollback": lambda: disk.rollback(snapshot), "reset": disk.reset, "delete": disk.delete}[doing]
    with disk.attached("nbd at /dev/nbd3"), disk.attached("qemu 77"):
        with pytest.raises(BusyError, match=r"disk 'disk': it is in use by nbd at /dev/nbd3, qemu 77"):
            act()
        assert disk.pread(3, 2 * BLOCK) == b"abc"
        disk.snapshot()
        disk.clone("clone")
    act()


def test_a_holder_that_attached_twice_must_leave_twice(disk: Disk) -> None:
    with disk.attached("one"):
        with disk.attached("one"):
            pass
        with pytest.raises(BusyError, match="in use by one;"):
            disk.reset()
    disk.reset()


def test_reset_goes_back_to_where_a_disk_came_from(pool: Pool, disk: Disk, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"image" * 1000)
    snapshot = disk.snapshot()
    over = pool.create_disk("over", source=image)
    made = pool.create_disk("made", source=snapshot)
    for one in (over, made, disk):
        one.pwrite(b"changed", 0)
        one.reset()
    assert over.pread(5000, 0) == b"image" * 1000
    assert made.pread(11 * BLOCK, 0) == snapshot.pread(11 * BLOCK, 0)
    assert disk.pread(11 * BLOCK, 0) == bytes(10 * BLOCK + 100)


def test_reset_is_refused_where_there_is_nothing_to_go_back_to(pool: Pool, disk: Disk) -> None:
    snapshot = disk.snapshot()
    made, clone = pool.create_disk("made", source=snapshot), disk.clone("clone")
    snapshot.delete()
    with pytest.raises(RefusedError, match=rf"snapshot {snapshot.id} that disk 'made' came from was deleted"):
        made.reset()
    with pytest.raises(RefusedError, match=r"disk 'clone' is a clone of a live disk"):
        clone.reset()


# Images


def test_an_image_that_changed_is_noticed_and_nothing_of_it_handed_out(pool: Pool, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"a" * 3 * BLOCK)
    disk = pool.create_disk("over", source=image)
    disk.pwrite(b"own" + bytes(BLOCK - 3), 0)
    assert disk.pread(1, BLOCK) == b"a"
    image.write_bytes(b"b" * 3 * BLOCK + b"longer")
    with pytest.raises(SourceChangedError, match=r"disk 'over': the image .*image that it reads from was changed"):
        disk.pread(1, BLOCK)
    assert disk.pread(3, 0) == b"own"


def test_an_image_that_is_gone_is_noticed_when_it_is_needed(pool: Pool, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"a" * 3 * BLOCK)
    pool.create_disk("over", source=image).pwrite(b"own" + bytes(BLOCK - 3), 0)
    pool.close()
    image.unlink()
    with Pool.open(pool.path, background=False) as again:
        disk = again.open_disk("over")
        assert disk.pread(3, 0) == b"own"
        with pytest.raises(SourceChangedError, match="image"):
            disk.pread(1, BLOCK)


@pytest.mark.parametrize("kind", ["folder", "empty", "missing"])
def test_what_is_no_image_goes_under_no_disk(pool: Pool, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    with pytest.raises(NotFoundError if kind == "missing" else UsageError, match=str(path)):
        pool.create_disk("over", source=path)
    assert pool.disks() == []


# What is gone


GONE: list[tuple[str, Callable[[Pool, Disk], object]]] = [
    ("pread", lambda pool, disk: disk.pread(1, 0)),
    ("pwrite", lambda pool, disk: disk.pwrite(b"1", 0)),
    ("discard", lambda pool, disk: disk.discard(0, 1)),
    ("extents", lambda pool, disk: disk.extents()),
    ("snapshot", lambda pool, disk: disk.snapshot()),
    ("clone", lambda pool, disk: disk.clone("clone")),
    ("reset", lambda pool, disk: disk.reset()),
    ("resize", lambda pool, disk: disk.resize(MIB)),
    ("delete", lambda pool, disk: disk.delete()),
    ("rename", lambda pool, disk: pool.rename_disk(disk, "name")),
    ("diff", lambda pool, disk: pool.diff(None, disk)),
    ("unique", lambda pool, disk: pool.unique_bytes([disk])),
    ("group", lambda pool, disk: pool.snapshot_group([pool.open_disk("other"), disk])),
]


@pytest.mark.parametrize(("what", "doing"), GONE, ids=[what for what, _ in GONE])
@pytest.mark.parametrize("clones", [0, 2])
def test_a_disk_that_was_deleted_says_so(
    pool: Pool, disk: Disk, what: str, doing: Callable[[Pool, Disk], object], clones: int
) -> None:
    """Whether or not others still share its blocks."""
    pool.create_disk("other", MIB)
    for number in range(clones):
        disk.clone(f"clone-{number}")
    disk.delete()
    with pytest.raises(NotFoundError, match=r"disk 'disk'.* was deleted"):
        doing(pool, disk)
    assert pool.snapshots() == [], what
    assert disk.name == "disk"


def test_a_snapshot_that_was_deleted_says_so(pool: Pool, disk: Disk) -> None:
    snapshot, later = disk.snapshot("gone"), disk.snapshot("later")
    snapshot.delete()
    for doing in (
        lambda: snapshot.pread(1, 0),
        snapshot.extents,
        snapshot.delete,
        lambda: disk.rollback(snapshot),
        lambda: pool.diff(snapshot, later),
        lambda: pool.diff(later, snapshot),
        lambda: pool.unique_bytes([snapshot]),
        lambda: pool.create_disk("copy", source=snapshot),
        lambda: pool.delete_snapshots([later, snapshot]),
    ):
        with pytest.raises(NotFoundError, match=f"gone|'{snapshot.id}'"):
            doing()
    assert [found.name for found in pool.snapshots()] == ["later"], "several are deleted all or not at all"
