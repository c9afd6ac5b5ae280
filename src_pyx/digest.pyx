"""Block fingerprints: XXH64 of every block of a span in one call without the GIL.

The algorithm is that of the xxHash specification (doc/xxhash_spec.md of the xxHash project, "XXH64
algorithm description"); the `xxhash` package is its oracle in the tests. A fingerprint is a change hint
and never an identity: identity is keyed BLAKE3 (snapcore/repository/domain.py).
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

import numpy as np

cdef extern from *:
    """
    #include <stdint.h>
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    #define snapcore_le64(x) __builtin_bswap64(x)
    #define snapcore_le32(x) __builtin_bswap32(x)
    #else
    #define snapcore_le64(x) (x)
    #define snapcore_le32(x) (x)
    #endif
    """
    uint64_t snapcore_le64(uint64_t value) noexcept nogil
    uint32_t snapcore_le32(uint32_t value) noexcept nogil

cdef uint64_t PRIME_1 = 0x9E3779B185EBCA87
cdef uint64_t PRIME_2 = 0xC2B2AE3D27D4EB4F
cdef uint64_t PRIME_3 = 0x165667B19E3779F9
cdef uint64_t PRIME_4 = 0x85EBCA77C2B2AE63
cdef uint64_t PRIME_5 = 0x27D4EB2F165667C5


cdef inline uint64_t _read_64(const uint8_t *data) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, data, 8)
    return snapcore_le64(value)


cdef inline uint64_t _read_32(const uint8_t *data) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, data, 4)
    return snapcore_le32(value)


cdef inline uint64_t _rotate(uint64_t value, int bits) noexcept nogil:
    return (value << bits) | (value >> (64 - bits))


cdef inline uint64_t _round(uint64_t lane, uint64_t word) noexcept nogil:
    return _rotate(lane + word * 0xC2B2AE3D27D4EB4FULL, 31) * 0x9E3779B185EBCA87ULL


cdef inline uint64_t _merge(uint64_t total, uint64_t lane) noexcept nogil:
    return (total ^ _round(0, lane)) * 0x9E3779B185EBCA87ULL + 0x85EBCA77C2B2AE63ULL


cdef uint64_t xxh64_of(const uint8_t *data, size_t size_bytes, uint64_t seed) noexcept nogil:
    cdef const uint8_t *end = data + size_bytes
    cdef uint64_t a, b, c, d, total
    if size_bytes >= 32:
        a = seed + PRIME_1 + PRIME_2
        b = seed + PRIME_2
        c = seed
        d = seed - PRIME_1
        while end - data >= 32:
            a = _round(a, _read_64(data))
            b = _round(b, _read_64(data + 8))
            c = _round(c, _read_64(data + 16))
            d = _round(d, _read_64(data + 24))
            data += 32
        total = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
        total = _merge(_merge(_merge(_merge(total, a), b), c), d)
    else:
        total = seed + PRIME_5
    total += size_bytes
    while end - data >= 8:
        total = _rotate(total ^ _round(0, _read_64(data)), 27) * PRIME_1 + PRIME_4
        data += 8
    if end - data >= 4:
        total = _rotate(total ^ (_read_32(data) * PRIME_1), 23) * PRIME_2 + PRIME_3
        data += 4
    while data < end:
        total = _rotate(total ^ (data[0] * PRIME_5), 11) * PRIME_1
        data += 1
    total = (total ^ (total >> 33)) * PRIME_2
    total = (total ^ (total >> 29)) * PRIME_3
    return total ^ (total >> 32)


cdef int64_t xxh64_each(
    const uint8_t *data, size_t size_bytes, size_t block_bytes, uint64_t seed, uint64_t *digests
) noexcept nogil:
    cdef size_t at = 0
    cdef size_t length
    cdef int64_t count = 0
    while at < size_bytes:
        length = min(block_bytes, size_bytes - at)
        digests[count] = xxh64_of(data + at, length, seed)
        at += length
        count += 1
    return count


def xxh64_blocks(const uint8_t[::1] data not None, int64_t block_bytes, uint64_t seed=0):
    if block_bytes < 1:
        raise ValueError(f"block_bytes must be at least 1, not {block_bytes}")
    out = np.empty(data.shape[0] // block_bytes + (data.shape[0] % block_bytes != 0), dtype=np.uint64)
    cdef uint64_t[::1] digests = out
    if data.shape[0]:
        with nogil:
            xxh64_each(&data[0], data.shape[0], block_bytes, seed, &digests[0])
    return out
