"""The transmission phase of the NBD protocol for one connection (doc/proto.md of NetworkBlockDevice/nbd).

| request | who answers |
| --- | --- |
| READ of cached data, WRITE without FUA, BLOCK_STATUS | the connection's thread, at once; answers leave together |
| everything else, and these over a file that may stall: it may wait for a medium | a worker of the connection |

One thread receives. Workers are made when they are needed. Nothing is allocated for a length that was not checked.
A request that takes too long is *given up*: answered with EIO by `expire`, while its worker still waits; what a write
that was given up might still change is refused to everybody until it has ended. Rules of the design: docs/DESIGN.md
("The NBD server").
"""

import os
import stat

from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, ENOMEM, ENOSPC, EPERM, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memmove, memset
from posix.types cimport off_t
from posix.unistd cimport pread, pwrite

from snapcore.blockmap cimport ZERO, Runs, tree_difference, tree_runs
from snapcore.core cimport (
    BLOCK_BYTES, DETACHED, LIMIT_REACHED, LOG_FULL, NOT_WRITABLE, OUT_OF_RANGE, WOULD_WAIT, WRITE_FAILED, Trouble,
    pthread_cond_t,
)
from snapcore.log cimport log_commit
from snapcore.pages cimport (
    NO_SPACE, Pages, pages_trim, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock,
)
from snapcore.volume cimport Volume, volume_read, volume_write, volume_zero

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **memory, size_t alignment, size_t size)

