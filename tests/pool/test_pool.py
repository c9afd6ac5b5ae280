"""A pool as users hold it: making, opening, owning, names and ids, groups, deletions, differences, usage."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapcore.errors import (
    BusyError,
    DamagedError,
    ExistsError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from snapcore.extents import total_bytes
from snapcore.pool import Disk, Pool
from tests.support.pools import BLOCK_BYTES, MIB, SMALL_LOG_BYTES

BLOCK = BLOCK_BYTES


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    made = Pool.create(tmp_path / "pool", log_bytes=SMALL_LOG_BYTES, background=False)
    yield made
    made.close()


# Making and opening


def test_a_pool_is_made_in_an_empty_folder_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    Pool.create(tmp_path / "empty").close()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for taken in ("empty", "full"):
        with pytest.raises(ExistsError, match=f"{taken} is not empty"):
            Pool.create(tmp_path / taken)
    with pytest.raises(NotFoundError, match="deep"):
        Pool.create(tmp_path / "no" / "deep")


@pytest.mark.parametrize("arguments", [{"log_bytes": 65535}, {"log_bytes": 65536 + 1}, {"limit_bytes": -1}])
def test_a_pool_of_a_shape_that_none_has_is_refused(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="log has at least 65,536 bytes"):
        Pool.create(tmp_path / "pool", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "pool").exists()


def test_what_is_no_pool_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no pool; make one with `snapcore pool init"):
        Pool.open(tmp_path)


def test_a_superblock_of_which_no_copy_is_whole_is_damage(pool: Pool) -> None:
    pool.close()
    Path(pool.path, "superblock").write_bytes(bytes(8192))
    with pytest.raises(DamagedError, match="superblock"):
        Pool.open(pool.path)


def test_a_pool_survives_being_closed_and_opened_many_times(tmp_path: Path) -> None:
    Pool.create(tmp_path / "pool").close()
    for step in range(5):
        with Pool.open(tmp_path / "pool") as pool:
            assert [disk.pread(4, 0) for disk in pool.disks()] == [b"data"] * step
            pool.create_disk(f"disk-{step}", MIB).pwrite(b"data", 0)


def test_a_pool_that_was_closed_says_so(pool: Pool) -> None:
    disk = pool.create_disk("disk", MIB)
    snapshot = disk.snapshot("cut")
    pool.close()
    pool.close()
    doings: list[Callable[[], object]] = [
        pool.disks,
        pool.snapshots,
        pool.usage,
        pool.flush,
        pool.checkpoint,
        disk.flush,
        disk.snapshot,
        disk.delete,
        disk.extents,
        snapshot.extents,
        lambda: pool.create_disk("other", MIB),
        lambda: pool.open_disk("disk"),
        lambda: pool.snapshot("cut"),
        lambda: pool.diff(snapshot, disk),
        lambda: pool.unique_bytes([snapshot]),
        lambda: disk.pread(1, 0),
        lambda: disk.pwrite(b"1", 0),
        lambda: disk.discard(0, 1),
        lambda: snapshot.pread(1, 0),
        lambda: setattr(pool, "limit_bytes", MIB),
    ]
    for doing in doings:
        with pytest.raises(NotFoundError, match="closed"):
            doing()


# Owning

_OPEN = """
import sys
from snapcore.errors import Error
from snapcore.pool import Pool
try:
    Pool.open(sys.argv[1], read_only=sys.argv[2] == "read").close()
    print("opened")
except Error as error:
    print(type(error).__name__, str(error))
