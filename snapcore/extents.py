"""Runs of bytes: the one currency that all parts trade in.

Extents are an int64 array of shape (n, 2): offset and length in bytes, sorted by offset, not overlapping,
no empty ones; `merged` ones do not touch either. This file relies on numpy alone, and imports it when extents are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from snapcore.errors import UsageError
from snapcore.later import Later

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Extents = npt.NDArray[np.int64]
else:
    np = Later("numpy")
    Extents = "int64 array of shape (n, 2)"


def empty() -> Extents:
    """No extents: an array of shape (0, 2)."""
    return np.empty((0, 2), dtype=np.int64)


def from_pairs(pairs: Iterable[tuple[int, int]] | Extents) -> Extents:
    """Extents of (offset, length) pairs in any order; overlapping and touching ones are merged.

    Raises
    ------
    UsageError
        An offset is negative, or a length is, or a pair runs past 2**63 - 1.
    """
    try:
        rows = np.array(pairs if isinstance(pairs, np.ndarray) else list(pairs), dtype=np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"extents must be pairs of offset and length in bytes: {error}") from error
    if rows.size == 0:
        return empty()
    if rows.ndim != 2 or rows.shape[1] != 2:
        raise UsageError(f"extents must have the shape (n, 2), not {rows.shape}")
    if (rows < 0).any() or (rows[:, 0] > np.iinfo(np.int64).max - rows[:, 1]).any():
        raise UsageError("an extent has a negative offset or length, or ends beyond 2**63 - 1")
    rows = rows[rows[:, 1] > 0]
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    return merged(rows)


def merged(rows: Extents) -> Extents:
    """Join what overlaps or touches in rows that are sorted by offset."""
    if len(rows) < 2:
        return rows.astype(np.int64, copy=True)
    ends = np.maximum.accumulate(rows[:, 0] + rows[:, 1])
    first = np.concatenate(([True], rows[1:, 0] > ends[:-1]))
    last = np.concatenate((first[1:], [True]))
    starts = rows[first, 0]
    return np.stack((starts, ends[last] - starts), axis=1)


def from_blocks(blocks: npt.NDArray[np.int64], block_bytes: int, size_bytes: int) -> Extents:
    """Extents of sorted block numbers, the last one cut at size_bytes."""
    if len(blocks) == 0:
        return empty()
    starts = blocks.astype(np.int64) * block_bytes
    lengths = np.minimum(block_bytes, size_bytes - starts)
    return merged(np.stack((starts, lengths), axis=1)[lengths > 0])


def aligned(rows: Extents, block_bytes: int, size_bytes: int) -> Extents:
    """The smallest extents on block borders that cover `rows`, cut at size_bytes."""
    if len(rows) == 0:
        return empty()
    starts = rows[:, 0] // block_bytes * block_bytes
    # Cut before rounding up: an end close to 2**63 would wrap around.
    ends = np.minimum(rows[:, 0] + rows[:, 1], size_bytes)
    ends = np.minimum(-(-ends // block_bytes) * block_bytes, size_bytes)
    kept = ends > starts
    return merged(np.stack((starts, ends - starts), axis=1)[kept])


def clipped(rows: Extents, start: int, stop: int) -> Extents:
    """What of sorted `rows` lies in the bytes from start to stop."""
    if len(rows) == 0:
        return empty()
    starts = np.maximum(rows[:, 0], start)
    ends = np.minimum(rows[:, 0] + rows[:, 1], stop)
    kept = ends > starts
    part: Extents = np.stack((starts, ends - starts), axis=1)[kept]
    return part


def gaps(rows: Extents, size_bytes: int) -> Extents:
    """What of the bytes from 0 to size_bytes lies in none of the sorted, merged `rows`."""
    rows = clipped(rows, 0, size_bytes)
    starts = np.concatenate(([0], rows[:, 0] + rows[:, 1]))
    ends = np.concatenate((rows[:, 0], [size_bytes]))
    kept = ends > starts
    return np.stack((starts, ends - starts), axis=1).astype(np.int64)[kept]


def union(a: Extents, b: Extents) -> Extents:
    """What lies in either."""
    return from_pairs(np.concatenate((a, b)))


def intersection(a: Extents, b: Extents, size_bytes: int) -> Extents:
    """What of the bytes from 0 to size_bytes lies in both of two sorted, merged rows."""
    return gaps(union(gaps(a, size_bytes), gaps(b, size_bytes)), size_bytes)


def difference(a: Extents, b: Extents, size_bytes: int) -> Extents:
    """What of the bytes from 0 to size_bytes lies in `a` and not in `b`."""
    return intersection(a, gaps(b, size_bytes), size_bytes)


def total_bytes(rows: Extents) -> int:
    """The sum of the lengths."""
    return int(rows[:, 1].sum())


def spans(rows: Extents, span_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut sorted extents at multiples of span_bytes; yields (offset, length) in order."""
    for offset, length in rows.tolist():
        end = offset + length
        while offset < end:
            stop = min(end, (offset // span_bytes + 1) * span_bytes)
            yield offset, stop - offset
            offset = stop


def batches(rows: Extents, batch_bytes: int) -> Iterator[Extents]:
    """Sorted extents in groups of up to batch_bytes bytes; longer ones are cut."""
    group: list[tuple[int, int]] = []
    room = batch_bytes
    for offset, length in rows.tolist():
        while length:
            part = min(length, room)
            group.append((offset, part))
            offset, length, room = offset + part, length - part, room - part
            if room == 0:
                yield np.array(group, dtype=np.int64)
                group, room = [], batch_bytes
    if group:
        yield np.array(group, dtype=np.int64)
