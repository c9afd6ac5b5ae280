# ruff: noqa: B023 - the functions in loops are called within the turn that makes them
"""A medium that is full or fails to sync, at any point: a clear error, nothing acknowledged is lost, work goes on."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapcore import Error, OutOfSpaceError, Repository, StoreError
from snapcore.persist import Medium
from snapcore.repository import collect, pack
from snapcore.store import LocalStore
from tests.support.disks import changed, disk
from tests.support.small import Bytes
from tests.support.tools import needs

SMALL_DISK_BYTES = 4 << 20
STEP_BYTES = 4096


@pytest.fixture(autouse=True)
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of a few chunks, so that every step has several."""
    monkeypatch.setattr(pack, "PACK_BYTES", 16 << 10)
    monkeypatch.setattr(collect, "_SMALL_BYTES", 4 << 10)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    needs("mount", "umount", root=True)
    place = tmp_path / "small-disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs to mount a tmpfs: {done.stderr.strip()}")
    yield place
    gc.collect()
    subprocess.run(["umount", str(place)], check=True)


def fill(place: Path, free_bytes: int) -> Path:
    """Leave so much free on the file system of `place`. Returns the file that takes the rest."""
    # Removed files take space while an earlier store holds them open, and errors keep stores in circles.
    gc.collect()
    ballast = place / "ballast"
    status = os.statvfs(place)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_frsize - free_bytes))
    return ballast


def read(repository: Repository, snapshot: str) -> bytes:
    reader = repository.open_snapshot(snapshot)
    buffer = bytearray(reader.size_bytes)
    reader.pread_into(buffer, 0)
    return bytes(buffer)


def check(repository: Repository, held: dict[str, bytes], coming: bytes | None = None) -> None:
    """These snapshots are there and right; another one holds `coming`."""
    verified = repository.verify()
    assert verified.ok, verified
    found = {snapshot.id: read(repository, snapshot.id) for snapshot in repository.snapshots()}
    assert held.items() <= found.items()
    assert all(content == coming for snapshot, content in found.items() if snapshot not in held)


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Path, dict[str, bytes], bytes]:
    """A repository with something to collect and to move, what it holds, and the next content of its disk."""
    place = tmp_path / "prepared"
    repository = Repository.create(place, chunk_bytes=4096)
    content = disk(1, 24)
    gone = repository.snapshot(Bytes(content), disk="disk").snapshot.id
    held = {}
    for seed in range(2):
        content = content[: 6 * 4096] + disk(5 + seed, 18)
        held[repository.snapshot(Bytes(content), disk="disk").snapshot.id] = content
    repository.delete(gone)
    return place, held, changed(content, 3, pages=12)


def create(repository: Repository, coming: bytes) -> None:
    repository.snapshot(Bytes(coming), disk="disk")


def collect_all(repository: Repository, coming: bytes) -> None:
    del coming
    repository.collect()


def rebuild(repository: Repository, coming: bytes) -> None:
    del coming
    repository.rebuild_index()


def error_of(call: Callable[[], object]) -> Error | None:
    """What it raised."""
    try:
        call()
    except Error as error:
        return error.with_traceback(None)
    return None


WORKS = pytest.mark.parametrize("work", [create, collect_all, rebuild], ids=lambda work: work.__name__)
Work = Callable[[Repository, bytes], None]


