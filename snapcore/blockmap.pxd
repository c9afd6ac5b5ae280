# The C API of the pool's trees: free functions over their pages, no Python object. The caller holds `lock`.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from snapcore.pages cimport Numbers, PageFile, Pages


cdef enum:
    LEVELS = 5
    FAN_OUT = 128

# Entries that refer to nothing.
cdef enum:
    ABSENT = 0
    ZERO = 1
    LOST = 2


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


cdef class Trees(PageFile):
    cdef public int64_t slice_pages
    cdef object _changed(self, int result, uint64_t root, Numbers *freed, uint64_t done)
    cdef int _prepare(self, Runs *runs, uint64_t first, uint64_t last, uint64_t limit, int width) except -1
