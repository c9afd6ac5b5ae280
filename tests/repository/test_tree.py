"""The tree is a dict from chunk numbers to ids: every edit and walk is compared with one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snapcore.errors import DamagedError
from snapcore.persist import Buffer
from snapcore.repository import tree
from snapcore.repository.domain import PLAIN, ZERO_ID
from snapcore.repository.tree import EMPTY, FANOUT, NODE_BYTES, Node, Root, TreeWriter

Model = dict[int, bytes]
Edit = tuple[int, int, list[int] | None]

MOST_LEVELS = 5


def id_of(number: int) -> bytes:
    """The id that stands for a small number; zero for zero."""
    return bytes(24) + number.to_bytes(8, "big")


def as_node(ids: list[bytes]) -> Node:
    """Ids as the array that the writer takes."""
    return np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(-1, 32)


@dataclass
class Nodes:
    """Nodes by id; counts what is loaded, and lists (id, id of the node that stood there) of what is stored."""

    held: dict[bytes, bytes] = field(default_factory=dict)
    loads: int = 0
    stored: list[tuple[bytes, bytes]] = field(default_factory=list)

    def load(self, object_id: bytes) -> Buffer:
        self.loads += 1
        if object_id not in self.held:
            raise DamagedError(f"no node {object_id.hex()}")
        return self.held[object_id]

    def store(self, data: Buffer, old_id: bytes) -> bytes:
        object_id = PLAIN.node_id(data)
        assert len(data) == NODE_BYTES and any(data)
        self.held[object_id] = bytes(data)
        self.stored.append((object_id, old_id))
        return object_id

    def places(self, root: Root) -> dict[tuple[int, int], bytes]:
        """(level, number among its level) → id of every node of a tree."""
        found: dict[tuple[int, int], bytes] = {}
        todo = [(root.levels, 0, root.id)] if root.id != ZERO_ID else []
        while todo:
            level, number, object_id = todo.pop()
            found[level, number] = object_id
            if level > 1:
                ids = np.frombuffer(self.held[object_id], dtype="V32")
                todo += [
                    (level - 1, number * FANOUT + slot, ids[slot].tobytes())
                    for slot in range(FANOUT)
                    if ids[slot].tobytes() != ZERO_ID
                ]
        return found


def root_of(model: Model, levels: int) -> bytes:
    """The root id by the words of the format: a node is the ids of its 128 children."""
    ids = {number: object_id for number, object_id in model.items() if object_id != ZERO_ID}
    for _ in range(levels):
        groups: dict[int, list[bytes]] = {}
        for number, object_id in ids.items():
            groups.setdefault(number // FANOUT, [ZERO_ID] * FANOUT)[number % FANOUT] = object_id
        ids = {number: PLAIN.node_id(b"".join(slots)) for number, slots in groups.items()}
    return ids.get(0, ZERO_ID)


def held(nodes: Nodes, root: Root) -> Model:
    """All chunks that are not zero, by walking the leaves."""
    found: Model = {}
    for first, node in tree.leaves(root, nodes.load):
        for slot in tree.used_slots(node).tolist():
            found[first + slot] = node[slot].tobytes()
    return found


def built(nodes: Nodes, model: Model, levels: int) -> Root:
    """The tree of a model."""
    writer = TreeWriter(Root(ZERO_ID, levels), nodes.load, nodes.store)
    for number in sorted(model):
        writer.replace(np.array([number]), as_node([model[number]]))
    return writer.finish()


@st.composite
def places(draw: st.DrawFn, levels: int) -> int:
    """A chunk number, out of few slots of every level, so that rounds of edits meet in the same nodes."""
    number = 0
    for _ in range(levels):
        number = number * FANOUT + draw(st.sampled_from([0, 0, 1, 2, 126, 127]))
    return min(max(number + draw(st.sampled_from([-2, -1, 0, 0, 1, 70])), 0), FANOUT**levels)


@st.composite
def edits(draw: st.DrawFn, levels: int) -> list[Edit]:
    """Ascending edits that do not overlap: (start, stop, ids), or None for the ids where the range is cleared."""
    cuts = sorted(draw(st.sets(places(levels), max_size=16)))
    made: list[Edit] = []
    for start, stop in itertools.pairwise(cuts):
        what = draw(st.sampled_from(["replace", "replace", "clear", "leave"]))
        if what == "clear":
            made.append((start, stop, None))
        elif what == "replace":
            pattern = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
            length = min(stop - start, draw(st.integers(1, 300)))
            made.append((start, start + length, (pattern * length)[:length]))
    return made


def apply_to_model(model: Model, made: list[Edit]) -> Model:
    """What the edits make of a dict."""
    new = dict(model)
    for start, stop, ids in made:
        for number in [number for number in new if start <= number < stop]:
            del new[number]
        for number, value in enumerate(ids or (), start):
            if value:
                new[number] = id_of(value)
    return new


def apply_to_tree(nodes: Nodes, root: Root, made: list[Edit]) -> Root:
    """What the edits make of a tree."""
    writer = TreeWriter(root, nodes.load, nodes.store)
    assert writer.levels == root.levels
    for start, stop, ids in made:
        if ids is None:
            writer.clear(start, stop)
        else:
            writer.replace(np.arange(start, start + len(ids)), as_node([id_of(value) for value in ids]))
    return writer.finish()


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[list[Edit]]]:
    """Levels, and several rounds of edits."""
    levels = draw(st.integers(1, MOST_LEVELS))
    return levels, draw(st.lists(edits(levels), min_size=1, max_size=4))


@given(histories())
@example((3, [[(0, 300, [1] * 300)], [(0, 128**3, None)]]))
@example((2, [[(0, 300, [1] * 300)], [(0, 70, None), (70, 71, [2]), (100, 290, None)]]))
def test_after_any_edits_the_tree_is_that_of_the_dict(history: tuple[int, list[list[Edit]]]) -> None:
    levels, rounds = history
    nodes, model, root = Nodes(), {}, Root(ZERO_ID, levels)
    for made in rounds:
        model, old = apply_to_model(model, made), root
        nodes.stored.clear()
        root = apply_to_tree(nodes, root, made)
        assert root == Root(root_of(model, levels), levels)
        assert held(nodes, root) == model
        # Every changed node is stored once, and knows what stood in its place; nothing else is.
        before, after = nodes.places(old), nodes.places(root)
        changed = [
            (object_id, before.get(place, ZERO_ID))
            for place, object_id in after.items()
            if before.get(place) != object_id
        ]
        assert sorted(nodes.stored) == sorted(changed)


@given(st.integers(1, MOST_LEVELS), st.data())
def test_a_cleared_range_ends_exactly_between_two_chunks(levels: int, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(places(levels), min_size=1, max_size=12, unique=True))
    model = {number: id_of(1) for number in numbers if number < FANOUT**levels}
    # The borders lie at chunks that are there, or right behind one.
    start, stop = sorted(data.draw(st.sampled_from(numbers)) + data.draw(st.integers(0, 1)) for _ in "ab")
    nodes = Nodes()
    cleared = apply_to_tree(nodes, built(nodes, model, levels), [(start, min(stop, FANOUT**levels), None)])
    assert held(nodes, cleared) == {number: found for number, found in model.items() if not start <= number < stop}


@given(st.integers(1, MOST_LEVELS).flatmap(lambda levels: st.tuples(st.just(levels), edits(levels))))
def test_ids_that_are_there_already_change_and_store_nothing(case: tuple[int, list[Edit]]) -> None:
    levels, made = case
    nodes = Nodes()
    root = apply_to_tree(nodes, Root(ZERO_ID, levels), made)
    nodes.stored.clear()
    assert apply_to_tree(nodes, root, made) == root
    assert nodes.stored == []


@st.composite
def pair_of_models(draw: st.DrawFn) -> tuple[int, int, Model, Model]:
    """Levels and dicts of two trees that have much in common."""
    levels_a, levels_b = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    model_a = apply_to_model({}, draw(edits(levels_a)))
    shared = {number: found for number, found in model_a.items() if number < FANOUT**levels_b}
    return levels_a, levels_b, model_a, apply_to_model(shared, draw(edits(levels_b)))


def bounds(draw: st.DataObject, levels: int) -> tuple[int, int | None]:
    """Where a walk begins and ends."""
    return draw.draw(places(levels)), draw.draw(st.one_of(st.none(), places(levels)))


@given(pair_of_models(), st.data())
def test_differing_names_the_leaves_that_differ_and_no_others(
    pair: tuple[int, int, Model, Model], data: st.DataObject
) -> None:
    levels_a, levels_b, model_a, model_b = pair
    levels = max(levels_a, levels_b)
    nodes = Nodes()
    a, b = built(nodes, model_a, levels_a), built(nodes, model_b, levels_b)
    start, stop = bounds(data, levels)
    end = FANOUT**levels if stop is None else stop
    numbers = {number for number in model_a.keys() | model_b.keys() if model_a.get(number) != model_b.get(number)}
    firsts = sorted({number // FANOUT * FANOUT for number in numbers})
    wanted = [first for first in firsts if first < end and first + FANOUT > start]
    found = list(tree.differing(nodes.load, a, b, start, stop))
    assert [first for first, _ in found] == wanted
    for first, leaves in found:
        for leaf, model in zip(leaves, (model_a, model_b), strict=True):
            assert [leaf[slot].tobytes() for slot in range(FANOUT)] == [
                model.get(first + slot, ZERO_ID) for slot in range(FANOUT)
            ]


@given(pair_of_models(), st.data())
def test_a_walk_with_bounds_yields_the_leaves_that_touch_them(
    pair: tuple[int, int, Model, Model], data: st.DataObject
) -> None:
    levels, _, model, _ = pair
    nodes = Nodes()
    root = built(nodes, model, levels)
    start, stop = bounds(data, levels)
    end = FANOUT**levels if stop is None else stop
    firsts = sorted({number // FANOUT * FANOUT for number in model})
    wanted = [first for first in firsts if first < end and first + FANOUT > start]
    assert [first for first, _ in tree.leaves(root, nodes.load, start, stop)] == wanted


@given(pair_of_models())
def test_a_tree_grows_and_shrinks_to_any_height(pair: tuple[int, int, Model, Model]) -> None:
    levels, fitted_levels, model, _ = pair
    nodes = Nodes()
    root = built(nodes, model, levels)
    fitted = tree.fitted(root, fitted_levels, nodes.load, nodes.store)
    kept = {number: found for number, found in model.items() if number < FANOUT**fitted_levels}
    assert fitted == Root(root_of(kept, fitted_levels), fitted_levels)
    assert held(nodes, fitted) == kept


def _scattered(levels: int) -> Model:
    """Chunks all over a tree, so that it has hundreds of nodes."""
    step = FANOUT**levels // 150
    return {number * step + 5: id_of(number + 1) for number in range(150)}


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
@pytest.mark.parametrize("width", [1, 2])
def test_a_small_change_loads_and_stores_a_path_whatever_the_size_of_the_tree(levels: int, width: int) -> None:
    nodes = Nodes()
    old = built(nodes, _scattered(levels), levels)
    assert len(nodes.places(old)) > 100
    nodes.loads, nodes.stored = 0, []
    # Two chunks across the middle of the tree are two whole paths.
    new = apply_to_tree(nodes, old, [(FANOUT**levels // 2 - 1, FANOUT**levels // 2 - 1 + width, [1] * width)])
    assert nodes.loads <= width * levels and len(nodes.stored) <= width * levels
    nodes.loads = 0
    assert len(list(tree.differing(nodes.load, old, new))) == width
    assert nodes.loads <= 2 * width * levels


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
def test_clearing_a_long_range_loads_its_edges_only(levels: int) -> None:
    nodes = Nodes()
    old = built(nodes, _scattered(levels), levels)
    nodes.loads, nodes.stored = 0, []
    apply_to_tree(nodes, old, [(1, FANOUT**levels - 1, None)])
    assert nodes.loads <= 2 * levels and len(nodes.stored) <= 2 * levels


@given(pair_of_models())
def test_trees_that_are_the_same_are_not_looked_into(pair: tuple[int, int, Model, Model]) -> None:
    levels, _, model, _ = pair
    nodes = Nodes()
    root = built(nodes, model, levels)
    nodes.loads = 0
    assert list(tree.differing(nodes.load, root, root)) == [] and nodes.loads == 0


def _lost(nodes: Nodes, root: Root) -> Iterator[tuple[int, int]]:
    """Every node of a tree in turn is lost: (first chunk, number of chunks) below it."""
    for (level, number), object_id in nodes.places(root).items():
        node = nodes.held.pop(object_id)
        yield number * FANOUT**level, FANOUT**level
        nodes.held[object_id] = node


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_node_that_cannot_be_read_ends_a_walk_or_is_told_and_skipped(levels: int) -> None:
    nodes = Nodes()
    model = {number * FANOUT**levels // 9: id_of(number + 1) for number in range(9)}
    root = built(nodes, model, levels)
    for first, count in _lost(nodes, root):
        with pytest.raises(DamagedError, match="no node"):
            list(tree.leaves(root, nodes.load))
        told: list[tuple[int, int]] = []
        walk = tree.leaves(
            root, nodes.load, damaged=lambda start, length, error, told=told: told.append((start, length))
        )
        kept = {start + slot: node[slot].tobytes() for start, node in walk for slot in tree.used_slots(node).tolist()}
        assert told == [(first, count)]
        assert kept == {number: found for number, found in model.items() if not first <= number < first + count}


@given(pair_of_models())
def test_a_single_leaf_is_found_by_any_of_its_places(pair: tuple[int, int, Model, Model]) -> None:
    levels, _, model, _ = pair
    nodes = Nodes()
    root = built(nodes, model, levels)
    for number in [*model, 0, FANOUT**levels - 1]:
        nodes.loads = 0
        leaf = tree.leaf(root, nodes.load, number)
        found = ZERO_ID if leaf is None else leaf[number % FANOUT].tobytes()
        assert found == model.get(number, ZERO_ID) and nodes.loads <= levels


def test_as_many_levels_as_the_chunks_need() -> None:
    assert [tree.levels_for(chunks) for chunks in (0, 1, 128)] == [1, 1, 1]
    for levels in range(1, 8):
        assert tree.levels_for(FANOUT**levels) == levels
        assert tree.levels_for(FANOUT**levels + 1) == levels + 1


def test_an_empty_tree_has_no_node() -> None:
    nodes = Nodes()
    assert TreeWriter(EMPTY, nodes.load, nodes.store).finish() == EMPTY
    assert tree.fitted(EMPTY, 4, nodes.load, nodes.store) == Root(ZERO_ID, 4)
    assert tree.fitted(Root(ZERO_ID, 4), 2, nodes.load, nodes.store) == Root(ZERO_ID, 2)
    assert list(tree.leaves(Root(ZERO_ID, 4), nodes.load)) == []
    assert (nodes.loads, nodes.stored) == (0, [])


def test_a_node_that_was_opened_cannot_be_written_to() -> None:
    nodes = Nodes()
    root = built(nodes, {3: id_of(1)}, 1)
    ((_, leaf),) = tree.leaves(root, nodes.load)
    with pytest.raises(ValueError, match="read-only"):
        leaf[0] = 1


def test_no_leaf_touches_an_empty_range() -> None:
    nodes = Nodes()
    root = built(nodes, {0: id_of(1)}, 1)
    for start, stop in ((0, 0), (FANOUT, None)):
        assert not [*tree.leaves_many(root, lambda ids: [nodes.load(one) for one in ids], start, stop)]
        assert not [*tree.leaves(root, nodes.load, start, stop)]


@given(st.data(), st.integers(1, 3), st.integers(1, 5))
def test_leaves_asked_for_many_at_once_are_the_same(data: st.DataObject, levels: int, batch: int) -> None:
    numbers = data.draw(st.lists(places(levels), max_size=12))
    nodes = Nodes()
    model = {number: id_of(number + 1) for number in numbers if number < FANOUT**levels}
    root = built(nodes, model, levels)
    start = data.draw(st.integers(0, FANOUT**levels))
    stop = data.draw(st.none() | st.integers(0, FANOUT**levels))
    asked: list[int] = []

    def load(ids: list[bytes]) -> list[Buffer]:
        asked.append(len(ids))
        return [nodes.load(object_id) for object_id in ids]

    found = [(first, node.tolist()) for first, node in tree.leaves_many(root, load, start, stop, batch)]
    assert found == [(first, node.tolist()) for first, node in tree.leaves(root, nodes.load, start, stop)]
    assert all(count <= batch for count in asked)


def test_a_map_is_loaded_from_the_top_down_as_far_as_it_may() -> None:
    nodes = Nodes()
    root = built(nodes, {number * FANOUT: id_of(number + 1) for number in range(200)}, 3)
    for limit, expected in ((0, 0), (1, 1), (3, 3), (202, 3), (203, 203), (999, 203)):
        asked: list[bytes] = []

        def load(ids: list[bytes], asked: list[bytes] = asked) -> list[Buffer]:
            asked += ids
            return [nodes.load(object_id) for object_id in ids]

        tree.loaded(root, load, limit)
        assert len({*asked}) == len(asked) == expected
    tree.loaded(Root(ZERO_ID, 2), load, 10)
