"""The pool's trees: radix trees of pages of which a share is a reference and a change copies a path.

Rules: docs/DESIGN.md ("The pool"); what a page holds: docs/FORMAT.md ("Slot"). A page of the current generation changes
in place while no neighbour shares it; any other is copied. Free functions hold the work, under `Pages.lock`; the class
is for Python, which never holds the lock.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

import numpy as np

from snapcore.pages cimport (
    DAMAGED, NO_MEMORY, Numbers, PageFile, Pages, numbers_add, numbers_array, numbers_free, numbers_reserve, page_at,
    page_free, page_is_current, page_new, pages_checked, pages_fail, slot_of,
)

from snapcore.pages import Failure

cdef uint64_t BLOCK_LIMIT = <uint64_t> 1 << 40
cdef uint64_t MAX_POSITIONS = <uint64_t> 1 << 35
# Pages that a walk looks at before it lets others have the lock, some ms.
cdef int64_t SLICE_PAGES = 16384
cdef int64_t NO_LIMIT = <int64_t> 1 << 62
cdef int MAX_RUNS = 1 << 20
# A record of the log holds a count of 24 bits.
cdef int MAX_FILL_LEVEL = 3

cdef enum:
    PROBLEM_PAGE = 1
    PROBLEM_PAGE_TWICE = 2
    PROBLEM_BLOCK_OUTSIDE = 3
    PROBLEM_BLOCK_TWICE = 4


# Trees

cdef inline bint _is_page(uint64_t ref) noexcept nogil:
    return ref > LOST


cdef inline int _shift(int level) noexcept nogil:
    """A position's bits below the index in a page of a level."""
    return 7 * level


cdef int tree_lookup(Pages *pages, uint64_t root, uint64_t first, uint32_t count, uint64_t *entries) noexcept nogil:
    cdef uint64_t ref
    cdef uint64_t *page
    cdef uint32_t done = 0
    cdef uint32_t part, i
    cdef int level
    while done < count:
        part = min(count - done, <uint32_t> (FAN_OUT - ((first + done) & 127)))
        ref = root
        level = LEVELS - 1
        while level >= 0 and _is_page(ref):
            page = page_at(pages, ref, level)
            if page == NULL:
                return pages.failure
            if level == 0:
                memcpy(entries + done, page + ((first + done) & 127), part * sizeof(uint64_t))
                break
            ref = page[(first + done) >> _shift(level) & 127]
            level -= 1
        else:
            for i in range(part):
                entries[done + i] = ref
        done += part
    return 0


cdef inline uint64_t _child(const uint64_t *page, uint64_t ref, int index) noexcept nogil:
    """What a reference holds at an index; one that is no page holds itself everywhere."""
    return page[index] if page != NULL else ref


