"""Presence does what a set of numbers does, from many threads too, and takes no bitmap that is none."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore.presence import Presence
from tests import reference

ranges = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 200)), max_size=8)


@given(st.integers(1, 300), st.integers(1, 5000), ranges, ranges)
def test_it_holds_what_was_added_and_tells_what_is_missing(
    chunks: int, chunk_bytes: int, added: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    size_bytes = (chunks - 1) * chunk_bytes + 1
    found, twin = Presence(size_bytes, chunk_bytes), reference.Presence(size_bytes, chunk_bytes)
    for first, count in added:
        if first + count > chunks:
            with pytest.raises(ValueError, match="chunks"):
                found.add(first, count)
            continue
        found.add(first, count)
        twin.add(first, count)
    assert (found.chunks, found.here) == (chunks, twin.here)
    for first, count in [*asked, (0, chunks)]:
        assert found.missing(first, count).tolist() == twin.missing(first, count)
    assert found.to_bytes() == twin.to_bytes()
    again = Presence(size_bytes, chunk_bytes)
    again.load(found.to_bytes())
    twin.load(found.to_bytes())
    assert (again.here, again.to_bytes()) == (twin.here, twin.to_bytes())


@given(st.integers(1, 300), st.integers(0, 80))
def test_a_bitmap_of_another_length_or_with_more_chunks_is_refused(chunks: int, length: int) -> None:
    found = Presence(chunks, 1)
    words = -(-chunks // 64)
    if length != words * 8:
        with pytest.raises(ValueError, match="words"):
            found.load(bytes(length))
    if chunks % 64:
        with pytest.raises(ValueError, match="has not"):
            found.load((1 << chunks).to_bytes(words * 8, "little"))
    assert found.here == 0


@pytest.mark.parametrize(("size_bytes", "chunk_bytes"), [(0, 1), (1, 0), (1 << 40, 1)])
def test_an_image_has_chunks_but_not_too_many(size_bytes: int, chunk_bytes: int) -> None:
    with pytest.raises(ValueError, match="chunks"):
        Presence(size_bytes, chunk_bytes)


def test_threads_that_add_the_same_chunks_count_each_once() -> None:
    found = Presence(5000, 1)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda first: found.add(first % 50 * 100, 100), range(400)))
    assert found.here == 5000
