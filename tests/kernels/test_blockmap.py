"""The pool's trees do what their plain twins do, keep exactly the pages they need, and trust no byte of a map file."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from snapcore.blockmap import Trees
from snapcore.pages import SLOT_BYTES, Failure
from tests import reference
from tests.reference import POSITIONS, Tree
from tests.support.map_file import (
    CATALOG,
    SEED,
    Words,
    bitmap,
    files_no_longer_than,
    members,
    new_file,
    opened,
    reopened,
    save,
    slot_of,
)

UNLIMITED = 1 << 20

twin = reference.Trees()


def plain(pages: Trees, root: int) -> Tree:
    """What a tree holds, in the words of the twin."""
    rows, resume = pages.runs(root, 0, POSITIONS, UNLIMITED)
    assert resume == POSITIONS
    return tuple((first, count, entry) for first, count, entry in rows.tolist())


def blocks_of(tree: Tree) -> set[int]:
    """The blocks of a tree."""
    return {block for _, count, entry in tree if entry > 2 for block in range(entry, entry + count)}


def exact(numbers: Words) -> set[int]:
    """An array in which nothing comes twice."""
    found = set(numbers.tolist())
    assert len(found) == len(numbers)
    return found


def marked(pages: Trees, roots: Iterable[int], block_limit: int) -> tuple[set[int], set[int]]:
    """The slots and blocks that trees of one family reach; none of them has a problem."""
    slots, blocks = bitmap(pages.slots), bitmap(block_limit)
    owners = np.zeros(block_limit + pages.slots, dtype=np.uint32)
    for root in roots:
        assert pages.mark(root, 7, slots, blocks, owners, block_limit).tolist() == []
    return members(slots), members(blocks)


def walk(pages: Trees, ref: int, level: int = 4) -> Iterator[tuple[int, int, list[int]]]:
    """(level, reference, entries) of every page under a reference."""
    if ref > 2:
        entries = np.frombuffer(pages.get(level, ref), dtype="<u8").tolist()
        yield level, ref, entries
        if level:
            for entry in entries:
                yield from walk(pages, entry, level - 1)


# Positions near borders of pages of every level, near each other, and anywhere.
_corners = st.sampled_from([0, 128, 2**14, 2**21, 2**28, 2**34, POSITIONS - 200])
_near = st.tuples(_corners, st.integers(-150, 150)).map(lambda pair: min(max(sum(pair), 0), POSITIONS - 1))
positions = st.one_of(st.integers(0, 500), _near, st.integers(0, POSITIONS - 1))


@st.composite
def ranges(draw: st.DrawFn, longest: int = 300) -> tuple[int, int]:
    """First position and count."""
    first = draw(positions)
    return first, min(draw(st.integers(1, longest)), POSITIONS - first)


@st.composite
def wide_ranges(draw: st.DrawFn) -> tuple[int, int]:
    """A range of up to all positions; often it ends where another one may begin."""
    first, last = sorted((draw(positions), draw(st.one_of(positions, st.just(POSITIONS)))))
    return draw(st.sampled_from([(first, last - first), (first // 128 * 128, last - first // 128 * 128)]))


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """A change of a tree: which method, first position, count, entry."""
    if draw(st.booleans()):
        return ("assign", *draw(ranges()), draw(st.integers(3, 5000)))
    return ("fill", *draw(st.one_of(ranges(), wide_ranges())), draw(st.integers(0, 1)))


def build(pages: Trees, steps: Iterable[tuple[str, int, int, int]], root: int = 0, tree: Tree = ()) -> tuple[int, Tree]:
    """A tree after some changes, and what its twin is."""
    shared, begun = root, tree
    for method, first, count, entry in steps:
        root, freed = getattr(pages, method)(root, shared, first, count, entry)
        tree, expected = getattr(twin, method)(tree, begun, first, count, entry)
        # In a tree of its own a block may be at several positions.
        assert set(freed.tolist()) == expected
    return root, tree


histories = st.lists(changes(), max_size=6)


@given(histories, st.lists(histories, max_size=3), st.lists(ranges(), max_size=4))
def test_trees_hold_what_their_twins_hold(
    first: list[tuple[str, int, int, int]], rest: list[list[tuple[str, int, int, int]]], looks: list[tuple[int, int]]
) -> None:
    with new_file() as file:
        pages = opened(file)
        root, tree = build(pages, first)
        pairs = [(root, tree), *(build(pages, steps, root, tree) for steps in rest)]
        for at in ("in memory", "in the file"):
            note(at)
            for root, tree in pairs:
                assert plain(pages, root) == tree
                for look in looks:
                    assert pages.lookup(root, *look).tolist() == twin.lookup(tree, *look)
                leaves = [entries for level, _, entries in walk(pages, root) if level == 0]
                assert pages.tally(root)[0] == twin.tally(tree) == sum(entry > 2 for leaf in leaves for entry in leaf)
                assert pages.tally(root)[1:] == (0, len(list(walk(pages, root))))
            save(pages, file)
            pages = reopened(pages, file)


@given(histories, st.lists(histories, min_size=1, max_size=3), st.integers(1, 12), wide_ranges())
def test_walks_over_several_trees_find_what_their_twins_find(
    first: list[tuple[str, int, int, int]],
    rest: list[list[tuple[str, int, int, int]]],
    limit: int,
    window: tuple[int, int],
) -> None:
    start, stop = window[0], sum(window)
    with new_file() as file:
        pages = opened(file)
        a, tree_a = build(pages, first)
        others = [build(pages, steps, a, tree_a) for steps in rest]
        roots, trees = [root for root, _ in others], [tree for _, tree in others]
        rows, resume = pages.runs(a, start, stop, limit)
        assert ([tuple(row) for row in rows.tolist()], resume) == twin.runs(tree_a, start, stop, limit)
        for b, tree_b in others:
            rows, resume = pages.difference(a, b, start, stop, limit)
            assert ([tuple(row) for row in rows.tolist()], resume) == twin.difference(
                tree_a, tree_b, start, stop, limit
            )
            held = {ref: sum(entry > 2 for entry in row) for level, ref, row in walk(pages, a) if level == 0}
            beside = {ref: sum(entry > 2 for entry in row) for level, ref, row in walk(pages, b) if level == 0}
            refs_a, refs_b = ({ref for _, ref, _ in walk(pages, root)} for root in (a, b))
            assert pages.tally(a, b) == (
                sum(held[ref] for ref in held.keys() - beside.keys()),
                sum(beside[ref] for ref in beside.keys() - held.keys()),
                len(refs_a - refs_b),
            )
        blocks, refs = pages.exclusive(a, roots)
        assert set(blocks.tolist()) == twin.exclusive(tree_a, trees)
        assert exact(refs) == {ref for _, ref, _ in walk(pages, a)} - {
            ref for root in roots for _, ref, _ in walk(pages, root)
        }
        pruned = pages.prune(a, roots)
        left = plain(pages, pruned)
        assert tuple(run for run in left if run[2] > 2) == twin.prune(tree_a, trees)
        assert all(twin.lookup(tree_a, position, 1) == [1] for position, _, entry in left if entry == 1)
        assert pages.prune(pruned, roots) == pruned or not roots
        assert plain(pages, a) == tree_a and [plain(pages, root) for root in roots] == trees


@given(histories, histories, st.integers(1, 6), wide_ranges())
def test_a_walk_in_parts_finds_what_one_walk_does(
    first: list[tuple[str, int, int, int]], second: list[tuple[str, int, int, int]], limit: int, window: tuple[int, int]
) -> None:
    start, stop = window[0], sum(window)

    def parts(walked: Callable[[int], tuple[npt.NDArray[np.int64], int]]) -> Iterator[list[int]]:
        at = start
        while at < stop:
            rows, resume = walked(at)
            assert at < resume <= stop and len(rows) <= limit and (len(rows) == limit or resume == stop)
            yield from rows.tolist()
            at = resume

    with new_file() as file:
        pages = opened(file)
        a, tree = build(pages, first)
        b, _ = build(pages, second, a, tree)
        assert (
            list(parts(lambda at: pages.runs(b, at, stop, limit))) == pages.runs(b, start, stop, UNLIMITED)[0].tolist()
        )
        assert (
            list(parts(lambda at: pages.difference(a, b, at, stop, limit)))
            == pages.difference(a, b, start, stop, UNLIMITED)[0].tolist()
            == pages.difference(b, a, start, stop, UNLIMITED)[0].tolist()
        )
        assert pages.difference(a, a, start, stop, UNLIMITED)[0].tolist() == []


@given(positions, st.lists(positions, max_size=10))
def test_a_change_of_one_position_makes_one_page_of_each_level(position: int, before: list[int]) -> None:
    with new_file() as file:
        pages = opened(file)
        root, _ = build(pages, [("assign", at, 1, 3 + number) for number, at in enumerate(before)])
        changed, freed = pages.assign(root, root, position, 1, 100)
        assert freed.tolist() == []
        assert pages.tally(changed, root)[2] == 5
        again, freed = pages.assign(changed, root, position, 1, 101)
        assert (again, freed.tolist()) == (changed, [100])
        back, freed = pages.assign(changed, root, position, 1, 101)
        assert (back, freed.tolist()) == (changed, [])


# A family of versions


@dataclass(frozen=True)
class Version:
    """A version: its tree, what it should hold, and where it stands in the family."""

    root: int
    tree: Tree
    parent: int | None
    kind: str


@dataclass
class State:
    """What a checkpoint keeps."""

    versions: dict[int, Version] = field(default_factory=dict)
    others: dict[int, int] = field(default_factory=dict)
    allocated: set[int] = field(default_factory=set)
    used: Words = field(default_factory=lambda: bitmap(3))
    slots: int = 3
    generation: int = 0

    def copy(self, pages: Trees) -> State:
        """As it is now."""
        return State(
            dict(self.versions),
            dict(self.others),
            set(self.allocated),
            pages.used_slots(),
            pages.slots,
            pages.generation,
        )


class Family(RuleBasedStateMachine):
    """Disks, snapshots and ghosts that share pages; checkpoints, crashes, and sweeps as docs/DESIGN.md tells them."""

    MOST = 9

    def __init__(self) -> None:
        super().__init__()
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.state = State()
        self.next_version = 1
        self.next_block = 3
        self.pending: State | None = None
        self.unwritten: list[int] = []

    def teardown(self) -> None:
        self.file.close()

    @initialize(slots=st.integers(3, 70), cache=st.sampled_from([0, 1 << 20]))
    def begin(self, slots: int, cache: int) -> None:
        self.cache = cache
        self.file.truncate(slots * SLOT_BYTES)
        self.pages = opened(self.file.fileno(), slots, cache=cache)
        for _ in range(2):
            self.add(0, (), None, "head")
        self.begin_checkpoint()
        self.finish_checkpoint()

    # Helpers

    def add(self, root: int, tree: Tree, parent: int | None, kind: str) -> int:
        self.state.versions[self.next_version] = Version(root, tree, parent, kind)
        self.next_version += 1
        return self.next_version - 1

    def of_kind(self, *kinds: str) -> list[int]:
        return [number for number, version in self.state.versions.items() if version.kind in kinds]

    def children(self, number: int) -> list[int]:
        return [child for child, version in self.state.versions.items() if version.parent == number]

    def neighbours(self, number: int) -> list[int]:
        parent = self.state.versions[number].parent
        return [*([] if parent is None else [parent]), *self.children(number)]

    def change(self, number: int, **fields: object) -> None:
        self.state.versions[number] = replace(self.state.versions[number], **fields)  # type: ignore[arg-type]

    def free(self, blocks: set[int]) -> None:
        assert blocks <= self.state.allocated
        self.state.allocated -= blocks

    def part_of(self, ghost: int) -> list[int]:
        """The ghosts that hang together with this one."""
        part, todo = [], [ghost]
        while todo:
            number = todo.pop()
            part.append(number)
            ghosts = (one for one in self.neighbours(number) if self.state.versions[one].kind == "ghost")
            todo += [one for one in ghosts if one not in part and one not in todo]
        return part

    def sweep(self, ghost: int) -> None:
        """Free what no visible version needs of a connected part of ghosts; then those that join nothing leave."""
        part = self.part_of(ghost)
        versions = self.state.versions
        around = {one for number in part for one in self.neighbours(number)} - set(part)
        trees = [versions[one].tree for one in around]
        roots = [versions[one].root for one in around]
        old = {number: versions[number] for number in part}
        for number in part:
            pruned = self.pages.prune(old[number].root, roots)
            tree = plain(self.pages, pruned)
            assert tuple(run for run in tree if run[2] > 2) == twin.prune(old[number].tree, trees)
            self.change(number, root=pruned, tree=tree)
        given_up = []
        for number in part:
            above = [old[one].root for one in part if one == old[number].parent]
            blocks, _ = self.pages.exclusive(old[number].root, roots + above)
            self.free(exact(blocks))
            kept = [versions[one].root for one in part]
            given_up.append(self.pages.exclusive(old[number].root, roots + above + kept)[1])
        for refs in given_up:
            self.pages.free_pages(refs)
        while lonely := [one for one in part if one in versions and len(self.children(one)) <= 1]:
            self.leave(lonely[0])

    def leave(self, number: int) -> None:
        version = self.state.versions[number]
        beside = [self.state.versions[one].root for one in self.neighbours(number)]
        blocks, refs = self.pages.exclusive(version.root, beside)
        assert blocks.tolist() == []
        self.pages.free_pages(refs)
        for child in self.children(number):
            self.change(child, parent=version.parent)
        del self.state.versions[number]

    def remove(self, number: int) -> None:
        self.change(number, kind="ghost")
        self.sweep(number)

    # What may happen

    @rule(data=st.data(), where=ranges(), again=st.booleans())
    def write(self, data: st.DataObject, where: tuple[int, int], again: bool) -> None:
        self.set(data.draw(st.sampled_from(self.of_kind("head"))), "assign", *where, again)

    @rule(data=st.data(), where=st.one_of(ranges(), wide_ranges()), entry=st.integers(0, 1))
    def make_empty(self, data: st.DataObject, where: tuple[int, int], entry: int) -> None:
        self.set(data.draw(st.sampled_from(self.of_kind("head"))), "fill", *where, entry)

    def set(self, number: int, method: str, first: int, count: int, entry: int) -> None:
        version = self.state.versions[number]
        parent = Version(0, (), None, "") if version.parent is None else self.state.versions[version.parent]
        if method == "assign":
            unused = sorted(set(range(3, self.next_block)) - self.state.allocated)
            if entry and unused:
                # A block that was freed comes back at another place.
                count, entry = 1, unused[0]
            else:
                entry, self.next_block = self.next_block, self.next_block + count
            self.state.allocated |= set(range(entry, entry + count))
        root, freed = getattr(self.pages, method)(version.root, parent.root, first, count, entry)
        tree, expected = getattr(twin, method)(version.tree, parent.tree, first, count, entry)
        assert exact(freed) == expected
        self.free(expected)
        self.change(number, root=root, tree=tree)

    @precondition(lambda self: len(self.state.versions) < self.MOST)
    @rule(data=st.data(), kind=st.sampled_from(["snapshot", "ghost"]))
    def cut(self, data: st.DataObject, kind: str) -> None:
        """A snapshot of a disk; or a clone of one, by a cut that is a ghost at once."""
        head = data.draw(st.sampled_from(self.of_kind("head")))
        version = self.state.versions[head]
        number = self.add(version.root, version.tree, version.parent, kind)
        self.change(head, parent=number)
        if kind == "ghost":
            self.add(version.root, version.tree, number, "head")

    @precondition(lambda self: self.of_kind("snapshot") and len(self.state.versions) < self.MOST)
    @rule(data=st.data())
    def clone(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.of_kind("snapshot")))
        version = self.state.versions[number]
        self.add(version.root, version.tree, number, "head")

    @precondition(lambda self: self.of_kind("snapshot"))
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        head = data.draw(st.sampled_from(self.of_kind("head")))
        number = data.draw(st.sampled_from(self.of_kind("snapshot")))
        version = self.state.versions[number]
        self.add(version.root, version.tree, number, "head")
        self.remove(head)

    @precondition(lambda self: len(self.of_kind("head", "snapshot")) > 2)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        heads = self.of_kind("head")
        number = data.draw(st.sampled_from(self.of_kind("snapshot") + (heads if len(heads) > 1 else [])))
        self.remove(number)

    @rule()
    def sweep_all(self) -> None:
        """Then blocks that no visible version holds are free, all of them."""
        swept: set[int] = set()
        while left := [number for number in self.of_kind("ghost") if number not in swept]:
            swept |= set(self.part_of(left[0]))
            self.sweep(left[0])
        visible = (self.state.versions[number].tree for number in self.of_kind("head", "snapshot"))
        assert self.state.allocated == set().union(*map(blocks_of, visible))

    @precondition(lambda self: len(self.state.others) < 5)
    @rule(payload=st.binary(min_size=1, max_size=1024))
    def put(self, payload: bytes) -> None:
        self.state.others[self.pages.put(CATALOG, payload)] = twin.put(CATALOG, payload)

    @precondition(lambda self: self.state.others)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(list(self.state.others)))
        del self.state.others[ref]
        self.pages.free_pages(np.array([ref], dtype=np.uint64))

    @precondition(lambda self: self.pending is None)
    @rule()
    def begin_checkpoint(self) -> None:
        self.pending = self.state.copy(self.pages)
        self.unwritten = self.pages.dirty().tolist()
        assert self.pages.freeze() == self.pending.generation == self.pages.generation - 1

    @precondition(lambda self: self.unwritten)
    @rule(count=st.integers(1, 40))
    def write_pages(self, count: int) -> None:
        some, self.unwritten = self.unwritten[:count], self.unwritten[count:]
        slots = np.array(some, dtype=np.uint64)
        staged = self.pages.stage(slots).tobytes()
        for number, slot in enumerate(some):
            os.pwrite(self.file.fileno(), staged[number * SLOT_BYTES :][:SLOT_BYTES], slot * SLOT_BYTES)
        self.pages.written(slots)
        assert not set(some) & set(self.pages.dirty().tolist())

    @precondition(lambda self: self.pending is not None)
    @rule()
    def finish_checkpoint(self) -> None:
        while self.unwritten:
            self.write_pages(40)
        assert self.pending is not None
        self.durable, self.pending = self.pending, None
        self.pages.release()

    @rule()
    def crash(self) -> None:
        """What counts is the last checkpoint; what was written of the next one is in nobody's way."""
        kept = self.durable
        self.pages = self.opened_durable()
        self.state = kept.copy(self.pages)
        self.pending, self.unwritten = None, []

    def opened_durable(self) -> Trees:
        kept = self.durable
        return opened(self.file.fileno(), kept.slots, kept.generation + 1, kept.used, self.cache)

    # What always holds

    def compare(self, pages: Trees, state: State) -> None:
        for version in state.versions.values():
            assert plain(pages, version.root) == version.tree
        for ref, number in state.others.items():
            assert pages.get(CATALOG, ref) == twin.get(CATALOG, number)
        slots, blocks = marked(pages, [version.root for version in state.versions.values()], self.next_block)
        others = {slot_of(ref) for ref in state.others}
        assert not slots & others
        assert members(pages.used_slots()) == slots | others | {0, 1, 2}
        assert blocks == state.allocated

    @invariant()
    def everything_is_there_and_nothing_else(self) -> None:
        self.compare(self.pages, self.state)

    @invariant()
    def the_last_checkpoint_is_whole(self) -> None:
        self.compare(self.opened_durable(), self.durable)

    @invariant()
    def what_no_checkpoint_needs_is_free(self) -> None:
        needed = members(self.pages.used_slots()) | members(self.durable.used)
        if self.pending is not None:
            needed |= members(self.pending.used)
        assert self.pages.free_slots == self.pages.slots - len(needed)


