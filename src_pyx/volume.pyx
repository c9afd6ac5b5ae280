"""The pool's data path: reading, writing and discarding of volumes.

Rules and proofs: docs/DESIGN.md ("The pool"). The order of a write:

| step | under the mutex | a crash then leaves |
| --- | --- | --- |
| register the blocks, look them up, take new blocks for those that are shared | yes | nothing |
| write the data | no | blocks that no tree refers to; in place: old or new sectors |
| change the tree, add a MAP record to the buffer | yes | the same |
| commit: sync data, write and sync the log | no | the old blocks or the new ones |
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, EIO
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from snapcore.blockmap cimport ABSENT, FAN_OUT, LOST, ZERO, tree_fill, tree_lookup, tree_set
from snapcore.core cimport (
    BACKING_CHANGED, BACKING_READ_FAILED, BLOCK_BYTES, BLOCK_OUTSIDE, DATA_LOST, DATA_READ_FAILED, DETACHED,
    FETCH_FAILED, LIMIT_REACHED, LOG_FULL, LOST_BACKING, NO_BACKING, NOT_HERE, NOT_WRITABLE, OUT_OF_RANGE, STOPPED,
    WOULD_WAIT, WRITE_FAILED, Backing, Core, CoreState, Operation, Trouble, VolumeState, __ATOMIC_SEQ_CST,
    __atomic_add_fetch, __atomic_load_n, core_lock, core_unlock, map_trouble, max_blocks, medium_get, medium_pause,
    medium_put, medium_status, pthread_cond_broadcast, pthread_cond_wait, trouble_set,
)
from snapcore.log cimport RECORD_BYTES, log_map, log_room
from snapcore.pages cimport NO_MEMORY, Numbers, numbers_free, numbers_reserve, pages_trim
from snapcore.presence cimport Presence, presence_missing
from snapcore.space cimport (
    FIRST_BLOCK, space_bit, space_free, space_give_back, space_grow, space_let_go, space_let_go_ready, space_take,
    space_take_back, space_use,
)

from snapcore.pages import Failure

cdef extern from *:
    # Read without the mutex too.
    uint64_t load_size "__atomic_load_n"(uint64_t *target, int order) noexcept nogil
    void store_size "__atomic_store_n"(uint64_t *target, uint64_t value, int order) noexcept nogil
    int __builtin_ctzll(unsigned long long value) noexcept nogil

cdef enum:
    PART_BLOCKS = 1024
    READY_BLOCKS = 64
    # Larger writes spread what a flush costs by themselves.
    SMALL_WRITE_BLOCKS = 16

cdef uint64_t MAX_SIZE_BYTES = <uint64_t> 1 << 47
cdef uint8_t[READY_BLOCKS * BLOCK_BYTES] ZEROS
memset(ZEROS, 0, sizeof(ZEROS))


cdef int _look_up(
    CoreState *core, uint64_t root, uint64_t first, uint64_t count, uint64_t *entries, Trouble *trouble
) noexcept nogil:
    """Entries, all of which lie in the data file; under the mutex."""
    cdef uint64_t i
    if tree_lookup(core.pages, root, first, <uint32_t> count, entries) < 0:
        return trouble_set(trouble, core.pages.failure, core.pages.code, core.pages.slot)
    for i in range(count):
        if entries[i] >= core.end and entries[i] > LOST:
            return trouble_set(trouble, BLOCK_OUTSIDE, 0, first + i)
    return 0


# Reading

cdef int _read_backing(
    const Backing *backing, uint8_t *data, uint64_t size_bytes, uint64_t offset, bint cached, Trouble *trouble
) noexcept nogil:
    cdef unsigned long long now_bytes = 0
    cdef long long mtime_ns = 0
    cdef uint64_t got = 0
    cdef uint64_t inside = 0
    cdef uint64_t missing
    cdef int code
    if backing.descriptor == LOST_BACKING and offset < backing.size_bytes:
        return trouble_set(trouble, BACKING_CHANGED, 0, offset)
    if backing.descriptor != NO_BACKING and offset < backing.size_bytes:
        inside = min(size_bytes, backing.size_bytes - offset)
        if backing.presence != NULL:
            missing = presence_missing(backing.presence, offset, offset + inside)
            if missing < offset + inside:
                return trouble_set(trouble, WOULD_WAIT if cached else NOT_HERE, 0, missing)
        code = medium_get(backing.descriptor, data, inside, offset, cached, &got)
        if cached and code == EAGAIN:
            return trouble_set(trouble, WOULD_WAIT, 0, offset)
        if code == 0:
            code = medium_status(backing.descriptor, &now_bytes, &mtime_ns)
        if code:
            return trouble_set(trouble, BACKING_READ_FAILED, code, offset + got)
        # An image that fills up is the pool's own: its time says nothing.
        if backing.presence != NULL:
            mtime_ns = backing.mtime_ns
        if now_bytes != backing.size_bytes or mtime_ns != backing.mtime_ns or got < inside:
            return trouble_set(trouble, BACKING_CHANGED, 0, offset + got)
    memset(data + inside, 0, size_bytes - inside)
    return 0


cdef int _read_data(
    CoreState *core, uint8_t *data, uint64_t size_bytes, uint64_t offset, bint cached, Trouble *trouble
) noexcept nogil:
    cdef uint64_t got
    cdef int code = medium_get(core.data, data, size_bytes, offset, cached, &got)
    if cached and code == EAGAIN:
        return trouble_set(trouble, WOULD_WAIT, 0, offset)
    if code or got < size_bytes:
        return trouble_set(trouble, DATA_READ_FAILED, code, offset + got)
    return 0


cdef int _read_entries(
    CoreState *core, const Backing *backing, const uint64_t *entries, uint64_t first, uint8_t *data,
    uint64_t start, uint64_t end, bint cached, Trouble *trouble
) noexcept nogil:
    """Read bytes `start` to `end` of a volume, whose entries from block `first` on are given."""
    cdef uint64_t at = start
    cdef uint64_t block, entry, length
    cdef int result
    while at < end:
        block = at // BLOCK_BYTES - first
        entry = entries[block]
        length = min(end, (at // BLOCK_BYTES + 1) * BLOCK_BYTES) - at
        while at + length < end:
            block += 1
            if entry > LOST:
                if entries[block] != entry + (block - (at // BLOCK_BYTES - first)):
                    break
            elif entries[block] != entry:
                break
            length = min(end, at + length + BLOCK_BYTES) - at
        if entry > LOST:
            result = _read_data(
                core, data + (at - start), length, entry * BLOCK_BYTES + at % BLOCK_BYTES, cached, trouble
            )
        elif entry == LOST:
            return trouble_set(trouble, DATA_LOST, 0, at)
        elif entry == ABSENT:
            result = _read_backing(backing, data + (at - start), length, at, cached, trouble)
        else:
            memset(data + (at - start), 0, length)
            result = 0
        if result < 0:
            return result
        at += length
    return 0


cdef int _fetch(CoreState *core, VolumeState *volume, uint64_t start, uint64_t end, Trouble *trouble) noexcept nogil:
    """Get a range of the image that is not all here. Nothing is held meanwhile: no cut and no reclaim waits for it."""
    cdef void *fetch
    cdef int code
    core_lock(core)
    fetch = volume.backing.fetch
    core_unlock(core)
    # Another image has taken its place meanwhile: it is looked at anew.
    if fetch == NULL:
        return 0
    code = _call(fetch, start, end)
    return trouble_set(trouble, FETCH_FAILED, code, start) if code else 0


cdef int _call(void *fetch, uint64_t start, uint64_t end) noexcept with gil:
    try:
        return (<object> fetch)(start, end)
    except BaseException:
        return EIO


cdef int volume_read(
    CoreState *core, VolumeState *volume, uint8_t *data, uint64_t size_bytes, uint64_t offset, bint cached,
    Trouble *trouble
) noexcept nogil:
    cdef int result = _read_here(core, volume, data, size_bytes, offset, cached, trouble)
    while result == NOT_HERE:
        result = _fetch(core, volume, trouble.where, offset + size_bytes, trouble)
        if result == 0:
            result = _read_here(core, volume, data, size_bytes, offset, cached, trouble)
    return result


cdef int _read_here(
    CoreState *core, VolumeState *volume, uint8_t *data, uint64_t size_bytes, uint64_t offset, bint cached,
    Trouble *trouble
) noexcept nogil:
    cdef uint64_t entries[PART_BLOCKS + 1]
    cdef uint64_t at = offset
    cdef uint64_t end = offset + size_bytes
    cdef uint64_t first, stop
    cdef const Backing *backing
    cdef int epoch
    cdef int result = 0
    while at < end and result == 0:
        first = at // BLOCK_BYTES
        stop = min(end, (first + PART_BLOCKS) * BLOCK_BYTES)
        core_lock(core)
        if not volume.attached or end > volume.size_bytes:
            core_unlock(core)
            return trouble_set(trouble, OUT_OF_RANGE if volume.attached else DETACHED, 0, offset)
        pages_trim(core.pages)
        result = _look_up(
            core, volume.root, first, (stop + BLOCK_BYTES - 1) // BLOCK_BYTES - first, entries, trouble
        )
        if result < 0:
            core_unlock(core)
            return result
        backing = volume.backing
        epoch = core.epoch
        __atomic_add_fetch(&core.readers[epoch], 1, __ATOMIC_SEQ_CST)
        __atomic_add_fetch(&volume.readers, 1, __ATOMIC_SEQ_CST)
        core_unlock(core)
        result = _read_entries(core, backing, entries, first, data + (at - offset), at, stop, cached, trouble)
        __atomic_add_fetch(&core.readers[epoch], -1, __ATOMIC_SEQ_CST)
        __atomic_add_fetch(&volume.readers, -1, __ATOMIC_SEQ_CST)
        at = stop
    return result


# Writing

cdef bint _overlaps(CoreState *core, VolumeState *volume, uint64_t first, uint64_t last) noexcept nogil:
    cdef uint64_t left = core.active
    cdef Operation *operation
    while left:
        operation = &core.operations[__builtin_ctzll(left)]
        if operation.volume == volume and operation.first <= last and first <= operation.last:
            return True
        left &= left - 1
    return False


cdef int _begin(
    CoreState *core, VolumeState *volume, uint64_t size_bytes, uint64_t offset, Trouble *trouble
) noexcept nogil:
    """Go through the gate with a range. Returns the operation's number with the mutex held, or fails without it."""
    cdef uint64_t first = offset // BLOCK_BYTES
    cdef uint64_t last = (offset + size_bytes - 1) // BLOCK_BYTES
    cdef int number
    core_lock(core)
    while True:
        if core.failed:
            number = trouble_set(trouble, STOPPED, core.failed, 0)
        elif not volume.attached:
            number = trouble_set(trouble, DETACHED, 0, 0)
        elif not volume.writable:
            number = trouble_set(trouble, NOT_WRITABLE, 0, 0)
        elif offset + size_bytes > volume.size_bytes:
            number = trouble_set(trouble, OUT_OF_RANGE, 0, offset)
        else:
            number = 0
        if number < 0:
            core_unlock(core)
            return number
        if volume.gate == 0 and ~core.active and not _overlaps(core, volume, first, last):
            break
        pthread_cond_wait(&core.changed, &core.pages.lock)
    number = __builtin_ctzll(~core.active)
    core.active |= <uint64_t> 1 << number
    core.operations[number].volume = volume
    core.operations[number].first = first
    core.operations[number].last = last
    volume.inside += 1
    pages_trim(core.pages)
    return number


