"""Zero blocks and differing blocks of memory and of files, and the safe way to touch mapped memory before a scan.

Every kernel is a free nogil function over plain memory (the C API is snapcore/scan.pxd); the functions
below check their arguments, make one call without the GIL and return arrays. They read any
contiguous buffer: bytes, numpy arrays, mmap objects. A mapped file must be populated first (`populate`),
for a bad sector under a mapping is a signal and not an error; what compares files reads them with pread.
numpy is imported by the first function that returns an array of it: the compare of two files needs none, and
importing it would take a third of the time that comparing 3 GB takes.
"""

cimport cython
from libc.errno cimport EINTR, EINVAL, ENOSYS, ENXIO, EOPNOTSUPP, errno
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint64_t, uintptr_t
from libc.string cimport memcmp, memcpy
from posix.types cimport off_t

import array
import os

cdef extern from *:
    """
    #include <stddef.h>
    #if defined(__linux__)
    #include <sys/mman.h>
    #ifndef MADV_POPULATE_READ
    #define MADV_POPULATE_READ 22
    #endif
    static int snapcore_populate(void *start, size_t size) { return madvise(start, size, MADV_POPULATE_READ); }
    #else
    #include <errno.h>
    static int snapcore_populate(void *start, size_t size)
    { (void)start; (void)size; errno = ENOSYS; return -1; }
    #endif
    """
    int snapcore_populate(void *start, size_t size_bytes) noexcept nogil

cdef extern from "<unistd.h>" nogil:
    enum:
        SEEK_DATA
        SEEK_HOLE
    ssize_t pread(int file, void *buffer, size_t count, off_t offset)
    off_t lseek(int file, off_t offset, int whence)


cdef bint is_zero(const uint8_t *data, size_t size_bytes) noexcept nogil:
    cdef uint64_t words[16]
    cdef uint64_t any_bit
    cdef size_t at = 0
    cdef size_t i
    # 128 bytes a step keep the compiler's vector loop busy; most blocks of data leave at the first one.
    while size_bytes - at >= sizeof(words):
        memcpy(words, data + at, sizeof(words))
        any_bit = 0
        for i in range(16):
            any_bit |= words[i]
        if any_bit != 0:
            return False
        at += sizeof(words)
    while at < size_bytes:
        if data[at] != 0:
            return False
        at += 1
    return True


cdef int64_t mask_zero(
    const uint8_t *data, size_t size_bytes, size_t block_bytes, uint8_t *mask
) noexcept nogil:
    cdef int64_t count = 0
    cdef size_t at = 0
    cdef size_t length
    cdef size_t index = 0
    while at < size_bytes:
        length = min(block_bytes, size_bytes - at)
        mask[index] = is_zero(data + at, length)
        count += mask[index]
        at += length
        index += 1
    return count


cdef int64_t mask_differing(
    const uint8_t *a, const uint8_t *b, size_t size_bytes, size_t block_bytes, uint8_t *mask
) noexcept nogil:
    cdef int64_t count = 0
    cdef size_t at = 0
    cdef size_t length
    cdef size_t index = 0
    while at < size_bytes:
        length = min(block_bytes, size_bytes - at)
        mask[index] = memcmp(a + at, b + at, length) != 0
        count += mask[index]
        at += length
        index += 1
    return count


cdef int64_t mask_data(
    const uint8_t *data, size_t size_bytes, size_t block_bytes, uint8_t *mask
) noexcept nogil:
    cdef int64_t count = 0
    cdef size_t at = 0
    cdef size_t length
    cdef size_t index = 0
    while at < size_bytes:
        length = min(block_bytes, size_bytes - at)
        mask[index] = not is_zero(data + at, length)
        count += mask[index]
        at += length
        index += 1
    return count


cdef int64_t runs_of(
    const uint8_t *mask, int64_t blocks, uint8_t wanted,
    int64_t block_bytes, int64_t size_bytes, int64_t first_offset, int64_t *rows
) noexcept nogil:
    cdef int64_t count = 0
    cdef int64_t block = 0
    cdef int64_t start
    while block < blocks:
        if mask[block] != wanted:
            block += 1
            continue
        start = block
        while block < blocks and mask[block] == wanted:
            block += 1
        rows[2 * count] = first_offset + start * block_bytes
        rows[2 * count + 1] = min(block * block_bytes, size_bytes) - start * block_bytes
        count += 1
    return count


