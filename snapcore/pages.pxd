# The C API of the pool's pages: plain structs and free functions, no Python object. The caller holds `lock`.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint64_t


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)


# What functions return when they fail; Pages.failure holds it too, with errno and slot beside it. The numbers below
# these are the pool's (core.pxd).
cpdef enum:
    NO_MEMORY = -1
    READ_FAILED = -2
    DAMAGED = -3
    NO_SPACE = -4

cpdef enum:
    SLOT_BYTES = 1040
    KIND_BITMAP = 16
    KIND_CATALOG = 32

cdef enum:
    HEADER_BYTES = 16
    SHEET_SLOTS = 16
    # The numbers below stand for entries that refer to nothing.
    FIRST_SLOT = 3


# A growing array of numbers.
cdef struct Numbers:
    uint64_t *items
    uint64_t count
    uint64_t capacity

# Sixteen slots in memory; bits in the masks are slots.
cdef struct Sheet:
    uint8_t *bytes
    uint16_t checked
    uint16_t dirty
    uint8_t touched

cdef struct Pages:
    pthread_mutex_t lock
    int descriptor
    uint64_t seed
    uint64_t generation
    uint64_t slots
    uint64_t free_slots
    # Slots that are kept for checkpoints and sweeps, and whether one is at work.
    uint64_t spare
    int privileged
    uint64_t *used
    uint64_t next_slot
    Sheet *sheets
    uint64_t sheet_count
    int64_t resident
    int64_t limit
    int64_t dirty_sheets
    # The sheets that are in memory, and where `pages_trim` goes on among them.
    Numbers loaded
    uint64_t hand
    Numbers condemned
    Numbers condemned_before
    int failure
    int code
    uint64_t slot


cdef int numbers_reserve(Numbers *numbers, uint64_t more) noexcept nogil
cdef int numbers_add(Numbers *numbers, uint64_t value) noexcept nogil
cdef int numbers_move(Numbers *target, Numbers *source) noexcept nogil
cdef void numbers_free(Numbers *numbers) noexcept nogil
cdef numbers_array(Numbers *numbers)

# Note a failure; returns `result`.
cdef int pages_fail(Pages *pages, int result, int code, uint64_t slot) noexcept nogil

# Drop clean sheets over the limit. Only between operations: nothing may hold a page across it.
cdef void pages_trim(Pages *pages) noexcept nogil

# What `page_at` does when the page is not in memory or not checked yet.
cdef uint64_t *page_load(Pages *pages, uint64_t ref, int kind) noexcept nogil

# A new page of the current generation, its entries not set; returns the reference, or 0.
cdef uint64_t page_new(Pages *pages, int kind, uint64_t **entries) noexcept nogil
cdef void page_free(Pages *pages, uint64_t ref) noexcept nogil

# Slots whose pages are not written yet, in order.
cdef int pages_dirty(Pages *pages, Numbers *slots) noexcept nogil
# What there is becomes a checkpoint: later changes go to new pages.
cdef int pages_freeze(Pages *pages) noexcept nogil
# The bitmap of used slots, without what waits for a checkpoint.
cdef int pages_used(Pages *pages, Numbers *words) noexcept nogil


# What a walk does at each page stands here, so that other kernels do not call it through a pointer.

cdef inline uint64_t slot_of(uint64_t ref) noexcept nogil:
    return ref & ((<uint64_t> 1 << 48) - 1)


# Entries of the page that a reference names, or NULL.
cdef inline uint64_t *page_at(Pages *pages, uint64_t ref, int kind) noexcept nogil:
    cdef uint64_t slot = slot_of(ref)
    cdef Sheet *sheet
    cdef uint64_t *words
    if slot < FIRST_SLOT or slot >= pages.slots:
        pages_fail(pages, DAMAGED, 0, slot)
        return NULL
    sheet = &pages.sheets[slot // SHEET_SLOTS]
    if sheet.bytes == NULL or not sheet.checked >> (slot % SHEET_SLOTS) & 1:
        return page_load(pages, ref, kind)
    sheet.touched = 1
    words = <uint64_t *> (sheet.bytes + (slot % SHEET_SLOTS) * SLOT_BYTES)
    if words[1] >> 56 != <uint64_t> kind or (words[1] ^ (ref >> 48)) & 0xFFFF:
        pages_fail(pages, DAMAGED, 0, slot)
        return NULL
    return words + 2


# Whether a page, given by its entries, is in no checkpoint.
cdef inline bint page_is_current(Pages *pages, const uint64_t *entries) noexcept nogil:
    return (entries - 1)[0] & ((<uint64_t> 1 << 56) - 1) == pages.generation


# Note a failure to get memory.
cdef inline int pages_checked(Pages *pages, int result) noexcept nogil:
    return pages_fail(pages, result, 0, 0) if result < 0 else 0


cdef class PageFile:
    cdef Pages *pages
    cdef int check(self, int result) except -1
    cdef void _enter(self) noexcept nogil
    cdef void _leave(self) noexcept nogil
