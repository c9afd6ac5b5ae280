"""Block fingerprints: XXH64 of every block of a span, of memory or of a file, in one call without the GIL.

The algorithm is that of the xxHash specification (doc/xxhash_spec.md of the xxHash project, "XXH64
algorithm description"); the `xxhash` package is its oracle in the tests. A fingerprint is a change hint
and never an identity: identity is keyed BLAKE3 (snapcore/repository/domain.py).
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

import numpy as np

cdef extern from *:
    """
    #include <stdint.h>
    #include <unistd.h>
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
    ssize_t pread(int descriptor, void *target, size_t size_bytes, int64_t offset) noexcept nogil

# What is read at once stays in the second-level cache until it is digested.
cdef enum:
    WINDOW_BYTES = 256 << 10

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


cdef int64_t _read_all(
    int descriptor, uint8_t *target, int64_t size_bytes, int64_t offset, int *code
) noexcept nogil:
    # How many bytes were read: fewer at the end of the file, and where the system gives an error; then it is in `code`.
    cdef int64_t done = 0
    cdef ssize_t count
    while done < size_bytes:
        count = pread(descriptor, target + done, size_bytes - done, offset + done)
        if count > 0:
            done += count
        elif count == 0:
            break
        elif errno != EINTR:
            code[0] = errno
            break
    return done


cdef inline bint _is_zero(const uint8_t *data, size_t size_bytes) noexcept nogil:
    return data[0] == 0 and memcmp(data, data + 1, size_bytes - 1) == 0


cdef int64_t read_each(
    int descriptor, int64_t offset, int64_t size_bytes, int64_t block_bytes, uint64_t seed,
    uint8_t *space, uint64_t *digests, uint8_t *zeros, int *code
) noexcept nogil:
    cdef int64_t done = 0
    cdef int64_t window_bytes = max(block_bytes, <int64_t>WINDOW_BYTES)
    cdef int64_t length, got, at
    while done < size_bytes:
        length = min(window_bytes, size_bytes - done)
        got = _read_all(descriptor, space, length, offset + done, code)
        if got < length:
            return done + got
        done += length
        at = 0
        while at < length:
            if length - at < block_bytes:
                memset(space + length, 0, block_bytes - (length - at))
            zeros[0] = _is_zero(space + at, block_bytes)
            digests[0] = xxh64_of(space + at, block_bytes, seed)
            zeros += 1
            digests += 1
            at += block_bytes
        space += at
    return done


def read_blocks(
    int descriptor, int64_t offset, int64_t size_bytes, int64_t block_bytes, uint64_t seed, uint8_t[::1] space not None
):
    if block_bytes < 512 or block_bytes & (block_bytes - 1):
        raise ValueError(f"block_bytes must be a power of two from 512 on, not {block_bytes}")
    if offset < 0 or size_bytes < 0 or size_bytes > (<int64_t>1 << 62):
        raise ValueError(f"{size_bytes} bytes from offset {offset} on are no range of a file")
    cdef int64_t blocks = (size_bytes + block_bytes - 1) // block_bytes
    if space.shape[0] < blocks * block_bytes:
        raise ValueError(f"{space.shape[0]} bytes of space hold no {blocks} blocks of {block_bytes}")
    cdef int64_t done = 0
    cdef int code = 0
    prints = np.empty(blocks, dtype=np.uint64)
    zero = np.empty(blocks, dtype=np.bool)
    cdef uint64_t[::1] digests = prints
    cdef uint8_t[::1] zeros = zero.view(np.uint8)
    if blocks:
        with nogil:
            done = read_each(
                descriptor, offset, size_bytes, block_bytes, seed,
                &space[0], &digests[0], &zeros[0], &code,
            )
    return done, code, prints, zero
