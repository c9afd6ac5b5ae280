"""An object opens to what was sealed, or not at all."""

from __future__ import annotations

import struct

import blake3
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore.errors import DamagedError, UnsupportedFormatError
from snapcore.repository import envelope
from snapcore.repository.envelope import CHECKSUM_BYTES, HEADER_BYTES, Kind

kinds = st.sampled_from(Kind)
ids = st.binary(min_size=16, max_size=16)
ID = bytes(range(16))
# Offsets of the fields, as docs/FORMAT.md has them.
VERSION, INCOMPATIBLE, COMPATIBLE, AUTO_CLEAR, DOMAIN, LENGTH = 10, 12, 16, 20, 24, 56


def resealed(data: bytes) -> bytes:
    """The object with the checksum that its bytes ask for."""
    content = data[:-CHECKSUM_BYTES]
    return content + blake3.blake3(content).digest()


def with_field(data: bytes, offset: int, layout: str, *values: object) -> bytes:
    """The object with one field changed and the checksum put right."""
    changed = bytearray(data)
    struct.pack_into(layout, changed, offset, *values)
    return resealed(bytes(changed))


@given(kinds, ids, st.binary(max_size=200))
def test_what_was_sealed_opens_to_kind_id_and_body(kind: Kind, object_id: bytes, body: bytes) -> None:
    data = envelope.sealed(kind, object_id, body)
    assert len(data) == HEADER_BYTES + len(body) + CHECKSUM_BYTES
    assert envelope.opened(data, "x", object_id) == envelope.opened(data, "x") == (kind, object_id, body)
    assert data[:HEADER_BYTES] == envelope.header(kind, object_id, len(body))
    assert envelope.check_header(data, "x", object_id) == (kind, object_id, len(body))


@given(st.binary(max_size=40), st.data())
def test_a_flipped_bit_anywhere_is_damage(body: bytes, data: st.DataObject) -> None:
    changed = bytearray(envelope.sealed(Kind.MANIFEST, ID, body))
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamagedError, match="the-object"):
        envelope.opened(bytes(changed), "the-object", ID)


@given(st.binary(max_size=40), st.data())
def test_a_lost_or_added_end_is_damage(body: bytes, data: st.DataObject) -> None:
    whole = envelope.sealed(Kind.SESSION, ID, body)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for changed in (cut, whole + data.draw(st.binary(min_size=1, max_size=5))):
        with pytest.raises(DamagedError, match="the-object"):
            envelope.opened(changed, "the-object", ID)


def test_an_object_under_anothers_name_is_noticed() -> None:
    with pytest.raises(DamagedError, match=f"holds the object {ID.hex()}"):
        envelope.opened(envelope.sealed(Kind.INDEX, ID, b""), "x", bytes(16))


@pytest.mark.parametrize(
    ("offset", "layout", "value"),
    [
        (VERSION, "<H", 0),
        (VERSION, "<H", 2),
        (INCOMPATIBLE, "<I", 1),
        (INCOMPATIBLE, "<I", 1 << 31),
    ],
)
def test_what_this_version_cannot_read_says_so(offset: int, layout: str, value: object) -> None:
    data = with_field(envelope.sealed(Kind.CONFIG, ID, b"{}"), offset, layout, value)
    with pytest.raises(UnsupportedFormatError, match="the-object"):
        envelope.opened(data, "the-object", ID)


def test_an_object_of_another_domain_is_not_taken_for_one_of_this() -> None:
    data = with_field(envelope.sealed(Kind.CONFIG, ID, b"{}"), DOMAIN, "16s", b"\1" * 16)
    with pytest.raises(DamagedError, match="the-object is of the domain"):
        envelope.opened(data, "the-object", ID)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_unknown_bits_that_need_not_be_known_are_of_no_concern(compatible: int, auto_clear: int) -> None:
    data = with_field(envelope.sealed(Kind.CONFIG, ID, b"{}"), COMPATIBLE, "<II", compatible, auto_clear)
    assert envelope.opened(data, "x", ID) == (Kind.CONFIG, ID, b"{}")


@pytest.mark.parametrize("length", [0, 1, 3, 64, 2**32, 2**63, 2**64 - 1])
def test_a_length_that_is_not_that_of_the_body_is_damage(length: int) -> None:
    data = with_field(envelope.sealed(Kind.CONFIG, ID, b"{}"), LENGTH, "<Q", length)
    with pytest.raises(DamagedError, match=f"its body has {length}"):
        envelope.opened(data, "x", ID)


def test_a_body_beyond_the_limit_is_refused_whatever_its_checksum_says() -> None:
    body = bytes(envelope.BODY_LIMIT_BYTES + 1)
    with pytest.raises(DamagedError):
        envelope.opened(envelope.sealed(Kind.INDEX, ID, body), "x", ID)


@given(kinds, kinds)
def test_an_object_of_another_kind_than_its_name_says_is_damage(kind: Kind, wanted: Kind) -> None:
    if kind == wanted:
        envelope.expect(kind, wanted, "x")
    else:
        with pytest.raises(DamagedError, match=f"x is a {kind.name.lower()} where a {wanted.name.lower()}"):
            envelope.expect(kind, wanted, "x")


class Body(msgspec.Struct):
    """What the tests below decode."""

    name: str
    count: int = 0


def test_unknown_members_are_ignored_and_missing_ones_take_their_default() -> None:
    assert envelope.from_json(memoryview(b'{"name": "n", "new": [1]}'), Body, "x") == Body("n", 0)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"{}", b'{"name": 1}', b'{"name": "n", "count": "1"}', b'{"name": "\xff"}', b"[" * 100_000],
    ids=lambda body: ascii(body[:20]),
)
def test_a_body_that_is_not_what_belongs_there_is_damage(body: bytes) -> None:
    with pytest.raises(DamagedError, match="the-object cannot be read"):
        envelope.from_json(memoryview(body), Body, "the-object")


def test_a_json_body_beyond_its_limit_is_damage() -> None:
    body = b'{"name": "n"}' + b" " * envelope.JSON_LIMIT_BYTES
    with pytest.raises(DamagedError, match="are the most"):
        envelope.from_json(memoryview(body), Body, "x")
