"""A region for tests: snapshots in memory, and how it fails, stalls and counts."""

from __future__ import annotations

import threading

import numpy as np

from snapcore import StoreError, extents
from snapcore.extents import Extents
from snapcore.pool import Region

CHUNK_BYTES = 4096


class Image:
    """A `Source` of bytes."""

    def __init__(self, regions: Regions, data: bytes) -> None:
        self._regions = regions
        self._data = data
        self.name = "a snapshot"
        self.size_bytes = len(data)
        self.trace_path: str | None = None

    def data_extents(self) -> Extents:
        """Where it is not zero, to the chunk."""
        self._regions.pass_or_fail(0)
        size = self._regions.chunk_bytes
        there = [at for at in range(0, len(self._data), size) if any(self._data[at : at + size])]
        rows = np.array([(at, min(size, len(self._data) - at)) for at in there], dtype=np.int64).reshape(-1, 2)
        return extents.merged(rows)

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        """Fill `target`, if the region can be reached."""
        self._regions.pass_or_fail(len(target), offset_bytes)
        target[:] = self._data[offset_bytes : offset_bytes + len(target)]

    def check_unchanged(self) -> None:
        """It does not."""


class Regions:
    """Opens snapshots by id.

    Attributes
    ----------
    failing : bool
        Everything fails.
    stalled : set of (start, stop)
        Reads that touch these bytes wait for `go_on`; all do with `(0, 1 << 62)`.
    reads : list of (offset, length)
    """

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes
        self.snapshots: dict[str, bytes] = {}
        self.failing = False
        self.stalled: set[tuple[int, int]] = set()
        self.go_on = threading.Event()
        self.reads: list[tuple[int, int]] = []
        self.trace_path: str | None = None

    def put(self, snapshot: str, data: bytes) -> Region:
        """A snapshot there."""
        self.snapshots[snapshot] = data
        return Region("memory:region", "r" * 32, snapshot, self.chunk_bytes)

    def __call__(self, region: Region) -> Image:
        found = Image(self, self.snapshots[region.snapshot])
        found.trace_path = self.trace_path
        return found

    def pass_or_fail(self, length: int, offset: int = 0) -> None:
        """What happens to a read."""
        if length:
            self.reads.append((offset, length))
        if any(offset < stop and start < offset + length for start, stop in self.stalled):
            assert self.go_on.wait(60)
        if self.failing:
            raise StoreError("the region cannot be reached")

    @property
    def fetched_bytes(self) -> int:
        """In all reads so far."""
        return sum(length for _, length in self.reads)
