"""Calls of the operating system that fail, one after the other, and hosts and pools that are full.

Whatever fails: the error is typed, what was flushed is there after opening anew, reads go on, and after a failed sync
nothing more is written.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from snapcore import Error, NotFoundError, OutOfSpaceError, StoreError
from snapcore.persist import Buffer
from snapcore.pool import Disk, Pool
from tests.support.mediums import Unsynced
from tests.support.pools import quick_folder
from tests.support.promises import BLOCK_BYTES, exact, padded, read_all
from tests.support.tools import needs

DISK_BLOCKS = 8
PRIMITIVES = ("write_at", "sync", "punch")
Fault = tuple[str, int]


@pytest.fixture
def folder() -> Iterator[Path]:
    made = quick_folder()
    yield made
    shutil.rmtree(made)


@dataclass
class Faulty(Unsynced):
    """Fails one call, or all from one on, of all that persist something.

    Attributes
    ----------
    at : int
        Which call, from 0 on; -1 is none.
    count : int
        How many fail.
    log : list of str
        What was called.
    half : bool
        A write that fails has written a half.
    """

    at: int = -1
    code: int = errno.EIO
    count: int = 1
    half: bool = True
    log: list[str] = field(default_factory=list)

    def _call(self, name: str) -> bool:
        self.log.append(name)
        return self.at >= 0 and self.at <= len(self.log) - 1 < self.at + self.count

    def _fail(self) -> None:
        raise OSError(self.code, os.strerror(self.code))

    def write_at(self, descriptor: int, buffers: Sequence[Buffer], offset_bytes: int) -> int:
        if self._call("write_at"):
            if self.half:
                joined = b"".join(buffers)
                super().write_at(descriptor, [joined[: len(joined) // 2 // 512 * 512]], offset_bytes)
            self._fail()
        return super().write_at(descriptor, buffers, offset_bytes)

    def sync(self, descriptor: int) -> None:
        if self._call("sync"):
            self._fail()
        super().sync(descriptor)

    def punch(self, descriptor: int, offset_bytes: int, length_bytes: int) -> bool:
        if self._call("punch"):
            self._fail()
        return super().punch(descriptor, offset_bytes, length_bytes)


@dataclass
class Promised:
    """What is known of each disk's blocks: the flushed content, and all that may be there since."""

    flushed: dict[str, bytes] = field(default_factory=dict)
    tried: dict[str, list[bytes]] = field(default_factory=dict)
    snapshots: dict[str, bytes] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def holds(self, pool: Pool) -> None:
        """All of it is true of a pool."""
        found = {disk.name: padded(read_all(disk)) for disk in pool.disks()}
        assert self.flushed.keys() <= found.keys() <= self.names
        for name, content in found.items():
            possible = [self.flushed.get(name, bytes(len(content))), *self.tried.get(name, [])]
            for at in range(0, len(content), 512):
                assert content[at : at + 512] in {other[at : at + 512] for other in possible}, (name, at)
        kept = {snapshot.id: read_all(snapshot) for snapshot in pool.snapshots()}
        assert {number: kept.get(number) for number in self.snapshots} == self.snapshots


