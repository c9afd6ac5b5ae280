# The C API of a pool's space. All but what is said to take the mutex is called with it held.
from libc.stdint cimport uint64_t

from snapcore.core cimport PIECE_BLOCKS, CoreState, Trouble, VolumeState


cdef enum:
    # The numbers below stand for entries that refer to nothing.
    FIRST_BLOCK = 3


# Room for this many blocks in the bitmaps, a whole number of pieces.
cdef int space_grow(CoreState *core, uint64_t blocks) noexcept nogil
# Hold a run of up to `want` free blocks for a volume. Returns the first, or 0.
cdef uint64_t space_take(CoreState *core, VolumeState *volume, uint64_t want, uint64_t *count) noexcept nogil
# Held blocks are free.
cdef void space_give_back(CoreState *core, uint64_t first, uint64_t count) noexcept nogil
# The new blocks of a write that failed are free.
cdef void space_take_back(CoreState *core, const bint *own, const uint64_t *targets, uint64_t count) noexcept nogil
# Held blocks that may have been written are free after the next `reclaim`; the second: those a volume keeps ready.
cdef void space_let_go(CoreState *core, uint64_t first, uint64_t count) noexcept nogil
cdef void space_let_go_ready(CoreState *core, VolumeState *volume) noexcept nogil
# Used blocks are held until what freed them is durable. Fails before anything is done.
cdef int space_free(CoreState *core, const uint64_t *blocks, uint64_t count) noexcept nogil
# Behind the last used block.
cdef uint64_t space_end(CoreState *core) noexcept nogil
# Pages for the pieces of the bitmap that changed, out of the slots that are kept for it.
cdef int space_freeze(CoreState *core, Trouble *trouble) noexcept nogil


# What is done for each block of a write stands here, so that it is not called through a pointer.

cdef inline bint space_bit(const uint64_t *words, uint64_t number) noexcept nogil:
    return words[number >> 6] >> (number & 63) & 1


# A held block is used.
cdef inline void space_use(CoreState *core, uint64_t block) noexcept nogil:
    cdef uint64_t bit = <uint64_t> 1 << (block & 63)
    core.held[block >> 6] &= ~bit
    core.used[block >> 6] |= bit
    core.held_count -= 1
    core.used_count += 1
    core.pieces_changed[block // PIECE_BLOCKS] = 1
