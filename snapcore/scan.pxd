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

# Runs of `wanted` in the mask as rows (offset, length), merged and sorted, the last one cut at size_bytes.
# `rows` has room for 2 * ((blocks + 1) // 2) numbers. Returns the number of rows.
cdef int64_t runs_of(
    const uint8_t *mask, int64_t blocks, uint8_t wanted,
    int64_t block_bytes, int64_t size_bytes, int64_t first_offset, int64_t *rows
) noexcept nogil
