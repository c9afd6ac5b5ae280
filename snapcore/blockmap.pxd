# The C API of the pool's trees: plain structs and free functions, no Python object. The caller holds `lock`.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)


# What functions return when they fail; Pages.failure holds it too, with errno and slot beside it.
cdef enum:
    NO_MEMORY = -1
    READ_FAILED = -2
    DAMAGED = -3
    NO_SPACE = -4

cdef enum:
    LEVELS = 5
    FAN_OUT = 128
    SLOT_BYTES = 1040
    HEADER_BYTES = 16
    SHEET_SLOTS = 16
    KIND_BITMAP = 16
    KIND_CATALOG = 32

# Entries that refer to nothing.
cdef enum:
    ABSENT = 0
    ZERO = 1
    LOST = 2


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
    int64_t slice_pages
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

# Drop clean sheets over the limit. Only between operations: nothing may hold a page across it.
cdef void pages_trim(Pages *pages) noexcept nogil

# Entries of the page that a reference names, or NULL.
cdef uint64_t *page_at(Pages *pages, uint64_t ref, int kind) noexcept nogil

# A new page of the current generation, its entries not set; returns the reference, or 0.
cdef uint64_t page_new(Pages *pages, int kind, uint64_t **entries) noexcept nogil
cdef void page_free(Pages *pages, uint64_t ref) noexcept nogil

# Entries of `count` positions from `first` on.
cdef int tree_lookup(Pages *pages, uint64_t root, uint64_t first, uint32_t count, uint64_t *entries) noexcept nogil

# Set entries of one page of a level (0: leaves) from `first` on, a position on a border of that level. `step` 1: entry,
# entry + 1, ...; 0: all the same. Above the leaves the entry is ABSENT or ZERO. What only this tree held (`parent`: the
# neighbour's root) is freed: pages at once, blocks go to `freed`. On failure nothing has changed.
cdef int tree_set(
    Pages *pages, uint64_t *root, uint64_t parent, int level, uint64_t first, uint32_t count,
    uint64_t entry, int step, Numbers *freed
) noexcept nogil

# Runs of positions, as a walk finds them.
cdef struct Runs:
    int64_t *items
    uint64_t count
    uint64_t limit
    uint64_t first
    uint64_t last
    uint64_t resume
    # Walked so far: a tree in which there are more than slots is forged.
    uint64_t pages
    # After so many it ends, so that nobody waits long for the lock; 0: it does not.
    uint64_t slice_pages
    int width

# Runs that are not absent (width 3: position, count, entry), or in which two trees differ (width 2). 1 when there are
# more than the limit, or pages than a slice has, and `resume` says where.
cdef int tree_runs(Pages *pages, uint64_t root, Runs *runs) noexcept nogil
cdef int tree_difference(Pages *pages, uint64_t a, uint64_t b, Runs *runs) noexcept nogil

# The highest level on whose border `first` lies such that all of its subtree lies below `last` and is the same for all
# positions, or that of a single leaf page; 0 where it must be entry by entry. Negative: a failure.
cdef int tree_fill_level(Pages *pages, uint64_t root, uint64_t first, uint64_t last) noexcept nogil

# Set the part of a range from `at` on that one step can do, and move `at` behind it: one entry of a level, or a part of
# a leaf page.
cdef int tree_fill(
    Pages *pages, uint64_t *root, uint64_t parent, uint64_t *at, uint64_t last, uint64_t entry, Numbers *freed
) noexcept nogil

# Slots whose pages are not written yet, in order.
cdef int pages_dirty(Pages *pages, Numbers *slots) noexcept nogil
# What there is becomes a checkpoint: later changes go to new pages.
cdef int pages_freeze(Pages *pages) noexcept nogil
# The bitmap of used slots, without what waits for a checkpoint.
cdef int pages_used(Pages *pages, Numbers *words) noexcept nogil

cdef numbers_array(Numbers *numbers)


cdef class PageFile:
    cdef Pages *pages
    cdef int check(self, int result) except -1
    cdef void _enter(self) noexcept nogil
    cdef void _leave(self) noexcept nogil
    cdef object _changed(self, int result, uint64_t root, Numbers *freed, uint64_t done)
    cdef int _prepare(self, Runs *runs, uint64_t first, uint64_t last, uint64_t limit, int width) except -1
