"""The log as the kernel writes and reads it, against its plain twin."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import log as kernel
from snapcore.log import read_sectors
from tests import reference as twin
from tests.support.cores import SECTORS, SEED, new_core


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
                kernel.append_event(core, payload)
            kernel.commit(core)
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
