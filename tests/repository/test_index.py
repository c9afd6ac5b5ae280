"""The index finds what a dict of all entries finds, wherever the entries are kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore.errors import DamagedError, Error
from snapcore.repository import index, pack, table
from snapcore.repository.codec import Codec
from snapcore.repository.index import BadPlaces, Index, Place
from snapcore.repository.record import Form, Record, RecordKind
from snapcore.repository.table import ENTRY, FENCE_ENTRIES, Table
from snapcore.store import MemoryStore
from tests.support.objects import Noted, built, ids, noted, pack_ids

# All index objects are paged; some are; none is.
residents = st.sampled_from([0, 8, 1 << 19])


class Counting(MemoryStore):
    """Counts what ranges are read."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        self.lengths.append(length_bytes)
        return super().get_range(name, offset_bytes, length_bytes)


def stored(tables: list[Table], packs: set[bytes] | None = None) -> Counting:
    """A store with these index objects and these packs (all that the tables name)."""
    store = Counting()
    for contents in tables:
        index.write(store, contents)
    for pack_id in packs if packs is not None else {pack_id for contents in tables for pack_id in contents.packs}:
        store.put_new(f"packs/{pack_id.hex()}", [b"pack"])
    return store


def loaded(store: MemoryStore, resident: int, bad: BadPlaces = frozenset()) -> Index:
    """The index of a store that may keep so many entries in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "RESIDENT_ENTRIES", resident)
        return Index.load(store, bad, there=lambda: pack.sizes(store))


def unnumbered(place: Place | None) -> tuple[object, ...] | None:
    """A place without its slot."""
    return None if place is None else tuple(place)[1:]


def place_of(row: Noted) -> tuple[object, ...]:
    """The place of a noted record, without a slot."""
    item, pack, offset = row
    return pack, offset, item.stored_bytes, item.plain_bytes, item.kind, item.form, item.base


def record_of(record_id: bytes, base: bytes | None = None) -> Record:
    """A small record."""
    form = Form.FULL if base is None else Form.PATCH
    return Record(RecordKind.CHUNK, form, record_id, b"", b"data", Codec.RAW, 4, base)


def unique_places(parts: list[list[Noted]]) -> list[list[Noted]]:
    """The parts without a second record at one place."""
    seen: set[tuple[bytes, int]] = set()

    def first(rows: list[Noted]) -> Iterator[Noted]:
        for row in rows:
            if row[1:] not in seen:
                seen.add(row[1:])
                yield row

    return [list(first(rows)) for rows in parts]


@given(st.lists(noted(), max_size=4).map(unique_places), residents, st.sets(pack_ids), st.data())
def test_every_look_up_finds_what_a_dict_finds(
    parts: list[list[Noted]], resident: int, gone: set[bytes], data: st.DataObject
) -> None:
    rows = [row for part in parts for row in part]
    everywhere = [(pack, offset) for _, pack, offset in rows]
    bad = frozenset(data.draw(st.sets(st.sampled_from(everywhere), max_size=5)) if everywhere else ())
    readable = [row for row in rows if row[1:] not in bad and row[1] not in gone]
    full = {row[0].id for row in readable if row[0].base is None}
    usable = [row for row in readable if row[0].base is None or row[0].base in full]

    tables = [built(part).table() for part in parts]
    found = loaded(stored(tables, {pack for _, pack, _ in rows} - gone), resident, bad)
    listed = [entry for contents in found.tables() for entry in contents.ids()]
    assert len(listed) == found.slots

    asked = [item.id for item, _, _ in rows] + data.draw(st.lists(ids, max_size=3))
    places = [found.find(record_id) for record_id in asked]
    fulls = [found.find_full(record_id) for record_id in asked]
    for record_id, place, whole in zip(asked, places, fulls, strict=True):
        wanted = [place_of(row) for row in usable if row[0].id == record_id]
        assert unnumbered(place) in (wanted or [None])
        assert unnumbered(whole) in ([row for row in wanted if row[-1] is None] or [None])
        for answer in (place, whole):
            assert answer is None or listed[answer.slot].tobytes() == record_id
    joined = table.ids_of(b"".join(asked))
    assert found.find_many(joined) == places
    assert found.find_many_full(joined) == fulls
    assert found.packs() == {pack for _, pack, _ in rows}


@pytest.mark.parametrize("resident", [0, 1 << 19])
@pytest.mark.parametrize("before", [0, 1, 63, 64])
def test_ids_with_one_key_are_found_across_the_borders_of_pages(resident: int, before: int) -> None:
    key, low, high = b"\5" * 8, bytes(8), b"\xff" * 8
    count = 3 * FENCE_ENTRIES
    names = [low + bytes([number]) * 24 for number in range(before)]
    names += [key + bytes([number]) * 24 for number in range(count)]
    names += [high + bytes([number]) * 24 for number in range(5)]
    rows: list[Noted] = [(record_of(name), b"p" * 16, 64 + 100 * number) for number, name in enumerate(names)]
    found = loaded(stored([built(rows).table()]), resident)
    assert [unnumbered(found.find(name)) for name in names] == [place_of(row) for row in rows]
    assert found.find(key + b"\xee" * 24) is None
    assert found.find_many(table.ids_of(b"".join(names))) == [found.find(name) for name in names]


@pytest.mark.parametrize("resident", [0, 1 << 19])
def test_of_two_places_the_good_one_is_found(resident: int) -> None:
    name = b"\7" * 32
    rows: list[Noted] = [(record_of(name), bytes([number]) * 16, 64) for number in range(3)]
    for good in range(3):
        bad = frozenset((bytes([number]) * 16, 64) for number in range(3) if number != good)
        found = loaded(stored([built(rows).table()]), resident, bad)
        for place in (found.find(name), *found.find_many(table.ids_of(name))):
            assert place is not None and place.pack == bytes([good]) * 16
    found = loaded(stored([built(rows).table()]), resident, frozenset((row[1], 64) for row in rows))
    assert found.find(name) is None and found.find_many(table.ids_of(name)) == [None]


def test_a_look_up_in_a_paged_object_reads_one_page_and_a_second_one_nothing() -> None:
    names = [(number * 7919).to_bytes(8, "little") + b"\1" * 24 for number in range(5000)]
    store = stored([built([(record_of(name), b"p" * 16, 64) for name in names]).table()])
    found = loaded(store, 0)
    for name in names[::1000]:
        store.lengths.clear()
        assert found.find(name) is not None
        # The page before is read too where the id's key is the first one of a page.
        assert len(store.lengths) <= 2 and all(length <= 65 * ENTRY.itemsize for length in store.lengths)
        store.lengths.clear()
        assert found.find(name) is not None and store.lengths == []


@given(noted(), residents)
def test_what_is_stored_now_is_found_before_and_after_it_is_written(rows: list[Noted], resident: int) -> None:
    store = stored([])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "RESIDENT_ENTRIES", resident)
        found = Index.load(store)
        latest = {row[0].id: row for row in rows}
        for row in rows:
            item, pack, offset = row
            place = Place(-1, pack, offset, item.stored_bytes, item.plain_bytes, item.kind, item.form, item.base)
            found.add(item.id, place)
        asked = table.ids_of(b"".join(latest))
        full = {item.id for item, _, _ in latest.values() if item.base is None}
        wanted = [place_of(row) if row[0].base in {None, *full} else None for row in latest.values()]
        assert [unnumbered(place) for place in found.find_many(asked)] == wanted
        assert all(found.is_new(name) for name in latest)

        contents = built(list(latest.values())).table()
        name, size_bytes = index.write(store, contents)
        found.written(name, contents, size_bytes)
        assert not any(found.is_new(record_id) for record_id in latest)
        assert [unnumbered(place) for place in found.find_many(asked)] == wanted
        assert found.slots == len(latest)


def test_what_lies_in_a_pack_that_no_index_object_names_is_found_when_it_is_taken_up() -> None:
    found = loaded(stored([]), 1 << 19)
    row: Noted = (record_of(b"\1" * 32), b"p" * 16, 64)
    found.add_table(built([row]).table())
    assert unnumbered(found.find(b"\1" * 32)) == place_of(row)


@pytest.mark.parametrize("resident", [0, 1 << 19])
def test_an_index_object_that_is_damaged_is_an_error_or_told_and_left_out(resident: int) -> None:
    rows: list[list[Noted]] = [[(record_of(bytes([number]) * 32), b"p" * 16, 64)] * 80 for number in (1, 2)]
    store = stored([built(part).table() for part in rows])
    name = index.write(store, built(rows[0]).table())[0]
    data = bytearray(store.get(name, 1 << 20))
    data[100] ^= 1
    store.delete(name)
    store.put_new(name, [data])
    told: list[tuple[str, Error]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "RESIDENT_ENTRIES", resident)
        found = Index.load(store, damaged=lambda where, error: told.append((where, error)))
    assert [where for where, _ in told] == [name] and isinstance(told[0][1], DamagedError)
    assert all(found.find(bytes([number]) * 32) is not None for number in (1, 2))
    with pytest.raises(DamagedError, match=name):
        index.load(store, name)


def test_an_object_under_a_name_that_no_index_object_has_is_damage() -> None:
    store = stored([])
    store.put_new("index/no-id", [b"data"])
    with pytest.raises(DamagedError, match="index/no-id"):
        loaded(store, 1 << 19)


def test_the_pages_that_are_kept_are_bounded_for_all_index_objects_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_PAGES_KEPT", 4)
    parts = [[bytes([part, number]) + b"\1" * 30 for number in range(4)] for part in range(8)]
    rows = [[(record_of(name), b"p" * 16, 64 + part) for name in names] for part, names in enumerate(parts)]
    store = stored([built(list(part)).table() for part in rows])
    found = loaded(store, 0)
    # A look-up of what is nowhere asks every object: for eight objects, four pages never suffice.
    assert found.find(b"\xff" * 32) is None
    store.lengths.clear()
    assert found.find(b"\xff" * 32) is None
    assert len(store.lengths) == len(parts)


def test_bases_in_a_paged_object_are_read_when_they_are_needed() -> None:
    count = 1000
    bases = [number.to_bytes(8, "little") + b"\2" * 24 for number in range(count)]
    patches = [number.to_bytes(8, "little") + b"\3" * 24 for number in range(count)]
    rows: list[Noted] = [(record_of(base), b"p" * 16, 64 * number) for number, base in enumerate(bases)]
    rows += [
        (record_of(name, base), b"q" * 16, 64 * number)
        for number, (name, base) in enumerate(zip(patches, bases, strict=True))
    ]
    store = stored([built(rows).table()])
    found = loaded(store, 0)
    assert sum(store.lengths) < count * 32
    places = [found.find(name) for name in patches]
    assert [place and place.base for place in places] == bases


def test_a_paged_index_object_that_is_gone_is_damage_to_a_look_up() -> None:
    name = b"\1" * 32
    store = stored([built([(record_of(name), b"p" * 16, 64)]).table()])
    found = loaded(store, 0)
    (where,) = [where for where, _ in store.list("index/")]
    store.delete(where)
    with pytest.raises(DamagedError, match=where):
        found.find(name)
    with pytest.raises(DamagedError, match=where):
        found.find_many(table.ids_of(name))


def test_packs_that_no_entry_names_are_listed_with_their_sizes() -> None:
    store = stored([], {b"a" * 16, b"b" * 16})
    store.put_new("packs/0123", [b"no pack"])
    store.put_new("packs/not-hex", [b"no pack"])
    assert index.unindexed_packs(store, {b"a" * 16}) == [(b"b" * 16, 4)]
