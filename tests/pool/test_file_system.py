"""A file system lives on a pool's disk: whenever a snapshot is cut, it can be recovered, and holds what was synced."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapcore.pool import Disk, Pool, Snapshot
from tests.support.fuse import file_of
from tests.support.loop import loop_device, mounted
from tests.support.tools import needs

MIB = 1 << 20
IMAGE_BYTES = 48 * MIB
CUTS = 12
KEPT_FILES = 40

# Path below the root of the file system, and what it holds: everything that was synced and is not touched any more.
Promised = dict[str, bytes]


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    needs("mke2fs", "e2fsck", "losetup", "mount", root=True)
    if not os.path.exists("/dev/fuse"):
        pytest.skip("needs /dev/fuse")
    with Pool.create(tmp_path / "pool") as made:
        yield made


@pytest.fixture
def disk(pool: Pool, tmp_path: Path) -> Disk:
    """An ext4 image with files in it, taken over."""
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(20):
        (folder / f"old-{number}").write_bytes(content(number))
    image = tmp_path / "image"
    with image.open("xb") as file:
        file.truncate(IMAGE_BYTES)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", str(folder), str(image))
    return pool.import_image("system", image)


def content(number: int) -> bytes:
    """Of a file: up to 200 KB."""
    random_ = random.Random(number)
    return random_.randbytes(random_.choice([100, 5000, 60_000, 200_000]))


@contextlib.contextmanager
def living_on(disk: Disk, folder: Path) -> Iterator[Path]:
    """The disk's file system, mounted."""
    with file_of(disk, folder / "fuse") as file, loop_device(file) as device:
        with mounted(device, folder / "mounted", "rw,discard") as root:
            yield root


class Life:
    """Files are made, changed, renamed and deleted, and snapshots are cut meanwhile."""

    def __init__(self, disk: Disk, root: Path) -> None:
        self.cuts: list[tuple[Snapshot, Promised]] = []
        self._disk = disk
        self._root = root
        self._promised: Promised = {f"old-{number}": content(number) for number in range(20)}
        self._ended = threading.Event()
        self._failures: list[BaseException] = []

    def go(self) -> None:
        """Until enough was written and cut."""
        threads = [threading.Thread(target=self._guarded, args=(work,)) for work in (self._keep, self._churn)]
        for thread in threads:
            thread.start()
        self._guarded(self._cut)
        self._ended.set()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again by `go`
            self._failures.append(error)
            self._ended.set()

    def _cut(self) -> None:
        """Each cut waits for a few more files, so that it falls somewhere into the writing of the next."""
        random_ = random.Random(1)
        while len(self.cuts) < CUTS and not self._ended.is_set():
            promised = dict(self._promised)
            self.cuts.append((self._disk.snapshot(), promised))
            wanted = len(promised) + random_.randrange(1, KEPT_FILES // CUTS + 1)
            while len(self._promised) < wanted and not self._ended.wait(0.002):
                pass

    def _keep(self) -> None:
        """Files that are synced once and left alone."""
        number = 1000
        while not self._ended.is_set():
            folder = self._root / f"folder-{number % 5}"
            folder.mkdir(exist_ok=True)
            data = content(number % 50 + 1000)
            path = folder / f"kept-{number % KEPT_FILES}-{number}"
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            for place in (folder, self._root):
                sync_folder(place)
            self._promised[str(path.relative_to(self._root))] = data
            number += 1
            if number >= 1000 + 2 * KEPT_FILES:
                return

    def _churn(self) -> None:
        """Files that nothing is promised about, so that there is always work half done."""
        random_ = random.Random(2)
        folder = self._root / "churn"
        folder.mkdir()
        while not self._ended.is_set():
            path = folder / f"file-{random_.randrange(20)}"
            step = random_.randrange(5)
            if step == 0 and path.exists():
                path.unlink()
            elif step == 1 and path.exists():
                path.rename(folder / f"file-{random_.randrange(20)}")
            elif step == 2 and path.exists():
                os.truncate(path, random_.randrange(100_000))
            else:
                with path.open("ab" if path.exists() and path.stat().st_size < 500_000 else "wb") as file:
                    file.write(random_.randbytes(random_.randrange(1, 150_000)))
                    if step == 3:
                        file.flush()
                        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def needs_recovery(image: Path) -> bool:
    """Whether the journal of an ext4 image has something to do again."""
    with image.open("rb") as file:
        file.seek(1024 + 0x60)
        return bool(file.read(1)[0] & 4)


def recovered(image: Path, folder: Path, promised: Promised) -> list[str]:
    """Mounts an image, which replays its journal; returns which promised files are not as they were synced."""
    with loop_device(image) as device, mounted(device, folder) as root:
        wrong = []
        for name, data in promised.items():
            path = root / name
            if not path.exists():
                wrong.append(f"{name} is not there")
            elif hashlib.sha256(path.read_bytes()).digest() != hashlib.sha256(data).digest():
                wrong.append(f"{name} holds something else")
        return wrong


def test_every_snapshot_of_a_file_system_at_work_recovers_and_holds_what_was_synced(
    pool: Pool, disk: Disk, tmp_path: Path
) -> None:
    with living_on(disk, tmp_path) as root:
        life = Life(disk, root)
        life.go()
    assert len(life.cuts) == CUTS
    assert len(life.cuts[-1][1]) > len(life.cuts[0][1]), "nothing was synced between the cuts"
    changed = [len(pool.diff(one, two)) for (one, _), (two, _) in zip(life.cuts, life.cuts[1:], strict=False)]
    # On a slow machine two cuts may have nothing between them, but not most of them.
    assert sum(map(bool, changed)) > len(changed) // 2, "the cuts fell into nothing"
    image = tmp_path / "exported"
    for snapshot, promised in life.cuts:
        snapshot.export(image, in_place=image.exists())
        assert needs_recovery(image)
        assert recovered(image, tmp_path / "recovered", promised) == []
        run("e2fsck", "-fn", str(image))


def test_a_file_system_goes_on_from_a_rollback(pool: Pool, disk: Disk, tmp_path: Path) -> None:
    before = disk.snapshot("before")
    with living_on(disk, tmp_path) as root:
        (root / "new").write_bytes(b"new")
        (root / "old-3").unlink()
    disk.rollback(before)
    with living_on(disk, tmp_path) as root:
        assert not (root / "new").exists()
        assert (root / "old-3").read_bytes() == content(3)
        (root / "later").write_bytes(b"later")
    image = tmp_path / "exported"
    disk.export(image)
    run("e2fsck", "-fn", str(image))
    assert recovered(image, tmp_path / "recovered", {"later": b"later", "old-3": content(3)}) == []
