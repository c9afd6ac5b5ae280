"""Targets of a restore: sparse, written only where they differ, taken up again, and nothing else is touched."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapcore import (
    BusyError,
    CancelledError,
    ExistsError,
    Manifest,
    NotFoundError,
    Progress,
    RefusedError,
    Repository,
    StoreError,
    UsageError,
)
from snapcore.persist import Medium
from snapcore.source import open_target
from snapcore.store import LimitStore, LocalStore, RetryStore
from tests.support.loop import file_system, loop_device, make_file_system, mounted
from tests.support.sparse import data_bytes, data_ranges, read_sparse
from tests.support.tools import needs

MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(tmp_path / "repository")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of 24 MiB and a bit: 12 MiB of data in two pieces, the second up to the end."""
    path = tmp_path / "image"
    data = random.Random(1).randbytes(12 * MIB)
    with path.open("wb") as file:
        file.truncate(24 * MIB + 700)
        os.pwrite(file.fileno(), data[: 4 * MIB], 2 * MIB)
        os.pwrite(file.fileno(), data[4 * MIB :], 16 * MIB + 700)
    return path


@pytest.fixture
def snapshot(repository: Repository, image: Path) -> Manifest:
    return repository.snapshot(image, disk="disk").snapshot


def _tree_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# New files


def test_a_restored_file_is_as_sparse_as_the_original(
    repository: Repository, snapshot: Manifest, image: Path, tmp_path: Path
) -> None:
    target = tmp_path / "restored"
    restored = repository.restore(snapshot, target)
    assert read_sparse(target) == read_sparse(image)
    assert data_bytes(target) <= data_bytes(image)
    assert data_ranges(target) == data_ranges(image)
    assert restored.written_bytes == data_bytes(image)
    assert not Path(f"{target}.snapcore-partial").exists()


def test_zeros_that_were_written_are_not_written_back(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(8 * MIB))
    snapshot = repository.snapshot(tmp_path / "zeros", disk="zeros").snapshot
    assert repository.restore(snapshot, tmp_path / "restored").written_bytes == 0
    assert (tmp_path / "restored").stat().st_size == 8 * MIB
    assert data_bytes(tmp_path / "restored") == 0


