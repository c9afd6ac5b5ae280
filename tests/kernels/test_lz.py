"""The LZ4 kernel makes blocks that the `lz4` package decodes, and knows every block that is not what it should be."""

from __future__ import annotations

import random

import lz4.block
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snapcore import lz
from tests import reference
from tests.support.buffers import buffer_of, makes


def text(seed: int, size_bytes: int, words: int) -> bytes:
    """Words of a small dictionary in random order, with noise between: matches of all lengths and distances."""
    chance = random.Random(seed)
    known = [chance.randbytes(chance.choice([1, 3, 6, 9, 20, 40, 300])) for _ in range(words)]
    out = bytearray()
    while len(out) < size_bytes:
        out += chance.choice(known)
        out += chance.randbytes(chance.choice([0, 0, 1, 5, 15, 16, 17, 270]))
    return bytes(out[:size_bytes])


plains = st.one_of(
    st.binary(max_size=400),
    st.builds(bytes.__mul__, st.binary(min_size=1, max_size=40), st.integers(0, 400)),
    st.builds(text, st.integers(0, 2**32), st.integers(0, 20_000), st.integers(1, 200)),
    st.builds(text, st.integers(0, 2**32), st.integers(65_000, lz.BLOCK_LIMIT_BYTES), st.integers(1, 200)),
)


def decoded(packed: bytes, size_bytes: int) -> bytes | None:
    """What the `lz4` package makes of a block of so many bytes."""
    try:
        found: bytes = lz4.block.decompress(packed, uncompressed_size=size_bytes)
    except lz4.block.LZ4BlockError:
        return None
    return found


@given(st.lists(plains, max_size=5), st.integers(1, 1 << 40))
@example([], 32)
@example([b"", b"a", bytes(lz.BLOCK_LIMIT_BYTES)], 32)
def test_each_block_decodes_to_what_it_was_or_is_given_up(blocks: list[bytes], gain_divisor: int) -> None:
    packed = lz.pack_blocks([*blocks], gain_divisor)
    assert len(packed) == len(blocks)
    for plain, found in zip(blocks, packed, strict=True):
        if found is not None:
            assert len(found) <= len(plain) - len(plain) // gain_divisor
            assert decoded(found, len(plain)) == plain


@given(plains.filter(lambda plain: len(plain) < 20_001))
@example(bytes(17))
@example(text(5, 20_000, 50))
def test_the_encoder_and_its_twin_make_the_same_block(plain: bytes) -> None:
    (found,) = lz.pack_blocks([plain], 1 << 40)
    (wanted,) = reference.pack_blocks([plain], 1 << 40)
    assert wanted is None or reference.is_packed(wanted, plain)
    if found is None:
        # What only just fits need not be found out.
        assert wanted is None or len(wanted) + 8 > len(plain)
    else:
        assert found == wanted


@given(plains, makes())
def test_every_kind_of_buffer_is_packed_alike(plain: bytes, make: str) -> None:
    with buffer_of(make, plain) as buffer:
        assert lz.pack_blocks([buffer], 32) == lz.pack_blocks([plain], 32)


def test_neighbours_in_memory_are_of_no_matter() -> None:
    plain = text(1, 5000, 20)
    wanted = lz.pack_blocks([plain], 32)[0]
    around = memoryview(plain + plain + plain)
    assert lz.pack_blocks([around[5000:10_000], around[:5000], around[10_000:]], 32) == [wanted] * 3


def test_what_shrinks_too_little_is_given_up() -> None:
    noise = random.Random(1).randbytes(60_000)
    assert lz.pack_blocks([noise, noise[:50_000] + bytes(10_000)], 32)[0] is None
    assert lz.pack_blocks([noise[:50_000] + bytes(10_000)], 8)[0] is not None
    assert lz.pack_blocks([noise[:50_000] + bytes(10_000)], 4)[0] is None


@given(plains)
def test_a_block_of_the_package_is_known_as_what_it_decodes_to(plain: bytes) -> None:
    for mode in ({"mode": "default"}, {"mode": "high_compression"}, {"mode": "fast", "acceleration": 20}):
        packed = lz4.block.compress(plain, store_size=False, **mode)
        assert lz.is_packed(packed, plain)
        assert reference.is_packed(packed, plain)


@given(plains.filter(bool), st.data())
def test_a_flipped_bit_of_the_data_is_noticed(plain: bytes, data: st.DataObject) -> None:
    packed = lz4.block.compress(plain, store_size=False)
    changed = bytearray(plain)
    changed[data.draw(st.integers(0, len(plain) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert not lz.is_packed(packed, changed)


@given(plains, st.data())
def test_changed_bytes_are_a_block_of_exactly_what_the_twin_decodes_them_to(plain: bytes, data: st.DataObject) -> None:
    packed = bytearray(lz4.block.compress(plain[:5000], store_size=False))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    packed = packed[: data.draw(st.integers(0, len(packed)))]
    wanted = reference.lz4_unpacked(bytes(packed))
    assert lz.is_packed(packed, plain[:5000]) == (wanted == plain[:5000])
    if wanted is not None:
        assert lz.is_packed(packed, wanted)
        assert not lz.is_packed(packed, wanted + b"x")
        assert not lz.is_packed(packed, wanted[:-1]) or not wanted


@given(st.binary(max_size=60), st.binary(max_size=60))
@example(b"", b"")
@example(b"\0", b"")
@example(b"\x10a\1\0", b"aaaaa")
@example(b"\xf0" + b"\xff" * 30, b"a")
def test_any_bytes_may_be_asked_about(packed: bytes, data: bytes) -> None:
    assert lz.is_packed(packed, data) == reference.is_packed(packed, data)


def test_longer_blocks_and_shares_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 65536 bytes, not 65537"):
        lz.pack_blocks([b"fine", bytes(65537)], 32)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        lz.pack_blocks([b"fine"], 0)
    with pytest.raises(TypeError):
        lz.pack_blocks([b"fine", None], 32)  # type: ignore[list-item]
    with pytest.raises(TypeError):
        lz.pack_blocks(None, 32)  # type: ignore[arg-type]
