"""Extents are sets of bytes: every function is compared with the same operation on Python sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snapcore import extents
from snapcore.errors import UsageError
from snapcore.extents import Extents

SIZE = 200
BIG = 2**63 - 1

Pairs = list[tuple[int, int]]

pairs = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, 40)), max_size=12)
sizes = st.integers(0, SIZE + 60)
block_sizes = st.integers(1, 50)


def bytes_of(rows: Pairs | Extents) -> set[int]:
    """The numbers of all bytes that lie in the rows."""
    listed = rows.tolist() if isinstance(rows, np.ndarray) else rows
    return {byte for offset, length in listed for byte in range(offset, offset + length)}


def normal(rows: Extents) -> Extents:
    """The rows, checked to be sorted, merged and not empty."""
    assert rows.dtype == np.int64 and rows.shape == (len(rows), 2)
    assert (rows[:, 0] >= 0).all() and (rows[:, 1] > 0).all()
    assert (rows[1:, 0] > rows[:-1].sum(axis=1)).all()
    return rows


@given(pairs, st.booleans())
def test_pairs_in_any_order_become_the_same_bytes_merged(given_pairs: Pairs, as_array: bool) -> None:
    taken = np.array(given_pairs, dtype=np.int64).reshape(-1, 2) if as_array else given_pairs
    assert bytes_of(normal(extents.from_pairs(taken))) == bytes_of(given_pairs)


@given(pairs)
def test_the_array_that_was_given_is_not_touched_and_not_shared(given_pairs: Pairs) -> None:
    taken = np.array(given_pairs, dtype=np.int64).reshape(-1, 2)
    before = taken.copy()
    made = extents.from_pairs(taken)
    made[:] = -1
    assert (taken == before).all()


@given(st.sets(st.integers(0, 30)), block_sizes, sizes)
def test_blocks_become_the_bytes_of_those_blocks(blocks: set[int], block_bytes: int, size_bytes: int) -> None:
    rows = extents.from_blocks(np.array(sorted(blocks), dtype=np.int64), block_bytes, size_bytes)
    assert bytes_of(normal(rows)) == {byte for byte in range(size_bytes) if byte // block_bytes in blocks}


@given(pairs, block_sizes, sizes)
def test_aligned_extents_are_all_bytes_of_the_blocks_that_are_touched(
    given_pairs: Pairs, block_bytes: int, size_bytes: int
) -> None:
    rows = extents.aligned(extents.from_pairs(given_pairs), block_bytes, size_bytes)
    touched = {byte // block_bytes for byte in bytes_of(given_pairs)}
    assert bytes_of(normal(rows)) == {byte for byte in range(size_bytes) if byte // block_bytes in touched}


@given(st.integers(0, BIG), st.sampled_from([512, 4096, 1 << 16, 1 << 22]), st.integers(1, 1 << 50))
@example(0, 4096, 1 << 20)
@example(BIG - 1, 4096, 1 << 20)
def test_an_extent_up_to_the_last_byte_there_can_be_is_aligned_like_any_other(
    offset: int, block_bytes: int, size_bytes: int
) -> None:
    rows = extents.aligned(extents.from_pairs([(offset, BIG - offset)]), block_bytes, size_bytes)
    start = offset // block_bytes * block_bytes
    assert rows.tolist() == ([[start, size_bytes - start]] if start < size_bytes and offset < BIG else [])


@given(pairs, sizes, sizes)
def test_clipped_extents_are_the_bytes_between_start_and_stop(given_pairs: Pairs, start: int, stop: int) -> None:
    rows = extents.clipped(extents.from_pairs(given_pairs), start, stop)
    assert bytes_of(normal(rows)) == bytes_of(given_pairs) & set(range(start, stop))


@given(pairs, sizes)
def test_gaps_are_the_bytes_in_none(given_pairs: Pairs, size_bytes: int) -> None:
    rows = extents.gaps(extents.from_pairs(given_pairs), size_bytes)
    assert bytes_of(normal(rows)) == set(range(size_bytes)) - bytes_of(given_pairs)


@given(pairs, pairs, sizes)
def test_union_intersection_and_difference_are_those_of_sets(a: Pairs, b: Pairs, size_bytes: int) -> None:
    rows_a, rows_b = extents.from_pairs(a), extents.from_pairs(b)
    all_bytes = set(range(size_bytes))
    assert bytes_of(normal(extents.union(rows_a, rows_b))) == bytes_of(a) | bytes_of(b)
    common = extents.intersection(rows_a, rows_b, size_bytes)
    assert bytes_of(normal(common)) == bytes_of(a) & bytes_of(b) & all_bytes
    rest = extents.difference(rows_a, rows_b, size_bytes)
    assert bytes_of(normal(rest)) == (bytes_of(a) - bytes_of(b)) & all_bytes


@given(pairs)
def test_total_bytes_counts_every_byte_once(given_pairs: Pairs) -> None:
    assert extents.total_bytes(extents.from_pairs(given_pairs)) == len(bytes_of(given_pairs))


@given(pairs, st.integers(1, 50))
def test_spans_are_the_same_bytes_in_order_and_none_crosses_a_border(given_pairs: Pairs, span_bytes: int) -> None:
    rows = extents.from_pairs(given_pairs)
    found = list(extents.spans(rows, span_bytes))
    assert [byte for offset, length in found for byte in range(offset, offset + length)] == sorted(bytes_of(rows))
    assert all(length and offset // span_bytes == (offset + length - 1) // span_bytes for offset, length in found)


def test_no_extents_stay_no_extents() -> None:
    nothing = extents.empty()
    for rows in (
        nothing,
        extents.from_pairs([]),
        extents.from_pairs(nothing),
        extents.from_pairs([(5, 0)]),
        extents.merged(nothing),
        extents.from_blocks(np.empty(0, dtype=np.int64), 512, 100),
        extents.aligned(nothing, 512, 100),
        extents.clipped(nothing, 0, 100),
        extents.gaps(nothing, 0),
        extents.union(nothing, nothing),
    ):
        assert rows.shape == (0, 2) and rows.dtype == np.int64
    assert list(extents.spans(nothing, 512)) == [] and extents.total_bytes(nothing) == 0


def test_the_last_byte_that_there_can_be_is_an_extent() -> None:
    assert extents.from_pairs([(BIG - 1, 1), (BIG, 0)]).tolist() == [[BIG - 1, 1]]
    assert extents.from_pairs([(0, BIG)]).tolist() == [[0, BIG]]


@pytest.mark.parametrize(
    "wrong",
    [
        [(-1, 1)],
        [(1, -1)],
        [(0, 10), (-5, 0)],
        [(BIG, 1)],
        [(1, BIG)],
        [(2**63, 1)],
        [(0, 2**64)],
        [(1, 2, 3)],
        [(1, 2), (3,)],
        [1, 2],
        [("a", "b")],
        [None],
    ],
    ids=str,
)
def test_what_is_no_pair_of_offset_and_length_is_refused(wrong: list[tuple[int, int]]) -> None:
    with pytest.raises(UsageError, match="extent"):
        extents.from_pairs(wrong)