cdef extern from "<pthread.h>" nogil:
    int pthread_cond_init(pthread_cond_t *condition, const void *attributes)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
    int pthread_cond_broadcast(pthread_cond_t *condition)
    int pthread_cond_signal(pthread_cond_t *condition)
    int pthread_mutex_trylock(pthread_mutex_t *mutex)
    int pthread_cond_destroy(pthread_cond_t *condition)
    int pthread_create(pthread_t *thread, const void *attributes, void *(*start)(void *) noexcept nogil, void *argument)
    int pthread_join(pthread_t thread, void **result)

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <sched.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/socket.h>
    #include <sys/time.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>
    #if defined(__linux__)
    #include <sys/vfs.h>
    #endif

    #ifndef MSG_NOSIGNAL
    #define MSG_NOSIGNAL 0
    #endif

    static ssize_t snapcore_receive(int descriptor, void *data, size_t length) {
        return recv(descriptor, data, length, 0);
    }
    static ssize_t snapcore_send(int descriptor, const void *data, size_t length) {
        return send(descriptor, data, length, MSG_NOSIGNAL);
    }
    static ssize_t snapcore_send_now(int descriptor, const void *data, size_t length) {
        return send(descriptor, data, length, MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    static int snapcore_has_come(int descriptor) {
        char first;
        return recv(descriptor, &first, 1, MSG_PEEK | MSG_DONTWAIT) != -1 || (errno != EAGAIN && errno != EINTR);
    }
    static void snapcore_cut_off(int descriptor) { shutdown(descriptor, SHUT_RDWR); }
    static uint64_t snapcore_now_ns(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (uint64_t) now.tv_sec * 1000000000u + (uint64_t) now.tv_nsec;
    }
    /* Of a Unix socket: with less, who sends a long answer sleeps while the client takes the first part of it. */
    static void snapcore_set_room(int descriptor, int bytes) {
        struct sockaddr_storage name;
        socklen_t length = sizeof name;
        if (getsockname(descriptor, (struct sockaddr *) &name, &length) == 0 && name.ss_family == AF_UNIX)
            setsockopt(descriptor, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    }
    static void snapcore_hang_up(int descriptor) { shutdown(descriptor, SHUT_RD); }
    static int snapcore_set_idle(int descriptor, double seconds) {
        struct timeval time;
        time.tv_sec = (time_t) seconds;
        time.tv_usec = (suseconds_t) ((seconds - (double) time.tv_sec) * 1e6);
        return setsockopt(descriptor, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time) ? errno : 0;
    }
    #if defined(__linux__)
    static int snapcore_file_sync(int descriptor) { return fdatasync(descriptor) ? errno : 0; }
    static int snapcore_file_punch(int descriptor, off_t offset, off_t length) {
        return fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) ? errno : 0;
    }
    /* File systems of this machine's own disks and memory: no network, no process stands behind them. */
    static int snapcore_is_local(int descriptor) {
        struct statfs found;
        if (fstatfs(descriptor, &found))
            return 0;
        switch ((unsigned long) found.f_type & 0xffffffffu) {
        case 0xef53: case 0x58465342: case 0x9123683e: case 0x01021994: case 0xf2f52010: case 0x2fc12fc1:
            return 1;
        }
        return 0;
    }
    static ssize_t snapcore_file_cached(int descriptor, void *data, size_t length, off_t offset) {
        struct iovec part = {data, length};
        return preadv2(descriptor, &part, 1, offset, RWF_NOWAIT);
    }
    #else
    static int snapcore_file_sync(int descriptor) { return fsync(descriptor) ? errno : 0; }
    static int snapcore_file_punch(int descriptor, off_t offset, off_t length) { return EOPNOTSUPP; }
    static int snapcore_is_local(int descriptor) { return 0; }
    static ssize_t snapcore_file_cached(int descriptor, void *data, size_t length, off_t offset) { return -1; }
    #endif
    static off_t snapcore_next_data(int descriptor, off_t offset) { return lseek(descriptor, offset, SEEK_DATA); }
    static off_t snapcore_next_hole(int descriptor, off_t offset) { return lseek(descriptor, offset, SEEK_HOLE); }
    /* Answers lie at any place: stored by memcpy, which is one instruction. */
    static void snapcore_put_16(uint8_t *out, uint16_t x) { x = __builtin_bswap16(x); memcpy(out, &x, 2); }
    static void snapcore_put_32(uint8_t *out, uint32_t x) { x = __builtin_bswap32(x); memcpy(out, &x, 4); }
    static void snapcore_put_64(uint8_t *out, uint64_t x) { x = __builtin_bswap64(x); memcpy(out, &x, 8); }
    #define snapcore_16(x) __builtin_bswap16(x)
    #define snapcore_32(x) __builtin_bswap32(x)
    #define snapcore_64(x) __builtin_bswap64(x)
    """
    ssize_t snapcore_receive(int descriptor, void *data, size_t length) noexcept nogil
    ssize_t snapcore_send(int descriptor, const void *data, size_t length) noexcept nogil
    ssize_t snapcore_send_now(int descriptor, const void *data, size_t length) noexcept nogil
    int snapcore_has_come(int descriptor) noexcept nogil
    int sched_yield() noexcept nogil
    void snapcore_cut_off(int descriptor) noexcept nogil
    uint64_t snapcore_now_ns() noexcept nogil
    int snapcore_is_local(int descriptor) noexcept nogil
    void snapcore_set_room(int descriptor, int bytes) noexcept nogil
    void snapcore_hang_up(int descriptor) noexcept nogil
    int snapcore_set_idle(int descriptor, double seconds) noexcept nogil
    int snapcore_file_sync(int descriptor) noexcept nogil
    int snapcore_file_punch(int descriptor, off_t offset, off_t length) noexcept nogil
    ssize_t snapcore_file_cached(int descriptor, void *data, size_t length, off_t offset) noexcept nogil
    off_t snapcore_next_data(int descriptor, off_t offset) noexcept nogil
    off_t snapcore_next_hole(int descriptor, off_t offset) noexcept nogil
    void snapcore_put_16(uint8_t *out, uint16_t value) noexcept nogil
    void snapcore_put_32(uint8_t *out, uint32_t value) noexcept nogil
    void snapcore_put_64(uint8_t *out, uint64_t value) noexcept nogil
    uint16_t snapcore_16(uint16_t value) noexcept nogil
    uint32_t snapcore_32(uint32_t value) noexcept nogil
    uint64_t snapcore_64(uint64_t value) noexcept nogil
    uint64_t count_up "__atomic_add_fetch"(uint64_t *target, uint64_t value, int order) noexcept nogil
    uint64_t load_count "__atomic_load_n"(uint64_t *target, int order) noexcept nogil
    void store_count "__atomic_store_n"(uint64_t *target, uint64_t value, int order) noexcept nogil
    int add_to "__atomic_add_fetch"(int *target, int value, int order) noexcept nogil
    int load_flag "__atomic_load_n"(int *target, int order) noexcept nogil
    void store_flag "__atomic_store_n"(int *target, int value, int order) noexcept nogil
    int __ATOMIC_SEQ_CST
    int EOVERFLOW
    int ENXIO
    int ESHUTDOWN
    int EOPNOTSUPP

cdef enum:
    REQUEST_BYTES = 28
    EXTENDED_REQUEST_BYTES = 32
    SIMPLE_REPLY_BYTES = 16
    CHUNK_BYTES = 20
    EXTENDED_CHUNK_BYTES = 32
    INBOX_BYTES = 1 << 17
    OUTBOX_BYTES = 1 << 19
    MAX_LENGTH = 1 << 25
    MAX_JOB_BYTES = 1 << 26
    MAX_EXTENTS = 1024
    # How long to look for what comes before sleeping.
    LOOK_OUT_NS = 50000
    # From here on a read's data has pages of its own.
    LONG_BYTES = 1 << 15
    # A longer read is answered in parts: that bounds memory. Smaller parts cost the client more than they save here.
    READ_PART_BYTES = 1 << 20
    # A longer write is done in parts: the client sends the next one meanwhile.
    WRITE_PART_BYTES = 1 << 20
    # Of a map, that one block status walks: then the answer is shorter than what was asked for.
    MAX_SLICES = 64
    SLICE_RUNS = 512
    # As volumes have it that read from no image.
    NO_BACKING = -1

cdef enum:
    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    FLAG_FUA = 1
    FLAG_NO_HOLE = 2
    FLAG_DF = 4
    FLAG_REQ_ONE = 8
    FLAG_FAST_ZERO = 16
    FLAG_PAYLOAD = 32
    CHUNK_DONE = 1
    CHUNK_NONE = 0
    CHUNK_OFFSET_DATA = 1
    CHUNK_BLOCK_STATUS = 5
    CHUNK_BLOCK_STATUS_EXTENDED = 6
    CHUNK_ERROR = 0x8001
    STATE_HOLE = 1
    STATE_ZERO = 2
    STATE_CHANGED = 1

cdef uint32_t REQUEST_MAGIC = 0x25609513
cdef uint32_t EXTENDED_REQUEST_MAGIC = 0x21E41C71
cdef uint32_t SIMPLE_REPLY_MAGIC = 0x67446698
cdef uint32_t CHUNK_MAGIC = 0x668E33EF
cdef uint32_t EXTENDED_CHUNK_MAGIC = 0x6E8A278C
cdef uint8_t[BLOCK_BYTES * 16] ZEROS
memset(ZEROS, 0, sizeof(ZEROS))

# Why a connection ended.
cdef enum:
    GOING_ON = 0
    DISCONNECTED = 1
    VANISHED = 2
    STOPPED = 3
    IDLE = 4
    BAD_MAGIC = 5
    TOO_LONG = 6
    NO_MEMORY_LEFT = 7
    BAD_PAYLOAD = 8

_REASONS = {
    DISCONNECTED: "disconnected",
    VANISHED: "vanished",
    STOPPED: "stopped",
    IDLE: "idle",
    BAD_MAGIC: "it sent a request without the magic number",
    TOO_LONG: "it sent a write of more than 32 MiB",
    NO_MEMORY_LEFT: "there was no memory for a request",
    BAD_PAYLOAD: "it sent data with a request that has none",
}


# The export

cdef int _error_of(const Trouble *trouble) noexcept nogil:
    """The NBD error of a failure."""
    if trouble.result in (LIMIT_REACHED, NO_SPACE, LOG_FULL):
        return ENOSPC
    if trouble.result == WRITE_FAILED and trouble.code == ENOSPC:
        return ENOSPC
    if trouble.result == OUT_OF_RANGE:
        return EINVAL
    if trouble.result == NOT_WRITABLE:
        return EPERM
    if trouble.result == DETACHED:
        return 108
    if trouble.result == -1:
        return ENOMEM
    return EIO


cdef bint _make_room(ExportState *target, const Trouble *trouble) noexcept with gil:
    """Ask Python for room after a write that found none."""
    if target.make_room == NULL:
        return False
    try:
        return bool((<object> target.make_room)(trouble.result, trouble.code))
    except BaseException:
        return False


cdef bint _again(ExportState *target, const Trouble *trouble, int *tries) noexcept nogil:
    tries[0] += 1
    if tries[0] > 8 or trouble.result not in (LOG_FULL, LIMIT_REACHED, WRITE_FAILED, NO_SPACE):
        return False
    return _make_room(target, trouble)


cdef int _read(ExportState *target, uint8_t *data, uint64_t length, uint64_t offset, bint cached) noexcept nogil:
    """0, an NBD error, or -1: it would have to wait."""
    cdef Trouble trouble
    cdef uint64_t done = 0
    cdef ssize_t part
    if target.volume != NULL:
        if volume_read(target.core, target.volume, data, length, offset, cached, &trouble) == 0:
            return 0
        return -1 if trouble.result == WOULD_WAIT else _error_of(&trouble)
    while done < length:
        if cached:
            part = snapcore_file_cached(target.descriptor, data + done, length - done, <off_t> (offset + done))
            if part <= 0:
                return -1
        else:
            part = pread(target.descriptor, data + done, length - done, <off_t> (offset + done))
            if part < 0 and errno == EINTR:
                continue
            if part <= 0:
                return EIO
        done += part
    return 0


cdef int _write(ExportState *target, const uint8_t *data, uint64_t length, uint64_t offset) noexcept nogil:
    cdef Trouble trouble
    cdef uint64_t done = 0
    cdef ssize_t part
    cdef int tries = 0
    if target.volume != NULL:
        while volume_write(target.core, target.volume, data, length, offset, &trouble) < 0:
            if not _again(target, &trouble, &tries):
                return _error_of(&trouble)
        return 0
    while done < length:
        part = pwrite(target.descriptor, data + done, length - done, <off_t> (offset + done))
        if part < 0 and errno == EINTR:
            continue
        if part <= 0:
            return ENOSPC if part < 0 and errno == ENOSPC else EIO
        done += part
    return 0


cdef int _write_zeros(ExportState *target, uint64_t length, uint64_t offset, uint64_t *since_ns) noexcept nogil:
    """Zeros that take space."""
    cdef uint64_t part
    cdef int code
    while length:
        part = min(length, <uint64_t> sizeof(ZEROS))
        code = _write(target, ZEROS, part, offset)
        if code:
            return code
        offset += part
        length -= part
        store_count(since_ns, snapcore_now_ns(), __ATOMIC_SEQ_CST)
    return 0


cdef int _zero(ExportState *target, uint64_t length, uint64_t offset, uint64_t *since_ns) noexcept nogil:
    cdef Trouble trouble
    cdef int tries = 0
    cdef int code
    if target.volume == NULL:
        code = snapcore_file_punch(target.descriptor, <off_t> offset, <off_t> length)
        return _write_zeros(target, length, offset, since_ns) if code == EOPNOTSUPP else (EIO if code else 0)
    while volume_zero(target.core, target.volume, length, offset, &trouble) < 0:
        if not _again(target, &trouble, &tries):
            return _error_of(&trouble)
    return 0


cdef int _flush(ExportState *target) noexcept nogil:
    cdef Trouble trouble
    cdef int tries = 0
    if target.volume == NULL:
        return EIO if snapcore_file_sync(target.descriptor) else 0
    while log_commit(target.core, &trouble) < 0:
        if not _again(target, &trouble, &tries):
            return _error_of(&trouble)
    return 0


# Answers

cdef uint32_t _header(
    ConnectionState *connection, uint8_t *out, const Request *request, uint16_t kind, uint16_t flags, uint64_t length
) noexcept nogil:
    """A chunk's header."""
    snapcore_put_32(out, EXTENDED_CHUNK_MAGIC if connection.extended else CHUNK_MAGIC)
    snapcore_put_16(out + 4, flags)
    snapcore_put_16(out + 6, kind)
    memcpy(out + 8, &request.cookie, 8)
    if connection.extended:
        snapcore_put_64(out + 16, request.offset)
        snapcore_put_64(out + 24, length)
        return EXTENDED_CHUNK_BYTES
    snapcore_put_32(out + 16, <uint32_t> length)
    return CHUNK_BYTES


cdef uint32_t _outcome(ConnectionState *connection, uint8_t *out, const Request *request, int code) noexcept nogil:
    """The whole answer of a request without data: at most 40 bytes."""
    cdef uint32_t size_bytes
    if connection.extended or (connection.structured and code and request.kind in (READ, BLOCK_STATUS)):
        if code == 0:
            return _header(connection, out, request, CHUNK_NONE, CHUNK_DONE, 0)
        size_bytes = _header(connection, out, request, CHUNK_ERROR, CHUNK_DONE, 6)
        snapcore_put_32(out + size_bytes, <uint32_t> code)
        snapcore_put_16(out + size_bytes + 4, 0)
        return size_bytes + 6
    snapcore_put_32(out, SIMPLE_REPLY_MAGIC)
    snapcore_put_32(out + 4, <uint32_t> code)
    memcpy(out + 8, &request.cookie, 8)
    return SIMPLE_REPLY_BYTES


cdef inline uint64_t _part_of(ConnectionState *connection, const Request *request) noexcept nogil:
    """How much of a read is answered next: all, where the answer must be one piece."""
    cdef uint64_t left = request.length - request.done
    if request.flags & FLAG_DF or not (connection.structured or connection.extended):
        return left
    return min(left, <uint64_t> READ_PART_BYTES)


cdef uint32_t _before_data(
    ConnectionState *connection, uint8_t *out, const Request *request, uint64_t part
) noexcept nogil:
    """What stands before data of a read: at most 40 bytes."""
    cdef uint32_t size_bytes
    cdef uint16_t flags = CHUNK_DONE if request.done + part == request.length else 0
    if not connection.structured and not connection.extended:
        return _outcome(connection, out, request, 0)
    size_bytes = _header(connection, out, request, CHUNK_OFFSET_DATA, flags, 8 + part)
    snapcore_put_64(out + size_bytes, request.offset + request.done)
    return size_bytes + 8


cdef void _send_all(ConnectionState *connection, const uint8_t *data, uint64_t size_bytes) noexcept nogil:
    """Send all of it, `sending` being held. A client that is gone is noted."""
    cdef uint64_t done = 0
    cdef ssize_t part
    while done < size_bytes and not load_flag(&connection.broken, __ATOMIC_SEQ_CST):
        part = snapcore_send(connection.descriptor, data + done, size_bytes - done)
        if part < 0 and errno == EINTR:
            continue
        if part <= 0:
            store_flag(&connection.broken, 1, __ATOMIC_SEQ_CST)
            snapcore_hang_up(connection.descriptor)
            break
        done += part


cdef bint _send_for(
    ConnectionState *connection, Job *job, const uint8_t *before, uint64_t before_bytes, const uint8_t *data,
    uint64_t size_bytes, bint is_last
) noexcept nogil:
    """Send a part of a job's answer; False when the job was given up meanwhile, and nothing more is to be said."""
    pthread_mutex_lock(&connection.sending)
    if job.given_up:
        pthread_mutex_unlock(&connection.sending)
        return False
    # Counted before the client can have it.
    if is_last:
        count_up(&connection.answered, 1, __ATOMIC_SEQ_CST)
    _send_all(connection, before, before_bytes)
    _send_all(connection, data, size_bytes)
    job.answered = is_last
    pthread_mutex_unlock(&connection.sending)
    return True


cdef void _send_outbox(ConnectionState *connection) noexcept nogil:
    if connection.outbox.bytes:
        pthread_mutex_lock(&connection.sending)
        _send_all(connection, connection.outbox.data, connection.outbox.bytes)
        pthread_mutex_unlock(&connection.sending)
        connection.outbox.bytes = 0


cdef uint8_t *_grown(Outbox *box, uint64_t size_bytes) noexcept nogil:
    """Where so many bytes go; NULL without memory."""
    cdef uint8_t *data
    if box.bytes + size_bytes > box.capacity:
        data = <uint8_t *> realloc(box.data, box.bytes + size_bytes)
        if data == NULL:
            return NULL
        box.data = data
        box.capacity = box.bytes + size_bytes
    return box.data + box.bytes


cdef uint8_t *_room(ConnectionState *connection, uint64_t size_bytes) noexcept nogil:
    """Where the next answer goes; NULL without memory."""
    if connection.outbox.bytes and connection.outbox.bytes + size_bytes > OUTBOX_BYTES:
        _send_outbox(connection)
    return _grown(&connection.outbox, size_bytes)


cdef int _answer(ConnectionState *connection, const Request *request, int code) noexcept nogil:
    cdef uint8_t *out = _room(connection, 64)
    if out == NULL:
        return NO_MEMORY_LEFT
    connection.outbox.bytes += _outcome(connection, out, request, code)
    count_up(&connection.answered, 1, __ATOMIC_SEQ_CST)
    return GOING_ON


# Block status

cdef struct Extents:
    uint64_t *items
    uint64_t count
    uint64_t limit


cdef bint _add_extent(Extents *extents, uint64_t length, uint64_t state) noexcept nogil:
    """Add what follows; False when there is no room."""
    if length == 0:
        return True
    if extents.count and extents.items[2 * extents.count - 1] == state:
        extents.items[2 * extents.count - 2] += length
        return True
    if extents.count == extents.limit:
        return False
    extents.items[2 * extents.count] = length
    extents.items[2 * extents.count + 1] = state
    extents.count += 1
    return True


cdef void _add_file(int descriptor, uint64_t start, uint64_t end, Extents *extents) noexcept nogil:
    """Data and holes of a file; what it does not tell is data."""
    cdef uint64_t at = start
    cdef off_t data, hole
    while at < end:
        data = snapcore_next_data(descriptor, <off_t> at)
        if data < 0:
            data = <off_t> end if errno == ENXIO else <off_t> at
        if <uint64_t> data > at:
            if not _add_extent(extents, min(<uint64_t> data, end) - at, STATE_HOLE | STATE_ZERO):
                return
            at = min(<uint64_t> data, end)
            continue
        hole = snapcore_next_hole(descriptor, <off_t> at)
        if hole <= <off_t> at:
            hole = <off_t> end
        if not _add_extent(extents, min(<uint64_t> hole, end) - at, 0):
            return
        at = min(<uint64_t> hole, end)


cdef bint _add_gap(
    ExportState *target, bint allocation, Extents *extents, uint64_t start, uint64_t end
) noexcept nogil:
    """What no run tells of: the image below, or nothing. False when there is no room."""
    cdef uint64_t below = 0
    if start >= end:
        return True
    if not allocation:
        return _add_extent(extents, end - start, 0)
    if target.volume.backing.descriptor != NO_BACKING:
        below = min(max(target.volume.backing.size_bytes, start), end)
        if target.volume.backing.presence == NULL:
            _add_file(target.volume.backing.descriptor, start, below, extents)
        elif below > start and not _add_extent(extents, below - start, 0):
            # A hole of an image that fills up may be what is not here yet.
            return False
        if extents.count == extents.limit:
            return False
        start = max(start, below)
    return _add_extent(extents, end - start, STATE_HOLE | STATE_ZERO)


cdef int _volume_extents(
    ExportState *target, const Context *context, uint64_t start, uint64_t end, Extents *extents
) noexcept nogil:
    """Extents of a range from the trees; may end before it does. Returns an NBD error, or 0."""
    cdef Pages *pages = target.core.pages
    cdef int64_t found[3 * SLICE_RUNS]
    cdef bint allocation = context.base == NULL
    cdef uint64_t at = start
    cdef uint64_t run_start, run_end, last, state, i
    cdef int64_t *run
    cdef Runs runs
    cdef int result
    cdef int slices = 0
    runs.items = found
    runs.limit = min(<uint64_t> SLICE_RUNS, extents.limit + 1)
    runs.width = 3 if allocation else 2
    runs.last = (end + BLOCK_BYTES - 1) // BLOCK_BYTES
    while at < end and slices < MAX_SLICES:
        runs.first = at // BLOCK_BYTES
        runs.resume = runs.last
        runs.count = 0
        runs.pages = 0
        runs.slice_pages = <uint64_t> target.slice_pages[0]
        slices += 1
        pthread_mutex_lock(&pages.lock)
        pages_trim(pages)
        if not target.volume.attached or (context.base != NULL and not context.base.attached):
            result = -1
        elif allocation:
            result = tree_runs(pages, target.volume.root, &runs)
        else:
            result = tree_difference(pages, context.base.root, target.volume.root, &runs)
        pthread_mutex_unlock(&pages.lock)
        if result < 0:
            return EIO
        for i in range(runs.count):
            run = runs.items + i * runs.width
            run_start = max(<uint64_t> run[0] * BLOCK_BYTES, at)
            run_end = min(<uint64_t> (run[0] + run[1]) * BLOCK_BYTES, end)
            if not _add_gap(target, allocation, extents, at, run_start):
                return 0
            if not allocation:
                state = STATE_CHANGED
            else:
                state = STATE_HOLE | STATE_ZERO if run[2] == ZERO else 0
            if not _add_extent(extents, run_end - run_start, state):
                return 0
            at = run_end
        last = min(runs.resume * BLOCK_BYTES, end)
        if last > at:
            if not _add_gap(target, allocation, extents, at, last):
                return 0
            at = last
    return 0


cdef int _status_chunk(
    ConnectionState *connection, const Request *request, const Context *context, bint done, Extents *extents,
    Outbox *box
) noexcept nogil:
    cdef uint64_t width = 16 if connection.extended else 8
    cdef uint64_t head = 8 if connection.extended else 4
    cdef uint8_t *out = _grown(box, 64 + extents.count * width)
    cdef uint16_t kind = CHUNK_BLOCK_STATUS_EXTENDED if connection.extended else CHUNK_BLOCK_STATUS
    cdef uint32_t at
    cdef uint64_t i
    if out == NULL:
        return ENOMEM
    at = _header(connection, out, request, kind, CHUNK_DONE if done else 0, head + extents.count * width)
    snapcore_put_32(out + at, context.id)
    if connection.extended:
        snapcore_put_32(out + at + 4, <uint32_t> extents.count)
    at += <uint32_t> head
    for i in range(2 * extents.count):
        if connection.extended:
            snapcore_put_64(out + at, extents.items[i])
        else:
            snapcore_put_32(out + at, <uint32_t> extents.items[i])
        at += <uint32_t> width // 2
    box.bytes += at
    return 0


cdef int _block_status(ConnectionState *connection, const Request *request, Outbox *box) noexcept nogil:
    """Put the whole answer into a box. Returns an NBD error, which has to follow what is there, or 0."""
    cdef ExportState *target = connection.target
    cdef uint64_t items[2 * MAX_EXTENTS]
    cdef Extents extents
    cdef Context *context
    cdef uint64_t end = request.offset + request.length
    cdef int i
    cdef int code = 0
    for i in range(connection.context_count):
        context = &connection.contexts[i]
        extents.items = items
        extents.count = 0
        extents.limit = 1 if request.flags & FLAG_REQ_ONE else MAX_EXTENTS
        if target.volume != NULL:
            code = _volume_extents(target, context, request.offset, end, &extents)
        else:
            _add_file(target.descriptor, request.offset, end, &extents)
        if code == 0:
            code = _status_chunk(connection, request, context, i == connection.context_count - 1, &extents, box)
        if code:
            return code
    return 0


# What was given up and may still write

cdef pthread_mutex_t _overdue_lock
pthread_mutex_init(&_overdue_lock, NULL)
cdef Job *_overdue = NULL
cdef int _overdue_count = 0


cdef bint _changes(const Request *request) noexcept nogil:
    return request.kind in (WRITE, TRIM, WRITE_ZEROES)


cdef void _begin_overdue(Job *job) noexcept nogil:
    global _overdue
    pthread_mutex_lock(&_overdue_lock)
    job.next_overdue = _overdue
    _overdue = job
    add_to(&_overdue_count, 1, __ATOMIC_SEQ_CST)
    pthread_mutex_unlock(&_overdue_lock)


cdef void _end_overdue(Job *job) noexcept nogil:
    cdef Job **link = &_overdue
    pthread_mutex_lock(&_overdue_lock)
    while link[0] != job:
        link = &link[0].next_overdue
    link[0] = job.next_overdue
    add_to(&_overdue_count, -1, __ATOMIC_SEQ_CST)
    pthread_mutex_unlock(&_overdue_lock)


cdef bint _is_uncertain(const ExportState *target, const Request *request) noexcept nogil:
    """Whether a write that was given up may still change what a request is about."""
    cdef Job *job
    cdef bint found = False
    if load_flag(&_overdue_count, __ATOMIC_SEQ_CST) == 0:
        return False
    pthread_mutex_lock(&_overdue_lock)
    job = _overdue
    while job != NULL and not found:
        found = (
            job.target.id[0] == target.id[0] and job.target.id[1] == target.id[1]
            and job.request.offset < request.offset + request.length
            and request.offset < job.request.offset + job.request.length
        )
        job = job.next_overdue
    pthread_mutex_unlock(&_overdue_lock)
    return found


# Workers

cdef void _read_for(ConnectionState *connection, Job *job, int *code) noexcept nogil:
    """Answer a read part by part."""
    cdef Request *request = &job.request
    cdef uint64_t part = _part_of(connection, request)
    cdef uint8_t before[64]
    cdef uint32_t before_bytes
    cdef void *data = NULL
    cdef bint is_last
    if posix_memalign(&data, BLOCK_BYTES, part):
        code[0] = ENOMEM
        return
    while code[0] == 0 and request.done < request.length:
        part = _part_of(connection, request)
        code[0] = _read(connection.target, <uint8_t *> data, part, request.offset + request.done, False)
        store_count(&job.since_ns, snapcore_now_ns(), __ATOMIC_SEQ_CST)
        if code[0] == 0:
            before_bytes = _before_data(connection, before, request, part)
            is_last = request.done + part == request.length
            if not _send_for(connection, job, before, before_bytes, <uint8_t *> data, part, is_last):
                break
            request.done += part
    free(data)


cdef int _cache(ExportState *target, Job *job) noexcept nogil:
    cdef uint64_t done = 0
    cdef uint64_t part
    cdef int code = 0
    cdef uint8_t *data = <uint8_t *> malloc(1 << 20)
    if data == NULL:
        return ENOMEM
    while done < job.request.length and code == 0:
        part = min(job.request.length - done, <uint64_t> 1 << 20)
        code = _read(target, data, part, job.request.offset + done, False)
        done += part
        store_count(&job.since_ns, snapcore_now_ns(), __ATOMIC_SEQ_CST)
    free(data)
    return code


cdef void _do_job(ConnectionState *connection, Job *job) noexcept nogil:
    """Do a request that may wait, and answer it unless it is given up."""
    cdef ExportState *target = connection.target
    cdef const Request *request = &job.request
    cdef Outbox box
    cdef uint8_t small[64]
    cdef uint32_t size_bytes
    cdef int code = 0
    memset(&box, 0, sizeof(box))
    if request.kind == READ:
        _read_for(connection, job, &code)
        if code == 0:
            return
    elif request.kind == BLOCK_STATUS:
        code = _block_status(connection, request, &box)
        if box.bytes:
            _send_for(connection, job, box.data, box.bytes, NULL, 0, code == 0)
        free(box.data)
        if code == 0:
            return
    elif request.kind == CACHE:
        code = _cache(target, job)
    elif request.kind == WRITE and job.data != NULL:
        code = _write(target, job.data, request.length, request.offset)
    elif request.kind in (TRIM, WRITE_ZEROES):
        if request.flags & FLAG_NO_HOLE and request.kind == WRITE_ZEROES:
            code = _write_zeros(target, request.length, request.offset, &job.since_ns)
        else:
            code = _zero(target, request.length, request.offset, &job.since_ns)
    # A write whose data is not here is written already: what is left of it is FUA.
    if code == 0 and (request.kind == FLUSH or (request.flags & FLAG_FUA and _changes(request))):
        store_count(&job.since_ns, snapcore_now_ns(), __ATOMIC_SEQ_CST)
        code = _flush(target)
    size_bytes = _outcome(connection, small, request, code)
    _send_for(connection, job, small, size_bytes, NULL, 0, True)


cdef uint64_t _memory_of(ConnectionState *connection, const Job *job) noexcept nogil:
    if job.data != NULL:
        return job.request.length
    return _part_of(connection, &job.request) if job.request.kind == READ else 0


cdef void _begin_job(ConnectionState *connection, Job *job) noexcept nogil:
    """Put a job among those under way, and into the queue."""
    job.after = connection.under_way
    job.before = NULL
    if connection.under_way != NULL:
        connection.under_way.before = job
    connection.under_way = job
    if connection.first == NULL:
        connection.first = job
    else:
        connection.last.next = job
    connection.last = job
    connection.queued += 1
    add_to(&connection.jobs, 1, __ATOMIC_SEQ_CST)
    connection.job_bytes += job.memory_bytes


cdef void _end_job(ConnectionState *connection, Job *job) noexcept nogil:
    """A job that is in no queue any more."""
    if job.before == NULL:
        connection.under_way = job.after
    else:
        job.before.after = job.after
    if job.after != NULL:
        job.after.before = job.before
    if job.given_up:
        connection.given_up -= 1
        connection.given_up_bytes -= job.memory_bytes
        if job.running and _changes(&job.request):
            _end_overdue(job)
    else:
        add_to(&connection.jobs, -1, __ATOMIC_SEQ_CST)
    connection.job_bytes -= job.memory_bytes
    free(job.data)
    free(job)
    pthread_cond_broadcast(&connection.ended)


cdef Job *_take_job(ConnectionState *connection) noexcept nogil:
    """The next one that waits; NULL when there is none."""
    cdef Job *job = connection.first
    if job != NULL:
        connection.first = job.next
        connection.queued -= 1
        job.running = 1
    return job


cdef void *_work(void *argument) noexcept nogil:
    cdef ConnectionState *connection = <ConnectionState *> argument
    cdef Job *job
    pthread_mutex_lock(&connection.lock)
    while True:
        while connection.first == NULL and not connection.closing:
            connection.idle_workers += 1
            pthread_cond_wait(&connection.work, &connection.lock)
            connection.idle_workers -= 1
        job = _take_job(connection)
        if job == NULL:
            break
        pthread_mutex_unlock(&connection.lock)
        _do_job(connection, job)
        pthread_mutex_lock(&connection.lock)
        _end_job(connection, job)
    pthread_mutex_unlock(&connection.lock)
    return NULL


cdef bint _is_full(ConnectionState *connection, uint64_t memory_bytes) noexcept nogil:
    return connection.jobs >= MAX_JOBS or (
        connection.jobs and connection.job_bytes + memory_bytes > MAX_JOB_BYTES
    )


cdef bint _is_stuck(ConnectionState *connection, uint64_t memory_bytes) noexcept nogil:
    """Whether what was given up leaves neither a worker nor memory."""
    return connection.given_up >= MAX_WORKERS or (
        connection.given_up and connection.given_up_bytes + memory_bytes > MAX_JOB_BYTES
    )


cdef int _hand_over(ConnectionState *connection, const Request *request, uint8_t *data) noexcept nogil:
    """Give a request, and the data of a write, to a worker; waits while there are too many."""
    cdef Job *job = <Job *> calloc(1, sizeof(Job))
    cdef uint64_t memory_bytes
    if job == NULL:
        free(data)
        return _answer(connection, request, ENOMEM)
    job.request = request[0]
    job.data = data
    job.target = connection.target
    job.memory_bytes = memory_bytes = _memory_of(connection, job)
    pthread_mutex_lock(&connection.lock)
    while _is_full(connection, memory_bytes) and not _is_stuck(connection, memory_bytes):
        pthread_mutex_unlock(&connection.lock)
        _send_outbox(connection)
        pthread_mutex_lock(&connection.lock)
        if _is_full(connection, memory_bytes) and not _is_stuck(connection, memory_bytes):
            pthread_cond_wait(&connection.ended, &connection.lock)
    if _is_stuck(connection, memory_bytes):
        pthread_mutex_unlock(&connection.lock)
        free(data)
        free(job)
        return _answer(connection, request, EIO)
    job.since_ns = snapcore_now_ns()
    _begin_job(connection, job)
    if connection.idle_workers < connection.queued and connection.worker_count < MAX_WORKERS:
        if pthread_create(&connection.workers[connection.worker_count], NULL, _work, connection) == 0:
            connection.worker_count += 1
    if connection.worker_count == 0:
        # Without a thread it is done here.
        _take_job(connection)
        pthread_mutex_unlock(&connection.lock)
        _send_outbox(connection)
        _do_job(connection, job)
        pthread_mutex_lock(&connection.lock)
        _end_job(connection, job)
    else:
        pthread_cond_signal(&connection.work)
    pthread_mutex_unlock(&connection.lock)
    return GOING_ON


cdef bint _give_up(ConnectionState *connection, Job *job) noexcept nogil:
    """Answer a job with EIO in its worker's place; False when it is not to be, or not now."""
    cdef uint8_t small[64]
    cdef uint32_t size_bytes
    cdef ssize_t part
    if pthread_mutex_trylock(&connection.sending):
        return False
    if job.answered or job.given_up:
        pthread_mutex_unlock(&connection.sending)
        return False
    # Before the client hears of it: from then on it may ask for the same place again.
    if job.running and _changes(&job.request):
        _begin_overdue(job)
    job.given_up = 1
    if not load_flag(&connection.broken, __ATOMIC_SEQ_CST):
        size_bytes = _outcome(connection, small, &job.request, EIO)
        part = snapcore_send_now(connection.descriptor, small, size_bytes)
        if part < 0 and errno in (EAGAIN, EINTR):
            # The client does not take its answers: it is not waiting for this one.
            job.given_up = 0
            if job.running and _changes(&job.request):
                _end_overdue(job)
        elif part < <ssize_t> size_bytes:
            store_flag(&connection.broken, 1, __ATOMIC_SEQ_CST)
            snapcore_hang_up(connection.descriptor)
    pthread_mutex_unlock(&connection.sending)
    return job.given_up


cdef void _drop_from_queue(ConnectionState *connection, Job *job) noexcept nogil:
    cdef Job *before = connection.first
    if before == job:
        connection.first = job.next
    else:
        while before.next != job:
            before = before.next
        before.next = job.next
        if connection.last == job:
            connection.last = before
    connection.queued -= 1


cdef int _expire(ConnectionState *connection, uint64_t limit_ns) noexcept nogil:
    """Give up what is under way for longer. Returns how many."""
    cdef uint64_t now_ns = snapcore_now_ns()
    cdef uint64_t since_ns
    cdef Job *job
    cdef Job *after
    cdef int count = 0
    pthread_mutex_lock(&connection.lock)
    job = connection.under_way
    while job != NULL:
        after = job.after
        since_ns = load_count(&job.since_ns, __ATOMIC_SEQ_CST)
        if now_ns > since_ns and now_ns - since_ns >= limit_ns and _give_up(connection, job):
            count += 1
            count_up(&connection.answered, 1, __ATOMIC_SEQ_CST)
            add_to(&connection.jobs, -1, __ATOMIC_SEQ_CST)
            connection.given_up += 1
            connection.given_up_bytes += job.memory_bytes
            if not job.running:
                _drop_from_queue(connection, job)
                _end_job(connection, job)
        job = after
    if count:
        pthread_cond_broadcast(&connection.ended)
    pthread_mutex_unlock(&connection.lock)
    return count


# Requests

cdef void _look_out(ConnectionState *connection) noexcept nogil:
    """Look for the next request for a moment before sleeping: to be woken takes longer than the client's next thought.

    Others who want this processor have it meanwhile. What found nothing is tried again after twice as many waits.
    """
    cdef uint64_t until_ns
    if connection.sleeps:
        connection.sleeps -= 1
        return
    until_ns = snapcore_now_ns() + LOOK_OUT_NS
    while snapcore_now_ns() < until_ns:
        if snapcore_has_come(connection.descriptor):
            connection.lookouts_failed = 0
            return
        sched_yield()
    connection.lookouts_failed = min(connection.lookouts_failed + 1, 10)
    connection.sleeps = (1 << connection.lookouts_failed) - 1


cdef int _receive(
    ConnectionState *connection, uint8_t *data, uint64_t least, uint64_t most, uint64_t *got
) noexcept nogil:
    """Receive at least so many bytes."""
    cdef ssize_t part
    got[0] = 0
    while got[0] < least:
        _look_out(connection)
        part = snapcore_receive(connection.descriptor, data + got[0], most - got[0])
        if part < 0:
            if errno == EINTR:
                continue
            if errno != EAGAIN:
                return VANISHED
            # Who waits for an answer is not idle.
            if load_flag(&connection.jobs, __ATOMIC_SEQ_CST):
                continue
            return IDLE
        if part == 0:
            return STOPPED if load_flag(&connection.stopping, __ATOMIC_SEQ_CST) else VANISHED
        got[0] += part
    return GOING_ON


cdef int _fetch(ConnectionState *connection, uint64_t size_bytes) noexcept nogil:
    """Have so many bytes in the inbox, at most INBOX_BYTES. Answers leave before anything is waited for."""
    cdef uint64_t have = connection.inbox_end - connection.inbox_start
    cdef uint64_t got = 0
    cdef int ended
    if have >= size_bytes:
        return GOING_ON
    _send_outbox(connection)
    memmove(connection.inbox, connection.inbox + connection.inbox_start, have)
    connection.inbox_start = 0
    connection.inbox_end = have
    ended = _receive(
        connection, connection.inbox + have, size_bytes - have,
        size_bytes - have if connection.streaming else INBOX_BYTES - have, &got,
    )
    connection.inbox_end += got
    return ended


cdef bint _have_payload(ConnectionState *connection, uint64_t length) noexcept nogil:
    """Memory for so much data, that begins with a page."""
    cdef void *data = NULL
    if length <= connection.payload_capacity:
        return True
    free(connection.payload)
    connection.payload = NULL
    connection.payload_capacity = 0
    if posix_memalign(&data, BLOCK_BYTES, length):
        return False
    connection.payload = <uint8_t *> data
    connection.payload_capacity = length
    return True


cdef int _payload(ConnectionState *connection, uint64_t length, const uint8_t **data) noexcept nogil:
    """The data of a write, which is in the inbox or is received into memory of its own."""
    cdef uint64_t have = connection.inbox_end - connection.inbox_start
    cdef uint64_t got = 0
    cdef int ended
    if length <= INBOX_BYTES // 2:
        ended = _fetch(connection, length)
        data[0] = connection.inbox + connection.inbox_start
        connection.inbox_start += length
        return ended
    if not _have_payload(connection, length):
        return NO_MEMORY_LEFT
    have = min(have, length)
    memcpy(connection.payload, connection.inbox + connection.inbox_start, have)
    connection.inbox_start += have
    data[0] = connection.payload
    if have < length:
        _send_outbox(connection)
        return _receive(connection, connection.payload + have, length - have, length - have, &got)
    return GOING_ON


cdef int _read_long(ConnectionState *connection, Request *request) noexcept nogil:
    """Answer a long read: data has pages of its own, from where and to where the kernel copies faster."""
    cdef uint8_t before[64]
    cdef uint64_t part
    cdef uint32_t size_bytes
    cdef int code
    while request.done < request.length:
        part = _part_of(connection, request)
        if not _have_payload(connection, part):
            return _hand_over(connection, request, NULL)
        code = _read(connection.target, connection.payload, part, request.offset + request.done, True)
        if code < 0:
            return _hand_over(connection, request, NULL)
        if code:
            return _answer(connection, request, code)
        size_bytes = _before_data(connection, before, request, part)
        request.done += part
        if request.done == request.length:
            count_up(&connection.answered, 1, __ATOMIC_SEQ_CST)
        pthread_mutex_lock(&connection.sending)
        if connection.outbox.bytes:
            _send_all(connection, connection.outbox.data, connection.outbox.bytes)
            connection.outbox.bytes = 0
        _send_all(connection, before, size_bytes)
        _send_all(connection, connection.payload, part)
        pthread_mutex_unlock(&connection.sending)
    return GOING_ON


cdef int _read_request(ConnectionState *connection, Request *request) noexcept nogil:
    cdef uint8_t *out
    cdef uint32_t before
    cdef int code
    if request.length > MAX_LENGTH:
        return _answer(connection, request, EOVERFLOW if request.flags & FLAG_DF else EINVAL)
    if request.length >= LONG_BYTES:
        return _read_long(connection, request)
    out = _room(connection, 64 + request.length)
    if out == NULL:
        return _answer(connection, request, ENOMEM)
    before = _before_data(connection, out, request, request.length)
    code = _read(connection.target, out + before, request.length, request.offset, True)
    if code < 0:
        return _hand_over(connection, request, NULL)
    if code:
        return _answer(connection, request, code)
    connection.outbox.bytes += before + request.length
    count_up(&connection.answered, 1, __ATOMIC_SEQ_CST)
    return GOING_ON


cdef uint8_t *_taken(ConnectionState *connection, const uint8_t *data, uint64_t length) noexcept nogil:
    """The data of a write, for a job to keep; NULL without memory."""
    cdef uint8_t *copy
    if data == connection.payload:
        copy = connection.payload
        connection.payload = NULL
        connection.payload_capacity = 0
        return copy
    copy = <uint8_t *> malloc(length)
    if copy != NULL:
        memcpy(copy, data, length)
    return copy


cdef bint _may_stall(const ExportState *target, uint64_t offset, uint64_t length) noexcept nogil:
    """Whether a write may wait for more than room in the page cache."""
    if target.volume == NULL:
        return not target.quick
    # The rest of a block comes from the image below.
    return target.volume.backing.descriptor != NO_BACKING and (offset % BLOCK_BYTES or length % BLOCK_BYTES)


cdef int _write_later(ConnectionState *connection, const Request *request) noexcept nogil:
    """Take the data of a write and give both to a worker."""
    cdef const uint8_t *data = NULL
    cdef uint8_t *kept
    cdef int ended = _payload(connection, request.length, &data)
    if ended:
        return ended
    kept = _taken(connection, data, request.length)
    if kept == NULL:
        return _answer(connection, request, ENOMEM)
    return _hand_over(connection, request, kept)


cdef int _write_request(ConnectionState *connection, const Request *request, int code) noexcept nogil:
    """Write, or refuse with a code; in either case the data comes first."""
    cdef const uint8_t *data = NULL
    cdef uint64_t done = 0
    cdef uint64_t part
    cdef int ended
    if request.length > MAX_LENGTH:
        return TOO_LONG
    if code == 0 and _may_stall(connection.target, request.offset, request.length):
        return _write_later(connection, request)
    connection.streaming = request.length >= INBOX_BYTES
    while done < request.length:
        part = min(request.length - done, <uint64_t> WRITE_PART_BYTES)
        ended = _payload(connection, part, &data)
        if ended:
            return ended
        if code == 0:
            code = _write(connection.target, data, part, request.offset + done)
        done += part
    if code == 0 and request.flags & FLAG_FUA:
        return _hand_over(connection, request, NULL)
    return _answer(connection, request, code)


cdef int _status_request(ConnectionState *connection, const Request *request) noexcept nogil:
    cdef ExportState *target = connection.target
    cdef int code
    if connection.context_count == 0:
        return _answer(connection, request, EINVAL)
    if target.volume.backing.descriptor != NO_BACKING if target.volume != NULL else not target.quick:
        return _hand_over(connection, request, NULL)
    if connection.outbox.bytes > OUTBOX_BYTES // 2:
        _send_outbox(connection)
    code = _block_status(connection, request, &connection.outbox)
    if code:
        return _answer(connection, request, code)
    count_up(&connection.answered, 1, __ATOMIC_SEQ_CST)
    return GOING_ON


cdef uint16_t _known_flags(ConnectionState *connection, const Request *request) noexcept nogil:
    """Those that mean something with a command. FUA is legal with all, and means something where there is a write."""
    if request.kind == READ and connection.structured:
        return FLAG_FUA | FLAG_DF
    if request.kind == WRITE and connection.extended:
        return FLAG_FUA | FLAG_PAYLOAD
    if request.kind == WRITE_ZEROES and connection.target.volume != NULL:
        return FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST_ZERO
    if request.kind == WRITE_ZEROES:
        # A file system may have to write: fast zeros are not announced.
        return FLAG_FUA | FLAG_NO_HOLE
    if request.kind == BLOCK_STATUS:
        return FLAG_FUA | FLAG_REQ_ONE
    return FLAG_FUA


cdef int _refusal(ConnectionState *connection, const Request *request) noexcept nogil:
    """The NBD error of what cannot be, or 0."""
    cdef ExportState *target = connection.target
    cdef uint64_t size_bytes = target.size_bytes
    if request.flags & ~_known_flags(connection, request) or request.kind > BLOCK_STATUS:
        return EINVAL
    if request.kind == FLUSH:
        return 0
    if _changes(request) and not target.writable:
        return EPERM
    if target.volume != NULL:
        size_bytes = load_count(&target.volume.size_bytes, __ATOMIC_SEQ_CST)
    if request.length == 0 and request.kind != WRITE:
        return EINVAL
    if request.length == 0 or request.offset > size_bytes or request.length > size_bytes - request.offset:
        return ENOSPC if request.kind in (WRITE, WRITE_ZEROES) else EINVAL
    if _is_uncertain(target, request):
        return EIO
    return 0


cdef int _one_request(ConnectionState *connection, Request *request) noexcept nogil:
    cdef int code
    if request.kind == DISCONNECT:
        return DISCONNECTED
    code = _refusal(connection, request)
    if request.kind == WRITE:
        return _write_request(connection, request, code)
    if request.flags & FLAG_PAYLOAD and connection.extended:
        return BAD_PAYLOAD
    if code:
        return _answer(connection, request, code)
    if request.kind == READ:
        return _read_request(connection, request)
    if request.kind == BLOCK_STATUS:
        return _status_request(connection, request)
    if request.kind == WRITE_ZEROES and request.flags & FLAG_FAST_ZERO and request.flags & FLAG_NO_HOLE:
        return _answer(connection, request, EOPNOTSUPP)
    return _hand_over(connection, request, NULL)


cdef int _serve(ConnectionState *connection) noexcept nogil:
    cdef uint64_t head_bytes = EXTENDED_REQUEST_BYTES if connection.extended else REQUEST_BYTES
    cdef uint32_t magic = EXTENDED_REQUEST_MAGIC if connection.extended else REQUEST_MAGIC
    cdef const uint8_t *head
    cdef Request request
    cdef uint32_t small
    cdef int ended
    while True:
        if load_flag(&connection.stopping, __ATOMIC_SEQ_CST):
            return STOPPED
        if load_flag(&connection.broken, __ATOMIC_SEQ_CST):
            return VANISHED
        ended = _fetch(connection, head_bytes)
        if ended:
            return ended
        head = connection.inbox + connection.inbox_start
        memcpy(&small, head, 4)
        if snapcore_32(small) != magic:
            return BAD_MAGIC
        memcpy(&request.flags, head + 4, 2)
        memcpy(&request.kind, head + 6, 2)
        memcpy(&request.cookie, head + 8, 8)
        memcpy(&request.offset, head + 16, 8)
        if connection.extended:
            memcpy(&request.length, head + 24, 8)
            request.length = snapcore_64(request.length)
        else:
            memcpy(&small, head + 24, 4)
            request.length = snapcore_32(small)
        request.flags = snapcore_16(request.flags)
        request.kind = snapcore_16(request.kind)
        request.offset = snapcore_64(request.offset)
        request.done = 0
        connection.inbox_start += head_bytes
        ended = _one_request(connection, &request)
        if ended:
            return ended


cdef void _finish(ConnectionState *connection) noexcept nogil:
    """Let workers end what they have, and send what is left. Who waits for what was given up hears the end first."""
    cdef int i
    cdef bint is_cut = False
    _send_outbox(connection)
    pthread_mutex_lock(&connection.lock)
    connection.closing = 1
    pthread_cond_broadcast(&connection.work)
    while connection.under_way != NULL:
        if connection.jobs == 0 and not is_cut:
            snapcore_cut_off(connection.descriptor)
            is_cut = True
        pthread_cond_wait(&connection.ended, &connection.lock)
    pthread_mutex_unlock(&connection.lock)
    for i in range(connection.worker_count):
        pthread_join(connection.workers[i], NULL)
    connection.worker_count = 0


# Python

cdef class Export:
    def __cinit__(
        self, Volume volume, int descriptor, uint64_t size_bytes, *, bint writable, make_room=None,
    ):
        self.volume = volume
        self._make_room = make_room
        self.target = <ExportState *> calloc(1, sizeof(ExportState))
        if self.target == NULL:
            raise MemoryError
        if volume is not None:
            self.target.core = volume.core.core
            self.target.slice_pages = &volume.core.page_file.slice_pages
            self.target.volume = volume.volume
            self.target.id[0] = <uint64_t> <size_t> <void *> volume.volume
        else:
            status = os.fstat(descriptor)
            is_device = stat.S_ISBLK(status.st_mode)
            self.target.id[0] = status.st_rdev if is_device else status.st_dev
            # The number of a device and that of a file system's device do not meet.
            self.target.id[1] = 0 if is_device else status.st_ino
            self.target.quick = snapcore_is_local(descriptor) and not is_device
        self.target.descriptor = descriptor
        self.target.size_bytes = size_bytes
        self.target.writable = writable
        self.target.make_room = NULL if make_room is None else <void *> make_room

    def __dealloc__(self):
        free(self.target)


cdef class Connection:
    def __cinit__(
        self, int descriptor, Export export not None, *, bint structured, bint extended, contexts=(), double idle_s=0,
    ):
        cdef ConnectionState *connection
        cdef Volume base
        self.export = export
        self._bases = [*contexts]
        if len(self._bases) > MAX_CONTEXTS:
            raise ValueError(f"a connection has at most {MAX_CONTEXTS} meta contexts")
        if not 0 <= idle_s < 1e9:
            raise ValueError("idle_s is 0 or a number of seconds")
        self.connection = connection = <ConnectionState *> calloc(1, sizeof(ConnectionState))
        if connection == NULL:
            raise MemoryError
        pthread_mutex_init(&connection.lock, NULL)
        pthread_mutex_init(&connection.sending, NULL)
        pthread_cond_init(&connection.work, NULL)
        pthread_cond_init(&connection.ended, NULL)
        connection.descriptor = descriptor
        connection.target = export.target
        connection.structured = structured
        connection.extended = extended
        for number, found in self._bases:
            base = found
            connection.contexts[connection.context_count].id = number
            if base is not None:
                if export.volume is None or base.core is not export.volume.core:
                    raise ValueError("a context's snapshot is of the export's pool")
                connection.contexts[connection.context_count].base = base.volume
            connection.context_count += 1
        connection.inbox = <uint8_t *> malloc(INBOX_BYTES)
        if connection.inbox == NULL:
            raise MemoryError
        # Enough for a part; what the system does not allow is not needed.
        snapcore_set_room(descriptor, READ_PART_BYTES)
        if idle_s and snapcore_set_idle(descriptor, idle_s):
            raise OSError("the socket takes no time limit")

    def __dealloc__(self):
        if self.connection == NULL:
            return
        free(self.connection.inbox)
        free(self.connection.outbox.data)
        free(self.connection.payload)
        pthread_cond_destroy(&self.connection.ended)
        pthread_cond_destroy(&self.connection.work)
        pthread_mutex_destroy(&self.connection.sending)
        pthread_mutex_destroy(&self.connection.lock)
        free(self.connection)

    def serve(self):
        cdef int ended
        with nogil:
            ended = _serve(self.connection)
            _finish(self.connection)
        return _REASONS[ended]

    def expire(self, double limit_s):
        cdef uint64_t limit_ns
        cdef int count
        if not 0 <= limit_s < 1e9:
            raise ValueError("limit_s is a number of seconds")
        limit_ns = <uint64_t> (limit_s * 1e9)
        with nogil:
            count = _expire(self.connection, limit_ns)
        return count

    def stop(self):
        store_flag(&self.connection.stopping, 1, __ATOMIC_SEQ_CST)
        snapcore_hang_up(self.connection.descriptor)

    @property
    def requests(self):
        return load_count(&self.connection.answered, __ATOMIC_SEQ_CST)
