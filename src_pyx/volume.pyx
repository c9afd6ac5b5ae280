"""The pool's data path: reading, writing and discarding of volumes, their space, the log and its commits.

Rules and proofs: docs/DESIGN.md ("The pool"); bytes of the log: docs/FORMAT.md. One mutex (`Pages.lock`) guards all
state; it is not held over I/O on data, over a sync, or over Python. The order of a write:

| step | under the mutex | a crash then leaves |
| --- | --- | --- |
| register the blocks, look them up, take new blocks for those that are shared | yes | nothing |
| write the data | no | blocks that no tree refers to; in place: old or new sectors |
| change the tree, add a MAP record to the buffer | yes | the same |
| commit: sync data, write and sync the log | no | the old blocks or the new ones |

A medium other than the operating system (a test's recorder) is called with the GIL for every persistent operation.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, EIO, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort, realloc
from libc.string cimport memcpy, memset
from posix.types cimport off_t
from posix.unistd cimport pread, pwrite

import numpy as np

from snapcore.blockmap cimport ABSENT, FAN_OUT, LOST, ZERO, Trees, tree_fill, tree_lookup, tree_set
from snapcore.digest cimport xxh64_of
from snapcore.pages cimport (
    KIND_BITMAP, NO_MEMORY, Numbers, numbers_array, numbers_free, numbers_move, numbers_reserve, page_free, page_new,
    pages_dirty, pages_freeze, pages_trim, pages_used, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock,
)

from snapcore.pages import Failure

cdef extern from "<pthread.h>" nogil:
    int pthread_cond_init(pthread_cond_t *condition, const void *attributes)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
    int pthread_cond_broadcast(pthread_cond_t *condition)
    int pthread_cond_destroy(pthread_cond_t *condition)

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <sys/stat.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>

    /* Like pread, but EAGAIN for what would have to come from the medium; ENOTSUP where that cannot be asked. */
    static ssize_t snapcore_pread_cached(int descriptor, void *data, size_t length, off_t offset) {
    #if defined(__linux__) && defined(RWF_NOWAIT)
        struct iovec part = {data, length};
        return preadv2(descriptor, &part, 1, offset, RWF_NOWAIT);
    #else
        errno = ENOTSUP;
        return -1;
    #endif
    }

    #if defined(__APPLE__)
    #define snapcore_mtime(status) ((status).st_mtimespec)
    static int snapcore_sync(int descriptor) { return fcntl(descriptor, F_FULLFSYNC) == -1 ? errno : 0; }
    #else
    #define snapcore_mtime(status) ((status).st_mtim)
    static int snapcore_sync(int descriptor) { return fdatasync(descriptor) ? errno : 0; }
    #endif

    #if defined(__linux__)
    static int snapcore_punch(int descriptor, off_t offset, off_t length) {
        return fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) ? errno : 0;
    }
    #else
    static int snapcore_punch(int descriptor, off_t offset, off_t length) { return 0; }
    #endif

    static int snapcore_status(int descriptor, unsigned long long *size, long long *mtime_ns) {
        struct stat status;
        if (fstat(descriptor, &status)) return errno;
        *size = (unsigned long long) status.st_size;
        *mtime_ns = (long long) snapcore_mtime(status).tv_sec * 1000000000LL + snapcore_mtime(status).tv_nsec;
        return 0;
    }

    static void snapcore_pause(void) {
        struct timespec time = {0, 50000};
        nanosleep(&time, NULL);
    }
    """
    ssize_t snapcore_pread_cached(int descriptor, void *data, size_t length, off_t offset) noexcept nogil
    int snapcore_sync(int descriptor) noexcept nogil
    int snapcore_punch(int descriptor, off_t offset, off_t length) noexcept nogil
    int snapcore_status(int descriptor, unsigned long long *size, long long *mtime_ns) noexcept nogil
    void snapcore_pause() noexcept nogil
    int __atomic_add_fetch(int *target, int value, int order) noexcept nogil
    int __atomic_load_n(int *target, int order) noexcept nogil
    int __ATOMIC_SEQ_CST
    int ESHUTDOWN
    # Read without the mutex too.
    uint64_t load_size "__atomic_load_n"(uint64_t *target, int order) noexcept nogil
    void store_size "__atomic_store_n"(uint64_t *target, uint64_t value, int order) noexcept nogil
    int __builtin_ctzll(unsigned long long value) noexcept nogil
    int __builtin_clzll(unsigned long long value) noexcept nogil
    int __builtin_popcountll(unsigned long long value) noexcept nogil

cdef enum:
    # The numbers below stand for entries that refer to nothing.
    FIRST_BLOCK = 3
    PART_BLOCKS = 1024
    WINDOW_BLOCKS = 256
    READY_BLOCKS = 64
    # Larger writes spread what a flush costs by themselves.
    SMALL_WRITE_BLOCKS = 16
    PIECE_BLOCKS = 8192
    SECTOR_BYTES = 512
    SECTOR_HEADER_BYTES = 24
    PAYLOAD_BYTES = 488
    RECORD_BYTES = 24
    RECORD_MAP = 1
    RECORD_EVENT = 2
    LAST_OF_COMMIT = 1
    NO_BACKING = -1
    # An image that a disk reads from, and that is not there.
    LOST_BACKING = -2
    # EUCLEAN of Linux: "Structure needs cleaning".
    NOT_CONSISTENT = 117

cdef uint64_t MAX_BLOCKS = <uint64_t> 1 << 40
cdef uint64_t MAX_SIZE_BYTES = <uint64_t> 1 << 47
cdef uint64_t MAX_COUNT = (<uint64_t> 1 << 24) - 1
cdef uint8_t[READY_BLOCKS * BLOCK_BYTES] ZEROS
memset(ZEROS, 0, sizeof(ZEROS))


cdef int _trouble(Trouble *trouble, int result, int code, uint64_t where) noexcept nogil:
    trouble.result = result
    trouble.code = code
    trouble.where = where
    return result


cdef int _map_trouble(CoreState *core, Trouble *trouble) noexcept nogil:
    """What the kernels of the map noted; under the mutex."""
    return _trouble(trouble, core.pages.failure, core.pages.code, core.pages.slot)


cdef inline void _lock(CoreState *core) noexcept nogil:
    pthread_mutex_lock(&core.pages.lock)


cdef inline void _unlock(CoreState *core) noexcept nogil:
    pthread_mutex_unlock(&core.pages.lock)


cdef int _look_up(
    CoreState *core, uint64_t root, uint64_t first, uint64_t count, uint64_t *entries, Trouble *trouble
) noexcept nogil:
    """Entries, all of which lie in the data file; under the mutex."""
    cdef uint64_t i
    if tree_lookup(core.pages, root, first, <uint32_t> count, entries) < 0:
        return _trouble(trouble, core.pages.failure, core.pages.code, core.pages.slot)
    for i in range(count):
        if entries[i] >= core.end and entries[i] > LOST:
            return _trouble(trouble, BLOCK_OUTSIDE, 0, first + i)
    return 0


# The medium

cdef int _put(
    CoreState *core, int descriptor, const uint8_t *data, uint64_t size_bytes, uint64_t offset
) noexcept nogil:
    """Write all of it. Returns errno, or 0."""
    cdef uint64_t done = 0
    cdef ssize_t part
    if core.medium != NULL:
        return _put_recorded(core, descriptor, data, size_bytes, offset)
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


cdef int _put_recorded(
    CoreState *core, int descriptor, const uint8_t *data, uint64_t size_bytes, uint64_t offset
) noexcept with gil:
    try:
        piece = PyBytes_FromStringAndSize(<const char *> data, size_bytes)
        (<object> core.medium).write_at(descriptor, [piece], offset)
        return 0
    except OSError as error:
        return error.errno or EIO
    except BaseException:
        return EIO


cdef int _sync(CoreState *core, int descriptor) noexcept nogil:
    if core.medium != NULL:
        return _sync_recorded(core, descriptor)
    return snapcore_sync(descriptor)


cdef int _sync_recorded(CoreState *core, int descriptor) noexcept with gil:
    try:
        (<object> core.medium).sync(descriptor)
        return 0
    except OSError as error:
        return error.errno or EIO
    except BaseException:
        return EIO


cdef int _punch(CoreState *core, uint64_t offset, uint64_t size_bytes) noexcept nogil:
    if core.medium != NULL:
        return _punch_recorded(core, offset, size_bytes)
    return snapcore_punch(core.data, <off_t> offset, <off_t> size_bytes)