def test_what_exists_is_not_replaced(repository: Repository, snapshot: Manifest, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("file", "folder", "dangling"):
        with pytest.raises(ExistsError, match=name):
            repository.restore(snapshot, tmp_path / name)
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert not (tmp_path / "nothing").exists()


def test_what_comes_into_being_during_the_restore_is_not_replaced(
    repository: Repository, snapshot: Manifest, image: Path, tmp_path: Path
) -> None:
    target = tmp_path / "restored"
    with pytest.raises(ExistsError, match="snapcore-partial"):
        repository.restore(snapshot, target, progress=lambda _: target.write_bytes(b"mine") and None)
    assert target.read_bytes() == b"mine"
    assert read_sparse(f"{target}.snapcore-partial") == read_sparse(image)


def test_a_folder_that_is_not_there_is_an_error(repository: Repository, snapshot: Manifest, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no-folder"):
        repository.restore(snapshot, tmp_path / "no-folder" / "restored")


class _Interrupted(Exception):  # noqa: N818 - what a user's Ctrl-C is in a test
    pass


@pytest.mark.parametrize("error", [CancelledError, _Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("in_place", [False, True])
def test_an_interrupted_restore_goes_on(
    error: type[BaseException], in_place: bool, repository: Repository, snapshot: Manifest, image: Path, tmp_path: Path
) -> None:
    target = tmp_path / "restored"
    working = target if in_place else Path(f"{target}.snapcore-partial")
    if in_place:
        target.touch()

    def interrupt(progress: Progress) -> None:
        if progress.done_bytes:
            raise error("enough")

    with pytest.raises(error):
        repository.restore(snapshot, target, in_place=in_place, progress=interrupt)
    if not in_place:
        assert not target.exists()
    before = data_bytes(working)
    whole = data_bytes(image)
    assert 0 < before <= whole
    assert repository.restore(snapshot, target, in_place=in_place).written_bytes == whole - before
    assert read_sparse(target) == read_sparse(image)
    assert working == target or not working.exists()


def test_what_an_interrupted_restore_of_another_snapshot_left_is_no_part_of_this_one(
    repository: Repository, snapshot: Manifest, image: Path, tmp_path: Path
) -> None:
    target = tmp_path / "restored"
    partial = Path(f"{target}.snapcore-partial")
    partial.write_bytes(random.Random(2).randbytes(30 * MIB))
    repository.restore(snapshot, target)
    assert read_sparse(target) == read_sparse(image)
    assert data_bytes(target) <= data_bytes(image)


# In place


def test_in_place_writes_what_differs(repository: Repository, snapshot: Manifest, image: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    repository.restore(snapshot, target)
    original = read_sparse(image)
    pages = random.Random(3).sample(sorted(original.pages), len(original.pages) // 100)
    holes = [0, 9 * MIB // PAGE]
    with target.open("r+b") as file:
        for page in pages:
            os.pwrite(file.fileno(), b"other", page * PAGE + 100)
        for page in holes:
            os.pwrite(file.fileno(), b"other", page * PAGE + 100)
        Medium().punch(file.fileno(), 20 * MIB, 3 * PAGE)
    punched = set(range(20 * MIB // PAGE, 20 * MIB // PAGE + 3))
    restored = repository.restore(snapshot, target, in_place=True)
    assert read_sparse(target) == original
    assert restored.written_bytes == PAGE * len(punched | set(pages) | set(holes))
    assert data_bytes(target) <= data_bytes(image), "what became zero is a hole again"


@pytest.mark.parametrize("size", [0, 1, 5 * MIB + 3, 40 * MIB])
def test_in_place_gives_a_file_the_snapshots_size(
    size: int, repository: Repository, snapshot: Manifest, image: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * size)
    repository.restore(snapshot, target, in_place=True)
    assert read_sparse(target) == read_sparse(image)


def test_in_place_needs_something_in_place(repository: Repository, snapshot: Manifest, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing-there"):
        repository.restore(snapshot, tmp_path / "nothing-there", in_place=True)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="fifo"):
        repository.restore(snapshot, tmp_path / "fifo", in_place=True)
    assert not (tmp_path / "nothing-there").exists()


def test_in_place_follows_a_link_of_the_users(
    repository: Repository, snapshot: Manifest, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    repository.restore(snapshot, tmp_path / "link", in_place=True)
    assert read_sparse(tmp_path / "real") == read_sparse(image)


# What must not be written


def _packs(repository: Repository) -> list[Path]:
    return sorted(Path(repository.url, "packs").iterdir())


@pytest.mark.parametrize("how", ["itself", "symbolic link", "hard link", "through a linked folder"])
def test_the_repositorys_own_files_are_refused(
    how: str, repository: Repository, snapshot: Manifest, tmp_path: Path
) -> None:
    own = _packs(repository)[0]
    target = tmp_path / "innocent"
    if how == "itself":
        target = own
    elif how == "symbolic link":
        target.symlink_to(own)
    elif how == "hard link":
        target.hardlink_to(own)
    else:
        target.symlink_to(own.parent)
        target /= own.name
    before = _tree_of(Path(repository.url))
    with pytest.raises(RefusedError, match=str(repository.url)):
        repository.restore(snapshot, target, in_place=True)
    assert _tree_of(Path(repository.url)) == before


def test_a_new_file_within_the_repository_is_refused(
    repository: Repository, snapshot: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(repository.url)
    before = _tree_of(Path(repository.url))
    for target in (Path(repository.url) / "restored", tmp_path / "link" / "packs" / "restored"):
        with pytest.raises(RefusedError, match=str(repository.url)):
            repository.restore(snapshot, target)
    assert _tree_of(Path(repository.url)) == before


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["symbolic", "hard"])
def test_a_partial_file_that_is_another_name_of_something_is_refused(
    link: Callable[[Path, Path], None], repository: Repository, snapshot: Manifest, tmp_path: Path
) -> None:
    """Of the repository, or of a disk that was restored before and then moved away."""
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    for place, real in enumerate((_packs(repository)[0], mine)):
        before = real.read_bytes()
        link(tmp_path / f"restored-{place}.snapcore-partial", real)
        with pytest.raises(RefusedError, match="snapcore-partial"):
            repository.restore(snapshot, tmp_path / f"restored-{place}")
        assert real.read_bytes() == before
        assert not (tmp_path / f"restored-{place}").exists()


def test_a_partial_file_that_is_a_link_to_nothing_is_refused(
    repository: Repository, snapshot: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "restored.snapcore-partial").symlink_to(tmp_path / "nothing")
    with pytest.raises(RefusedError, match="snapcore-partial"):
        repository.restore(snapshot, tmp_path / "restored")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("in_place", [False, True])
def test_of_two_restores_of_one_target_the_second_is_refused(
    in_place: bool, repository: Repository, snapshot: Manifest, image: Path, tmp_path: Path
) -> None:
    target = tmp_path / "restored"
    if in_place:
        target.touch()
    refused: list[BusyError] = []

    def again(progress: Progress) -> None:
        if progress.done_bytes == 0:
            with pytest.raises(BusyError, match=str(target)) as caught:
                repository.restore(snapshot, target, in_place=in_place)
            refused.append(caught.value)

    repository.restore(snapshot, target, in_place=in_place, progress=again)
    assert refused
    assert read_sparse(target) == read_sparse(image)


def test_restores_of_one_snapshot_to_many_targets_at_once_are_all_right(
    repository: Repository, snapshot: Manifest, image: Path, tmp_path: Path
) -> None:
    targets = [tmp_path / f"restored-{number}" for number in range(6)]
    with ThreadPoolExecutor(6) as hands:
        list(hands.map(lambda target: repository.restore(snapshot, target), targets))
    assert all(read_sparse(target) == read_sparse(image) for target in targets)


def test_a_target_that_is_truncated_during_the_restore_is_an_error(
    repository: Repository, snapshot: Manifest, image: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    shutil.copy(image, target)

    def cut(progress: Progress) -> None:
        if progress.done_bytes == 0:
            os.truncate(target, 0)

    with pytest.raises(BusyError, match=str(target)):
        repository.restore(snapshot, target, in_place=True, progress=cut)


# Devices


def test_a_device_gets_the_disk_and_keeps_what_lies_behind_it(
    repository: Repository, snapshot: Manifest, image: Path, tmp_path: Path
) -> None:
    needs("losetup", root=True)
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xff" * (26 * MIB))
    with loop_device(backing) as device:
        repository.restore(snapshot, device, in_place=True)
        assert repository.restore(snapshot, device, in_place=True).written_bytes == 0
    size = snapshot.size_bytes
    assert backing.read_bytes() == image.read_bytes() + b"\xff" * (26 * MIB - size)


def test_a_device_that_is_too_small_is_refused(repository: Repository, snapshot: Manifest, tmp_path: Path) -> None:
    needs("losetup", root=True)
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xff" * (24 * MIB))
    with loop_device(backing) as device, pytest.raises(UsageError, match=device):
        repository.restore(snapshot, device, in_place=True)
    assert backing.read_bytes() == b"\xff" * (24 * MIB)


@pytest.mark.parametrize("options", ["rw", "ro"])
@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_a_mounted_device_is_refused(
    kind: str, options: str, repository: Repository, snapshot: Manifest, tmp_path: Path
) -> None:
    needs(f"mkfs.{kind}", "losetup", "mount", root=True)
    backing = tmp_path / "backing"
    with backing.open("wb") as file:
        file.truncate(128 * MIB)
    make_file_system(kind, str(backing))
    with loop_device(backing) as device, mounted(device, tmp_path / "mounted", options):
        with pytest.raises(BusyError, match="mounted"):
            repository.restore(snapshot, device, in_place=True)
        with pytest.raises(ExistsError, match=device):
            repository.restore(snapshot, device)


def test_a_device_that_cannot_be_written_is_an_error(
    repository: Repository, snapshot: Manifest, tmp_path: Path
) -> None:
    needs("losetup", root=True)
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(26 * MIB))
    with loop_device(backing, read_only=True) as device, pytest.raises(Exception, match=device) as caught:
        repository.restore(snapshot, device, in_place=True)
    assert type(caught.value).__module__ == "snapcore.errors"
    assert backing.read_bytes() == bytes(26 * MIB)


def test_a_full_file_system_is_an_error_and_the_restore_goes_on_with_more_space(
    repository: Repository, snapshot: Manifest, image: Path, tmp_path: Path
) -> None:
    needs("mkfs.ext4", "losetup", "mount", root=True)
    with file_system("ext4", tmp_path, 20 * MIB) as folder:
        filler = folder / "filler"
        filler.write_bytes(b"x" * (8 * MIB))
        with pytest.raises(Exception, match="no space left") as caught:
            repository.restore(snapshot, folder / "restored")
        assert type(caught.value).__name__ == "OutOfSpaceError"
        assert not (folder / "restored").exists()
        filler.unlink()
        repository.restore(snapshot, folder / "restored")
        assert read_sparse(folder / "restored") == read_sparse(image)


def test_a_target_is_locked_for_other_processes_too(tmp_path: Path) -> None:
    needs("flock")
    target = tmp_path / "target"
    with open_target(str(target), PAGE, in_place=False):
        assert os.system(f"flock --nonblock '{target}.snapcore-partial' true") != 0
    assert os.system(f"flock --nonblock '{target}' true") == 0


class Unsyncable(Medium):
    """Loses what was written and says so once, as a kernel does: the pages count as clean then."""

    def sync(self, descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_what_could_not_be_synced_is_not_gone_on_with(
    repository: Repository, snapshot: Manifest, image: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    with pytest.raises(StoreError, match="restore it anew"):
        repository.restore(snapshot, target, medium=Unsyncable())
    assert list(tmp_path.glob("target*")) == []
    repository.restore(snapshot, target)
    assert read_sparse(target) == read_sparse(image)


def test_an_existing_target_is_read_from_the_medium_and_not_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"x" * PAGE)
    dropped: list[str] = []

    def drop(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        dropped.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "posix_fadvise", drop)
    with open_target(str(target), PAGE, in_place=True):
        assert dropped == [str(target)]


def test_a_repository_behind_wrappers_is_not_overwritten(
    repository: Repository, snapshot: Manifest, tmp_path: Path
) -> None:
    wrapped = Repository.open(LimitStore(RetryStore(LocalStore(repository.url)), 4))
    (tmp_path / "repository" / "lost+found").mkdir()
    with pytest.raises(RefusedError, match="lies in the repository"):
        wrapped.restore(snapshot, tmp_path / "repository" / "new")