cdef void _end(CoreState *core, VolumeState *volume, int number) noexcept nogil:
    """Leave; the mutex is held before and not after."""
    core.active &= ~(<uint64_t> 1 << number)
    volume.inside -= 1
    pthread_cond_broadcast(&core.changed)
    core_unlock(core)


cdef int _take_targets(
    CoreState *core, VolumeState *volume, const bint *own, uint64_t *targets, uint64_t count, Trouble *trouble
) noexcept nogil:
    """Hold a new block for each position that is not the volume's own."""
    cdef uint64_t i = 0
    cdef uint64_t want, got, block, j
    while i < count:
        if own[i]:
            i += 1
            continue
        want = 1
        while i + want < count and not own[i + want]:
            want += 1
        block = space_take(core, volume, want, &got)
        if block == 0:
            space_take_back(core, own, targets, i)
            return trouble_set(trouble, LIMIT_REACHED, 0, core.limit_blocks)
        for j in range(got):
            targets[i + j] = block + j
        i += got
    return 0


cdef int _write_edge(
    CoreState *core, VolumeState *volume, const uint64_t *old, uint64_t target, bint own, uint64_t position,
    const uint8_t *data, uint64_t start, uint64_t end, Trouble *trouble
) noexcept nogil:
    """Write bytes `start` to `end` of one block: in place, or into a new block with the rest of the old one."""
    cdef uint8_t block[BLOCK_BYTES]
    cdef uint64_t whole = min(<uint64_t> BLOCK_BYTES, volume.size_bytes - position * BLOCK_BYTES)
    cdef int code
    cdef int result
    if own:
        code = medium_put(core, core.data, data, end - start, target * BLOCK_BYTES + start)
    else:
        memset(block, 0, BLOCK_BYTES)
        result = _read_entries(
            core, volume.backing, old, position, block, position * BLOCK_BYTES, position * BLOCK_BYTES + whole, False,
            trouble,
        )
        if result < 0:
            return result
        memcpy(block + start, data, end - start)
        code = medium_put(core, core.data, block, BLOCK_BYTES, target * BLOCK_BYTES)
    return trouble_set(trouble, WRITE_FAILED, code, target * BLOCK_BYTES) if code else 0


