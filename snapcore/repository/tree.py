"""The repository tree: a Merkle radix tree over chunk numbers (docs/FORMAT.md, "The tree").

`TreeWriter` makes the next tree from a parent in one ascending pass and touches only what changes; `leaves`
iterates; `differing` walks two trees side by side and skips every subtree that is the same node.
Places here are chunk numbers. A node is a uint8 array of shape (128, 32).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapcore.errors import DamagedError
from snapcore.persist import Buffer
from snapcore.repository.domain import ID_BYTES, ZERO_ID
from snapcore.repository.table import Ids, ids_of

FANOUT = 128
NODE_BYTES = FANOUT * ID_BYTES

_BATCH = 512

Node = npt.NDArray[np.uint8]
# Numbers of chunks.
Places = npt.NDArray[np.int64]
LoadNode = Callable[[bytes], Buffer]
LoadNodes = Callable[[list[bytes]], list[Buffer]]
# First chunk, level and id of a node.
_Place = tuple[int, int, bytes]
# (bytes of the node, id of the node that stood in its place) → id
StoreNode = Callable[[Buffer, bytes], bytes]


@dataclass(frozen=True, slots=True)
class Root:
    """The id of the topmost node and how many levels lie below and with it."""

    id: bytes
    levels: int


EMPTY = Root(ZERO_ID, 1)


def levels_for(chunks: int) -> int:
    """Levels of the tree of a disk of so many chunks."""
    levels = 1
    while FANOUT**levels < chunks:
        levels += 1
    return levels


def _empty_node() -> Node:
    return np.zeros((FANOUT, ID_BYTES), dtype=np.uint8)


def opened(object_id: bytes, load: LoadNode) -> Node:
    """The node of an id, read-only; all zero for the zero id."""
    if object_id == ZERO_ID:
        return _empty_node()
    data = load(object_id)
    return np.frombuffer(data, dtype=np.uint8).reshape(FANOUT, ID_BYTES)


def fitted(root: Root, levels: int, load: LoadNode, store: StoreNode) -> Root:
    """The tree with more levels (the old root becomes slot 0) or fewer (what lies behind slot 0 is cut off)."""
    top = root.id
    for _ in range(root.levels, levels):
        if top != ZERO_ID:
            node = _empty_node()
            node[0] = np.frombuffer(top, dtype=np.uint8)
            top = store(node.tobytes(), ZERO_ID)
    for _ in range(levels, root.levels):
        top = opened(top, load)[0].tobytes()
    return Root(top, levels)


@dataclass(slots=True)
class _Open:
    """A node on the path that the writer stands on."""

    index: int
    node: Node
    old_id: bytes
    changed: bool = False


class TreeWriter:
    """Makes a new tree of an old one. Edits come in ascending order and do not overlap.

    Parameters
    ----------
    root : Root
        The old tree, of the height that the new one has (`fitted`).
    load, store
        Read a node by id; store a node, given the id of the one that stood there before (a base for a patch).
    """

    def __init__(self, root: Root, load: LoadNode, store: StoreNode) -> None:
        self._root = root
        self._load = load
        self._store = store
        self._path: list[_Open | None] = [None] * (root.levels + 1)

    @property
    def levels(self) -> int:
        """Height of the tree, old and new."""
        return self._root.levels

    def replace(self, places: Places, ids: Node) -> None:
        """Chunks at ascending places get these ids: uint8 array of shape (n, 32); zero ids are zero chunks."""
        for low, high in by_leaf(places):
            leaf = self._descend(1, int(places[low]) // FANOUT)
            slots = places[low:high] % FANOUT
            if (leaf.node[slots] != ids[low:high]).any():
                self._editable(leaf)[slots] = ids[low:high]

    def clear(self, start: int, stop: int) -> None:
        """Chunks from `start` up to `stop` become zero; costs what is there, not how long the range is."""
        if start < stop:
            self._clear(self._root.levels, 0, start, stop)

    def finish(self) -> Root:
        """The new tree; every changed node is stored by then."""
        self._close(self._root.levels)
        return self._root

    def _clear(self, level: int, index: int, start: int, stop: int) -> None:
        width = FANOUT ** (level - 1)
        base = index * FANOUT**level
        here = self._descend(level, index)
        first_whole = -(-(start - base) // width)
        stop_whole = (stop - base) // width
        edges = []
        if (start - base) % width:
            edges.append((start - base) // width)
        if first_whole < stop_whole and here.node[first_whole:stop_whole].any():
            self._editable(here)[first_whole:stop_whole] = 0
        if (stop - base) % width and stop_whole not in edges:
            edges.append(stop_whole)
        for slot in edges:
            child = index * FANOUT + slot
            below = self._path[level - 1]
            if here.node[slot].any() or (below is not None and below.index == child):
                first = base + slot * width
                self._clear(level - 1, child, max(start, first), min(stop, first + width))

    def _descend(self, level: int, index: int) -> _Open:
        for above in range(self._root.levels, level - 1, -1):
            wanted = index // FANOUT ** (above - level)
            found = self._path[above]
            if found is None or found.index != wanted:
                self._close(above)
                found = self._opened(above, wanted)
            here = found
        return here

    def _opened(self, level: int, index: int) -> _Open:
        if level == self._root.levels:
            old_id = self._root.id
        else:
            above = self._path[level + 1]
            assert above is not None
            old_id = above.node[index % FANOUT].tobytes()
        here = _Open(index, opened(old_id, self._load), old_id)
        self._path[level] = here
        return here

    @staticmethod
    def _editable(here: _Open) -> Node:
        if not here.changed:
            here.node = here.node.copy()
            here.changed = True
        return here.node

    def _close(self, level: int) -> None:
        """Store what changed on the path from the leaf up to `level`."""
        for lower in range(1, level + 1):
            here = self._path[lower]
            self._path[lower] = None
            if here is None or not here.changed:
                continue
            new_id = self._store(here.node.tobytes(), here.old_id) if here.node.any() else ZERO_ID
            if lower == self._root.levels:
                self._root = Root(new_id, self._root.levels)
            else:
                above = self._path[lower + 1]
                assert above is not None
                self._editable(above)[here.index % FANOUT] = np.frombuffer(new_id, dtype=np.uint8)


def by_leaf(places: Places) -> Iterator[tuple[int, int]]:
    """Which of some ascending places lie below the same leaf: from the first of the pair up to the second."""
    borders = np.flatnonzero(np.diff(places // FANOUT)) + 1
    return itertools.pairwise([0, *borders.tolist(), len(places)])


def leaf(root: Root, load: LoadNode, place: int) -> Node | None:
    """The leaf node above a chunk; None where all it could hold is zero."""
    if place >= FANOUT**root.levels:
        return None
    object_id = root.id
    for level in range(root.levels, 1, -1):
        if object_id == ZERO_ID:
            return None
        slot = place // FANOUT ** (level - 1) % FANOUT
        object_id = bytes(load(object_id)[slot * ID_BYTES : (slot + 1) * ID_BYTES])
    return None if object_id == ZERO_ID else opened(object_id, load)


def leaves(
    root: Root,
    load: LoadNode,
    start: int = 0,
    stop: int | None = None,
    damaged: Callable[[int, int, DamagedError], None] | None = None,
    expect: Callable[[Ids], None] | None = None,
) -> Iterator[tuple[int, Node]]:
    """(first chunk, node) of every leaf node that touches the chunks from start to stop, in order.

    A node that cannot be read ends the walk with its error; with `damaged` given, that is called with the
    first chunk below the node, their number and the error, and the walk goes on behind it. `expect` is told
    of all leaf nodes below a node before the first of them is loaded.
    """
    end = FANOUT**root.levels if stop is None else stop
    todo = [(0, root.levels, root.id)]
    while todo:
        first, level, object_id = todo.pop()
        if object_id == ZERO_ID or first >= end or first + FANOUT**level <= start:
            continue
        try:
            node = opened(object_id, load)
        except DamagedError as error:
            if damaged is None:
                raise
            damaged(first, FANOUT**level, error)
            continue
        if level == 1:
            yield first, node
            continue
        width = FANOUT ** (level - 1)
        low = max(0, (start - first) // width)
        slots = used_slots(node[low : max(low, -(-(end - first) // width))]) + low
        if expect is not None and level == 2:
            expect(ids_of(node[slots].tobytes()))
        todo += [(first + slot * width, level - 1, node[slot].tobytes()) for slot in slots[::-1].tolist()]


def leaves_many(
    root: Root, load: LoadNodes, start: int = 0, stop: int | None = None, batch: int = _BATCH
) -> Iterator[tuple[int, Node]]:
    """The same as `leaves`, for nodes that are far away: many are asked for at once."""
    for first, level, node in _nodes_many(root, load, start, stop, batch):
        if level == 1:
            yield first, node


def loaded(root: Root, load: LoadNodes, limit: int) -> None:
    """Ask for the nodes of a tree, from the top down, for so many at the most: they are kept where they come from."""
    count, part = 0, [(0, root.levels, root.id)]
    while part and part[0][2] != ZERO_ID and count + len(part) <= limit:
        count += len(part)
        part = _below(part, load([object_id for _, _, object_id in part]), 0, FANOUT**root.levels)


def _nodes_many(
    root: Root, load: LoadNodes, start: int, stop: int | None, batch: int
) -> Iterator[tuple[int, int, Node]]:
    """(first chunk, level, node), the lower ones of each batch in order and before the next batch."""
    end = FANOUT**root.levels if stop is None else stop
    todo = [[(0, root.levels, root.id)]] if root.id != ZERO_ID and end > 0 and FANOUT**root.levels > start else []
    while todo:
        part = todo.pop()
        if len(part) > batch:
            todo.append(part[batch:])
        part = part[:batch]
        plains = load([object_id for _, _, object_id in part])
        for (first, level, _), plain in zip(part, plains, strict=True):
            yield first, level, np.frombuffer(plain, dtype=np.uint8).reshape(FANOUT, ID_BYTES)
        below = _below(part, plains, start, end)
        if below:
            todo.append(below)


def _below(part: list[_Place], plains: list[Buffer], start: int, end: int) -> list[_Place]:
    """What stands below nodes of one level and touches the chunks from start to end."""
    found: list[_Place] = []
    for (first, level, _), plain in zip(part, plains, strict=True):
        if level == 1:
            return []
        node = np.frombuffer(plain, dtype=np.uint8).reshape(FANOUT, ID_BYTES)
        width = FANOUT ** (level - 1)
        for slot in used_slots(node).tolist():
            at = first + slot * width
            if at < end and at + width > start:
                found.append((at, level - 1, node[slot].tobytes()))
    return found


def differing(
    load: LoadNode, a: Root, b: Root, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, tuple[Node, Node]]]:
    """(first chunk, leaf nodes of a and b) wherever the leaf nodes of two trees differ, in order.

    Costs what differs: a subtree that is the same node in both is skipped whole. `start` and `stop` bound
    the walk to the leaf nodes that touch those chunks, so that it can be taken up again anywhere.
    """
    end = FANOUT ** max(a.levels, b.levels) if stop is None else stop
    yield from _differing(load, a, b, 0, start, end)


def _differing(
    load: LoadNode, a: Root, b: Root, first: int, start: int, stop: int
) -> Iterator[tuple[int, tuple[Node, Node]]]:
    if a.id == b.id and (a.levels == b.levels or a.id == ZERO_ID):
        return
    level = max(a.levels, b.levels)
    if first >= stop or first + FANOUT**level <= start:
        return
    if a.levels == b.levels == 1:
        yield first, (opened(a.id, load), opened(b.id, load))
        return
    # A tree of fewer levels stands in slot 0 of the other's.
    children_a = _children(a, level, load)
    children_b = _children(b, level, load)
    for slot in range(FANOUT):
        child_a, child_b = children_a(slot), children_b(slot)
        if child_a.id != ZERO_ID or child_b.id != ZERO_ID:
            yield from _differing(load, child_a, child_b, first + slot * FANOUT ** (level - 1), start, stop)


def _children(root: Root, level: int, load: LoadNode) -> Callable[[int], Root]:
    if root.levels < level:
        return lambda slot: root if slot == 0 else Root(ZERO_ID, 1)
    joined = opened(root.id, load).tobytes()
    return lambda slot: Root(joined[slot * ID_BYTES : (slot + 1) * ID_BYTES], level - 1)


def used_slots(node: Node) -> npt.NDArray[np.int64]:
    """Numbers of the slots of a node that are not zero."""
    return np.flatnonzero(node.view(np.uint64).any(axis=1))
