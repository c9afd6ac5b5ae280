"""Payloads come back as they were, or an error does, whatever was stored."""

from __future__ import annotations

import contextlib
import random
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snapcore import lz
from snapcore.errors import DamagedError, UsageError
from snapcore.persist import Buffer
from snapcore.repository import codec
from snapcore.repository.codec import COMPRESSIONS, Codec

NOISE = random.Random(1).randbytes(5000)

compressions = st.sampled_from(COMPRESSIONS)
plains = st.one_of(
    st.binary(max_size=300),
    st.builds(bytes.__mul__, st.binary(max_size=20), st.integers(0, 300)),
    st.integers(0, 5000).map(lambda count: NOISE[:count]),
)
makes = st.sampled_from([bytes, bytearray, memoryview])


@given(plains, compressions, makes)
def test_what_is_encoded_decodes_to_itself(plain: bytes, compression: str, make: type[Buffer]) -> None:
    how, payload = codec.encode(make(plain), compression)
    assert codec.decode(how, payload, len(plain)) == plain
    assert len(payload) <= len(plain)


@given(plains)
def test_without_compression_bytes_are_stored_as_they_are(plain: bytes) -> None:
    assert codec.encode(plain, "none") == (Codec.RAW, plain)


@pytest.mark.parametrize(("compression", "wanted"), [("lz4", Codec.LZ4), ("zstd", Codec.ZSTD)])
def test_compression_is_kept_only_where_it_pays(compression: str, wanted: Codec) -> None:
    assert codec.encode(NOISE, compression) == (Codec.RAW, NOISE)
    how, payload = codec.encode(b"snapcore" * 1000, compression)
    assert how == wanted and len(payload) < 500
    # A gain of less than a 32nd is not worth the reader's time.
    assert codec.encode(NOISE[:4900] + bytes(100), compression)[0] == Codec.RAW
    assert codec.encode(NOISE[:4000] + bytes(1000), compression)[0] == wanted


@given(plains, compressions)
def test_the_callers_memory_may_be_used_again(plain: bytes, compression: str) -> None:
    memory = bytearray(plain)
    how, payload = codec.encode(memoryview(memory), compression)
    memory[:] = b"\xee" * len(memory)
    assert codec.decode(how, payload, len(plain)) == plain


@given(plains, compressions, st.integers(0, 10_000))
def test_any_other_length_than_the_true_one_is_damage(plain: bytes, compression: str, length: int) -> None:
    how, payload = codec.encode(plain, compression)
    if length != len(plain):
        with pytest.raises(DamagedError, match=r"decode|belong"):
            codec.decode(how, payload, length)


@given(st.binary(max_size=300), st.integers(0, 255), st.integers(0, 5000))
@example(b"", 1, 0)
@example(b"\0", 1, 0)
@example(b"", 2, 0)
def test_any_bytes_decode_to_what_was_promised_or_are_damage(payload: bytes, how: int, length: int) -> None:
    try:
        plain = codec.decode(how, payload, length)
    except DamagedError:
        return
    assert len(plain) == length and how in set(Codec)


@given(plains.filter(bool), compressions, st.data())
def test_a_flipped_bit_gives_as_many_bytes_or_damage(plain: bytes, compression: str, data: st.DataObject) -> None:
    how, payload = codec.encode(plain, compression)
    changed = bytearray(payload)
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(DamagedError):
        assert len(codec.decode(how, bytes(changed), len(plain))) == len(plain)


@pytest.mark.parametrize("how", [Codec.LZ4, Codec.ZSTD])
def test_a_payload_that_would_decode_to_much_more_takes_no_memory(how: Codec) -> None:
    found, payload = codec.encode(bytes(64 << 20), how.name.lower())
    assert found == how
    tracemalloc.start()
    with pytest.raises(DamagedError):
        codec.decode(how, payload, 1000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 8 << 20


@pytest.mark.parametrize("length", [2**31 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("how", [Codec.RAW, Codec.ZSTD])
def test_a_length_that_nothing_has_is_damage(how: Codec, length: int) -> None:
    with pytest.raises(DamagedError):
        codec.decode(how, codec.encode(bytes(1000), how.name.lower().replace("raw", "none"))[1], length)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_compression_that_goes_wrong_is_noticed_before_anything_is_stored(
    compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, encoder = codec._ENCODERS[compression]
    monkeypatch.setitem(codec._ENCODERS, compression, (how, lambda plain: encoder(b"\1" + bytes(plain)[1:])))
    with pytest.raises(DamagedError, match="memory"):
        codec.encode(bytes(lz.BLOCK_LIMIT_BYTES + 1), compression)


def test_a_block_that_the_kernel_cannot_decode_again_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(blocks: list[Buffer], gain_divisor: int) -> list[bytes | None]:
        raise ArithmeticError

    monkeypatch.setattr(lz, "pack_blocks", fail)
    with pytest.raises(DamagedError, match="memory"):
        codec.encode(bytes(1000), "lz4")


@given(st.lists(plains, max_size=6), compressions, st.booleans())
def test_many_are_encoded_as_each_alone(many: list[bytes], compression: str, long: bool) -> None:
    # One that is too long for the kernel takes all of them another way, with another encoder.
    many = [*many, bytes(lz.BLOCK_LIMIT_BYTES + 1)] if long else many
    found = codec.encode_many(many, compression)
    assert [codec.decode(how, payload, len(plain)) for (how, payload), plain in zip(found, many, strict=True)] == many
    if not long:
        assert found == [codec.encode(plain, compression) for plain in many]


def test_only_known_compressions_have_a_name() -> None:
    assert [codec.check_compression(name) for name in COMPRESSIONS] == list(COMPRESSIONS)
    for name in ("", "LZ4", "gzip"):
        with pytest.raises(UsageError, match="choose one of lz4, zstd, none"):
            codec.check_compression(name)
