"""Gives back to the host what a pool does not use: holes in the data file where blocks are free, in the map where slots
are. Blocks do not move: the host keeps no space for holes, so a dense file would save nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapcore import space
from snapcore.core import BLOCK_BYTES
from snapcore.errors import from_os_error
from snapcore.pages import SLOT_BYTES
from snapcore.pool.engine import Engine

_SECTOR_BYTES = 512
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Compacted:
    """What a compaction did: bytes of the host given back, and what the files take of it now."""

    freed_bytes: int
    data_bytes: int
    map_bytes: int


def compact(engine: Engine) -> Compacted:
    """Sweep, write a checkpoint, and punch out everything that is free. Other work waits meanwhile."""
    files, core = engine.files, engine.core
    try:
        before = _host_bytes(files.data) + _host_bytes(files.map)
        engine.sweep()
        with engine.quiet():
            for start, count in _free_runs(space.used_bitmap(core), _blocks(files.data)):
                files.medium.punch(files.data, start * BLOCK_BYTES, count * BLOCK_BYTES)
            for start, count in _free_runs(core.page_file.used_slots(), os.fstat(files.map).st_size // SLOT_BYTES):
                first = (start * SLOT_BYTES + _PAGE_BYTES - 1) // _PAGE_BYTES * _PAGE_BYTES
                last = (start + count) * SLOT_BYTES // _PAGE_BYTES * _PAGE_BYTES
                if first < last:
                    files.medium.punch(files.map, first, last - first)
        after_data, after_map = _host_bytes(files.data), _host_bytes(files.map)
    except OSError as error:
        raise from_os_error(error, f"compacting the pool {engine.folder}") from error
    return Compacted(max(0, before - after_data - after_map), after_data, after_map)


def _host_bytes(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * _SECTOR_BYTES


def _blocks(descriptor: int) -> int:
    return os.fstat(descriptor).st_size // BLOCK_BYTES


def _free_runs(used: npt.NDArray[np.uint64], count: int) -> Iterator[tuple[int, int]]:
    """Runs of numbers below `count` whose bit is 0: first and count."""
    bits = np.unpackbits(used.view(np.uint8), bitorder="little", count=None)[:count]
    edges = np.flatnonzero(np.diff(np.concatenate([[1], bits, [1]]).astype(np.int8)))
    for start, stop in edges.reshape(-1, 2).tolist():
        yield start, stop - start
