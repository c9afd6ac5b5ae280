"""The log as the kernel writes and reads it, against its plain twin. Reading and writing of volumes has its twin in the
model of a whole pool (tests/pool/test_model.py)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore.blockmap import Trees
from snapcore.volume import Core, LogFull, Volume, read_sectors
from tests import reference as twin

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


def event(payload: bytes) -> bytes:
    """An EVENT record."""
    padded = payload.ljust((len(payload) + 7) // 8 * 8, b"\0")
    return (2).to_bytes(4, "little") + len(payload).to_bytes(4, "little") + padded


@given(st.integers(0, 10**9), st.lists(st.lists(st.binary(max_size=1500), min_size=1, max_size=3), max_size=4))
def test_commits_are_written_as_the_format_says(first: int, commits: list[list[bytes]]) -> None:
    with new_core(first) as (core, log):
        expected = bytearray(SECTORS * 512)
        number = first
        for commit, payloads in enumerate(commits, 5):
            for payload in payloads:
                core.append_event(payload)
            core.commit()
            for sector in twin.log_sectors(b"".join(map(event, payloads)), number, commit, SEED):
                place = number % SECTORS * 512
                expected[place : place + 512] = sector
                number += 1
        assert os.pread(log, SECTORS * 512, 0) == expected
        assert (core.log_next, core.commit_number) == (number, 5 + len(commits))
        assert read_sectors(expected, SEED).tolist() == twin.read_sectors(bytes(expected), SEED)


@given(st.lists(st.one_of(st.binary(min_size=512, max_size=512), st.just(bytes(512))), max_size=4), st.data())
def test_sectors_are_read_as_the_twin_reads_them(sectors: list[bytes], data: st.DataObject) -> None:
    sectors += twin.log_sectors(data.draw(st.binary(min_size=1, max_size=1200)), 9, 4, SEED)
    joined = bytearray(b"".join(data.draw(st.permutations(sectors))))
    for place in data.draw(st.lists(st.integers(0, len(joined) - 1), max_size=2)):
        joined[place] ^= 0x10
    assert read_sectors(joined, SEED).tolist() == twin.read_sectors(bytes(joined), SEED)


def test_a_part_of_a_sector_is_none() -> None:
    with pytest.raises(ValueError, match="whole number of sectors"):
        read_sectors(bytes(513), SEED)


def test_writes_that_follow_one_another_share_a_record() -> None:
    with new_core() as (core, _):
        volume = Volume(core, root=0, parent=0, size_bytes=1 << 40, version=3, writable=True)
        for block in range(100):
            volume.pwrite(bytes(4096), block * 4096)
        assert core.pending_bytes == 24


def scatter(volume: Volume, written: list[int]) -> None:
    """Write every other block, and list them."""
    for block in range(0, 10**6, 2):
        volume.pwrite(b"x" * 4096, block * 4096)
        written.append(block)


def test_a_write_that_the_log_has_no_room_for_changes_nothing() -> None:
    with new_core(sectors=16) as (core, _):
        volume = Volume(core, root=0, parent=0, size_bytes=1 << 40, version=3, writable=True)
        written: list[int] = []
        with pytest.raises(LogFull):
            scatter(volume, written)
        buffer = bytearray(4096)
        volume.pread_into(buffer, (written[-1] + 2) * 4096)
        assert buffer == bytes(4096)
        assert (core.used_blocks, core.held_blocks) == (len(written), 0)
        core.commit()
        assert core.log_free_sectors > 0
