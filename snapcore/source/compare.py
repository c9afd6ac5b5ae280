"""Where two raw images differ: what is a hole in both is never read, the rest is compared on all cores."""

from __future__ import annotations

import threading
from concurrent.futures import Executor

import numpy as np

from snapcore import extents, scan
from snapcore.errors import UsageError
from snapcore.extents import Extents
from snapcore.parallel import SPAN_BYTES, executor_or_own, in_order
from snapcore.progress import Meter, ProgressCallback
from snapcore.source.interface import Source
from snapcore.source.raw import open_source

BLOCK_BYTES = 4096
# Both windows fit the caches; smaller ones cost more calls.
_WINDOW_BYTES = 1 << 20


def diff_images(
    a: str,
    b: str,
    *,
    block_bytes: int = BLOCK_BYTES,
    progress: ProgressCallback | None = None,
    executor: Executor | None = None,
) -> Extents:
    """Where two image files or block devices differ.

    Parameters
    ----------
    a, b : path
    block_bytes : int
        A power of two from 512 to 4 MiB: a block is reported whole when any byte of it differs.
    progress, executor
        As in `Repository.snapshot`.

    Returns
    -------
    int64 array of shape (n, 2)
        Offset and length in bytes, merged and sorted. What lies behind the end of the shorter one differs.

    Raises
    ------
    NotFoundError, UsageError, ReadError, SourceChangedError
    """
    if not 512 <= block_bytes <= SPAN_BYTES or block_bytes & (block_bytes - 1):
        raise UsageError(f"a block has a power of two from 512 to {SPAN_BYTES} bytes, not {block_bytes}")
    with open_source(a) as first, open_source(b) as second:
        common = min(first.size_bytes, second.size_bytes)
        whole = max(first.size_bytes, second.size_bytes)
        data = extents.union(first.data_extents(), second.data_extents())
        data = extents.aligned(extents.clipped(data, 0, common), block_bytes, common)
        meter = Meter(progress, "compare", extents.total_bytes(data))
        parts = [extents.empty()]
        work = _Comparison(first, second, block_bytes)
        with executor_or_own(executor) as hands:
            for done_bytes, found in in_order(hands, work, extents.batches(data, SPAN_BYTES)):
                parts.append(found)
                meter.advance(done_bytes)
        first.check_unchanged()
        second.check_unchanged()
        if whole > common:
            start = common // block_bytes * block_bytes
            parts.append(extents.from_pairs([(start, whole - start)]))
        return extents.merged(np.concatenate(parts))


class _Comparison:
    """The work on some extents; safe on many threads at once."""

    def __init__(self, a: Source, b: Source, block_bytes: int) -> None:
        self._a = a
        self._b = b
        self._block_bytes = block_bytes
        self._window_bytes = max(_WINDOW_BYTES, block_bytes)
        self._local = threading.local()

    def __call__(self, rows: Extents) -> tuple[int, Extents]:
        space = getattr(self._local, "space", None)
        if space is None:
            space = self._local.space = memoryview(bytearray(2 * self._window_bytes))
        parts = []
        for start, length in extents.spans(rows, self._window_bytes):
            left, right = space[:length], space[self._window_bytes : self._window_bytes + length]
            self._a.read_into(left, start)
            self._b.read_into(right, start)
            parts.append(scan.differing_extents(left, right, self._block_bytes, start))
        return extents.total_bytes(rows), np.concatenate(parts)
