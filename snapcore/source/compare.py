"""Where two images differ. What is a hole in both is never read, the rest is compared on all cores.

Raw ones are compared here, others in compare_disks.

A kernel reads and compares a span in one call (`scan.differing_in_files`). Nothing here needs numpy before the result
is asked for as extents: importing it takes as long as comparing a GB.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING

from snapcore import scan
from snapcore.errors import ReadError, SourceChangedError, UsageError, from_os_error
from snapcore.parallel import executor_or_own, in_order
from snapcore.progress import Meter, ProgressCallback
from snapcore.source.formats import RAW, of_name
from snapcore.source.raw import RawSource, open_source

if TYPE_CHECKING:
    from snapcore.extents import Extents

BLOCK_BYTES = 4096
BLOCK_LIMIT_BYTES = 4 << 20
SPAN_BYTES = 16 << 20
# A window of each file fits the second-level cache of a core. They begin on a page: pread into memory that does not
# takes a fifth longer.
_WINDOW_BYTES = 256 << 10


def diff_images(
    a: str,
    b: str,
    *,
    block_bytes: int = BLOCK_BYTES,
    formats: tuple[str | None, str | None] = (None, None),
    backing_folders: Sequence[str] = (),
    progress: ProgressCallback | None = None,
    executor: Executor | None = None,
) -> Extents:
    """Where two image files or block devices differ.

    Parameters
    ----------
    a, b : path
    block_bytes : int
        A power of two from 512 to 4 MiB: a block is reported whole when any byte of it differs.
    formats : pair of str, optional
        Of `a` and `b`; None: what the name says, and any other name means raw.
    backing_folders : sequence of paths
        As for `open_image`.
    progress, executor
        As in `Repository.snapshot`.

    Returns
    -------
    int64 array of shape (n, 2)
        Offset and length in bytes, merged and sorted. What lies behind the end of the shorter one differs.

    Raises
    ------
    NotFoundError, UsageError, RefusedError, ImageError, ReadError, SourceChangedError
    """
    import numpy as np

    rows = differing_rows(
        a,
        b,
        block_bytes=block_bytes,
        formats=formats,
        backing_folders=backing_folders,
        progress=progress,
        executor=executor,
    )
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def differing_rows(
    a: str,
    b: str,
    *,
    block_bytes: int = BLOCK_BYTES,
    formats: tuple[str | None, str | None] = (None, None),
    backing_folders: Sequence[str] = (),
    progress: ProgressCallback | None = None,
    executor: Executor | None = None,
) -> array[int]:
    """What `diff_images` finds, as offset, length, offset, length, … of one array."""
    if not 512 <= block_bytes <= BLOCK_LIMIT_BYTES or block_bytes & (block_bytes - 1):
        raise UsageError(f"a block has a power of two from 512 to {BLOCK_LIMIT_BYTES} bytes, not {block_bytes}")
    if {of_name(path) if format is None else format for path, format in zip((a, b), formats, strict=True)} != {RAW}:
        # All that knows other formats takes longer to import than most compares of raw images.
        from snapcore.source.compare_disks import differing_extents

        different = differing_extents(
            a,
            b,
            formats,
            block_bytes=block_bytes,
            backing_folders=backing_folders,
            progress=progress,
            executor=executor,
        )
        return array("q", different.tobytes())
    with open_source(a) as first, open_source(b) as second:
        common = min(first.size_bytes, second.size_bytes)
        whole = max(first.size_bytes, second.size_bytes)
        work = _Comparison(first, second, common, block_bytes)
        meter = Meter(progress, "compare", work.data_bytes() if progress else 0)
        rows = array("q")
        with executor_or_own(executor) as hands:
            for found, data_bytes in in_order(hands, work, work.spans()):
                _append(rows, found)
                meter.advance(data_bytes)
        first.check_unchanged()
        second.check_unchanged()
        if whole > common:
            start = common // block_bytes * block_bytes
            _append(rows, array("q", (start, whole - start)))
        return rows


def _append(rows: array[int], more: array[int]) -> None:
    """Add rows behind the last one, which they may touch or overlap."""
    if rows and more and rows[-2] + rows[-1] >= more[0]:
        rows[-1] = more[0] + more[1] - rows[-2]
        more = more[2:]
    rows.extend(more)


class _Comparison:
    """The work on one span; safe on many threads at once."""

    def __init__(self, a: RawSource, b: RawSource, size_bytes: int, block_bytes: int) -> None:
        self._sources = (a, b)
        self._size_bytes = size_bytes
        self._block_bytes = block_bytes
        self._window_bytes = max(_WINDOW_BYTES, block_bytes)
        self._local = threading.local()

    def spans(self) -> Iterator[int]:
        """Where spans begin: on block borders, and none in what is a hole in both."""
        at = 0
        while at < self._size_bytes:
            data = min(self._next_data(source, at) for source in self._sources)
            at = max(at, data // self._block_bytes * self._block_bytes)
            if at < self._size_bytes:
                yield at
            at += SPAN_BYTES

    def _next_data(self, source: RawSource, offset_bytes: int) -> int:
        try:
            return os.lseek(source._descriptor, offset_bytes, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self._size_bytes
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return offset_bytes
            raise from_os_error(error, f"looking for data in {source.name} from offset {offset_bytes} on") from error

    def data_bytes(self) -> int:
        """How much there is to compare."""
        from snapcore import extents

        a, b = (source.data_extents() for source in self._sources)
        data = extents.clipped(extents.union(a, b), 0, self._size_bytes)
        return extents.total_bytes(extents.aligned(data, self._block_bytes, self._size_bytes))

    def __call__(self, offset_bytes: int) -> tuple[array[int], int]:
        space = getattr(self._local, "space", None)
        if space is None:
            space = self._local.space = mmap.mmap(-1, 2 * self._window_bytes)
        a, b = self._sources
        length = min(SPAN_BYTES, self._size_bytes - offset_bytes)
        try:
            return scan.differing_in_files(a._descriptor, b._descriptor, offset_bytes, length, self._block_bytes, space)
        except scan.FileFailure as failure:
            source = self._sources[failure.which]
            missing = offset_bytes + length - failure.offset
            if failure.code == 0:
                raise SourceChangedError(
                    f"{source.name} ends at byte {failure.offset} and had {source.size_bytes} bytes when it was "
                    "opened: it was truncated meanwhile; compare again when nobody writes to it"
                ) from failure
            raise ReadError(source.name, failure.offset, missing, failure.code, os.strerror(failure.code)) from failure
