# The C API of the LZ4 kernel: free functions over plain memory, no Python object, no allocation.
from libc.stdint cimport uint8_t, uint16_t


# The LZ4 block of at most 65,536 bytes; 0 where it would have more than limit_bytes. `packed` has room for 32 bytes
# more than that, `places` for 16,384 numbers. Nothing is read beyond the data.
cdef size_t pack_block(
    const uint8_t *data, size_t size_bytes, uint8_t *packed, size_t limit_bytes, uint16_t *places
) noexcept nogil

# Whether any bytes are an LZ4 block that decodes to `data`; reads within both only.
cdef bint decodes_to(
    const uint8_t *packed, size_t packed_bytes, const uint8_t *data, size_t size_bytes
) noexcept nogil
