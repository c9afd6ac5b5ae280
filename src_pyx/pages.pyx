"""Pages of 1 KiB in the slots of a pool's map file: read, checked, made, changed in memory, frozen for a checkpoint.

Layout and rules: docs/FORMAT.md ("Slot"), docs/DESIGN.md ("The pool"). Pages are read into sheets of sixteen slots by
pread, checked once, and never mapped from the file. A page of the current generation is in no checkpoint and may change
in place; any other is copied to a new slot. What pages hold is not looked at here. Free functions hold the work, under
`Pages.lock`; the class is for Python, which never holds the lock.
"""

from libc.errno cimport EBADF, EINTR, EINVAL, ENOSPC, ENOSYS, EOPNOTSUPP, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset
from posix.types cimport off_t
from posix.unistd cimport pread

import numpy as np

from snapcore.digest cimport xxh64_of

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #if defined(__linux__)
    static int snapcore_reserve(int descriptor, off_t offset, off_t length) {
        return fallocate(descriptor, 0, offset, length) == 0 ? 0 : errno;
    }
    #else
    static int snapcore_reserve(int descriptor, off_t offset, off_t length) { return 0; }
    #endif
    """
    int snapcore_reserve(int descriptor, off_t offset, off_t length) noexcept nogil
    int __builtin_ctzll(unsigned long long value) noexcept nogil

cdef uint64_t MAX_SLOTS = <uint64_t> 1 << 40
# The map file grows by about a MiB.
cdef uint64_t GROWTH_SLOTS = 1024
cdef int SHEET_BYTES = SHEET_SLOTS * SLOT_BYTES


# Numbers

cdef int numbers_reserve(Numbers *numbers, uint64_t more) noexcept nogil:
    cdef uint64_t capacity = numbers.capacity
    cdef uint64_t *items
    if numbers.count + more > capacity:
        capacity = max(<uint64_t> 64, max(numbers.count + more, capacity * 2))
        items = <uint64_t *> realloc(numbers.items, capacity * sizeof(uint64_t))
        if items == NULL:
            return NO_MEMORY
        numbers.items = items
        numbers.capacity = capacity
    return 0


cdef int numbers_add(Numbers *numbers, uint64_t value) noexcept nogil:
    if numbers_reserve(numbers, 1) < 0:
        return NO_MEMORY
    numbers.items[numbers.count] = value
    numbers.count += 1
    return 0


cdef int numbers_move(Numbers *target, Numbers *source) noexcept nogil:
    if source.count == 0:
        return 0
    if numbers_reserve(target, source.count) < 0:
        return NO_MEMORY
    memcpy(target.items + target.count, source.items, source.count * sizeof(uint64_t))
    target.count += source.count
    source.count = 0
    return 0


cdef void numbers_free(Numbers *numbers) noexcept nogil:
    free(numbers.items)
    memset(numbers, 0, sizeof(Numbers))


# Slots

cdef int pages_fail(Pages *pages, int result, int code, uint64_t slot) noexcept nogil:
    pages.failure = result
    pages.code = code
    pages.slot = slot
    return result


cdef int _grow(Pages *pages, uint64_t slots) noexcept nogil:
    """Room for this many slots in the bitmap and the table of sheets."""
    cdef uint64_t words_before = (pages.slots + 63) // 64
    cdef uint64_t words = (slots + 63) // 64
    cdef uint64_t sheets = (slots + SHEET_SLOTS - 1) // SHEET_SLOTS
    cdef uint64_t *used
    cdef Sheet *table
    if words > words_before:
        used = <uint64_t *> realloc(pages.used, words * 8)
        if used == NULL:
            return pages_fail(pages, NO_MEMORY, 0, slots)
        memset(used + words_before, 0, (words - words_before) * 8)
        pages.used = used
    if sheets > pages.sheet_count:
        table = <Sheet *> realloc(pages.sheets, sheets * sizeof(Sheet))
        if table == NULL:
            return pages_fail(pages, NO_MEMORY, 0, slots)
        memset(table + pages.sheet_count, 0, (sheets - pages.sheet_count) * sizeof(Sheet))
        pages.sheets = table
        pages.sheet_count = sheets
    pages.free_slots += slots - pages.slots
    pages.slots = slots
    return 0


cdef int _reserve(Pages *pages, uint64_t count) noexcept nogil:
    """At least `count` free slots that the host has space for."""
    cdef uint64_t growth = GROWTH_SLOTS
    cdef int code
    while pages.free_slots < count:
        if pages.slots + growth > MAX_SLOTS:
            return pages_fail(pages, NO_SPACE, ENOSPC, pages.slots)
        code = snapcore_reserve(pages.descriptor, <off_t> (pages.slots * SLOT_BYTES), <off_t> (growth * SLOT_BYTES))
        if code == EINTR:
            continue
        if code == ENOSPC and growth > SHEET_SLOTS:
            # A host that is nearly full may have room for a few.
            growth //= 4
            continue
        # EBADF: the map of a pool that is open for reading only grows in memory.
        if code not in (0, EOPNOTSUPP, ENOSYS, EINVAL, EBADF):
            return pages_fail(pages, NO_SPACE, code, pages.slots)
        code = _grow(pages, pages.slots + growth)
        if code < 0:
            return code
    return 0


cdef uint64_t _take_slot(Pages *pages) noexcept nogil:
    """A free slot, which `_reserve` has seen to: the next one behind the last."""
    cdef uint64_t at = pages.next_slot
    cdef uint64_t word
    cdef uint64_t left = pages.slots + 64
    while True:
        if at >= pages.slots:
            at = FIRST_SLOT
        word = ~pages.used[at >> 6] >> (at & 63)
        if word & 1:
            break
        if word == 0:
            at = (at | 63) + 1
        else:
            at += __builtin_ctzll(word)
            if at < pages.slots:
                break
        if left < 64:
            return 0
        left -= 64
    pages.used[at >> 6] |= <uint64_t> 1 << (at & 63)
    pages.free_slots -= 1
    pages.next_slot = at + 1
    return at


cdef inline bint _is_used(Pages *pages, uint64_t slot) noexcept nogil:
    return pages.used[slot >> 6] >> (slot & 63) & 1


cdef void _give_slot(Pages *pages, uint64_t slot) noexcept nogil:
    cdef Sheet *sheet = &pages.sheets[slot // SHEET_SLOTS]
    cdef uint16_t bit = <uint16_t> (1 << (slot % SHEET_SLOTS))
    # A damaged tree may hold a page twice.
    if not _is_used(pages, slot):
        return
    pages.used[slot >> 6] &= ~(<uint64_t> 1 << (slot & 63))
    pages.free_slots += 1
    sheet.checked &= ~bit
    _make_clean(pages, sheet, bit)


cdef inline void _make_clean(Pages *pages, Sheet *sheet, uint16_t bit) noexcept nogil:
    if sheet.dirty & bit:
        sheet.dirty &= ~bit
        pages.dirty_sheets -= sheet.dirty == 0


# Sheets and pages

cdef int _load_sheet(Pages *pages, uint64_t number) noexcept nogil:
    cdef Sheet *sheet = &pages.sheets[number]
    cdef int got = 0
    cdef ssize_t part
    cdef uint8_t *data
    if numbers_reserve(&pages.loaded, 1) < 0:
        return pages_fail(pages, NO_MEMORY, 0, number * SHEET_SLOTS)
    data = <uint8_t *> malloc(SHEET_BYTES)
    if data == NULL:
        return pages_fail(pages, NO_MEMORY, 0, number * SHEET_SLOTS)
    while got < SHEET_BYTES:
        part = pread(pages.descriptor, data + got, SHEET_BYTES - got, <off_t> (number * SHEET_BYTES + got))
        if part < 0:
            if errno == EINTR:
                continue
            free(data)
            return pages_fail(pages, READ_FAILED, errno, number * SHEET_SLOTS)
        if part == 0:
            break
        got += <int> part
    memset(data + got, 0, SHEET_BYTES - got)
    sheet.bytes = data
    sheet.checked = 0
    sheet.touched = 1
    pages.resident += 1
    return numbers_add(&pages.loaded, number)


cdef uint64_t _checksum(Pages *pages, const uint8_t *slot_bytes, uint64_t slot) noexcept nogil:
    return xxh64_of(slot_bytes + 8, SLOT_BYTES - 8, pages.seed + slot)


cdef uint64_t *page_load(Pages *pages, uint64_t ref, int kind) noexcept nogil:
    """Read and check a page that is not in memory or not checked yet."""
    cdef uint64_t slot = slot_of(ref)
    cdef Sheet *sheet = &pages.sheets[slot // SHEET_SLOTS]
    cdef uint16_t bit = <uint16_t> (1 << (slot % SHEET_SLOTS))
    cdef uint64_t *words
    if sheet.bytes == NULL and _load_sheet(pages, slot // SHEET_SLOTS) < 0:
        return NULL
    words = <uint64_t *> (sheet.bytes + (slot % SHEET_SLOTS) * SLOT_BYTES)
    if (
        not _is_used(pages, slot)
        or words[0] != _checksum(pages, <const uint8_t *> words, slot)
        or (words[1] ^ (ref >> 48)) & 0xFFFF
        or words[1] >> 56 != <uint64_t> kind
    ):
        pages_fail(pages, DAMAGED, 0, slot)
        return NULL
    sheet.checked |= bit
    return words + 2


cdef uint64_t page_new(Pages *pages, int kind, uint64_t **entries) noexcept nogil:
    cdef uint64_t slot
    cdef Sheet *sheet
    cdef uint64_t *words
    cdef uint16_t bit
    if _reserve(pages, 1 if pages.privileged else 1 + pages.spare) < 0:
        return 0
    slot = _take_slot(pages)
    if slot == 0:
        pages_fail(pages, NO_SPACE, ENOSPC, pages.slots)
        return 0
    sheet = &pages.sheets[slot // SHEET_SLOTS]
    bit = <uint16_t> (1 << (slot % SHEET_SLOTS))
    if sheet.bytes == NULL and _load_sheet(pages, slot // SHEET_SLOTS) < 0:
        _give_slot(pages, slot)
        return 0
    sheet.checked |= bit
    pages.dirty_sheets += sheet.dirty == 0
    sheet.dirty |= bit
    sheet.touched = 1
    words = <uint64_t *> (sheet.bytes + (slot % SHEET_SLOTS) * SLOT_BYTES)
    words[0] = 0
    words[1] = pages.generation | <uint64_t> kind << 56
    entries[0] = words + 2
    return slot | (pages.generation & 0xFFFF) << 48


cdef void page_free(Pages *pages, uint64_t ref) noexcept nogil:
    cdef uint64_t slot = slot_of(ref)
    cdef Sheet *sheet
    cdef uint64_t *words
    if slot < FIRST_SLOT or slot >= pages.slots or not _is_used(pages, slot):
        return
    sheet = &pages.sheets[slot // SHEET_SLOTS]
    if sheet.bytes != NULL and sheet.checked >> (slot % SHEET_SLOTS) & 1:
        words = <uint64_t *> (sheet.bytes + (slot % SHEET_SLOTS) * SLOT_BYTES)
        if page_is_current(pages, words + 2):
            _give_slot(pages, slot)
            return
    # Without memory for the list the slot stays used until the pool is checked: lost, never given twice.
    numbers_add(&pages.condemned, slot)


cdef void pages_trim(Pages *pages) noexcept nogil:
    # A few at a time: when most of what is over the limit is dirty, looking at all would cost more than it frees.
    cdef int left = 64
    cdef Sheet *sheet
    while pages.resident - pages.dirty_sheets > pages.limit and left:
        left -= 1
        if pages.hand >= pages.loaded.count:
            pages.hand = 0
        sheet = &pages.sheets[pages.loaded.items[pages.hand]]
        if sheet.dirty or sheet.touched:
            sheet.touched = 0
            pages.hand += 1
            continue
        free(sheet.bytes)
        sheet.bytes = NULL
        sheet.checked = 0
        pages.resident -= 1
        pages.loaded.count -= 1
        pages.loaded.items[pages.hand] = pages.loaded.items[pages.loaded.count]


# Checkpoints

cdef int pages_used(Pages *pages, Numbers *words) noexcept nogil:
    cdef uint64_t count = (pages.slots + 63) // 64
    cdef uint64_t i, slot
    if numbers_reserve(words, count) < 0:
        return pages_fail(pages, NO_MEMORY, 0, 0)
    memcpy(words.items, pages.used, count * 8)
    words.count = count
    for i in range(pages.condemned.count):
        slot = pages.condemned.items[i]
        words.items[slot >> 6] &= ~(<uint64_t> 1 << (slot & 63))
    for i in range(pages.condemned_before.count):
        slot = pages.condemned_before.items[i]
        words.items[slot >> 6] &= ~(<uint64_t> 1 << (slot & 63))
    return 0


cdef int pages_dirty(Pages *pages, Numbers *slots) noexcept nogil:
    cdef uint64_t number
    cdef int i
    for number in range(pages.sheet_count):
        if pages.sheets[number].dirty:
            for i in range(SHEET_SLOTS):
                if pages.sheets[number].dirty >> i & 1:
                    if numbers_add(slots, number * SHEET_SLOTS + i) < 0:
                        return pages_fail(pages, NO_MEMORY, 0, 0)
    return 0


cdef int pages_freeze(Pages *pages) noexcept nogil:
    if numbers_move(&pages.condemned_before, &pages.condemned) < 0:
        return pages_fail(pages, NO_MEMORY, 0, 0)
    pages.generation += 1
    return 0


cdef void _release(Pages *pages) noexcept nogil:
    cdef uint64_t i
    for i in range(pages.condemned_before.count):
        _give_slot(pages, pages.condemned_before.items[i])
    pages.condemned_before.count = 0


# Python

class Failure(Exception):  # noqa: N818
    def __init__(self, result, code, slot, partial=None):
        super().__init__(f"result {result}, errno {code}, slot {slot}")
        self.partial = partial
        self.result = result
        self.code = code
        self.slot = slot


cdef numbers_array(Numbers *numbers):
    out = np.empty(numbers.count, dtype=np.uint64)
    cdef uint64_t[::1] view = out
    if numbers.count:
        memcpy(&view[0], numbers.items, numbers.count * sizeof(uint64_t))
    return out


cdef class PageFile:
    def __cinit__(self, int descriptor, uint64_t seed, uint64_t generation, uint64_t slots, used, int64_t cache_bytes):
        cdef const uint64_t[::1] words
        cdef uint64_t i
        if slots < FIRST_SLOT or slots > MAX_SLOTS:
            raise ValueError(f"a map file has 3 to {MAX_SLOTS} slots, not {slots}")
        words = np.ascontiguousarray(used, dtype=np.uint64)
        if <uint64_t> words.shape[0] != (slots + 63) // 64:
            raise ValueError(f"the bitmap of {slots} slots has {(slots + 63) // 64} words, not {words.shape[0]}")
        self.pages = <Pages *> calloc(1, sizeof(Pages))
        if self.pages == NULL:
            raise MemoryError
        pthread_mutex_init(&self.pages.lock, NULL)
        self.pages.descriptor = descriptor
        self.pages.seed = seed
        self.pages.generation = generation
        self.pages.limit = max(16, cache_bytes // SHEET_BYTES)
        self.pages.next_slot = FIRST_SLOT
        if _grow(self.pages, slots) < 0:
            raise MemoryError
        memcpy(self.pages.used, &words[0], words.shape[0] * 8)
        self.pages.used[0] |= 7
        if slots & 63:
            self.pages.used[slots >> 6] &= (<uint64_t> 1 << (slots & 63)) - 1
        self.pages.free_slots = 0
        for i in range(slots):
            self.pages.free_slots += not (self.pages.used[i >> 6] >> (i & 63) & 1)

    def __dealloc__(self):
        cdef uint64_t i
        if self.pages == NULL:
            return
        for i in range(self.pages.sheet_count):
            free(self.pages.sheets[i].bytes)
        free(self.pages.sheets)
        free(self.pages.used)
        numbers_free(&self.pages.condemned)
        numbers_free(&self.pages.condemned_before)
        numbers_free(&self.pages.loaded)
        pthread_mutex_destroy(&self.pages.lock)
        free(self.pages)

    cdef int check(self, int result) except -1:
        if result >= 0:
            return 0
        if result == NO_MEMORY:
            raise MemoryError
        raise Failure(result, self.pages.code, self.pages.slot)

    @property
    def generation(self):
        return self.pages.generation

    @property
    def slots(self):
        return self.pages.slots

    @property
    def free_slots(self):
        return self.pages.free_slots

    @property
    def spare(self):
        return self.pages.spare

    @spare.setter
    def spare(self, uint64_t count):
        with nogil:
            pthread_mutex_lock(&self.pages.lock)
        self.pages.spare = count
        pthread_mutex_unlock(&self.pages.lock)

    @property
    def resident_bytes(self):
        return self.pages.resident * SHEET_BYTES

    cdef void _enter(self) noexcept nogil:
        pthread_mutex_lock(&self.pages.lock)
        pages_trim(self.pages)

    cdef void _leave(self) noexcept nogil:
        pthread_mutex_unlock(&self.pages.lock)

    def free_pages(self, const uint64_t[::1] refs not None):
        cdef int64_t i
        cdef int64_t outside = -1
        cdef int result
        with nogil:
            self._enter()
            for i in range(refs.shape[0]):
                if not FIRST_SLOT <= slot_of(refs[i]) < self.pages.slots:
                    outside = i
            result = pages_checked(self.pages, numbers_reserve(&self.pages.condemned, refs.shape[0]))
            if result == 0 and outside < 0:
                for i in range(refs.shape[0]):
                    page_free(self.pages, refs[i])
            self._leave()
        self.check(result)
        if outside >= 0:
            raise ValueError(f"{refs[outside]} refers to no slot of the map file")

    def used_slots(self):
        cdef Numbers copy
        cdef int result
        memset(&copy, 0, sizeof(copy))
        with nogil:
            self._enter()
            result = pages_used(self.pages, &copy)
            self._leave()
        try:
            self.check(result)
            return numbers_array(&copy)
        finally:
            numbers_free(&copy)

    def put(self, int kind, const uint8_t[::1] payload not None):
        cdef uint64_t ref
        cdef uint64_t *entries
        if not 0 <= kind <= 255:
            raise ValueError(f"there are no pages of kind {kind}")
        if not 0 < payload.shape[0] <= SLOT_BYTES - HEADER_BYTES:
            raise ValueError("a page holds 1 to 1,024 bytes")
        with nogil:
            self._enter()
            self.pages.privileged = kind >= KIND_BITMAP
            ref = page_new(self.pages, kind, &entries)
            self.pages.privileged = 0
            if ref:
                memset(entries, 0, SLOT_BYTES - HEADER_BYTES)
                memcpy(entries, &payload[0], payload.shape[0])
            self._leave()
        if ref == 0:
            self.check(self.pages.failure)
        return ref

    def get(self, int kind, uint64_t ref):
        cdef uint64_t *entries
        out = np.empty(SLOT_BYTES - HEADER_BYTES, dtype=np.uint8)
        cdef uint8_t[::1] view = out
        with nogil:
            self._enter()
            entries = page_at(self.pages, ref, kind)
            if entries != NULL:
                memcpy(&view[0], entries, SLOT_BYTES - HEADER_BYTES)
            self._leave()
        if entries == NULL:
            self.check(self.pages.failure)
        return out.tobytes()

    def dirty(self):
        cdef Numbers slots
        cdef int result
        memset(&slots, 0, sizeof(slots))
        with nogil:
            self._enter()
            result = pages_dirty(self.pages, &slots)
            self._leave()
        try:
            self.check(result)
            return numbers_array(&slots)
        finally:
            numbers_free(&slots)

    def freeze(self):
        cdef int result
        cdef uint64_t generation
        with nogil:
            self._enter()
            generation = self.pages.generation
            result = pages_freeze(self.pages)
            self._leave()
        self.check(result)
        return generation

    def stage(self, const uint64_t[::1] slots not None):
        cdef int64_t i
        cdef uint8_t *data
        cdef uint64_t slot
        cdef Sheet *sheet
        cdef int64_t missing = -1
        out = np.empty(slots.shape[0] * SLOT_BYTES, dtype=np.uint8)
        cdef uint8_t[::1] view = out
        with nogil:
            self._enter()
            for i in range(slots.shape[0]):
                slot = slots[i]
                sheet = &self.pages.sheets[min(slot, self.pages.slots - 1) // SHEET_SLOTS]
                # A page that was not checked must not get a right checksum here.
                if slot >= self.pages.slots or sheet.bytes == NULL or not sheet.checked >> (slot % SHEET_SLOTS) & 1:
                    missing = i
                    break
                data = sheet.bytes + (slot % SHEET_SLOTS) * SLOT_BYTES
                (<uint64_t *> data)[0] = _checksum(self.pages, data, slot)
                memcpy(&view[i * SLOT_BYTES], data, SLOT_BYTES)
            self._leave()
        if missing >= 0:
            raise ValueError(f"slot {slots[missing]} is not in memory")
        return out

    def written(self, const uint64_t[::1] slots not None):
        cdef int64_t i
        cdef Sheet *sheet
        cdef uint64_t *words
        cdef uint64_t slot
        with nogil:
            self._enter()
            for i in range(slots.shape[0]):
                slot = slots[i]
                if slot >= self.pages.slots:
                    continue
                sheet = &self.pages.sheets[slot // SHEET_SLOTS]
                if not sheet.dirty >> (slot % SHEET_SLOTS) & 1:
                    continue
                words = <uint64_t *> (sheet.bytes + (slot % SHEET_SLOTS) * SLOT_BYTES)
                # A page of this generation may have changed since it was staged, or may yet; the catalog's never do.
                if not page_is_current(self.pages, words + 2) or words[1] >> 56 == KIND_CATALOG:
                    _make_clean(self.pages, sheet, <uint16_t> (1 << (slot % SHEET_SLOTS)))
            self._leave()

    def release(self):
        with nogil:
            self._enter()
            _release(self.pages)
            self._leave()
