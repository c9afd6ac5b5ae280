"""Raw image files and block devices as targets of a restore.

| the target is | written | done when |
| --- | --- | --- |
| a new file | as `TARGET.snapcore-partial`; an interrupted restore goes on with it | synced, linked to its name |
| an existing file or device (`in_place`) | where it stands, only what differs | synced |

Whoever restores holds a lock on the file, so two restores of one target do not mix.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from snapcore import extents, scan
from snapcore.errors import (
    BusyError,
    Error,
    ExistsError,
    NotFoundError,
    RefusedError,
    UsageError,
    from_os_error,
)
from snapcore.extents import Extents
from snapcore.persist import Medium
from snapcore.source import device
from snapcore.source.raw import file_data_extents, read_file

PAGE_BYTES = 4096
PARTIAL = ".snapcore-partial"
# Writeback starts while the rest is still being decoded: the final sync then has little left to do.
_SYNC_EVERY_BYTES = 128 << 20


class RawTarget:
    """An open target.

    Attributes
    ----------
    fresh : bool
        Everything in it reads as zeros still.
    written_bytes : int
        Bytes written or punched so far.
    sync_failed : bool
        What was written may be lost, and look well to who reads it: nothing in it is to be believed.
    """

    def __init__(self, path: str, descriptor: int, size_bytes: int, *, fresh: bool, medium: Medium) -> None:
        self.path = path
        self.fresh = fresh
        self.written_bytes = 0
        self.sync_failed = False
        self._descriptor = descriptor
        self._size_bytes = size_bytes
        self._device = stat.S_ISBLK(os.fstat(descriptor).st_mode)
        self._medium = medium
        self._lock = threading.Lock()
        self._unsynced_bytes = 0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="snapcore-sync")
        self._syncing: Future[None] | None = None

    def data_extents(self) -> Extents:
        """What of the target may be other than zero."""
        if self._device:
            return extents.from_pairs([(0, self._size_bytes)])
        return file_data_extents(self.path, self._descriptor, self._size_bytes)

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        """Fill `target` with what stands there now."""
        if read_file(self.path, self._descriptor, target, offset_bytes) < len(target):
            raise BusyError(f"{self.path} was truncated by somebody else during the restore; start it again")

    def write_data(self, data: memoryview, offset_bytes: int) -> None:
        """Write the pages of `data` that are not zero; the others must be zero already."""
        for start, length in scan.nonzero_extents(data, PAGE_BYTES).tolist():
            self._write(data[start : start + length], offset_bytes + start)

    def set_size(self, size_bytes: int) -> None:
        """Make a file so long; what was not written reads as zeros."""
        try:
            self._medium.truncate(self._descriptor, size_bytes)
        except OSError as error:
            raise from_os_error(error, f"setting the size of {self.path}") from error

    def write_change(self, old: memoryview, new: memoryview, offset_bytes: int) -> None:
        """Write the pages in which `new` differs from `old`, which is what stands there; zeros become holes."""
        for start, length in scan.differing_extents(old, new, PAGE_BYTES).tolist():
            part = new[start : start + length]
            for zero_start, zero_length in scan.zero_extents(part, PAGE_BYTES).tolist():
                self._punch(offset_bytes + start + zero_start, zero_length)
            self.write_data(part, offset_bytes + start)

    def _write(self, data: memoryview, offset_bytes: int) -> None:
        try:
            self._medium.write_at(self._descriptor, [data], offset_bytes)
        except OSError as error:
            raise from_os_error(error, f"writing {self.path} at offset {offset_bytes}") from error
        self._count(len(data))

    def _punch(self, offset_bytes: int, length_bytes: int) -> None:
        try:
            if not self._medium.punch(self._descriptor, offset_bytes, length_bytes):
                self._medium.write_at(self._descriptor, [bytes(length_bytes)], offset_bytes)
        except OSError as error:
            raise from_os_error(error, f"clearing {self.path} at offset {offset_bytes}") from error
        self._count(length_bytes)

    def _count(self, count_bytes: int) -> None:
        with self._lock:
            self.written_bytes += count_bytes
            self._unsynced_bytes += count_bytes
            if self._unsynced_bytes < _SYNC_EVERY_BYTES:
                return
            if self._syncing is not None:
                if not self._syncing.done():
                    return
                syncing, self._syncing = self._syncing, None
                self._check_sync(syncing)
            self._unsynced_bytes = 0
            self._syncing = self._executor.submit(self._sync)

    def _sync(self) -> None:
        try:
            self._medium.sync(self._descriptor)
        except OSError:
            self.sync_failed = True
            raise

    def _check_sync(self, syncing: Future[None]) -> None:
        try:
            syncing.result()
        except OSError as error:
            raise from_os_error(error, f"syncing {self.path}; restore it anew") from error

    def sync(self) -> None:
        """Everything written is durable; after a failure the target is not to be believed."""
        if self._syncing is not None:
            self._check_sync(self._syncing)
        self._check_sync(self._executor.submit(self._sync))

    def close(self) -> None:
        """Let go of the target."""
        self._executor.shutdown()
        os.close(self._descriptor)


@contextmanager
def open_target(
    path: str, size_bytes: int, *, in_place: bool, forbidden_folder: str | None = None, medium: Medium | None = None
) -> Iterator[RawTarget]:
    """Open a target for a disk of `size_bytes`; when the block ends well, it is synced and has its name.

    Parameters
    ----------
    path : str
    size_bytes : int
        A file becomes exactly this long; a device must be at least this long.
    in_place : bool
        Write into what exists; otherwise the name must be free.
    forbidden_folder : str, optional
        A repository or pool on this host, nothing in which may be overwritten.

    Raises
    ------
    ExistsError, NotFoundError, BusyError, RefusedError, UsageError, OutOfSpaceError, StoreError
    """
    medium = medium or Medium()
    _refuse_repository(path, forbidden_folder)
    if in_place:
        working, flags = path, os.O_RDWR
    else:
        if os.path.lexists(path):
            raise ExistsError(
                f"{path} exists already; restore to another name, or write what differs into it with --in-place"
            )
        working, flags = path + PARTIAL, os.O_RDWR | os.O_CREAT
    with _opened(working, flags, medium) as descriptor:
        fresh = _prepare(working, descriptor, size_bytes, medium)
        if not fresh and hasattr(os, "posix_fadvise"):
            # Pages that an earlier restore could not sync count as clean, and are not what the medium holds.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        target = RawTarget(working, descriptor, size_bytes, fresh=fresh, medium=medium)
        try:
            yield target
            target.sync()
        finally:
            target.close()
            if target.sync_failed and not in_place:
                # The next restore would go on with it.
                with contextlib.suppress(OSError):
                    medium.unlink(working)
        if not in_place:
            _publish(working, path, medium)


@contextmanager
def _opened(path: str, flags: int, medium: Medium) -> Iterator[int]:
    """Descriptor of a locked target. RawTarget works on a duplicate, so that the lock outlives it."""
    try:
        descriptor = _descriptor(path, flags, medium)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no {path} to restore into") from error
    except OSError as error:
        raise from_os_error(error, f"opening {path}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise UsageError(f"{path} is neither a file nor a block device")
        if stat.S_ISBLK(mode):
            _refuse_device_in_use(path, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BusyError(f"another process holds {path}; wait for it or choose another target") from error
        if not _stands_at(path, descriptor):
            raise BusyError(f"another process has just finished {path}; start the restore again")
        if flags & os.O_CREAT and os.fstat(descriptor).st_nlink > 1:
            # A crash between the two steps of `_publish` leaves this, and so does a link that somebody laid there.
            raise RefusedError(
                f"{path} is another name of a file that is no unfinished restore; remove that name and start again"
            )
        yield os.dup(descriptor)
    finally:
        os.close(descriptor)


def _descriptor(path: str, flags: int, medium: Medium) -> int:
    if flags & os.O_CREAT and os.path.islink(path):
        raise RefusedError(f"{path} is a symbolic link and no unfinished restore; remove it and start again")
    while True:
        try:
            follow = os.O_NOFOLLOW if flags & os.O_CREAT else 0
            return os.open(path, flags & ~os.O_CREAT | os.O_CLOEXEC | follow)
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                raise
        with contextlib.suppress(FileExistsError):
            return medium.create(path)


def _stands_at(path: str, descriptor: int) -> bool:
    """Whether the name is still that of the open file: a restore that ended before the lock was had gave it another."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _prepare(path: str, descriptor: int, size_bytes: int, medium: Medium) -> bool:
    """Give the target its size. Returns whether all of it reads as zeros."""
    try:
        if stat.S_ISBLK(os.fstat(descriptor).st_mode):
            found_bytes = device.size_bytes(descriptor)
            if found_bytes < size_bytes:
                raise UsageError(f"{path} has {found_bytes} bytes and the disk {size_bytes}; take a larger device")
            return False
        if os.fstat(descriptor).st_size != size_bytes:
            medium.truncate(descriptor, size_bytes)
        return len(file_data_extents(path, descriptor, size_bytes)) == 0
    except OSError as error:
        os.close(descriptor)
        raise from_os_error(error, f"preparing {path}") from error
    except Error:
        os.close(descriptor)
        raise