cdef int _write_blocks(
    CoreState *core, VolumeState *volume, const uint64_t *old, const uint64_t *targets, const bint *own,
    uint64_t first, const uint8_t *data, uint64_t start, uint64_t end, Trouble *trouble
) noexcept nogil:
    """Write bytes `start` to `end` of a volume to the blocks that were chosen for them."""
    cdef uint64_t at = start
    cdef uint64_t i, count, stop
    cdef int code
    cdef int result
    while at < end:
        i = at // BLOCK_BYTES - first
        stop = min(end, (at // BLOCK_BYTES + 1) * BLOCK_BYTES)
        if stop - at < BLOCK_BYTES:
            result = _write_edge(
                core, volume, old + i, targets[i], own[i], first + i, data + (at - start), at % BLOCK_BYTES,
                at % BLOCK_BYTES + (stop - at), trouble,
            )
            if result < 0:
                return result
            at = stop
            continue
        count = 1
        while at + (count + 1) * BLOCK_BYTES <= end and targets[i + count] == targets[i] + count:
            count += 1
        code = medium_put(core, core.data, data + (at - start), count * BLOCK_BYTES, targets[i] * BLOCK_BYTES)
        if code:
            return trouble_set(trouble, WRITE_FAILED, code, targets[i] * BLOCK_BYTES)
        at += count * BLOCK_BYTES
    return 0


cdef int _map_targets(
    CoreState *core, VolumeState *volume, const uint64_t *old, const uint64_t *targets, const bint *own,
    uint64_t first, uint64_t count, Trouble *trouble
) noexcept nogil:
    """Change the tree to the new blocks and log it. What fails is given back, what was done stays and is logged."""
    cdef Numbers freed
    cdef uint64_t i = 0
    cdef uint64_t run, j
    cdef int result = 0
    memset(&freed, 0, sizeof(freed))
    while i < count:
        if own[i]:
            i += 1
            continue
        run = 1
        while (
            i + run < count and not own[i + run] and targets[i + run] == targets[i] + run
            and (first + i + run) & (FAN_OUT - 1)
        ):
            run += 1
        if result == 0:
            result = tree_set(
                core.pages, &volume.root, volume.parent, 0, first + i, <uint32_t> run, targets[i], 1, &freed
            )
            if result < 0:
                result = map_trouble(core, trouble)
        if result < 0:
            space_give_back(core, targets[i], run)
        else:
            for j in range(run):
                space_use(core, targets[i + j])
                if old[i + j] > LOST:
                    volume.stirred = 1
            log_map(core, volume.version, first + i, run, targets[i])
        i += run
    numbers_free(&freed)
    return result


cdef int _write_part(
    CoreState *core, VolumeState *volume, const uint8_t *data, uint64_t start, uint64_t end, Trouble *trouble
) noexcept nogil:
    """Write a part of at most PART_BLOCKS; the mutex is held before and after."""
    cdef uint64_t old[PART_BLOCKS]
    cdef uint64_t beside[PART_BLOCKS]
    cdef bint own[PART_BLOCKS]
    cdef uint64_t first = start // BLOCK_BYTES
    cdef uint64_t count = (end + BLOCK_BYTES - 1) // BLOCK_BYTES - first
    cdef uint64_t *targets = beside
    cdef uint64_t new_blocks = 0
    cdef uint64_t i
    cdef int result
    result = _look_up(core, volume.root, first, count, old, trouble)
    if result == 0:
        result = _look_up(core, volume.parent, first, count, beside, trouble)
    if result < 0:
        return result
    for i in range(count):
        own[i] = old[i] > LOST and old[i] != beside[i]
        targets[i] = old[i]
        new_blocks += not own[i]
    if new_blocks:
        result = log_room(core, new_blocks * RECORD_BYTES, core.log_reserve)
        if result < 0:
            return trouble_set(trouble, result, 0, 0)
        result = _take_targets(core, volume, own, targets, count, trouble)
        if result < 0:
            return result
    core_unlock(core)
    result = _write_blocks(core, volume, old, targets, own, first, data, start, end, trouble)
    core_lock(core)
    core.data_written = 1
    if result < 0:
        space_take_back(core, own, targets, count)
        return result
    if new_blocks:
        # The buffer was taken by a commit perhaps, and its memory with it.
        result = log_room(core, new_blocks * RECORD_BYTES, 0)
        if result < 0:
            space_take_back(core, own, targets, count)
            return trouble_set(trouble, result, 0, 0)
        result = _map_targets(core, volume, old, targets, own, first, count, trouble)
        if result == 0 and new_blocks <= SMALL_WRITE_BLOCKS:
            _make_ready(core, volume)
    return result


cdef void _make_ready(CoreState *core, VolumeState *volume) noexcept nogil:
    """After a small write that took new blocks: write zeros to those that the next ones will take, from the second on.

    The host's file system makes room for many blocks at once for less than for one after the other, and a sync that
    makes it allocate costs several times one that does not. The mutex is held before and after, and let go in between;
    what the write itself needs of the host it has by now.
    """
    cdef bint is_first = not volume.takes
    cdef uint64_t first
    cdef uint64_t count = 0
    cdef int code
    volume.takes = 1
    if is_first or volume.ready_count or volume.preparing:
        return
    if core.limit_blocks and core.used_count + core.held_count + READY_BLOCKS >= core.limit_blocks:
        return
    first = space_take(core, volume, READY_BLOCKS, &count)
    if first == 0:
        return
    volume.preparing = 1
    core_unlock(core)
    code = medium_put(core, core.data, ZEROS, count * BLOCK_BYTES, first * BLOCK_BYTES)
    core_lock(core)
    volume.preparing = 0
    if code or not volume.attached:
        space_let_go(core, first, count)
        return
    core.data_written = 1
    volume.ready_first = first
    volume.ready_count = count


cdef int volume_write(
    CoreState *core, VolumeState *volume, const uint8_t *data, uint64_t size_bytes, uint64_t offset, Trouble *trouble
) noexcept nogil:
    cdef int result = _write_here(core, volume, data, size_bytes, offset, trouble)
    # The rest of a block that is written in part: nothing else has to be here.
    while result == NOT_HERE:
        result = _fetch(core, volume, trouble.where, trouble.where + 1, trouble)
        if result == 0:
            result = _write_here(core, volume, data, size_bytes, offset, trouble)
    return result


cdef int _write_here(
    CoreState *core, VolumeState *volume, const uint8_t *data, uint64_t size_bytes, uint64_t offset, Trouble *trouble
) noexcept nogil:
    cdef uint64_t at = offset
    cdef uint64_t end = offset + size_bytes
    cdef uint64_t stop
    cdef int number
    cdef int result = 0
    if size_bytes == 0:
        return 0
    number = _begin(core, volume, size_bytes, offset, trouble)
    if number < 0:
        return number
    while at < end and result == 0:
        stop = min(end, (at // BLOCK_BYTES + PART_BLOCKS) * BLOCK_BYTES)
        result = _write_part(core, volume, data + (at - offset), at, stop, trouble)
        at = stop
    _end(core, volume, number)
    return result


cdef int _zero_edge(
    CoreState *core, VolumeState *volume, uint64_t start, uint64_t end, Trouble *trouble
) noexcept nogil:
    """Zeros for a part of one block, unless it is zero already; the mutex is held before and after."""
    cdef uint64_t entry
    cdef int result = _look_up(core, volume.root, start // BLOCK_BYTES, 1, &entry, trouble)
    if result < 0:
        return result
    if entry == ZERO or (entry == ABSENT and volume.backing.descriptor == NO_BACKING):
        return 0
    return _write_part(core, volume, ZEROS, start, end, trouble)


cdef int _zero_blocks(
    CoreState *core, VolumeState *volume, uint64_t first, uint64_t last, Trouble *trouble
) noexcept nogil:
    """Drop whole blocks; the mutex is held before and after, and let go in between."""
    cdef Numbers freed
    cdef uint64_t at = first
    cdef uint64_t before
    cdef uint64_t entry = ABSENT if volume.backing.descriptor == NO_BACKING else ZERO
    cdef int result = 0
    while at < last:
        memset(&freed, 0, sizeof(freed))
        result = log_room(core, RECORD_BYTES, core.log_reserve)
        if result < 0:
            return trouble_set(trouble, result, 0, 0)
        # A step frees 128 * 128 blocks at most.
        result = numbers_reserve(&core.freed, 4 * FAN_OUT * FAN_OUT)
        if result < 0:
            return trouble_set(trouble, result, 0, 0)
        before = at
        result = tree_fill(core.pages, &volume.root, volume.parent, &at, last, entry, &freed)
        if result < 0:
            result = map_trouble(core, trouble)
            numbers_free(&freed)
            return result
        space_free(core, freed.items, freed.count)
        numbers_free(&freed)
        log_map(core, volume.version, before, at - before, entry)
        volume.stirred = 1
        core_unlock(core)
        core_lock(core)
        pages_trim(core.pages)
    return 0


cdef int volume_zero(
    CoreState *core, VolumeState *volume, uint64_t size_bytes, uint64_t offset, Trouble *trouble
) noexcept nogil:
    cdef int result = _zero_here(core, volume, size_bytes, offset, trouble)
    while result == NOT_HERE:
        result = _fetch(core, volume, trouble.where, trouble.where + 1, trouble)
        if result == 0:
            result = _zero_here(core, volume, size_bytes, offset, trouble)
    return result


cdef int _zero_here(
    CoreState *core, VolumeState *volume, uint64_t size_bytes, uint64_t offset, Trouble *trouble
) noexcept nogil:
    cdef uint64_t end = offset + size_bytes
    cdef uint64_t first = (offset + BLOCK_BYTES - 1) // BLOCK_BYTES
    cdef uint64_t last = end // BLOCK_BYTES
    cdef int number
    cdef int result = 0
    if size_bytes == 0:
        return 0
    number = _begin(core, volume, size_bytes, offset, trouble)
    if number < 0:
        return number
    # The last block of a disk is whole, however short.
    if end == volume.size_bytes:
        last = (end + BLOCK_BYTES - 1) // BLOCK_BYTES
    if first > last:
        result = _zero_edge(core, volume, offset, end, trouble)
    else:
        if offset < first * BLOCK_BYTES:
            result = _zero_edge(core, volume, offset, first * BLOCK_BYTES, trouble)
        if result == 0 and last * BLOCK_BYTES < end:
            result = _zero_edge(core, volume, last * BLOCK_BYTES, end, trouble)
        if result == 0:
            result = _zero_blocks(core, volume, first, last, trouble)
    _end(core, volume, number)
    return result


# Replaying

cdef int _replay(
    CoreState *core, VolumeState *volume, uint64_t position, uint64_t count, uint64_t entry
) noexcept nogil:
    """Do a MAP record again."""
    cdef uint64_t at = position
    cdef uint64_t last = position + count
    cdef uint64_t part, block, i
    cdef unsigned long long data_bytes = 0
    cdef long long mtime_ns = 0
    cdef Numbers freed
    cdef int result = 0
    memset(&freed, 0, sizeof(freed))
    if last > (volume.size_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES:
        return OUT_OF_RANGE
    if entry > LOST:
        if entry >= max_blocks() or entry + count > max_blocks() or entry < FIRST_BLOCK:
            return BLOCK_OUTSIDE
        # What a record tells of was in the file before it. Memory for the bitmap follows the file, not the record.
        if medium_status(core.data, &data_bytes, &mtime_ns) or (entry + count) * BLOCK_BYTES > data_bytes:
            return BLOCK_OUTSIDE
        if space_grow(core, entry + count) < 0:
            return NO_MEMORY
        for block in range(entry, entry + count):
            if space_bit(core.used, block):
                return BLOCK_OUTSIDE
    volume.stirred = 1
    while at < last and result == 0:
        freed.count = 0
        if entry > LOST:
            part = min(last - at, <uint64_t> FAN_OUT - (at & (FAN_OUT - 1)))
            result = tree_set(
                core.pages, &volume.root, volume.parent, 0, at, <uint32_t> part, entry + (at - position), 1, &freed
            )
            if result == 0:
                for i in range(part):
                    block = entry + (at - position) + i
                    if not space_bit(core.held, block):
                        core.held[block >> 6] |= <uint64_t> 1 << (block & 63)
                        core.held_count += 1
                    space_use(core, block)
                core.end = max(core.end, entry + count)
            at += part
        else:
            result = tree_fill(core.pages, &volume.root, volume.parent, &at, last, entry, &freed)
        if result == 0:
            result = space_free(core, freed.items, freed.count)
    numbers_free(&freed)
    return result


# Python

def close_gates(volumes):
    cdef Volume volume
    for volume in volumes:
        with nogil:
            core_lock(volume.core.core)
            volume.volume.gate += 1
            core_unlock(volume.core.core)
    for volume in volumes:
        with nogil:
            core_lock(volume.core.core)
            while volume.volume.inside:
                pthread_cond_wait(&volume.core.core.changed, &volume.core.core.pages.lock)
            core_unlock(volume.core.core)


def open_gates(volumes):
    cdef Volume volume
    for volume in volumes:
        with nogil:
            core_lock(volume.core.core)
            volume.volume.gate -= 1
            pthread_cond_broadcast(&volume.core.core.changed)
            core_unlock(volume.core.core)


# Freed only when nobody refers to it: the collector would take what `__dealloc__` needs first.
@cython.no_gc_clear
cdef class Volume:
    def __cinit__(
        self, Core core not None, *, uint64_t root, uint64_t parent, uint64_t size_bytes, uint32_t version,
        bint writable, bint watched=False, int backing=NO_BACKING, uint64_t backing_bytes=0, int64_t backing_mtime_ns=0,
        Presence presence=None, fetch=None,
    ):
        if size_bytes > MAX_SIZE_BYTES:
            raise ValueError("a volume has at most 128 TiB")
        self.core = core
        self.volume = <VolumeState *> calloc(1, sizeof(VolumeState))
        if self.volume == NULL:
            raise MemoryError
        self.volume.root = root
        self.volume.parent = parent
        self.volume.size_bytes = size_bytes
        self.volume.version = version
        self.volume.writable = writable
        self.volume.watched = watched
        self._put_backing(backing, backing_bytes, backing_mtime_ns, presence, fetch)
        with nogil:
            core_lock(core.core)
        self.volume.attached = not core.core.closed
        self.volume.next = core.core.volumes
        core.core.volumes = self.volume
        core_unlock(core.core)

    def __dealloc__(self):
        cdef Backing *backing
        if self.volume != NULL:
            self._unlink()
            while self.volume.backing != NULL:
                backing = self.volume.backing
                self.volume.backing = backing.next
                free(backing)
            free(self.volume)

    cdef void _unlink(self):
        cdef VolumeState **link
        with nogil:
            core_lock(self.core.core)
        link = &self.core.core.volumes
        while link[0] != NULL and link[0] != self.volume:
            link = &link[0].next
        if link[0] != NULL:
            link[0] = self.volume.next
            space_let_go_ready(self.core.core, self.volume)
        core_unlock(self.core.core)

    def detach(self):
        with nogil:
            core_lock(self.core.core)
            self.volume.attached = 0
            pthread_cond_broadcast(&self.core.core.changed)
            while self.volume.inside:
                pthread_cond_wait(&self.core.core.changed, &self.core.core.pages.lock)
            core_unlock(self.core.core)
            while __atomic_load_n(&self.volume.readers, __ATOMIC_SEQ_CST):
                medium_pause()

    def replay(self, uint64_t position, uint64_t count, uint64_t entry):
        cdef CoreState *core = self.core.core
        cdef int result
        with nogil:
            core_lock(core)
            pages_trim(core.pages)
            result = _replay(core, self.volume, position, count, entry)
            core_unlock(core)
        if result == NO_MEMORY:
            raise MemoryError
        if result < 0:
            raise Failure(result, core.pages.code, core.pages.slot if result > LOG_FULL else position)

    @property
    def root(self):
        return self.volume.root

    @property
    def parent(self):
        return self.volume.parent

    @property
    def frozen_root(self):
        return self.volume.frozen_root

    @property
    def size_bytes(self):
        return load_size(&self.volume.size_bytes, __ATOMIC_SEQ_CST)

    @property
    def version(self):
        return self.volume.version

    @property
    def attached(self):
        return bool(self.volume.attached)

    def take_stirred(self):
        cdef bint stirred
        with nogil:
            core_lock(self.core.core)
            stirred = self.volume.stirred and self.volume.watched
            self.volume.stirred = 0
            core_unlock(self.core.core)
        return stirred

    def change(self, *, uint64_t root, uint64_t parent, uint64_t size_bytes, uint32_t version, bint watched):
        if size_bytes > MAX_SIZE_BYTES:
            raise ValueError("a volume has at most 128 TiB")
        with nogil:
            core_lock(self.core.core)
            self.volume.root = root
            self.volume.parent = parent
            store_size(&self.volume.size_bytes, size_bytes, __ATOMIC_SEQ_CST)
            self.volume.version = version
            self.volume.watched = watched
            core_unlock(self.core.core)

    cdef int _put_backing(
        self, int descriptor, uint64_t size_bytes, int64_t mtime_ns, Presence presence, object fetch
    ) except -1:
        """Readers may still look at the one before: it lives as long as this object, and what it refers to."""
        cdef Backing *backing = <Backing *> calloc(1, sizeof(Backing))
        if backing == NULL:
            raise MemoryError
        self._kept = (self._kept, presence, fetch)
        backing.descriptor = descriptor
        backing.size_bytes = size_bytes
        backing.mtime_ns = mtime_ns
        backing.presence = NULL if presence is None else &presence.state
        backing.fetch = NULL if fetch is None else <void *> fetch
        with nogil:
            core_lock(self.core.core)
            backing.next = self.volume.backing
            self.volume.backing = backing
            core_unlock(self.core.core)
        return 0

    def change_backing(
        self, int backing, uint64_t backing_bytes, int64_t backing_mtime_ns, Presence presence=None, fetch=None
    ):
        self._put_backing(backing, backing_bytes, backing_mtime_ns, presence, fetch)

    def pread_into(self, buffer, int64_t offset):
        # A buffer and not a typed memoryview, which takes as long to make as the read.
        cdef Trouble trouble
        cdef Py_buffer view
        cdef uint64_t size_bytes, whole
        cdef int result = 0
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            size_bytes = <uint64_t> view.len
            if offset < 0:
                result = trouble_set(&trouble, OUT_OF_RANGE, 0, 0)
            else:
                whole = load_size(&self.volume.size_bytes, __ATOMIC_SEQ_CST)
                size_bytes = min(size_bytes, whole - min(whole, <uint64_t> offset))
            if result == 0 and size_bytes:
                with nogil:
                    result = volume_read(
                        self.core.core, self.volume, <uint8_t *> view.buf, size_bytes, <uint64_t> offset, False,
                        &trouble,
                    )
        finally:
            PyBuffer_Release(&view)
        if result < 0:
            self.core.check(&trouble, result)
        return size_bytes

    def pread_many(self, const int64_t[::1] offsets not None, uint8_t[:, ::1] buffers not None):
        cdef Trouble trouble
        cdef int result = 0
        cdef int64_t i
        if buffers.shape[0] != offsets.shape[0]:
            raise ValueError(f"{offsets.shape[0]} offsets and {buffers.shape[0]} buffers")
        if offsets.shape[0] and buffers.shape[1]:
            with nogil:
                for i in range(offsets.shape[0]):
                    if offsets[i] < 0 or <uint64_t> offsets[i] > MAX_SIZE_BYTES:
                        result = trouble_set(&trouble, OUT_OF_RANGE, 0, offsets[i])
                    else:
                        result = volume_read(
                            self.core.core, self.volume, &buffers[i, 0], buffers.shape[1], offsets[i], False, &trouble
                        )
                    if result < 0:
                        break
            if result < 0:
                self.core.check(&trouble, result)
        return offsets.shape[0] * buffers.shape[1]

    def pwrite(self, data, int64_t offset):
        cdef Trouble trouble
        cdef Py_buffer view
        cdef uint64_t size_bytes
        cdef int result = 0
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            size_bytes = <uint64_t> view.len
            if offset < 0 or <uint64_t> offset > MAX_SIZE_BYTES or size_bytes > MAX_SIZE_BYTES:
                result = trouble_set(&trouble, OUT_OF_RANGE, 0, 0 if offset < 0 else <uint64_t> offset)
            elif size_bytes:
                with nogil:
                    result = volume_write(
                        self.core.core, self.volume, <const uint8_t *> view.buf, size_bytes, <uint64_t> offset, &trouble
                    )
        finally:
            PyBuffer_Release(&view)
        if result < 0:
            self.core.check(&trouble, result)
        return size_bytes

    def zero(self, int64_t offset, int64_t size_bytes):
        cdef Trouble trouble
        cdef int result
        if not 0 <= offset <= <int64_t> MAX_SIZE_BYTES or not 0 <= size_bytes <= <int64_t> MAX_SIZE_BYTES:
            raise Failure(OUT_OF_RANGE, 0, max(0, offset))
        with nogil:
            result = volume_zero(self.core.core, self.volume, size_bytes, offset, &trouble)
        if result < 0:
            self.core.check(&trouble, result)