TestFamily = Family.TestCase
TestFamily.settings = settings(stateful_step_count=40)


# What a map file may hold


@dataclass
class Saved:
    """A saved map file with three trees that share pages, and what they hold."""

    pages: Trees
    trees: dict[int, Tree]
    other: int
    data: bytes

    def opened(self, data: bytes, descriptor: int) -> Trees:
        """The pages of a file with these bytes."""
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)
        return reopened(self.pages, descriptor)

    def slot(self, number: int) -> bytes:
        """The bytes of a slot."""
        return self.data[number * SLOT_BYTES : (number + 1) * SLOT_BYTES]

    def with_slot(self, number: int, data: bytes) -> bytes:
        """The file with other bytes in a slot."""
        return self.data[: number * SLOT_BYTES] + data + self.data[(number + 1) * SLOT_BYTES :]

    def reach(self, root: int) -> set[int]:
        """The slots of a tree."""
        return {slot_of(ref) for _, ref, _ in walk(self.pages, root)}


@pytest.fixture(scope="module")
def saved() -> Saved:
    with new_file() as file:
        pages = opened(file, 32)
        first = build(pages, [("assign", 0, 3, 3), ("assign", POSITIONS - 2, 2, 10), ("fill", 2**21, 2**14, 1)])
        other = pages.put(CATALOG, b"catalog")
        save(pages, file)
        second = build(pages, [("assign", 1, 1, 20)], *first)
        third = build(pages, [("assign", 300, 2, 30), ("fill", 0, 128, 0)], *first)
        save(pages, file)
        return Saved(
            pages, dict([first, second, third]), other, os.pread(file, 32 * SLOT_BYTES, 0).ljust(32 * SLOT_BYTES, b"\0")
        )


