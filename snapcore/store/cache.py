"""A cache of what a far store holds, in files on this host: a decorator, bound to one repository.

Kept are stored bytes of objects that never change (docs/DESIGN.md, "Stores"): index objects and manifests whole, short
ranges of packs and index objects by windows. A file is headed by the BLAKE3 of its key and its bytes; one that does
not match is removed and read from the store again. Nothing that goes wrong with the cache is an error.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import blake3
import platformdirs

from snapcore.errors import DamagedError, UsageError
from snapcore.persist import Buffer
from snapcore.store.interface import Store

_LIMIT = "SNAPCORE_CACHE_MIB"
_LIMIT_MIB = 1024
_WHOLE = ("index/", "snapshots/")
_RANGES = ("index/", "packs/")
_WINDOW_BYTES = 64 << 10
# Longer ranges are those of restores: they would push out what is read again.
_RANGE_LIMIT_BYTES = 2 * _WINDOW_BYTES
_CHECKSUM_BYTES = 32
_SIZES_KEPT = 4096


def cache_limit_bytes() -> int:
    """Bytes that the cache of this host may hold: SNAPCORE_CACHE_MIB of the environment, 1 GiB without; 0: no cache."""
    text = os.environ.get(_LIMIT, str(_LIMIT_MIB))
    if not text.isdecimal():
        raise UsageError(f"{_LIMIT} is a number of MiB, not {text!r}")
    return int(text) << 20


class CacheStore:
    """The store inside, with a cache for what is read again.

    Parameters
    ----------
    store : Store
    repository_id : str
        Whose objects these are; others have files of their own.
    folder : str, optional
        Of all caches; default: in the user's cache folder.
    limit : int, optional
        Bytes that all files in the folder may take together; default: `cache_limit_bytes()`.
    """

    def __init__(self, store: Store, repository_id: str, folder: str | None = None, limit: int | None = None) -> None:
        self._store = store
        self._files = _Files(
            folder or str(platformdirs.user_cache_path("snapcore") / "objects"),
            repository_id,
            cache_limit_bytes() if limit is None else limit,
        )
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def folder(self) -> str | None:
        return self._store.folder

    def get(self, name: str, limit_bytes: int) -> bytes:
        if not name.startswith(_WHOLE):
            return self._store.get(name, limit_bytes)
        data = self._files.read(name)
        if data is None:
            data = self._store.get(name, limit_bytes)
            self._files.write(name, data)
        if len(data) > limit_bytes:
            raise DamagedError(f"{self.url}/{name} has {len(data)} bytes where {limit_bytes} are the most")
        return data

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        if not name.startswith(_RANGES) or not 0 < length_bytes <= _RANGE_LIMIT_BYTES or offset_bytes < 0:
            return self._store.get_range(name, offset_bytes, length_bytes)
        first = offset_bytes // _WINDOW_BYTES
        stop = -(-(offset_bytes + length_bytes) // _WINDOW_BYTES)
        windows = {number: self._files.read(_key(name, number)) for number in range(first, stop)}
        missing = [number for number, data in windows.items() if data is None]
        if missing:
            size_bytes = self._size(name)
            if offset_bytes + length_bytes > size_bytes:
                return self._store.get_range(name, offset_bytes, length_bytes)
            start, end = missing[0] * _WINDOW_BYTES, min((missing[-1] + 1) * _WINDOW_BYTES, size_bytes)
            fetched = self._store.get_range(name, start, end - start)
            for number in missing:
                at = number * _WINDOW_BYTES - start
                windows[number] = fetched[at : at + _WINDOW_BYTES]
                self._files.write(_key(name, number), fetched[at : at + _WINDOW_BYTES])
        joined = b"".join(data or b"" for data in windows.values())
        skip = offset_bytes - first * _WINDOW_BYTES
        if len(joined) < skip + length_bytes:
            # The object ends before the range does: the store says so in its own words.
            return self._store.get_range(name, offset_bytes, length_bytes)
        return joined[skip : skip + length_bytes]

    def size(self, name: str) -> int:
        return self._store.size(name)

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        return self._store.list(prefix, after)

    def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
        size_bytes = self._store.put_new(name, buffers)
        if name.startswith(_WHOLE):
            # The next snapshot of this host reads it.
            self._files.write(name, b"".join(buffers))
        return size_bytes

    def delete(self, name: str) -> None:
        self._store.delete(name)
        self._files.remove(name)
        with self._lock:
            self._sizes.pop(name, None)

    def settle(self, prefix: str) -> None:
        self._store.settle(prefix)

    def sweep(self) -> int:
        return self._store.sweep()

    def _size(self, name: str) -> int:
        """Length of an object that was there once."""
        with self._lock:
            known = self._sizes.get(name)
        if known is None:
            known = self._store.size(name)
            with self._lock:
                self._sizes[name] = known
                while len(self._sizes) > _SIZES_KEPT:
                    self._sizes.popitem(last=False)
        return known


def _key(name: str, window: int) -> str:
    return f"{name}:{window}"


class _Files:
    """Bytes under keys in a folder that many processes share, up to a limit; what fails is not there."""

    def __init__(self, folder: str, repository_id: str, limit: int) -> None:
        self._all = folder
        self._folder = os.path.join(folder, repository_id)
        self._limit = limit
        self._lock = threading.Lock()
        # So that the first entry makes a process look how much there is.
        self._unswept_bytes = limit

    def read(self, key: str) -> bytes | None:
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                found = file.read()
            os.utime(path)
        except OSError:
            return None
        data = found[_CHECKSUM_BYTES:]
        if _checksum(key, data) != found[:_CHECKSUM_BYTES]:
            self.remove(key)
            return None
        return data

    def write(self, key: str, data: bytes) -> None:
        if len(data) > self._limit // 4:
            return
        path = self._path(key)
        with contextlib.suppress(OSError):
            # What is in a repository is not for everybody on this host.
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
            try:
                with open(descriptor, "wb") as file:
                    file.write(_checksum(key, data) + data)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        self._evict(len(data))

    def remove(self, key: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._path(key))

    def _path(self, key: str) -> str:
        digest = blake3.blake3(key.encode()).hexdigest(16)
        return os.path.join(self._folder, digest[:2], digest)

    def _evict(self, added_bytes: int) -> None:
        """Remove the files that were used longest ago, when enough was added that there may be too many."""
        with self._lock:
            self._unswept_bytes += added_bytes
            if self._unswept_bytes < self._limit // 16:
                return
            self._unswept_bytes = 0
        found = []
        for folder, _, names in os.walk(self._all):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):
                    status = os.stat(path)
                    found.append((status.st_mtime_ns, status.st_size, path))
        left = sum(size_bytes for _, size_bytes, _ in found)
        if left <= self._limit:
            return
        for _, size_bytes, path in sorted(found):
            if left <= self._limit // 8 * 7:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                left -= size_bytes


def _checksum(key: str, data: bytes) -> bytes:
    return blake3.blake3(f"{key}\n".encode()).update(data).digest()
