"""Work handed to an executor in order, with a fixed number of pieces in flight.

The unit of work is a span of megabytes, so that what Python adds to it stays small. Results come back in the order
of the pieces, so they do not depend on the number of threads, and memory is bounded by `in_flight` whatever the
disk's size.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")

SPAN_BYTES = 4 << 20


def usable_cores() -> int:
    """How many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Daemons(Executor):
    """Threads that a process does not wait for at its end: what they do may hang for as long as a region does.

    Parameters
    ----------
    limit : int
        Threads at the most; each is made when it is needed first.
    name : str
    """

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._name = name
        self._work: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._threads = 0
        self._idle = 0
        self._ended = False

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """See `concurrent.futures.Executor.submit`."""
        future: Future[Result] = Future()
        with self._changed:
            if self._ended:
                raise RuntimeError("no work is taken any more")
            self._work.append((future, functools.partial(fn, *args, **kwargs)))
            if self._idle < len(self._work) and self._threads < self._limit:
                self._threads += 1
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
            self._changed.notify()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; see `concurrent.futures.Executor.shutdown`. What runs is never waited for."""
        del wait
        with self._changed:
            self._ended = True
            if cancel_futures:
                for future, _ in self._work:
                    future.cancel()
                self._work.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not self._work and not self._ended:
                    self._changed.wait()
                self._idle -= 1
                if not self._work:
                    return
                future, work = self._work.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - it is who waits that gets it
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, work


@contextmanager
def executor_or_own(executor: Executor | None, threads: int | None = None) -> Iterator[Executor]:
    """The caller's executor, or one of our own that ends with the block: with a thread a core, or `threads`."""
    if executor is not None:
        yield executor
        return
    with ThreadPoolExecutor(threads or usable_cores(), thread_name_prefix="snapcore") as own:
        yield own


def in_order(
    executor: Executor,
    function: Callable[[Piece], Result],
    pieces: Iterable[Piece],
    in_flight: int | None = None,
) -> Iterator[Result]:
    """Yield function(piece) for every piece, in order, with at most `in_flight` of them under way.

    When a piece fails or the consumer stops, what has not begun is cancelled and what runs is waited for,
    so no thread still works when the caller cleans up.
    """
    limit = in_flight or usable_cores() + 2
    pending: deque[Future[Result]] = deque()
    try:
        for piece in pieces:
            pending.append(executor.submit(function, piece))
            if len(pending) >= limit:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for future in pending:
            if not future.cancelled():
                future.exception()