cdef int tree_set(
    Pages *pages, uint64_t *root, uint64_t parent, int level, uint64_t first, uint32_t count,
    uint64_t entry, int step, Numbers *freed
) noexcept nogil:
    cdef uint64_t refs[LEVELS]
    cdef uint64_t fresh[LEVELS]
    cdef uint64_t *old[LEVELS]
    cdef uint64_t *now[LEVELS]
    cdef bint own[LEVELS]
    cdef uint64_t *peer = NULL
    cdef uint64_t ref = root[0]
    cdef uint64_t other = parent
    cdef uint64_t freed_before = freed.count
    cdef Numbers released
    cdef Slice whole
    cdef uint64_t was, beside
    cdef uint32_t i
    cdef int index, at
    cdef int result = 0
    memset(&released, 0, sizeof(released))
    # The path as it is, and the neighbour's.
    for at in range(LEVELS - 1, level - 1, -1):
        index = first >> _shift(at) & 127
        refs[at] = ref
        own[at] = ref != other
        old[at] = NULL
        fresh[at] = 0
        if _is_page(ref):
            old[at] = page_at(pages, ref, at)
            if old[at] == NULL:
                return pages.failure
        peer = NULL
        if _is_page(other):
            peer = old[at] if other == ref else page_at(pages, other, at)
            if peer == NULL:
                return pages.failure
        if at > level:
            ref = _child(old[at], ref, index)
            other = _child(peer, other, index)
    index = first >> _shift(level) & 127
    for i in range(count):
        if _child(old[level], ref, index + i) != entry + i * step:
            break
    else:
        return 0
    # What will be free, and the pages of the new path: all that can fail.
    if level == 0:
        result = pages_checked(pages, numbers_reserve(freed, count))
    else:
        for i in range(count):
            was = _child(old[level], ref, index + i)
            beside = _child(peer, other, index + i)
            if _is_page(was) and was != beside:
                whole.first = 0
                whole.pages_left = NO_LIMIT
                result = _collect(pages, level - 1, was, &beside, 1, &whole, freed, &released)
                if result < 0:
                    break
    if result == 0:
        result = pages_checked(pages, numbers_reserve(&pages.condemned, released.count + LEVELS))
    if result == 0:
        for at in range(LEVELS - 1, level - 1, -1):
            if old[at] != NULL and own[at] and page_is_current(pages, old[at]):
                now[at] = old[at]
                continue
            fresh[at] = page_new(pages, at, &now[at])
            if fresh[at] == 0:
                result = pages.failure
                break
    if result < 0:
        for at in range(level, LEVELS):
            if fresh[at]:
                page_free(pages, fresh[at])
        freed.count = freed_before
        numbers_free(&released)
        return result
    for at in range(LEVELS - 1, level - 1, -1):
        if fresh[at] == 0:
            continue
        if old[at] != NULL:
            memcpy(now[at], old[at], FAN_OUT * sizeof(uint64_t))
            if own[at]:
                page_free(pages, refs[at])
        else:
            for i in range(FAN_OUT):
                now[at][i] = refs[at]
        if at == LEVELS - 1:
            root[0] = fresh[at]
        else:
            now[at + 1][first >> _shift(at + 1) & 127] = fresh[at]
    for i in range(count):
        was = now[level][index + i]
        now[level][index + i] = entry + i * step
        if level == 0 and was > LOST and was != entry + i * step and was != _child(peer, other, index + i):
            freed.items[freed.count] = was
            freed.count += 1
    for i in range(<uint32_t> released.count):
        page_free(pages, released.items[i])
    numbers_free(&released)
    return 0


cdef int tree_fill_level(Pages *pages, uint64_t root, uint64_t first, uint64_t last) noexcept nogil:
    cdef uint64_t ref = root
    cdef uint64_t *page
    cdef int at = LEVELS - 1
    cdef uint64_t span
    while at > 0:
        span = <uint64_t> 1 << _shift(at)
        if _is_page(ref):
            page = page_at(pages, ref, at)
            if page == NULL:
                return pages.failure
            ref = page[first >> _shift(at) & 127]
        # What `ref` stands for now are the positions of one entry at level `at`.
        if first & (span - 1) == 0 and first + span <= last and (not _is_page(ref) or at == 1) and at <= MAX_FILL_LEVEL:
            return at
        at -= 1
    return 0


cdef int tree_fill(
    Pages *pages, uint64_t *root, uint64_t parent, uint64_t *at, uint64_t last, uint64_t entry, Numbers *freed
) noexcept nogil:
    cdef int level = tree_fill_level(pages, root[0], at[0], last)
    cdef uint32_t count = 1
    cdef int result
    if level < 0:
        return level
    if level == 0:
        count = <uint32_t> min(last - at[0], <uint64_t> FAN_OUT - (at[0] & 127))
    result = tree_set(pages, root, parent, level, at[0], count, entry, 0, freed)
    if result == 0:
        at[0] += <uint64_t> count << _shift(level)
    return result


# What only one tree holds

# A walk in slices: it begins at `first`, and ends with 1 and `resume` set when it has looked at enough pages. What a
# page on the way down belongs to is told when its first position is in the slice.
cdef struct Slice:
    uint64_t first
    uint64_t resume
    int64_t pages_left
    bint at_leaf


cdef inline bint _is_enough(Slice *part, uint64_t position) noexcept nogil:
    if part.pages_left > 0 or not part.at_leaf:
        return False
    part.resume = position
    return True


cdef inline int _first_index(Slice *part, uint64_t base, int level) noexcept nogil:
    if part.first <= base:
        return 0
    return <int> min(<uint64_t> FAN_OUT, (part.first - base) >> _shift(level))


