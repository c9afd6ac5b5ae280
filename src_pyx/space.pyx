"""The space of a pool's data file: which blocks are free, held or used, and which of them a write takes.

Rules and proofs: docs/DESIGN.md ("Space"). A block is free, then held by the write that takes it, then used, and held
again from when it is freed until what freed it is durable and no reader sees it; `reclaim` makes it free.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport qsort, realloc
from libc.string cimport memcpy, memset

import numpy as np

from snapcore.blockmap cimport ABSENT, LOST, tree_lookup, tree_set
from snapcore.core cimport (
    BLOCK_BYTES, NOT_CONSISTENT, PIECE_BLOCKS, Core, CoreState, Trouble, VolumeState, __ATOMIC_SEQ_CST,
    __atomic_load_n, core_lock, core_unlock, map_trouble, max_blocks, medium_pause, medium_punch,
    pthread_cond_broadcast, pthread_cond_wait, trouble_set,
)
from snapcore.pages cimport KIND_BITMAP, NO_MEMORY, Numbers, numbers_free, numbers_reserve, page_free, page_new

cdef extern from *:
    int __builtin_ctzll(unsigned long long value) noexcept nogil
    int __builtin_clzll(unsigned long long value) noexcept nogil

cdef enum:
    WINDOW_BLOCKS = 256


cdef int space_grow(CoreState *core, uint64_t blocks) noexcept nogil:
    """Room for this many blocks in the bitmaps, a whole number of pieces."""
    cdef uint64_t capacity = max(blocks, core.capacity + core.capacity // 2)
    cdef uint64_t *used
    cdef uint64_t *held
    cdef uint8_t *changed
    if blocks <= core.capacity:
        return 0
    if blocks > max_blocks():
        return NO_MEMORY
    capacity = (capacity + PIECE_BLOCKS - 1) // PIECE_BLOCKS * PIECE_BLOCKS
    used = <uint64_t *> realloc(core.used, capacity // 8)
    if used == NULL:
        return NO_MEMORY
    core.used = used
    held = <uint64_t *> realloc(core.held, capacity // 8)
    if held == NULL:
        return NO_MEMORY
    core.held = held
    changed = <uint8_t *> realloc(core.pieces_changed, capacity // PIECE_BLOCKS)
    if changed == NULL:
        return NO_MEMORY
    core.pieces_changed = changed
    memset(<uint8_t *> used + core.capacity // 8, 0, (capacity - core.capacity) // 8)
    memset(<uint8_t *> held + core.capacity // 8, 0, (capacity - core.capacity) // 8)
    memset(changed + core.capacity // PIECE_BLOCKS, 0, (capacity - core.capacity) // PIECE_BLOCKS)
    core.capacity = capacity
    return 0


cdef uint64_t _find_window(CoreState *core) noexcept nogil:
    """The first block of an aligned free window below the end, from the cursor on; 0 when there is none."""
    cdef uint64_t windows = core.end // WINDOW_BLOCKS
    cdef uint64_t at = core.cursor
    cdef uint64_t left = windows
    cdef uint64_t *used
    cdef uint64_t *held
    if core.no_windows:
        return 0
    while left:
        left -= 1
        if at >= windows:
            at = 0
        used = core.used + at * (WINDOW_BLOCKS // 64)
        held = core.held + at * (WINDOW_BLOCKS // 64)
        if at and not (used[0] | used[1] | used[2] | used[3] | held[0] | held[1] | held[2] | held[3]):
            core.cursor = at + 1
            return at * WINDOW_BLOCKS
        at += 1
    core.no_windows = 1
    return 0


cdef uint64_t _find_fragment(CoreState *core) noexcept nogil:
    """Any free block below the end; 0 when there is none."""
    cdef uint64_t words = core.end // 64
    cdef uint64_t at = core.fragment
    cdef uint64_t left = words
    cdef uint64_t busy
    while left:
        left -= 1
        if at >= words:
            at = 0
        busy = core.used[at] | core.held[at]
        if at == 0:
            busy |= 7
        if ~busy:
            core.fragment = at
            return at * 64 + __builtin_ctzll(~busy)
        at += 1
    return 0


cdef uint64_t space_take(CoreState *core, VolumeState *volume, uint64_t want, uint64_t *count) noexcept nogil:
    """Hold a run of up to `want` free blocks for a volume. Returns the first, or 0."""
    cdef uint64_t first, at, end
    if volume.ready_count:
        first = volume.ready_first
        count[0] = min(want, volume.ready_count)
        volume.ready_first += count[0]
        volume.ready_count -= count[0]
        return first
    if core.limit_blocks:
        if core.used_count + core.held_count >= core.limit_blocks:
            return 0
        want = min(want, core.limit_blocks - core.used_count - core.held_count)
    first = volume.window_next
    end = volume.window_end
    if first >= end or space_bit(core.used, first) or space_bit(core.held, first):
        first = _find_window(core)
        if first == 0 and core.end > 65536 and core.used_count + core.held_count < core.end // 2:
            first = _find_fragment(core)
            end = min(first + WINDOW_BLOCKS, core.end)
        elif first:
            end = first + WINDOW_BLOCKS
        if first == 0:
            first = (core.end + WINDOW_BLOCKS - 1) // WINDOW_BLOCKS * WINDOW_BLOCKS
            if first == 0:
                first = FIRST_BLOCK
            end = first // WINDOW_BLOCKS * WINDOW_BLOCKS + WINDOW_BLOCKS
            if space_grow(core, end) < 0:
                return 0
    at = first
    end = min(end, min(first + want, core.capacity))
    while at < end and not space_bit(core.used, at) and not space_bit(core.held, at):
        core.held[at >> 6] |= <uint64_t> 1 << (at & 63)
        at += 1
    count[0] = at - first
    core.held_count += at - first
    core.end = max(core.end, at)
    volume.window_next = at
    volume.window_end = (first // WINDOW_BLOCKS + 1) * WINDOW_BLOCKS
    return first


cdef void space_give_back(CoreState *core, uint64_t first, uint64_t count) noexcept nogil:
    """Held blocks are free."""
    cdef uint64_t at
    for at in range(first, first + count):
        core.held[at >> 6] &= ~(<uint64_t> 1 << (at & 63))
    core.held_count -= count


cdef void space_take_back(CoreState *core, const bint *own, const uint64_t *targets, uint64_t count) noexcept nogil:
    """The new blocks of a write that failed are free."""
    cdef uint64_t i
    for i in range(count):
        if not own[i]:
            space_give_back(core, targets[i], 1)
    # Or else the next one that fails would go further beyond the end, and so on.
    core.no_windows = 0


cdef void space_let_go(CoreState *core, uint64_t first, uint64_t count) noexcept nogil:
    """Held blocks that may have been written are punched out and free after the next `reclaim`; without memory for the
    list, after the next recovery."""
    cdef Numbers *freed = &core.freed_durable
    if count and numbers_reserve(freed, 2) == 0:
        freed.items[freed.count] = first
        freed.items[freed.count + 1] = count
        freed.count += 2


cdef void space_let_go_ready(CoreState *core, VolumeState *volume) noexcept nogil:
    space_let_go(core, volume.ready_first, volume.ready_count)
    volume.ready_count = 0


cdef int space_free(CoreState *core, const uint64_t *blocks, uint64_t count) noexcept nogil:
    """Used blocks are held until what freed them is durable. Fails before anything is done."""
    cdef uint64_t i, block, bit
    cdef Numbers *freed = &core.freed
    if numbers_reserve(freed, 2 * count) < 0:
        return NO_MEMORY
    for i in range(count):
        block = blocks[i]
        if block >= core.capacity or not space_bit(core.used, block):
            # A tree says that it holds what is free: nothing more is written until the pool is checked.
            core.failed = NOT_CONSISTENT
            continue
        bit = <uint64_t> 1 << (block & 63)
        core.used_count -= 1
        core.held_count += 1
        core.used[block >> 6] &= ~bit
        core.held[block >> 6] |= bit
        core.pieces_changed[block // PIECE_BLOCKS] = 1
        if freed.count and freed.items[freed.count - 2] + freed.items[freed.count - 1] == block:
            freed.items[freed.count - 1] += 1
        else:
            freed.items[freed.count] = block
            freed.items[freed.count + 1] = 1
            freed.count += 2
    return 0


cdef int _settle_freed(CoreState *core) noexcept nogil:
    """After a replay. A block that one record freed may be used by a later one, and be freed again: what waits to be
    freed is told by the bitmap alone."""
    cdef Numbers *freed = &core.freed
    cdef uint64_t at, left, block
    freed.count = 0
    for at in range(core.capacity // 64):
        left = core.held[at]
        while left:
            block = at * 64 + __builtin_ctzll(left)
            left &= left - 1
            if freed.count and freed.items[freed.count - 2] + freed.items[freed.count - 1] == block:
                freed.items[freed.count - 1] += 1
                continue
            if numbers_reserve(freed, 2) < 0:
                return NO_MEMORY
            freed.items[freed.count] = block
            freed.items[freed.count + 1] = 1
            freed.count += 2
    return 0


cdef int _compare_runs(const void *a, const void *b) noexcept nogil:
    cdef uint64_t one = (<const uint64_t *> a)[0]
    cdef uint64_t two = (<const uint64_t *> b)[0]
    return (one > two) - (one < two)


cdef int _reclaim(CoreState *core) noexcept nogil:
    """Punch out what is freed for good and seen by no reader, and make it free. Returns 0, or errno of a punch."""
    cdef Numbers runs
    cdef uint64_t i, first, count
    cdef VolumeState *volume
    cdef int old
    cdef int code = 0
    cdef int result
    memset(&runs, 0, sizeof(runs))
    core_lock(core)
    while core.reclaiming:
        pthread_cond_wait(&core.changed, &core.pages.lock)
    if core.closed:
        core_unlock(core)
        return 0
    core.reclaiming = 1
    volume = core.volumes
    while volume != NULL:
        space_let_go_ready(core, volume)
        volume = volume.next
    runs = core.freed_durable
    memset(&core.freed_durable, 0, sizeof(Numbers))
    old = core.epoch
    core.epoch = 1 - old
    core_unlock(core)
    while __atomic_load_n(&core.readers[old], __ATOMIC_SEQ_CST):
        medium_pause()
    if runs.count:
        qsort(runs.items, runs.count // 2, 16, _compare_runs)
    i = 0
    while i < runs.count:
        first = runs.items[i]
        count = runs.items[i + 1]
        i += 2
        while i < runs.count and runs.items[i] == first + count:
            count += runs.items[i + 1]
            i += 2
        # A host that cannot punch keeps the space until the block is used again.
        result = medium_punch(core, first * BLOCK_BYTES, count * BLOCK_BYTES)
        if result and code == 0:
            code = result
        core_lock(core)
        space_give_back(core, first, count)
        core.freed_since += count
        if core.freed_since >= WINDOW_BLOCKS:
            core.freed_since = 0
            core.no_windows = 0
        core_unlock(core)
    numbers_free(&runs)
    core_lock(core)
    core.reclaiming = 0
    pthread_cond_broadcast(&core.changed)
    core_unlock(core)
    return code


cdef uint64_t space_end(CoreState *core) noexcept nogil:
    """Behind the last used block: what writes that failed were to have does not count, and may not be in the file."""
    cdef uint64_t at = (core.end + 63) // 64
    while at:
        at -= 1
        if core.used[at]:
            return at * 64 + 64 - __builtin_clzll(core.used[at])
    return 0


cdef bint _any_used(CoreState *core, uint64_t piece) noexcept nogil:
    cdef uint64_t i
    for i in range(piece * (PIECE_BLOCKS // 64), (piece + 1) * (PIECE_BLOCKS // 64)):
        if core.used[i]:
            return True
    return False


cdef int _put_pieces(CoreState *core, Trouble *trouble) noexcept nogil:
    """Pages for the pieces of the bitmap that changed."""
    cdef uint64_t piece
    cdef uint64_t old, ref
    cdef uint64_t *entries
    cdef Numbers freed
    cdef int result
    memset(&freed, 0, sizeof(freed))
    for piece in range(core.capacity // PIECE_BLOCKS):
        if not core.pieces_changed[piece]:
            continue
        result = tree_lookup(core.pages, core.space_root, piece, 1, &old)
        if result == 0 and numbers_reserve(&core.pages.condemned, 8) < 0:
            return trouble_set(trouble, NO_MEMORY, 0, 0)
        if result < 0:
            return map_trouble(core, trouble)
        ref = ABSENT
        # A piece without a used block may lie beyond the end, so it has no page.
        if _any_used(core, piece):
            ref = page_new(core.pages, KIND_BITMAP, &entries)
            if ref == 0:
                return map_trouble(core, trouble)
            memcpy(entries, core.used + piece * (PIECE_BLOCKS // 64), PIECE_BLOCKS // 8)
        result = tree_set(core.pages, &core.space_root, ABSENT, 0, piece, 1, ref, 0, &freed)
        numbers_free(&freed)
        if result < 0:
            if ref != ABSENT:
                page_free(core.pages, ref)
            return map_trouble(core, trouble)
        if old > LOST:
            page_free(core.pages, old)
        core.pieces_changed[piece] = 0
    return 0


cdef int space_freeze(CoreState *core, Trouble *trouble) noexcept nogil:
    """The same, out of the slots that are kept for it."""
    cdef int result
    core.pages.privileged = 1
    result = _put_pieces(core, trouble)
    core.pages.privileged = 0
    return result


# Python

def reclaim(Core core not None):
    cdef int code
    with nogil:
        code = _reclaim(core.core)
    return code


def free_blocks(Core core not None, const uint64_t[::1] blocks not None):
    cdef int result = 0
    if blocks.shape[0]:
        with nogil:
            core_lock(core.core)
            result = space_free(core.core, &blocks[0], blocks.shape[0])
            core_unlock(core.core)
    if result < 0:
        raise MemoryError


def rewrite(Core core not None):
    with nogil:
        core_lock(core.core)
        memset(core.core.pieces_changed, 1, core.core.capacity // PIECE_BLOCKS)
        core_unlock(core.core)


def settle_freed(Core core not None):
    cdef int result
    with nogil:
        core_lock(core.core)
        result = _settle_freed(core.core)
        core_unlock(core.core)
    if result < 0:
        raise MemoryError


def used_bitmap(Core core not None):
    cdef uint64_t[::1] view
    cdef uint64_t words = 0
    # Made without the mutex: the collector may free a volume then, which takes it.
    while words != core._peek(&core.core.capacity) // 64:
        words = core._peek(&core.core.capacity) // 64
        out = np.zeros(words, dtype=np.uint64)
        view = out
        with nogil:
            core_lock(core.core)
            if words == core.core.capacity // 64:
                memcpy(&view[0], core.core.used, words * 8)
            else:
                words = 0
            core_unlock(core.core)
    return out
