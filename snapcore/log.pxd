# The C API of a pool's log.
from libc.stdint cimport uint32_t, uint64_t

from snapcore.core cimport CoreState, Trouble


cdef enum:
    RECORD_BYTES = 24


# With the mutex held: the buffer with so much more fits into the log and into memory; add a MAP record, for which there
# is room.
cdef int log_room(CoreState *core, uint64_t more_bytes, uint64_t reserve) noexcept nogil
cdef void log_map(CoreState *core, uint32_t version, uint64_t position, uint64_t count, uint64_t entry) noexcept nogil

# Everything that was written before is durable when this returns 0. LOG_FULL: a checkpoint must come first. Takes the
# mutex.
cdef int log_commit(CoreState *core, Trouble *trouble) noexcept nogil
