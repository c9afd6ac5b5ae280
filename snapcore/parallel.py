"""Work handed to an executor in order, with a fixed number of pieces in flight.

The unit of work is a span of megabytes, so that what Python adds to it stays small. Results come back in the order
of the pieces, so they do not depend on the number of threads, and memory is bounded by `in_flight` whatever the
disk's size.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")

SPAN_BYTES = 4 << 20


def usable_cores() -> int:
    """How many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
