"""A store that counts its calls, and the bytes that go in and out, by kind of call and kind of object."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence

from snapcore.persist import Buffer
from snapcore.store import Store

# Rows that one request of a list brings.
PAGE = 1000


class CountingStore:
    """The store inside, and how much it was used.

    Attributes
    ----------
    calls : Counter of (method, kind of object)
        Kind: the name up to the first "/". A list counts once for each thousand rows that were taken.
    sent_bytes, received_bytes : int
        Of objects; names and headers are not counted.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Begin at zero."""
        self.calls: Counter[tuple[str, str]] = Counter()
        self.sent_bytes = 0
        self.received_bytes = 0

    def total(self, method: str) -> int:
        """Calls of a method on all kinds of objects."""
        return sum(count for (name, _), count in self.calls.items() if name == method)

    def _count(self, method: str, name: str) -> None:
        with self._lock:
            self.calls[method, name.partition("/")[0]] += 1

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def folder(self) -> str | None:
        return self._store.folder

    def get(self, name: str, limit_bytes: int) -> bytes:
        self._count("get", name)
        return self._received(self._store.get(name, limit_bytes))

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        self._count("get_range", name)
        return self._received(self._store.get_range(name, offset_bytes, length_bytes))

    def _received(self, data: bytes) -> bytes:
        with self._lock:
            self.received_bytes += len(data)
        return data

    def size(self, name: str) -> int:
        self._count("size", name)
        return self._store.size(name)

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        self._count("list", prefix)
        for number, row in enumerate(self._store.list(prefix, after)):
            if number and number % PAGE == 0:
                self._count("list", prefix)
            yield row

    def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
        self._count("put_new", name)
        size_bytes = self._store.put_new(name, buffers)
        with self._lock:
            self.sent_bytes += size_bytes
        return size_bytes

    def delete(self, name: str) -> None:
        self._count("delete", name)
        self._store.delete(name)

    def settle(self, prefix: str) -> None:
        self._store.settle(prefix)

    def sweep(self) -> int:
        return self._store.sweep()
