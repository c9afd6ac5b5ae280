"""A reader that counts what it hands out, and hands out no more a second than it may. Wraps any reader."""

from __future__ import annotations

import threading
import time

from snapcore.errors import UsageError
from snapcore.store.interface import Reader


class RateReader:
    """The reader inside, with its bytes counted; safe from many threads.

    Parameters
    ----------
    reader : Reader
    limit_bytes_per_s : int, optional
        Over any longer time. Those who ask for more wait.

    Attributes
    ----------
    read_bytes : int
        Handed out so far.
    """

    def __init__(self, reader: Reader, limit_bytes_per_s: int | None = None) -> None:
        if limit_bytes_per_s is not None and limit_bytes_per_s < 1:
            raise UsageError(f"a rate is at least one byte a second, not {limit_bytes_per_s}")
        self._reader = reader
        self._limit = limit_bytes_per_s
        self._lock = threading.Lock()
        self._free_at = time.monotonic()
        self.read_bytes = 0

    def get(self, name: str, limit_bytes: int) -> bytes:
        data = self._reader.get(name, limit_bytes)
        self._wait(len(data))
        return data

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        data = self._reader.get_range(name, offset_bytes, length_bytes)
        self._wait(len(data))
        return data

    def size(self, name: str) -> int:
        return self._reader.size(name)

    def _wait(self, count_bytes: int) -> None:
        with self._lock:
            self.read_bytes += count_bytes
            if self._limit is None:
                return
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count_bytes / self._limit
            wait_s = self._free_at - now
        time.sleep(wait_s)
