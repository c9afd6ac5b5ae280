"""Kernels beside the C library: `pytest bench/test_kernels.py` (pytest-benchmark). Read the ratios within a group.

Buffers are 1 MiB, what the second-level cache holds and what the engine reads at a time.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import xxhash

from snapcore import digest, scan

SIZE_BYTES = 1 << 20
CHUNK_BYTES = 64 << 10
BLOCK_BYTES = 4096

DATA = np.frombuffer(os.urandom(SIZE_BYTES), dtype=np.uint8)
SAME = DATA.copy()
ZEROS = np.zeros(SIZE_BYTES, dtype=np.uint8)
TARGET = np.empty(SIZE_BYTES, dtype=np.uint8)


@pytest.mark.benchmark(group="compare 1 MiB")
def test_memcpy(benchmark: Any) -> None:
    benchmark(np.copyto, TARGET, DATA)


@pytest.mark.benchmark(group="compare 1 MiB")
def test_memcmp(benchmark: Any) -> None:
    left, right = DATA.tobytes(), SAME.tobytes()
    assert benchmark(lambda: left == right)


@pytest.mark.benchmark(group="compare 1 MiB")
def test_differing_extents(benchmark: Any) -> None:
    assert len(benchmark(scan.differing_extents, DATA, SAME, BLOCK_BYTES)) == 0


@pytest.mark.benchmark(group="zero scan 1 MiB")
def test_count_nonzero_of_numpy(benchmark: Any) -> None:
    assert benchmark(np.count_nonzero, ZEROS) == 0


@pytest.mark.benchmark(group="zero scan 1 MiB")
def test_zero_mask(benchmark: Any) -> None:
    assert benchmark(scan.zero_mask, ZEROS, BLOCK_BYTES).all()


@pytest.mark.benchmark(group="fingerprints 1 MiB in 64-KiB chunks")
def test_xxh64_blocks(benchmark: Any) -> None:
    assert len(benchmark(digest.xxh64_blocks, DATA, CHUNK_BYTES)) == SIZE_BYTES // CHUNK_BYTES


@pytest.mark.benchmark(group="fingerprints 1 MiB in 64-KiB chunks")
def test_xxh64_of_the_xxhash_package(benchmark: Any) -> None:
    view = memoryview(DATA)

    def each() -> list[int]:
        return [
            xxhash.xxh64_intdigest(view[start : start + CHUNK_BYTES]) for start in range(0, SIZE_BYTES, CHUNK_BYTES)
        ]

    assert benchmark(each) == digest.xxh64_blocks(DATA, CHUNK_BYTES).tolist()
