"""A store in memory: for tests, and for who embeds snapcore and wants no file at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from snapcore.errors import DamagedError, ExistsError, NotFoundError, UsageError
from snapcore.persist import Buffer
from snapcore.store.local import checked_name


class MemoryStore:
    """Objects in a dict; copies what it is given."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> str:
        raise UsageError("a store in memory is this process's alone: work on it with threads, not with processes")

    @property
    def url(self) -> str:
        return f"memory:{id(self):x}"

    @property
    def folder(self) -> None:
        return None

    def get(self, name: str, limit_bytes: int) -> bytes:
        data = self._object(name)
        if len(data) > limit_bytes:
            raise DamagedError(f"{self.url}/{name} has {len(data)} bytes where {limit_bytes} are the most")
        return data

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        if offset_bytes < 0 or length_bytes < 0:
            raise UsageError(f"offset {offset_bytes} or length {length_bytes} is negative")
        data = self._object(name)
        if length_bytes > len(data) - offset_bytes:
            raise DamagedError(f"{self.url}/{name} ends at byte {len(data)}, not at {offset_bytes + length_bytes}")
        return data[offset_bytes : offset_bytes + length_bytes]

    def size(self, name: str) -> int:
        return len(self._object(name))

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        if prefix:
            checked_name(prefix.removesuffix("/"))
        with self._lock:
            rows = [(name, len(data)) for name, data in self._objects.items() if name.startswith(prefix)]
        yield from sorted(row for row in rows if row[0] > after)

    def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
        data = b"".join(buffers)
        with self._lock:
            if checked_name(name) in self._objects:
                raise ExistsError(f"{self.url}/{name} exists already")
            self._objects[name] = data
        return len(data)

    def delete(self, name: str) -> None:
        with self._lock:
            if self._objects.pop(checked_name(name), None) is None:
                raise NotFoundError(f"there is no {self.url}/{name}")

    def settle(self, prefix: str) -> None:
        del prefix

    def sweep(self) -> int:
        return 0

    def _object(self, name: str) -> bytes:
        with self._lock:
            data = self._objects.get(checked_name(name))
        if data is None:
            raise NotFoundError(f"there is no {self.url}/{name}")
        return data
