# The C API of the pool's data path: plain structs and free functions, no Python object, safe from many threads.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from snapcore.blockmap cimport Trees
from snapcore.pages cimport Numbers, Pages


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_cond_t:
        pass


# Results beside those of blockmap; the details are in a Trouble.
cdef enum:
    LOG_FULL = -5
    WRITE_FAILED = -6
    STOPPED = -7
    DETACHED = -8
    LIMIT_REACHED = -9
    DATA_READ_FAILED = -10
    BACKING_READ_FAILED = -11
    BACKING_CHANGED = -12
    OUT_OF_RANGE = -13
    NOT_WRITABLE = -14
    BLOCK_OUTSIDE = -15
    DATA_LOST = -16
    WOULD_WAIT = -17

cdef enum:
    BLOCK_BYTES = 4096
    MAX_OPERATIONS = 64


# What went wrong: a result, errno, and the offset, slot or block it happened at.
cdef struct Trouble:
    int result
    int code
    uint64_t where

# A version that is read or written. `next` links all that are attached.
cdef struct VolumeState:
    uint64_t root
    uint64_t parent
    uint64_t frozen_root
    uint64_t size_bytes
    uint32_t version
    int attached
    int writable
    int gate
    int inside
    int readers
    int watched
    int stirred
    int backing
    uint64_t backing_bytes
    int64_t backing_mtime_ns
    uint64_t window_next
    uint64_t window_end
    # Blocks that are held and hold zeros on the host already; 1 + the commits at the last take, 0 before it.
    uint64_t ready_first
    uint64_t ready_count
    int preparing
    uint64_t taken_at
    VolumeState *next

cdef struct Operation:
    VolumeState *volume
    uint64_t first
    uint64_t last

cdef struct CoreState:
    Pages *pages
    pthread_cond_t changed
    void *medium
    int data
    int log
    uint64_t seed
    int failed
    int closed
    VolumeState *volumes
    Operation operations[MAX_OPERATIONS]
    uint64_t active
    # Space
    uint64_t *used
    uint64_t *held
    uint8_t *pieces_changed
    uint64_t capacity
    uint64_t end
    uint64_t used_count
    uint64_t held_count
    uint64_t limit_blocks
    uint64_t cursor
    uint64_t fragment
    int no_windows
    uint64_t space_root
    Numbers freed
    Numbers freed_durable
    uint64_t freed_since
    int epoch
    int readers[2]
    int reclaiming
    # Log
    uint8_t *buffer
    uint64_t buffer_bytes
    uint64_t buffer_capacity
    uint64_t last_record
    uint64_t log_sectors
    uint64_t log_reserve
    uint64_t log_next
    uint64_t log_tail
    uint64_t commit_number
    int data_written
    int committing
    uint64_t requested
    uint64_t finished
    uint64_t commits
    uint64_t frozen_log_next
    uint64_t frozen_commit
    uint64_t frozen_end
    uint64_t frozen_space_root


# With `cached`, WOULD_WAIT instead of reading from a medium.
cdef int volume_read(
    CoreState *core, VolumeState *volume, uint8_t *data, uint64_t size_bytes, uint64_t offset, bint cached,
    Trouble *trouble
) noexcept nogil

cdef int volume_write(
    CoreState *core, VolumeState *volume, const uint8_t *data, uint64_t size_bytes, uint64_t offset, Trouble *trouble
) noexcept nogil

cdef int volume_zero(
    CoreState *core, VolumeState *volume, uint64_t size_bytes, uint64_t offset, Trouble *trouble
) noexcept nogil

# Everything that was written before is durable when this returns 0. LOG_FULL: a checkpoint must come first.
cdef int core_commit(CoreState *core, Trouble *trouble) noexcept nogil


cdef class Core:
    cdef CoreState *core
    cdef readonly Trees page_file
    cdef object _medium
    cdef int check(self, Trouble *trouble, int result) except -1
    cdef uint64_t _peek(self, const uint64_t *number)


cdef class Volume:
    cdef VolumeState *volume
    cdef readonly Core core
    cdef void _unlink(self)