cdef int _collect(
    Pages *pages, int level, uint64_t ref, const uint64_t *others, uint32_t count, Slice *part,
    Numbers *blocks, Numbers *refs
) noexcept nogil:
    """Blocks and pages under a page that none of `others` (at the same place) holds."""
    cdef uint64_t *scratch = <uint64_t *> malloc((<size_t> count + 1) * 2 * LEVELS * sizeof(uint64_t))
    cdef uint32_t i
    cdef uint32_t left = 0
    cdef int result
    if scratch == NULL:
        return pages_fail(pages, NO_MEMORY, 0, 0)
    for i in range(count):
        if others[i] == ref:
            free(scratch)
            return 0
        if _is_page(others[i]):
            scratch[left] = others[i]
            left += 1
    result = _collect_under(pages, level, ref, 0, scratch, left, count + 1, part, blocks, refs)
    free(scratch)
    return result


cdef int _collect_under(
    Pages *pages, int level, uint64_t ref, uint64_t base, uint64_t *others, uint32_t count, uint32_t stride,
    Slice *part, Numbers *blocks, Numbers *refs
) noexcept nogil:
    # `others` has its references and, `stride` further, room for the pages; then the next level's.
    cdef uint64_t *page = page_at(pages, ref, level)
    cdef const uint64_t **peers = <const uint64_t **> (others + stride)
    cdef uint64_t *below = others + 2 * stride
    cdef uint64_t span = <uint64_t> 1 << _shift(level)
    cdef uint64_t entry, other
    cdef uint32_t j, left
    cdef int i, result
    if page == NULL:
        return pages.failure
    for j in range(count):
        peers[j] = page_at(pages, others[j], level)
        if peers[j] == NULL:
            return pages.failure
    part.pages_left -= 1 + <int64_t> count
    if base >= part.first and numbers_add(refs, ref) < 0:
        return pages_fail(pages, NO_MEMORY, 0, 0)
    # No page is at two places of a tree, so one with more pages than there are slots is forged.
    if refs.count > pages.slots:
        return pages_fail(pages, DAMAGED, 0, slot_of(ref))
    if level == 0:
        part.at_leaf = True
        if numbers_reserve(blocks, FAN_OUT) < 0:
            return pages_fail(pages, NO_MEMORY, 0, 0)
    for i in range(_first_index(part, base, level), FAN_OUT):
        entry = page[i]
        if entry <= LOST:
            continue
        left = 0
        for j in range(count):
            other = peers[j][i]
            if other == entry:
                break
            if level and _is_page(other) and (left == 0 or below[left - 1] != other):
                below[left] = other
                left += 1
        else:
            if level == 0:
                blocks.items[blocks.count] = entry
                blocks.count += 1
            elif _is_enough(part, base + i * span):
                return 1
            else:
                result = _collect_under(
                    pages, level - 1, entry, base + i * span, below, left, stride, part, blocks, refs
                )
                if result:
                    return result
    return 0


# Walks that tell what is where

cdef bint _continues(const int64_t *item, uint64_t start, uint64_t entry, int width) noexcept nogil:
    if <uint64_t> item[0] + <uint64_t> item[1] != start:
        return False
    if width == 2:
        return True
    if entry <= LOST:
        return <uint64_t> item[2] == entry
    return item[2] > LOST and <uint64_t> item[2] + <uint64_t> item[1] == entry


cdef int _add_run(Runs *runs, uint64_t position, uint64_t count, uint64_t entry) noexcept nogil:
    """Add a run clipped to the range; 1 when there is no room, and `resume` says where to go on."""
    cdef uint64_t end = min(position + count, runs.last)
    cdef uint64_t start = max(position, runs.first)
    cdef int64_t *item
    if start >= end:
        return 0
    if entry > LOST:
        entry += start - position
    if runs.count:
        item = runs.items + (runs.count - 1) * runs.width
        if _continues(item, start, entry, runs.width):
            item[1] += end - start
            return 0
    if runs.count == runs.limit:
        runs.resume = start
        return 1
    item = runs.items + runs.count * runs.width
    item[0] = start
    item[1] = end - start
    if runs.width == 3:
        item[2] = entry
    runs.count += 1
    return 0


cdef inline bint _is_slice_over(Runs *runs, uint64_t base) noexcept nogil:
    """Whether enough pages were looked at. The pages on the way to `first` are few, so a slice gets on."""
    if runs.slice_pages == 0 or runs.pages < runs.slice_pages or base <= runs.first:
        return False
    runs.resume = base
    return True


