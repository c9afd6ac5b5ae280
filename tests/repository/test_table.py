"""Tables keep every entry through storing, merging and splitting, and a wrong one is refused whole."""

from __future__ import annotations

import contextlib
import struct
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snapcore.errors import DamagedError
from snapcore.repository import table
from snapcore.repository.codec import Codec
from snapcore.repository.record import Form, Record, RecordKind
from snapcore.repository.table import ENTRY, FENCE_ENTRIES, NO_BASE, Table
from tests.support.objects import Noted, built, noted

HEAD_BYTES = 24
Row = tuple[bytes, bytes, int, int, int, int, int, int, bytes | None]


def rows_of(contents: Table) -> list[Row]:
    """What a table says of every entry, packs and bases by their ids."""
    rows = []
    for entry, found in zip(contents.entries, contents.ids(), strict=True):
        numbers = [int(entry[name]) for name in ("offset", "stored", "plain", "kind", "form", "codec")]
        place = int(entry["base"])
        base = None if place == NO_BASE else contents.bases[place].tobytes()
        rows.append((found.tobytes(), contents.packs[entry["pack"]], *numbers, base))
    return rows


def rows_noted(rows: list[Noted]) -> Counter[Row]:
    """What was told to a builder, in the same form."""
    return Counter(
        (item.id, pack, offset, item.stored_bytes, item.plain_bytes, item.kind, item.form, item.codec, item.base)
        for item, pack, offset in rows
    )


def is_sorted(contents: Table) -> bool:
    """Whether the keys ascend."""
    keys = contents.entries["key"]
    return bool((keys[1:] >= keys[:-1]).all())


@given(noted())
@example([])
def test_what_was_noted_is_in_the_table_and_in_its_stored_form(rows: list[Noted]) -> None:
    builder = built(rows)
    contents = builder.table()
    assert len(builder) == len(rows)
    assert Counter(rows_of(contents)) == rows_noted(rows) and is_sorted(contents)
    again = table.parse(contents.to_bytes(), "x")
    assert rows_of(again) == rows_of(contents)
    assert again.packs == contents.packs and again.to_bytes() == contents.to_bytes()


@given(noted(20))
def test_the_parts_of_a_stored_table_lie_where_the_layout_says(rows: list[Noted]) -> None:
    contents = built(rows * 8).table()
    data = contents.to_bytes()
    found = table.layout(data[:HEAD_BYTES], len(data), "x")
    assert (found.count, found.pack_count, found.base_count) == (
        len(contents.entries),
        len(contents.packs),
        len(contents.bases),
    )
    assert table.parse_packs(data, found) == contents.packs
    fence = np.frombuffer(data[found.fence_at : found.entries_at], dtype="<u8")
    assert fence.tolist() == contents.entries["key"][::FENCE_ENTRIES].tolist()
    assert data[found.entries_at : found.bases_at] == contents.entries.tobytes()


@given(noted())
def test_the_key_of_an_id_is_its_first_8_bytes_as_a_number(rows: list[Noted]) -> None:
    ids = [item.id for item, _, _ in rows]
    keys = table.id_keys(table.ids_of(b"".join(ids)))
    assert keys.tolist() == [int.from_bytes(found[:8], "little") for found in ids]


@given(st.lists(noted(), max_size=4))
def test_merging_keeps_every_entry_and_one_of_those_that_are_the_same(parts: list[list[Noted]]) -> None:
    # The first row noted for a place counts: in a repository a place holds one record.
    places: dict[tuple[bytes, int], Noted] = {}
    unique = [[places.setdefault((pack, offset), row) for row in part for _, pack, offset in [row]] for part in parts]
    merged = table.merge([built(part).table() for part in unique])
    assert sorted(rows_of(merged), key=repr) == sorted(rows_noted(list(places.values())), key=repr)
    assert is_sorted(merged)
    assert rows_of(table.parse(merged.to_bytes(), "x")) == rows_of(merged)


@given(noted(20), st.integers(1, 25))
def test_splitting_keeps_every_entry_in_order_and_only_packs_and_bases_in_use(rows: list[Noted], limit: int) -> None:
    contents = built(rows).table()
    parts = table.split(contents, limit)
    assert [row for part in parts for row in rows_of(part)] == rows_of(contents)
    assert all(len(part.entries) == limit for part in parts[:-1])
    for part in parts:
        assert 0 < len(part.entries) <= limit
        assert set(part.packs) == {row[1] for row in rows_of(part)}
        assert {base.tobytes() for base in part.bases} == {row[-1] for row in rows_of(part)} - {None}
        assert rows_of(table.parse(part.to_bytes(), "x")) == rows_of(part)


