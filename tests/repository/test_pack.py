"""A pack gives back its records by offset, by directory, and record by record where the directory is lost."""

from __future__ import annotations

import errno
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore.errors import DamagedError, ReadError
from snapcore.repository import envelope, pack, record
from snapcore.repository.envelope import Kind
from snapcore.repository.pack import FOOTER_BYTES, PackBuilder
from snapcore.repository.record import HEADER_BYTES, Record, RecordKind
from snapcore.repository.table import Table
from snapcore.store import MemoryStore

UNIT_BYTES = 512


@st.composite
def items(draw: st.DrawFn) -> Record:
    """A record that can be read: full, or a patch with a proper plain form."""
    kind = draw(st.sampled_from([RecordKind.CHUNK, RecordKind.NODE]))
    record_id = draw(st.binary(min_size=32, max_size=32))
    compression = draw(st.sampled_from(["lz4", "none"]))
    plain = draw(st.sampled_from([b"", b"SREC" * 20, bytes(8 * UNIT_BYTES), b"data" * 30]))
    if not draw(st.booleans()):
        return record.make(kind, record_id, plain, compression)
    base_id = draw(st.sampled_from([b"\1" * 32, b"\2" * 32]))
    changed = bytes(UNIT_BYTES - 1) + b"\1" + bytes(7 * UNIT_BYTES)
    patch = record.make_patch(changed, base_id, bytes(8 * UNIT_BYTES), UNIT_BYTES)
    assert patch is not None
    return record.make(kind, record_id, patch, compression, base_id)


packs = st.lists(items(), max_size=8)


def stored(contents: list[Record]) -> tuple[MemoryStore, bytes, bytes, Table, list[int]]:
    """(store, pack id, bytes of the pack, its table, offsets) of a pack with these records."""
    builder = PackBuilder()
    offsets = [builder.add(item) for item in contents]
    buffers, made = builder.finish()
    store = MemoryStore()
    store.put_new(pack.name(builder.id), buffers)
    return store, builder.id, b"".join(buffers), made, offsets


def again(data: bytes, pack_id: bytes) -> MemoryStore:
    """A store with other bytes under the pack's name."""
    store = MemoryStore()
    store.put_new(pack.name(pack_id), [data])
    return store


def rows(contents: Table) -> Counter[tuple[object, ...]]:
    """Entries as they are, bases by their ids."""
    bases = {number: base.tobytes() for number, base in enumerate(contents.bases)}
    return Counter((*entry.tolist()[:-1], bases.get(int(entry["base"]))) for entry in contents.entries)


@given(packs)
def test_every_record_lies_where_the_builder_said(contents: list[Record]) -> None:
    builder = PackBuilder()
    for number, item in enumerate(contents):
        offset_bytes = builder.add(item)
        assert len(builder) == number + 1
        assert builder.record_at(offset_bytes) == item.header + bytes(item.payload)
    size_bytes = builder.size_bytes
    data = b"".join(builder.finish()[0])
    assert envelope.check_header(data, "x", builder.id) == (Kind.PACK, builder.id, 0)
    at = envelope.HEADER_BYTES
    for item in contents:
        assert data[at : at + item.stored_bytes] == item.header + bytes(item.payload)
        at += item.stored_bytes
    assert at == size_bytes


@given(packs)
def test_the_directory_and_the_records_themselves_say_the_same(contents: list[Record]) -> None:
    store, pack_id, data, made, offsets = stored(contents)
    directory = pack.read_directory(store, pack_id, len(data))
    assert rows(directory) == rows(made) == rows(pack.scan_directory(data, pack_id))
    assert set(directory.packs) == ({pack_id} if contents else set())
    met = list(pack.records(data, "x"))
    assert [found.offset_bytes for found in met[:-1]] == offsets
    assert [found.header.id for found in met[:-1] if found.header] == [item.id for item in contents]
    assert [bytes(found.payload) for found in met[:-1]] == [bytes(item.payload) for item in contents]
    assert met[-1].header is not None and met[-1].header.kind == RecordKind.DIRECTORY


@given(packs, st.data())
def test_a_flipped_bit_costs_the_record_that_it_hits_and_no_other(contents: list[Record], data: st.DataObject) -> None:
    _, pack_id, whole, made, offsets = stored(contents)
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    hit = {start for start, item in zip(offsets, contents, strict=True) if start <= at < start + item.stored_bytes}
    left = rows(Table(made.packs, made.entries[[row["offset"] not in hit for row in made.entries]], made.bases))
    assert rows(pack.scan_directory(bytes(changed), pack_id)) == left