Look = Callable[[Trees, int, int], object]
LOOKS: dict[str, Look] = {
    "lookup": lambda pages, root, other: [pages.lookup(root, at, 200).tolist() for at in (0, 2**21, POSITIONS - 200)],
    "runs": lambda pages, root, other: pages.runs(root, 0, POSITIONS, UNLIMITED)[0].tolist(),
    "difference": lambda pages, root, other: pages.difference(root, other, 0, POSITIONS, UNLIMITED)[0].tolist(),
    "tally": lambda pages, root, other: pages.tally(root, other),
    "exclusive": lambda pages, root, other: [found.tolist() for found in pages.exclusive(root, [other])],
    "prune": lambda pages, root, other: plain(pages, whole(pages, lambda: pages.prune(root, [other]))),
    "assign": lambda pages, root, other: change(pages, lambda: pages.assign(root, other, 0, 2, 40)),
    "fill": lambda pages, root, other: change(pages, lambda: pages.fill(root, other, POSITIONS - 300, 300, 0)),
    "fill much": lambda pages, root, other: change(pages, lambda: pages.fill(root, other, 0, 2**22, 1)),
}
Result = TypeVar("Result")


def attempt(call: Callable[[], Result]) -> Result | Failure:
    """What a call returns, or its failure."""
    try:
        return call()
    except Failure as failure:
        return failure