cdef int look(file_cursor *cursor, int64_t offset, int64_t stop, int64_t block_bytes) noexcept nogil:
    cdef int64_t data
    cdef int64_t hole
    if offset < cursor.hole:
        return 0
    cursor.data = offset
    cursor.hole = stop
    data = lseek(cursor.file, offset, SEEK_DATA)
    if data < 0:
        if errno == ENXIO:
            cursor.data = stop
        elif errno != EINVAL and errno != EOPNOTSUPP:
            return errno
        # A device, or a file system that does not say: all of it may be data.
        return 0
    cursor.data = min(data & -block_bytes, stop)
    if data < stop:
        hole = lseek(cursor.file, data, SEEK_HOLE)
        if 0 <= hole < stop:
            cursor.hole = min((hole + block_bytes - 1) & -block_bytes, stop)
    return 0


cdef int64_t load(file_cursor *cursor, int64_t offset, int64_t size_bytes, int *code) noexcept nogil:
    cdef int64_t done = 0
    cdef ssize_t count
    code[0] = 0
    while done < size_bytes:
        count = pread(cursor.file, cursor.window + done, size_bytes - done, offset + done)
        if count > 0:
            done += count
        elif count == 0:
            break
        elif errno != EINTR:
            code[0] = errno
            break
    return done


@cython.cdivision(True)
cdef int64_t compare_files(
    file_cursor *cursors, int64_t offset, int64_t size_bytes, int64_t block_bytes,
    int64_t window_bytes, uint8_t *mask, file_failure *failure
) noexcept nogil:
    cdef file_cursor *a = &cursors[0]
    cdef file_cursor *b = &cursors[1]
    cdef int64_t stop = offset + size_bytes
    cdef int64_t at = offset
    cdef int64_t seen = 0
    cdef int64_t end
    cdef int64_t done
    cdef uint8_t *place
    cdef int which
    a.data = b.data = a.hole = b.hole = offset
    while at < stop:
        for which in range(2):
            failure.code = look(&cursors[which], at, stop, block_bytes)
            if failure.code != 0:
                failure.which, failure.offset = which, at
                return -1
        if a.data > at and b.data > at:
            at = min(a.data, b.data)
            continue
        end = min(stop, at + window_bytes)
        for which in range(2):
            if cursors[which].data > at:
                end = min(end, cursors[which].data)
                continue
            end = min(end, cursors[which].hole)
            done = load(&cursors[which], at, end - at, &failure.code)
            if done < end - at:
                failure.which, failure.offset = which, at + done
                return -1
        place = mask + (at - offset) // block_bytes
        # What is read as zeros differs where the other one has data.
        if a.data > at:
            mask_data(b.window, end - at, block_bytes, place)
        elif b.data > at:
            mask_data(a.window, end - at, block_bytes, place)
        else:
            mask_differing(a.window, b.window, end - at, block_bytes, place)
        seen += end - at
        at = end
    return seen


cdef object _checked_block(int64_t block_bytes):
    if block_bytes < 512 or block_bytes & (block_bytes - 1):
        raise ValueError(f"block_bytes must be a power of two from 512 on, not {block_bytes}")


cdef int64_t _blocks(const uint8_t[::1] data, int64_t block_bytes):
    return data.shape[0] // block_bytes + (data.shape[0] % block_bytes != 0)


cdef object _mask(int64_t blocks):
    import numpy as np

    return np.empty(blocks, dtype=np.uint8)


