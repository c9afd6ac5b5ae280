"""A region for tests: snapshots in memory, and how it fails, stalls and counts."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from snapcore import StoreError, extents
from snapcore.extents import Extents
from snapcore.pool import Region, RegionEvent

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
    pins : set of (snapshot, pool)
    events : list of RegionEvent
    on_pins : callable
        Is told of the pins when one was made, and before one goes.
    """

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes
        self.snapshots: dict[str, bytes] = {}
        self.failing = False
        self.stalled: set[tuple[int, int]] = set()
        self.go_on = threading.Event()
        self.reads: list[tuple[int, int]] = []
        self.trace_path: str | None = None
        self.pins: set[tuple[str, str]] = set()
        self.events: list[RegionEvent] = []
        self.on_pins: Callable[[frozenset[tuple[str, str]]], None] = lambda pins: None

    def put(self, snapshot: str, data: bytes) -> Region:
        """A snapshot there."""
        self.snapshots[snapshot] = data
        return Region("memory:region", "r" * 32, snapshot, self.chunk_bytes)

    def open(self, region: Region) -> Image:
        """The snapshot of an id."""
        found = Image(self, self.snapshots[region.snapshot])
        found.trace_path = self.trace_path
        return found

    def pin(self, region: Region, pool_id: str, who: str) -> None:
        """Remember it; fails as reads do."""
        self.pass_or_fail(0)
        assert who
        self.pins.add((region.snapshot, pool_id))
        self.on_pins(frozenset(self.pins))

    def unpin(self, region: Region, pool_id: str) -> None:
        """Forget it; fails as reads do."""
        self.pass_or_fail(0)
        self.on_pins(frozenset(self.pins - {(region.snapshot, pool_id)}))
        self.pins.discard((region.snapshot, pool_id))

    def tell(self, event: RegionEvent) -> None:
        """Remember it."""
        self.events.append(event)

    @property
    def pinned(self) -> list[str]:
        """Ids of the snapshots that are pinned."""
        return sorted(snapshot for snapshot, _ in self.pins)

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
