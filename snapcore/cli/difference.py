"""`snapcore diff A B` as scripts call it, without click (see `snapcore.cli`), and how rows are printed."""

from __future__ import annotations

import sys
from array import array

from snapcore.source.compare import differing_rows


def plain(a: str, b: str) -> None:
    """Print where two images differ, with blocks of the usual size."""
    show(differing_rows(a, b))


def show(rows: array[int]) -> None:
    """Print rows of offset, length, offset, length, …: a line each."""
    sys.stdout.write("%d %d\n" * (len(rows) // 2) % tuple(rows))
