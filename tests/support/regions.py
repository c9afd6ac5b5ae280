"""Repositories with and without keys, for copies between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from snapcore import Repository
from snapcore.errors import StoreError
from snapcore.keys import KeyFile
from snapcore.persist import Buffer
from snapcore.store import MemoryStore, Store


def region(folder: Path, keys: Sequence[str] = (), chunk_bytes: int = 65536, store: Store | None = None) -> Repository:
    """A new repository in memory with these keys, unlocked; each has a key file in `folder`."""
    made = Repository.create(MemoryStore() if store is None else store, chunk_bytes=chunk_bytes)
    for name in keys:
        path = folder / f"{name}-{made.id}"
        made.keyring.create(name, KeyFile.create(str(path)))
    return made


def share(key: str, source: Repository, target: Repository, folder: Path) -> None:
    """Make a key of one repository that of another one too."""
    source.keyring.share(key, target.keyring, KeyFile.create(str(folder / f"{key}-{source.id}-{target.id}")))


class Watched:
    """A store that calls a hook with method and name before each call, which may raise."""

    def __init__(self, store: Store, hook: Callable[[str, str], None]) -> None:
        self._store = store
        self.hook = hook

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def folder(self) -> str | None:
        return self._store.folder

    def get(self, name: str, limit_bytes: int) -> bytes:
        self.hook("get", name)
        return self._store.get(name, limit_bytes)

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        self.hook("get_range", name)
        return self._store.get_range(name, offset_bytes, length_bytes)

    def size(self, name: str) -> int:
        self.hook("size", name)
        return self._store.size(name)

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        self.hook("list", prefix)
        return self._store.list(prefix, after)

    def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
        self.hook("put_new", name)
        return self._store.put_new(name, buffers)

    def delete(self, name: str) -> None:
        self.hook("delete", name)
        self._store.delete(name)

    def settle(self, prefix: str) -> None:
        self.hook("settle", prefix)
        self._store.settle(prefix)

    def sweep(self) -> int:
        return self._store.sweep()


class FailingOnce:
    """A hook: the call of that number fails."""

    def __init__(self, number: int) -> None:
        self._left = number
        self._lock = threading.Lock()
        self.failed = False

    def __call__(self, method: str, name: str) -> None:
        with self._lock:
            self._left -= 1
            if self._left == -1:
                self.failed = True
                raise StoreError(f"the store failed at {method} {name}, as it was told to")