class Worker:
    """Does a fixed row of steps on a pool, and goes on after each error."""

    def __init__(self, folder: Path, medium: Faulty) -> None:
        folder.mkdir(exist_ok=True)
        self.place = folder / "pool"
        self.medium = medium
        self.promised = Promised()
        self.errors: list[Error] = []
        self.contents: dict[str, bytearray] = {}
        self.pool: Pool | None = None
        self._number = 0

    def _try(self, work: Callable[[], object]) -> bool:
        try:
            work()
        except Error as error:
            self.errors.append(error)
            return False
        return True

    def _data(self, blocks: int) -> bytes:
        self._number += 1
        return random.Random(self._number).randbytes(blocks * BLOCK_BYTES)

    def _flushed(self) -> None:
        self.promised.flushed = {name: bytes(content) for name, content in self.contents.items()}
        self.promised.tried = {}

    def _write(self, name: str, at: int, blocks: int) -> None:
        assert self.pool is not None
        if name not in self.contents:
            return
        data = self._data(blocks)
        after = bytearray(self.contents[name])
        after[at * BLOCK_BYTES : (at + blocks) * BLOCK_BYTES] = data
        # Whether it fails or not: since the last flush it may be there.
        self.promised.tried.setdefault(name, []).append(bytes(after))
        disk = self.pool.open_disk(name)
        if self._try(lambda: disk.pwrite(data, at * BLOCK_BYTES)):
            self.contents[name] = after
            assert padded(read_all(disk)) == bytes(after)
        else:
            found = padded(read_all(disk))
            possible = {at: {bytes(self.contents[name][at : at + 512]), bytes(after[at : at + 512])}
                        for at in range(0, len(after), 512)}  # fmt: skip
            assert all(found[at : at + 512] in values for at, values in possible.items())
            self.contents[name] = bytearray(found)

    def _make(self, name: str) -> None:
        assert self.pool is not None
        self.promised.names.add(name)
        pool = self.pool
        if self._try(lambda: pool.create_disk(name, DISK_BLOCKS * BLOCK_BYTES)):
            self.contents[name] = bytearray(DISK_BLOCKS * BLOCK_BYTES)
            self._flushed()

    def _cut(self, name: str) -> None:
        assert self.pool is not None
        pool = self.pool
        if name in self.contents and self._try(lambda: pool.open_disk(name).snapshot(f"cut{self._number}")):
            newest = max(pool.snapshots(), key=lambda snapshot: int(snapshot.id))
            self.promised.snapshots[newest.id] = bytes(self.contents[name])
            self._flushed()

    def _delete(self) -> None:
        assert self.pool is not None
        pool = self.pool
        kept = sorted(self.promised.snapshots, key=int)
        if kept:
            del self.promised.snapshots[kept[0]]
            if self._try(lambda: pool.delete_snapshot(kept[0])):
                self._flushed()

    def _flush(self) -> None:
        assert self.pool is not None
        if self._try(self.pool.flush):
            self._flushed()

    def _checkpoint(self) -> None:
        assert self.pool is not None
        if self._try(self.pool.checkpoint):
            self._flushed()

    def run(self) -> None:
        """All steps; the pool is left open if it could be opened."""
        if not self._try(self._create):
            return
        self._make("one")
        self._write("one", 0, 4)
        self._flush()
        self._cut("one")
        self._write("one", 1, 2)
        self._write("one", 2, 2)
        self._cut("one")
        self._make("two")
        self._write("two", 0, 3)
        self._checkpoint()
        self._write("one", 0, 3)
        self._delete()
        self._flush()
        self._checkpoint()
        self._write("two", 1, 1)
        self._delete()
        self._write("one", 4, 4)
        self._checkpoint()
        self._write("one", 4, 1)
        self._flush()

    def _create(self) -> None:
        self.pool = Pool.create(self.place, log_bytes=65536, medium=self.medium, background=False)


def calls_of_a_run(folder: Path) -> list[str]:
    """What a run without errors calls."""
    medium = Faulty()
    worker = Worker(folder / "whole", medium)
    worker.run()
    assert worker.pool is not None and not worker.errors
    worker.pool._engine.abandon()
    return medium.log


