"""Fingerprints of this host: whatever a write did, no old one stands under a new snapshot's name."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import numpy as np
import pytest

from snapcore.repository.hints import Hints

REPOSITORY, OLD, NEW = "1" * 32, "2" * 32, "3" * 32


def written() -> None:
    """A file of 100 fingerprints of the old snapshot."""
    hints = Hints(REPOSITORY, "disk", 4096)
    hints.begin_new()
    hints.write(np.arange(100), np.arange(1, 101, dtype=np.uint64))
    hints.finish(OLD, 100)
    hints.close()


def test_a_short_write_leaves_no_old_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    written()
    pwrite, pwritev = os.pwrite, os.pwritev

    def short(descriptor: int, data: bytes, offset: int) -> int:
        return pwrite(descriptor, data[: max(1, len(data) // 2)], offset)

    def short_vector(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return pwritev(descriptor, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset)

    hints = Hints(REPOSITORY, "disk", 4096)
    assert hints.snapshot == OLD
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", short)
        patched.setattr(os, "pwritev", short_vector)
        hints.begin_edit()
        hints.write(np.arange(100), np.arange(1001, 1101, dtype=np.uint64))
        hints.finish(NEW, 100)
    hints.close()
    again = Hints(REPOSITORY, "disk", 4096)
    assert again.snapshot == NEW
    assert again.read(np.arange(100)).tolist() == list(range(1001, 1101))
    again.close()


def test_a_cache_that_cannot_be_looked_at_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    written()
    hints = Hints(REPOSITORY, "disk", 4096)
    hints.begin_edit()

    def fail(descriptor: int) -> os.stat_result:
        raise OSError(errno.EIO, f"descriptor {descriptor}")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", fail)
        hints.clear(0, 10)
    hints.finish(NEW, 100)
    hints.close()
    again = Hints(REPOSITORY, "disk", 4096)
    assert again.snapshot is None
    again.close()
