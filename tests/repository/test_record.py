"""Records and patches give back what was put into them, and nothing that was not."""

from __future__ import annotations

import contextlib
import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from snapcore.errors import DamagedError, UnsupportedFormatError
from snapcore.repository import record
from snapcore.repository.codec import COMPRESSIONS
from snapcore.repository.record import HEADER_BYTES, Form, RecordKind

ID = bytes(range(32))
BASE_ID = bytes(range(32, 64))

kinds = st.sampled_from(RecordKind)
ids = st.binary(min_size=32, max_size=32)
compressions = st.sampled_from(COMPRESSIONS)
plains = st.one_of(st.binary(max_size=200), st.builds(bytes.__mul__, st.binary(max_size=9), st.integers(0, 200)))
units = st.sampled_from([record.NODE_UNIT_BYTES, 64, 512, record.CHUNK_UNIT_BYTES])


@st.composite
def changes(draw: st.DrawFn) -> tuple[bytes, bytes, int, list[bool]]:
    """(base, object, unit, which units differ) of an object of which some units were overwritten."""
    unit_bytes = draw(units)
    differs = draw(st.lists(st.booleans(), min_size=1, max_size=40))
    base = b"".join(bytes([draw(st.integers(0, 255))]) * unit_bytes for _ in differs)
    plain = bytearray(base)
    for number, changed in enumerate(differs):
        if changed:
            # One byte anywhere in the unit is enough.
            plain[number * unit_bytes + draw(st.integers(0, unit_bytes - 1))] ^= draw(st.integers(1, 255))
    return base, bytes(plain), unit_bytes, differs


@given(kinds, ids, plains, compressions, st.one_of(st.none(), ids))
def test_a_record_says_what_it_holds_and_gives_it_back(
    kind: RecordKind, record_id: bytes, plain: bytes, compression: str, base: bytes | None
) -> None:
    made = record.make(kind, record_id, plain, compression, base)
    assert made.stored_bytes == len(made.header) + len(made.payload) and len(made.header) == HEADER_BYTES
    head = record.parse_header(made.header, "x")
    assert (head.kind, head.id, head.codec) == (kind, record_id, made.codec)
    assert head.form == made.form == (Form.FULL if base is None else Form.PATCH)
    assert (head.payload_bytes, head.plain_bytes) == (len(made.payload), len(plain))
    assert record.payload_plain(head, made.payload, len(plain), "x") == plain


@given(plains, compressions, st.data())
def test_a_flipped_bit_anywhere_is_damage(plain: bytes, compression: str, data: st.DataObject) -> None:
    made = record.make(RecordKind.CHUNK, ID, plain, compression)
    raw = bytearray(made.header + bytes(made.payload))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))

    def read() -> None:
        head = record.parse_header(raw, "the-place")
        record.payload_plain(head, raw[HEADER_BYTES:], 1 << 20, "the-place")

    with pytest.raises(DamagedError, match="the-place"):
        read()


@given(st.integers(0, HEADER_BYTES - 1))
def test_a_header_that_is_cut_is_damage(length: int) -> None:
    made = record.make(RecordKind.CHUNK, ID, b"data", "none")
    with pytest.raises(DamagedError, match=f"{length} bytes are too few"):
        record.parse_header(made.header[:length], "x")


@pytest.mark.parametrize(("offset", "value"), [(4, 0), (4, 4), (4, 255), (6, 2), (7, 2), (7, 255)])
def test_a_kind_form_or_seal_of_a_newer_version_is_named(offset: int, value: int) -> None:
    header = bytearray(record.make(RecordKind.CHUNK, ID, b"data", "none").header)
    header[offset] = value
    header[56:] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(header[:56])))
    with pytest.raises(UnsupportedFormatError, match="newer"):
        record.parse_header(header, "x")


@given(plains.filter(bool), compressions)
def test_a_payload_of_another_length_or_beyond_the_limit_is_damage(plain: bytes, compression: str) -> None:
    made = record.make(RecordKind.CHUNK, ID, plain, compression)
    head = record.parse_header(made.header, "x")
    payload = bytes(made.payload)
    for wrong in (payload[:-1], payload + b"\0", b""):
        with pytest.raises(DamagedError, match="belong"):
            record.payload_plain(head, wrong, len(plain), "x")
    with pytest.raises(DamagedError, match=f"at most {len(plain) - 1}"):
        record.payload_plain(head, payload, len(plain) - 1, "x")


@given(changes())
def test_a_patch_of_a_base_makes_the_object_and_holds_what_differs(
    change: tuple[bytes, bytes, int, list[bool]],
) -> None:
    base, plain, unit_bytes, differs = change
    patch = record.make_patch(plain, BASE_ID, base, unit_bytes)
    if sum(differs) * 2 > len(differs):
        assert patch is None
        return
    assert patch is not None
    assert record.apply_patch(patch, base, unit_bytes, "x") == plain
    assert record.patch_base(patch, "x") == BASE_ID
    assert len(patch) == 40 + -(-len(differs) // 8) + sum(differs) * unit_bytes
    assert len(patch) <= record.patch_limit_bytes(len(plain), unit_bytes)


@given(changes())
def test_the_base_is_not_changed_by_a_patch(change: tuple[bytes, bytes, int, list[bool]]) -> None:
    base, plain, unit_bytes, _ = change
    patch = record.make_patch(plain, BASE_ID, base, unit_bytes)
    if patch is not None:
        memory = bytearray(base)
        record.apply_patch(patch, memory, unit_bytes, "x")[:] = b"\xee" * len(memory)
        assert memory == base


@given(changes(), st.data())
def test_a_patch_that_is_cut_or_longer_is_damage(
    change: tuple[bytes, bytes, int, list[bool]], data: st.DataObject
) -> None:
    base, plain, unit_bytes, _ = change
    patch = record.make_patch(plain, BASE_ID, base, unit_bytes)
    if patch is None:
        return
    cut = patch[: data.draw(st.integers(0, len(patch) - 1))]
    for wrong in (cut, patch + b"\0", patch + bytes(unit_bytes)):
        with pytest.raises(DamagedError, match="the-place: a patch of"):
            record.apply_patch(wrong, base, unit_bytes, "the-place")


@given(changes(), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_a_patch_for_another_shape_is_damage(
    change: tuple[bytes, bytes, int, list[bool]], unit_bytes: int, count: int
) -> None:
    base, plain, right_unit, differs = change
    patch = record.make_patch(plain, BASE_ID, base, right_unit)
    if patch is None or (unit_bytes, count) == (right_unit, len(differs)):
        return
    wrong = patch[:32] + struct.pack("<II", unit_bytes, count) + patch[40:]
    with pytest.raises(DamagedError, match="the-place: a patch of"):
        record.apply_patch(wrong, base, right_unit, "the-place")


@given(st.binary(max_size=200), st.sampled_from([512, 1024]))
def test_any_bytes_are_a_patch_or_damage(patch: bytes, object_bytes: int) -> None:
    with contextlib.suppress(DamagedError):
        assert len(record.apply_patch(patch, bytes(object_bytes), 32, "x")) == object_bytes


@given(st.integers(0, 39))
def test_what_is_too_short_for_a_patch_names_no_base(length: int) -> None:
    with pytest.raises(DamagedError, match=f"a patch of {length} bytes"):
        record.patch_base(bytes(length), "x")