def whole(pages: Trees, call: Callable[[], Result]) -> Result:
    """What a call returns; if it fails and tells of no part, it took and gave up no page."""
    before = (pages.used_slots().tolist(), pages.free_slots, pages.dirty().tolist())
    found = attempt(call)
    if isinstance(found, Failure):
        assert found.partial or (pages.used_slots().tolist(), pages.free_slots, pages.dirty().tolist()) == before
        raise found
    return found


def change(pages: Trees, call: Callable[[], tuple[int, Words]]) -> tuple[list[int], Tree]:
    """What a change freed, and what the tree holds after it."""
    root, freed = whole(pages, call)
    return freed.tolist(), plain(pages, root)


def harmless_or_refused(saved: Saved, data: bytes, bad: set[int], file: int, looks: Iterable[str] = LOOKS) -> set[int]:
    """Every method gives the right answer or names a slot that is bad; returns those it named."""
    named = set()
    for root in saved.trees:
        for name in looks:
            for other in saved.trees:
                pages = saved.opened(data, file)
                found = attempt(lambda: LOOKS[name](pages, root, other))  # noqa: B023
                if isinstance(found, Failure):
                    assert (found.result, found.code) == (-3, 0) and found.slot in bad
                    named.add(found.slot)
                else:
                    assert found == LOOKS[name](saved.opened(saved.data, file), root, other)
                    assert name != "runs" or not bad & saved.reach(root)
    return named


