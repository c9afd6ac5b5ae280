# The state that the kernels of an open pool share: plain structs and free functions, no Python object.
from libc.errno cimport EINTR, EIO, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from posix.types cimport off_t
from posix.unistd cimport pwrite

from snapcore.blockmap cimport Trees
from snapcore.presence cimport PresenceState
from snapcore.pages cimport Numbers, Pages, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_cond_t:
        pass
    int pthread_cond_init(pthread_cond_t *condition, const void *attributes)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
    int pthread_cond_broadcast(pthread_cond_t *condition)
    int pthread_cond_destroy(pthread_cond_t *condition)

cdef extern from * nogil:
    int __atomic_add_fetch(int *target, int value, int order) noexcept
    int __atomic_load_n(int *target, int order) noexcept
    int __ATOMIC_SEQ_CST


# Results beside those of the pages (pages.pxd); the details are in a Trouble.
cpdef enum:
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
    NOT_HERE = -18
    FETCH_FAILED = -19

cpdef enum:
    BLOCK_BYTES = 4096
    # Blocks that a page of the bitmap tells of.
    PIECE_BLOCKS = 8192
    # CoreState.failed: EUCLEAN of Linux, "Structure needs cleaning".
    NOT_CONSISTENT = 117

cdef enum:
    MAX_OPERATIONS = 64


# What went wrong: a result, errno, and the offset, slot or block it happened at.
cdef struct Trouble:
    int result
    int code
    uint64_t where

# What absent blocks are read from: a descriptor, or one of those below. Of an image that is not all here: what is, and
# the Python callable that gets the rest. `next` is the one that was there before.
cdef struct Backing:
    int descriptor
    uint64_t size_bytes
    int64_t mtime_ns
    PresenceState *presence
    void *fetch
    Backing *next

cdef enum:
    NO_BACKING = -1
    # An image that a disk reads from, and that is not there.
    LOST_BACKING = -2

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
    # Never NULL, and never changed: another one takes its place.
    Backing *backing
    uint64_t window_next
    uint64_t window_end
    # Blocks that are held and hold zeros on the host already; whether a small write took new blocks before.
    uint64_t ready_first
    uint64_t ready_count
    int preparing
    int takes
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


# The medium. All return errno, or 0. The first is what `medium_put` does when it is not the operating system.
cdef int medium_put_recorded(
    CoreState *core, int descriptor, const uint8_t *data, uint64_t size_bytes, uint64_t offset
) noexcept nogil
cdef int medium_sync(CoreState *core, int descriptor) noexcept nogil
cdef int medium_punch(CoreState *core, uint64_t offset, uint64_t size_bytes) noexcept nogil
# Up to the end of the file. `cached`: EAGAIN where it would wait.
cdef int medium_get(
    int descriptor, uint8_t *data, uint64_t size_bytes, uint64_t offset, bint cached, uint64_t *got
) noexcept nogil
cdef int medium_status(int descriptor, unsigned long long *size_bytes, long long *mtime_ns) noexcept nogil
# Wait a little for readers, who take no mutex.
cdef void medium_pause() noexcept nogil


# The kernels call these all the time, so they are not behind a pointer.

cdef inline void core_lock(CoreState *core) noexcept nogil:
    pthread_mutex_lock(&core.pages.lock)


cdef inline void core_unlock(CoreState *core) noexcept nogil:
    pthread_mutex_unlock(&core.pages.lock)


cdef inline int trouble_set(Trouble *trouble, int result, int code, uint64_t where) noexcept nogil:
    trouble.result = result
    trouble.code = code
    trouble.where = where
    return result


# What the kernels of the map noted; under the mutex.
cdef inline int map_trouble(CoreState *core, Trouble *trouble) noexcept nogil:
    return trouble_set(trouble, core.pages.failure, core.pages.code, core.pages.slot)


cdef inline uint64_t max_blocks() noexcept nogil:
    return <uint64_t> 1 << 40


# Write all of it. Returns errno, or 0.
cdef inline int medium_put(
    CoreState *core, int descriptor, const uint8_t *data, uint64_t size_bytes, uint64_t offset
) noexcept nogil:
    cdef uint64_t done = 0
    cdef ssize_t part
    if core.medium != NULL:
        return medium_put_recorded(core, descriptor, data, size_bytes, offset)
    while done < size_bytes:
        part = pwrite(descriptor, data + done, size_bytes - done, <off_t> (offset + done))
        if part < 0:
            if errno == EINTR:
                continue
            return errno
        if part == 0:
            return EIO
        done += part
    return 0


cdef class Core:
    cdef CoreState *core
    cdef readonly Trees page_file
    cdef object _medium
    cdef int check(self, Trouble *trouble, int result) except -1
    cdef uint64_t _peek(self, const uint64_t *number)