def fails_at(folder: Path, at: int, code: int, count: int) -> Worker:
    """A run in which calls fail; what was promised is there, in the open pool and when it is opened anew."""
    worker = Worker(folder, Faulty(at=at, code=code, count=count))
    worker.run()
    if worker.pool is not None:
        # Reads go on, whatever has happened.
        found = {disk.name: padded(read_all(disk)) for disk in worker.pool.disks()}
        assert {name: found[name] for name in worker.contents} == worker.contents
        with suppress(Error):
            worker.pool.close()
    try:
        pool = Pool.open(worker.place, medium=Unsynced(), background=False)
    except NotFoundError:
        assert not worker.promised.names
        # Nothing stands in the way of a second attempt.
        Pool.create(worker.place, log_bytes=65536, medium=Unsynced(), background=False).close()
        return worker
    exact(pool)
    worker.promised.holds(pool)
    disk = pool.create_disk("after", 5000)
    disk.pwrite(b"works", 100)
    disk.snapshot()
    pool.close()
    pool = Pool.open(worker.place, medium=Unsynced(), background=False)
    exact(pool)
    assert pool.open_disk("after").pread(5, 100) == b"works"
    pool.close()
    return worker


@pytest.mark.parametrize("count", [1, 1 << 30])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_any_call_may_fail(folder: Path, code: int, count: int) -> None:
    calls = calls_of_a_run(folder)
    assert {*calls} == {*PRIMITIVES} and len(calls) > 60
    for at, name in enumerate(calls):
        worker = fails_at(folder / str(at), at, code, count)
        # A hole that could not be made is no harm to anybody; a write of data is tried twice.
        assert worker.errors or name == "punch" or (name == "write_at" and count == 1), (at, name)


@pytest.mark.parametrize("name", ["data", "log", "map", "superblock"])
def test_after_a_failed_sync_nothing_is_written_and_the_pool_says_so(folder: Path, name: str) -> None:
    class Failing(Unsynced):
        broken = False
        writes = 0

        def sync(self, descriptor: int) -> None:
            if self.broken and os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"/{name}"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().sync(descriptor)

        def write_at(self, descriptor: int, buffers: Sequence[Buffer], offset_bytes: int) -> int:
            self.writes += 1
            return super().write_at(descriptor, buffers, offset_bytes)

    needs("true")
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    medium = Failing()
    pool = Pool.create(folder / "pool", medium=medium, background=False)
    disk = pool.create_disk("disk", 40000)
    disk.pwrite(b"flushed", 0)
    kept = disk.snapshot("kept")
    disk.pwrite(b"later", 8192)
    medium.broken = True
    with pytest.raises(StoreError, match=r"stopped writing|writing a checkpoint"):
        pool.checkpoint()
    # The medium is well again, but what it did with what it was given nobody knows.
    medium.broken = False
    before = medium.writes
    attempts: list[Callable[[], object]] = [
        lambda: disk.pwrite(b"x", 0),
        lambda: disk.discard(0, 4096),
        disk.flush,
        disk.snapshot,
        kept.delete,
        pool.checkpoint,
        lambda: pool.create_disk("new", 4096),
    ]
    for attempt in attempts:
        with pytest.raises(StoreError, match="stopped writing"):
            attempt()
    assert disk.pread(5, 8192) == b"later"
    assert kept.pread(7, 0) == b"flushed"
    pool.close()
    assert medium.writes == before
    pool = Pool.open(folder / "pool", medium=Unsynced(), background=False)
    exact(pool)
    assert pool.open_disk("disk").pread(7, 0) == b"flushed"
    assert pool.snapshot("kept").pread(7, 0) == b"flushed"
    pool.close()


def test_writes_that_find_no_space_for_a_long_time_do_not_make_the_pool_longer_than_its_file(folder: Path) -> None:
    class Full(Unsynced):
        full = False

        def write_at(self, descriptor: int, buffers: Sequence[Buffer], offset_bytes: int) -> int:
            size = sum(map(len, buffers))
            if size >= 1 << 20:
                if self.full:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                # The bytes are of no interest here.
                os.ftruncate(descriptor, max(os.fstat(descriptor).st_size, offset_bytes + size))
                return size
            return super().write_at(descriptor, buffers, offset_bytes)

    medium = Full()
    pool = Pool.create(folder / "pool", medium=medium, background=False)
    disk = pool.create_disk("disk", 8 << 30)
    data = bytes(4 << 20)
    for at in range(0, 512 << 20, len(data)):
        disk.pwrite(data, at)
    medium.full = True
    for at in range(0, 1 << 30, len(data)):
        with pytest.raises(OutOfSpaceError):
            disk.pwrite(data, (1 << 30) + at)
    assert pool._engine.core.end_blocks < (600 << 20) // BLOCK_BYTES
    pool.close()
    pool = Pool.open(folder / "pool", medium=Unsynced(), background=False)
    exact(pool)
    assert pool.usage().allocated_bytes == 512 << 20
    pool.close()