@given(packs, st.data())
def test_a_flipped_bit_in_the_directory_or_the_footer_is_noticed(contents: list[Record], data: st.DataObject) -> None:
    _, pack_id, whole, _, _ = stored(contents)
    start = envelope.HEADER_BYTES + sum(item.stored_bytes for item in contents)
    changed = bytearray(whole)
    changed[data.draw(st.integers(start, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamagedError, match=pack.name(pack_id)):
        pack.read_directory(again(bytes(changed), pack_id), pack_id, len(changed))


@given(packs, st.data())
def test_a_pack_whose_end_is_lost_keeps_the_records_before_it(contents: list[Record], data: st.DataObject) -> None:
    _, pack_id, whole, made, offsets = stored(contents)
    length = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(DamagedError, match=pack.name(pack_id)):
        pack.read_directory(again(whole[:length], pack_id), pack_id, length)
    # The footer's place is not looked at: what lies there may be the end of a record.
    kept = [
        start
        for start, item in zip(offsets, contents, strict=True)
        if start + item.stored_bytes <= length and start < length - FOOTER_BYTES
    ]
    found = pack.scan_directory(whole[:length], pack_id)
    assert sorted(int(entry["offset"]) for entry in found.entries) == kept
    assert rows(found) <= rows(made)


def test_a_pack_under_anothers_name_is_noticed() -> None:
    _, _, data, _, _ = stored([record.make(RecordKind.CHUNK, b"\1" * 32, b"data", "none")])
    with pytest.raises(DamagedError, match="another pack"):
        pack.read_directory(again(data, b"x" * 16), b"x" * 16, len(data))


def test_a_directory_that_is_another_record_is_damage() -> None:
    _, pack_id, data, _, offsets = stored([record.make(RecordKind.CHUNK, b"\1" * 32, b"data", "none")])
    # The pack ends after its only record, with a footer that points at that.
    stop = offsets[0] + HEADER_BYTES + 4
    fields = pack._FOOTER.pack(b"SNAPFOOT", offsets[0], stop - offsets[0], 0)[:-8]
    footer = fields + pack.xxhash.xxh3_64_intdigest(fields).to_bytes(8, "little")
    wrong = data[:stop] + footer
    with pytest.raises(DamagedError, match="a chunk where the directory belongs"):
        pack.read_directory(again(wrong, pack_id), pack_id, len(wrong))


@given(st.binary(max_size=400).map(lambda data: data + b"SREC" * 3))
def test_any_bytes_are_read_to_their_end_without_an_error(data: bytes) -> None:
    assert len(pack.scan_directory(bytes(64) + data, b"p" * 16).entries) == 0


def test_every_pack_has_an_id_and_name_of_its_own() -> None:
    made = {PackBuilder().id for _ in range(100)}
    assert len(made) == 100 and all(pack.is_name(pack.name(pack_id)) for pack_id in made)
    assert not pack.is_name("packs/0123") and not pack.is_name("index/" + "0" * 32)


def test_sizes_are_those_of_all_packs_and_of_nothing_else() -> None:
    store, pack_id, data, _, _ = stored([])
    store.put_new("packs/readme", [b"no pack"])
    store.put_new("index/" + "0" * 32, [b"no pack"])
    assert pack.sizes(store) == {pack_id: len(data)}


def test_what_lies_in_a_pack_whose_footer_the_medium_does_not_give_is_found_by_its_records() -> None:
    class Failing(MemoryStore):
        """Its medium does not give the last byte of a pack."""

        def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
            if offset_bytes + length_bytes == self.size(name):
                raise ReadError(name, offset_bytes, length_bytes, errno.EIO, "failing")
            return super().get_range(name, offset_bytes, length_bytes)

    noise = random.Random(1).randbytes(1 << 16)
    items = [record.make(RecordKind.CHUNK, bytes([number]) * 32, noise, "none") for number in range(8)]
    _, pack_id, data, made, _ = stored(items)
    store = Failing()
    store.put_new(pack.name(pack_id), [data])
    found = {entry.tobytes() for entry in pack.contents(store, pack_id, len(data)).ids()}
    # The end of the last record may be in the stretch that is lost.
    assert {item.id for item in items[:-1]} <= found <= {item.id for item in items}
    assert rows(pack.contents(again(data, pack_id), pack_id, len(data))) == rows(made)
