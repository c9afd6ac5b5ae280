"""Closing while others work, what outlives a crash that undoes a change, and what is left open."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from snapcore import log, space
from snapcore.errors import Error, NotFoundError, OutOfSpaceError, UsageError
from snapcore.pages import Failure
from snapcore.persist import Buffer
from snapcore.pool import Disk, Pool, check
from tests.support.mediums import Unsynced
from tests.support.pools import BLOCK_BYTES, MIB, quick_folder

WAIT_S = 30


class Hooked(Unsynced):
    """Calls a function once, before a write or sync of a descriptor."""

    def __init__(self) -> None:
        self.before: dict[tuple[str, int], Callable[[], None]] = {}

    def _call(self, what: str, descriptor: int) -> None:
        self.before.pop((what, descriptor), lambda: None)()

    def write_at(self, descriptor: int, buffers: Sequence[Buffer], offset_bytes: int) -> int:
        self._call("write", descriptor)
        return super().write_at(descriptor, buffers, offset_bytes)

    def sync(self, descriptor: int) -> None:
        self._call("sync", descriptor)
        super().sync(descriptor)


@pytest.fixture
def folder() -> Iterator[Path]:
    made = quick_folder()
    yield made
    shutil.rmtree(made)


class Paused:
    """A call in a thread that has passed the check whether the pool is open, and waits."""

    def __init__(self, pool: Pool, method: str, call: Callable[[], object]) -> None:
        self.outcome: object = None
        self._go = threading.Event()
        passed = threading.Event()
        first = getattr(pool, method)

        def waits(*arguments: object) -> object:
            result = first(*arguments)
            passed.set()
            assert self._go.wait(WAIT_S)
            return result

        def run() -> None:
            try:
                self.outcome = call()
            except Error as error:
                self.outcome = error

        setattr(pool, method, waits)
        self._thread = threading.Thread(target=run)
        self._thread.start()
        assert passed.wait(WAIT_S)
        setattr(pool, method, first)

    def go_on(self) -> None:
        """Let it."""
        self._go.set()

    def join(self, timeout_s: float) -> None:
        """Wait until it has ended, but no longer than that."""
        self._thread.join(timeout_s)

    def end(self) -> object:
        """What it returned or raised."""
        self.go_on()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        return self.outcome


def test_what_is_acknowledged_while_the_pool_closes_is_there_afterwards(folder: Path) -> None:
    medium = Hooked()
    pool = Pool.create(folder / "pool", medium=medium, background=False)
    pool.create_disk("first", MIB)
    other = Paused(pool, "_source", lambda: pool.create_disk("second", MIB))

    def let_go() -> None:
        other.go_on()
        # It ends at once, or waits for what waits for this.
        other.join(0.2)

    medium.before["sync", pool._engine.files.map] = let_go
    pool.close()
    outcome = other.end()
    with Pool.open(folder / "pool", background=False) as again:
        there = "second" in [disk.name for disk in again.disks()]
    assert there == isinstance(outcome, Disk)
    assert there or isinstance(outcome, NotFoundError)


def test_a_snapshot_that_is_found_while_the_pool_closes_reads_from_no_other_file(folder: Path) -> None:
    with Pool.create(folder / "pool", background=False) as pool:
        disk = pool.create_disk("disk", MIB)
        disk.pwrite(b"x" * BLOCK_BYTES, 0)
        disk.snapshot("cut")
    pool = Pool.open(folder / "pool", background=False)
    number = pool._engine.files.data
    finder = Paused(pool, "_check_open", lambda: pool.snapshot("cut").pread(BLOCK_BYTES, 0))
    pool.close()
    other = os.open(folder / "other", os.O_RDWR | os.O_CREAT)
    os.pwrite(other, b"other" * MIB, 0)
    os.dup2(other, number)
    try:
        assert isinstance(finder.end(), NotFoundError)
    finally:
        os.close(other)
        if other != number:
            os.close(number)


def test_after_a_close_that_failed_no_file_is_touched(folder: Path) -> None:
    medium = Hooked()
    pool = Pool.create(folder / "pool", medium=medium, background=False)
    disk = pool.create_disk("disk", MIB)
    disk.pwrite(b"x" * BLOCK_BYTES, 0)
    core = pool._engine.core

    def fail() -> None:
        raise OSError(errno.ENOSPC, "no space")

    medium.before["write", pool._engine.files.map] = fail
    with pytest.raises(OutOfSpaceError):
        pool.close()
    assert core.failed == errno.ESHUTDOWN
    with pytest.raises(Failure):
        log.commit(core)
    with pytest.raises(NotFoundError):
        disk.pwrite(b"y", 0)
    with pytest.raises(NotFoundError):
        disk.flush()


def test_a_crash_that_undoes_a_growth_leaves_nothing_behind_the_end(folder: Path) -> None:
    medium = Hooked()
    pool = Pool.create(folder / "pool", medium=medium, background=False)
    disk = pool.create_disk("disk", BLOCK_BYTES + 904)
    disk.pwrite(b"x" * 904, BLOCK_BYTES)
    disk.flush()
    writer = threading.Thread(target=disk.pwrite, args=(b"lost", BLOCK_BYTES + 2000))

    def write_and_crash() -> None:
        writer.start()
        # It ends at once, or waits for what waits for this.
        writer.join(0.2)
        shutil.copytree(folder / "pool", folder / "crashed")

    medium.before["write", pool._engine.files.log] = write_and_crash
    disk.resize(2 * BLOCK_BYTES)
    writer.join(WAIT_S)
    assert disk.pread(4, BLOCK_BYTES + 2000) == b"lost"
    pool.close()
    with Pool.open(folder / "crashed", background=False) as crashed:
        found = crashed.open_disk("disk")
        assert found.size_bytes == BLOCK_BYTES + 904
        found.resize(2 * BLOCK_BYTES)
        assert found.pread(BLOCK_BYTES, BLOCK_BYTES) == b"x" * 904 + bytes(BLOCK_BYTES - 904)


def test_the_collector_may_free_a_volume_whenever_the_map_is_looked_at(folder: Path) -> None:
    class Knot:
        """Is only freed by the collector."""

    with Pool.create(folder / "pool", background=False) as pool:
        disk = pool.create_disk("disk", MIB)
        core = pool._engine.core
        before = gc.get_threshold()
        ended = threading.Event()

        def look_often() -> None:
            # The collector comes at the first allocation, the second one, and so on.
            for number in range(1, 20):
                snapshot = disk.snapshot("cut")
                snapshot.delete()
                gc.collect()
                gc.disable()
                knot = Knot()
                knot.knot, knot.volume = knot, snapshot._volume  # type: ignore[attr-defined]
                del snapshot, knot
                gc.set_threshold(gc.get_count()[0] + number)
                gc.enable()
                space.used_bitmap(core)
                gc.set_threshold(*before)
            ended.set()

        try:
            threading.Thread(target=look_often, daemon=True).start()
            assert ended.wait(WAIT_S)
        finally:
            gc.set_threshold(*before)
            gc.enable()


def test_neither_a_check_nor_an_opening_that_fails_leaves_an_image_open(folder: Path) -> None:
    (folder / "image").write_bytes(b"i" * BLOCK_BYTES)
    with Pool.create(folder / "pool", background=False) as pool:
        pool.create_disk("disk", source=folder / "image")

    class Broken(Unsynced):
        def write_at(self, descriptor: int, buffers: Sequence[Buffer], offset_bytes: int) -> int:
            raise OSError(errno.EIO, "broken")

    def count() -> int:
        return sum(os.path.samestat(os.stat(folder / "image"), status) for status in _open_files())

    check(folder / "pool")
    with pytest.raises(Error):
        Pool.open(folder / "pool", medium=Broken(), background=False)
    assert count() == 0


def _open_files() -> Iterator[os.stat_result]:
    for number in range(256):
        try:
            yield os.fstat(number)
        except OSError:
            continue


def test_a_name_that_is_no_text_is_refused(folder: Path) -> None:
    with Pool.create(folder / "pool", background=False) as pool:
        with pytest.raises(UsageError):
            pool.create_disk("disk\udc80", MIB)
        image = Path(os.fsdecode(os.fsencode(folder) + b"/image\xff"))
        try:
            image.write_bytes(b"i" * BLOCK_BYTES)
        except OSError:
            pytest.skip("the file system takes no such name")
        with pytest.raises(UsageError):
            pool.create_disk("disk", source=image)
        assert not pool.disks()
