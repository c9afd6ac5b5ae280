"""An image of the pool's own that fills up from a snapshot in a region (docs/DESIGN.md, "Lazy disks").

A chunk is here when its bit is set, and the bit is set when its bytes are in the file. The bitmap is stored only after
the file was synced, so a crash loses bits, which costs fetches, and never leaves one too many.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError, wait
from typing import TypeVar

from snapcore import scan
from snapcore.errors import CancelledError, Error, OutOfSpaceError, StoreError
from snapcore.parallel import Daemons
from snapcore.persist import replace
from snapcore.pool import present
from snapcore.pool.catalog import Backing
from snapcore.pool.files import Files
from snapcore.pool.regions import RegionEvent, Regions
from snapcore.presence import Presence
from snapcore.source.interface import Source

FOLDER = "lazy"
WINDOW_BYTES = 1 << 20
SPAN_BYTES = 4 << 20
BUDGET_S = 30.0
BACKGROUND_THREADS = 2
_DEMAND_THREADS = 8
_AHEAD_BYTES = 4 << 20
_SAVE_PERIOD_S = 5.0
_SAVE_BYTES = 256 << 20
_ZERO_BYTES = 4096
# What was asked for goes through the page cache, where who asked reads it next; the rest past it, in one piece.
_PIECE_BYTES = 512 << 10
_TRACED = 512
Result = TypeVar("Result")
_log = logging.getLogger("snapcore.pool")


class _Span(Future[None]):
    """Windows in flight together.

    Attributes
    ----------
    windows : range
    begun : bool
        It is being worked on.
    waits : bool
        That it has not begun is because others in the background go before it.
    """

    def __init__(self, windows: range) -> None:
        super().__init__()
        self.windows = windows
        self.begun = False
        self.waits = False


class LazyImage:
    """The image of one snapshot in a region, shared by all disks over it. Safe from many threads.

    Attributes
    ----------
    descriptor : int
        Of the file; -1 when it cannot be used.
    presence : Presence
    windows : int
        How many it has: what is fetched is whole windows.
    error : str
        Of the last fetch, if it failed.
    """

    def __init__(self, files: Files, record: Backing, regions: Regions | None, *, budget_s: float = BUDGET_S) -> None:
        assert record.region is not None
        self.record = record
        self.region = record.region
        self.descriptor = -1
        self.error = ""
        self.budget_s = budget_s
        self._medium = files.medium
        self._read_only = files.read_only
        self._path = files.path(record.path)
        self._stem = self._path.removesuffix(".data")
        self._regions = regions
        self._source: Source | None = None
        self._opening = threading.Lock()
        self._window = max(1, WINDOW_BYTES // self.region.chunk_bytes)
        self.windows = -(-record.size_bytes // (self._window * self.region.chunk_bytes))
        self._flying: dict[int, _Span] = {}
        # Under this: what is in flight, who writes the file, and whether it ended.
        self._lock = threading.Lock()
        self._unwritten = threading.Condition(self._lock)
        self._writers = 0
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
        self._space = threading.local()
        self._demand = Daemons(_DEMAND_THREADS, "snapcore-demand")
        self._background = Daemons(BACKGROUND_THREADS, "snapcore-hydrate")
        self.presence = self._open()
        # What a disk asks for first is told by the first one alone.
        self._traces = self.presence.here == 0

    # Opening and closing

    def _open(self) -> Presence:
        """What is here by what is stored, when the file is as long as it should be; else nothing."""
        size = self.record.size_bytes
        known = present.load(f"{self._stem}.present", self.region, size)
        flags = os.O_CLOEXEC | (os.O_RDONLY if self._read_only else os.O_RDWR)
        with contextlib.suppress(OSError):
            self.descriptor = os.open(self._path, flags)
        if self.descriptor >= 0 and known is not None and os.fstat(self.descriptor).st_size == size:
            return known
        if not self._read_only:
            self._begin_anew()
        elif self.descriptor >= 0 and os.fstat(self.descriptor).st_size != size:
            os.close(self.descriptor)
            self.descriptor = -1
        return Presence(size, self.region.chunk_bytes)

    def _begin_anew(self) -> None:
        """An empty file. What says that something is here goes first, and durably."""
        medium, folder = self._medium, os.path.dirname(self._path)
        medium.make_folder(folder)
        medium.sync_folder(os.path.dirname(folder))
        with contextlib.suppress(FileNotFoundError):
            medium.unlink(f"{self._stem}.present")
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
            flying = {*self._flying.values()}
        for span in flying:
            # It may be done.
            with contextlib.suppress(InvalidStateError):
                span.set_exception(CancelledError("the image was closed"))

    def close(self) -> None:
        """Let go."""
        self.stop_soon()
        self._demand.shutdown(cancel_futures=True)
        self._background.shutdown(cancel_futures=True)
        with self._saving:
            self._wait_for_writers()
            if self.descriptor >= 0:
                os.close(self.descriptor)
                self.descriptor = -1

    def _wait_for_writers(self, *, broken: bool = False) -> None:
        """Nobody begins to write the file any more, and nobody does."""
        with self._lock:
            self._closed, self._broken = self._closed or not broken, self._broken or broken
            self._unwritten.wait_for(lambda: not self._writers)

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
        windows = self._windows_of(start, min(end, self.record.size_bytes))
        try:
            spans = [self._begin(window) for window in windows]
        except CancelledError:
            return errno.ESHUTDOWN
        self._note(windows)
        for span in spans:
            try:
                # A Future's own timeout is an Exception of the same name as a store's.
                if not wait([span], max(0.0, deadline - time.monotonic())).done:
                    self.error = f"{self.region.url} gave no answer within {self.budget_s:g} s"
                    _log.warning("snapshot %s: %s", self.region.snapshot, self.error)
                    return errno.ETIMEDOUT
                span.result()
            except CancelledError:
                return errno.ESHUTDOWN
            except OutOfSpaceError:
                return errno.ENOSPC
            except Exception as error:  # noqa: BLE001 - of whatever the region's side is made of
                return (isinstance(error, OSError) and error.errno) or errno.EIO
        return 0

    def _windows_of(self, start: int, end: int) -> range:
        bytes_each = self._window * self.region.chunk_bytes
        return range(start // bytes_each, max(start // bytes_each, (end - 1) // bytes_each) + 1)

    def _note(self, windows: range) -> None:
        """Read on where somebody reads one window after another, and remember what was asked for first."""
        with self._lock:
            if windows.start in self._sequel:
                self._ahead = min(self._ahead * 2, max(1, _AHEAD_BYTES // WINDOW_BYTES))
                more = range(windows.stop, min(windows.stop + self._ahead, self.windows))
            else:
                self._ahead, more = 1, range(0)
            self._sequel = range(windows.stop, windows.stop + len(more) + 1)
            if self._traces and len(self._trace) < _TRACED:
                self._trace += [window for window in windows if window not in self._trace]
        for window in more:
            with contextlib.suppress(CancelledError):
                self.begin(range(window, window + 1))

    # In flight

    def _begin(self, window: int) -> _Span:
        """Fetch a window for who waits for it, unless somebody does; what waits in the background is not waited for."""
        with self._lock:
            found = self._flying.get(window)
            if found is None or found.waits:
                found = self._submit(range(window, window + 1), self._demand)
            return found

    def begin(self, windows: range) -> Future[None]:
        """Fetch in the background what of these windows nobody does."""
        with self._lock:
            found = self._flying.get(windows.start)
            if found is not None:
                return found
            stop = windows.start + 1
            while stop < windows.stop and stop not in self._flying:
                stop += 1
            span = self._submit(range(windows.start, stop), self._background)
            span.waits = not span.begun
            return span

    def _submit(self, windows: range, threads: Daemons) -> _Span:
        if self._ended:
            raise CancelledError("the image was closed")
        span = _Span(windows)
        self._flying |= dict.fromkeys(windows, span)
        try:
            threads.submit(self._work, span)
        except RuntimeError:
            raise CancelledError("the image was closed") from None
        return span

    def _work(self, span: _Span) -> None:
        with self._lock:
            span.begun, span.waits = True, False
            mine = [window for window in span.windows if self._flying.get(window) is span]
        failure: BaseException | None = None
        try:
            if mine:
                self._fill(mine[0] * self._window, (mine[-1] + 1 - mine[0]) * self._window, quickly=len(mine) == 1)
            self.error = ""
        except BaseException as error:  # noqa: BLE001 - handed to who waits
            failure = error
            if not isinstance(error, CancelledError):
                self.error = str(error) or type(error).__name__
                _log.warning("fetching from snapshot %s in %s: %s", self.region.snapshot, self.region.url, self.error)
        with self._lock:
            for window in mine:
                if self._flying.get(window) is span:
                    del self._flying[window]
        # It may be done already: closed meanwhile.
        with contextlib.suppress(InvalidStateError):
            if failure is None:
                span.set_result(None)
            else:
                span.set_exception(failure)

    def _fill(self, first: int, count: int, *, quickly: bool) -> None:
        """Fetch what is missing of these chunks."""
        size = self.region.chunk_bytes
        for begin, chunks in self.presence.missing(first, count).tolist():
            start, end = begin * size, min((begin + chunks) * size, self.record.size_bytes)
            data = self._memory(end - start)
            self.opened().read_into(data, start)
            with self._writing():
                piece = _PIECE_BYTES if quickly else len(data)
                for offset, length in scan.nonzero_extents(data, _ZERO_BYTES).tolist():
                    for at in range(offset, offset + length, piece):
                        part = data[at : min(at + piece, offset + length)]
                        self._medium.write_at(self.descriptor, [part], start + at)
                self.presence.add(begin, chunks)
            with self._lock:
                self._unsaved_bytes += len(data)

    def mark_zeros(self, first: int, count: int) -> None:
        """These chunks are zero in the region: the file reads so already."""
        with self._writing():
            self.presence.add(first, count)
        with self._lock:
            self._unsaved_bytes += 1

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """While the file is written; others may do so too."""
        with self._lock:
            if self._closed or self._broken:
                raise CancelledError("the image was closed")
            self._writers += 1
        try:
            yield
        finally:
            with self._lock:
                self._writers -= 1
                self._unwritten.notify_all()

    def _memory(self, length_bytes: int) -> memoryview:
        """Memory of this thread, on a page's border as writes past the page cache want it."""
        found: memoryview | None = getattr(self._space, "memory", None)
        if found is None or len(found) < length_bytes:
            found = self._space.memory = memoryview(mmap.mmap(-1, max(length_bytes, SPAN_BYTES)))
        return found[:length_bytes]

    def opened(self) -> Source:
        """The region's side; opened when it is needed first, and again after a failure."""
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

    def use(self, source: Source) -> None:
        """The region's side, which somebody opened already."""
        with self._opening:
            self._source = source

    def aside(self, doing: Callable[[], Result]) -> Future[Result]:
        """Do something in the background, behind what waits there."""
        return self._background.submit(doing)

    @property
    def can_fetch(self) -> bool:
        """Whether there is a region to ask, and a file to write."""
        return not self._ended and not self._read_only and self._regions is not None

    @property
    def is_whole(self) -> bool:
        """Whether all of it is here."""
        return self.presence.here == self.presence.chunks

    @property
    def span_windows(self) -> int:
        """Windows that are fetched at once in the background."""
        return max(1, SPAN_BYTES // (self._window * self.region.chunk_bytes))

    @property
    def chunks_of_window(self) -> int:
        """Chunks in each window but the last."""
        return self._window

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
            self._sync()
            replace(self._medium, f"{self._stem}.present", present.encode(words, self.region, self.record.size_bytes))
            self._save_trace()
            with self._lock:
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
            self._sync()
            if os.fstat(self.descriptor).st_size != self.record.size_bytes:
                raise StoreError(f"{self._path} has another length than the snapshot; was it changed by others?")
            self._sealed = True

    def _sync(self) -> None:
        """Make the file durable, or give it up: after a failed sync a file of another length is read by nobody."""
        try:
            self._medium.sync(self.descriptor)
        except OSError as error:
            self._wait_for_writers(broken=True)
            self.error = f"{self._path} could not be synced ({error.strerror}); close the pool and open it again"
            _log.error("%s", self.error)
            self._medium.truncate(self.descriptor, 0)
            raise

    def _save_trace(self) -> None:
        with self._lock:
            bytes_each = self._window * self.region.chunk_bytes
            data = "".join(f"{window * bytes_each}\n" for window in self._trace).encode()
        shared: str | None = getattr(self._source, "trace_path", None)
        if data:
            replace(self._medium, f"{self._stem}.trace", data)
            # What others saw from the same snapshot is as good.
            if shared is not None and not os.path.exists(shared):
                with contextlib.suppress(OSError):
                    replace(self._medium, shared, data)

    def first_windows(self) -> list[int]:
        """What disks from this snapshot asked for first: here before, or as the region's side remembers it."""
        size = self._window * self.region.chunk_bytes
        for path in (f"{self._stem}.trace", getattr(self._source, "trace_path", None)):
            if path:
                with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
                    found = [int(line) // size for line in file.read(_TRACED * 16).split()]
                    return [window for window in found if 0 <= window < self.windows]
        return []