"""


def _elsewhere(path: str, mode: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", _OPEN, path, mode], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("mode", ["read", "write"])
def test_an_owned_pool_is_opened_by_nobody_else(pool: Pool, mode: str) -> None:
    with pytest.raises(BusyError, match=f"the pool {pool.path} is open elsewhere"):
        Pool.open(pool.path, read_only=mode == "read")
    assert _elsewhere(pool.path, mode).startswith(f"BusyError the pool {pool.path} is open elsewhere")
    pool.close()
    assert _elsewhere(pool.path, mode) == "opened\n"


def test_many_read_a_pool_together_while_nobody_owns_it(pool: Pool) -> None:
    pool.create_disk("disk", MIB).pwrite(b"data", 0)
    pool.close()
    with Pool.open(pool.path, read_only=True) as one, Pool.open(pool.path, read_only=True) as two:
        assert one.open_disk("disk").pread(4, 0) == two.open_disk("disk").pread(4, 0) == b"data"
        assert _elsewhere(pool.path, "read") == "opened\n"
        assert _elsewhere(pool.path, "write").startswith("BusyError")


def test_nothing_changes_in_a_pool_that_was_opened_for_reading(pool: Pool) -> None:
    disk = pool.create_disk("disk", MIB)
    disk.pwrite(b"data" * BLOCK, 0)
    snapshot = disk.snapshot("cut")
    pool.close()
    before = {path.name: path.read_bytes() for path in Path(pool.path).iterdir()}
    with Pool.open(pool.path, read_only=True) as again:
        assert again.read_only
        disk, snapshot = again.open_disk("disk"), again.snapshot("cut")
        doings: list[Callable[[], object]] = [
            again.flush,
            again.checkpoint,
            disk.snapshot,
            disk.reset,
            disk.delete,
            snapshot.delete,
            lambda: disk.pwrite(b"1", 0),
            lambda: disk.pwrite(b"1", MIB - 1),
            lambda: disk.discard(0, MIB),
            lambda: disk.write_zeroes(5, 5),
            lambda: disk.rollback(snapshot),
            lambda: disk.resize(2 * MIB),
            lambda: disk.clone("clone"),
            lambda: again.create_disk("other", MIB),
            lambda: again.rename_disk(disk, "name"),
            lambda: setattr(again, "limit_bytes", MIB),
        ]
        for doing in doings:
            with pytest.raises(RefusedError, match="read"):
                doing()
        assert disk.pread(4, 0) == snapshot.pread(4, 0) == b"data"
        assert again.diff(snapshot, disk).tolist() == []
        assert again.usage().allocated_bytes == 4 * BLOCK
        assert again.unique_bytes([disk, snapshot]) == 4 * BLOCK
    assert {path.name: path.read_bytes() for path in Path(pool.path).iterdir()} == before


def test_reading_after_a_crash_shows_what_was_flushed(pool: Pool) -> None:
    disk = pool.create_disk("disk", MIB)
    disk.pwrite(b"data", 0, fua=True)
    pool._engine.abandon()
    before = {path.name: path.read_bytes() for path in Path(pool.path).iterdir()}
    with Pool.open(pool.path, read_only=True) as again:
        assert again.open_disk("disk").pread(4, 0) == b"data"
    assert {path.name: path.read_bytes() for path in Path(pool.path).iterdir()} == before
    pool._closed = True


# Names and ids


@pytest.mark.parametrize("name", ["", "1disk", "a/b", "a\nb", "x" * 129, "-x", "_x", " x"])
def test_a_name_begins_with_a_letter_and_has_no_slash(pool: Pool, name: str) -> None:
    disk = pool.create_disk("disk", MIB)
    for doing in (
        lambda: pool.create_disk(name, MIB),
        lambda: disk.clone(name),
        lambda: disk.snapshot(name),
        lambda: pool.rename_disk(disk, name),
    ):
        with pytest.raises(UsageError, match="a letter first"):
            doing()
    assert [found.name for found in pool.disks()] == ["disk"]
    assert pool.snapshots() == []


@pytest.mark.parametrize("name", ["d", "Datenträger", "x" * 128, "with spaces (2)", "диск"])
def test_names_of_all_alphabets_are_kept(pool: Pool, name: str) -> None:
    disk = pool.create_disk(name, MIB)
    disk.snapshot(name)
    pool.close()
    with Pool.open(pool.path, background=False) as again:
        assert again.open_disk(name).name == again.snapshot(name).name == name


@pytest.mark.parametrize("size", [0, -1, (1 << 47) + 1, None])
def test_a_disk_has_a_size(pool: Pool, size: int | None) -> None:
    with pytest.raises(UsageError, match="disk 'disk'"):
        pool.create_disk("disk", size)


def test_a_disk_of_a_source_is_no_smaller(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"i" * MIB)
    disk = pool.create_disk("disk", MIB)
    for source in (disk, disk.snapshot(), tmp_path / "image"):
        with pytest.raises(UsageError, match="1048575 bytes are less than the 1048576"):
            pool.create_disk("copy", MIB - 1, source=source)
        assert pool.create_disk("copy", MIB + 1, source=source).size_bytes == MIB + 1
        pool.delete_disk("copy")
        assert pool.create_disk("copy", source=source).size_bytes == MIB
        pool.delete_disk("copy")


def test_two_disks_have_no_common_name(pool: Pool) -> None:
    disk = pool.create_disk("disk", MIB)
    other = pool.create_disk("other", MIB)
    for doing in (
        lambda: pool.create_disk("disk", MIB),
        lambda: other.clone("disk"),
        lambda: pool.rename_disk(other, "disk"),
    ):
        with pytest.raises(ExistsError, match="there is a disk 'disk'"):
            doing()
    disk.delete()
    assert pool.create_disk("disk", MIB).id != disk.id, "ids are never used twice"


def test_a_disk_is_found_by_name_and_id(pool: Pool) -> None:
    disk = pool.create_disk("disk", MIB)
    assert pool.open_disk("disk").id == pool.open_disk(disk.id).id == disk.id
    with pytest.raises(NotFoundError, match=r"no disk 'disc' in .*disk list"):
        pool.open_disk("disc")


def test_a_snapshot_is_found_by_object_id_number_and_name(pool: Pool) -> None:
    disk = pool.create_disk("disk", MIB)
    snapshot = disk.snapshot("cut")
    for ref in (snapshot, snapshot.id, int(snapshot.id), "cut"):
        assert pool.snapshot(ref).id == snapshot.id
    for missing in ("cat", disk.id, "999", 999):
        with pytest.raises(NotFoundError, match=rf"no snapshot '{missing}' in .*snapshot list"):
            pool.snapshot(missing)


def test_a_name_that_several_snapshots_have_is_not_guessed(pool: Pool) -> None:
    one, two = pool.create_disk("one", MIB), pool.create_disk("two", MIB)
    first, second = one.snapshot("cut"), two.snapshot("cut")
    with pytest.raises(UsageError, match=rf"'cut': {first.id} \(of one\), {second.id} \(of two\); name one by its id"):
        pool.delete_snapshot("cut")
    with pytest.raises(UsageError, match="several snapshots"):
        pool.create_disk("copy", source="cut")
    two.pwrite(b"new", 0)
    two.rollback("cut")
    assert two.pread(3, 0) == bytes(3), "a disk's own go first"
    pool.delete_snapshot(second.id)
    assert pool.snapshot("cut").id == first.id
    with pytest.raises(ExistsError, match="disk 'one' has a snapshot 'cut' already"):
        one.snapshot("cut")


def test_a_source_is_a_snapshot_a_disk_or_an_image_in_this_order(pool: Pool, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"image")
    disk = pool.create_disk("disk", MIB)
    disk.pwrite(b"cut", 0)
    disk.snapshot("cut")
    disk.pwrite(b"now", 0)
    assert pool.create_disk("a", source="cut").pread(3, 0) == b"cut"
    assert pool.create_disk("b", source="disk").pread(3, 0) == b"now"
    assert pool.create_disk("c", source=str(image)).pread(9, 0) == b"image"
    assert pool.create_disk("d", source=image).size_bytes == 5
    with pytest.raises(NotFoundError, match="no snapshot, disk or image 'nothing'"):
        pool.create_disk("e", source="nothing")


def test_things_of_another_pool_are_refused(pool: Pool, tmp_path: Path) -> None:
    disk = pool.create_disk("disk", MIB)
    with Pool.create(tmp_path / "other", background=False) as other:
        # Each pool counts for itself: ids that are the same would be found twice.
        other.create_disk("first", MIB)
        theirs = other.create_disk("disk", MIB)
        snapshot = theirs.snapshot()
        for doing in (
            lambda: disk.rollback(snapshot),
            lambda: pool.delete_snapshot(snapshot),
            lambda: pool.delete_disk(theirs),
            lambda: pool.snapshot_group([disk, theirs]),
            lambda: pool.create_disk("copy", source=snapshot),
            lambda: pool.create_disk("copy", source=theirs),
            lambda: pool.diff(snapshot, disk),
            lambda: pool.unique_bytes([theirs]),
        ):
            with pytest.raises(UsageError, match="of another pool"):
                doing()


def test_a_renamed_disk_keeps_its_snapshots_and_they_its_old_name(pool: Pool) -> None:
    disk = pool.create_disk("old", MIB)
    snapshot = disk.snapshot("cut")
    pool.rename_disk(disk, "new")
    assert pool.open_disk("new").id == disk.id
    assert snapshot.disk == "old" and snapshot.disk_id == disk.id
    assert [found.id for found in pool.snapshots("new")] == [snapshot.id]
    disk.rollback(snapshot)


# Groups


def test_a_group_is_cut_of_all_its_disks(pool: Pool) -> None:
    disks = [pool.create_disk(f"disk-{number}", MIB) for number in range(3)]
    for disk in disks:
        disk.pwrite(disk.id.encode(), 0)
    group = pool.snapshot_group([disks[2], "disk-0"], "nightly")
    assert [(found.disk, found.name) for found in group] == [("disk-2", "nightly"), ("disk-0", "nightly")]
    assert len({(found.group, found.created_ns) for found in group}) == 1 and group[0].group is not None
    assert [found.pread(1, 0) for found in group] == [disks[2].id.encode(), disks[0].id.encode()]
    assert pool.snapshot_group([disks[1]])[0].group is None


@pytest.mark.parametrize("what", ["missing", "deleted", "named", "twice", "none"])
def test_when_one_member_fails_nothing_of_a_group_is_cut(pool: Pool, what: str) -> None:
    disks: list[Disk | str] = [pool.create_disk(f"disk-{number}", MIB) for number in range(3)]
    before: list[str] = []
    if what == "missing":
        disks.append("disk-9")
    elif what == "deleted":
        pool.delete_disk(disks[1])
    elif what == "named":
        before.append(pool.snapshot_group([disks[2]], "group")[0].id)
    else:
        disks = [*disks, "disk-0"] if what == "twice" else []
    expected = {"missing": NotFoundError, "deleted": NotFoundError, "named": ExistsError}.get(what, UsageError)
    with pytest.raises(expected):
        pool.snapshot_group(disks, "group")
    assert [found.id for found in pool.snapshots()] == before


def test_a_group_has_at_most_128_disks(pool: Pool) -> None:
    disks = [pool.create_disk(f"disk-{number}", BLOCK) for number in range(129)]
    assert len(pool.snapshot_group(disks[:128])) == 128
    with pytest.raises(UsageError, match="1 to 128"):
        pool.snapshot_group(disks)


# Deleting


def test_what_was_deleted_is_not_deleted_again(pool: Pool) -> None:
    disk = pool.create_disk("disk", MIB)
    snapshot = disk.snapshot("cut")
    pool.delete_snapshot("cut")
    for ref in (snapshot, snapshot.id, "cut"):
        with pytest.raises(NotFoundError):
            pool.delete_snapshot(ref)
    pool.delete_disk("disk")
    for thing in (disk, disk.id, "disk"):
        with pytest.raises(NotFoundError):
            pool.delete_disk(thing)


def test_several_snapshots_are_deleted_all_or_none(pool: Pool) -> None:
    disk = pool.create_disk("disk", MIB)
    cuts = [disk.snapshot(f"cut-{number}") for number in range(4)]
    with pytest.raises(NotFoundError):
        pool.delete_snapshots(["cut-0", cuts[1], "cut-9"])
    assert len(pool.snapshots()) == 4
    pool.delete_snapshots([])
    pool.delete_snapshots(["cut-0", cuts[1].id, cuts[1], cuts[3]])
    assert [found.name for found in pool.snapshots()] == ["cut-2"]


def test_snapshots_outlive_their_disk_and_remember_it(pool: Pool) -> None:
    disk = pool.create_disk("disk", MIB)
    disk.pwrite(b"data", 0)
    snapshot = disk.snapshot("cut")
    disk.delete()
    pool.close()
    with Pool.open(pool.path, background=False) as again:
        found = again.snapshot("cut")
        assert (found.disk, found.disk_id, found.pread(4, 0)) == ("disk", snapshot.disk_id, b"data")
        assert again.create_disk("disk", source=found).pread(4, 0) == b"data"


# Differences and usage


def test_a_difference_is_exact_to_the_block_and_goes_both_ways(pool: Pool) -> None:
    disk = pool.create_disk("disk", 10 << 40)
    disk.pwrite(b"a" * 3 * BLOCK, 5 << 40)
    first = disk.snapshot("first")
    disk.pwrite(b"b", (5 << 40) + BLOCK)
    disk.pwrite(b"c", 9 << 40)
    second = disk.snapshot("second")
    disk.discard(5 << 40, 2 * BLOCK)
    changed = [[(5 << 40) + BLOCK, BLOCK], [9 << 40, BLOCK]]
    assert pool.diff(first, second).tolist() == pool.diff("second", first.id).tolist() == changed
    assert pool.diff(second, disk).tolist() == [[5 << 40, 2 * BLOCK]]
    assert pool.diff(first, "disk").tolist() == [[5 << 40, 2 * BLOCK], [9 << 40, BLOCK]]
    assert pool.diff(None, first).tolist() == [[5 << 40, 3 * BLOCK]]
    assert pool.diff(first, first).tolist() == []


def test_a_difference_can_be_asked_for_in_parts(pool: Pool) -> None:
    disk = pool.create_disk("disk", 4 * MIB)
    first = disk.snapshot()
    for at in range(0, 4 * MIB, 4 * BLOCK):
        disk.pwrite(b"x", at)
    whole = pool.diff(first, disk)
    assert len(whole) == 256
    parts = [pool.diff(first, disk, start, start + MIB).tolist() for start in range(0, 4 * MIB, MIB)]
    assert [row for part in parts for row in part] == whole.tolist()
    assert pool.diff(first, disk, 10, 20).tolist() == [[10, 10]]
    assert pool.diff(first, disk, 1 << 50).tolist() == []
    with pytest.raises(UsageError, match="not negative"):
        pool.diff(first, disk, -1)


def test_versions_of_no_common_origin_are_not_compared(pool: Pool) -> None:
    one, two = pool.create_disk("one", MIB), pool.create_disk("two", MIB)
    with pytest.raises(UsageError, match="'one' and 'two' are of no common origin"):
        pool.diff(one, two)
    with pytest.raises(NotFoundError, match="no snapshot or disk 'three'"):
        pool.diff(one, "three")


def test_usage_tells_what_each_version_takes(pool: Pool) -> None:
    disk = pool.create_disk("disk", MIB)
    disk.pwrite(b"a" * 10 * BLOCK, 0)
    disk.snapshot("cut")
    disk.pwrite(b"b" * 4 * BLOCK, 0)
    pool.create_disk("other", MIB).pwrite(b"c", 0)
    usage = pool.usage()
    assert {row.name: (row.kind, row.mapped_bytes // BLOCK, row.unique_bytes // BLOCK) for row in usage.versions} == {
        "disk": ("disk", 10, 4),
        "other": ("disk", 1, 1),
        "cut": ("snapshot", 10, 4),
    }
    assert usage.allocated_bytes == 15 * BLOCK
    assert usage.free_bytes is None and usage.limit_bytes == 0
    assert usage.log_bytes == SMALL_LOG_BYTES > usage.log_used_bytes > 0
    assert pool.unique_bytes(["disk", "cut"]) == 14 * BLOCK
    assert pool.unique_bytes([]) == 0
    assert total_bytes(pool.diff("cut", "disk")) == 4 * BLOCK
