"""The contracts of snapcore/store/interface.py as tests: whatever calls itself a store passes all of them.

A test module subclasses `StoreConformance` and gives it a fixture `store`: a new, empty store.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore.errors import DamagedError, Error, ExistsError, NotFoundError, UsageError
from snapcore.store import Store

LIMIT_BYTES = 1 << 20
WRITERS = 16

BAD_NAMES = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "../x",
    "a/../b",
    "./a",
    "A",
    "packs/ABC",
    "a b",
    "a_b",
    "a.b",
    "a\n",
    "a\0b",
    "ä",
    "\udcff",
    "a\\b",
    "tmp",
    "tmp/x",
    "tmp/x/y",
]

# Short parts over few characters, with "-" (before "/" in the order of bytes) and "0" (behind it): what a walk
# by folders could put in the wrong order. The first letter tells objects and folders apart.
_parts = st.text("a0-", min_size=0, max_size=2)
names = st.builds(
    lambda folders, last: "/".join(["d" + folder for folder in folders] + ["o" + last]),
    st.lists(_parts, max_size=2),
    _parts,
)


def put(store: Store, name: str, data: bytes = b"data") -> int:
    """Create an object of one buffer."""
    return store.put_new(name, [data])


def held(store: Store) -> dict[str, bytes]:
    """All objects."""
    return {name: store.get(name, LIMIT_BYTES) for name, _ in store.list("")}


class StoreConformance:
    """Needs a fixture `store`."""

    # Creation and reading

    @given(parts=st.lists(st.binary(max_size=40), max_size=20))
    def test_an_object_is_the_buffers_joined(self, store: Store, parts: list[bytes]) -> None:
        wanted = b"".join(parts)
        assert store.put_new("packs/a", parts) == len(wanted)
        assert store.get("packs/a", LIMIT_BYTES) == store.get("packs/a", len(wanted)) == wanted
        assert store.size("packs/a") == len(wanted)
        store.delete("packs/a")

    def test_buffers_of_every_make_are_taken(self, store: Store) -> None:
        store.put_new("a", [b"by", bytearray(b"te"), memoryview(b"xsy")[1:2], memoryview(bytearray(b""))])
        assert store.get("a", LIMIT_BYTES) == b"bytes"

    def test_more_buffers_than_one_system_call_takes_are_one_object(self, store: Store) -> None:
        parts = [bytes([number % 251]) * 3 for number in range(5000)]
        assert store.put_new("a", parts) == 15000
        assert store.get("a", LIMIT_BYTES) == b"".join(parts)

    def test_what_the_caller_does_to_its_buffer_afterwards_does_not_change_the_object(self, store: Store) -> None:
        buffer = bytearray(b"first" * 1000)
        store.put_new("a", [buffer, memoryview(buffer)])
        buffer[:] = b"other" * 1000
        assert store.get("a", LIMIT_BYTES) == b"first" * 2000

    def test_what_was_read_can_be_kept_when_the_object_goes(self, store: Store) -> None:
        put(store, "a", b"data")
        whole, part = store.get("a", LIMIT_BYTES), store.get_range("a", 1, 2)
        store.delete("a")
        assert (whole, part) == (b"data", b"at")

    # Create if absent

    def test_a_name_that_is_taken_stays_as_it_is(self, store: Store) -> None:
        put(store, "a/b", b"first")
        for data in (b"other", b"first", b""):
            with pytest.raises(ExistsError, match="a/b"):
                put(store, "a/b", data)
        assert held(store) == {"a/b": b"first"}

    def test_of_many_that_create_one_name_one_wins(self, store: Store) -> None:
        start = threading.Barrier(WRITERS)

        def create(number: int, name: str) -> bool:
            start.wait(60)
            try:
                store.put_new(name, [b"writer", number.to_bytes(2, "little") * 500])
            except ExistsError:
                return False
            return True

        with ThreadPoolExecutor(WRITERS) as hands:
            for attempt in range(8):
                name = f"race/{attempt}"
                won = list(hands.map(create, range(WRITERS), [name] * WRITERS))
                assert sum(won) == 1
                winner = won.index(True)
                assert store.get(name, LIMIT_BYTES) == b"writer" + winner.to_bytes(2, "little") * 500

    def test_a_name_is_free_again_after_a_removal(self, store: Store) -> None:
        put(store, "a", b"first")
        assert store.get_range("a", 0, 5) == b"first"
        store.delete("a")
        put(store, "a", b"other!")
        assert store.get("a", LIMIT_BYTES) == store.get_range("a", 0, 6) == b"other!"
        assert store.size("a") == 6

    def test_many_threads_create_read_list_and_remove_at_once(self, store: Store) -> None:
        def live(number: int) -> None:
            for turn in range(5):
                name, data = f"t{number}/{turn}", bytes([number]) * (turn + 1)
                store.put_new(name, [data])
                assert store.get(name, LIMIT_BYTES) == data
                assert store.get_range(name, turn, 1) == data[:1]
                assert (name, turn + 1) in list(store.list(f"t{number}/"))
                assert set(dict(store.list(""))) >= {name}
                if turn % 2:
                    store.delete(name)

        with ThreadPoolExecutor(8) as hands:
            list(hands.map(live, range(8)))
        assert sorted(held(store)) == [f"t{number}/{turn}" for number in range(8) for turn in (0, 2, 4)]

    # Ranges and limits

    @given(offset=st.integers(0, 30), length=st.integers(0, 30))
    def test_a_range_is_exactly_those_bytes_or_an_error(self, store: Store, offset: int, length: int) -> None:
        data = bytes(range(20))
        if not list(store.list("")):
            put(store, "a", data)
        if offset + length <= len(data):
            assert store.get_range("a", offset, length) == data[offset : offset + length]
        else:
            with pytest.raises(DamagedError, match="a ends"):
                store.get_range("a", offset, length)

    @pytest.mark.parametrize(("offset", "length"), [(0, 2**63), (2**63, 0), (2**64, 2**64), (1, 2**63 - 1)])
    def test_a_range_beyond_what_any_object_holds_is_damage_too(self, store: Store, offset: int, length: int) -> None:
        put(store, "a")
        with pytest.raises(DamagedError, match="a ends"):
            store.get_range("a", offset, length)

    @pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (-1, 0)])
    def test_a_negative_range_is_refused(self, store: Store, offset: int, length: int) -> None:
        put(store, "a")
        with pytest.raises(UsageError, match="negative"):
            store.get_range("a", offset, length)

    def test_an_object_larger_than_the_limit_is_not_read(self, store: Store) -> None:
        put(store, "a", b"12345")
        assert store.get("a", 5) == b"12345"
        for limit_bytes in (4, 0):
            with pytest.raises(DamagedError, match=f"5 bytes where {limit_bytes} are the most"):
                store.get("a", limit_bytes)

    # Names

    @pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
    def test_what_is_no_name_is_refused_by_every_method(self, store: Store, name: str) -> None:
        put(store, "a")
        for call in (
            lambda: put(store, name),
            lambda: store.get(name, LIMIT_BYTES),
            lambda: store.get_range(name, 0, 0),
            lambda: store.size(name),
            lambda: store.delete(name),
        ):
            with pytest.raises(UsageError, match="no object name"):
                call()
        assert held(store) == {"a": b"data"}

    @pytest.mark.parametrize("prefix", ["/", "../", "A/", "a//", "tmp/", "a/../", "./"])
    def test_a_prefix_that_no_name_can_have_is_refused(self, store: Store, prefix: str) -> None:
        put(store, "a/b")
        with pytest.raises(UsageError, match="no object name"):
            list(store.list(prefix))

    @pytest.mark.parametrize("name", ["missing", "missing/a", "packs", "packs/a/b", "packs/b"])
    def test_what_is_not_there_is_not_found_by_any_method(self, store: Store, name: str) -> None:
        put(store, "packs/a")
        for call in (
            lambda: store.get(name, LIMIT_BYTES),
            lambda: store.get_range(name, 0, 0),
            lambda: store.size(name),
            lambda: store.delete(name),
        ):
            with pytest.raises(NotFoundError, match=name):
                call()
        assert held(store) == {"packs/a": b"data"}

    # Listing

    @given(wanted=st.dictionaries(names, st.binary(max_size=3), max_size=8), prefix=st.lists(_parts, max_size=2))
    def test_listing_is_complete_and_sorted_by_name(
        self, store: Store, wanted: dict[str, bytes], prefix: list[str]
    ) -> None:
        for name, data in wanted.items():
            put(store, name, data)
        rows = sorted((name, len(data)) for name, data in wanted.items())
        start = "".join(f"d{part}/" for part in prefix)
        assert list(store.list("")) == rows
        assert list(store.list(start)) == [row for row in rows if row[0].startswith(start)]
        for name in wanted:
            store.delete(name)
        assert list(store.list("")) == []

    def test_a_listing_can_begin_behind_a_name_whether_that_is_there_or_not(self, store: Store) -> None:
        for name in ("a/b", "a/d", "a-/x", "a0", "b/a"):
            put(store, name)
        assert [name for name, _ in store.list("", after="a/b")] == ["a/d", "a0", "b/a"]
        assert [name for name, _ in store.list("a/", after="a/b")] == ["a/d"]
        assert [name for name, _ in store.list("a/", after="a/c")] == ["a/d"]
        assert list(store.list("a/", after="a/d")) == list(store.list("", after="b/a")) == []

    def test_removal_during_a_listing_does_not_disturb_it(self, store: Store) -> None:
        wanted = [f"p/{number:03}" for number in range(50)]
        for name in wanted:
            put(store, name)
        found = []
        for name, _ in store.list("p/"):
            found.append(name)
            store.delete(name)
        assert found == wanted and not held(store)

    def test_listing_what_is_not_there_is_empty(self, store: Store) -> None:
        assert list(store.list("")) == list(store.list("packs/")) == list(store.list("a/b/c/")) == []

    # Removal, settling, sweeping

    def test_what_is_removed_is_gone_at_once(self, store: Store) -> None:
        put(store, "a/b")
        put(store, "a/c", b"stays")
        assert store.get_range("a/b", 0, 4) == b"data"
        store.delete("a/b")
        for call in (
            lambda: store.get("a/b", LIMIT_BYTES),
            lambda: store.get_range("a/b", 0, 1),
            lambda: store.size("a/b"),
            lambda: store.delete("a/b"),
        ):
            with pytest.raises(NotFoundError):
                call()
        assert held(store) == {"a/c": b"stays"}

    def test_settling_and_sweeping_touch_no_object(self, store: Store) -> None:
        for prefix in ("", "packs/", "missing/"):
            store.settle(prefix)
        put(store, "packs/a", b"1")
        put(store, "b", b"2")
        for prefix in ("", "packs/", "missing/"):
            store.settle(prefix)
        assert store.sweep() == 0
        assert held(store) == {"packs/a": b"1", "b": b"2"}

    def test_an_empty_store_has_nothing_to_sweep(self, store: Store) -> None:
        assert store.sweep() == 0

    # Errors

    def test_every_error_is_one_of_snapcore_and_names_the_store_or_the_object(self, store: Store) -> None:
        put(store, "a")
        for call, named in (
            (lambda: store.get("b", 1), "b"),
            (lambda: store.get("a", 1), "a"),
            (lambda: store.get_range("a", 0, 9), "a"),
            (lambda: put(store, "a"), "a"),
            (lambda: store.delete("b"), "b"),
        ):
            with pytest.raises(Error, match=f"{store.url}/{named}"):
                call()
