# The C API of the scan kernels: free functions over plain memory, no Python object, no allocation.
from libc.stdint cimport int64_t, uint8_t


cdef bint is_zero(const uint8_t *data, size_t size_bytes) noexcept nogil

# mask[i] = 1 where block i is all zero; the last block may be short. Returns the number of ones.
cdef int64_t mask_zero(
    const uint8_t *data, size_t size_bytes, size_t block_bytes, uint8_t *mask
) noexcept nogil

# mask[i] = 1 where block i of a and b differ; the last block may be short. Returns the number of ones.
cdef int64_t mask_differing(
    const uint8_t *a, const uint8_t *b, size_t size_bytes, size_t block_bytes, uint8_t *mask
) noexcept nogil

# mask[i] = 1 where block i is not all zero; the last block may be short. Returns the number of ones.
cdef int64_t mask_data(
    const uint8_t *data, size_t size_bytes, size_t block_bytes, uint8_t *mask
) noexcept nogil

# Runs of `wanted` in the mask as rows (offset, length), merged and sorted, the last one cut at size_bytes.
# `rows` has room for 2 * ((blocks + 1) // 2) numbers. Returns the number of rows.
cdef int64_t runs_of(
    const uint8_t *mask, int64_t blocks, uint8_t wanted,
    int64_t block_bytes, int64_t size_bytes, int64_t first_offset, int64_t *rows
) noexcept nogil


# An open file, memory for a window of it, and the stretch that was looked at last: a hole before `data`, data up to
# `hole`.
cdef struct file_cursor:
    int file
    uint8_t *window
    int64_t data
    int64_t hole

# Which of two files failed (0 or 1), at which byte, and errno; 0 where it ends there.
cdef struct file_failure:
    int which
    int code
    int64_t offset

# Move a cursor to the data at or after `offset`, in whole blocks, not beyond `stop`. Returns 0 or errno.
cdef int look(file_cursor *cursor, int64_t offset, int64_t stop, int64_t block_bytes) noexcept nogil

# Read into the cursor's window. Returns how many bytes came; when too few, `code` is errno, or 0 at the file's end.
cdef int64_t load(file_cursor *cursor, int64_t offset, int64_t size_bytes, int *code) noexcept nogil

# mask[i] = 1 where block i of a range of two files differs (all zero at first); holes are zeros and are not read.
# `offset` and `window_bytes` are whole blocks. Returns how many bytes are no hole in both; -1 when `failure` says why.
cdef int64_t compare_files(
    file_cursor *cursors, int64_t offset, int64_t size_bytes, int64_t block_bytes,
    int64_t window_bytes, uint8_t *mask, file_failure *failure
) noexcept nogil
