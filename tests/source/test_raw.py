"""Raw images and block devices as sources: what they hold is what is stored, or there is an error and no snapshot."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import (
    BusyError,
    NotFoundError,
    Progress,
    ReadError,
    Repository,
    SourceChangedError,
    StoreError,
    UsageError,
)
from snapcore.source import device, open_source, raw
from snapcore.store import MemoryStore
from tests.support.loop import file_system, loop_device, make_file_system, mounted
from tests.support.sparse import SparseDisk, read_sparse
from tests.support.tools import needs

MIB = 1 << 20


@pytest.fixture
def repository() -> Repository:
    return Repository.create(MemoryStore(), chunk_bytes=4096)


@pytest.fixture
def without_reflinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system of the temporary folder may have them."""
    monkeypatch.setattr(raw, "_clone", lambda path, descriptor: None)


def _assert_nothing_is_visible(repository: Repository) -> None:
    assert repository.snapshots() == []
    assert repository.sessions() == []
    repository.collect()
    assert repository.verify().ok
    assert not [name for name, _ in repository._context.store.list("packs/")]


def _once(work: Callable[[], object]) -> Callable[[Progress], None]:
    """A progress callback that does something when the source has just been opened."""
    first = iter([True])

    def callback(progress: Progress) -> None:
        del progress
        if next(first, False):
            work()

    return callback


# Files


@given(
    size=st.integers(0, 3 * 4096 * 16 + 1),
    writes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 20_000), st.booleans()), max_size=4),
)
def test_a_file_with_holes_and_any_length_is_read_as_it_is(
    size: int, writes: list[tuple[int, int, bool]], tmp_path: Path
) -> None:
    image, restored = tmp_path / "image", tmp_path / "restored"
    restored.unlink(missing_ok=True)
    disk = SparseDisk(size)
    with image.open("wb") as file:
        file.truncate(size)
        for at, length, zeros in writes:
            start = at % (size + 1)
            data = (b"\0" if zeros else b"x") * min(length, size - start)
            disk.write(start, data)
            os.pwrite(file.fileno(), data, start)
    repository = Repository.create(MemoryStore(), chunk_bytes=4096)
    snapshot = repository.snapshot(image, disk="disk", allow_changing=True).snapshot
    assert snapshot.size_bytes == size
    assert snapshot.written_bytes == 4096 * len(disk.pages)
    repository.restore(snapshot, restored)
    assert read_sparse(restored) == disk