@given(st.lists(noted(), max_size=3), st.integers(1, 20))
def test_splitting_and_merging_again_changes_nothing(parts: list[list[Noted]], limit: int) -> None:
    merged = table.merge([built(part).table() for part in parts])
    again = table.merge(table.split(merged, limit))
    # Where only packs tell entries of one id apart, their order is that of the packs in the table.
    assert sorted(rows_of(again), key=repr) == sorted(rows_of(merged), key=repr) and is_sorted(again)


def stored(full: int = 70, patches: int = 3) -> tuple[Table, bytearray]:
    """A table with enough entries for two fence keys, some of them patches, and its stored form."""
    rows: list[Noted] = []
    for number in range(full + patches):
        base = bytes([number]) * 32 if number >= full else None
        form = Form.FULL if base is None else Form.PATCH
        found = Record(RecordKind.CHUNK, form, bytes([number]) * 32, b"", b"data", Codec.RAW, 4, base)
        rows.append((found, bytes([number % 3]) * 16, number * 100))
    contents = built(rows).table()
    return contents, bytearray(contents.to_bytes())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pack", 3),
        ("pack", 2**32 - 1),
        ("stored", 0),
        ("stored", 63),
        ("stored", 2**32 - 1),
        ("kind", 0),
        ("kind", 3),
        ("kind", 255),
        ("form", 2),
        ("form", 255),
        ("base", 0),
        ("base", 2),
    ],
)
@pytest.mark.parametrize("number", [0, 63, 64, 69])
def test_a_full_entry_with_a_field_out_of_its_bounds_is_refused(field: str, value: int, number: int) -> None:
    _, data = stored()
    found = table.layout(data, len(data), "x")
    view = np.frombuffer(data, dtype=ENTRY, count=found.count, offset=found.entries_at)
    table.parse(data, "x")
    view[field][number] = value
    with pytest.raises(DamagedError, match=f"the-table: entry {number} "):
        table.parse(data, "the-table")


@pytest.mark.parametrize("value", [3, 4, NO_BASE])
def test_a_patch_without_a_base_in_the_table_is_refused(value: int) -> None:
    _, data = stored()
    found = table.layout(data, len(data), "x")
    view = np.frombuffer(data, dtype=ENTRY, count=found.count, offset=found.entries_at)
    number = int(np.flatnonzero(view["form"] == Form.PATCH)[0])
    view["base"][number] = value
    with pytest.raises(DamagedError, match=f"entry {number} "):
        table.parse(data, "x")


def test_entries_out_of_order_are_refused() -> None:
    _, data = stored()
    found = table.layout(data, len(data), "x")
    view = np.frombuffer(data, dtype=ENTRY, count=found.count, offset=found.entries_at)
    view[:2] = view[[1, 0]]
    with pytest.raises(DamagedError, match="out of order"):
        table.parse(data, "x")


@given(st.data())
def test_a_table_that_is_cut_or_longer_is_refused(data: st.DataObject) -> None:
    _, whole = stored(5, 2)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for wrong in (cut, whole + b"\0", whole + bytes(ENTRY.itemsize)):
        with pytest.raises(DamagedError, match="the-table: a table of"):
            table.parse(wrong, "the-table")


@given(st.integers(0, 2**64 - 1), *[st.integers(0, 2**32 - 1)] * 4)
@example(2**64 - 1, 1, 0, 64, 0)
@example(2**58, 0, 0, 64, 0)
def test_a_head_that_claims_anything_is_checked_against_the_length(
    count: int, packs: int, bases: int, fence: int, zero: int
) -> None:
    _, data = stored(5, 2)
    head = struct.pack("<QIIII", count, packs, bases, fence, zero)
    if head == data[:HEAD_BYTES]:
        return
    with pytest.raises(DamagedError, match="the-table: a table of"):
        table.parse(head + data[HEAD_BYTES:], "the-table")


@given(st.binary(max_size=300))
def test_any_bytes_are_a_table_or_damage(data: bytes) -> None:
    with contextlib.suppress(DamagedError):
        table.parse(data, "x")
