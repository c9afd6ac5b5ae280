"""Which chunks of an image are here already: a bitmap that many threads read and set without a lock.

A bit is set once and never cleared. Who sets it has put the bytes in place before (release); who sees it set may read
them (acquire).
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import numpy as np

cdef extern from * nogil:
    uint64_t __atomic_load_n(const uint64_t *target, int order) noexcept
    uint64_t __atomic_fetch_or(uint64_t *target, uint64_t value, int order) noexcept
    uint64_t __atomic_add_fetch(uint64_t *target, uint64_t value, int order) noexcept
    int __ATOMIC_ACQUIRE
    int __ATOMIC_ACQ_REL
    int __builtin_popcountll(unsigned long long value) noexcept

cdef uint64_t MAX_CHUNKS = <uint64_t> 1 << 36


cdef inline bint _is_here(const PresenceState *state, uint64_t chunk) noexcept nogil:
    return __atomic_load_n(&state.words[chunk >> 6], __ATOMIC_ACQUIRE) >> (chunk & 63) & 1


cdef uint64_t presence_missing(const PresenceState *state, uint64_t start, uint64_t end) noexcept nogil:
    cdef uint64_t chunk = start // state.chunk_bytes
    while chunk * state.chunk_bytes < end:
        if not _is_here(state, chunk):
            return max(start, chunk * state.chunk_bytes)
        chunk += 1
    return end


cdef class Presence:
    def __cinit__(self, uint64_t size_bytes, uint64_t chunk_bytes):
        if chunk_bytes == 0 or size_bytes == 0 or (size_bytes - 1) // chunk_bytes >= MAX_CHUNKS:
            raise ValueError("an image has 1 to 2 ** 36 chunks")
        self.state.chunk_bytes = chunk_bytes
        self.state.chunks = (size_bytes - 1) // chunk_bytes + 1
        self.state.words = <uint64_t *> calloc((self.state.chunks + 63) // 64, 8)
        if self.state.words == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.state.words)

    @property
    def chunks(self):
        return self.state.chunks

    @property
    def here(self):
        return __atomic_load_n(&self.state.here, __ATOMIC_ACQUIRE)

    def add(self, uint64_t first, uint64_t count):
        cdef uint64_t chunk, bit
        if first > self.state.chunks or count > self.state.chunks - first:
            raise ValueError(f"chunks {first} to {first + count} of {self.state.chunks}")
        with nogil:
            for chunk in range(first, first + count):
                bit = <uint64_t> 1 << (chunk & 63)
                if not __atomic_fetch_or(&self.state.words[chunk >> 6], bit, __ATOMIC_ACQ_REL) & bit:
                    __atomic_add_fetch(&self.state.here, 1, __ATOMIC_ACQ_REL)

    def missing(self, uint64_t first, uint64_t count):
        cdef uint64_t chunk, last, runs
        cdef bint inside
        cdef int64_t[:, ::1] view
        if first > self.state.chunks:
            first = self.state.chunks
        last = first + min(count, self.state.chunks - first)
        out = np.empty(((last - first) // 2 + 1, 2), dtype=np.int64)
        view = out
        runs = 0
        inside = False
        with nogil:
            for chunk in range(first, last):
                if _is_here(&self.state, chunk):
                    inside = False
                elif inside:
                    view[runs - 1, 1] += 1
                else:
                    view[runs, 0] = chunk
                    view[runs, 1] = 1
                    runs += 1
                    inside = True
        return out[:runs].copy()

    def to_bytes(self):
        cdef uint64_t words = (self.state.chunks + 63) // 64
        cdef uint64_t number
        out = np.empty(words, dtype="<u8")
        cdef uint64_t[::1] view = out
        for number in range(words):
            view[number] = __atomic_load_n(&self.state.words[number], __ATOMIC_ACQUIRE)
        return out.tobytes()

    def load(self, const unsigned char[::1] data not None):
        cdef uint64_t words = (self.state.chunks + 63) // 64
        cdef uint64_t number
        cdef uint64_t spare = self.state.chunks & 63
        if <uint64_t> data.shape[0] != words * 8:
            raise ValueError(f"{data.shape[0]} bytes for {words} words")
        if spare and (<const uint64_t *> &data[0])[words - 1] >> spare:
            raise ValueError("chunks are here that the image has not")
        memcpy(self.state.words, &data[0], words * 8)
        self.state.here = 0
        for number in range(words):
            self.state.here += __builtin_popcountll(self.state.words[number])