cdef int _walk_difference(Pages *pages, int level, uint64_t a, uint64_t b, uint64_t base, Runs *runs) noexcept nogil:
    cdef uint64_t *page_a = NULL
    cdef uint64_t *page_b = NULL
    cdef uint64_t span = <uint64_t> 1 << _shift(level)
    cdef uint64_t at, one, two
    cdef int result
    cdef int i = 0
    if a == b or base >= runs.last:
        return 0
    if (_is_page(a) or _is_page(b)) and _is_slice_over(runs, base):
        return 1
    if _is_page(a):
        page_a = page_at(pages, a, level)
        if page_a == NULL:
            return pages.failure
    if _is_page(b):
        page_b = page_at(pages, b, level)
        if page_b == NULL:
            return pages.failure
    if page_a == NULL and page_b == NULL:
        return _add_run(runs, base, span * FAN_OUT, ABSENT)
    runs.pages += 1
    if runs.pages > 2 * pages.slots:
        return pages_fail(pages, DAMAGED, 0, slot_of(a if page_a != NULL else b))
    if runs.first > base:
        i = <int> min(<uint64_t> FAN_OUT, (runs.first - base) >> _shift(level))
    while i < FAN_OUT:
        at = base + i * span
        if at >= runs.last:
            break
        one = _child(page_a, a, i)
        two = _child(page_b, b, i)
        if one != two:
            if level == 0 or (not _is_page(one) and not _is_page(two)):
                result = _add_run(runs, at, span, ABSENT)
            else:
                result = _walk_difference(pages, level - 1, one, two, at, runs)
            if result:
                return result
        i += 1
    return 0


cdef int _walk_runs(Pages *pages, int level, uint64_t ref, uint64_t base, Runs *runs) noexcept nogil:
    cdef uint64_t *page
    cdef uint64_t span = <uint64_t> 1 << _shift(level)
    cdef uint64_t at
    cdef int result
    cdef int i = 0
    if ref == ABSENT or base >= runs.last:
        return 0
    if not _is_page(ref):
        return _add_run(runs, base, span * FAN_OUT, ref)
    if _is_slice_over(runs, base):
        return 1
    page = page_at(pages, ref, level)
    if page == NULL:
        return pages.failure
    runs.pages += 1
    if runs.pages > pages.slots:
        return pages_fail(pages, DAMAGED, 0, slot_of(ref))
    if runs.first > base:
        i = <int> min(<uint64_t> FAN_OUT, (runs.first - base) >> _shift(level))
    while i < FAN_OUT:
        at = base + i * span
        if at >= runs.last:
            break
        if page[i] == ABSENT:
            result = 0
        elif level == 0 or not _is_page(page[i]):
            result = _add_run(runs, at, span, page[i])
        else:
            result = _walk_runs(pages, level - 1, page[i], at, runs)
        if result:
            return result
        i += 1
    return 0


cdef int tree_runs(Pages *pages, uint64_t root, Runs *runs) noexcept nogil:
    return _walk_runs(pages, LEVELS - 1, root, 0, runs)


cdef int tree_difference(Pages *pages, uint64_t a, uint64_t b, Runs *runs) noexcept nogil:
    return _walk_difference(pages, LEVELS - 1, a, b, 0, runs)


cdef struct Tally:
    uint64_t blocks
    uint64_t other_blocks
    uint64_t pages


cdef int _walk_tally(
    Pages *pages, int level, uint64_t ref, uint64_t other, uint64_t base, Slice *part, Tally *tally
) noexcept nogil:
    """Blocks of two trees and pages of the first, without the pages that they share."""
    cdef uint64_t *page = NULL
    cdef uint64_t *peer = NULL
    cdef uint64_t span = <uint64_t> 1 << _shift(level)
    cdef uint64_t one, two
    cdef int i, result
    part.pages_left -= 1
    if _is_page(ref):
        page = page_at(pages, ref, level)
        if page == NULL:
            return pages.failure
        tally.pages += base >= part.first
        if tally.pages > pages.slots:
            return pages_fail(pages, DAMAGED, 0, slot_of(ref))
    if _is_page(other):
        peer = page_at(pages, other, level)
        if peer == NULL:
            return pages.failure
    if page == NULL and peer == NULL:
        return 0
    if level == 0:
        part.at_leaf = True
    for i in range(_first_index(part, base, level), FAN_OUT):
        one = _child(page, ref, i)
        two = _child(peer, other, i)
        if level == 0:
            tally.blocks += one > LOST
            tally.other_blocks += two > LOST
        elif one != two and (_is_page(one) or _is_page(two)):
            if _is_enough(part, base + i * span):
                return 1
            result = _walk_tally(pages, level - 1, one, two, base + i * span, part, tally)
            if result:
                return result
    return 0


