"""Cores of pools for the tests of kernels."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from snapcore.blockmap import Trees
from snapcore.core import Core

SEED = 77
SECTORS = 64


@contextmanager
def new_core(first: int = 0, sectors: int = SECTORS) -> Iterator[tuple[Core, int]]:
    """A core over empty files, and its log."""
    with tempfile.TemporaryFile() as pages, tempfile.TemporaryFile() as data, tempfile.TemporaryFile() as log:
        log.truncate(sectors * 512)
        core = Core(
            Trees(pages.fileno(), SEED, 1, 3, np.zeros(1, dtype=np.uint64), 0),
            data.fileno(),
            log.fileno(),
            None,
            seed=SEED,
            used=np.zeros(0, dtype=np.uint64),
            end=0,
            limit_blocks=0,
            log_sectors=sectors,
            log_next=first,
            commit_number=5,
            space_root=0,
        )
        yield core, log.fileno()