def test_no_byte_of_a_slot_may_be_another(saved: Saved) -> None:
    used = set().union(*map(saved.reach, saved.trees))
    roots = {slot: next(root for root in saved.trees if slot in saved.reach(root)) for slot in used}
    with new_file() as file:
        saved.opened(saved.data, file)
        for at in range(len(saved.data)):
            slot = at // SLOT_BYTES
            os.pwrite(file, bytes([saved.data[at] ^ 1 << at % 8]), at)
            pages = reopened(saved.pages, file)
            for root, tree in saved.trees.items() if slot not in used else [(roots[slot], ())]:
                if slot in used:
                    with pytest.raises(Failure) as failed:
                        plain(pages, root)
                    assert (failed.value.result, failed.value.code, failed.value.slot) == (-3, 0, slot)
                elif at % 40 == 0:
                    assert plain(pages, root) == tree
            os.pwrite(file, saved.data[at : at + 1], at)


def test_every_method_refuses_a_page_that_is_damaged_or_does_not_need_it(saved: Saved) -> None:
    used = set().union(*map(saved.reach, saved.trees))
    with new_file() as file:
        for slot in range(32):
            flipped = bytearray(saved.data)
            flipped[slot * SLOT_BYTES + 500] ^= 4
            named = harmless_or_refused(saved, bytes(flipped), {slot}, file)
            assert named == ({slot} & used)


def test_a_file_that_is_cut_off_lacks_the_slots_behind_the_cut(saved: Saved) -> None:
    with new_file() as file:
        for slot in range(32):
            for size_bytes in (slot * SLOT_BYTES, slot * SLOT_BYTES + 7, (slot + 1) * SLOT_BYTES - 1):
                cut = saved.data[:size_bytes]
                # Zeros at the end of a slot may be missing: they are read as zeros.
                lost = {
                    n
                    for n in range(slot, 32)
                    if cut[n * SLOT_BYTES :].ljust(SLOT_BYTES, b"\0")[:SLOT_BYTES] != saved.slot(n)
                }
                harmless_or_refused(saved, cut, lost, file, ["runs", "difference"])


def test_slots_that_changed_places_are_noticed(saved: Saved) -> None:
    used = sorted(set().union(*map(saved.reach, saved.trees)))
    with new_file() as file:
        for number, one in enumerate(used):
            for two in used[number + 1 :]:
                data = saved.with_slot(one, saved.slot(two))
                data = data[: two * SLOT_BYTES] + saved.slot(one) + data[(two + 1) * SLOT_BYTES :]
                named = harmless_or_refused(saved, data, {one, two}, file, ["runs"])
                assert named


def page(slot: int, kind: int, entries: Sequence[int], generation: int = 1) -> bytes:
    """A slot with a right checksum, made by the twin."""
    body = np.zeros(128, dtype="<u8")
    body[: len(entries)] = entries
    return twin.stage(slot, SEED, generation, kind, body.tobytes())


def test_the_bytes_of_a_slot_are_those_of_the_format(saved: Saved) -> None:
    for root in saved.trees:
        for level, ref, entries in walk(saved.pages, root):
            slot = slot_of(ref)
            assert saved.slot(slot) == page(slot, level, entries, generation=ref >> 48)
    slot = slot_of(saved.other)
    assert saved.slot(slot) == twin.stage(slot, SEED, saved.other >> 48, CATALOG, b"catalog")


@dataclass
class Forged:
    """Pages that somebody wrote who knows how to make checksums."""

    file: int
    pages: Trees

    def put(self, slot: int, kind: int, entries: Sequence[int], generation: int = 1) -> int:
        """Write a page; its reference."""
        os.pwrite(self.file, page(slot, kind, entries, generation), slot * SLOT_BYTES)
        return slot | (generation & 0xFFFF) << 48


@pytest.fixture
def forged() -> Iterator[Forged]:
    with new_file() as file:
        used = bitmap(64, range(48))
        yield Forged(file, opened(file, 64, 9, used))


def refused_everywhere(forged: Forged, root: int, slot: int) -> None:
    """Whatever enters the page at position 0 fails, and changes nothing."""
    before = (forged.pages.used_slots().tolist(), forged.pages.free_slots)
    for name in ("lookup", "runs", "assign", "tally", "exclusive", "difference", "fill much"):
        for pair in [(root, 0), (0, root)] if name in ("tally", "difference", "assign") else [(root, 0)]:
            with pytest.raises(Failure) as failed:
                LOOKS[name](forged.pages, *pair)
            assert (failed.value.result, failed.value.slot) == (-3, slot), name
            assert (forged.pages.used_slots().tolist(), forged.pages.free_slots) == before, name


