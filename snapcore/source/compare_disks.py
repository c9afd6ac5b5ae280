"""Where the disks in two image files differ, when one of them at least is not raw (docs/DESIGN.md, "Image formats").

Spans of both are read, unpacked and compared on all cores. What is a hole in both is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import ExitStack

import numpy as np

from snapcore import extents, scan
from snapcore.extents import Extents
from snapcore.parallel import SPAN_BYTES, executor_or_own, in_order
from snapcore.progress import Meter, ProgressCallback
from snapcore.source.image import open_as_named
from snapcore.source.interface import Source


def differing_extents(
    a: str,
    b: str,
    formats: tuple[str | None, str | None],
    *,
    block_bytes: int,
    backing_folders: Sequence[str] = (),
    progress: ProgressCallback | None = None,
    executor: Executor | None = None,
) -> Extents:
    """See `compare.diff_images`."""
    with ExitStack() as opened:
        first, second = (
            opened.enter_context(open_as_named(path, format, backing_folders=backing_folders))
            for path, format in zip((a, b), formats, strict=True)
        )
        found = _differing(first, second, block_bytes, progress, executor)
        first.check_unchanged()
        second.check_unchanged()
    whole, common = max(first.size_bytes, second.size_bytes), min(first.size_bytes, second.size_bytes)
    if whole > common:
        start = common // block_bytes * block_bytes
        found = extents.union(found, extents.from_pairs([(start, whole - start)]))
    return found


def _differing(
    a: Source, b: Source, block_bytes: int, progress: ProgressCallback | None, executor: Executor | None
) -> Extents:
    """Where the bytes differ that both have."""
    common = min(a.size_bytes, b.size_bytes)
    data = extents.union(extents.from_pairs(a.data_extents()), extents.from_pairs(b.data_extents()))
    rows = extents.aligned(extents.clipped(data, 0, common), block_bytes, common)
    meter = Meter(progress, "compare", extents.total_bytes(rows))

    def compare(span: tuple[int, int]) -> Extents:
        offset, length = span
        one, two = (memoryview(bytearray(length)) for _ in range(2))
        a.read_into(one, offset)
        b.read_into(two, offset)
        differing = scan.differing_extents(one, two, block_bytes)
        differing[:, 0] += offset
        return differing

    parts = [extents.empty()]
    spans = list(extents.spans(rows, SPAN_BYTES))
    with executor_or_own(executor) as hands:
        for (_, length), found in zip(spans, in_order(hands, compare, spans), strict=True):
            parts.append(found)
            meter.advance(length)
    return extents.merged(np.concatenate(parts))
