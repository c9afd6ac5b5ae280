"""Pages are what was put into them, lie in slots that are free, and are given up when no checkpoint needs them. What
they are as parts of trees is in test_blockmap.py."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore.pages import Failure, PageFile
from tests import reference
from tests.support.map_file import CATALOG, SEED, Words, bitmap, files_no_longer_than, members, new_file, save, slot_of


def opened(descriptor: int, slots: int = 3, used: Words | None = None) -> PageFile:
    """Pages of an empty file."""
    return PageFile(descriptor, SEED, 1, slots, bitmap(slots) if used is None else used, 0)


@given(st.integers(16, 255), st.binary(min_size=1, max_size=1024))
def test_a_page_is_what_the_format_says_and_is_read_as_it_was_put(kind: int, payload: bytes) -> None:
    twin = reference.PageFile()
    with new_file() as file:
        pages = opened(file, 64)
        ref = pages.put(kind, payload)
        assert pages.stage(pages.dirty()).tobytes() == twin.stage(slot_of(ref), SEED, 1, kind, payload)
        save(pages, file)
        again = PageFile(file, SEED, pages.generation, pages.slots, pages.used_slots(), 0)
        assert again.get(kind, ref) == twin.get(kind, twin.put(kind, payload))


@given(st.integers(3, 200), st.data())
def test_pages_come_into_the_slots_that_are_free(slots: int, data: st.DataObject) -> None:
    taken = data.draw(st.sets(st.integers(0, slots - 1)))
    words = bitmap(slots, taken)
    if data.draw(st.booleans()) and slots % 64:
        # Bits behind the last slot count for nothing.
        words[-1] |= np.uint64((1 << 64) - (1 << slots % 64))
    with new_file() as file:
        pages = opened(file, slots, used=words)
        free = set(range(3, slots)) - taken
        assert pages.free_slots == len(free)
        with files_no_longer_than(1000):
            refs = [pages.put(CATALOG, b"x") for _ in free]
            with pytest.raises(Failure) as failed:
                pages.put(CATALOG, b"x")
        assert failed.value.result == -4
        assert {slot_of(ref) for ref in refs} == free
        assert members(pages.used_slots()) == {0, 1, 2, *range(slots)}
        more = [slot_of(pages.put(CATALOG, b"x")) for _ in range(100)]
        assert more == list(range(slots, slots + 100))
        assert pages.free_slots == pages.slots - slots - 100


def test_a_page_is_given_up_when_no_checkpoint_needs_it() -> None:
    with new_file() as file:
        pages = opened(file, 8)
        one, two = (pages.put(CATALOG, b"x") for _ in range(2))
        pages.free_pages(np.array([one], dtype=np.uint64))
        assert pages.free_slots == 4
        with pytest.raises(Failure):
            pages.get(CATALOG, one)
        save(pages, file)
        pages.free_pages(np.array([two], dtype=np.uint64))
        assert pages.free_slots == 4 and members(pages.used_slots()) == {0, 1, 2}
        pages.release()
        assert pages.free_slots == 4
        pages.freeze()
        assert pages.free_slots == 4
        pages.release()
        assert pages.free_slots == 5


@pytest.mark.parametrize("kind", [-1, 256, 2**31 - 1])
def test_a_kind_is_a_byte(kind: int) -> None:
    with pytest.raises(ValueError, match=f"kind {kind}"):
        opened(-1).put(kind, b"x")


@pytest.mark.parametrize("size_bytes", [0, 1025])
def test_a_page_holds_1_to_1024_bytes(size_bytes: int) -> None:
    with pytest.raises(ValueError, match="1 to 1,024 bytes"):
        opened(-1).put(CATALOG, bytes(size_bytes))


@pytest.mark.parametrize("slot", [0, 1, 2, 64, 65, 2**40, 2**48 - 1])
def test_pages_that_are_none_cannot_be_given_up(slot: int) -> None:
    with new_file() as file:
        pages = opened(file, 64)
        good = pages.put(CATALOG, b"x")
        with pytest.raises(ValueError, match="refers to no slot"):
            pages.free_pages(np.array([good, slot | 1 << 48], dtype=np.uint64))
        assert pages.get(CATALOG, good)[:1] == b"x"


def test_a_page_that_is_given_up_twice_is_free_once() -> None:
    with new_file() as file:
        pages = opened(file, 64)
        good, kept = pages.put(CATALOG, b"x"), pages.put(CATALOG, b"y")
        pages.free_pages(np.array([good, good], dtype=np.uint64))
        save(pages, file)
        pages.free_pages(np.array([kept, kept], dtype=np.uint64))
        save(pages, file)
        assert members(pages.used_slots()) == {0, 1, 2} and pages.free_slots == 61


@pytest.mark.parametrize("slot", [0, 2, 20, 64, 2**64 - 1])
def test_slots_that_are_not_in_memory_cannot_be_staged(slot: int) -> None:
    pages = opened(-1, 64)
    with pytest.raises(ValueError, match=f"slot {slot} is not in memory"):
        pages.stage(np.array([slot], dtype=np.uint64))
    pages.written(np.array([slot], dtype=np.uint64))


@pytest.mark.parametrize("wrong", [np.zeros(1, dtype=np.int64), np.zeros((1, 1), dtype=np.uint64), np.zeros(4)[::2]])
def test_arrays_of_another_shape_or_type_are_refused(wrong: npt.NDArray[np.uint64]) -> None:
    pages = opened(-1)
    for method in (pages.free_pages, pages.stage, pages.written):
        with pytest.raises(ValueError, match=r"Buffer|buffer|contiguous"):
            method(wrong)


@pytest.mark.parametrize(
    ("slots", "words"),
    [(0, 0), (1, 1), (2, 1), (3, 0), (3, 2), (65, 1), (2**40 + 1, 1), (2**64 - 1, 0), (2**64 - 1, 1)],
)
def test_a_bitmap_of_another_length_than_the_file_is_refused(slots: int, words: int) -> None:
    with pytest.raises(ValueError, match=r"a map file has 3 to|the bitmap of"):
        PageFile(-1, SEED, 1, slots, np.zeros(words, dtype=np.uint64), 0)
