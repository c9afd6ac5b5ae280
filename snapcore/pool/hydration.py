"""Fetches the rest of an image in the background: what disks read first, then all in order; until it is whole.

A region that fails is tried again, less and less often; demand goes before all of it (`snapcore.pool.lazy`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import NamedTuple

from snapcore.errors import CancelledError, StoreError
from snapcore.extents import gaps, merged
from snapcore.pool.lazy import BACKGROUND_THREADS, LazyImage
from snapcore.progress import Progress, ProgressCallback

_LOOK_PERIOD_S = 0.02
_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_log = logging.getLogger("snapcore.pool")


class Hydration(NamedTuple):
    """How much of a lazy disk's image is here.

    Attributes
    ----------
    here_bytes, total_bytes : int
    running : bool
        The rest is being fetched in the background.
    error : str
        Of the last fetch, if it failed.
    """

    here_bytes: int
    total_bytes: int
    running: bool
    error: str

    @property
    def percent(self) -> float:
        """Of the bytes."""
        return 100 * self.here_bytes / self.total_bytes


class Hydrator:
    """Hydrates one image. Safe from many threads."""

    def __init__(self, image: LazyImage) -> None:
        self._image = image
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def state(self) -> Hydration:
        """How far it is."""
        image = self._image
        size = image.record.size_bytes
        here = size if image.is_whole else min(image.presence.here * image.region.chunk_bytes, size)
        return Hydration(here, size, self._thread is not None and self._thread.is_alive(), image.error)

    def start(self, rate_bytes_s: float | None = None) -> None:
        """Fetch the rest, at a rate, until all is here, it is stopped or the image is closed."""
        with self._lock:
            self._end()
            if not self._image.can_fetch:
                return
            self._image.error = ""
            self._stop = threading.Event()
            arguments = (rate_bytes_s, self._stop)
            self._thread = threading.Thread(target=self._run, args=arguments, name="snapcore-lazy", daemon=True)
            self._thread.start()

    def stop_soon(self) -> None:
        """Begin nothing more."""
        self._stop.set()

    def stop(self) -> None:
        """End what `start` began; what is under way is not waited for."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        self._stop.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def wait(self, what: str, progress: ProgressCallback | None) -> None:
        """Return when all is here; StoreError when a fetch failed, while the background goes on trying."""
        started = time.monotonic()
        while True:
            found = self.state
            if progress is not None:
                try:
                    elapsed_s = time.monotonic() - started
                    progress(Progress("hydrate", found.here_bytes, found.total_bytes, elapsed_s))
                except BaseException:
                    self.stop()
                    raise
            if not found.running:
                if self._image.is_whole:
                    return
                raise StoreError(f"{what}: it was stopped; {found.error or 'not all is here'}")
            if found.error:
                raise StoreError(f"{what}: {found.error}; it goes on when the region can be reached")
            time.sleep(_LOOK_PERIOD_S)

    def _run(self, rate_bytes_s: float | None, stop: threading.Event) -> None:
        failures = 0
        while not stop.is_set():
            try:
                self._mark_zeros(stop)
                while not self._image.is_whole and not stop.is_set():
                    self._fetch_all(rate_bytes_s, stop)
                if not stop.is_set():
                    self._image.save()
            except CancelledError:
                return
            except Exception as error:  # noqa: BLE001 - it is told, and tried again
                image = self._image
                image.error = str(error) or type(error).__name__
                _log.warning("hydrating from snapshot %s: %s", image.region.snapshot, image.error)
                stop.wait(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
                failures += 1
            else:
                return

    def _mark_zeros(self, stop: threading.Event) -> None:
        """What the snapshot's map knows to be zero need not be fetched."""
        image = self._image
        size, end = image.region.chunk_bytes, image.record.size_bytes
        # In a thread that nobody waits for: the region may not answer.
        rows = image.aside(lambda: image.opened().data_extents())
        while not rows.done():
            if stop.wait(0.05):
                raise CancelledError("hydration was stopped")
        for offset, length in gaps(merged(rows.result()), end).tolist():
            first = -(-offset // size)
            last = image.presence.chunks if offset + length >= end else (offset + length) // size
            if first < last:
                image.mark_zeros(first, last - first)

    def _fetch_all(self, rate_bytes_s: float | None, stop: threading.Event) -> None:
        image = self._image
        begun, done, under_way = time.monotonic(), 0, set[Future[None]]()
        for windows in self._spans():
            missing = image.presence.missing(
                windows.start * image.chunks_of_window, len(windows) * image.chunks_of_window
            )
            while len(under_way) >= 2 * BACKGROUND_THREADS:
                _settle(under_way)
                if stop.is_set():
                    return
            under_way.add(image.begin(windows))
            done += int(missing[:, 1].sum()) * image.region.chunk_bytes
            if stop.wait(max(0.0, done / rate_bytes_s - (time.monotonic() - begun)) if rate_bytes_s else 0):
                return
        while under_way and not stop.is_set():
            _settle(under_way)

    def _spans(self) -> Iterator[range]:
        """What is missing: windows that disks read first, then all in order, several at once; until nothing is."""
        image = self._image
        for window in image.first_windows():
            if self._lacks(window):
                yield range(window, window + 1)
        window = 0
        while window < image.windows:
            if not self._lacks(window):
                window += 1
                continue
            stop = window + 1
            while stop < min(image.windows, window + image.span_windows) and self._lacks(stop):
                stop += 1
            yield range(window, stop)
            window = stop

    def _lacks(self, window: int) -> bool:
        image = self._image
        return len(image.presence.missing(window * image.chunks_of_window, image.chunks_of_window)) > 0


def _settle(under_way: set[Future[None]]) -> None:
    """Take out what is done, waiting a little for it; raises what failed."""
    done, _ = wait(under_way, 0.05, "FIRST_COMPLETED")
    under_way -= done
    for future in done:
        future.result()