@pytest.mark.parametrize("level", range(5))
@pytest.mark.parametrize(
    "wrong",
    [
        "level above",
        "level below",
        "catalog",
        "generation",
        "unused slot",
        "slot 0",
        "slot 1",
        "outside",
        "far outside",
    ],
)
def test_an_entry_that_refers_to_something_else_is_refused(forged: Forged, level: int, wrong: str) -> None:
    kinds = {"level above": level + 1, "level below": (level - 1) % 256, "catalog": CATALOG}
    slots = {"unused slot": 50, "slot 0": 0, "slot 1": 1, "slot 2": 2}
    slot = slots.get(wrong, 20)
    ref = forged.put(slot, kinds.get(wrong, level), [3, 4] if level == 0 else [1])
    ref = {"outside": 64, "far outside": 2**48 - 1, "generation": ref ^ 1 << 48}.get(wrong, ref)
    for above in range(level + 1, 5):
        ref = forged.put(20 + above, above, [ref])
    bad = {"outside": 64, "far outside": 2**48 - 1}.get(wrong, slot)
    refused_everywhere(forged, ref, bad)
    problems = forged.pages.mark(ref, 1, bitmap(64), bitmap(64), np.zeros(128, dtype=np.uint32), 64)
    assert problems.tolist() == [[1, 0, bad]]


def test_a_page_that_refers_to_itself_is_refused(forged: Forged) -> None:
    refused_everywhere(forged, forged.put(20, 4, [20 | 1 << 48]), 20)


@pytest.mark.parametrize("slot", [0, 1, 2, 3, 47, 48, 63, 64, 2**40, 2**47])
def test_a_page_of_zeros_is_no_page(forged: Forged, slot: int) -> None:
    with pytest.raises(Failure) as failed:
        forged.pages.lookup(slot | 1 << 48, 0, 1)
    assert (failed.value.result, failed.value.slot) == (-3, slot)


def test_mark_finds_pages_and_blocks_at_two_places_and_blocks_outside(forged: Forged) -> None:
    leaf = forged.put(10, 0, [3, 4, 99, 4])
    other_leaf = forged.put(11, 0, [0, 3])
    root = forged.put(14, 4, [forged.put(13, 3, [forged.put(12, 2, [forged.put(15, 1, [leaf, leaf, other_leaf])])])])
    slots, blocks, owners = bitmap(64), bitmap(64), np.zeros(128, dtype=np.uint32)
    problems = forged.pages.mark(root, 1, slots, blocks, owners, 64).tolist()
    assert problems == [[3, 2, 99], [4, 3, 4], [2, 128, 10], [4, 257, 3]]
    assert (members(slots), members(blocks)) == ({10, 11, 12, 13, 14, 15}, {3, 4})
    # Another version of the family shares the pages rightly; another family must not.
    assert forged.pages.mark(root, 1, slots, blocks, owners, 64).tolist() == []
    assert forged.pages.mark(root, 2, slots, blocks, owners, 64).tolist() == [[2, 0, 14]]


def test_mark_reports_a_thousand_problems_and_goes_on(forged: Forged) -> None:
    leaves = [forged.put(slot, 0, range(100, 228)) for slot in range(3, 13)]
    ref = forged.put(13, 1, leaves)
    for level in (2, 3, 4):
        ref = forged.put(12 + level, level, [ref])
    slots = bitmap(64)
    problems = forged.pages.mark(ref, 1, slots, bitmap(64), np.zeros(128, dtype=np.uint32), 64)
    assert len(problems) == 1000 and set(problems[:, 0].tolist()) == {3}
    assert members(slots) == set(range(3, 17))


def test_a_page_that_a_forged_tree_holds_twice_is_given_up_once(forged: Forged) -> None:
    for generation, slot in [(1, 3), (9, 23)]:
        leaf = forged.put(slot, 0, [5], generation)
        ref = forged.put(slot + 1, 1, [leaf, leaf], generation)
        for level in (2, 3, 4):
            ref = forged.put(slot + level, level, [ref], generation)
        root, freed = forged.pages.fill(ref, 0, 0, 2**21, 0)
        assert set(freed.tolist()) == {5}
        forged.pages.freeze()
        forged.pages.release()
        after = members(forged.pages.used_slots())
        assert forged.pages.free_slots == forged.pages.slots - len(after)
        assert slot not in after
        assert plain(forged.pages, root) == ()


@pytest.mark.parametrize("level", range(5))
def test_what_is_lost_is_told_and_holds_nothing(forged: Forged, level: int) -> None:
    ref = forged.put(10, level, [2, 1, 0, 2])
    for above in range(level + 1, 5):
        ref = forged.put(10 + above, above, [ref])
    span = 128**level
    tree = ((0, span, 2), (span, span, 1), (3 * span, span, 2))
    pages = forged.pages
    assert plain(pages, ref) == tree
    assert pages.lookup(ref, 0, 5).tolist() == twin.lookup(tree, 0, 5)
    assert pages.difference(ref, 1, 0, 4 * span, 9)[0].tolist() == [[0, span], [2 * span, 2 * span]]
    assert pages.tally(ref)[0] == 0 and pages.exclusive(ref, [])[0].tolist() == []
    assert pages.prune(ref, [2]) == 0 and plain(pages, 2) == ((0, POSITIONS, 2),)
    assert pages.mark(ref, 1, bitmap(64), bitmap(64), np.zeros(128, dtype=np.uint32), 64).tolist() == []
    changed, freed = pages.assign(ref, 0, 0, 1, 9)
    assert freed.tolist() == [] and plain(pages, changed) == twin.assign(tree, (), 0, 1, 9)[0]


