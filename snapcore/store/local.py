"""A store in a local folder, durable by its own hand.

An object is written to `tmp/`, synced, linked to its name (link fails when the name exists: that is the
create-if-absent) and the folder is synced; then the temporary name goes. A crash leaves at the most a file
in `tmp/`, which `sweep` removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from snapcore.errors import DamagedError, ExistsError, NotFoundError, ReadError, StoreError, UsageError, from_os_error
from snapcore.persist import Buffer, Medium

_NAME = re.compile(r"[a-z0-9-]+(/[a-z0-9-]+)*")
_PART = re.compile(r"[a-z0-9-]+")
_OPEN_FILES = 64
# Names have at most three parts.
_DEPTH_LIMIT = 16
_TEMPORARY = "tmp"
_PUBLICATIONS = 5


def is_name(name: str) -> bool:
    """Whether an object can have this name. Shared by all stores."""
    return _NAME.fullmatch(name) is not None and name.split("/", 1)[0] != _TEMPORARY


def checked_name(name: str) -> str:
    """The name, when it is one; else UsageError. Shared by all stores."""
    if not is_name(name):
        raise UsageError(f"{name!r} is no object name: parts of a-z, 0-9 and '-' joined by '/'")
    return name


class LocalStore:
    """Objects as files under a folder, which is made when it is not there."""

    def __init__(self, folder: str, medium: Medium | None = None) -> None:
        self.folder = os.path.abspath(folder)
        self._medium = medium or Medium()
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._durable_folders: set[str] = set()

    def __reduce__(self) -> tuple[type[LocalStore], tuple[str]]:
        """For another process: the same folder, opened there."""
        return LocalStore, (self.folder,)

    @property
    def url(self) -> str:
        return self.folder

    def get(self, name: str, limit_bytes: int) -> bytes:
        # Never from the open files: whether the name is still there is what a caller may want to know.
        file = _OpenFile(self._path(name))
        if file.size_bytes > limit_bytes:
            raise DamagedError(
                f"{self._path(name)} has {file.size_bytes} bytes where {limit_bytes} are the most; "
                "remove it or restore it from another copy of the repository"
            )
        return file.read(0, file.size_bytes)

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        return self._file(name).read(offset_bytes, length_bytes)

    def size(self, name: str) -> int:
        return _OpenFile(self._path(name)).size_bytes

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        if prefix:
            checked_name(prefix.removesuffix("/"))
        yield from (row for row in self._walk(prefix) if row[0] > after)

    def _walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        try:
            with os.scandir(os.path.join(self.folder, prefix)) as entries:
                found = sorted(entries, key=lambda entry: entry.name + "/" * entry.is_dir())
        except FileNotFoundError:
            return
        except OSError as error:
            raise from_os_error(error, f"listing {os.path.join(self.folder, prefix)}") from error
        for entry in found:
            if prefix == "" and entry.name == _TEMPORARY:
                continue
            # Nothing else can be an object or lead to one: lost+found, which is root's, or what an editor left.
            if not _PART.fullmatch(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                if prefix.count("/") >= _DEPTH_LIMIT:
                    raise StoreError(f"folders lie too deep in {os.path.join(self.folder, prefix)}; remove them")
                yield from self._walk(f"{prefix}{entry.name}/")
            elif entry.is_file(follow_symlinks=False):
                try:
                    yield prefix + entry.name, entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:
                    continue

    def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
        path = self._path(name)
        try:
            for _ in range(_PUBLICATIONS - 1):
                try:
                    return self._publish(path, buffers)
                except FileNotFoundError:
                    # The temporary file was swept in the instant before it was locked, or a folder is gone.
                    with self._lock:
                        self._durable_folders.clear()
            return self._publish(path, buffers)
        except FileExistsError as error:
            raise ExistsError(f"{path} exists already") from error
        except OSError as error:
            raise from_os_error(error, f"writing {path}") from error

    def _publish(self, path: str, buffers: Sequence[Buffer]) -> int:
        temporary = os.path.join(self.folder, _TEMPORARY, secrets.token_hex(16))
        self._make_folders(os.path.dirname(path))
        self._make_folders(os.path.dirname(temporary))
        descriptor = self._medium.create(temporary)
        try:
            try:
                # Held until the file has its name: it says that somebody is at work on it.
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                size_bytes = self._medium.write_at(descriptor, buffers, 0)
                self._medium.sync(descriptor)
                self._medium.link(temporary, path)
            finally:
                self._medium.close(descriptor)
        finally:
            with contextlib.suppress(OSError):
                self._medium.unlink(temporary)
        self._medium.sync_folder(os.path.dirname(path))
        return size_bytes

    def delete(self, name: str) -> None:
        path = self._path(name)
        try:
            self._medium.unlink(path)
            self._medium.sync_folder(os.path.dirname(path))
        except (IsADirectoryError, NotADirectoryError) as error:
            raise NotFoundError(f"there is no object {path}") from error
        except OSError as error:
            raise from_os_error(error, f"removing {path}") from error
        finally:
            with self._lock:
                self._open.pop(name, None)

    def settle(self, prefix: str) -> None:
        folder = os.path.join(self.folder, prefix)
        try:
            with os.scandir(folder) as entries:
                below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
            for name in below:
                if _PART.fullmatch(name) and (prefix or name != _TEMPORARY):
                    self.settle(f"{prefix}{name}/")
            self._medium.sync_folder(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise from_os_error(error, f"syncing {folder}") from error

    def sweep(self) -> int:
        """Remove what crashes left in `tmp/`: files that nobody holds a lock on. Returns the bytes freed."""
        folder = os.path.join(self.folder, _TEMPORARY)
        freed_bytes = 0
        try:
            for entry in list(os.scandir(folder)):
                with contextlib.suppress(FileNotFoundError):
                    freed_bytes += self._sweep(entry)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise from_os_error(error, f"removing temporary files in {folder}") from error
        return freed_bytes

    def _sweep(self, entry: os.DirEntry[str]) -> int:
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISREG(status.st_mode):
            descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return 0
            finally:
                os.close(descriptor)
        self._medium.unlink(entry.path)
        # With a second name it is an object whose writer died right after the publication.
        return status.st_size if status.st_nlink == 1 else 0

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, checked_name(name))

    def _make_folders(self, path: str) -> None:
        """Make a folder and its parents, durably: one that is there may have been made by who died before its sync."""
        with self._lock:
            if path in self._durable_folders:
                return
        parent = os.path.dirname(path)
        if path == self.folder:
            if not os.path.isdir(path):
                self._make_outer(path)
        else:
            self._make_folders(parent)
            self._medium.make_folder(path)
            self._medium.sync_folder(parent)
        with self._lock:
            self._durable_folders.add(path)

    def _make_outer(self, path: str) -> None:
        """Make the store's folder and what is missing above it."""
        parent = os.path.dirname(path)
        if not os.path.isdir(parent):
            self._make_outer(parent)
        self._medium.make_folder(path)
        self._medium.sync_folder(parent)

    def _file(self, name: str) -> _OpenFile:
        """The open file; objects are immutable, so descriptors are kept for the next read."""
        with self._lock:
            file = self._open.get(name)
            if file is not None:
                self._open.move_to_end(name)
                return file
        file = _OpenFile(self._path(name))
        with self._lock:
            self._open[name] = file
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return file


