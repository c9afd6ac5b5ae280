"""The digest kernel computes XXH64 as the specification and the `xxhash` package do."""

from __future__ import annotations

import errno
import os
import random
import tempfile

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from snapcore import digest
from tests import reference
from tests.support.buffers import buffer_of, makes

seeds = st.integers(0, 2**64 - 1)


def test_every_short_length_has_the_digest_of_the_xxhash_package() -> None:
    data = random.Random(64).randbytes(300)
    for size_bytes in range(301):
        part = data[:size_bytes]
        for seed in (0, 1, 0x9E3779B185EBCA87, 2**64 - 1):
            wanted = xxhash.xxh64_intdigest(part, seed)
            assert reference.xxh64(part, seed) == wanted
            assert digest.xxh64_blocks(part, 300, seed).tolist() == [wanted] * bool(size_bytes)


@given(st.integers(0, 1 << 20), st.integers(0, 2**32), st.integers(1, 1 << 20), seeds)
@example(1 << 20, 1, 1, 2**64 - 1).via("a block a byte")
def test_blocks_of_any_size_have_the_digests_of_the_xxhash_package(
    size_bytes: int, content: int, block_bytes: int, seed: int
) -> None:
    # A digest a byte of a megabyte takes a while in the oracle: fewer bytes then.
    data = random.Random(content).randbytes(min(size_bytes, block_bytes * 4096))
    found = digest.xxh64_blocks(data, block_bytes, seed)
    assert found.dtype == np.uint64
    assert found.tolist() == [xxhash.xxh64_intdigest(block, seed) for block in reference.blocks(data, block_bytes)]


@given(st.binary(max_size=2000), makes(), st.integers(1, 2100), seeds)
@example(b"", "bytes", 1, 0)
def test_the_kernel_and_its_twin_agree_on_every_kind_of_buffer(
    data: bytes, make: str, block_bytes: int, seed: int
) -> None:
    with buffer_of(make, data) as buffer:
        found = digest.xxh64_blocks(buffer, block_bytes, seed).tolist()
    assert found == reference.xxh64_blocks(data, block_bytes, seed)


@given(st.binary(min_size=100, max_size=200), st.integers(0, 63))
def test_where_a_buffer_starts_in_memory_is_of_no_matter(data: bytes, start: int) -> None:
    shifted = memoryview(bytes(start) + data)[start:]
    assert digest.xxh64_blocks(shifted, 200).tolist() == [xxhash.xxh64_intdigest(data)]


def test_the_digest_of_nothing_stands_in_the_specification() -> None:
    assert reference.xxh64(b"") == 0xEF46DB3751D8E999


@pytest.mark.parametrize("block_bytes", [0, -1, -(2**63)])
def test_a_block_without_bytes_is_refused(block_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, not {block_bytes}"):
        digest.xxh64_blocks(b"data", block_bytes)


def test_a_block_size_beyond_any_buffer_makes_one_block() -> None:
    assert digest.xxh64_blocks(b"data", 2**63 - 1).tolist() == [xxhash.xxh64_intdigest(b"data")]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_is_no_number_of_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(OverflowError):
        digest.xxh64_blocks(b"data", 4, seed)


@pytest.mark.parametrize(
    ("buffer", "error"),
    [
        (None, TypeError),
        ("text", TypeError),
        (memoryview(bytes(64))[::2], BufferError),
        (np.zeros((2, 2), dtype=np.uint8), ValueError),
        (np.zeros(4, dtype=np.uint64), ValueError),
    ],
)
def test_what_is_no_contiguous_run_of_bytes_is_refused(buffer: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        digest.xxh64_blocks(buffer, 4)  # type: ignore[arg-type]


contents = st.one_of(
    st.binary(max_size=5000),
    st.builds(lambda seed, size: random.Random(seed).randbytes(size), st.integers(0, 99), st.integers(0, 700_000)),
    st.builds(lambda head, holes, tail: head + bytes(holes) + tail, st.binary(), st.integers(0, 9000), st.binary()),
)


def opened(content: bytes) -> int:
    """A descriptor of a nameless file that holds `content`."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return os.dup(file.fileno())


@given(contents, st.integers(0, 6000), st.integers(0, 800_000), st.sampled_from([512, 4096, 65536]), seeds, st.data())
def test_blocks_of_a_file_have_the_digests_of_their_bytes(
    content: bytes, offset: int, size_bytes: int, block_bytes: int, seed: int, data: st.DataObject
) -> None:
    space = bytearray(-(-size_bytes // block_bytes) * block_bytes + data.draw(st.integers(0, 99)))
    descriptor = opened(content)
    try:
        done, code, prints, zero = digest.read_blocks(descriptor, offset, size_bytes, block_bytes, seed, space)
    finally:
        os.close(descriptor)
    there = content[offset : offset + size_bytes]
    assert (done, code) == (len(there), 0)
    whole = len(prints) if done == size_bytes else 0
    assert len(prints) == len(zero) == -(-size_bytes // block_bytes)
    blocks = [block.ljust(block_bytes, b"\0") for block in reference.blocks(there, block_bytes)]
    wanted = [(xxhash.xxh64_intdigest(block, seed), not any(block)) for block in blocks]
    assert list(zip(prints.tolist(), zero.tolist(), strict=True))[:whole] == wanted[:whole]
    if whole:
        assert bytes(space[: whole * block_bytes]) == b"".join(blocks)


@given(st.binary(max_size=3000), st.integers(0, 100), st.integers(0, 3000), seeds)
def test_reading_blocks_and_its_twin_agree(content: bytes, offset: int, size_bytes: int, seed: int) -> None:
    size_bytes = min(size_bytes, max(0, len(content) - offset))
    descriptor = opened(content)
    try:
        _, _, prints, zero = digest.read_blocks(descriptor, offset, size_bytes, 512, seed, bytearray(3072))
    finally:
        os.close(descriptor)
    found = list(zip(prints.tolist(), zero.tolist(), strict=True))
    assert found == reference.read_blocks(content, offset, size_bytes, 512, seed)


def test_what_cannot_be_read_is_an_error_number_and_the_end_of_a_file_is_none() -> None:
    descriptor = opened(b"data")
    try:
        done, code, _, _ = digest.read_blocks(-1, 0, 1024, 512, 0, bytearray(1024))
        assert (done, code) == (0, errno.EBADF)
        # The error of before is not told again.
        done, code, _, _ = digest.read_blocks(descriptor, 0, 1024, 512, 0, bytearray(1024))
        assert (done, code) == (4, 0)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("offset", "size_bytes", "block_bytes", "space_bytes"),
    [
        (-1, 512, 512, 512),
        (0, -1, 512, 512),
        (0, 512, 511, 512),
        (0, 512, 0, 512),
        (0, 512, 1024, 1023),
        (0, 512, 512, 0),
    ],
)
def test_ranges_and_spaces_that_are_none_are_refused(
    offset: int, size_bytes: int, block_bytes: int, space_bytes: int
) -> None:
    with pytest.raises(ValueError, match="bytes"):
        digest.read_blocks(0, offset, size_bytes, block_bytes, 0, bytearray(space_bytes))
