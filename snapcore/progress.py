"""How long work reports and is stopped: a callback that gets a `Progress` and may raise `CancelledError`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class Progress(NamedTuple):
    """Where a piece of work stands.

    Attributes
    ----------
    stage : str
        What is going on now: "read", "restore", "verify", "collect", …
    done_bytes, total_bytes : int
        How far, in bytes of the disk (or of packs where packs are worked on).
    elapsed_s : float
        Seconds since the stage began.
    """

    stage: str
    done_bytes: int
    total_bytes: int
    elapsed_s: float

    @property
    def percent(self) -> float:
        """0 to 100; 100 where there is nothing to do."""
        return 100.0 * self.done_bytes / self.total_bytes if self.total_bytes else 100.0

    @property
    def remaining_s(self) -> float | None:
        """Seconds left at the mean rate so far; None before the first byte."""
        if self.done_bytes == 0:
            return None
        return self.elapsed_s * (self.total_bytes - self.done_bytes) / self.done_bytes


ProgressCallback = Callable[[Progress], None]


class Meter:
    """Counts bytes of one stage and calls the callback for each step; raising there stops the work."""

    def __init__(self, callback: ProgressCallback | None, stage: str, total_bytes: int) -> None:
        self._callback = callback
        self._stage = stage
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._start = time.monotonic()
        self.advance(0)

    def advance(self, count_bytes: int) -> None:
        """Count bytes as done and report."""
        self._done_bytes += count_bytes
        if self._callback is not None:
            elapsed_s = time.monotonic() - self._start
            self._callback(Progress(self._stage, self._done_bytes, self._total_bytes, elapsed_s))
