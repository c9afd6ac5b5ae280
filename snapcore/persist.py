"""Every persistent write of snapcore goes through this file, so that a test can record and replay it.

| primitive | durable after |
| --- | --- |
| write_at, truncate, punch | `sync` of the same file |
| create, link, rename, unlink, make_folder | `sync_folder` of the folder that holds the name |

Nothing here retries: after a failed sync the state of the file is unknown, and the caller gives it up.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Sequence

Buffer = bytes | bytearray | memoryview

# writev takes at most IOV_MAX (1024 on Linux and macOS) buffers a call.
_VECTOR_LIMIT = 1024
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01


class Medium:
    """The real operating system. Tests subclass it."""

    def create(self, path: str, mode: int = 0o666) -> int:
        """Make a new file; the name must be free. Returns a descriptor for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    def write_at(self, descriptor: int, buffers: Sequence[Buffer], offset_bytes: int) -> int:
        """Write all buffers one behind the other from offset on. Returns how many bytes."""
        start = offset_bytes
        views = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        first = 0
        while first < len(views):
            batch = views[first : first + _VECTOR_LIMIT]
            written = os.pwritev(descriptor, batch, offset_bytes)
            if written == 0:
                raise OSError(errno.EIO, "the operating system wrote nothing and gave no reason")
            offset_bytes += written
            while written:
                if written < len(views[first]):
                    views[first] = views[first][written:]
                    break
                written -= len(views[first])
                first += 1
        return offset_bytes - start

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        """Set the size of a file."""
        os.ftruncate(descriptor, size_bytes)

    def punch(self, descriptor: int, offset_bytes: int, length_bytes: int) -> bool:
        """Make a range read as zeros and give its space back; False where the file system cannot."""
        return _fallocate(descriptor, _PUNCH_HOLE_KEEP_SIZE, offset_bytes, length_bytes)

    def sync(self, descriptor: int) -> None:
        """Make the content and size of a file durable."""
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)

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
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