@pytest.mark.parametrize("how", ["closed", "folder", "write only", "pipe"])
def test_a_file_that_cannot_be_read_is_a_failure_with_its_reason(saved: Saved, tmp_path: Path, how: str) -> None:
    ends = []
    if how == "closed":
        descriptor = 1 << 20
    elif how == "folder":
        descriptor = os.open(tmp_path, os.O_RDONLY)
    elif how == "write only":
        descriptor = os.open(tmp_path / "map", os.O_WRONLY | os.O_CREAT)
    else:
        descriptor, *ends = os.pipe()
    reason = {"closed": errno.EBADF, "folder": errno.EISDIR, "write only": errno.EBADF, "pipe": errno.ESPIPE}[how]
    try:
        for root in saved.trees:
            for name, look in LOOKS.items():
                pages = reopened(saved.pages, descriptor)
                other = next(one for one in saved.trees if one != root)
                with pytest.raises(Failure) as failed:
                    look(pages, root, other)
                assert (failed.value.result, failed.value.code, failed.value.partial) == (-2, reason, None), name
    finally:
        for one in ends + ([descriptor] if how != "closed" else []):
            os.close(one)


# No space


def in_the_way(pages: Trees, room: int) -> None:
    """Fill slots until so many are free."""
    while pages.free_slots > room:
        pages.put(CATALOG, b"in the way")


@given(st.integers(0, 4), st.lists(changes(), max_size=4), positions)
def test_a_change_for_which_there_is_no_space_changes_nothing(
    room: int, before: list[tuple[str, int, int, int]], position: int
) -> None:
    with new_file() as file:
        pages = opened(file, 64)
        root, tree = build(pages, before)
        in_the_way(pages, room)
        room = pages.free_slots
        used = pages.used_slots().tolist()
        with files_no_longer_than(1000):
            for method, entry in (("assign", 9999), ("fill", 1)):
                if twin.lookup(tree, position, 1) == [entry]:
                    continue
                with pytest.raises(Failure) as failed:
                    getattr(pages, method)(root, root, position, 1, entry)
                assert (failed.value.result, failed.value.code, failed.value.partial) == (-4, errno.EFBIG, None)
                assert pages.used_slots().tolist() == used and pages.free_slots == room
                assert plain(pages, root) == tree
        changed, _ = pages.assign(root, root, position, 1, 9999)
        assert pages.lookup(changed, position, 1).tolist() == [9999]


@given(st.integers(0, 40), histories, changes(), st.booleans())
def test_a_change_that_fails_on_its_way_tells_what_is_done(
    room: int, before: list[tuple[str, int, int, int]], change: tuple[str, int, int, int], shared: bool
) -> None:
    method, first, count, entry = change
    with new_file() as file:
        pages = opened(file, 64)
        root, tree = build(pages, before)
        parent, beside = (root, tree) if shared else (0, ())
        in_the_way(pages, room)
        with files_no_longer_than(1000):
            found = attempt(lambda: getattr(pages, method)(root, parent, first, count, entry))
        if isinstance(found, Failure):
            assert (found.result, found.code) == (-4, errno.EFBIG)
            now, freed, done = found.partial or (root, np.zeros(0, dtype=np.uint64), 0)
            assert done < count and (found.partial is None) == (done == 0)
        else:
            (now, freed), done = found, count
        expected, lost = getattr(twin, method)(tree, beside, first, done, entry)
        assert plain(pages, now) == expected and set(freed.tolist()) == lost
        rest = entry + done if method == "assign" else entry
        now, _ = getattr(pages, method)(now, parent, first + done, count - done, rest)
        assert plain(pages, now) == getattr(twin, method)(tree, beside, first, count, entry)[0]


@given(histories, histories, st.integers(0, 12))
def test_a_prune_for_which_there_is_no_space_makes_nothing(
    first: list[tuple[str, int, int, int]], second: list[tuple[str, int, int, int]], room: int
) -> None:
    with new_file() as file:
        pages = opened(file, 64)
        a, tree = build(pages, first)
        b, _ = build(pages, second, a, tree)
        in_the_way(pages, room)
        room = pages.free_slots
        used = pages.used_slots().tolist()
        with files_no_longer_than(1000):
            pruned = attempt(lambda: pages.prune(a, [b]))
        if isinstance(pruned, Failure):
            assert (pruned.result, pruned.code) == (-4, errno.EFBIG)
            assert pages.used_slots().tolist() == used and pages.free_slots == room
        else:
            assert room - pages.free_slots == pages.tally(pruned, a)[2] or pruned == b


# Slots and memory


def test_a_page_that_may_still_change_stays_dirty() -> None:
    with new_file() as file:
        pages = opened(file)
        root, _ = pages.assign(0, 0, 0, 1, 3)
        staged = pages.stage(pages.dirty())
        pages.written(pages.dirty())
        assert len(pages.dirty()) == 5 and len(staged) == 5 * SLOT_BYTES
        root, _ = pages.assign(root, 0, 0, 1, 4)
        save(pages, file)
        assert pages.dirty().tolist() == []
        assert reopened(pages, file).lookup(root, 0, 1).tolist() == [4]


def test_a_damaged_page_gets_no_right_checksum(saved: Saved) -> None:
    root = next(iter(saved.trees))
    flipped = bytearray(saved.data)
    flipped[slot_of(root) * SLOT_BYTES + 99] ^= 1
    with new_file() as file:
        pages = saved.opened(bytes(flipped), file)
        with pytest.raises(Failure):
            pages.lookup(root, 0, 1)
        with pytest.raises(ValueError, match="not in memory"):
            pages.stage(np.array([slot_of(root)], dtype=np.uint64))


def test_clean_pages_take_no_more_memory_than_was_said() -> None:
    limit = 64 * 16 * SLOT_BYTES
    rng = np.random.default_rng(1)
    places = rng.integers(0, POSITIONS, 4000).tolist()
    with new_file() as file:
        pages = opened(file)
        root = 0
        for number, place in enumerate(places):
            root, _ = pages.assign(root, 0, place, 1, 3 + number)
        assert pages.resident_bytes > 5 * limit
        save(pages, file)
        assert len(pages.runs(root, 0, POSITIONS, UNLIMITED)[0]) == 4000
        for place in places:
            pages.lookup(root, place, 1)
        # A walk takes what it needs; what comes after it gives that back.
        assert pages.resident_bytes <= 32 * 16 * SLOT_BYTES
        pages = reopened(pages, file, cache=limit)
        for place in places:
            pages.lookup(root, place, 1)
            assert pages.resident_bytes <= limit + 10 * 16 * SLOT_BYTES