class _OpenFile:
    """A descriptor that closes when the last reader lets go of it."""

    __slots__ = ("descriptor", "path", "size_bytes")

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = -1
        try:
            # Without O_NONBLOCK a pipe under an object's name would be waited for.
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            found = os.fstat(self.descriptor)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"there is no {path}") from error
        except OSError as error:
            raise from_os_error(error, f"opening {path}") from error
        if not stat.S_ISREG(found.st_mode):
            raise NotFoundError(f"there is no object {path}")
        self.size_bytes = found.st_size

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        if offset_bytes < 0 or length_bytes < 0:
            raise UsageError(f"offset {offset_bytes} or length {length_bytes} is negative")
        if length_bytes > self.size_bytes - offset_bytes:
            raise self._ends_early(offset_bytes, length_bytes)
        parts = []
        while length_bytes:
            try:
                # One read moves at most 2 GiB; a short one before the end of the file is gone on with.
                part = os.pread(self.descriptor, min(length_bytes, 1 << 30), offset_bytes)
            except OSError as error:
                code = error.errno or errno.EIO
                reason = error.strerror or str(error)
                raise ReadError(self.path, offset_bytes, length_bytes, code, reason) from error
            if not part:
                raise self._ends_early(offset_bytes, length_bytes)
            parts.append(part)
            offset_bytes += len(part)
            length_bytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _ends_early(self, offset_bytes: int, length_bytes: int) -> DamagedError:
        return DamagedError(
            f"{self.path} ends before byte {offset_bytes + length_bytes}, where {length_bytes} bytes from "
            f"{offset_bytes} on were expected; run `snapcore verify` on the repository"
        )

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