@WORKS
def test_running_out_of_space_anywhere_loses_nothing(
    work: Work, prepared: tuple[Path, dict[str, bytes], bytes], small_disk: Path
) -> None:
    origin, held, coming = prepared
    free_bytes, failed = 0, 0
    while True:
        place = small_disk / "repository"
        shutil.copytree(origin, place)
        ballast = fill(small_disk, free_bytes)
        error = error_of(lambda: work(Repository.open(place), coming))
        assert error is None or (isinstance(error, OutOfSpaceError) and "no space left" in str(error)), error
        failed += error is not None
        check(Repository.open(place), held, coming)
        ballast.unlink()
        work(Repository.open(place), coming)
        check(Repository.open(place), held, coming)
        Repository.open(place).collect()
        assert Repository.open(place).sessions() == []
        check(Repository.open(place), held, coming)
        shutil.rmtree(place)
        if error is None:
            break
        free_bytes += STEP_BYTES
    assert failed >= 1


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in_place"])
def test_a_restore_that_runs_out_of_space_can_be_started_again(
    in_place: bool, prepared: tuple[Path, dict[str, bytes], bytes], small_disk: Path
) -> None:
    origin, held, _ = prepared
    repository = Repository.open(origin)
    snapshot, content = next(iter(held.items()))
    target = small_disk / "target"
    failed = 0
    for free_bytes in range(0, len(content) + 2 * STEP_BYTES, 2 * STEP_BYTES):
        if in_place:
            target.touch()
        ballast = fill(small_disk, free_bytes)
        try:
            repository.restore(snapshot, target, in_place=in_place)
        except OutOfSpaceError:
            failed += 1
            assert in_place or not target.exists()
            ballast.unlink()
            repository.restore(snapshot, target, in_place=in_place)
        assert target.read_bytes() == content
        ballast.unlink(missing_ok=True)
        target.unlink()
        assert os.listdir(small_disk) == []
    assert failed > 3


LIMITED = """
import resource, sys
from snapcore import OutOfSpaceError, Repository
place, image, target, snapshot = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
for work in (
    lambda: Repository.open(place).snapshot(image, disk="large"),
    lambda: Repository.open(place).restore(snapshot, target),
):
    try:
        work()
    except OutOfSpaceError as error:
        print(error)
    else:
        raise SystemExit("no error")
"""


def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(3 << 20))
    place, target = tmp_path / "repository", tmp_path / "target"
    repository = Repository.create(place)
    held = {repository.snapshot(image, disk="disk").snapshot.id: image.read_bytes()}
    image.write_bytes(os.urandom(3 << 20))
    command = [sys.executable, "-P", "-c", LIMITED, str(place), str(image), str(target), *held]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no space left") == 2
    assert not target.exists()
    check(repository, held)
    held[repository.snapshot(image, disk="large").snapshot.id] = image.read_bytes()
    repository.restore(next(iter(held)), target)
    check(repository, held)


class FailingMedium(Medium):
    """The n-th sync fails; the others need not reach the disk here."""

    def __init__(self, number: int) -> None:
        self.left = number

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def sync(self, descriptor: int) -> None:
        del descriptor
        self._count()

    def sync_folder(self, path: str) -> None:
        del path
        self._count()


@WORKS
def test_a_sync_that_fails_anywhere_loses_nothing(
    work: Work, prepared: tuple[Path, dict[str, bytes], bytes], tmp_path: Path
) -> None:
    origin, held, coming = prepared
    number, failed = 0, 0
    while True:
        number += 1
        place = tmp_path / "repository"
        shutil.copytree(origin, place)
        medium = FailingMedium(number)
        store = LocalStore(str(place), medium=medium)
        error = error_of(lambda: work(Repository.open(store), coming))
        assert error is None or (isinstance(error, StoreError) and os.strerror(errno.EIO) in str(error)), error
        failed += error is not None
        check(Repository.open(place), held, coming)
        work(Repository.open(LocalStore(str(place), medium=FailingMedium(0))), coming)
        Repository.open(LocalStore(str(place), medium=FailingMedium(0))).collect()
        assert Repository.open(place).sessions() == []
        check(Repository.open(place), held, coming)
        shutil.rmtree(place)
        if medium.left > 0:
            break
    assert failed > 5


def test_a_restore_whose_sync_fails_has_no_name(prepared: tuple[Path, dict[str, bytes], bytes], tmp_path: Path) -> None:
    origin, held, _ = prepared
    snapshot, content = next(iter(held.items()))
    target = tmp_path / "target"
    with pytest.raises(StoreError, match="restore it anew"):
        Repository.open(origin).restore(snapshot, target, medium=FailingMedium(1))
    assert not target.exists()
    Repository.open(origin).restore(snapshot, target)
    assert target.read_bytes() == content
