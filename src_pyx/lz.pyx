"""LZ4 blocks: many small buffers compressed in one call without the GIL, each decoded again and compared.

The format is that of the LZ4 project (doc/lz4_Block_format.md); the `lz4` package is its oracle in the tests and
decodes what is read. The encoder takes the latest earlier place with the same hash of six bytes and looks at every
second position: as small as the package with acceleration 2, and faster. The check needs no memory to decode into: of a
sequence, the literals are compared with the source, and the match is compared within the source, where it stands for
the same bytes as soon as all before it are right.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    #define snapcore_le64(x) __builtin_bswap64(x)
    #else
    #define snapcore_le64(x) (x)
    #endif
    typedef uint64_t snapcore_wide __attribute__((vector_size(16)));
    static const uint8_t snapcore_kept[32] =
        {255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
    static inline snapcore_wide snapcore_load(const uint8_t *data)
    { snapcore_wide value; memcpy(&value, data, 16); return value; }
    /* Not zero where `count` bytes differ; `room`: 16 may be read of both. Few branches, for lengths are random. */
    static inline __attribute__((always_inline)) snapcore_wide
    snapcore_differ(const uint8_t *a, const uint8_t *b, size_t count, int room)
    {
        snapcore_wide found = {0, 0};
        if (count > 16) {
            for (; count > 16; count -= 16, a += 16, b += 16)
                found |= snapcore_load(a) ^ snapcore_load(b);
            return found | (snapcore_load(a + count - 16) ^ snapcore_load(b + count - 16));
        }
        if (room)
            return (snapcore_load(a) ^ snapcore_load(b)) & snapcore_load(snapcore_kept + 16 - count);
        for (; count > 0; count--)
            found[0] |= *a++ ^ *b++;
        return found;
    }
    static inline snapcore_wide snapcore_none(void) { return (snapcore_wide){0, 0}; }
    static inline snapcore_wide snapcore_or(snapcore_wide a, snapcore_wide b) { return a | b; }
    static inline int snapcore_any(snapcore_wide found) { return (found[0] | found[1]) != 0; }
    #define snapcore_low_zero_bytes(x) ((unsigned)__builtin_ctzll(x) >> 3)
    #define snapcore_high_zero_bytes(x) ((unsigned)__builtin_clzll(x) >> 3)
    """
    uint64_t snapcore_le64(uint64_t value) noexcept nogil
    size_t snapcore_low_zero_bytes(uint64_t value) noexcept nogil
    size_t snapcore_high_zero_bytes(uint64_t value) noexcept nogil
    ctypedef struct snapcore_wide:
        pass
    snapcore_wide snapcore_differ(const uint8_t *a, const uint8_t *b, size_t count, bint room) noexcept nogil
    snapcore_wide snapcore_none() noexcept nogil
    snapcore_wide snapcore_or(snapcore_wide a, snapcore_wide b) noexcept nogil
    bint snapcore_any(snapcore_wide found) noexcept nogil

# Positions have 16 bits.
cdef enum:
    BLOCK_LIMIT = 65536
    HASH_BITS = 14
    PLACES = 1 << 14
    MATCH_LEAST = 6
    # Of the search: how often in vain before the step grows by one; it begins with two.
    PATIENCE = 6
    FIRST_STEP = 2
    # The format keeps the last 5 bytes literal and lets no match begin in the last 12; 16 leave room to read words.
    END_LITERALS = 5
    END_MARGIN = 16
    # What copies of 16 bytes at a time may write beyond their end.
    SLACK = 32

BLOCK_LIMIT_BYTES = BLOCK_LIMIT


cdef inline uint64_t _read_64(const uint8_t *data) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, data, 8)
    return snapcore_le64(value)


cdef inline uint32_t _hash(const uint8_t *data) noexcept nogil:
    return <uint32_t>(((_read_64(data) << 16) * <uint64_t>227718039650203) >> (64 - HASH_BITS))


cdef inline bint _begin_alike(const uint8_t *a, const uint8_t *b) noexcept nogil:
    return ((_read_64(a) ^ _read_64(b)) << (64 - 8 * MATCH_LEAST)) == 0


