"""The transmission phase of the NBD protocol for one connection (doc/proto.md of NetworkBlockDevice/nbd).

| request | who answers |
| --- | --- |
| READ of cached data, WRITE without FUA, BLOCK_STATUS | the connection's thread, at once; answers leave together |
| everything else: it may wait for a medium | a worker of the connection |

One thread receives. Workers are made when they are needed, eight at most. Nothing is allocated for a length that was
not checked. Rules of the design: docs/DESIGN.md ("The NBD server").
"""

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

cdef extern from "<pthread.h>" nogil:
    int pthread_cond_init(pthread_cond_t *condition, const void *attributes)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
    int pthread_cond_broadcast(pthread_cond_t *condition)
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
    #include <sys/socket.h>
    #include <sys/time.h>
    #include <sys/uio.h>
    #include <unistd.h>

    #ifndef MSG_NOSIGNAL
    #define MSG_NOSIGNAL 0
    #endif

    static ssize_t snapcore_receive(int descriptor, void *data, size_t length) {
        return recv(descriptor, data, length, 0);
    }
    static ssize_t snapcore_send(int descriptor, const void *data, size_t length) {
        return send(descriptor, data, length, MSG_NOSIGNAL);
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
    static ssize_t snapcore_file_cached(int descriptor, void *data, size_t length, off_t offset) {
        struct iovec part = {data, length};
        return preadv2(descriptor, &part, 1, offset, RWF_NOWAIT);
    }
    #else
    static int snapcore_file_sync(int descriptor) { return fsync(descriptor) ? errno : 0; }
    static int snapcore_file_punch(int descriptor, off_t offset, off_t length) { return EOPNOTSUPP; }
    static ssize_t snapcore_file_cached(int descriptor, void *data, size_t length, off_t offset) { return -1; }
    #endif
    static off_t snapcore_next_data(int descriptor, off_t offset) { return lseek(descriptor, offset, SEEK_DATA); }
    static off_t snapcore_next_hole(int descriptor, off_t offset) { return lseek(descriptor, offset, SEEK_HOLE); }
    #define snapcore_16(x) __builtin_bswap16(x)
    #define snapcore_32(x) __builtin_bswap32(x)
    #define snapcore_64(x) __builtin_bswap64(x)
    """
    ssize_t snapcore_receive(int descriptor, void *data, size_t length) noexcept nogil
    ssize_t snapcore_send(int descriptor, const void *data, size_t length) noexcept nogil
    void snapcore_hang_up(int descriptor) noexcept nogil
    int snapcore_set_idle(int descriptor, double seconds) noexcept nogil
    int snapcore_file_sync(int descriptor) noexcept nogil
    int snapcore_file_punch(int descriptor, off_t offset, off_t length) noexcept nogil
    ssize_t snapcore_file_cached(int descriptor, void *data, size_t length, off_t offset) noexcept nogil
    off_t snapcore_next_data(int descriptor, off_t offset) noexcept nogil
    off_t snapcore_next_hole(int descriptor, off_t offset) noexcept nogil
    uint16_t snapcore_16(uint16_t value) noexcept nogil
    uint32_t snapcore_32(uint32_t value) noexcept nogil
    uint64_t snapcore_64(uint64_t value) noexcept nogil
    uint64_t count_up "__atomic_add_fetch"(uint64_t *target, uint64_t value, int order) noexcept nogil
    uint64_t load_count "__atomic_load_n"(uint64_t *target, int order) noexcept nogil
    int add_to "__atomic_add_fetch"(int *target, int value, int order) noexcept nogil
    int load_flag "__atomic_load_n"(int *target, int order) noexcept nogil
    void store_flag "__atomic_store_n"(int *target, int value, int order) noexcept nogil
    int __ATOMIC_SEQ_CST
    int EOVERFLOW
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


cdef int _write_zeros(ExportState *target, uint64_t length, uint64_t offset) noexcept nogil:
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
    return 0


cdef int _zero(ExportState *target, uint64_t length, uint64_t offset) noexcept nogil:
    cdef Trouble trouble
    cdef int tries = 0
    cdef int code
    if target.volume == NULL:
        code = snapcore_file_punch(target.descriptor, <off_t> offset, <off_t> length)
        return _write_zeros(target, length, offset) if code == EOPNOTSUPP else (EIO if code else 0)
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
    if connection.extended:
        (<uint32_t *> out)[0] = snapcore_32(EXTENDED_CHUNK_MAGIC)
    else:
        (<uint32_t *> out)[0] = snapcore_32(CHUNK_MAGIC)
    (<uint16_t *> out)[2] = snapcore_16(flags)
    (<uint16_t *> out)[3] = snapcore_16(kind)
    (<uint64_t *> out)[1] = request.cookie
    if connection.extended:
        (<uint64_t *> out)[2] = snapcore_64(request.offset)
        (<uint64_t *> out)[3] = snapcore_64(length)
        return EXTENDED_CHUNK_BYTES
    (<uint32_t *> out)[4] = snapcore_32(<uint32_t> length)
    return CHUNK_BYTES


cdef uint32_t _outcome(ConnectionState *connection, uint8_t *out, const Request *request, int code) noexcept nogil:
    """The whole answer of a request without data: at most 40 bytes."""
    cdef uint32_t size_bytes
    if connection.extended or (connection.structured and code and request.kind in (READ, BLOCK_STATUS)):
        if code == 0:
            return _header(connection, out, request, CHUNK_NONE, CHUNK_DONE, 0)
        size_bytes = _header(connection, out, request, CHUNK_ERROR, CHUNK_DONE, 6)
        code = <int> snapcore_32(<uint32_t> code)
        memcpy(out + size_bytes, &code, 4)
        memset(out + size_bytes + 4, 0, 2)
        return size_bytes + 6
    (<uint32_t *> out)[0] = snapcore_32(SIMPLE_REPLY_MAGIC)
    (<uint32_t *> out)[1] = snapcore_32(<uint32_t> code)
    (<uint64_t *> out)[1] = request.cookie
    return SIMPLE_REPLY_BYTES


cdef uint32_t _before_data(ConnectionState *connection, uint8_t *out, const Request *request) noexcept nogil:
    """What stands before the data of a read: at most 40 bytes."""
    cdef uint32_t size_bytes
    cdef uint64_t offset = snapcore_64(request.offset)
    if not connection.structured and not connection.extended:
        return _outcome(connection, out, request, 0)
    size_bytes = _header(connection, out, request, CHUNK_OFFSET_DATA, CHUNK_DONE, 8 + request.length)
    memcpy(out + size_bytes, &offset, 8)
    return size_bytes + 8


cdef void _send(ConnectionState *connection, const uint8_t *data, uint64_t size_bytes) noexcept nogil:
    """Send all of it, not mixed with what others send. A client that is gone is noted."""
    cdef uint64_t done = 0
    cdef ssize_t part
    pthread_mutex_lock(&connection.sending)
    while done < size_bytes and not load_flag(&connection.broken, __ATOMIC_SEQ_CST):
        part = snapcore_send(connection.descriptor, data + done, size_bytes - done)
        if part < 0 and errno == EINTR:
            continue
        if part <= 0:
            store_flag(&connection.broken, 1, __ATOMIC_SEQ_CST)
            snapcore_hang_up(connection.descriptor)
            break
        done += part
    pthread_mutex_unlock(&connection.sending)


cdef void _send_outbox(ConnectionState *connection) noexcept nogil:
    if connection.outbox_bytes:
        _send(connection, connection.outbox, connection.outbox_bytes)
        connection.outbox_bytes = 0


cdef uint8_t *_room(ConnectionState *connection, uint64_t size_bytes) noexcept nogil:
    """Where the next answer goes; NULL without memory."""
    cdef uint8_t *outbox
    if connection.outbox_bytes and connection.outbox_bytes + size_bytes > OUTBOX_BYTES:
        _send_outbox(connection)
    if connection.outbox_bytes + size_bytes > connection.outbox_capacity:
        outbox = <uint8_t *> realloc(connection.outbox, connection.outbox_bytes + size_bytes)
        if outbox == NULL:
            return NULL
        connection.outbox = outbox
        connection.outbox_capacity = connection.outbox_bytes + size_bytes
    return connection.outbox + connection.outbox_bytes


cdef int _answer(ConnectionState *connection, const Request *request, int code) noexcept nogil:
    cdef uint8_t *out = _room(connection, 64)
    if out == NULL:
        return NO_MEMORY_LEFT
    connection.outbox_bytes += _outcome(connection, out, request, code)
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


cdef bint _add_gap(
    ExportState *target, bint allocation, Extents *extents, uint64_t start, uint64_t end
) noexcept nogil:
    """What no run tells of: the image below, or nothing."""
    cdef uint64_t below = 0
    if not allocation:
        return _add_extent(extents, end - start, 0)
    if target.volume.backing.descriptor != -1:
        below = min(max(target.volume.backing.size_bytes, start), end)
        if not _add_extent(extents, below - start if below > start else 0, 0):
            return False
        start = max(start, below)
    return _add_extent(extents, end - start, STATE_HOLE | STATE_ZERO)


cdef int _volume_extents(
    ExportState *target, const Context *context, uint64_t start, uint64_t end, Runs *runs, Extents *extents
) noexcept nogil:
    """Extents of a range from the trees; may end before it does. Returns an NBD error, or 0."""
    cdef Pages *pages = target.core.pages
    cdef bint allocation = context.base == NULL
    cdef uint64_t at = start
    cdef uint64_t run_start, run_end, last, i
    cdef int64_t *run
    cdef int result
    runs.count = 0
    runs.pages = 0
    runs.width = 3 if allocation else 2
    runs.first = start // BLOCK_BYTES
    runs.last = (end + BLOCK_BYTES - 1) // BLOCK_BYTES
    runs.resume = runs.last
    pthread_mutex_lock(&pages.lock)
    pages_trim(pages)
    if not target.volume.attached or (context.base != NULL and not context.base.attached):
        result = -1
    elif allocation:
        result = tree_runs(pages, target.volume.root, runs)
    else:
        result = tree_difference(pages, context.base.root, target.volume.root, runs)
    pthread_mutex_unlock(&pages.lock)
    if result < 0:
        return EIO
    for i in range(runs.count):
        run = runs.items + i * runs.width
        run_start = max(<uint64_t> run[0] * BLOCK_BYTES, start)
        run_end = min(<uint64_t> (run[0] + run[1]) * BLOCK_BYTES, end)
        if not _add_gap(target, allocation, extents, at, run_start):
            return 0
        if not allocation:
            if not _add_extent(extents, run_end - run_start, STATE_CHANGED):
                return 0
        elif not _add_extent(extents, run_end - run_start, STATE_HOLE | STATE_ZERO if run[2] == ZERO else 0):
            return 0
        at = run_end
    last = min(runs.resume * BLOCK_BYTES, end)
    if last > at:
        _add_gap(target, allocation, extents, at, last)
    return 0


cdef int _file_extents(ExportState *target, uint64_t start, uint64_t end, Extents *extents) noexcept nogil:
    cdef uint64_t at = start
    cdef off_t data, hole
    while at < end:
        data = snapcore_next_data(target.descriptor, <off_t> at)
        if data < 0:
            data = <off_t> end if errno == 6 else <off_t> at
        if <uint64_t> data > at:
            if not _add_extent(extents, min(<uint64_t> data, end) - at, STATE_HOLE | STATE_ZERO):
                return 0
            at = min(<uint64_t> data, end)
            continue
        hole = snapcore_next_hole(target.descriptor, <off_t> at)
        if hole <= <off_t> at:
            hole = <off_t> end
        if not _add_extent(extents, min(<uint64_t> hole, end) - at, 0):
            return 0
        at = min(<uint64_t> hole, end)
    return 0


cdef int _status_chunk(
    ConnectionState *connection, const Request *request, const Context *context, bint done, Extents *extents
) noexcept nogil:
    cdef uint64_t width = 16 if connection.extended else 8
    cdef uint64_t head = 8 if connection.extended else 4
    cdef uint8_t *out = _room(connection, 64 + extents.count * width)
    cdef uint16_t kind = CHUNK_BLOCK_STATUS_EXTENDED if connection.extended else CHUNK_BLOCK_STATUS
    cdef uint32_t at, small
    cdef uint64_t i, large
    if out == NULL:
        return NO_MEMORY_LEFT
    at = _header(connection, out, request, kind, CHUNK_DONE if done else 0, head + extents.count * width)
    small = snapcore_32(context.id)
    memcpy(out + at, &small, 4)
    if connection.extended:
        small = snapcore_32(<uint32_t> extents.count)
        memcpy(out + at + 4, &small, 4)
    at += <uint32_t> head
    for i in range(2 * extents.count):
        if connection.extended:
            large = snapcore_64(extents.items[i])
            memcpy(out + at, &large, 8)
            at += 8
        else:
            small = snapcore_32(<uint32_t> extents.items[i])
            memcpy(out + at, &small, 4)
            at += 4
    connection.outbox_bytes += at
    return GOING_ON


cdef int _block_status(ConnectionState *connection, const Request *request) noexcept nogil:
    cdef ExportState *target = connection.target
    cdef uint64_t items[2 * MAX_EXTENTS]
    cdef int64_t found[3 * MAX_EXTENTS]
    cdef Extents extents
    cdef Runs runs
    cdef Context *context
    cdef uint64_t end = request.offset + request.length
    cdef int i, code, ended
    for i in range(connection.context_count):
        context = &connection.contexts[i]
        extents.items = items
        extents.count = 0
        extents.limit = 1 if request.flags & FLAG_REQ_ONE else MAX_EXTENTS
        runs.items = found
        runs.limit = 2 if request.flags & FLAG_REQ_ONE else MAX_EXTENTS // 2
        if target.volume != NULL:
            code = _volume_extents(target, context, request.offset, end, &runs, &extents)
        else:
            code = _file_extents(target, request.offset, end, &extents)
        if code:
            return _answer(connection, request, code)
        ended = _status_chunk(connection, request, context, i == connection.context_count - 1, &extents)
        if ended:
            return ended
    count_up(&connection.answered, 1, __ATOMIC_SEQ_CST)
    return GOING_ON


# Workers

cdef void _do_job(ConnectionState *connection, const Request *request) noexcept nogil:
    """Do a request that may wait, and answer it."""
    cdef ExportState *target = connection.target
    cdef uint8_t small[64]
    cdef uint8_t *out = small
    cdef uint64_t done = 0
    cdef uint64_t part
    cdef uint32_t size_bytes
    cdef int code = 0
    if request.kind == READ:
        out = <uint8_t *> malloc(64 + request.length)
        if out == NULL:
            out = small
            code = ENOMEM
        else:
            size_bytes = _before_data(connection, out, request)
            code = _read(target, out + size_bytes, request.length, request.offset, False)
            if code == 0:
                count_up(&connection.answered, 1, __ATOMIC_SEQ_CST)
                _send(connection, out, size_bytes + request.length)
                free(out)
                return
    elif request.kind == CACHE:
        out = <uint8_t *> malloc(1 << 20)
        if out == NULL:
            out = small
            code = ENOMEM
        while done < request.length and code == 0:
            part = min(request.length - done, <uint64_t> 1 << 20)
            code = _read(target, out, part, request.offset + done, False)
            done += part
    elif request.kind in (TRIM, WRITE_ZEROES):
        if request.flags & FLAG_NO_HOLE and request.kind == WRITE_ZEROES:
            code = _write_zeros(target, request.length, request.offset)
        else:
            code = _zero(target, request.length, request.offset)
    # A write has its data already: what is left of it is FUA.
    if code == 0 and (request.kind == FLUSH or request.flags & FLAG_FUA):
        code = _flush(target)
    size_bytes = _outcome(connection, small, request, code)
    count_up(&connection.answered, 1, __ATOMIC_SEQ_CST)
    _send(connection, small, size_bytes)
    if out != small:
        free(out)


cdef void *_work(void *argument) noexcept nogil:
    cdef ConnectionState *connection = <ConnectionState *> argument
    cdef Job *job
    pthread_mutex_lock(&connection.lock)
    while True:
        while connection.first == NULL and not connection.closing:
            connection.idle_workers += 1
            pthread_cond_wait(&connection.changed, &connection.lock)
            connection.idle_workers -= 1
        job = connection.first
        if job == NULL:
            break
        connection.first = job.next
        pthread_mutex_unlock(&connection.lock)
        _do_job(connection, &job.request)
        pthread_mutex_lock(&connection.lock)
        add_to(&connection.jobs, -1, __ATOMIC_SEQ_CST)
        connection.job_bytes -= _memory_of(&job.request)
        free(job)
        pthread_cond_broadcast(&connection.changed)
    pthread_mutex_unlock(&connection.lock)
    return NULL


cdef uint64_t _memory_of(const Request *request) noexcept nogil:
    return request.length if request.kind == READ else 0


cdef int _hand_over(ConnectionState *connection, const Request *request) noexcept nogil:
    """Give a request to a worker; waits while there are too many."""
    cdef Job *job = <Job *> malloc(sizeof(Job))
    if job == NULL:
        return _answer(connection, request, ENOMEM)
    job.request = request[0]
    job.next = NULL
    pthread_mutex_lock(&connection.lock)
    while connection.jobs >= MAX_JOBS or (
        connection.jobs and connection.job_bytes + _memory_of(request) > MAX_JOB_BYTES
    ):
        pthread_mutex_unlock(&connection.lock)
        _send_outbox(connection)
        pthread_mutex_lock(&connection.lock)
        if connection.jobs >= MAX_JOBS or connection.job_bytes + _memory_of(request) > MAX_JOB_BYTES:
            pthread_cond_wait(&connection.changed, &connection.lock)
    if connection.first == NULL:
        connection.first = job
    else:
        connection.last.next = job
    connection.last = job
    add_to(&connection.jobs, 1, __ATOMIC_SEQ_CST)
    connection.job_bytes += _memory_of(request)
    if connection.idle_workers == 0 and connection.worker_count < MAX_WORKERS:
        if pthread_create(&connection.workers[connection.worker_count], NULL, _work, connection) == 0:
            connection.worker_count += 1
    if connection.worker_count == 0:
        # Without a thread it is done here.
        connection.first = connection.last = NULL
        connection.jobs = 0
        connection.job_bytes = 0
        pthread_mutex_unlock(&connection.lock)
        _send_outbox(connection)
        _do_job(connection, &job.request)
        free(job)
        return GOING_ON
    pthread_cond_broadcast(&connection.changed)
    pthread_mutex_unlock(&connection.lock)
    return GOING_ON


# Requests

cdef int _receive(
    ConnectionState *connection, uint8_t *data, uint64_t least, uint64_t most, uint64_t *got
) noexcept nogil:
    """Receive at least so many bytes."""
    cdef ssize_t part
    got[0] = 0
    while got[0] < least:
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
    ended = _receive(connection, connection.inbox + have, size_bytes - have, INBOX_BYTES - have, &got)
    connection.inbox_end += got
    return ended


cdef int _payload(ConnectionState *connection, uint64_t length, const uint8_t **data) noexcept nogil:
    """The data of a write, which is in the inbox or is received into memory of its own."""
    cdef uint64_t have = connection.inbox_end - connection.inbox_start
    cdef uint64_t got = 0
    cdef uint8_t *payload
    cdef int ended
    if length <= INBOX_BYTES // 2:
        ended = _fetch(connection, length)
        data[0] = connection.inbox + connection.inbox_start
        connection.inbox_start += length
        return ended
    if length > connection.payload_capacity:
        payload = <uint8_t *> realloc(connection.payload, length)
        if payload == NULL:
            return NO_MEMORY_LEFT
        connection.payload = payload
        connection.payload_capacity = length
    have = min(have, length)
    memcpy(connection.payload, connection.inbox + connection.inbox_start, have)
    connection.inbox_start += have
    data[0] = connection.payload
    if have < length:
        _send_outbox(connection)
        return _receive(connection, connection.payload + have, length - have, length - have, &got)
    return GOING_ON


cdef int _read_request(ConnectionState *connection, const Request *request) noexcept nogil:
    cdef uint8_t *out
    cdef uint32_t before
    cdef int code
    if request.length > MAX_LENGTH:
        return _answer(connection, request, EOVERFLOW if request.flags & FLAG_DF else EINVAL)
    out = _room(connection, 64 + request.length)
    if out == NULL:
        return _answer(connection, request, ENOMEM)
    before = _before_data(connection, out, request)
    code = _read(connection.target, out + before, request.length, request.offset, True)
    if code < 0:
        return _hand_over(connection, request)
    if code:
        return _answer(connection, request, code)
    connection.outbox_bytes += before + request.length
    count_up(&connection.answered, 1, __ATOMIC_SEQ_CST)
    return GOING_ON


cdef int _write_request(ConnectionState *connection, const Request *request, bint inside) noexcept nogil:
    cdef const uint8_t *data = NULL
    cdef int ended, code
    if request.length > MAX_LENGTH:
        return TOO_LONG
    ended = _payload(connection, request.length, &data)
    if ended:
        return ended
    if not connection.target.writable:
        return _answer(connection, request, EPERM)
    if not inside:
        return _answer(connection, request, ENOSPC)
    code = _write(connection.target, data, request.length, request.offset)
    if code == 0 and request.flags & FLAG_FUA:
        return _hand_over(connection, request)
    return _answer(connection, request, code)


cdef int _one_request(ConnectionState *connection, const Request *request) noexcept nogil:
    cdef ExportState *target = connection.target
    cdef uint64_t size_bytes = target.size_bytes
    cdef bint inside
    if target.volume != NULL:
        size_bytes = load_count(&target.volume.size_bytes, __ATOMIC_SEQ_CST)
    inside = request.length and request.offset <= size_bytes and request.length <= size_bytes - request.offset
    if request.kind == WRITE:
        return _write_request(connection, request, inside)
    if request.flags & FLAG_PAYLOAD:
        return BAD_PAYLOAD
    if request.kind == DISCONNECT:
        return DISCONNECTED
    if request.kind == FLUSH:
        return _hand_over(connection, request)
    if request.kind not in (READ, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS):
        return _answer(connection, request, EINVAL)
    if not target.writable and request.kind in (TRIM, WRITE_ZEROES):
        return _answer(connection, request, EPERM)
    if not inside:
        return _answer(connection, request, ENOSPC if request.kind == WRITE_ZEROES and request.length else EINVAL)
    if request.kind == READ:
        return _read_request(connection, request)
    if request.kind == BLOCK_STATUS:
        if connection.context_count == 0:
            return _answer(connection, request, EINVAL)
        return _block_status(connection, request)
    if request.kind == WRITE_ZEROES and request.flags & FLAG_FAST_ZERO and request.flags & FLAG_NO_HOLE:
        return _answer(connection, request, EOPNOTSUPP)
    return _hand_over(connection, request)


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
        connection.inbox_start += head_bytes
        ended = _one_request(connection, &request)
        if ended:
            return ended


cdef void _finish(ConnectionState *connection) noexcept nogil:
    """Let workers end what they have, and send what is left."""
    cdef int i
    pthread_mutex_lock(&connection.lock)
    connection.closing = 1
    pthread_cond_broadcast(&connection.changed)
    pthread_mutex_unlock(&connection.lock)
    for i in range(connection.worker_count):
        pthread_join(connection.workers[i], NULL)
    connection.worker_count = 0
    _send_outbox(connection)


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
            self.target.volume = volume.volume
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
        pthread_cond_init(&connection.changed, NULL)
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
        if idle_s and snapcore_set_idle(descriptor, idle_s):
            raise OSError("the socket takes no time limit")

    def __dealloc__(self):
        if self.connection == NULL:
            return
        free(self.connection.inbox)
        free(self.connection.outbox)
        free(self.connection.payload)
        pthread_cond_destroy(&self.connection.changed)
        pthread_mutex_destroy(&self.connection.sending)
        pthread_mutex_destroy(&self.connection.lock)
        free(self.connection)

    def serve(self):
        cdef int ended
        with nogil:
            ended = _serve(self.connection)
            _finish(self.connection)
        return _REASONS[ended]

    def stop(self):
        store_flag(&self.connection.stopping, 1, __ATOMIC_SEQ_CST)
        snapcore_hang_up(self.connection.descriptor)

    @property
    def requests(self):
        return load_count(&self.connection.answered, __ATOMIC_SEQ_CST)