cdef int _punch_recorded(CoreState *core, uint64_t offset, uint64_t size_bytes) noexcept with gil:
    try:
        (<object> core.medium).punch(core.data, offset, size_bytes)
        return 0
    except OSError as error:
        return error.errno or EIO
    except BaseException:
        return EIO


cdef int _get(
    int descriptor, uint8_t *data, uint64_t size_bytes, uint64_t offset, bint cached, uint64_t *got
) noexcept nogil:
    """Read all of it or up to the end of the file. Returns errno, or 0; `cached`: EAGAIN where it would wait."""
    cdef ssize_t part
    got[0] = 0
    while got[0] < size_bytes:
        if cached:
            part = snapcore_pread_cached(descriptor, data + got[0], size_bytes - got[0], <off_t> (offset + got[0]))
            if part < 0 and errno != EINTR:
                return EAGAIN
        else:
            part = pread(descriptor, data + got[0], size_bytes - got[0], <off_t> (offset + got[0]))
        if part < 0:
            if errno == EINTR:
                continue
            return errno
        if part == 0:
            return 0
        got[0] += part
    return 0


# Space

cdef inline bint _bit(const uint64_t *words, uint64_t number) noexcept nogil:
    return words[number >> 6] >> (number & 63) & 1


cdef int _grow_space(CoreState *core, uint64_t blocks) noexcept nogil:
    """Room for this many blocks in the bitmaps, a whole number of pieces."""
    cdef uint64_t capacity = max(blocks, core.capacity + core.capacity // 2)
    cdef uint64_t *used
    cdef uint64_t *held
    cdef uint8_t *changed
    if blocks <= core.capacity:
        return 0
    if blocks > MAX_BLOCKS:
        return NO_MEMORY
    capacity = (capacity + PIECE_BLOCKS - 1) // PIECE_BLOCKS * PIECE_BLOCKS
    used = <uint64_t *> realloc(core.used, capacity // 8)
    if used == NULL:
        return NO_MEMORY
    core.used = used
    held = <uint64_t *> realloc(core.held, capacity // 8)
    if held == NULL:
        return NO_MEMORY
    core.held = held
    changed = <uint8_t *> realloc(core.pieces_changed, capacity // PIECE_BLOCKS)
    if changed == NULL:
        return NO_MEMORY
    core.pieces_changed = changed
    memset(<uint8_t *> used + core.capacity // 8, 0, (capacity - core.capacity) // 8)
    memset(<uint8_t *> held + core.capacity // 8, 0, (capacity - core.capacity) // 8)
    memset(changed + core.capacity // PIECE_BLOCKS, 0, (capacity - core.capacity) // PIECE_BLOCKS)
    core.capacity = capacity
    return 0


cdef uint64_t _find_window(CoreState *core) noexcept nogil:
    """The first block of an aligned free window below the end, from the cursor on; 0 when there is none."""
    cdef uint64_t windows = core.end // WINDOW_BLOCKS
    cdef uint64_t at = core.cursor
    cdef uint64_t left = windows
    cdef uint64_t *used
    cdef uint64_t *held
    if core.no_windows:
        return 0
    while left:
        left -= 1
        if at >= windows:
            at = 0
        used = core.used + at * (WINDOW_BLOCKS // 64)
        held = core.held + at * (WINDOW_BLOCKS // 64)
        if at and not (used[0] | used[1] | used[2] | used[3] | held[0] | held[1] | held[2] | held[3]):
            core.cursor = at + 1
            return at * WINDOW_BLOCKS
        at += 1
    core.no_windows = 1
    return 0


cdef uint64_t _find_fragment(CoreState *core) noexcept nogil:
    """Any free block below the end; 0 when there is none."""
    cdef uint64_t words = core.end // 64
    cdef uint64_t at = core.fragment
    cdef uint64_t left = words
    cdef uint64_t busy
    while left:
        left -= 1
        if at >= words:
            at = 0
        busy = core.used[at] | core.held[at]
        if at == 0:
            busy |= 7
        if ~busy:
            core.fragment = at
            return at * 64 + __builtin_ctzll(~busy)
        at += 1
    return 0


cdef uint64_t _take(CoreState *core, VolumeState *volume, uint64_t want, uint64_t *count) noexcept nogil:
    """Hold a run of up to `want` free blocks for a volume. Returns the first, or 0."""
    cdef uint64_t first, at, end
    if volume.ready_count:
        first = volume.ready_first
        count[0] = min(want, volume.ready_count)
        volume.ready_first += count[0]
        volume.ready_count -= count[0]
        return first
    if core.limit_blocks:
        if core.used_count + core.held_count >= core.limit_blocks:
            return 0
        want = min(want, core.limit_blocks - core.used_count - core.held_count)
    first = volume.window_next
    end = volume.window_end
    if first >= end or _bit(core.used, first) or _bit(core.held, first):
        first = _find_window(core)
        if first == 0 and core.end > 65536 and core.used_count + core.held_count < core.end // 2:
            first = _find_fragment(core)
            end = min(first + WINDOW_BLOCKS, core.end)
        elif first:
            end = first + WINDOW_BLOCKS
        if first == 0:
            first = (core.end + WINDOW_BLOCKS - 1) // WINDOW_BLOCKS * WINDOW_BLOCKS
            if first == 0:
                first = FIRST_BLOCK
            end = first // WINDOW_BLOCKS * WINDOW_BLOCKS + WINDOW_BLOCKS
            if _grow_space(core, end) < 0:
                return 0
    at = first
    end = min(end, min(first + want, core.capacity))
    while at < end and not _bit(core.used, at) and not _bit(core.held, at):
        core.held[at >> 6] |= <uint64_t> 1 << (at & 63)
        at += 1
    count[0] = at - first
    core.held_count += at - first
    core.end = max(core.end, at)
    volume.window_next = at
    volume.window_end = (first // WINDOW_BLOCKS + 1) * WINDOW_BLOCKS
    return first


cdef void _give_back(CoreState *core, uint64_t first, uint64_t count) noexcept nogil:
    """Held blocks are free."""
    cdef uint64_t at
    for at in range(first, first + count):
        core.held[at >> 6] &= ~(<uint64_t> 1 << (at & 63))
    core.held_count -= count


cdef void _take_back(CoreState *core, const bint *own, const uint64_t *targets, uint64_t count) noexcept nogil:
    """The new blocks of a write that failed are free."""
    cdef uint64_t i
    for i in range(count):
        if not own[i]:
            _give_back(core, targets[i], 1)
    # Or else the next one that fails would go further beyond the end, and so on.
    core.no_windows = 0


cdef void _let_go(CoreState *core, uint64_t first, uint64_t count) noexcept nogil:
    """Held blocks that may have been written are punched out and free after the next `_reclaim`; without memory for the
    list, after the next recovery."""
    cdef Numbers *freed = &core.freed_durable
    if count and numbers_reserve(freed, 2) == 0:
        freed.items[freed.count] = first
        freed.items[freed.count + 1] = count
        freed.count += 2


cdef void _let_go_ready(CoreState *core, VolumeState *volume) noexcept nogil:
    _let_go(core, volume.ready_first, volume.ready_count)
    volume.ready_count = 0


cdef inline void _use(CoreState *core, uint64_t block) noexcept nogil:
    """A held block is used."""
    cdef uint64_t bit = <uint64_t> 1 << (block & 63)
    core.held[block >> 6] &= ~bit
    core.used[block >> 6] |= bit
    core.held_count -= 1
    core.used_count += 1
    core.pieces_changed[block // PIECE_BLOCKS] = 1


cdef int _free_blocks(CoreState *core, const uint64_t *blocks, uint64_t count) noexcept nogil:
    """Used blocks are held until what freed them is durable. Fails before anything is done."""
    cdef uint64_t i, block, bit
    cdef Numbers *freed = &core.freed
    if numbers_reserve(freed, 2 * count) < 0:
        return NO_MEMORY
    for i in range(count):
        block = blocks[i]
        if block >= core.capacity or not _bit(core.used, block):
            # A tree says that it holds what is free: nothing more is written until the pool is checked.
            core.failed = NOT_CONSISTENT
            continue
        bit = <uint64_t> 1 << (block & 63)
        core.used_count -= 1
        core.held_count += 1
        core.used[block >> 6] &= ~bit
        core.held[block >> 6] |= bit
        core.pieces_changed[block // PIECE_BLOCKS] = 1
        if freed.count and freed.items[freed.count - 2] + freed.items[freed.count - 1] == block:
            freed.items[freed.count - 1] += 1
        else:
            freed.items[freed.count] = block
            freed.items[freed.count + 1] = 1
            freed.count += 2
    return 0


cdef int _settle_freed(CoreState *core) noexcept nogil:
    """After a replay. A block that one record freed may be used by a later one, and be freed again: what waits to be
    freed is told by the bitmap alone."""
    cdef Numbers *freed = &core.freed
    cdef uint64_t at, left, block
    freed.count = 0
    for at in range(core.capacity // 64):
        left = core.held[at]
        while left:
            block = at * 64 + __builtin_ctzll(left)
            left &= left - 1
            if freed.count and freed.items[freed.count - 2] + freed.items[freed.count - 1] == block:
                freed.items[freed.count - 1] += 1
                continue
            if numbers_reserve(freed, 2) < 0:
                return NO_MEMORY
            freed.items[freed.count] = block
            freed.items[freed.count + 1] = 1
            freed.count += 2
    return 0


cdef int _compare_runs(const void *a, const void *b) noexcept nogil:
    cdef uint64_t one = (<const uint64_t *> a)[0]
    cdef uint64_t two = (<const uint64_t *> b)[0]
    return (one > two) - (one < two)


cdef int _reclaim(CoreState *core) noexcept nogil:
    """Punch out what is freed for good and seen by no reader, and make it free. Returns 0, or errno of a punch."""
    cdef Numbers runs
    cdef uint64_t i, first, count
    cdef VolumeState *volume
    cdef int old
    cdef int code = 0
    cdef int result
    memset(&runs, 0, sizeof(runs))
    _lock(core)
    while core.reclaiming:
        pthread_cond_wait(&core.changed, &core.pages.lock)
    if core.closed:
        _unlock(core)
        return 0
    core.reclaiming = 1
    volume = core.volumes
    while volume != NULL:
        _let_go_ready(core, volume)
        volume = volume.next
    runs = core.freed_durable
    memset(&core.freed_durable, 0, sizeof(Numbers))
    old = core.epoch
    core.epoch = 1 - old
    _unlock(core)
    while __atomic_load_n(&core.readers[old], __ATOMIC_SEQ_CST):
        snapcore_pause()
    if runs.count:
        qsort(runs.items, runs.count // 2, 16, _compare_runs)
    i = 0
    while i < runs.count:
        first = runs.items[i]
        count = runs.items[i + 1]
        i += 2
        while i < runs.count and runs.items[i] == first + count:
            count += runs.items[i + 1]
            i += 2
        # A host that cannot punch keeps the space until the block is used again.
        result = _punch(core, first * BLOCK_BYTES, count * BLOCK_BYTES)
        if result and code == 0:
            code = result
        _lock(core)
        _give_back(core, first, count)
        core.freed_since += count
        if core.freed_since >= WINDOW_BLOCKS:
            core.freed_since = 0
            core.no_windows = 0
        _unlock(core)
    numbers_free(&runs)
    _lock(core)
    core.reclaiming = 0
    pthread_cond_broadcast(&core.changed)
    _unlock(core)
    return code


# The log

cdef inline uint64_t _sectors(uint64_t payload_bytes) noexcept nogil:
    return (payload_bytes + PAYLOAD_BYTES - 1) // PAYLOAD_BYTES


cdef int _log_room(CoreState *core, uint64_t more_bytes, uint64_t reserve) noexcept nogil:
    """The buffer with so much more fits into the log and into memory."""
    cdef uint64_t free_sectors = core.log_sectors - (core.log_next - core.log_tail)
    cdef uint64_t need = core.buffer_bytes + more_bytes
    cdef uint64_t capacity
    cdef uint8_t *buffer
    if _sectors(need) + reserve > free_sectors:
        return LOG_FULL
    if need > core.buffer_capacity:
        capacity = max(need, 2 * core.buffer_capacity)
        buffer = <uint8_t *> realloc(core.buffer, capacity)
        if buffer == NULL:
            return NO_MEMORY
        core.buffer = buffer
        core.buffer_capacity = capacity
    return 0


cdef void _log_map(CoreState *core, uint32_t version, uint64_t position, uint64_t count, uint64_t entry) noexcept nogil:
    """Add a MAP record, for which there is room; it joins the last one where it goes on."""
    cdef uint32_t *head
    cdef uint64_t *body
    cdef uint64_t before
    if core.buffer_bytes >= RECORD_BYTES and core.last_record == core.buffer_bytes - RECORD_BYTES:
        head = <uint32_t *> (core.buffer + core.last_record)
        body = <uint64_t *> (core.buffer + core.last_record + 8)
        before = body[0] >> 40
        if (
            head[1] == version
            and (body[0] & (MAX_BLOCKS - 1)) + before == position
            and before + count <= MAX_COUNT
            and (entry == body[1] if entry <= LOST else body[1] > LOST and body[1] + before == entry)
        ):
            body[0] += count << 40
            return
    core.last_record = core.buffer_bytes
    head = <uint32_t *> (core.buffer + core.buffer_bytes)
    body = <uint64_t *> (core.buffer + core.buffer_bytes + 8)
    head[0] = RECORD_MAP
    head[1] = version
    body[0] = position | count << 40
    body[1] = entry
    core.buffer_bytes += RECORD_BYTES


cdef void _fill_sectors(
    CoreState *core, uint8_t *sectors, const uint8_t *payload, uint64_t payload_bytes, uint64_t first, uint64_t commit
) noexcept nogil:
    cdef uint64_t count = _sectors(payload_bytes)
    cdef uint64_t i, part
    cdef uint8_t *sector
    for i in range(count):
        sector = sectors + i * SECTOR_BYTES
        part = min(<uint64_t> PAYLOAD_BYTES, payload_bytes - i * PAYLOAD_BYTES)
        (<uint64_t *> sector)[1] = first + i
        (<uint32_t *> sector)[4] = <uint32_t> commit
        (<uint16_t *> sector)[10] = <uint16_t> part
        (<uint16_t *> sector)[11] = LAST_OF_COMMIT if i == count - 1 else 0
        memcpy(sector + SECTOR_HEADER_BYTES, payload + i * PAYLOAD_BYTES, part)
        memset(sector + SECTOR_HEADER_BYTES + part, 0, PAYLOAD_BYTES - part)
        (<uint64_t *> sector)[0] = xxh64_of(sector + 8, SECTOR_BYTES - 8, core.seed)


cdef int _write_log(CoreState *core, const uint8_t *sectors, uint64_t count, uint64_t first) noexcept nogil:
    cdef uint64_t place = first % core.log_sectors
    cdef uint64_t part = min(count, core.log_sectors - place)
    cdef int code = _put(core, core.log, sectors, part * SECTOR_BYTES, place * SECTOR_BYTES)
    if code == 0 and part < count:
        code = _put(core, core.log, sectors + part * SECTOR_BYTES, (count - part) * SECTOR_BYTES, 0)
    return code if code else _sync(core, core.log)


cdef int _commit(CoreState *core, bint freezing, Numbers *dirty, Numbers *slots, Trouble *trouble) noexcept nogil:
    """Make all that was written durable, together with others who ask at the same time; with `freezing` alone, and a
    checkpoint begins at the very moment that the buffer is taken."""
    cdef uint64_t mine, upto, count, first, commit, payload_bytes
    cdef uint8_t *payload
    cdef uint8_t *sectors
    cdef Numbers freed
    cdef bint sync_data
    cdef int code = 0
    cdef int result = 0
    cdef VolumeState *volume
    _lock(core)
    core.requested += 1
    mine = core.requested
    while True:
        if core.failed:
            _unlock(core)
            return _trouble(trouble, STOPPED, core.failed, 0)
        if core.finished >= mine and not freezing:
            _unlock(core)
            return 0
        if not core.committing:
            break
        pthread_cond_wait(&core.changed, &core.pages.lock)
    payload_bytes = core.buffer_bytes
    count = _sectors(payload_bytes)
    sectors = NULL
    if count > core.log_sectors - (core.log_next - core.log_tail):
        result = _trouble(trouble, LOG_FULL, 0, 0)
    elif count:
        sectors = <uint8_t *> malloc(count * SECTOR_BYTES)
        if sectors == NULL:
            result = _trouble(trouble, NO_MEMORY, 0, 0)
    if result == 0 and freezing:
        result = _freeze_space(core, trouble)
        if result == 0 and (
            pages_dirty(core.pages, dirty) < 0 or pages_used(core.pages, slots) < 0 or pages_freeze(core.pages) < 0
        ):
            result = _map_trouble(core, trouble)
    if result < 0:
        _unlock(core)
        free(sectors)
        return result
    core.committing = 1
    upto = core.requested
    payload = core.buffer
    core.buffer = NULL
    core.buffer_bytes = core.buffer_capacity = 0
    first = core.log_next
    commit = core.commit_number
    core.log_next += count
    core.commit_number += count > 0
    freed = core.freed
    memset(&core.freed, 0, sizeof(Numbers))
    sync_data = core.data_written
    core.data_written = 0
    if freezing:
        core.frozen_log_next = core.log_next
        core.frozen_commit = core.commit_number
        core.frozen_end = _end_of_used(core)
        core.frozen_space_root = core.space_root
        volume = core.volumes
        while volume != NULL:
            volume.frozen_root = volume.root
            volume = volume.next
    _unlock(core)
    if sync_data:
        code = _sync(core, core.data)
    if count and code == 0:
        _fill_sectors(core, sectors, payload, payload_bytes, first, commit)
        code = _write_log(core, sectors, count, first)
    free(sectors)
    free(payload)
    _lock(core)
    if code:
        core.failed = code
        numbers_free(&freed)
        result = _trouble(trouble, STOPPED, code, 0)
    else:
        core.finished = upto
        core.commits += 1
        # Without memory for the list the blocks stay held until the pool is opened again.
        numbers_move(&core.freed_durable, &freed)
        numbers_free(&freed)
    core.committing = 0
    pthread_cond_broadcast(&core.changed)
    _unlock(core)
    return result


cdef uint64_t _end_of_used(CoreState *core) noexcept nogil:
    """Behind the last used block: what writes that failed were to have does not count, and may not be in the file."""
    cdef uint64_t at = (core.end + 63) // 64
    while at:
        at -= 1
        if core.used[at]:
            return at * 64 + 64 - __builtin_clzll(core.used[at])
    return 0


cdef bint _any_used(CoreState *core, uint64_t piece) noexcept nogil:
    cdef uint64_t i
    for i in range(piece * (PIECE_BLOCKS // 64), (piece + 1) * (PIECE_BLOCKS // 64)):
        if core.used[i]:
            return True
    return False


cdef int _put_pieces(CoreState *core, Trouble *trouble) noexcept nogil:
    """Pages for the pieces of the bitmap that changed."""
    cdef uint64_t piece
    cdef uint64_t old, ref
    cdef uint64_t *entries
    cdef Numbers freed
    cdef int result
    memset(&freed, 0, sizeof(freed))
    for piece in range(core.capacity // PIECE_BLOCKS):
        if not core.pieces_changed[piece]:
            continue
        result = tree_lookup(core.pages, core.space_root, piece, 1, &old)
        if result == 0 and numbers_reserve(&core.pages.condemned, 8) < 0:
            return _trouble(trouble, NO_MEMORY, 0, 0)
        if result < 0:
            return _map_trouble(core, trouble)
        ref = ABSENT
        # A piece without a used block may lie beyond the end, so it has no page.
        if _any_used(core, piece):
            ref = page_new(core.pages, KIND_BITMAP, &entries)
            if ref == 0:
                return _map_trouble(core, trouble)
            memcpy(entries, core.used + piece * (PIECE_BLOCKS // 64), PIECE_BLOCKS // 8)
        result = tree_set(core.pages, &core.space_root, ABSENT, 0, piece, 1, ref, 0, &freed)
        numbers_free(&freed)
        if result < 0:
            if ref != ABSENT:
                page_free(core.pages, ref)
            return _map_trouble(core, trouble)
        if old > LOST:
            page_free(core.pages, old)
        core.pieces_changed[piece] = 0
    return 0


cdef int _freeze_space(CoreState *core, Trouble *trouble) noexcept nogil:
    """The same, out of the slots that are kept for it."""
    cdef int result
    core.pages.privileged = 1
    result = _put_pieces(core, trouble)
    core.pages.privileged = 0
    return result


cdef bint _detach_all(CoreState *core) noexcept nogil:
    """Let nobody read or write any more; whether somebody still writes."""
    cdef VolumeState *volume = core.volumes
    cdef bint busy = False
    while volume != NULL:
        volume.attached = 0
        busy = busy or volume.inside > 0
        volume = volume.next
    return busy


cdef int core_commit(CoreState *core, Trouble *trouble) noexcept nogil:
    return _commit(core, False, NULL, NULL, trouble)


# Reading

cdef int _read_backing(
    VolumeState *volume, uint8_t *data, uint64_t size_bytes, uint64_t offset, bint cached, Trouble *trouble
) noexcept nogil:
    cdef unsigned long long now_bytes = 0
    cdef long long mtime_ns = 0
    cdef uint64_t got = 0
    cdef uint64_t inside = 0
    cdef int code
    if volume.backing == LOST_BACKING and offset < volume.backing_bytes:
        return _trouble(trouble, BACKING_CHANGED, 0, offset)
    if volume.backing != NO_BACKING and offset < volume.backing_bytes:
        inside = min(size_bytes, volume.backing_bytes - offset)
        code = _get(volume.backing, data, inside, offset, cached, &got)
        if cached and code == EAGAIN:
            return _trouble(trouble, WOULD_WAIT, 0, offset)
        if code == 0:
            code = snapcore_status(volume.backing, &now_bytes, &mtime_ns)
        if code:
            return _trouble(trouble, BACKING_READ_FAILED, code, offset + got)
        if now_bytes != volume.backing_bytes or mtime_ns != volume.backing_mtime_ns or got < inside:
            return _trouble(trouble, BACKING_CHANGED, 0, offset + got)
    memset(data + inside, 0, size_bytes - inside)
    return 0


cdef int _read_data(
    CoreState *core, uint8_t *data, uint64_t size_bytes, uint64_t offset, bint cached, Trouble *trouble
) noexcept nogil:
    cdef uint64_t got
    cdef int code = _get(core.data, data, size_bytes, offset, cached, &got)
    if cached and code == EAGAIN:
        return _trouble(trouble, WOULD_WAIT, 0, offset)
    if code or got < size_bytes:
        return _trouble(trouble, DATA_READ_FAILED, code, offset + got)
    return 0


cdef int _read_entries(
    CoreState *core, VolumeState *volume, const uint64_t *entries, uint64_t first, uint8_t *data,
    uint64_t start, uint64_t end, bint cached, Trouble *trouble
) noexcept nogil:
    """Read bytes `start` to `end` of a volume, whose entries from block `first` on are given."""
    cdef uint64_t at = start
    cdef uint64_t block, entry, length
    cdef int result
    while at < end:
        block = at // BLOCK_BYTES - first
        entry = entries[block]
        length = min(end, (at // BLOCK_BYTES + 1) * BLOCK_BYTES) - at
        while at + length < end:
            block += 1
            if entry > LOST:
                if entries[block] != entry + (block - (at // BLOCK_BYTES - first)):
                    break
            elif entries[block] != entry:
                break
            length = min(end, at + length + BLOCK_BYTES) - at
        if entry > LOST:
            result = _read_data(
                core, data + (at - start), length, entry * BLOCK_BYTES + at % BLOCK_BYTES, cached, trouble
            )
        elif entry == LOST:
            return _trouble(trouble, DATA_LOST, 0, at)
        elif entry == ABSENT:
            result = _read_backing(volume, data + (at - start), length, at, cached, trouble)
        else:
            memset(data + (at - start), 0, length)
            result = 0
        if result < 0:
            return result
        at += length
    return 0


cdef int volume_read(
    CoreState *core, VolumeState *volume, uint8_t *data, uint64_t size_bytes, uint64_t offset, bint cached,
    Trouble *trouble
) noexcept nogil:
    cdef uint64_t entries[PART_BLOCKS + 1]
    cdef uint64_t at = offset
    cdef uint64_t end = offset + size_bytes
    cdef uint64_t first, stop
    cdef int epoch
    cdef int result = 0
    while at < end and result == 0:
        first = at // BLOCK_BYTES
        stop = min(end, (first + PART_BLOCKS) * BLOCK_BYTES)
        _lock(core)
        if not volume.attached or end > volume.size_bytes:
            _unlock(core)
            return _trouble(trouble, OUT_OF_RANGE if volume.attached else DETACHED, 0, offset)
        pages_trim(core.pages)
        result = _look_up(
            core, volume.root, first, (stop + BLOCK_BYTES - 1) // BLOCK_BYTES - first, entries, trouble
        )
        if result < 0:
            _unlock(core)
            return result
        epoch = core.epoch
        __atomic_add_fetch(&core.readers[epoch], 1, __ATOMIC_SEQ_CST)
        __atomic_add_fetch(&volume.readers, 1, __ATOMIC_SEQ_CST)
        _unlock(core)
        result = _read_entries(core, volume, entries, first, data + (at - offset), at, stop, cached, trouble)
        __atomic_add_fetch(&core.readers[epoch], -1, __ATOMIC_SEQ_CST)
        __atomic_add_fetch(&volume.readers, -1, __ATOMIC_SEQ_CST)
        at = stop
    return result


# Writing

cdef bint _overlaps(CoreState *core, VolumeState *volume, uint64_t first, uint64_t last) noexcept nogil:
    cdef uint64_t left = core.active
    cdef Operation *operation
    while left:
        operation = &core.operations[__builtin_ctzll(left)]
        if operation.volume == volume and operation.first <= last and first <= operation.last:
            return True
        left &= left - 1
    return False


cdef int _begin(
    CoreState *core, VolumeState *volume, uint64_t size_bytes, uint64_t offset, Trouble *trouble
) noexcept nogil:
    """Go through the gate with a range. Returns the operation's number with the mutex held, or fails without it."""
    cdef uint64_t first = offset // BLOCK_BYTES
    cdef uint64_t last = (offset + size_bytes - 1) // BLOCK_BYTES
    cdef int number
    _lock(core)
    while True:
        if core.failed:
            number = _trouble(trouble, STOPPED, core.failed, 0)
        elif not volume.attached:
            number = _trouble(trouble, DETACHED, 0, 0)
        elif not volume.writable:
            number = _trouble(trouble, NOT_WRITABLE, 0, 0)
        elif offset + size_bytes > volume.size_bytes:
            number = _trouble(trouble, OUT_OF_RANGE, 0, offset)
        else:
            number = 0
        if number < 0:
            _unlock(core)
            return number
        if volume.gate == 0 and ~core.active and not _overlaps(core, volume, first, last):
            break
        pthread_cond_wait(&core.changed, &core.pages.lock)
    number = __builtin_ctzll(~core.active)
    core.active |= <uint64_t> 1 << number
    core.operations[number].volume = volume
    core.operations[number].first = first
    core.operations[number].last = last
    volume.inside += 1
    pages_trim(core.pages)
    return number


cdef void _end(CoreState *core, VolumeState *volume, int number) noexcept nogil:
    """Leave; the mutex is held before and not after."""
    core.active &= ~(<uint64_t> 1 << number)
    volume.inside -= 1
    pthread_cond_broadcast(&core.changed)
    _unlock(core)


cdef int _take_targets(
    CoreState *core, VolumeState *volume, const bint *own, uint64_t *targets, uint64_t count, Trouble *trouble
) noexcept nogil:
    """Hold a new block for each position that is not the volume's own."""
    cdef uint64_t i = 0
    cdef uint64_t want, got, block, j
    while i < count:
        if own[i]:
            i += 1
            continue
        want = 1
        while i + want < count and not own[i + want]:
            want += 1
        block = _take(core, volume, want, &got)
        if block == 0:
            _take_back(core, own, targets, i)
            return _trouble(trouble, LIMIT_REACHED, 0, core.limit_blocks)
        for j in range(got):
            targets[i + j] = block + j
        i += got
    return 0


cdef int _write_edge(
    CoreState *core, VolumeState *volume, const uint64_t *old, uint64_t target, bint own, uint64_t position,
    const uint8_t *data, uint64_t start, uint64_t end, Trouble *trouble
) noexcept nogil:
    """Write bytes `start` to `end` of one block: in place, or into a new block with the rest of the old one."""
    cdef uint8_t block[BLOCK_BYTES]
    cdef uint64_t whole = min(<uint64_t> BLOCK_BYTES, volume.size_bytes - position * BLOCK_BYTES)
    cdef int code
    cdef int result
    if own:
        code = _put(core, core.data, data, end - start, target * BLOCK_BYTES + start)
    else:
        memset(block, 0, BLOCK_BYTES)
        result = _read_entries(
            core, volume, old, position, block, position * BLOCK_BYTES, position * BLOCK_BYTES + whole, False, trouble
        )
        if result < 0:
            return result
        memcpy(block + start, data, end - start)
        code = _put(core, core.data, block, BLOCK_BYTES, target * BLOCK_BYTES)
    return _trouble(trouble, WRITE_FAILED, code, target * BLOCK_BYTES) if code else 0


cdef int _write_blocks(
    CoreState *core, VolumeState *volume, const uint64_t *old, const uint64_t *targets, const bint *own,
    uint64_t first, const uint8_t *data, uint64_t start, uint64_t end, Trouble *trouble
) noexcept nogil:
    """Write bytes `start` to `end` of a volume to the blocks that were chosen for them."""
    cdef uint64_t at = start
    cdef uint64_t i, count, stop
    cdef int code
    cdef int result
    while at < end:
        i = at // BLOCK_BYTES - first
        stop = min(end, (at // BLOCK_BYTES + 1) * BLOCK_BYTES)
        if stop - at < BLOCK_BYTES:
            result = _write_edge(
                core, volume, old + i, targets[i], own[i], first + i, data + (at - start), at % BLOCK_BYTES,
                at % BLOCK_BYTES + (stop - at), trouble,
            )
            if result < 0:
                return result
            at = stop
            continue
        count = 1
        while at + (count + 1) * BLOCK_BYTES <= end and targets[i + count] == targets[i] + count:
            count += 1
        code = _put(core, core.data, data + (at - start), count * BLOCK_BYTES, targets[i] * BLOCK_BYTES)
        if code:
            return _trouble(trouble, WRITE_FAILED, code, targets[i] * BLOCK_BYTES)
        at += count * BLOCK_BYTES
    return 0


cdef int _map_targets(
    CoreState *core, VolumeState *volume, const uint64_t *old, const uint64_t *targets, const bint *own,
    uint64_t first, uint64_t count, Trouble *trouble
) noexcept nogil:
    """Change the tree to the new blocks and log it. What fails is given back, what was done stays and is logged."""
    cdef Numbers freed
    cdef uint64_t i = 0
    cdef uint64_t run, j
    cdef int result = 0
    memset(&freed, 0, sizeof(freed))
    while i < count:
        if own[i]:
            i += 1
            continue
        run = 1
        while (
            i + run < count and not own[i + run] and targets[i + run] == targets[i] + run
            and (first + i + run) & (FAN_OUT - 1)
        ):
            run += 1
        if result == 0:
            result = tree_set(
                core.pages, &volume.root, volume.parent, 0, first + i, <uint32_t> run, targets[i], 1, &freed
            )
            if result < 0:
                result = _map_trouble(core, trouble)
        if result < 0:
            _give_back(core, targets[i], run)
        else:
            for j in range(run):
                _use(core, targets[i + j])
                if old[i + j] > LOST:
                    volume.stirred = 1
            _log_map(core, volume.version, first + i, run, targets[i])
        i += run
    numbers_free(&freed)
    return result


cdef int _write_part(
    CoreState *core, VolumeState *volume, const uint8_t *data, uint64_t start, uint64_t end, Trouble *trouble
) noexcept nogil:
    """Write a part of at most PART_BLOCKS; the mutex is held before and after."""
    cdef uint64_t old[PART_BLOCKS]
    cdef uint64_t beside[PART_BLOCKS]
    cdef bint own[PART_BLOCKS]
    cdef uint64_t first = start // BLOCK_BYTES
    cdef uint64_t count = (end + BLOCK_BYTES - 1) // BLOCK_BYTES - first
    cdef uint64_t *targets = beside
    cdef uint64_t new_blocks = 0
    cdef uint64_t i
    cdef int result
    result = _look_up(core, volume.root, first, count, old, trouble)
    if result == 0:
        result = _look_up(core, volume.parent, first, count, beside, trouble)
    if result < 0:
        return result
    for i in range(count):
        own[i] = old[i] > LOST and old[i] != beside[i]
        targets[i] = old[i]
        new_blocks += not own[i]
    if new_blocks:
        result = _log_room(core, new_blocks * RECORD_BYTES, core.log_reserve)
        if result < 0:
            return _trouble(trouble, result, 0, 0)
        result = _take_targets(core, volume, own, targets, count, trouble)
        if result < 0:
            return result
    _unlock(core)
    result = _write_blocks(core, volume, old, targets, own, first, data, start, end, trouble)
    _lock(core)
    core.data_written = 1
    if result < 0:
        _take_back(core, own, targets, count)
        return result
    if new_blocks:
        # The buffer was taken by a commit perhaps, and its memory with it.
        result = _log_room(core, new_blocks * RECORD_BYTES, 0)
        if result < 0:
            _take_back(core, own, targets, count)
            return _trouble(trouble, result, 0, 0)
        result = _map_targets(core, volume, old, targets, own, first, count, trouble)
        if result == 0 and new_blocks <= SMALL_WRITE_BLOCKS:
            _make_ready(core, volume)
    return result


cdef void _make_ready(CoreState *core, VolumeState *volume) noexcept nogil:
    """After a small write that took new blocks: write zeros to those that the next ones will take, if its like goes on.

    A sync that makes the host's file system allocate costs several times one that does not, and who flushed between two
    takes is likely to do so again. The mutex is held before and after, and let go in between; what the write itself
    needs of the host it has by now.
    """
    cdef uint64_t before = volume.taken_at
    cdef uint64_t first
    cdef uint64_t count = 0
    cdef int code
    volume.taken_at = core.commits + 1
    if before == 0 or before == volume.taken_at or volume.ready_count or volume.preparing:
        return
    if core.limit_blocks and core.used_count + core.held_count + READY_BLOCKS >= core.limit_blocks:
        return
    first = _take(core, volume, READY_BLOCKS, &count)
    if first == 0:
        return
    volume.preparing = 1
    _unlock(core)
    code = _put(core, core.data, ZEROS, count * BLOCK_BYTES, first * BLOCK_BYTES)
    _lock(core)
    volume.preparing = 0
    if code or not volume.attached:
        _let_go(core, first, count)
        return
    core.data_written = 1
    volume.ready_first = first
    volume.ready_count = count


cdef int volume_write(
    CoreState *core, VolumeState *volume, const uint8_t *data, uint64_t size_bytes, uint64_t offset, Trouble *trouble
) noexcept nogil:
    cdef uint64_t at = offset
    cdef uint64_t end = offset + size_bytes
    cdef uint64_t stop
    cdef int number
    cdef int result = 0
    if size_bytes == 0:
        return 0
    number = _begin(core, volume, size_bytes, offset, trouble)
    if number < 0:
        return number
    while at < end and result == 0:
        stop = min(end, (at // BLOCK_BYTES + PART_BLOCKS) * BLOCK_BYTES)
        result = _write_part(core, volume, data + (at - offset), at, stop, trouble)
        at = stop
    _end(core, volume, number)
    return result


cdef int _zero_edge(
    CoreState *core, VolumeState *volume, uint64_t start, uint64_t end, Trouble *trouble
) noexcept nogil:
    """Zeros for a part of one block, unless it is zero already; the mutex is held before and after."""
    cdef uint64_t entry
    cdef int result = _look_up(core, volume.root, start // BLOCK_BYTES, 1, &entry, trouble)
    if result < 0:
        return result
    if entry == ZERO or (entry == ABSENT and volume.backing == NO_BACKING):
        return 0
    return _write_part(core, volume, ZEROS, start, end, trouble)


cdef int _zero_blocks(
    CoreState *core, VolumeState *volume, uint64_t first, uint64_t last, Trouble *trouble
) noexcept nogil:
    """Drop whole blocks; the mutex is held before and after, and let go in between."""
    cdef Numbers freed
    cdef uint64_t at = first
    cdef uint64_t before
    cdef uint64_t entry = ABSENT if volume.backing == NO_BACKING else ZERO
    cdef int result = 0
    while at < last:
        memset(&freed, 0, sizeof(freed))
        result = _log_room(core, RECORD_BYTES, core.log_reserve)
        if result < 0:
            return _trouble(trouble, result, 0, 0)
        # A step frees 128 * 128 blocks at most.
        result = numbers_reserve(&core.freed, 4 * FAN_OUT * FAN_OUT)
        if result < 0:
            return _trouble(trouble, result, 0, 0)
        before = at
        result = tree_fill(core.pages, &volume.root, volume.parent, &at, last, entry, &freed)
        if result < 0:
            result = _map_trouble(core, trouble)
            numbers_free(&freed)
            return result
        _free_blocks(core, freed.items, freed.count)
        numbers_free(&freed)
        _log_map(core, volume.version, before, at - before, entry)
        volume.stirred = 1
        _unlock(core)
        _lock(core)
        pages_trim(core.pages)
    return 0


cdef int volume_zero(
    CoreState *core, VolumeState *volume, uint64_t size_bytes, uint64_t offset, Trouble *trouble
) noexcept nogil:
    cdef uint64_t end = offset + size_bytes
    cdef uint64_t first = (offset + BLOCK_BYTES - 1) // BLOCK_BYTES
    cdef uint64_t last = end // BLOCK_BYTES
    cdef int number
    cdef int result = 0
    if size_bytes == 0:
        return 0
    number = _begin(core, volume, size_bytes, offset, trouble)
    if number < 0:
        return number
    # The last block of a disk is whole, however short.
    if end == volume.size_bytes:
        last = (end + BLOCK_BYTES - 1) // BLOCK_BYTES
    if first > last:
        result = _zero_edge(core, volume, offset, end, trouble)
    else:
        if offset < first * BLOCK_BYTES:
            result = _zero_edge(core, volume, offset, first * BLOCK_BYTES, trouble)
        if result == 0 and last * BLOCK_BYTES < end:
            result = _zero_edge(core, volume, last * BLOCK_BYTES, end, trouble)
        if result == 0:
            result = _zero_blocks(core, volume, first, last, trouble)
    _end(core, volume, number)
    return result


# Python

class LogFull(Failure):
    """A checkpoint must come first."""


cdef enum:
    SECTOR_EMPTY = 0
    SECTOR_VALID = 1
    SECTOR_DAMAGED = 2


def read_sectors(const uint8_t[::1] data not None, uint64_t seed):
    cdef int64_t count = data.shape[0] // SECTOR_BYTES
    cdef const uint8_t *sector
    cdef int64_t i
    cdef int j
    cdef uint64_t any_bits
    out = np.zeros((count, 5), dtype=np.int64)
    cdef int64_t[:, ::1] view = out
    if data.shape[0] % SECTOR_BYTES:
        raise ValueError("not a whole number of sectors")
    with nogil:
        for i in range(count):
            sector = &data[i * SECTOR_BYTES]
            if (<const uint64_t *> sector)[0] == xxh64_of(sector + 8, SECTOR_BYTES - 8, seed):
                view[i, 0] = SECTOR_VALID
            else:
                any_bits = 0
                for j in range(SECTOR_BYTES // 8):
                    any_bits |= (<const uint64_t *> sector)[j]
                view[i, 0] = SECTOR_DAMAGED if any_bits else SECTOR_EMPTY
            view[i, 1] = (<const int64_t *> sector)[1]
            view[i, 2] = (<const uint32_t *> sector)[4]
            view[i, 3] = (<const uint16_t *> sector)[10]
            view[i, 4] = (<const uint16_t *> sector)[11]
    return out


# Freed only when nobody refers to it: the collector would take what `__dealloc__` needs first.
@cython.no_gc_clear
cdef class Core:
    def __cinit__(
        self, Trees page_file, int data, int log, medium, *, uint64_t seed, used, uint64_t end,
        uint64_t limit_blocks, uint64_t log_sectors, uint64_t log_next, uint64_t commit_number, uint64_t space_root,
    ):
        cdef const uint64_t[::1] words = np.ascontiguousarray(used, dtype=np.uint64)
        cdef CoreState *core
        cdef uint64_t i
        if not 16 <= log_sectors <= 1 << 32:
            raise ValueError("a log has 16 to 2 ** 32 sectors")
        if <uint64_t> words.shape[0] * 64 < end:
            raise ValueError("the bitmap of used blocks is too short")
        self.page_file = page_file
        self._medium = medium
        self.core = core = <CoreState *> calloc(1, sizeof(CoreState))
        if core == NULL:
            raise MemoryError
        core.pages = page_file.pages
        pthread_cond_init(&core.changed, NULL)
        core.medium = NULL if medium is None else <void *> medium
        core.data = data
        core.log = log
        core.seed = seed
        core.end = end
        core.limit_blocks = limit_blocks
        core.space_root = space_root
        core.log_sectors = log_sectors
        core.log_reserve = log_sectors // 8
        core.log_next = core.log_tail = log_next
        core.commit_number = commit_number
        if _grow_space(core, max(<uint64_t> words.shape[0] * 64, <uint64_t> PIECE_BLOCKS)) < 0:
            raise MemoryError
        if words.shape[0]:
            memcpy(core.used, &words[0], words.shape[0] * 8)
        for i in range(<uint64_t> words.shape[0]):
            core.used_count += __builtin_popcountll(core.used[i])

    def __dealloc__(self):
        if self.core == NULL:
            return
        free(self.core.used)
        free(self.core.held)
        free(self.core.pieces_changed)
        free(self.core.buffer)
        numbers_free(&self.core.freed)
        numbers_free(&self.core.freed_durable)
        pthread_cond_destroy(&self.core.changed)
        free(self.core)

    cdef int check(self, Trouble *trouble, int result) except -1:
        if result >= 0:
            return 0
        if result == NO_MEMORY:
            raise MemoryError
        raise (LogFull if result == LOG_FULL else Failure)(trouble.result, trouble.code, trouble.where)

    cdef uint64_t _peek(self, const uint64_t *number):
        """A number as others leave it."""
        cdef uint64_t found
        with nogil:
            _lock(self.core)
            found = number[0]
            _unlock(self.core)
        return found

    @property
    def failed(self):
        cdef int code
        with nogil:
            _lock(self.core)
            code = self.core.failed
            _unlock(self.core)
        return code

    @property
    def used_blocks(self):
        return self._peek(&self.core.used_count)

    @property
    def held_blocks(self):
        return self._peek(&self.core.held_count)

    @property
    def end_blocks(self):
        return self._peek(&self.core.end)

    @property
    def space_root(self):
        return self._peek(&self.core.space_root)

    @property
    def commits(self):
        return self._peek(&self.core.commits)

    @property
    def log_next(self):
        return self._peek(&self.core.log_next)

    @property
    def commit_number(self):
        return self._peek(&self.core.commit_number)

    @property
    def log_free_sectors(self):
        cdef uint64_t free_sectors
        with nogil:
            _lock(self.core)
            free_sectors = self.core.log_sectors - (self.core.log_next - self.core.log_tail)
            _unlock(self.core)
        return free_sectors

    @property
    def pending_bytes(self):
        return self._peek(&self.core.buffer_bytes)

    @property
    def reclaimable(self):
        return self._peek(&self.core.freed_durable.count) > 0

    @property
    def limit_blocks(self):
        return self.core.limit_blocks

    @limit_blocks.setter
    def limit_blocks(self, uint64_t blocks):
        with nogil:
            _lock(self.core)
        self.core.limit_blocks = blocks
        _unlock(self.core)

    def stop(self, int code):
        with nogil:
            _lock(self.core)
            if self.core.failed == 0:
                self.core.failed = code
            pthread_cond_broadcast(&self.core.changed)
            _unlock(self.core)

    def close(self):
        cdef int i
        with nogil:
            _lock(self.core)
            self.core.closed = 1
            if self.core.failed == 0:
                self.core.failed = ESHUTDOWN
            pthread_cond_broadcast(&self.core.changed)
            while self.core.committing or self.core.reclaiming or _detach_all(self.core):
                pthread_cond_wait(&self.core.changed, &self.core.pages.lock)
            _unlock(self.core)
            for i in range(2):
                while __atomic_load_n(&self.core.readers[i], __ATOMIC_SEQ_CST):
                    snapcore_pause()

    def append_event(self, const uint8_t[::1] payload not None):
        cdef uint64_t padded = (payload.shape[0] + 7) // 8 * 8
        cdef uint8_t *at
        cdef Trouble trouble
        cdef int result
        memset(&trouble, 0, sizeof(trouble))
        with nogil:
            _lock(self.core)
            result = _log_room(self.core, 8 + padded, 0)
            if self.core.failed:
                result = STOPPED
                trouble.code = self.core.failed
            if result == 0:
                at = self.core.buffer + self.core.buffer_bytes
                (<uint32_t *> at)[0] = RECORD_EVENT
                (<uint32_t *> at)[1] = <uint32_t> payload.shape[0]
                memset(at + 8, 0, padded)
                if payload.shape[0]:
                    memcpy(at + 8, &payload[0], payload.shape[0])
                self.core.buffer_bytes += 8 + padded
                # No MAP record joins one that stands before this.
                self.core.last_record = self.core.buffer_bytes
            _unlock(self.core)
        trouble.result = result
        self.check(&trouble, result)

    def commit(self):
        cdef Trouble trouble
        cdef int result
        memset(&trouble, 0, sizeof(trouble))
        with nogil:
            result = core_commit(self.core, &trouble)
        self.check(&trouble, result)

    def freeze(self):
        cdef Trouble trouble
        cdef Numbers dirty
        cdef Numbers slots
        cdef uint64_t generation = self.core.pages.generation
        cdef int result
        memset(&trouble, 0, sizeof(trouble))
        memset(&dirty, 0, sizeof(dirty))
        memset(&slots, 0, sizeof(slots))
        with nogil:
            result = _commit(self.core, True, &dirty, &slots, &trouble)
        try:
            self.check(&trouble, result)
            return (
                generation, numbers_array(&dirty), numbers_array(&slots), self.core.frozen_log_next,
                self.core.frozen_commit, self.core.frozen_end, self.core.frozen_space_root,
            )
        finally:
            numbers_free(&dirty)
            numbers_free(&slots)

    def release(self, uint64_t log_tail):
        self.page_file.release()
        with nogil:
            _lock(self.core)
            self.core.log_tail = log_tail
            _unlock(self.core)

    def reclaim(self):
        cdef int code
        with nogil:
            code = _reclaim(self.core)
        return code

    def free_blocks(self, const uint64_t[::1] blocks not None):
        cdef int result = 0
        if blocks.shape[0]:
            with nogil:
                _lock(self.core)
                result = _free_blocks(self.core, &blocks[0], blocks.shape[0])
                _unlock(self.core)
        if result < 0:
            raise MemoryError

    def rewrite_space(self):
        with nogil:
            _lock(self.core)
            memset(self.core.pieces_changed, 1, self.core.capacity // PIECE_BLOCKS)
            _unlock(self.core)

    def settle_freed(self):
        cdef int result
        with nogil:
            _lock(self.core)
            result = _settle_freed(self.core)
            _unlock(self.core)
        if result < 0:
            raise MemoryError

    def used_bitmap(self):
        cdef uint64_t[::1] view
        cdef uint64_t words = 0
        # Made without the mutex: the collector may free a volume then, which takes it.
        while words != self._peek(&self.core.capacity) // 64:
            words = self._peek(&self.core.capacity) // 64
            out = np.zeros(words, dtype=np.uint64)
            view = out
            with nogil:
                _lock(self.core)
                if words == self.core.capacity // 64:
                    memcpy(&view[0], self.core.used, words * 8)
                else:
                    words = 0
                _unlock(self.core)
        return out

    def close_gates(self, volumes):
        cdef Volume volume
        for volume in volumes:
            with nogil:
                _lock(self.core)
                volume.volume.gate += 1
                _unlock(self.core)
        for volume in volumes:
            with nogil:
                _lock(self.core)
                while volume.volume.inside:
                    pthread_cond_wait(&self.core.changed, &self.core.pages.lock)
                _unlock(self.core)

    def open_gates(self, volumes):
        cdef Volume volume
        for volume in volumes:
            with nogil:
                _lock(self.core)
                volume.volume.gate -= 1
                pthread_cond_broadcast(&self.core.changed)
                _unlock(self.core)

    def replay(self, Volume volume not None, uint64_t position, uint64_t count, uint64_t entry):
        cdef int result
        with nogil:
            _lock(self.core)
            pages_trim(self.core.pages)
            result = _replay(self.core, volume.volume, position, count, entry)
            _unlock(self.core)
        if result == NO_MEMORY:
            raise MemoryError
        if result < 0:
            raise Failure(result, self.core.pages.code, self.core.pages.slot if result > LOG_FULL else position)


cdef int _replay(
    CoreState *core, VolumeState *volume, uint64_t position, uint64_t count, uint64_t entry
) noexcept nogil:
    """Do a MAP record again."""
    cdef uint64_t at = position
    cdef uint64_t last = position + count
    cdef uint64_t part, block, i
    cdef unsigned long long data_bytes = 0
    cdef long long mtime_ns = 0
    cdef Numbers freed
    cdef int result = 0
    memset(&freed, 0, sizeof(freed))
    if last > (volume.size_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES:
        return OUT_OF_RANGE
    if entry > LOST:
        if entry >= MAX_BLOCKS or entry + count > MAX_BLOCKS or entry < FIRST_BLOCK:
            return BLOCK_OUTSIDE
        # What a record tells of was in the file before it. Memory for the bitmap follows the file, not the record.
        if snapcore_status(core.data, &data_bytes, &mtime_ns) or (entry + count) * BLOCK_BYTES > data_bytes:
            return BLOCK_OUTSIDE
        if _grow_space(core, entry + count) < 0:
            return NO_MEMORY
        for block in range(entry, entry + count):
            if _bit(core.used, block):
                return BLOCK_OUTSIDE
    volume.stirred = 1
    while at < last and result == 0:
        freed.count = 0
        if entry > LOST:
            part = min(last - at, <uint64_t> FAN_OUT - (at & (FAN_OUT - 1)))
            result = tree_set(
                core.pages, &volume.root, volume.parent, 0, at, <uint32_t> part, entry + (at - position), 1, &freed
            )
            if result == 0:
                for i in range(part):
                    block = entry + (at - position) + i
                    if not _bit(core.held, block):
                        core.held[block >> 6] |= <uint64_t> 1 << (block & 63)
                        core.held_count += 1
                    _use(core, block)
                core.end = max(core.end, entry + count)
            at += part
        else:
            result = tree_fill(core.pages, &volume.root, volume.parent, &at, last, entry, &freed)
        if result == 0:
            result = _free_blocks(core, freed.items, freed.count)
    numbers_free(&freed)
    return result


# Freed only when nobody refers to it: the collector would take what `__dealloc__` needs first.
@cython.no_gc_clear
cdef class Volume:
    def __cinit__(
        self, Core core not None, *, uint64_t root, uint64_t parent, uint64_t size_bytes, uint32_t version,
        bint writable, bint watched=False, int backing=NO_BACKING, uint64_t backing_bytes=0, int64_t backing_mtime_ns=0,
    ):
        if size_bytes > MAX_SIZE_BYTES:
            raise ValueError("a volume has at most 128 TiB")
        self.core = core
        self.volume = <VolumeState *> calloc(1, sizeof(VolumeState))
        if self.volume == NULL:
            raise MemoryError
        self.volume.root = root
        self.volume.parent = parent
        self.volume.size_bytes = size_bytes
        self.volume.version = version
        self.volume.writable = writable
        self.volume.watched = watched
        self.volume.backing = backing
        self.volume.backing_bytes = backing_bytes
        self.volume.backing_mtime_ns = backing_mtime_ns
        with nogil:
            _lock(core.core)
        self.volume.attached = not core.core.closed
        self.volume.next = core.core.volumes
        core.core.volumes = self.volume
        _unlock(core.core)

    def __dealloc__(self):
        if self.volume != NULL:
            self._unlink()
            free(self.volume)

    cdef void _unlink(self):
        cdef VolumeState **link
        with nogil:
            _lock(self.core.core)
        link = &self.core.core.volumes
        while link[0] != NULL and link[0] != self.volume:
            link = &link[0].next
        if link[0] != NULL:
            link[0] = self.volume.next
            _let_go_ready(self.core.core, self.volume)
        _unlock(self.core.core)

    def detach(self):
        with nogil:
            _lock(self.core.core)
            self.volume.attached = 0
            pthread_cond_broadcast(&self.core.core.changed)
            while self.volume.inside:
                pthread_cond_wait(&self.core.core.changed, &self.core.core.pages.lock)
            _unlock(self.core.core)
            while __atomic_load_n(&self.volume.readers, __ATOMIC_SEQ_CST):
                snapcore_pause()

    @property
    def root(self):
        return self.volume.root

    @property
    def parent(self):
        return self.volume.parent

    @property
    def frozen_root(self):
        return self.volume.frozen_root

    @property
    def size_bytes(self):
        return load_size(&self.volume.size_bytes, __ATOMIC_SEQ_CST)

    @property
    def version(self):
        return self.volume.version

    @property
    def attached(self):
        return bool(self.volume.attached)

    def take_stirred(self):
        cdef bint stirred
        with nogil:
            _lock(self.core.core)
            stirred = self.volume.stirred and self.volume.watched
            self.volume.stirred = 0
            _unlock(self.core.core)
        return stirred

    def change(self, *, uint64_t root, uint64_t parent, uint64_t size_bytes, uint32_t version, bint watched):
        if size_bytes > MAX_SIZE_BYTES:
            raise ValueError("a volume has at most 128 TiB")
        with nogil:
            _lock(self.core.core)
            self.volume.root = root
            self.volume.parent = parent
            store_size(&self.volume.size_bytes, size_bytes, __ATOMIC_SEQ_CST)
            self.volume.version = version
            self.volume.watched = watched
            _unlock(self.core.core)

    def change_backing(self, int backing, uint64_t backing_bytes, int64_t backing_mtime_ns):
        with nogil:
            _lock(self.core.core)
            self.volume.backing = backing
            self.volume.backing_bytes = backing_bytes
            self.volume.backing_mtime_ns = backing_mtime_ns
            _unlock(self.core.core)

    def pread_into(self, buffer, int64_t offset):
        # A buffer and not a typed memoryview, which takes as long to make as the read.
        cdef Trouble trouble
        cdef Py_buffer view
        cdef uint64_t size_bytes, whole
        cdef int result = 0
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            size_bytes = <uint64_t> view.len
            if offset < 0:
                result = _trouble(&trouble, OUT_OF_RANGE, 0, 0)
            else:
                whole = load_size(&self.volume.size_bytes, __ATOMIC_SEQ_CST)
                size_bytes = min(size_bytes, whole - min(whole, <uint64_t> offset))
            if result == 0 and size_bytes:
                with nogil:
                    result = volume_read(
                        self.core.core, self.volume, <uint8_t *> view.buf, size_bytes, <uint64_t> offset, False,
                        &trouble,
                    )
        finally:
            PyBuffer_Release(&view)
        if result < 0:
            self.core.check(&trouble, result)
        return size_bytes

    def pread_many(self, const int64_t[::1] offsets not None, uint8_t[:, ::1] buffers not None):
        cdef Trouble trouble
        cdef int result = 0
        cdef int64_t i
        if buffers.shape[0] != offsets.shape[0]:
            raise ValueError(f"{offsets.shape[0]} offsets and {buffers.shape[0]} buffers")
        if offsets.shape[0] and buffers.shape[1]:
            with nogil:
                for i in range(offsets.shape[0]):
                    if offsets[i] < 0 or <uint64_t> offsets[i] > MAX_SIZE_BYTES:
                        result = _trouble(&trouble, OUT_OF_RANGE, 0, offsets[i])
                    else:
                        result = volume_read(
                            self.core.core, self.volume, &buffers[i, 0], buffers.shape[1], offsets[i], False, &trouble
                        )
                    if result < 0:
                        break
            if result < 0:
                self.core.check(&trouble, result)
        return offsets.shape[0] * buffers.shape[1]

    def pwrite(self, data, int64_t offset):
        cdef Trouble trouble
        cdef Py_buffer view
        cdef uint64_t size_bytes
        cdef int result = 0
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            size_bytes = <uint64_t> view.len
            if offset < 0 or <uint64_t> offset > MAX_SIZE_BYTES or size_bytes > MAX_SIZE_BYTES:
                result = _trouble(&trouble, OUT_OF_RANGE, 0, 0 if offset < 0 else <uint64_t> offset)
            elif size_bytes:
                with nogil:
                    result = volume_write(
                        self.core.core, self.volume, <const uint8_t *> view.buf, size_bytes, <uint64_t> offset, &trouble
                    )
        finally:
            PyBuffer_Release(&view)
        if result < 0:
            self.core.check(&trouble, result)
        return size_bytes

    def zero(self, int64_t offset, int64_t size_bytes):
        cdef Trouble trouble
        cdef int result
        if not 0 <= offset <= <int64_t> MAX_SIZE_BYTES or not 0 <= size_bytes <= <int64_t> MAX_SIZE_BYTES:
            raise Failure(OUT_OF_RANGE, 0, max(0, offset))
        with nogil:
            result = volume_zero(self.core.core, self.volume, size_bytes, offset, &trouble)
        if result < 0:
            self.core.check(&trouble, result)