cdef inline size_t _alike(const uint8_t *a, const uint8_t *b, const uint8_t *end) noexcept nogil:
    # How many bytes from a and b on are the same; a goes up to `end`. Most are few: two words a step.
    cdef const uint8_t *start = a
    cdef uint64_t first, second
    while end - a >= 16:
        first = _read_64(a) ^ _read_64(b)
        second = _read_64(a + 8) ^ _read_64(b + 8)
        if first | second:
            return (a - start) + (snapcore_low_zero_bytes(first) if first else 8 + snapcore_low_zero_bytes(second))
        a += 16
        b += 16
    while a < end and a[0] == b[0]:
        a += 1
        b += 1
    return a - start


cdef inline size_t _alike_before(const uint8_t *a, const uint8_t *b, size_t most) noexcept nogil:
    # How many bytes before a and b are the same, `most` at the most; so many are there.
    cdef size_t count = 0
    cdef uint64_t difference
    while most - count >= 8:
        difference = _read_64(a - count - 8) ^ _read_64(b - count - 8)
        if difference != 0:
            return count + snapcore_high_zero_bytes(difference)
        count += 8
    while count < most and (a - count - 1)[0] == (b - count - 1)[0]:
        count += 1
    return count


cdef inline uint8_t *_put_length(uint8_t *out, size_t rest) noexcept nogil:
    # What of a length the four bits of the token do not hold.
    while rest >= 255:
        out[0] = 255
        out += 1
        rest -= 255
    out[0] = <uint8_t>rest
    return out + 1


cdef inline uint8_t *_put_literals(uint8_t *out, const uint8_t *data, size_t count) noexcept nogil:
    # Copies 16 bytes at a time: up to 15 more are read and written.
    cdef size_t at = 0
    memcpy(out, data, 16)
    while at + 16 < count:
        at += 16
        memcpy(out + at, data + at, 16)
    return out + count


cdef size_t pack_block(
    const uint8_t *data, size_t size_bytes, uint8_t *packed, size_t limit_bytes, uint16_t *places
) noexcept nogil:
    cdef uint8_t *out = packed
    cdef uint8_t *stop = packed + limit_bytes
    cdef uint8_t *token
    cdef const uint8_t *at = data
    cdef const uint8_t *anchor = data
    cdef const uint8_t *end = data + size_bytes
    cdef const uint8_t *last = end - END_MARGIN
    cdef const uint8_t *match
    cdef const uint8_t *ahead
    cdef size_t literals, length
    cdef uint32_t place, following, tries
    if size_bytes > END_MARGIN:
        memset(places, 0, PLACES * sizeof(uint16_t))
        at += 1
        following = _hash(at)
        while True:
            # The next place whose six bytes stood earlier; ever longer steps where there is none for long.
            tries = FIRST_STEP << PATIENCE
            ahead = at + 1
            while ahead <= last:
                place = following
                match = data + places[place]
                following = _hash(ahead)
                places[place] = <uint16_t>(at - data)
                if _begin_alike(match, at):
                    break
                at = ahead
                ahead += tries >> PATIENCE
                tries += 1
            else:
                break
            length = _alike_before(at, match, min(at - anchor, match - data))
            at -= length
            match -= length
            literals = at - anchor
            if <size_t>(stop - out) < literals + literals // 255 + 5:
                return 0
            token = out
            if literals >= 15:
                token[0] = 0xF0
                out = _put_length(out + 1, literals - 15)
            else:
                token[0] = <uint8_t>(literals << 4)
                out += 1
            out = _put_literals(out, anchor, literals)
            while True:
                length = MATCH_LEAST + _alike(at + MATCH_LEAST, match + MATCH_LEAST, end - END_LITERALS)
                if <size_t>(stop - out) < length // 255 + 4:
                    return 0
                out[0] = <uint8_t>(at - match)
                out[1] = <uint8_t>((at - match) >> 8)
                out += 2
                at += length
                anchor = at
                if length >= 19:
                    token[0] |= 15
                    out = _put_length(out, length - 19)
                else:
                    token[0] |= <uint8_t>(length - 4)
                if at > last:
                    break
                places[_hash(at - 2)] = <uint16_t>(at - 2 - data)
                place = _hash(at)
                match = data + places[place]
                places[place] = <uint16_t>(at - data)
                if not _begin_alike(match, at):
                    break
                if <size_t>(stop - out) < 5:
                    return 0
                token = out
                token[0] = 0
                out += 1
            at += 1
            if at > last:
                break
            following = _hash(at)
    literals = end - anchor
    if <size_t>(stop - out) < literals + literals // 255 + 2:
        return 0
    if literals >= 15:
        out[0] = 0xF0
        out = _put_length(out + 1, literals - 15)
    else:
        out[0] = <uint8_t>(literals << 4)
        out += 1
    memcpy(out, anchor, literals)
    return out + literals - packed


