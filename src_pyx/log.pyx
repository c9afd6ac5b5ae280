"""The log of a pool: records in memory, the sectors they are written in, and the commit that makes them durable.

Bytes: docs/FORMAT.md ("Log sector"); rules: docs/DESIGN.md ("Durability"). A commit syncs the data, then writes and
syncs the log; those who ask for one at the same time share it. A checkpoint begins with a commit.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset

import numpy as np

from snapcore.blockmap cimport LOST
from snapcore.core cimport (
    LOG_FULL, STOPPED, Core, CoreState, Trouble, VolumeState, core_lock, core_unlock, map_trouble, max_blocks,
    medium_put, medium_sync, pthread_cond_broadcast, pthread_cond_wait, trouble_set,
)
from snapcore.digest cimport xxh64_of
from snapcore.pages cimport (
    NO_MEMORY, Numbers, numbers_array, numbers_free, numbers_move, pages_dirty, pages_freeze, pages_used,
)
from snapcore.space cimport space_end, space_freeze

cdef enum:
    SECTOR_BYTES = 512
    SECTOR_HEADER_BYTES = 24
    PAYLOAD_BYTES = 488
    RECORD_MAP = 1
    RECORD_EVENT = 2
    LAST_OF_COMMIT = 1

cdef enum:
    SECTOR_EMPTY = 0
    SECTOR_VALID = 1
    SECTOR_DAMAGED = 2

cdef uint64_t MAX_COUNT = (<uint64_t> 1 << 24) - 1


cdef inline uint64_t _sectors(uint64_t payload_bytes) noexcept nogil:
    return (payload_bytes + PAYLOAD_BYTES - 1) // PAYLOAD_BYTES


cdef int log_room(CoreState *core, uint64_t more_bytes, uint64_t reserve) noexcept nogil:
    """The buffer with so much more fits into the log and into memory."""
    cdef uint64_t free_sectors = core.log_sectors - (core.log_next - core.log_tail)
    cdef uint64_t need = core.buffer_bytes + more_bytes
    cdef uint64_t capacity
    cdef uint8_t *buffer
    if _sectors(need) + reserve > free_sectors:
        return LOG_FULL
    if need > core.buffer_capacity:
        capacity = max(need, 2 * core.buffer_capacity)
        buffer = <uint8_t *> realloc(core.buffer, capacity)
        if buffer == NULL:
            return NO_MEMORY
        core.buffer = buffer
        core.buffer_capacity = capacity
    return 0


cdef void log_map(CoreState *core, uint32_t version, uint64_t position, uint64_t count, uint64_t entry) noexcept nogil:
    """Add a MAP record, for which there is room; it joins the last one where it goes on."""
    cdef uint32_t *head
    cdef uint64_t *body
    cdef uint64_t before
    if core.buffer_bytes >= RECORD_BYTES and core.last_record == core.buffer_bytes - RECORD_BYTES:
        head = <uint32_t *> (core.buffer + core.last_record)
        body = <uint64_t *> (core.buffer + core.last_record + 8)
        before = body[0] >> 40
        if (
            head[1] == version
            and (body[0] & (max_blocks() - 1)) + before == position
            and before + count <= MAX_COUNT
            and (entry == body[1] if entry <= LOST else body[1] > LOST and body[1] + before == entry)
        ):
            body[0] += count << 40
            return
    core.last_record = core.buffer_bytes
    head = <uint32_t *> (core.buffer + core.buffer_bytes)
    body = <uint64_t *> (core.buffer + core.buffer_bytes + 8)
    head[0] = RECORD_MAP
    head[1] = version
    body[0] = position | count << 40
    body[1] = entry
    core.buffer_bytes += RECORD_BYTES


cdef void _fill_sectors(
    CoreState *core, uint8_t *sectors, const uint8_t *payload, uint64_t payload_bytes, uint64_t first, uint64_t commit
) noexcept nogil:
    cdef uint64_t count = _sectors(payload_bytes)
    cdef uint64_t i, part
    cdef uint8_t *sector
    for i in range(count):
        sector = sectors + i * SECTOR_BYTES
        part = min(<uint64_t> PAYLOAD_BYTES, payload_bytes - i * PAYLOAD_BYTES)
        (<uint64_t *> sector)[1] = first + i
        (<uint32_t *> sector)[4] = <uint32_t> commit
        (<uint16_t *> sector)[10] = <uint16_t> part
        (<uint16_t *> sector)[11] = LAST_OF_COMMIT if i == count - 1 else 0
        memcpy(sector + SECTOR_HEADER_BYTES, payload + i * PAYLOAD_BYTES, part)
        memset(sector + SECTOR_HEADER_BYTES + part, 0, PAYLOAD_BYTES - part)
        (<uint64_t *> sector)[0] = xxh64_of(sector + 8, SECTOR_BYTES - 8, core.seed)


cdef int _write_log(CoreState *core, const uint8_t *sectors, uint64_t count, uint64_t first) noexcept nogil:
    cdef uint64_t place = first % core.log_sectors
    cdef uint64_t part = min(count, core.log_sectors - place)
    cdef int code = medium_put(core, core.log, sectors, part * SECTOR_BYTES, place * SECTOR_BYTES)
    if code == 0 and part < count:
        code = medium_put(core, core.log, sectors + part * SECTOR_BYTES, (count - part) * SECTOR_BYTES, 0)
    return code if code else medium_sync(core, core.log)


cdef int _commit(CoreState *core, bint freezing, Numbers *dirty, Numbers *slots, Trouble *trouble) noexcept nogil:
    """Make all that was written durable, together with others who ask at the same time; with `freezing` alone, and a
    checkpoint begins at the very moment that the buffer is taken."""
    cdef uint64_t mine, upto, count, first, commit, payload_bytes
    cdef uint8_t *payload
    cdef uint8_t *sectors
    cdef Numbers freed
    cdef bint sync_data
    cdef int code = 0
    cdef int result = 0
    cdef VolumeState *volume
    core_lock(core)
    core.requested += 1
    mine = core.requested
    while True:
        if core.failed:
            core_unlock(core)
            return trouble_set(trouble, STOPPED, core.failed, 0)
        if core.finished >= mine and not freezing:
            core_unlock(core)
            return 0
        if not core.committing:
            break
        pthread_cond_wait(&core.changed, &core.pages.lock)
    payload_bytes = core.buffer_bytes
    count = _sectors(payload_bytes)
    sectors = NULL
    if count > core.log_sectors - (core.log_next - core.log_tail):
        result = trouble_set(trouble, LOG_FULL, 0, 0)
    elif count:
        sectors = <uint8_t *> malloc(count * SECTOR_BYTES)
        if sectors == NULL:
            result = trouble_set(trouble, NO_MEMORY, 0, 0)
    if result == 0 and freezing:
        result = space_freeze(core, trouble)
        if result == 0 and (
            pages_dirty(core.pages, dirty) < 0 or pages_used(core.pages, slots) < 0 or pages_freeze(core.pages) < 0
        ):
            result = map_trouble(core, trouble)
    if result < 0:
        core_unlock(core)
        free(sectors)
        return result
    core.committing = 1
    upto = core.requested
    payload = core.buffer
    core.buffer = NULL
    core.buffer_bytes = core.buffer_capacity = 0
    first = core.log_next
    commit = core.commit_number
    core.log_next += count
    core.commit_number += count > 0
    freed = core.freed
    memset(&core.freed, 0, sizeof(Numbers))
    sync_data = core.data_written
    core.data_written = 0
    if freezing:
        core.frozen_log_next = core.log_next
        core.frozen_commit = core.commit_number
        core.frozen_end = space_end(core)
        core.frozen_space_root = core.space_root
        volume = core.volumes
        while volume != NULL:
            volume.frozen_root = volume.root
            volume = volume.next
    core_unlock(core)
    if sync_data:
        code = medium_sync(core, core.data)
    if count and code == 0:
        _fill_sectors(core, sectors, payload, payload_bytes, first, commit)
        code = _write_log(core, sectors, count, first)
    free(sectors)
    free(payload)
    core_lock(core)
    if code:
        core.failed = code
        numbers_free(&freed)
        result = trouble_set(trouble, STOPPED, code, 0)
    else:
        core.finished = upto
        core.commits += 1
        # Without memory for the list the blocks stay held until the pool is opened again.
        numbers_move(&core.freed_durable, &freed)
        numbers_free(&freed)
    core.committing = 0
    pthread_cond_broadcast(&core.changed)
    core_unlock(core)
    return result


cdef int log_commit(CoreState *core, Trouble *trouble) noexcept nogil:
    return _commit(core, False, NULL, NULL, trouble)


# Python

def read_sectors(const uint8_t[::1] data not None, uint64_t seed):
    cdef int64_t count = data.shape[0] // SECTOR_BYTES
    cdef const uint8_t *sector
    cdef int64_t i
    cdef int j
    cdef uint64_t any_bits
    out = np.zeros((count, 5), dtype=np.int64)
    cdef int64_t[:, ::1] view = out
    if data.shape[0] % SECTOR_BYTES:
        raise ValueError("not a whole number of sectors")
    with nogil:
        for i in range(count):
            sector = &data[i * SECTOR_BYTES]
            if (<const uint64_t *> sector)[0] == xxh64_of(sector + 8, SECTOR_BYTES - 8, seed):
                view[i, 0] = SECTOR_VALID
            else:
                any_bits = 0
                for j in range(SECTOR_BYTES // 8):
                    any_bits |= (<const uint64_t *> sector)[j]
                view[i, 0] = SECTOR_DAMAGED if any_bits else SECTOR_EMPTY
            view[i, 1] = (<const int64_t *> sector)[1]
            view[i, 2] = (<const uint32_t *> sector)[4]
            view[i, 3] = (<const uint16_t *> sector)[10]
            view[i, 4] = (<const uint16_t *> sector)[11]
    return out


def append_event(Core core not None, const uint8_t[::1] payload not None):
    cdef uint64_t padded = (payload.shape[0] + 7) // 8 * 8
    cdef uint8_t *at
    cdef Trouble trouble
    cdef int result
    memset(&trouble, 0, sizeof(trouble))
    with nogil:
        core_lock(core.core)
        result = log_room(core.core, 8 + padded, 0)
        if core.core.failed:
            result = STOPPED
            trouble.code = core.core.failed
        if result == 0:
            at = core.core.buffer + core.core.buffer_bytes
            (<uint32_t *> at)[0] = RECORD_EVENT
            (<uint32_t *> at)[1] = <uint32_t> payload.shape[0]
            memset(at + 8, 0, padded)
            if payload.shape[0]:
                memcpy(at + 8, &payload[0], payload.shape[0])
            core.core.buffer_bytes += 8 + padded
            # No MAP record joins one that stands before this.
            core.core.last_record = core.core.buffer_bytes
        core_unlock(core.core)
    trouble.result = result
    core.check(&trouble, result)


def commit(Core core not None):
    cdef Trouble trouble
    cdef int result
    memset(&trouble, 0, sizeof(trouble))
    with nogil:
        result = log_commit(core.core, &trouble)
    core.check(&trouble, result)


def freeze(Core core not None):
    cdef Trouble trouble
    cdef Numbers dirty
    cdef Numbers slots
    cdef uint64_t generation = core.core.pages.generation
    cdef int result
    memset(&trouble, 0, sizeof(trouble))
    memset(&dirty, 0, sizeof(dirty))
    memset(&slots, 0, sizeof(slots))
    with nogil:
        result = _commit(core.core, True, &dirty, &slots, &trouble)
    try:
        core.check(&trouble, result)
        return (
            generation, numbers_array(&dirty), numbers_array(&slots), core.core.frozen_log_next,
            core.core.frozen_commit, core.core.frozen_end, core.core.frozen_space_root,
        )
    finally:
        numbers_free(&dirty)
        numbers_free(&slots)


def release(Core core not None, uint64_t log_tail):
    core.page_file.release()
    with nogil:
        core_lock(core.core)
        core.core.log_tail = log_tail
        core_unlock(core.core)
