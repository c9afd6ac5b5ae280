"""An open pool as its kernels share it: files, the one mutex, what has failed, and the state of space, log and volumes.

One mutex (`Pages.lock`) guards all state; it is not held over I/O on data, over a sync, or over Python. A medium other
than the operating system (a test's recorder) is called with the GIL for every persistent operation.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, EIO, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix.types cimport off_t
from posix.unistd cimport pread

import numpy as np

from snapcore.blockmap cimport Trees
from snapcore.pages cimport NO_MEMORY, numbers_free

from snapcore.pages import Failure

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
    int ESHUTDOWN
    int __builtin_popcountll(unsigned long long value) noexcept nogil


cdef int medium_status(int descriptor, unsigned long long *size_bytes, long long *mtime_ns) noexcept nogil:
    return snapcore_status(descriptor, size_bytes, mtime_ns)


cdef void medium_pause() noexcept nogil:
    snapcore_pause()


cdef int medium_put_recorded(
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


cdef int medium_sync(CoreState *core, int descriptor) noexcept nogil:
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


cdef int medium_punch(CoreState *core, uint64_t offset, uint64_t size_bytes) noexcept nogil:
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


cdef int medium_get(
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


cdef bint _detach_all(CoreState *core) noexcept nogil:
    """Let nobody read or write any more; whether somebody still writes."""
    cdef VolumeState *volume = core.volumes
    cdef bint busy = False
    while volume != NULL:
        volume.attached = 0
        busy = busy or volume.inside > 0
        volume = volume.next
    return busy


# Python

class LogFull(Failure):
    """A checkpoint must come first."""


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
        core.capacity = (max(<uint64_t> words.shape[0] * 64, 1) + PIECE_BLOCKS - 1) // PIECE_BLOCKS * PIECE_BLOCKS
        core.used = <uint64_t *> calloc(1, core.capacity // 8)
        core.held = <uint64_t *> calloc(1, core.capacity // 8)
        core.pieces_changed = <uint8_t *> calloc(1, core.capacity // PIECE_BLOCKS)
        if core.used == NULL or core.held == NULL or core.pieces_changed == NULL:
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
            core_lock(self.core)
            found = number[0]
            core_unlock(self.core)
        return found

    @property
    def failed(self):
        cdef int code
        with nogil:
            core_lock(self.core)
            code = self.core.failed
            core_unlock(self.core)
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
            core_lock(self.core)
            free_sectors = self.core.log_sectors - (self.core.log_next - self.core.log_tail)
            core_unlock(self.core)
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
            core_lock(self.core)
        self.core.limit_blocks = blocks
        core_unlock(self.core)

    def stop(self, int code):
        with nogil:
            core_lock(self.core)
            if self.core.failed == 0:
                self.core.failed = code
            pthread_cond_broadcast(&self.core.changed)
            core_unlock(self.core)

    def close(self):
        cdef int i
        with nogil:
            core_lock(self.core)
            self.core.closed = 1
            if self.core.failed == 0:
                self.core.failed = ESHUTDOWN
            pthread_cond_broadcast(&self.core.changed)
            while self.core.committing or self.core.reclaiming or _detach_all(self.core):
                pthread_cond_wait(&self.core.changed, &self.core.pages.lock)
            core_unlock(self.core)
            for i in range(2):
                while __atomic_load_n(&self.core.readers[i], __ATOMIC_SEQ_CST):
                    medium_pause()