def _publish(working: str, path: str, medium: Medium) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    try:
        medium.link(working, path)
        medium.unlink(working)
        medium.sync_folder(folder)
    except FileExistsError as error:
        raise ExistsError(f"{path} came into being during the restore; the restored disk is in {working}") from error
    except OSError as error:
        raise from_os_error(error, f"naming {working} {path}") from error


def _refuse_repository(path: str, folder: str | None) -> None:
    if folder is None:
        return
    target, inside = os.path.realpath(path), os.path.realpath(folder)
    if target == inside or target.startswith(inside + os.sep):
        raise RefusedError(f"{path} lies in the repository or pool {folder}; take another target")
    with contextlib.suppress(OSError):
        mine = os.stat(target)
        # A second name of an object of the repository.
        if stat.S_ISREG(mine.st_mode) and mine.st_nlink > 1 and _linked_within(inside, mine):
            raise RefusedError(f"{path} is a file of the repository or pool {folder}; take another target")


def _linked_within(folder: str, status: os.stat_result) -> bool:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                # What may not be entered, as lost+found, holds no object.
                with contextlib.suppress(PermissionError):
                    if _linked_within(entry.path, status):
                        return True
            elif entry.inode() == status.st_ino and os.path.samestat(entry.stat(follow_symlinks=False), status):
                return True
    return False


def _refuse_device_in_use(path: str, descriptor: int) -> None:
    found = device.holder(descriptor, writing=False)
    if found:
        raise BusyError(f"{path} is held by {found}; release it, nothing was written")
    try:
        # O_EXCL on a block device asks the kernel whether anybody else holds it: mounts, swap, RAID, mappers.
        os.close(os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(f"{path} is in use by the system; release it, nothing was written") from error
        raise from_os_error(error, f"opening {path}") from error
