"""Images into a pool and versions out of it: the same bytes, nothing for zeros, nothing left of what did not end."""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import Buffer

from snapcore import extents
from snapcore.errors import (
    BusyError,
    CancelledError,
    Error,
    ExistsError,
    NotFoundError,
    OutOfSpaceError,
    ReadError,
    RefusedError,
    SourceChangedError,
    UsageError,
)
from snapcore.extents import Extents
from snapcore.persist import Medium
from snapcore.pool import Pool
from snapcore.progress import Progress
from snapcore.repository import Repository
from snapcore.source import open_source
from tests.support.loop import file_system, loop_device
from tests.support.pools import quick_folder
from tests.support.sparse import SparseDisk, data_bytes, read_sparse
from tests.support.tools import needs

BLOCK = 4096
MIB = 1 << 20
SPAN = 4 * MIB
SIZE = 4 * SPAN + 1234


@pytest.fixture
def folder() -> Iterator[Path]:
    made = quick_folder()
    yield made
    shutil.rmtree(made)


@pytest.fixture
def pool(folder: Path) -> Iterator[Pool]:
    with Pool.create(folder / "pool", background=False) as made:
        yield made


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Five spans: data, a hole, zeros, data of which some blocks are zero, an end within a block."""
    path = tmp_path / "image"
    random_ = random.Random(1)
    with path.open("xb") as file:
        file.write(random_.randbytes(MIB))
        file.seek(2 * SPAN)
        file.write(bytes(MIB))
        file.seek(3 * SPAN - BLOCK)
        for _ in range(40):
            file.write(random_.randbytes(BLOCK) + bytes(BLOCK))
        file.seek(SIZE - 100)
        file.write(b"end")
        file.truncate(SIZE)
    return path


@st.composite
def disks(draw: st.DrawFn) -> SparseDisk:
    """Of any size up to three spans, with writes of any place and length, zeros among them."""
    size = draw(st.integers(1, 3 * SPAN) | st.integers(1, 3 * BLOCK))
    disk = SparseDisk(size)
    for _ in range(draw(st.integers(0, 6))):
        offset = draw(st.integers(0, size - 1) | st.just(size - 1))
        length = draw(st.integers(1, 5 * BLOCK))
        byte = draw(st.integers(0, 255))
        disk.write(offset, bytes([byte]) * min(length, size - offset))
    return disk


def write(path: Path, disk: SparseDisk) -> Path:
    """The disk as an image file; pages that are all zero are holes."""
    with path.open("wb") as file:
        for number, page in disk.pages.items():
            file.seek(number * BLOCK)
            file.write(page)
        file.truncate(disk.size_bytes)
    return path


def allocated(rows: Extents) -> set[int]:
    """Numbers of the blocks in extents."""
    return {
        number for offset, length in rows.tolist() for number in range(offset // BLOCK, -(-(offset + length) // BLOCK))
    }


@given(disk=disks(), before=disks())
def test_what_goes_in_comes_out_and_only_blocks_that_are_not_zero_take_space(
    disk: SparseDisk, before: SparseDisk
) -> None:
    folder = quick_folder()
    try:
        with Pool.create(folder / "pool", background=False, log_bytes=65536) as pool:
            made = pool.import_image("d", write(folder / "image", disk))
            assert (made.name, made.size_bytes) == ("d", disk.size_bytes)
            assert allocated(made.extents().allocated) == set(disk.pages)
            assert made.pread(disk.size_bytes, 0) == disk.read(0, disk.size_bytes)
            assert pool.usage().allocated_bytes == len(disk.pages) * BLOCK
            made.export(folder / "new")
            assert read_sparse(folder / "new") == disk
            assert data_bytes(folder / "new") <= len(disk.pages) * BLOCK
            target = write(folder / "existing", before)
            done = made.export(target, in_place=True)
            assert read_sparse(target) == disk
            # Of a page that the end of a file cuts no file system makes a hole.
            assert data_bytes(target) <= len(disk.pages) * BLOCK + disk.size_bytes % BLOCK
            numbers = {n for n in disk.pages.keys() | before.pages.keys() if n * BLOCK < disk.size_bytes}
            kept = before.copy()
            kept.resize(disk.size_bytes)
            differing = [n for n in numbers if disk.pages.get(n) != kept.pages.get(n)]
            assert done.written_bytes == sum(min(BLOCK, disk.size_bytes - n * BLOCK) for n in differing)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("threads", [1, 5])
def test_the_callers_threads_do_the_work_and_change_nothing(
    pool: Pool, image: Path, tmp_path: Path, threads: int
) -> None:
    with ThreadPoolExecutor(threads) as hands:
        made = pool.import_image("d", image, executor=hands)
        made.export(tmp_path / "out", executor=hands)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_disk_may_be_longer_than_its_image_but_not_shorter(pool: Pool, image: Path) -> None:
    made = pool.import_image("d", image, size_bytes=SIZE + 5000)
    assert made.pread(SIZE + 5000, 0) == image.read_bytes() + bytes(5000)
    with pytest.raises(UsageError, match="less than"):
        pool.import_image("e", image, size_bytes=SIZE - 1)
    assert [disk.name for disk in pool.disks()] == ["d"]


def test_a_snapshot_of_another_pool_can_be_imported(pool: Pool, image: Path, folder: Path) -> None:
    with Pool.create(folder / "other", background=False) as other:
        source = other.import_image("d", image)
        snapshot = source.snapshot()
        source.pwrite(b"later", 0)
        made = pool.import_image("copy", snapshot)
    assert made.pread(SIZE, 0) == image.read_bytes()


def test_a_repository_takes_a_snapshot_and_is_told_what_changed_by_the_pool(
    pool: Pool, image: Path, tmp_path: Path
) -> None:
    repository = Repository.create(tmp_path / "repository")
    disk = pool.import_image("d", image)
    first = disk.snapshot()
    disk.pwrite(b"x" * 10, 2 * SPAN)
    disk.write_zeroes(0, BLOCK)
    second = disk.snapshot()
    repository.snapshot(first, disk="d")
    taken = repository.snapshot(second, disk="d", changed=pool.diff(first, second))
    assert taken.read_bytes < SPAN
    repository.restore(taken.snapshot, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == disk.pread(SIZE, 0)


class Watching(Medium):
    """Knows what was written and not synced."""

    def __init__(self) -> None:
        self.written = 0
        self.unsynced: set[int] = set()

    def write_at(self, descriptor: int, buffers: Sequence[Buffer], offset_bytes: int) -> int:
        self.written += 1
        self.unsynced.add(descriptor)
        return super().write_at(descriptor, buffers, offset_bytes)

    def sync(self, descriptor: int) -> None:
        self.unsynced.discard(descriptor)
        super().sync(descriptor)


def test_an_imported_disk_is_durable_on_return(folder: Path, image: Path) -> None:
    medium = Watching()
    with Pool.create(folder / "pool", medium=medium, background=False) as pool:
        before = medium.written
        pool.import_image("d", image)
        assert medium.written > before and medium.unsynced == set()


def test_an_imported_disk_survives_a_crash(folder: Path, image: Path) -> None:
    pool = Pool.create(folder / "pool", background=False)
    pool.import_image("d", image)
    pool._engine.abandon()
    with Pool.open(pool.path, background=False) as again:
        assert again.open_disk("d").pread(SIZE, 0) == image.read_bytes()


def test_progress_goes_up_to_the_end(pool: Pool, image: Path, tmp_path: Path) -> None:
    steps: list[Progress] = []
    pool.import_image("d", image, progress=steps.append).export(tmp_path / "out", progress=steps.append)
    for stage in ("import", "export"):
        done = [step.done_bytes for step in steps if step.stage == stage]
        assert len(done) > 3 and done == sorted(done) and (done[0], done[-1]) == (0, SIZE)
        assert {step.total_bytes for step in steps if step.stage == stage} == {SIZE}


# What ends an import, and what is left of it


def nothing_is_left(pool: Pool) -> None:
    assert pool.disks() == []
    pool.checkpoint()
    usage = pool.usage()
    assert (usage.allocated_bytes, usage.held_bytes, usage.versions) == (0, 0, [])


def steps_of(work: Callable[[Callable[[Progress], None]], object]) -> int:
    steps: list[Progress] = []
    work(steps.append)
    return len(steps)


def cancelling_at(number: int) -> Callable[[Progress], None]:
    """Raises at the step of that number."""
    left = iter(range(number))

    def step(progress: Progress) -> None:
        if next(left, None) is None:
            raise CancelledError("enough")

    return step


def test_a_cancelled_import_leaves_nothing_wherever_it_was(pool: Pool, image: Path) -> None:
    count = steps_of(lambda progress: pool.import_image("whole", image, progress=progress))
    pool.delete_disk("whole")
    assert count > 4
    for number in range(count):
        with pytest.raises(CancelledError):
            pool.import_image("d", image, progress=cancelling_at(number))
        nothing_is_left(pool)
    assert pool.import_image("d", image).pread(SIZE, 0) == image.read_bytes()


class Failing:
    """A source whose medium fails at one place."""

    name = "failing"
    size_bytes = SIZE

    def __init__(self, image: Path, offset_bytes: int) -> None:
        self._data = image.read_bytes()
        self._offset = offset_bytes

    def data_extents(self) -> Extents:
        return extents.from_pairs([(0, SIZE)])

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        if offset_bytes <= self._offset < offset_bytes + len(target):
            raise ReadError(self.name, self._offset, 512, 5, "Input/output error")
        target[:] = self._data[offset_bytes : offset_bytes + len(target)]

    def check_unchanged(self) -> None:
        return


@pytest.mark.parametrize("offset", [0, SPAN, SIZE - 1])
def test_an_import_whose_image_cannot_be_read_leaves_nothing(pool: Pool, image: Path, offset: int) -> None:
    with pytest.raises(ReadError) as caught:
        pool.import_image("d", Failing(image, offset))
    assert caught.value.offset_bytes == offset
    nothing_is_left(pool)


def test_an_import_that_there_is_no_space_for_leaves_nothing(folder: Path, image: Path) -> None:
    with Pool.create(folder / "small", limit_bytes=MIB, background=False) as pool:
        with pytest.raises(OutOfSpaceError, match="limit"):
            pool.import_image("d", image)
        nothing_is_left(pool)
        pool.limit_bytes = 2 * MIB
        assert pool.import_image("d", image).pread(SIZE, 0) == image.read_bytes()


def test_an_image_that_is_written_meanwhile_is_refused_unless_that_is_accepted(
    pool: Pool, image: Path, tmp_path: Path
) -> None:
    def touch(progress: Progress) -> None:
        if progress.done_bytes == SIZE:
            with image.open("r+b") as file:
                file.write(b"x")

    with open_source(str(image)) as source:
        if source._private:
            pytest.skip("needs a file system without reflinks: here the import reads from a clone")
    with pytest.raises(SourceChangedError):
        pool.import_image("d", image, progress=touch)
    nothing_is_left(pool)
    assert pool.import_image("d", image, allow_changing=True, progress=touch).size_bytes == SIZE


@pytest.mark.parametrize(("name", "error"), [("there", ExistsError), ("1st", UsageError), ("a/b", UsageError)])
def test_a_name_that_cannot_be_is_refused_before_anything_is_read(
    pool: Pool, image: Path, name: str, error: type[Error]
) -> None:
    pool.create_disk("there", 1)
    steps: list[Progress] = []
    with pytest.raises(error):
        pool.import_image(name, image, progress=steps.append)
    assert steps == [] and [disk.name for disk in pool.disks()] == ["there"]


@pytest.mark.parametrize("name", ["d", "x" * 128])
def test_while_an_import_runs_its_name_is_free_and_nobody_else_uses_what_is_there_of_it(
    pool: Pool, image: Path, name: str
) -> None:
    seen = []

    def look(progress: Progress) -> None:
        if 0 < progress.done_bytes < SIZE and not seen:
            seen.append([disk.name for disk in pool.disks()])
            with pytest.raises(NotFoundError):
                pool.open_disk(name)
            with pytest.raises(BusyError, match="import of"):
                pool.import_image(name, image)
            with pytest.raises(BusyError, match="import of"):
                pool.delete_disk(pool.disks()[0])

    pool.import_image(name, image, progress=look)
    assert len(seen) == 1 and seen[0][0].endswith(".snapcore-partial")
    assert [disk.name for disk in pool.disks()] == [name]


def test_when_the_name_is_taken_during_an_import_the_taker_keeps_it(pool: Pool, image: Path) -> None:
    def take(progress: Progress) -> None:
        if progress.done_bytes == SIZE:
            pool.create_disk("d", 1)

    with pytest.raises(ExistsError):
        pool.import_image("d", image, progress=take)
    assert [(disk.name, disk.size_bytes) for disk in pool.disks()] == [("d", 1)]


def test_what_a_crash_left_of_an_import_goes_with_the_next_one_of_that_name(folder: Path, image: Path) -> None:
    pool = Pool.create(folder / "pool", background=False)

    class Crash(BaseException):
        pass

    def crash(progress: Progress) -> None:
        if progress.done_bytes > SPAN:
            pool.flush()
            pool._engine.core.stop(5)
            raise Crash

    with pytest.raises(Crash):
        pool.import_image("d", image, progress=crash)
    pool._engine.abandon()
    with Pool.open(pool.path, background=False) as again:
        assert [disk.name for disk in again.disks()] == ["d.snapcore-partial"]
        made = again.import_image("d", image)
        assert again.disks() != [] and [disk.name for disk in again.disks()] == ["d"]
        assert made.pread(SIZE, 0) == image.read_bytes()


# Targets of an export


def test_a_cancelled_export_leaves_no_target_and_goes_on_when_it_is_started_again(
    pool: Pool, image: Path, tmp_path: Path
) -> None:
    snapshot = pool.import_image("d", image).snapshot()
    target = tmp_path / "out"
    count = steps_of(lambda progress: snapshot.export(tmp_path / "whole", progress=progress))
    assert count > 4
    for number in range(count):
        with pytest.raises(CancelledError):
            snapshot.export(target, progress=cancelling_at(number))
        assert not target.exists()
    assert snapshot.export(target).written_bytes == 0
    assert target.read_bytes() == image.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]


def test_an_export_in_place_writes_what_differs(pool: Pool, image: Path, tmp_path: Path) -> None:
    disk = pool.import_image("d", image)
    target = tmp_path / "out"
    disk.export(target)
    disk.pwrite(b"x" * 10, 2 * SPAN + 10)
    disk.write_zeroes(0, 2 * BLOCK)
    before = data_bytes(target)
    assert disk.export(target, in_place=True).written_bytes == 3 * BLOCK
    assert target.read_bytes() == disk.pread(SIZE, 0)
    assert data_bytes(target) == before - BLOCK


def test_a_disk_that_reads_from_an_image_is_exported_whole(pool: Pool, image: Path, tmp_path: Path) -> None:
    disk = pool.create_disk("d", SIZE + 5000, image)
    disk.write_zeroes(0, BLOCK)
    disk.pwrite(b"own", SPAN)
    disk.export(tmp_path / "out")
    expected = bytearray(image.read_bytes() + bytes(5000))
    expected[:BLOCK] = bytes(BLOCK)
    expected[SPAN : SPAN + 3] = b"own"
    assert (tmp_path / "out").read_bytes() == expected


def test_an_export_never_overwrites_what_was_not_meant(pool: Pool, image: Path, tmp_path: Path) -> None:
    disk = pool.create_disk("d", source=image)
    target = tmp_path / "there"
    target.write_bytes(b"precious")
    with pytest.raises(ExistsError, match="in-place"):
        disk.export(target)
    assert target.read_bytes() == b"precious"
    with pytest.raises(NotFoundError):
        disk.export(tmp_path / "nowhere", in_place=True)
    original = image.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(image)
    for name in (image, link):
        with pytest.raises(RefusedError, match="read from"):
            disk.export(name, in_place=True)
    assert image.read_bytes() == original
    second = tmp_path / "data"
    try:
        os.link(os.path.join(pool.path, "data"), second)
    except OSError:
        second = Path(pool.path) / "data"
    for name in (Path(pool.path) / "new", Path(pool.path) / "map", second):
        with pytest.raises(RefusedError, match="pool"):
            disk.export(name, in_place=name.exists())


def test_an_export_of_a_deleted_snapshot_says_so_and_names_no_target(pool: Pool, image: Path, tmp_path: Path) -> None:
    snapshot = pool.import_image("d", image).snapshot()

    def delete(progress: Progress) -> None:
        if progress.done_bytes == 0:
            snapshot.delete()

    with pytest.raises(NotFoundError, match="deleted"):
        snapshot.export(tmp_path / "out", progress=delete)
    assert not (tmp_path / "out").exists()


def test_devices_are_imported_from_and_exported_to(pool: Pool, image: Path, tmp_path: Path) -> None:
    needs("losetup", root=True)
    os.truncate(image, SIZE // BLOCK * BLOCK)
    with loop_device(image, read_only=True) as device:
        disk = pool.import_image("d", device)
    assert disk.pread(SIZE, 0) == image.read_bytes()
    larger = tmp_path / "larger"
    larger.write_bytes(b"\xaa" * (disk.size_bytes + MIB))
    with loop_device(larger) as device:
        assert stat.S_ISBLK(os.stat(device).st_mode)
        disk.export(device, in_place=True)
    assert larger.read_bytes() == image.read_bytes() + b"\xaa" * MIB


def test_an_export_that_there_is_no_space_for_says_so(pool: Pool, image: Path, tmp_path: Path) -> None:
    needs("losetup", "mkfs.ext4", "mount", root=True)
    disk = pool.create_disk("d", 64 * MIB)
    for offset in range(0, 64 * MIB, MIB):
        disk.pwrite(b"full" * (MIB // 4), offset)
    with file_system("ext4", tmp_path, 32 * MIB) as small:
        with pytest.raises(OutOfSpaceError):
            disk.export(small / "out")
        assert not (small / "out").exists()