def test_holes_are_not_read(repository: Repository, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
        os.pwrite(file.fileno(), b"x" * 8192, 32 * MIB)
    assert repository.snapshot(image, disk="disk").read_bytes == 8192


def test_an_empty_file_is_an_empty_disk(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    snapshot = repository.snapshot(tmp_path / "image", disk="disk").snapshot
    assert (snapshot.size_bytes, snapshot.written_bytes, snapshot.root) == (0, 0, "00" * 32)
    repository.restore(snapshot, tmp_path / "restored")
    assert (tmp_path / "restored").read_bytes() == b""


def test_a_file_that_may_not_be_written_is_read(repository: Repository, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 5000)
    image.chmod(stat.S_IRUSR)
    assert repository.snapshot(image, disk="disk").snapshot.written_bytes == 8192


def test_the_source_keeps_its_content_and_times(repository: Repository, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 5000)
    before = image.stat()
    repository.snapshot(image, disk="disk")
    after = image.stat()
    assert image.read_bytes() == b"x" * 5000
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["image"]


def test_what_is_no_image_is_refused(repository: Repository, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, error in ((tmp_path / "fifo", UsageError), (tmp_path, UsageError), (tmp_path / "no", NotFoundError)):
        with pytest.raises(error, match=str(path)):
            repository.snapshot(path, disk="disk")
    _assert_nothing_is_visible(repository)


# Changes meanwhile


@pytest.mark.usefixtures("without_reflinks")
@pytest.mark.parametrize("left_bytes", [0, 1, 5 * MIB + 7])
def test_a_file_that_is_truncated_while_it_is_read_is_an_error(
    left_bytes: int, repository: Repository, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(random.Random(1).randbytes(10 * MIB))
    with pytest.raises(SourceChangedError, match=str(image)):
        repository.snapshot(image, disk="disk", progress=_once(lambda: os.truncate(image, left_bytes)))
    _assert_nothing_is_visible(repository)


@pytest.mark.usefixtures("without_reflinks")
def test_a_truncated_file_is_an_error_for_who_accepts_changes_too(repository: Repository, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(random.Random(1).randbytes(10 * MIB))
    cut = _once(lambda: os.truncate(image, MIB))
    with pytest.raises(SourceChangedError, match=str(image)):
        repository.snapshot(image, disk="disk", allow_changing=True, progress=cut)
    _assert_nothing_is_visible(repository)


def _overwrite(image: Path) -> None:
    with image.open("r+b") as file:
        file.write(b"new")


@pytest.mark.usefixtures("without_reflinks")
@pytest.mark.parametrize(
    "change",
    [
        _overwrite,
        lambda image: os.truncate(image, 20 * MIB),
        lambda image: os.truncate(image, 10 * MIB),
        lambda image: os.utime(image, ns=(0, 0)),
    ],
    ids=["content", "size", "truncated to its own size", "time set back"],
)
def test_a_file_that_is_touched_while_it_is_read_is_an_error(
    change: Callable[[Path], None], repository: Repository, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"old" * (10 * MIB // 3) + b"o")
    with pytest.raises(SourceChangedError, match=str(image)):
        repository.snapshot(image, disk="disk", progress=_once(lambda: change(image)))
    _assert_nothing_is_visible(repository)


@pytest.mark.usefixtures("without_reflinks")
def test_a_file_that_is_written_meanwhile_is_accepted_when_asked_for(repository: Repository, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"old" * 1000)
    write = _once(lambda: _overwrite(image))
    snapshot = repository.snapshot(image, disk="disk", allow_changing=True, progress=write).snapshot
    assert repository.open_snapshot(snapshot).read() in (b"old" * 1000, b"new" + b"old" * 999)


@pytest.mark.usefixtures("without_reflinks")
def test_a_write_while_the_clock_of_time_stamps_is_waited_for_is_an_error(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stamp is taken before that wait: were it taken after it, a write in the stamp's own tick would have the
    same stamp and could come between two reads."""
    image = tmp_path / "image"
    image.write_bytes(b"old" * 1000)
    sleep = raw.time.sleep

    def wait(seconds: float) -> None:
        sleep(seconds)
        _overwrite(image)

    monkeypatch.setattr(raw.time, "sleep", wait)
    with pytest.raises(SourceChangedError, match=str(image)):
        repository.snapshot(image, disk="disk")


# Reflinks


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_with_reflinks_a_snapshot_is_the_instant_of_the_call(kind: str, repository: Repository, tmp_path: Path) -> None:
    needs(f"mkfs.{kind}", "losetup", root=True)
    with file_system(kind, tmp_path) as folder:
        image = folder / "image"
        old = random.Random(2).randbytes(6 * MIB + 5)
        image.write_bytes(old)

        def overwrite() -> None:
            image.write_bytes(b"new" * MIB)

        snapshot = repository.snapshot(image, disk="disk", progress=_once(overwrite)).snapshot
        assert image.read_bytes() == b"new" * MIB
        repository.restore(snapshot, tmp_path / "restored")
        assert (tmp_path / "restored").read_bytes() == old
        assert [path.name for path in folder.iterdir()] == ["image"]


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_with_reflinks_a_snapshot_keeps_the_order_of_writes(kind: str, repository: Repository, tmp_path: Path) -> None:
    """A writer numbers its writes, round and round the file. Whatever instant is caught, it has the last writes up to
    some number and none behind it."""
    needs(f"mkfs.{kind}", "losetup", root=True)
    blocks = 512
    with file_system(kind, tmp_path) as folder:
        image = folder / "image"
        image.write_bytes(bytes(blocks * 4096))
        done = threading.Event()
        going = threading.Event()

        def write() -> None:
            descriptor = os.open(image, os.O_WRONLY)
            for counter in itertools.count(1):
                os.pwrite(descriptor, counter.to_bytes(8, "little") * 512, counter % blocks * 4096)
                if counter == blocks:
                    going.set()
                if done.is_set():
                    break
            os.close(descriptor)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert going.wait(60)
            taken = [repository.snapshot(image, disk="disk").snapshot for _ in range(4)]
        finally:
            done.set()
            writer.join()
    for snapshot in taken:
        data = repository.open_snapshot(snapshot).read()
        counters = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 4096)]
        assert sorted(counters) == list(range(min(counters), min(counters) + blocks))


# Devices


def test_a_block_device_is_read_as_it_is(repository: Repository, tmp_path: Path) -> None:
    needs("losetup", root=True)
    image = tmp_path / "image"
    content = random.Random(3).randbytes(MIB) + bytes(MIB) + random.Random(4).randbytes(512 * 3)
    image.write_bytes(content)
    for read_only in (False, True):
        with loop_device(image, read_only=read_only) as device:
            snapshot = repository.snapshot(device, disk="disk").snapshot
        assert repository.open_snapshot(snapshot).read() == content
        assert snapshot.source == device


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_device_that_is_mounted_for_writing_is_refused(kind: str, repository: Repository, tmp_path: Path) -> None:
    needs(f"mkfs.{kind}", "losetup", "mount", root=True)
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(320 * MIB)
    make_file_system(kind, str(image))
    folder = tmp_path / "a folder"
    with loop_device(image) as device:
        with mounted(device, folder):
            with pytest.raises(BusyError, match=str(folder)):
                repository.snapshot(device, disk="disk")
            _assert_nothing_is_visible(repository)
            repository.snapshot(device, disk="accepted", allow_changing=True)
        with mounted(device, folder, "ro"):
            repository.snapshot(device, disk="read-only")
        repository.snapshot(device, disk="free")


def test_a_device_whose_only_visible_mount_is_a_read_only_view_is_refused(
    repository: Repository, tmp_path: Path
) -> None:
    """The file system underneath writes all the same."""
    needs("mkfs.ext4", "losetup", "mount", root=True)
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    make_file_system("ext4", str(image))
    with loop_device(image) as device, mounted(device, tmp_path / "view"):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(tmp_path / "view")], check=True)
        with pytest.raises(BusyError):
            repository.snapshot(device, disk="disk")


def test_a_device_with_a_mounted_partition_is_refused(repository: Repository, tmp_path: Path) -> None:
    needs("mkfs.ext4", "losetup", "mount", "partx", root=True)
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 * MIB)
        # A DOS partition table of one Linux partition: 32,768 sectors from sector 2,048 on.
        os.pwrite(file.fileno(), struct.pack("<4B4BII", 0, 0, 0, 0, 0x83, 0, 0, 0, 2048, 32768), 446)
        os.pwrite(file.fileno(), b"\x55\xaa", 510)
    with loop_device(image) as device:
        subprocess.run(["partx", "--add", device], check=True)
        try:
            make_file_system("ext4", f"{device}p1")
            with mounted(f"{device}p1", tmp_path / "part"), pytest.raises(BusyError, match="part"):
                repository.snapshot(device, disk="disk")
        finally:
            subprocess.run(["partx", "--delete", device], check=True)


# Media that fail


@contextmanager
def _failing_disk(folder: Path, size_bytes: int, bad_offset: int) -> Iterator[Path]:
    """A file that cannot be read from an offset on, by nbdkit's error codes through nbdfuse."""
    point = folder / "failing"
    point.mkdir()
    read = f"if [ $(($4 + $3)) -gt {bad_offset} ]; then echo EIO medium error >&2; exit 1; fi; head -c $3 /dev/urandom"
    server = ["nbdkit", "--single", "--exit-with-parent", "eval", f"get_size=echo {size_bytes}", f"pread={read}"]
    fuse = subprocess.Popen(
        ["nbdfuse", "--readonly", str(point), "--command", *server],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    disk = point / "nbd"
    try:
        # It has no way to say that it is ready but the file.
        for _ in range(200):
            if disk.exists() or fuse.poll() is not None:
                break
            threading.Event().wait(0.05)
        assert disk.exists(), "nbdfuse did not begin"
        yield disk
    finally:
        subprocess.run(["fusermount3" if shutil.which("fusermount3") else "fusermount", "-u", str(point)], check=True)
        fuse.wait(30)


def test_a_medium_that_fails_is_an_error_that_names_file_and_offset(repository: Repository, tmp_path: Path) -> None:
    needs("nbdkit", "nbdfuse", root=True)
    bad_offset = 5 * MIB + 128 * 1024
    with _failing_disk(tmp_path, 8 * MIB, bad_offset) as disk:
        with pytest.raises(ReadError, match=str(disk)) as caught:
            repository.snapshot(disk, disk="disk", allow_changing=True)
        error = caught.value
        assert error.path == str(disk)
        assert error.offset_bytes <= bad_offset < error.offset_bytes + error.length_bytes
        assert f"offset {error.offset_bytes} " in str(error)
    _assert_nothing_is_visible(repository)


def test_a_source_of_ones_own_is_read_like_any_other(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x" * 10_000)
    with open_source(str(tmp_path / "image")) as source:
        snapshot = repository.snapshot(source, disk="disk").snapshot
    assert repository.open_snapshot(snapshot).read() == b"x" * 10_000


def test_a_file_system_that_fails_to_tell_its_holes_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"data")

    def fail(descriptor: int, offset: int, whence: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_source(str(path)) as source:
        monkeypatch.setattr(os, "lseek", fail)
        with pytest.raises(StoreError, match=str(path)):
            source.data_extents()


def test_a_device_that_goes_while_it_is_looked_at_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: str) -> list[str]:
        raise FileNotFoundError(errno.ENOENT, path)

    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    monkeypatch.setattr(os, "listdir", gone)
    assert device._with_partitions(7, 0) == {"7:0"}
