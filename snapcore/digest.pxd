# The C API of the digest kernels: free functions over plain memory, no Python object, no allocation.
from libc.stdint cimport int64_t, uint8_t, uint64_t


# XXH64 of one buffer, read as little-endian on every machine.
cdef uint64_t xxh64_of(const uint8_t *data, size_t size_bytes, uint64_t seed) noexcept nogil

# XXH64 of each block into digests; the last block may be short. Returns the number of blocks.
cdef int64_t xxh64_each(
    const uint8_t *data, size_t size_bytes, size_t block_bytes, uint64_t seed, uint64_t *digests
) noexcept nogil