cdef bint decodes_to(
    const uint8_t *packed, size_t packed_bytes, const uint8_t *data, size_t size_bytes
) noexcept nogil:
    cdef const uint8_t *at = packed
    cdef const uint8_t *end = packed + packed_bytes
    cdef size_t done = 0
    cdef size_t length, distance
    cdef snapcore_wide wrong = snapcore_none()
    cdef snapcore_wide part
    cdef uint8_t token, more
    while at < end:
        token = at[0]
        at += 1
        length = token >> 4
        if length == 15:
            more = 255
            while more == 255:
                if at >= end:
                    return False
                more = at[0]
                at += 1
                length += more
        if length > <size_t>(end - at) or length > size_bytes - done:
            return False
        part = snapcore_differ(at, data + done, length, end - at >= 16 and size_bytes - done >= 16)
        wrong = snapcore_or(wrong, part)
        at += length
        done += length
        if at == end:
            return done == size_bytes and not snapcore_any(wrong)
        if end - at < 2:
            return False
        distance = at[0] | (<size_t>at[1] << 8)
        at += 2
        length = token & 15
        if length == 15:
            more = 255
            while more == 255:
                if at >= end:
                    return False
                more = at[0]
                at += 1
                length += more
        length += 4
        if distance == 0 or distance > done or length > size_bytes - done:
            return False
        part = snapcore_differ(data + done, data + done - distance, length, size_bytes - done >= 16)
        wrong = snapcore_or(wrong, part)
        done += length
    # It ended without a last sequence of literals.
    return False


cdef bint _pack_each(
    Py_buffer *views, size_t count, uint8_t *space, size_t *lengths, size_t gain_divisor
) noexcept nogil:
    # One behind the other in `space`. False where one does not decode to what it was made of.
    cdef uint16_t[PLACES] places
    cdef const uint8_t *data
    cdef size_t number, size_bytes
    for number in range(count):
        data, size_bytes = <const uint8_t *>views[number].buf, views[number].len
        lengths[number] = pack_block(data, size_bytes, space, size_bytes - size_bytes // gain_divisor, places)
        if lengths[number] and not decodes_to(space, lengths[number], data, size_bytes):
            return False
        space += lengths[number]
    return True


def pack_blocks(list blocks not None, size_t gain_divisor):
    if gain_divisor < 1:
        raise ValueError(f"gain_divisor must be at least 1, not {gain_divisor}")
    cdef size_t count = len(blocks)
    cdef size_t held = 0
    cdef size_t total_bytes = SLACK
    cdef size_t number
    cdef bint right
    cdef uint8_t *space = NULL
    cdef uint8_t *packed
    cdef Py_buffer *views = <Py_buffer *>malloc(max(count, 1) * sizeof(Py_buffer))
    cdef size_t *lengths = <size_t *>malloc(max(count, 1) * sizeof(size_t))
    try:
        if views == NULL or lengths == NULL:
            raise MemoryError
        for block in blocks:
            PyObject_GetBuffer(block, &views[held], PyBUF_SIMPLE)
            held += 1
            if views[held - 1].len > BLOCK_LIMIT:
                raise ValueError(f"a block has at most {BLOCK_LIMIT} bytes, not {views[held - 1].len}")
            total_bytes += views[held - 1].len
        space = <uint8_t *>malloc(total_bytes)
        if space == NULL:
            raise MemoryError
        with nogil:
            right = _pack_each(views, count, space, lengths, gain_divisor)
        if not right:
            raise ArithmeticError("a block does not decode to what it was made of")
        found = []
        packed = space
        for number in range(count):
            found.append(PyBytes_FromStringAndSize(<char *>packed, lengths[number]) if lengths[number] else None)
            packed += lengths[number]
        return found
    finally:
        for number in range(held):
            PyBuffer_Release(&views[number])
        free(space)
        free(lengths)
        free(views)


def is_packed(const uint8_t[::1] packed not None, const uint8_t[::1] data not None):
    if packed.shape[0] == 0:
        return False
    cdef const uint8_t *start = &data[0] if data.shape[0] else NULL
    cdef bint right
    with nogil:
        right = decodes_to(&packed[0], packed.shape[0], start, data.shape[0])
    return right
