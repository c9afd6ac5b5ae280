"""A store with a bound on how many calls are under way at once. Wraps any store and keeps its contract."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence

from snapcore.errors import UsageError
from snapcore.persist import Buffer
from snapcore.store.interface import Store

_PAGE = 1000


class LimitStore:
    """The store inside, with at most `calls` calls at a time; further ones wait."""

    def __init__(self, store: Store, calls: int) -> None:
        if calls < 1:
            raise UsageError(f"a store needs room for at least one call at a time, not {calls}")
        self._store = store
        self._calls = calls
        self._room = threading.BoundedSemaphore(calls)

    def __reduce__(self) -> tuple[type[LimitStore], tuple[Store, int]]:
        """For another process, with calls of its own."""
        return LimitStore, (self._store, self._calls)

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def folder(self) -> str | None:
        return self._store.folder

    def get(self, name: str, limit_bytes: int) -> bytes:
        with self._room:
            return self._store.get(name, limit_bytes)

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        with self._room:
            return self._store.get_range(name, offset_bytes, length_bytes)

    def size(self, name: str) -> int:
        with self._room:
            return self._store.size(name)

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        rows: Iterator[tuple[str, int]] | None = None
        while True:
            # Room is never kept while the caller looks at a row: it may call again.
            with self._room:
                rows = self._store.list(prefix, after) if rows is None else rows
                page = list(itertools.islice(rows, _PAGE))
            if not page:
                return
            yield from page

    def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
        with self._room:
            return self._store.put_new(name, buffers)

    def delete(self, name: str) -> None:
        with self._room:
            self._store.delete(name)

    def settle(self, prefix: str) -> None:
        with self._room:
            self._store.settle(prefix)

    def sweep(self) -> int:
        with self._room:
            return self._store.sweep()
