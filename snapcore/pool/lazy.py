"""An image of the pool's own that fills up from a snapshot in a region (docs/DESIGN.md, "Lazy disks").

A chunk is here when its bit is set, and the bit is set when its bytes are in the file. The bitmap is stored only after
the file was synced, so a crash loses bits, which costs fetches, and never leaves one too many.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import threading
import time
from concurrent.futures import Future, InvalidStateError, wait
from typing import NamedTuple

from snapcore import scan
from snapcore.digest import xxh64_blocks
from snapcore.errors import CancelledError, Error, OutOfSpaceError, StoreError
from snapcore.extents import gaps, merged
from snapcore.parallel import Daemons
from snapcore.persist import replace
from snapcore.pool.catalog import Backing
from snapcore.pool.files import Files
from snapcore.pool.regions import RegionEvent, Regions
from snapcore.presence import Presence
from snapcore.progress import Progress, ProgressCallback
from snapcore.source.interface import Source

FOLDER = "lazy"
WINDOW_BYTES = 1 << 20
BUDGET_S = 30.0
_AHEAD_BYTES = 4 << 20
_DEMAND_THREADS = 8
_BACKGROUND_THREADS = 2
_SAVE_PERIOD_S = 5.0
_SAVE_BYTES = 64 << 20
_ZERO_BYTES = 4096
# Short enough to go through the page cache: who asked reads there next.
_PIECE_BYTES = 512 << 10
_TRACED = 512
_LOOK_PERIOD_S = 0.02
_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_MAGIC = b"SNAPHERE"
_HEADER = struct.Struct("<8sIIQQ64s64s")
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


class _Window(Future[None]):
    """A window in flight: whether its work has begun, and whether that waits for others in the background."""

    begun = False
    waits = False


class LazyImage:
    """The image of one snapshot in a region, shared by all disks over it. Safe from many threads.

    Attributes
    ----------
    descriptor : int
        Of the file; -1 when it cannot be used.
    presence : Presence
    """

    def __init__(self, files: Files, record: Backing, regions: Regions | None, *, budget_s: float = BUDGET_S) -> None:
        assert record.region is not None
        self.record = record
        self.region = record.region
        self.presence = Presence(record.size_bytes, self.region.chunk_bytes)
        self.descriptor = -1
        self.error = ""
        self.budget_s = budget_s
        self._medium = files.medium
        self._read_only = files.read_only
        self._path = files.path(record.path)
        self._present = f"{self._path.removesuffix('.data')}.present"
        self._trace_path = f"{self._path.removesuffix('.data')}.trace"
        self._regions = regions
        self._source: Source | None = None
        self._opening = threading.Lock()
        self._window = max(1, WINDOW_BYTES // self.region.chunk_bytes)
        self._flying: dict[int, _Window] = {}
        # Under this: what is in flight, and whether it is closed. Under `_writing`: the file.
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._saving = threading.Lock()
        self._ended = False
        self._closed = False
        self._broken = False
        self._sealed = False
        self._failing = False
        self._unsaved_bytes = 0
        self._saved_at = time.monotonic()
        self._sequel = range(0)
        self._ahead = 1
        self._trace: list[int] = []
        self._demand = Daemons(_DEMAND_THREADS, "snapcore-demand")
        self._background = Daemons(_BACKGROUND_THREADS, "snapcore-hydrate")
        self._stop = threading.Event()
        self._hydrating: threading.Thread | None = None
        self._open()

    # Opening and closing

    def _open(self) -> None:
        known = self._load()
        flags = os.O_CLOEXEC | (os.O_RDONLY if self._read_only else os.O_RDWR)
        with contextlib.suppress(OSError):
            self.descriptor = os.open(self._path, flags)
        if self.descriptor >= 0 and known and os.fstat(self.descriptor).st_size == self.record.size_bytes:
            return
        self.presence = Presence(self.record.size_bytes, self.region.chunk_bytes)
        if not self._read_only:
            self._begin_anew()
        elif self.descriptor >= 0 and os.fstat(self.descriptor).st_size != self.record.size_bytes:
            os.close(self.descriptor)
            self.descriptor = -1

    def _begin_anew(self) -> None:
        """An empty file. What says that something is here goes first, and durably."""
        medium, folder = self._medium, os.path.dirname(self._path)
        medium.make_folder(folder)
        medium.sync_folder(os.path.dirname(folder))
        with contextlib.suppress(FileNotFoundError):
            medium.unlink(self._present)
            medium.sync_folder(folder)
        if self.descriptor < 0:
            self.descriptor = medium.create(self._path)
        medium.truncate(self.descriptor, 0)
        medium.truncate(self.descriptor, self.record.size_bytes)
        medium.sync(self.descriptor)
        medium.sync_folder(folder)

    def stop_soon(self) -> None:
        """Fetch no more. Who waits for a fetch gets an error; what a region still sends is dropped."""
        with self._lock:
            self._ended = True
            flying = [*self._flying.values()]
        self._stop.set()
        for future in flying:
            # It may be done.
            with contextlib.suppress(InvalidStateError):
                future.set_exception(CancelledError("the image was closed"))

    def close(self) -> None:
        """Let go."""
        self.stop_soon()
        self._demand.shutdown(wait=False, cancel_futures=True)
        self._background.shutdown(wait=False, cancel_futures=True)
        if self._hydrating is not None and self._hydrating is not threading.current_thread():
            self._hydrating.join()
        with self._saving, self._writing:
            self._closed = True
            if self.descriptor >= 0:
                os.close(self.descriptor)
                self.descriptor = -1

    # What the kernel asks for

    def fetch(self, start: int, end: int) -> int:
        """Bring bytes `start` to `end` here. Returns 0, or an errno, of which `regions` are told."""
        if self._read_only:
            self.error = "it is not here yet, and the pool was opened for reading only"
            return errno.EROFS
        if self._regions is None:
            self.error = "it is not here yet, and the pool was opened without regions"
            return errno.ENOTCONN
        code = self._fetch(start, end)
        if code == 0 and self._failing:
            self._failing = False
            self._regions.tell(RegionEvent("back", self.region, ""))
        elif code not in (0, errno.ESHUTDOWN):
            self._failing = True
            self._regions.tell(RegionEvent("failed", self.region, self.error))
        return code

    def _fetch(self, start: int, end: int) -> int:
        deadline = time.monotonic() + self.budget_s
        first, last = self._windows(start, min(end, self.record.size_bytes))
        try:
            futures = [self._begin(window, self._demand) for window in range(first, last)]
        except CancelledError:
            return errno.ESHUTDOWN
        self._note(first, last)
        for future in futures:
            try:
                # A Future's own timeout is an Exception of the same name as a store's.
                if not wait([future], max(0.0, deadline - time.monotonic())).done:
                    self.error = f"{self.region.url} gave no answer within {self.budget_s:g} s"
                    _log.warning("snapshot %s: %s", self.region.snapshot, self.error)
                    return errno.ETIMEDOUT
                future.result()
            except CancelledError:
                return errno.ESHUTDOWN
            except OutOfSpaceError:
                return errno.ENOSPC
            except Exception as error:  # noqa: BLE001 - of whatever the region's side is made of
                return (isinstance(error, OSError) and error.errno) or errno.EIO
        return 0

    def _windows(self, start: int, end: int) -> tuple[int, int]:
        """First window of a range, and the one behind the last."""
        bytes_each = self._window * self.region.chunk_bytes
        return start // bytes_each, max(start // bytes_each, (end - 1) // bytes_each) + 1

    def _note(self, first: int, last: int) -> None:
        """Read on where somebody reads one window after another, and remember what was asked for first."""
        with self._lock:
            if first in self._sequel:
                self._ahead = min(self._ahead * 2, max(1, _AHEAD_BYTES // WINDOW_BYTES))
                more = range(last, min(last + self._ahead, self._windows(0, self.record.size_bytes)[1]))
            else:
                self._ahead, more = 1, range(0)
            self._sequel = range(last, last + len(more) + 1)
            if len(self._trace) < _TRACED:
                self._trace += [window for window in range(first, last) if window not in self._trace]
        for window in more:
            with contextlib.suppress(CancelledError):
                self._begin(window, self._background)

    def _begin(self, window: int, threads: Daemons) -> _Window:
        """Fetch a window, unless somebody does. One that waits in the background is not waited for by a demand."""
        with self._lock:
            if self._ended:
                raise CancelledError("the image was closed")
            found = self._flying.get(window)
            if found is not None and not (threads is self._demand and found.waits):
                return found
            if found is None:
                found = self._flying[window] = _Window()
            found.waits = threads is self._background
            try:
                threads.submit(self._work, window, found)
            except RuntimeError:
                raise CancelledError("the image was closed") from None
            return found

    def _work(self, window: int, future: _Window) -> None:
        with self._lock:
            if self._flying.get(window) is not future or future.begun:
                return
            future.begun, future.waits = True, False
        failure: BaseException | None = None
        try:
            self._fill(window * self._window, self._window)
            self.error = ""
        except BaseException as error:  # noqa: BLE001 - handed to who waits
            failure = error
            if not isinstance(error, CancelledError):
                self.error = str(error) or type(error).__name__
                _log.warning("fetching from snapshot %s in %s: %s", self.region.snapshot, self.region.url, self.error)
        with self._lock:
            self._flying.pop(window, None)
        # It may be done already: closed meanwhile.
        with contextlib.suppress(InvalidStateError):
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)

    def _fill(self, first: int, count: int) -> None:
        """Fetch what is missing of these chunks."""
        size = self.region.chunk_bytes
        for begin, chunks in self.presence.missing(first, count).tolist():
            start, end = begin * size, min((begin + chunks) * size, self.record.size_bytes)
            data = bytearray(end - start)
            self._opened().read_into(memoryview(data), start)
            self._put(data, start, begin, chunks)

    def _put(self, data: bytearray, start: int, first: int, count: int) -> None:
        with self._writing:
            if self._closed or self._broken:
                raise CancelledError("the image was closed")
            view = memoryview(data)
            for offset, length in scan.nonzero_extents(data, _ZERO_BYTES).tolist():
                for at in range(offset, offset + length, _PIECE_BYTES):
                    part = view[at : min(at + _PIECE_BYTES, offset + length)]
                    self._medium.write_at(self.descriptor, [part], start + at)
            self.presence.add(first, count)
            self._unsaved_bytes += len(data)

    def _opened(self) -> Source:
        with self._opening:
            if self._source is None:
                assert self._regions is not None
                found = self._regions.open(self.region)
                if found.size_bytes != self.record.size_bytes:
                    raise Error(
                        f"snapshot {self.region.snapshot} in {self.region.url} has {found.size_bytes} bytes, "
                        f"not {self.record.size_bytes}: it is not the one that the disk was made from"
                    )
                self._source = found
            return self._source

    # What survives

    def keep(self) -> None:
        """Save what is here when it is time to."""
        late = time.monotonic() - self._saved_at > _SAVE_PERIOD_S
        if self._unsaved_bytes and (late or self._unsaved_bytes > _SAVE_BYTES):
            self.save()

    def save(self) -> None:
        """What is here now is here after a crash too."""
        with self._saving:
            if self._read_only or self._closed or self._broken or self._sealed or not self._unsaved_bytes:
                return
            unsaved, words = self._unsaved_bytes, self.presence.to_bytes()
            try:
                self._medium.sync(self.descriptor)
            except OSError as error:
                self._give_up(error)
                raise
            body = self._header() + words
            replace(self._medium, self._present, body + _checksum(body))
            self._save_trace()
            with self._writing:
                self._unsaved_bytes -= unsaved
            self._saved_at = time.monotonic()

    def seal(self) -> None:
        """All is here, and durable, whatever was saved before: nothing is written from now on.

        Raises
        ------
        StoreError
            It is not, or what the file holds is not known.
        """
        with self._saving:
            if self._broken or self._closed or not self.is_whole:
                raise StoreError(self.error or f"{self._path} is not all here")
            try:
                self._medium.sync(self.descriptor)
            except OSError as error:
                self._give_up(error)
                raise
            if os.fstat(self.descriptor).st_size != self.record.size_bytes:
                raise StoreError(f"{self._path} has another length than the snapshot; was it changed by others?")
            self._sealed = True

    def _save_trace(self) -> None:
        with self._lock:
            bytes_each = self._window * self.region.chunk_bytes
            data = "".join(f"{window * bytes_each}\n" for window in self._trace).encode()
        shared: str | None = getattr(self._source, "trace_path", None)
        if data:
            replace(self._medium, self._trace_path, data)
            # What others saw from the same snapshot is as good.
            if shared is not None and not os.path.exists(shared):
                replace(self._medium, shared, data)

    def _give_up(self, error: OSError) -> None:
        """What the file holds is not known after a failed sync: a file of another length is read by nobody."""
        with self._writing:
            self._broken = True
            self.error = f"{self._path} could not be synced ({error.strerror}); close the pool and open it again"
            _log.error("%s", self.error)
            self._medium.truncate(self.descriptor, 0)

    def _header(self) -> bytes:
        region = self.region
        ids = [text.encode()[:64].ljust(64, b"\0") for text in (region.repository, region.snapshot)]
        return _HEADER.pack(_MAGIC, 1, 0, region.chunk_bytes, self.record.size_bytes, *ids)

    def _load(self) -> bool:
        """Take what the bitmap's file says; False where it says nothing."""
        header, length = self._header(), (self.presence.chunks + 63) // 64 * 8
        try:
            with open(self._present, "rb") as file:
                data = file.read(len(header) + length + 9)
        except OSError:
            return False
        body, words = data[:-8], data[len(header) : -8]
        if len(words) != length or not data.startswith(header) or _checksum(body) != data[-8:]:
            return False
        try:
            self.presence.load(words)
        except ValueError:
            return False
        return True

    # Hydration

    @property
    def hydration(self) -> Hydration:
        """How far it is."""
        here = min(self.presence.here * self.region.chunk_bytes, self.record.size_bytes)
        if self.is_whole:
            here = self.record.size_bytes
        running = self._hydrating is not None and self._hydrating.is_alive()
        return Hydration(here, self.record.size_bytes, running, self.error)

    def hydrate(self, rate_bytes_s: float | None = None) -> None:
        """Fetch the rest in the background, at a rate, until all is here, it is stopped or closed."""
        self.stop()
        self.error = ""
        with self._lock:
            if self._ended or self._read_only or self._regions is None:
                return
            self._stop = threading.Event()
            arguments = (rate_bytes_s, self._stop)
            self._hydrating = threading.Thread(target=self._hydrate, args=arguments, name="snapcore-lazy", daemon=True)
            self._hydrating.start()

    def stop(self) -> None:
        """End what `hydrate` began; what is under way is not waited for."""
        self._stop.set()
        thread = self._hydrating
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _hydrate(self, rate_bytes_s: float | None, stop: threading.Event) -> None:
        failures = 0
        while not stop.is_set():
            try:
                self._mark_zeros(stop)
                self._fetch_all(rate_bytes_s, stop)
                if not stop.is_set():
                    self.save()
            except CancelledError:
                return
            except Exception as error:  # noqa: BLE001 - it is told, and tried again
                self.error = str(error) or type(error).__name__
                _log.warning("hydrating from snapshot %s: %s", self.region.snapshot, self.error)
                stop.wait(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
                failures += 1
            else:
                return

    def _mark_zeros(self, stop: threading.Event) -> None:
        """What the snapshot's map knows to be zero need not be fetched: the file reads as zeros there."""
        size, end = self.region.chunk_bytes, self.record.size_bytes
        rows = self._background.submit(lambda: self._opened().data_extents())
        while not rows.done():
            if stop.wait(0.05):
                raise CancelledError("hydration was stopped")
        for offset, length in gaps(merged(rows.result()), end).tolist():
            first = -(-offset // size)
            last = self.presence.chunks if offset + length >= end else (offset + length) // size
            with self._writing:
                if first < last and not self._broken:
                    self.presence.add(first, last - first)
                    self._unsaved_bytes += 1

    def _fetch_all(self, rate_bytes_s: float | None, stop: threading.Event) -> None:
        windows = self._windows(0, self.record.size_bytes)[1]
        traced = [window for window in self._first_windows() if 0 <= window < windows]
        begun, done, under_way = time.monotonic(), 0, set[Future[None]]()
        for window in (*traced, *range(windows)):
            missing = self.presence.missing(window * self._window, self._window)
            if not len(missing):
                continue
            while len(under_way) >= 2 * _BACKGROUND_THREADS:
                self._settle(under_way)
                if stop.is_set():
                    return
            under_way.add(self._begin(window, self._background))
            done += int(missing[:, 1].sum()) * self.region.chunk_bytes
            if stop.wait(max(0.0, done / rate_bytes_s - (time.monotonic() - begun)) if rate_bytes_s else 0):
                return
        while under_way and not stop.is_set():
            self._settle(under_way)

    @staticmethod
    def _settle(under_way: set[Future[None]]) -> None:
        """Take out what is done, waiting a little for it; raises what failed."""
        done, _ = wait(under_way, 0.05, "FIRST_COMPLETED")
        under_way -= done
        for future in done:
            future.result()

    def _first_windows(self) -> list[int]:
        """What disks asked for first, from this snapshot: here before, or as the region's side remembers it."""
        size = self._window * self.region.chunk_bytes
        for path in (self._trace_path, getattr(self._source, "trace_path", None)):
            if path:
                with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
                    return [int(line) // size for line in file.read(_TRACED * 16).split()]
        return []

    @property
    def is_whole(self) -> bool:
        """Whether all of it is here."""
        return self.presence.here == self.presence.chunks

    def use(self, source: Source) -> None:
        """The region's side, which somebody opened already."""
        with self._opening:
            self._source = source


def wait_for(image: LazyImage, what: str, progress: ProgressCallback | None) -> None:
    """Return when all is here; StoreError when a fetch failed, while the background goes on trying."""
    started = time.monotonic()
    while True:
        found = image.hydration
        if progress is not None:
            try:
                elapsed_s = time.monotonic() - started
                progress(Progress("hydrate", found.here_bytes, found.total_bytes, elapsed_s))
            except BaseException:
                image.stop()
                raise
        if not found.running:
            if image.is_whole:
                return
            raise StoreError(f"{what}: it was stopped; {found.error or 'not all is here'}")
        if found.error:
            raise StoreError(f"{what}: {found.error}; it goes on when the region can be reached")
        time.sleep(_LOOK_PERIOD_S)


def _checksum(body: bytes) -> bytes:
    return int(xxh64_blocks(body, len(body), 0)[0]).to_bytes(8, "little")
