# The C API of the digest kernels: free functions over plain memory, no Python object, no allocation.
from libc.stdint cimport int64_t, uint8_t, uint64_t


# XXH64 of one buffer, read as little-endian on every machine.
cdef uint64_t xxh64_of(const uint8_t *data, size_t size_bytes, uint64_t seed) noexcept nogil

# XXH64 of each block into digests; the last block may be short. Returns the number of blocks.
cdef int64_t xxh64_each(
    const uint8_t *data, size_t size_bytes, size_t block_bytes, uint64_t seed, uint64_t *digests
) noexcept nogil

# Reads a range of a file, a window at a time, into space, which has room for whole blocks. Of each block, zeros for
# what lacks at the end included, its XXH64 goes into digests and whether it is zero into zeros. Returns how many bytes
# were read; where they are fewer, code is set to what the system says, and stays as it is at the file's end.
cdef int64_t read_each(
    int descriptor, int64_t offset, int64_t size_bytes, int64_t block_bytes, uint64_t seed,
    uint8_t *space, uint64_t *digests, uint8_t *zeros, int *code
) noexcept nogil
