"""What is sealed opens again as it was, and any change of it, or of what it is bound to, is noticed."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore.errors import DamagedError
from snapcore.keys import root, sealing
from snapcore.keys.sealing import RECORD_OVERHEAD_BYTES, SALT_BYTES, SEGMENT_BYTES, TAG_BYTES, Sealing

SEALING = Sealing(b"r" * 32, b"o" * 32)
OTHER = Sealing(b"R" * 32, b"O" * 32)
LENGTHS = [SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1, 3 * SEGMENT_BYTES, 5 * SEGMENT_BYTES // 2]
bodies = st.one_of(st.binary(max_size=100), st.sampled_from(LENGTHS).map(secrets.token_bytes))


@given(st.lists(st.binary(max_size=300), max_size=5), st.binary(max_size=80))
def test_records_open_as_they_were_sealed(payloads: list[bytes], bound: bytes) -> None:
    sealer = SEALING.record_sealer()
    for payload in payloads:
        sealed = sealer.seal(payload, bound)
        assert len(sealed) == len(payload) + RECORD_OVERHEAD_BYTES
        assert SEALING.open_record(sealed, bound) == payload
        assert len(payload) < 16 or payload not in sealed


@given(st.binary(max_size=200), st.binary(min_size=1, max_size=80), st.data())
def test_any_bit_of_a_sealed_record_or_of_what_it_is_bound_to_is_noticed(
    payload: bytes, bound: bytes, data: st.DataObject
) -> None:
    sealed = bytes(SEALING.record_sealer().seal(payload, bound))
    at = data.draw(st.integers(0, (len(sealed) + len(bound)) * 8 - 1))
    changed = bytearray(sealed + bound)
    changed[at // 8] ^= 1 << at % 8
    with pytest.raises(DamagedError, match="changed"):
        SEALING.open_record(bytes(changed[: len(sealed)]), bytes(changed[len(sealed) :]))
    with pytest.raises(DamagedError, match="changed"):
        OTHER.open_record(sealed, bound)


@given(st.integers(0, RECORD_OVERHEAD_BYTES + 30))
def test_a_sealed_record_that_is_cut_is_noticed(length: int) -> None:
    sealed = SEALING.record_sealer().seal(bytes(31), b"")
    with pytest.raises(DamagedError):
        SEALING.open_record(sealed[:length], b"")


def test_the_messages_of_a_batch_are_told_apart_by_their_numbers_and_batches_by_their_salts() -> None:
    batches = [SEALING.record_sealer() for _ in range(50)]
    sealed = [bytes(batch.seal(b"the same", b"")) for batch in batches for _ in range(20)]
    assert len({item[: SALT_BYTES + sealing.NUMBER_BYTES] for item in sealed}) == 1000
    assert len({item[:SALT_BYTES] for item in sealed}) == 50
    assert len({item[SALT_BYTES + sealing.NUMBER_BYTES :] for item in sealed}) == 1000
    numbers = [int.from_bytes(item[SALT_BYTES : SALT_BYTES + sealing.NUMBER_BYTES], "little") for item in sealed[:20]]
    assert numbers == list(range(20))


def test_a_batch_that_has_used_its_numbers_up_seals_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "_MESSAGES_LIMIT", 2)
    sealer = SEALING.record_sealer()
    sealer.seal(b"", b"")
    sealer.seal(b"", b"")
    with pytest.raises(OverflowError):
        sealer.seal(b"", b"")


@given(bodies, st.binary(max_size=80))
def test_bodies_open_as_they_were_sealed_whole_and_in_parts(body: bytes, bound: bytes) -> None:
    sealed = SEALING.seal_body(body, bound)
    assert len(sealed) == sealing.sealed_body_bytes(len(body))
    assert sealing.plain_body_bytes(len(sealed)) == len(body)
    assert SEALING.open_body(sealed, bound) == body
    offset = len(body) // 3
    length = len(body) - 2 * offset
    first, start, stop = sealing.sealed_range(offset, length, len(sealed))
    opened = SEALING.open_segments(sealed[:SALT_BYTES], first, sealed[start:stop], bound)
    skip = offset - first * SEGMENT_BYTES
    assert opened[skip : skip + length] == body[offset : offset + length]


@given(st.integers(0, 4 * SEGMENT_BYTES))
def test_no_other_length_is_that_of_a_sealed_body(length: int) -> None:
    found = sealing.plain_body_bytes(length)
    assert found < 0 or sealing.sealed_body_bytes(found) == length


@given(bodies, st.data())
def test_any_bit_of_a_sealed_body_is_noticed(body: bytes, data: st.DataObject) -> None:
    sealed = bytearray(SEALING.seal_body(body, b"bound"))
    at = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[at // 8] ^= 1 << at % 8
    with pytest.raises(DamagedError, match="changed"):
        SEALING.open_body(sealed, b"bound")


def test_segments_that_are_swapped_repeated_or_left_out_are_noticed() -> None:
    sealed = SEALING.seal_body(bytes(3 * SEGMENT_BYTES), b"bound")
    step = SEGMENT_BYTES + TAG_BYTES
    salt, parts = sealed[:SALT_BYTES], [sealed[SALT_BYTES + k * step : SALT_BYTES + (k + 1) * step] for k in range(3)]
    for order in ([1, 0, 2], [0, 0, 1], [1, 2], [2]):
        with pytest.raises(DamagedError, match="changed"):
            SEALING.open_body(salt + b"".join(parts[k] for k in order), b"bound")
    # What is cut at a border of segments opens by itself; the length that it is bound to is what tells (the envelope).
    with pytest.raises(DamagedError, match="changed"):
        SEALING.open_body(salt + parts[0], b"bound of another length")


def test_many_threads_open_with_one_key() -> None:
    sealers = [SEALING.record_sealer() for _ in range(64)]
    sealed = [(number, sealer.seal(number.to_bytes(4, "little") * 5000, b"x")) for number, sealer in enumerate(sealers)]
    with ThreadPoolExecutor(8) as hands:
        opened = list(hands.map(lambda item: SEALING.open_record(item[1], b"x"), sealed * 20))
    assert opened == [number.to_bytes(4, "little") * 5000 for number in range(64)] * 20


def test_the_keys_of_a_root_are_those_that_the_format_names() -> None:
    """HKDF-SHA256 as RFC 5869 has it, by hand."""
    import hashlib
    import hmac

    def hkdf(material: bytes, info: bytes, length: int, salt: bytes = bytes(32)) -> bytes:
        key = hmac.digest(salt, material, hashlib.sha256)
        return hmac.digest(key, info + b"\1", hashlib.sha256)[:length]

    secret = bytes(range(32))
    assert root.domain_id(secret) == hkdf(secret, b"snapcore 2026 domain", 16)
    for purpose in ("chunk", "node", "tag", "record", "object"):
        assert root.derived(secret, purpose) == hkdf(secret, b"snapcore 2026 " + purpose.encode(), 32)
    assert root.derived(secret, "salt", salt=b"s" * 16) == hkdf(secret, b"snapcore 2026 salt", 32, b"s" * 16)