cdef object _extents(uint8_t[::1] mask, uint8_t wanted, int64_t block_bytes, int64_t size_bytes, int64_t offset):
    cdef int64_t blocks = mask.shape[0]
    cdef int64_t count
    if offset > INT64_MAX - size_bytes:
        raise ValueError(f"{size_bytes} bytes from offset {offset} on end beyond 2**63 - 1")
    import numpy as np

    if blocks == 0:
        return np.empty((0, 2), dtype=np.int64)
    rows = np.empty(((blocks + 1) // 2, 2), dtype=np.int64)
    cdef int64_t[:, ::1] view = rows
    with nogil:
        count = runs_of(&mask[0], blocks, wanted, block_bytes, size_bytes, offset, &view[0, 0])
    return rows[:count].copy()


def zero_mask(const uint8_t[::1] data not None, int64_t block_bytes):
    _checked_block(block_bytes)
    out = _mask(_blocks(data, block_bytes))
    cdef uint8_t[::1] mask = out
    if data.shape[0]:
        with nogil:
            mask_zero(&data[0], data.shape[0], block_bytes, &mask[0])
    return out


def differing_mask(const uint8_t[::1] a not None, const uint8_t[::1] b not None, int64_t block_bytes):
    _checked_block(block_bytes)
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"the buffers differ in length: {a.shape[0]} and {b.shape[0]} bytes")
    out = _mask(_blocks(a, block_bytes))
    cdef uint8_t[::1] mask = out
    if a.shape[0]:
        with nogil:
            mask_differing(&a[0], &b[0], a.shape[0], block_bytes, &mask[0])
    return out


def same_bytes(const uint8_t[::1] a not None, const uint8_t[::1] b not None):
    cdef bint same = a.shape[0] == b.shape[0]
    if same and a.shape[0]:
        if a.shape[0] <= 65536:
            # Soon over: to give the interpreter away and wait for it again takes longer.
            same = memcmp(&a[0], &b[0], a.shape[0]) == 0
        else:
            with nogil:
                same = memcmp(&a[0], &b[0], a.shape[0]) == 0
    return same


def zero_extents(const uint8_t[::1] data not None, int64_t block_bytes, int64_t offset=0):
    return _extents(zero_mask(data, block_bytes), 1, block_bytes, data.shape[0], offset)


def nonzero_extents(const uint8_t[::1] data not None, int64_t block_bytes, int64_t offset=0):
    return _extents(zero_mask(data, block_bytes), 0, block_bytes, data.shape[0], offset)


def differing_extents(
    const uint8_t[::1] a not None, const uint8_t[::1] b not None, int64_t block_bytes, int64_t offset=0
):
    return _extents(differing_mask(a, b, block_bytes), 1, block_bytes, a.shape[0], offset)


class FileFailure(Exception):
    def __init__(self, which, offset, code):
        super().__init__(which, offset, code)
        self.which = which
        self.offset = offset
        self.code = code


def differing_in_files(
    int a, int b, int64_t offset, int64_t size_bytes, int64_t block_bytes, uint8_t[::1] space not None
):
    cdef file_cursor cursors[2]
    cdef file_failure failure
    cdef int64_t seen
    cdef int64_t count
    cdef int64_t window_bytes = space.shape[0] // 2
    _checked_block(block_bytes)
    if offset < 0 or offset % block_bytes or size_bytes < 0 or offset > INT64_MAX - size_bytes - block_bytes:
        raise ValueError(f"{size_bytes} bytes from offset {offset} on are no blocks of {block_bytes}")
    window_bytes -= window_bytes % block_bytes
    if window_bytes == 0:
        raise ValueError(f"space for {space.shape[0]} bytes is too small for two blocks of {block_bytes}")
    if size_bytes == 0:
        return array.array("q"), 0
    cdef int64_t blocks = size_bytes // block_bytes + (size_bytes % block_bytes != 0)
    cdef uint8_t[::1] mask = bytearray(blocks)
    rows = array.array("q", bytes(16 * ((blocks + 1) // 2)))
    cdef int64_t[::1] view = rows
    cursors[0].file, cursors[1].file = a, b
    cursors[0].window, cursors[1].window = &space[0], &space[window_bytes]
    with nogil:
        seen = compare_files(cursors, offset, size_bytes, block_bytes, window_bytes, &mask[0], &failure)
        if seen >= 0:
            count = runs_of(&mask[0], blocks, 1, block_bytes, size_bytes, offset, &view[0])
    if seen < 0:
        raise FileFailure(failure.which, failure.offset, failure.code)
    view = None
    del rows[2 * count:]
    return rows, seen


def populate(const uint8_t[::1] mapped not None, int64_t offset, int64_t size_bytes):
    cdef int result
    cdef int code = 0
    cdef uintptr_t start
    cdef uintptr_t page = 4096
    if offset < 0 or size_bytes < 0 or offset > mapped.shape[0] or size_bytes > mapped.shape[0] - offset:
        raise ValueError(
            f"{size_bytes} bytes from offset {offset} on are not within a mapping of {mapped.shape[0]} bytes"
        )
    if size_bytes == 0:
        return True
    page = os.sysconf("SC_PAGE_SIZE")
    start = <uintptr_t>&mapped[offset]
    cdef uintptr_t first = start & ~(page - 1)
    with nogil:
        result = snapcore_populate(<void *>first, start + <uintptr_t>size_bytes - first)
        if result != 0:
            code = errno
    if result == 0:
        return True
    if code == EINVAL or code == ENOSYS:
        return False
    raise OSError(code, os.strerror(code))