@contextmanager
def small_host(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system that is soon full."""
    needs("mount", "umount", root=True)
    place = folder / "host"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(place: Path, *, leave_bytes: int = 0) -> None:
    """Let the host have no space but so much."""
    descriptor = os.open(place / "filler", os.O_RDWR | os.O_CREAT)
    try:
        for size in (1 << 20, 1 << 16, 1 << 12):
            while True:
                try:
                    end = os.fstat(descriptor).st_size
                    os.posix_fallocate(descriptor, end, size)
                except OSError:
                    break
        end = os.fstat(descriptor).st_size
        if leave_bytes:
            os.ftruncate(descriptor, max(0, end - leave_bytes))
    finally:
        os.close(descriptor)


def write_until_full(disk: Disk, contents: bytearray, dice: random.Random, blocks: int) -> int:
    """Write blocks until one fails; returns how many were written."""
    for done in range(2000):
        at = dice.randrange(len(contents) // BLOCK_BYTES - blocks + 1) * BLOCK_BYTES
        data = dice.randbytes(blocks * BLOCK_BYTES)
        try:
            disk.pwrite(data, at)
        except OutOfSpaceError:
            found = disk.pread(blocks * BLOCK_BYTES, at)
            for start in range(0, len(data), BLOCK_BYTES):
                old = contents[at + start : at + start + BLOCK_BYTES]
                assert found[start : start + BLOCK_BYTES] in (data[start : start + BLOCK_BYTES], old)
            contents[at : at + len(found)] = found
            return done
        contents[at : at + len(data)] = data
    raise AssertionError("it was never full")


def goes_on_when_full(pool: Pool, kept: dict[str, bytes], contents: bytearray, make_room: Callable[[], None]) -> None:
    """Nothing is lost; reads and deletions go on; writes work again once there is space."""
    disk = pool.open_disk("disk")
    dice = random.Random(5)
    assert disk.pread(len(contents), 0) == contents
    assert {snapshot.name: read_all(snapshot) for snapshot in pool.snapshots()} == kept
    disk.flush()
    pool.checkpoint()
    # In place there is always room.
    own = disk.extents().allocated[-1]
    at, length = int(own[0]), int(own[1])
    with suppress(OutOfSpaceError):
        disk.pwrite(contents[at : at + length], at)
    names = sorted(kept)
    for name in names[: len(names) // 2]:
        pool.snapshot(name).delete()
        del kept[name]
    written = write_until_full(disk, contents, dice, 1) if names else 0
    assert written or not names, "a deletion has given no room"
    assert {snapshot.name: read_all(snapshot) for snapshot in pool.snapshots()} == kept
    pool.flush()
    make_room()
    for _ in range(20):
        at = dice.randrange(len(contents) // BLOCK_BYTES) * BLOCK_BYTES
        data = dice.randbytes(BLOCK_BYTES)
        disk.pwrite(data, at)
        contents[at : at + BLOCK_BYTES] = data
    disk.flush()
    for name in [*kept]:
        pool.snapshot(name).delete()
    assert disk.pread(len(contents), 0) == contents


def grown(pool: Pool) -> tuple[dict[str, bytes], bytearray]:
    """A disk with four snapshots that differ."""
    dice = random.Random(3)
    disk = pool.create_disk("disk", 400 * BLOCK_BYTES)
    contents = bytearray(disk.size_bytes)
    kept = {}
    for name in ("a", "b", "c", "d"):
        for _ in range(30):
            at = dice.randrange(399) * BLOCK_BYTES + dice.randrange(500)
            data = dice.randbytes(dice.choice((100, 4096)))
            disk.pwrite(data, at)
            contents[at : at + len(data)] = data
        disk.snapshot(name)
        kept[name] = bytes(contents)
    return kept, contents


@pytest.mark.parametrize("leave_bytes", [0, 4096, 40000, 300000])
def test_a_full_host_stops_writes_that_need_space_and_nothing_else(folder: Path, leave_bytes: int) -> None:
    with small_host(folder, 6 << 20) as host:
        pool = Pool.create(host / "pool", log_bytes=65536, background=False)
        kept, contents = grown(pool)
        fill(host, leave_bytes=leave_bytes)
        disk = pool.open_disk("disk")
        write_until_full(disk, contents, random.Random(leave_bytes), 3)
        goes_on_when_full(pool, kept, contents, lambda: os.unlink(host / "filler"))
        pool.close()
        pool = Pool.open(host / "pool", background=False)
        exact(pool)
        assert pool.open_disk("disk").pread(len(contents), 0) == contents
        pool.close()


def test_a_pool_that_was_full_when_it_crashed_opens_and_frees(folder: Path) -> None:
    with small_host(folder, 6 << 20) as host:
        pool = Pool.create(host / "pool", log_bytes=65536, background=False)
        kept, contents = grown(pool)
        fill(host)
        write_until_full(pool.open_disk("disk"), contents, random.Random(1), 3)
        pool.flush()
        pool._engine.abandon()
        pool = Pool.open(host / "pool", background=False)
        exact(pool)
        goes_on_when_full(pool, kept, contents, lambda: os.unlink(host / "filler"))
        pool.close()


def test_a_pool_that_finds_no_space_to_be_made_leaves_nothing_in_the_way(folder: Path) -> None:
    with small_host(folder, 4 << 20) as host:
        with pytest.raises(OutOfSpaceError):
            Pool.create(host / "pool", background=False)
        Pool.create(host / "pool", log_bytes=65536, background=False).close()


def test_the_limit_of_a_pool_stops_writes_that_need_space_and_nothing_else(folder: Path) -> None:
    pool = Pool.create(
        folder / "pool", log_bytes=65536, limit_bytes=220 * BLOCK_BYTES, medium=Unsynced(), background=False
    )
    kept, contents = grown(pool)
    write_until_full(pool.open_disk("disk"), contents, random.Random(2), 3)
    assert pool.usage().allocated_bytes <= pool.limit_bytes

    def raise_limit() -> None:
        pool.limit_bytes *= 2

    goes_on_when_full(pool, kept, contents, raise_limit)
    pool.close()
    pool = Pool.open(folder / "pool", medium=Unsynced(), background=False)
    exact(pool)
    assert pool.limit_bytes == 440 * BLOCK_BYTES
    assert pool.open_disk("disk").pread(len(contents), 0) == contents
    pool.close()


def test_a_checkpoint_and_deletions_need_no_new_space_even_when_the_map_has_no_free_slot(folder: Path) -> None:
    image = folder / "image"
    image.touch()
    os.truncate(image, 1 << 36)
    with small_host(folder, 8 << 20) as host:
        pool = Pool.create(host / "pool", log_bytes=65536, background=False)
        kept, contents = grown(pool)
        disk = pool.create_disk("big", source=image)
        fill(host)
        dice = random.Random(1)

        # Dropping blocks of an image takes pages and no data.
        def drop_without_end() -> None:
            while True:
                disk.discard(dice.randrange(1 << 24) * BLOCK_BYTES, BLOCK_BYTES)

        with pytest.raises(OutOfSpaceError):
            drop_without_end()
        try:
            pool.checkpoint()
            goes_on_when_full(pool, kept, contents, lambda: os.unlink(host / "filler"))
        finally:
            with suppress(OutOfSpaceError):
                pool.close()