def test_many_threads_read_while_one_changes() -> None:
    with new_file() as file:
        pages = opened(file)
        kept, tree = build(pages, [("assign", at, 100, 3 + at) for at in range(0, 100_000, 1000)])
        save(pages, file)

        def read(number: int) -> bool:
            at = number * 37 % 100_000
            return (
                pages.lookup(kept, at, 50).tolist() == twin.lookup(tree, at, 50)
                and plain(pages, kept) == tree
                and pages.tally(kept)[0] == twin.tally(tree)
            )

        def change() -> int:
            root = kept
            for at in range(0, 60_000, 7):
                root, _ = pages.assign(root, kept, at, 1, 200_000 + at)
                if at % 7000 == 0:
                    save(pages, file)
            return root

        with ThreadPoolExecutor(4) as hands:
            changed = hands.submit(change)
            assert all(hands.map(read, range(100)))
        assert pages.lookup(changed.result(), 0, 50).tolist()[::7] == [200_000 + at for at in range(0, 50, 7)]


# Arguments

BAD_RANGES = [(-1, 1, OverflowError), (0, -1, OverflowError), (POSITIONS, 1, ValueError), (2**64, 0, OverflowError)]
BAD_RANGES += [(1, POSITIONS, ValueError), (2**63, 2**32 - 1, ValueError), (2**64 - 1, 2**32 - 1, ValueError)]


@pytest.mark.parametrize(("first", "count", "error"), BAD_RANGES)
def test_positions_outside_of_a_tree_are_refused(first: int, count: int, error: type[Exception]) -> None:
    pages = opened(-1)
    with pytest.raises((error, OverflowError)):
        pages.lookup(0, first, count)
    with pytest.raises(error):
        pages.assign(0, 0, first, count, 3)
    with pytest.raises(error):
        pages.fill(0, 0, first, count, 1)
    last = max(first + count, -1)
    with pytest.raises((error, OverflowError)):
        pages.runs(1, first, last, 1)
    with pytest.raises((error, OverflowError)):
        pages.difference(0, 1, first, last, 1)
    assert pages.free_slots == 0


def test_a_range_of_nothing_is_nothing() -> None:
    pages = opened(-1)
    for first in (0, 77, POSITIONS):
        assert pages.lookup(1, first, 0).tolist() == []
        assert pages.assign(1, 0, first, 0, 3)[0] == pages.fill(1, 0, first, 0, 0)[0] == 1
        assert pages.runs(1, first, first, 1)[1] == pages.difference(0, 1, first, first, 1)[1] == first
    with pytest.raises(ValueError, match="positions 5 to 4"):
        pages.runs(1, 5, 4, 1)
    with pytest.raises(ValueError, match="positions 5 to 4"):
        pages.difference(1, 0, 5, 4, 1)


@pytest.mark.parametrize("limit", [0, UNLIMITED + 1, 2**64 - 1])
def test_a_limit_without_sense_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="limit must be 1 to 1048576"):
        opened(-1).runs(1, 0, 1, limit)
    with pytest.raises(ValueError, match="limit must be 1 to 1048576"):
        opened(-1).difference(0, 1, 0, 1, limit)
    with pytest.raises(OverflowError):
        opened(-1).runs(1, 0, 1, -1)


def test_entries_without_sense_are_refused() -> None:
    pages = opened(-1)
    for entry in (0, 1, 2, 2**64 - 2):
        with pytest.raises(ValueError, match=f"no 2 blocks from {entry} on"):
            pages.assign(0, 0, 0, 2, entry)
    for entry in (2, 2**64 - 1):
        with pytest.raises(ValueError, match="ABSENT or ZERO"):
            pages.fill(0, 0, 0, 2, entry)
    for bad in (-1, 2**64):
        with pytest.raises(OverflowError):
            pages.assign(0, 0, 0, 1, bad)
        with pytest.raises(OverflowError):
            pages.exclusive(5, [bad])


def test_mark_wants_room_for_all_slots_and_blocks() -> None:
    pages = opened(-1, 130)

    def mark(slots: int, blocks: int, owners: int, limit: int) -> list[object]:
        shapes = (
            np.zeros(slots, dtype=np.uint64),
            np.zeros(blocks, dtype=np.uint64),
            np.zeros(owners, dtype=np.uint32),
        )
        return list(pages.mark(1, 1, *shapes, limit))

    assert mark(3, 2, 258, 128) == mark(3, 0, 130, 0) == []
    for wrong in [(2, 2, 258, 128), (3, 1, 258, 128), (3, 2, 257, 128), (0, 0, 0, 0), (3, 2, 258, 2**64 - 1)]:
        with pytest.raises(ValueError, match="too short"):
            mark(*wrong)


@given(st.data())
def test_a_walk_in_slices_finds_what_one_in_one_go_finds(data: st.DataObject) -> None:
    with new_file() as file:
        walk_in_slices(data, opened(file))


def walk_in_slices(data: st.DataObject, pages: Trees) -> None:
    """Compare the two ways on trees that share pages."""
    roots = [0]
    positions = st.one_of(st.integers(0, 2000), st.integers(0, 2**35 - 10))
    block = 3
    for _ in range(data.draw(st.integers(1, 25))):
        parent = data.draw(st.sampled_from(roots))
        count = data.draw(st.integers(1, 9))
        root, _ = pages.assign(parent, parent, data.draw(positions), count, block)
        block += count
        roots.append(root)
    one, *others = data.draw(st.lists(st.sampled_from(roots), min_size=2, max_size=5))
    whole = pages.tally(one, others[0]), *map(list, pages.exclusive(one, others))
    pages.slice_pages = data.draw(st.integers(-3, 5))
    assert (pages.tally(one, others[0]), *map(list, pages.exclusive(one, others))) == whole
