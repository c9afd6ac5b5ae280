"""Every write that must outlive a crash goes through this file, so that a test can record and replay it.

| primitive | durable after |
| --- | --- |
| write_at, truncate, punch | `sync` of the same file |
| create, link, rename, unlink, make_folder | `sync_folder` of the folder that holds the name |

Nothing here retries: after a failed sync the state of the file is unknown, and the caller gives it up.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice

Buffer = bytes | bytearray | memoryview

# writev takes at most IOV_MAX (1024 on Linux and macOS) buffers a call.
_VECTOR_LIMIT = 1024
_PAGE_BYTES = 4096
_DIRECT_FROM_BYTES = 1 << 20
_STAGE_BYTES = 4 << 20
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01

_thread = threading.local()


class Medium:
    """The real operating system. Tests subclass it."""

    def create(self, path: str, mode: int = 0o666) -> int:
        """Make a new file; the name must be free. Returns a descriptor for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    def write_at(self, descriptor: int, buffers: Sequence[Buffer], offset_bytes: int) -> int:
        """Write all buffers one behind the other from offset on. Returns how many bytes.

        Long writes go past the page cache where the file system lets them: a GiB in objects of 16 MiB, two
        threads, synced, costs 0.18 s of CPU instead of 0.48 s (2-core EPYC, bench/choices.py), and the cache is left
        to the host's other work.
        """
        start = offset_bytes
        views = deque(memoryview(buffer).cast("B") for buffer in buffers if len(buffer))
        if sum(map(len, views)) >= _DIRECT_FROM_BYTES and offset_bytes % _PAGE_BYTES == 0:
            offset_bytes += _write_direct(descriptor, views, offset_bytes)
        while views:
            written = os.pwritev(descriptor, [*islice(views, _VECTOR_LIMIT)], offset_bytes)
            if written == 0:
                raise OSError(errno.EIO, "the operating system wrote nothing and gave no reason")
            offset_bytes += written
            _drop(views, written)
        return offset_bytes - start

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        """Set the size of a file."""
        os.ftruncate(descriptor, size_bytes)

    def punch(self, descriptor: int, offset_bytes: int, length_bytes: int) -> bool:
        """Make a range read as zeros and give its space back; False where the file system cannot."""
        return _fallocate(descriptor, _PUNCH_HOLE_KEEP_SIZE, offset_bytes, length_bytes)

    def sync(self, descriptor: int) -> None:
        """Make the content and size of a file durable."""
        _sync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name, which must be free."""
        os.link(source, target)

    def rename(self, source: str, target: str) -> None:
        """Move a name; what stood at the target is replaced."""
        os.replace(source, target)

    def unlink(self, path: str) -> None:
        """Remove a name."""
        os.unlink(path)

    def make_folder(self, path: str) -> None:
        """Make a folder; its parent must exist. One that is there already is fine."""
        try:
            os.mkdir(path)
        except FileExistsError:
            if not os.path.isdir(path):
                raise

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)


def replace(medium: Medium, path: str, data: Buffer) -> None:
    """Put a whole file in the place of another one, or of none, durably: a crash leaves the one or the other."""
    new = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        medium.unlink(new)
    descriptor = medium.create(new)
    try:
        medium.write_at(descriptor, [data], 0)
        medium.sync(descriptor)
    finally:
        medium.close(descriptor)
    medium.rename(new, path)
    medium.sync_folder(os.path.dirname(path))


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def _drop(views: deque[memoryview], count_bytes: int) -> None:
    """Take bytes that are written off the front."""
    while count_bytes:
        if count_bytes < len(views[0]):
            views[0] = views[0][count_bytes:]
            return
        count_bytes -= len(views.popleft())


def _write_direct(descriptor: int, views: deque[memoryview], offset_bytes: int) -> int:
    """Write whole pages off the front of `views` with O_DIRECT. Returns how many bytes; 0 where that does not work."""
    direct = _reopened_direct(descriptor)
    if direct is None:
        return 0
    start = offset_bytes
    try:
        stage = _stage()
        while views:
            ready = views[0] if _begins_on_page(views[0]) else stage[: _fill(stage, views)]
            whole = len(ready) // _PAGE_BYTES * _PAGE_BYTES
            if whole == 0:
                break
            try:
                written = os.pwrite(direct, ready[:whole], offset_bytes)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                break
            # What the kernel did not take goes the ordinary way.
            _drop(views, written)
            offset_bytes += written
            if written < whole or whole < len(ready):
                break
    finally:
        os.close(direct)
    return offset_bytes - start


def _reopened_direct(descriptor: int) -> int | None:
    """A second descriptor of the file: the flag on the first one would hit others who write through it."""
    if sys.platform != "linux":
        return None
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None


def _begins_on_page(view: memoryview) -> bool:
    """Whether memory can be written as it is: long, and aligned as O_DIRECT wants it."""
    if view.readonly or len(view) < _PAGE_BYTES:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) % _PAGE_BYTES == 0


def _stage() -> memoryview:
    """Memory of this thread that begins on a page, as O_DIRECT wants it."""
    found: memoryview | None = getattr(_thread, "stage", None)
    if found is None:
        found = _thread.stage = memoryview(mmap.mmap(-1, _STAGE_BYTES))
    return found


def _fill(stage: memoryview, views: deque[memoryview]) -> int:
    """Copy as much as fits to the stage, without taking it off `views`."""
    filled = 0
    for view in views:
        count = min(len(view), len(stage) - filled)
        stage[filled : filled + count] = view[:count]
        filled += count
        if filled == len(stage):
            break
    return filled


def _fallocate(descriptor: int, mode: int, offset_bytes: int, length_bytes: int) -> bool:
    if sys.platform != "linux":
        return False
    call = _libc().fallocate
    if call(descriptor, mode, offset_bytes, length_bytes) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
        return False
    raise OSError(code, os.strerror(code))


def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return library
