"""The plain-Python twin of each kernel: slow, obvious, and what the kernels are compared with.

`xxh64` follows the xxHash specification (doc/xxhash_spec.md, "XXH64 algorithm description") step by step.
"""

from __future__ import annotations

from collections.abc import Iterator

_MASK = (1 << 64) - 1
_PRIME_1 = 0x9E3779B185EBCA87
_PRIME_2 = 0xC2B2AE3D27D4EB4F
_PRIME_3 = 0x165667B19E3779F9
_PRIME_4 = 0x85EBCA77C2B2AE63
_PRIME_5 = 0x27D4EB2F165667C5


def blocks(data: bytes, block_bytes: int) -> Iterator[bytes]:
    """The blocks of a buffer; the last one may be short."""
    for start in range(0, len(data), block_bytes):
        yield data[start : start + block_bytes]


def zero_mask(data: bytes, block_bytes: int) -> list[int]:
    """1 where a block is all zero."""
    return [int(not any(block)) for block in blocks(data, block_bytes)]


def differing_mask(a: bytes, b: bytes, block_bytes: int) -> list[int]:
    """1 where the blocks of two buffers of one length differ."""
    pairs = zip(blocks(a, block_bytes), blocks(b, block_bytes), strict=True)
    return [int(block_a != block_b) for block_a, block_b in pairs]


def same_bytes(a: bytes, b: bytes) -> bool:
    """Whether two buffers hold the same bytes."""
    return a == b


def extents(mask: list[int], wanted: int, block_bytes: int, size_bytes: int, offset: int) -> list[list[int]]:
    """Runs of `wanted` in a mask as [offset, length] in bytes, the last one cut at the end of the buffer."""
    rows: list[list[int]] = []
    for number, value in enumerate(mask):
        if value != wanted:
            continue
        start = number * block_bytes
        length = min(block_bytes, size_bytes - start)
        if rows and sum(rows[-1]) == offset + start:
            rows[-1][1] += length
        else:
            rows.append([offset + start, length])
    return rows


def zero_extents(data: bytes, block_bytes: int, offset: int = 0) -> list[list[int]]:
    """Runs of zero blocks."""
    return extents(zero_mask(data, block_bytes), 1, block_bytes, len(data), offset)


def nonzero_extents(data: bytes, block_bytes: int, offset: int = 0) -> list[list[int]]:
    """Runs of blocks that are not all zero."""
    return extents(zero_mask(data, block_bytes), 0, block_bytes, len(data), offset)


def differing_extents(a: bytes, b: bytes, block_bytes: int, offset: int = 0) -> list[list[int]]:
    """Runs of blocks in which two buffers differ."""
    return extents(differing_mask(a, b, block_bytes), 1, block_bytes, len(a), offset)


def differing_in_files(a: bytes, b: bytes, offset: int, size_bytes: int, block_bytes: int) -> list[list[int]]:
    """Runs of blocks in which a range of two files differs, whose bytes these are."""
    stop = offset + size_bytes
    return differing_extents(a[offset:stop], b[offset:stop], block_bytes, offset)


def _rotate_left(value: int, bits: int) -> int:
    return (value << bits | value >> (64 - bits)) & _MASK


def _round(accumulator: int, lane: int) -> int:
    return _rotate_left((accumulator + lane * _PRIME_2) & _MASK, 31) * _PRIME_1 & _MASK


def _merge_accumulator(accumulator: int, lane: int) -> int:
    return ((accumulator ^ _round(0, lane)) * _PRIME_1 + _PRIME_4) & _MASK


def xxh64(data: bytes, seed: int = 0) -> int:
    """XXH64 of a buffer."""
    # Steps 1 to 3: four accumulators take stripes of 32 bytes and converge; short inputs skip them.
    stripes_bytes = len(data) // 32 * 32
    if len(data) < 32:
        accumulator = (seed + _PRIME_5) & _MASK
    else:
        lanes = [seed + _PRIME_1 + _PRIME_2, seed + _PRIME_2, seed, seed - _PRIME_1]
        for start in range(0, stripes_bytes, 8):
            number = start // 8 % 4
            lanes[number] = _round(lanes[number] & _MASK, int.from_bytes(data[start : start + 8], "little"))
        accumulator = sum(map(_rotate_left, lanes, (1, 7, 12, 18))) & _MASK
        for lane in lanes:
            accumulator = _merge_accumulator(accumulator, lane)
    # Step 4: the length. Step 5: what is left, in lanes of 8, of 4 and of single bytes.
    accumulator = (accumulator + len(data)) & _MASK
    rest = data[stripes_bytes:]
    while len(rest) >= 8:
        accumulator ^= _round(0, int.from_bytes(rest[:8], "little"))
        accumulator = (_rotate_left(accumulator, 27) * _PRIME_1 + _PRIME_4) & _MASK
        rest = rest[8:]
    if len(rest) >= 4:
        accumulator ^= int.from_bytes(rest[:4], "little") * _PRIME_1 & _MASK
        accumulator = (_rotate_left(accumulator, 23) * _PRIME_2 + _PRIME_3) & _MASK
        rest = rest[4:]
    for byte in rest:
        accumulator ^= byte * _PRIME_5 & _MASK
        accumulator = _rotate_left(accumulator, 11) * _PRIME_1 & _MASK
    # Step 6: the avalanche.
    accumulator = (accumulator ^ accumulator >> 33) * _PRIME_2 & _MASK
    accumulator = (accumulator ^ accumulator >> 29) * _PRIME_3 & _MASK
    return accumulator ^ accumulator >> 32


def xxh64_blocks(data: bytes, block_bytes: int, seed: int = 0) -> list[int]:
    """XXH64 of each block."""
    return [xxh64(block, seed) for block in blocks(data, block_bytes)]
