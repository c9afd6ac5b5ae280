# The C API of the pool's data path: free functions, no Python object, safe from many threads.
from libc.stdint cimport int64_t, uint8_t, uint64_t

from snapcore.presence cimport Presence
from snapcore.core cimport Core, CoreState, Trouble, VolumeState


# With `cached`, WOULD_WAIT instead of reading from a medium.
cdef int volume_read(
    CoreState *core, VolumeState *volume, uint8_t *data, uint64_t size_bytes, uint64_t offset, bint cached,
    Trouble *trouble
) noexcept nogil

cdef int volume_write(
    CoreState *core, VolumeState *volume, const uint8_t *data, uint64_t size_bytes, uint64_t offset, Trouble *trouble
) noexcept nogil

cdef int volume_zero(
    CoreState *core, VolumeState *volume, uint64_t size_bytes, uint64_t offset, Trouble *trouble
) noexcept nogil


cdef class Volume:
    cdef VolumeState *volume
    cdef readonly Core core
    # What readers may look at.
    cdef object _kept
    cdef void _unlink(self)
    cdef int _put_backing(
        self, int descriptor, uint64_t size_bytes, int64_t mtime_ns, Presence presence, object fetch
    ) except -1
