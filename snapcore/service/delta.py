"""A snapshot of a pool as a source for a repository: what of it has to be read, at a limited rate, until cancelled."""

from __future__ import annotations

import threading
import time

from snapcore import extents
from snapcore.core import BLOCK_BYTES
from snapcore.errors import CancelledError
from snapcore.extents import Extents
from snapcore.pool import Snapshot

# Shorter runs are read without a look at the map: a hole among them costs less than the look.
_LOOKED_AT_BYTES = 1 << 20


class Pace:
    """A rate in bytes a second that several threads keep together; 0 is none. Stops them when told to."""

    def __init__(self, rate_bytes_s: int = 0) -> None:
        self._rate = rate_bytes_s
        self._due = time.monotonic()
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """From now on `take` raises."""
        self._stopped.set()

    def check(self) -> None:
        """CancelledError when it was told to stop."""
        if self._stopped.is_set():
            raise CancelledError("the archive was cancelled; nothing of it is visible")

    def take(self, count_bytes: int) -> None:
        """Wait until so many bytes may pass."""
        self.check()
        if not self._rate:
            return
        with self._lock:
            now = time.monotonic()
            # Time that nobody used is not saved up.
            start = max(self._due, now)
            self._due = start + count_bytes / self._rate
        if start > now and self._stopped.wait(start - now):
            self.check()


class Delta:
    """A `Source`: a snapshot of a pool of which the bytes in `changed` will be read.

    Outside of `changed` it says that data may be everywhere, so whoever reads there finds what is there.
    """

    # What differs between two versions of a pool is known to the block (a `MappedSource`).
    map_bytes = BLOCK_BYTES

    def __init__(self, snapshot: Snapshot, changed: Extents | None, chunk_bytes: int, pace: Pace) -> None:
        self._snapshot = snapshot
        self._pace = pace
        self._changed = None if changed is None else extents.aligned(changed, chunk_bytes, snapshot.size_bytes)

    @property
    def name(self) -> str:
        """Of the disk and the snapshot."""
        return f"snapshot {self._snapshot.name} of disk {self._snapshot.disk}"

    @property
    def size_bytes(self) -> int:
        """Length of the disk."""
        return self._snapshot.size_bytes

    def data_extents(self) -> Extents:
        """Everything but the holes of what has changed."""
        if self._changed is None:
            return self._snapshot.data_extents()
        size = self.size_bytes
        holes = [extents.empty()]
        for offset, length in self._changed[self._changed[:, 1] >= _LOOKED_AT_BYTES].tolist():
            row = extents.from_pairs([(offset, length)])
            holes.append(extents.difference(row, extents.from_pairs(self._snapshot.data_extents(offset, length)), size))
        return extents.gaps(extents.from_pairs([tuple(row) for part in holes for row in part.tolist()]), size)

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        """Fill `target`, no faster than allowed."""
        self._pace.take(len(target))
        self._snapshot.read_into(target, offset_bytes)

    def check_unchanged(self) -> None:
        """A snapshot does not change; one that is cancelled in the end is not committed."""
        self._pace.check()