# Pruning

cdef int _prune(
    Pages *pages, int level, uint64_t ref, uint64_t *others, uint32_t count, uint32_t stride,
    Numbers *made, uint64_t *result
) noexcept nogil:
    """What of `ref` the others hold at the same place: `ref` itself, ABSENT, or a new page."""
    cdef uint64_t kept[FAN_OUT]
    cdef uint64_t *page = page_at(pages, ref, level)
    cdef const uint64_t **peers = <const uint64_t **> (others + stride)
    cdef uint64_t *below = others + 2 * stride
    cdef uint64_t entry, other
    cdef uint64_t *entries
    cdef uint32_t j, left
    cdef bint any_kept = False
    cdef bint all_kept = True
    cdef int i, code
    if page == NULL:
        return pages.failure
    for j in range(count):
        peers[j] = page_at(pages, others[j], level)
        if peers[j] == NULL:
            return pages.failure
    for i in range(FAN_OUT):
        entry = page[i]
        kept[i] = ABSENT
        if entry <= LOST:
            all_kept = all_kept and entry == ABSENT
            continue
        left = 0
        for j in range(count):
            other = peers[j][i]
            if other == entry:
                kept[i] = entry
                break
            if level and _is_page(other) and (left == 0 or below[left - 1] != other):
                below[left] = other
                left += 1
        else:
            if level and left:
                code = _prune(pages, level - 1, entry, below, left, stride, made, &kept[i])
                if code < 0:
                    return code
        any_kept = any_kept or kept[i] != ABSENT
        all_kept = all_kept and kept[i] == entry
    if all_kept:
        result[0] = ref
        return 0
    result[0] = ABSENT
    if not any_kept:
        return 0
    if numbers_reserve(made, 1) < 0:
        return pages_fail(pages, NO_MEMORY, 0, 0)
    result[0] = page_new(pages, level, &entries)
    if result[0] == 0:
        return pages.failure
    numbers_add(made, result[0])
    memcpy(entries, kept, sizeof(kept))
    return 0


# Checking

cdef struct Marks:
    uint64_t *slots
    uint64_t *blocks
    uint32_t *owners
    uint64_t block_limit
    int64_t *problems
    uint64_t problem_count
    uint64_t problem_limit


cdef void _problem(Marks *marks, int kind, uint64_t position, uint64_t ref) noexcept nogil:
    cdef int64_t *item
    if marks.problem_count < marks.problem_limit:
        item = marks.problems + 3 * marks.problem_count
        item[0] = kind
        item[1] = position
        item[2] = ref
    marks.problem_count += 1


cdef inline uint32_t _mix(uint64_t key, uint32_t family) noexcept nogil:
    return <uint32_t> ((key * 0x9E3779B97F4A7C15ULL + family * 0xC2B2AE3D27D4EB4FULL) >> 32)


cdef void _mark(Pages *pages, int level, uint64_t ref, uint64_t base, uint32_t family, Marks *marks) noexcept nogil:
    cdef uint64_t slot = slot_of(ref)
    cdef uint64_t span = <uint64_t> 1 << _shift(level)
    cdef uint64_t *page = page_at(pages, ref, level)
    cdef uint64_t entry, position
    cdef uint32_t owner
    cdef int i
    if page == NULL:
        _problem(marks, PROBLEM_PAGE, base, slot)
        return
    owner = _mix((base >> _shift(level)) * 8 + level + 1, family)
    # The owners of slots lie behind those of blocks.
    if marks.slots[slot >> 6] >> (slot & 63) & 1:
        if marks.owners[marks.block_limit + slot] != owner:
            _problem(marks, PROBLEM_PAGE_TWICE, base, slot)
        return
    marks.slots[slot >> 6] |= <uint64_t> 1 << (slot & 63)
    marks.owners[marks.block_limit + slot] = owner
    for i in range(FAN_OUT):
        entry = page[i]
        position = base + i * span
        if entry <= LOST:
            continue
        if level:
            _mark(pages, level - 1, entry, position, family, marks)
        elif entry >= marks.block_limit:
            _problem(marks, PROBLEM_BLOCK_OUTSIDE, position, entry)
        else:
            owner = _mix(position * 8, family)
            if not marks.blocks[entry >> 6] >> (entry & 63) & 1:
                marks.blocks[entry >> 6] |= <uint64_t> 1 << (entry & 63)
                marks.owners[entry] = owner
            elif marks.owners[entry] != owner:
                _problem(marks, PROBLEM_BLOCK_TWICE, position, entry)


