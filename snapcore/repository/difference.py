"""Where snapshots differ and where they are not zero, from their trees alone, in this repository or across two."""

from __future__ import annotations

import numpy as np

from snapcore import extents
from snapcore.errors import DamagedError
from snapcore.extents import Extents
from snapcore.persist import Buffer
from snapcore.repository import tree
from snapcore.repository.context import Context
from snapcore.repository.manifest import Manifest


def differing(one: Context, a: Manifest, two: Context, b: Manifest, start: int, stop: int) -> Extents:
    """Where a snapshot of `one` differs from a snapshot of `two`, from byte `start` to `stop`, on chunk borders.

    Both name bytes by the same keys, so a node of the same id is the same in both, and either will do.
    """
    size = one.config.chunk_bytes
    objects = one.objects()
    others = objects if two is one else two.objects()

    def load(node_id: bytes) -> Buffer:
        if others is objects:
            return objects.node(node_id)
        try:
            return objects.node(node_id)
        except DamagedError:
            return others.node(node_id)

    parts = [np.empty(0, dtype=np.int64)]
    for first, (leaf_a, leaf_b) in tree.differing(load, a.tree, b.tree, start // size, -(-stop // size)):
        parts.append(first + np.flatnonzero((leaf_a != leaf_b).any(axis=1)))
    found = extents.from_blocks(np.concatenate(parts), size, max(a.size_bytes, b.size_bytes))
    return extents.clipped(found, start, stop)


def written(context: Context, snapshot: Manifest, start: int, stop: int) -> Extents:
    """Where a snapshot is not zero, from byte `start` to `stop`, on chunk borders."""
    size = context.config.chunk_bytes
    parts = [np.empty(0, dtype=np.int64)]
    for first, leaf in tree.leaves(snapshot.tree, context.objects().node, start // size, -(-stop // size)):
        parts.append(first + tree.used_slots(leaf))
    return extents.clipped(extents.from_blocks(np.concatenate(parts), size, snapshot.size_bytes), start, stop)
