# Which chunks of an image are here: plain C, safe from many threads.
from libc.stdint cimport uint64_t


cdef struct PresenceState:
    uint64_t *words
    uint64_t chunks
    uint64_t chunk_bytes
    uint64_t here


# The first byte from `start` on that is not here; `end` when all before it is.
cdef uint64_t presence_missing(const PresenceState *state, uint64_t start, uint64_t end) noexcept nogil


cdef class Presence:
    cdef PresenceState state