# Python

cdef _taken_runs(Runs *runs):
    """The runs as an array; their memory is given back."""
    try:
        out = np.empty((runs.count, runs.width), dtype=np.int64)
        if runs.count:
            _copy_out(out, runs.items, runs.count * runs.width)
        return out, runs.resume
    finally:
        free(runs.items)


cdef int _copy_out(out, const int64_t *items, uint64_t count) except -1:
    cdef int64_t[:, ::1] view = out
    memcpy(&view[0, 0], items, count * sizeof(int64_t))
    return 0


cdef int _check_range(uint64_t first, uint64_t count) except -1:
    if first > MAX_POSITIONS or count > MAX_POSITIONS - first:
        raise ValueError(f"{count} positions from {first} on are not all inside a tree")
    return 0

cdef class Trees(PageFile):
    def __cinit__(self):
        self.slice_pages = SLICE_PAGES

    def lookup(self, uint64_t root, uint64_t first, uint32_t count):
        cdef uint64_t[::1] entries
        cdef int result = 0
        _check_range(first, count)
        out = np.empty(count, dtype=np.uint64)
        entries = out
        if count:
            with nogil:
                self._enter()
                result = tree_lookup(self.pages, root, first, count, &entries[0])
                self._leave()
        self.check(result)
        return out

    def assign(self, uint64_t root, uint64_t parent, uint64_t first, uint64_t count, uint64_t entry):
        cdef Numbers freed
        cdef int result = 0
        cdef uint64_t at = first
        cdef uint64_t last = first + count
        cdef uint32_t part
        _check_range(first, count)
        if entry <= LOST or entry > <uint64_t> -1 - count:
            raise ValueError(f"there are no {count} blocks from {entry} on")
        memset(&freed, 0, sizeof(freed))
        with nogil:
            self._enter()
            while at < last and result == 0:
                part = <uint32_t> min(last - at, <uint64_t> FAN_OUT - (at & 127))
                result = tree_set(self.pages, &root, parent, 0, at, part, entry + (at - first), 1, &freed)
                if result == 0:
                    at += part
            self._leave()
        return self._changed(result, root, &freed, at - first)

    def fill(self, uint64_t root, uint64_t parent, uint64_t first, uint64_t count, uint64_t entry):
        cdef Numbers freed
        cdef int result = 0
        cdef uint64_t at = first
        if entry > ZERO:
            raise ValueError("a range is filled with ABSENT or ZERO")
        _check_range(first, count)
        memset(&freed, 0, sizeof(freed))
        with nogil:
            self._enter()
            while at < first + count and result == 0:
                result = tree_fill(self.pages, &root, parent, &at, first + count, entry, &freed)
            self._leave()
        return self._changed(result, root, &freed, at - first)

    cdef object _changed(self, int result, uint64_t root, Numbers *freed, uint64_t done):
        """What a change returns; when it failed behind a part that is done, the failure tells that part."""
        try:
            out = root, numbers_array(freed)
            try:
                self.check(result)
            except Failure as failure:
                if done:
                    failure.partial = (*out, done)
                raise
            return out
        finally:
            numbers_free(freed)

    def difference(self, uint64_t a, uint64_t b, uint64_t first, uint64_t last, uint64_t limit):
        cdef Runs runs
        cdef int result
        self._prepare(&runs, first, last, limit, 2)
        with nogil:
            self._enter()
            result = _walk_difference(self.pages, LEVELS - 1, a, b, 0, &runs)
            self._leave()
        out = _taken_runs(&runs)
        self.check(result)
        return out

    def runs(self, uint64_t root, uint64_t first, uint64_t last, uint64_t limit):
        cdef Runs runs
        cdef int result
        self._prepare(&runs, first, last, limit, 3)
        with nogil:
            self._enter()
            result = _walk_runs(self.pages, LEVELS - 1, root, 0, &runs)
            self._leave()
        out = _taken_runs(&runs)
        self.check(result)
        return out

    cdef int _prepare(self, Runs *runs, uint64_t first, uint64_t last, uint64_t limit, int width) except -1:
        if not 1 <= limit <= MAX_RUNS:
            raise ValueError(f"limit must be 1 to {MAX_RUNS}, not {limit}")
        if not first <= last <= MAX_POSITIONS:
            raise ValueError(f"positions {first} to {last} are not all inside a tree")
        memset(runs, 0, sizeof(Runs))
        runs.first = first
        runs.last = runs.resume = last
        runs.limit = limit
        runs.width = width
        runs.items = <int64_t *> malloc(limit * width * sizeof(int64_t))
        if runs.items == NULL:
            raise MemoryError
        return 0

    def tally(self, uint64_t root, uint64_t other=0):
        cdef Tally tally
        cdef Slice part
        cdef int result = 1
        memset(&tally, 0, sizeof(tally))
        memset(&part, 0, sizeof(part))
        while root != other and result == 1:
            part.first = part.resume
            part.pages_left = self.slice_pages
            part.at_leaf = False
            with nogil:
                self._enter()
                result = _walk_tally(self.pages, LEVELS - 1, root, other, 0, &part, &tally)
                self._leave()
        self.check(result)
        return tally.blocks, tally.other_blocks, tally.pages

    def exclusive(self, uint64_t root, others):
        cdef uint64_t[::1] beside = np.array([*others, 0], dtype=np.uint64)
        cdef uint32_t count = <uint32_t> (beside.shape[0] - 1)
        cdef Numbers blocks
        cdef Numbers refs
        cdef Slice part
        cdef int result = 1
        memset(&blocks, 0, sizeof(blocks))
        memset(&refs, 0, sizeof(refs))
        memset(&part, 0, sizeof(part))
        while root > LOST and result == 1:
            part.first = part.resume
            part.pages_left = self.slice_pages
            part.at_leaf = False
            with nogil:
                self._enter()
                result = _collect(self.pages, LEVELS - 1, root, &beside[0], count, &part, &blocks, &refs)
                self._leave()
        try:
            self.check(result)
            return numbers_array(&blocks), numbers_array(&refs)
        finally:
            numbers_free(&blocks)
            numbers_free(&refs)

    def prune(self, uint64_t root, others):
        cdef uint64_t[::1] beside = np.array([*(ref for ref in others if ref > LOST), 0], dtype=np.uint64)
        cdef uint32_t count = <uint32_t> (beside.shape[0] - 1)
        cdef uint64_t[::1] scratch = np.zeros((count + 1) * 2 * LEVELS, dtype=np.uint64)
        cdef Numbers made
        cdef uint64_t pruned = 0
        cdef uint64_t i
        cdef int result = 0
        if root <= LOST:
            return 0
        for i in range(count):
            scratch[i] = beside[i]
            if beside[i] == root:
                return root
        memset(&made, 0, sizeof(made))
        if count:
            with nogil:
                self._enter()
                self.pages.privileged = 1
                result = _prune(self.pages, LEVELS - 1, root, &scratch[0], count, count + 1, &made, &pruned)
                self.pages.privileged = 0
                if result < 0:
                    for i in range(made.count):
                        page_free(self.pages, made.items[i])
                self._leave()
        numbers_free(&made)
        self.check(result)
        return pruned

    def mark(
        self, uint64_t root, uint32_t family, uint64_t[::1] slots not None, uint64_t[::1] blocks not None,
        uint32_t[::1] owners not None, uint64_t block_limit,
    ):
        cdef Marks marks
        problems = np.zeros((1000, 3), dtype=np.int64)
        cdef int64_t[:, ::1] view = problems
        cdef bint short = False
        if block_limit > BLOCK_LIMIT or <uint64_t> blocks.shape[0] * 64 < block_limit:
            raise ValueError(f"the bitmap of blocks is too short for {block_limit}")
        memset(&marks, 0, sizeof(marks))
        marks.slots = &slots[0] if slots.shape[0] else NULL
        marks.blocks = &blocks[0] if blocks.shape[0] else NULL
        marks.owners = &owners[0] if owners.shape[0] else NULL
        marks.block_limit = block_limit
        marks.problems = &view[0, 0]
        marks.problem_limit = 1000
        with nogil:
            self._enter()
            short = (
                <uint64_t> slots.shape[0] * 64 < self.pages.slots
                or <uint64_t> owners.shape[0] < block_limit + self.pages.slots
            )
            if root > LOST and not short:
                _mark(self.pages, LEVELS - 1, root, 0, family, &marks)
            self._leave()
        if short:
            raise ValueError("the bitmap of slots or the array of owners is too short")
        return problems[: min(1000, marks.problem_count)]
