"""What tests of the pool share: a folder that costs no disk time, and the count of what a pool's trees reach."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snapcore import space
from snapcore.pool import Pool

BLOCK_BYTES = 4096
LEAF_BLOCKS = 128
INNER_BLOCKS = LEAF_BLOCKS**2
MIB = 1 << 20
SMALL_LOG_BYTES = 65536
_SLOT_MASK = (1 << 48) - 1
# What is below stands for absent, zero and lost; no page and no block lies there.
_FIRST_REFERENCE = 3


def quick_folder() -> Path:
    """A folder in memory where there is one: what is asked here is not whether syncs work."""
    memory = "/dev/shm"
    return Path(tempfile.mkdtemp(prefix="snapcore-pool-", dir=memory if os.access(memory, os.W_OK) else None))


@dataclass(frozen=True)
class Reached:
    """Bitmaps of blocks and slots that the trees of all versions reach, and of those that the pool takes for used."""

    blocks: np.ndarray
    used_blocks: np.ndarray
    slots: np.ndarray
    used_slots: np.ndarray


def reached(pool: Pool) -> Reached:
    """Walk every tree of a pool at rest. Fails when a tree cannot be walked or two versions disagree about a place."""
    engine = pool._engine
    core = engine.core
    pages = core.page_file
    used_blocks = space.used_bitmap(core)
    limit = core.end_blocks
    slots = np.zeros((pages.slots + 63) // 64, dtype=np.uint64)
    blocks = np.zeros(len(used_blocks), dtype=np.uint64)
    owners = np.zeros(limit + pages.slots, dtype=np.uint32)
    with engine.reading() as catalog:
        for version in catalog.versions:
            found = pages.mark(engine.versions.root(version), catalog.family(version), slots, blocks, owners, limit)
            assert not len(found), f"version {version}: {found.tolist()}"
    # The leaves of the tree of space refer to pages, which are no blocks of the data file: walked apart.
    nothing = np.zeros(0, dtype=np.uint64)
    pages.mark(core.space_root, 0, slots, nothing, np.zeros(pages.slots, dtype=np.uint32), 0)
    pieces = pages.lookup(core.space_root, 0, len(used_blocks) // LEAF_BLOCKS + 1)
    for ref in [*pieces[pieces >= _FIRST_REFERENCE].tolist(), *engine.checkpointer.catalog_refs]:
        slots[(ref & _SLOT_MASK) >> 6] |= np.uint64(1 << (ref & 63))
    return Reached(blocks, used_blocks, slots, pages.used_slots())


def check_space(pool: Pool, allocated_blocks: int | None = None) -> None:
    """After a checkpoint nothing is used but what some version reaches, and nothing waits to be freed."""
    pool.checkpoint()
    core = pool._engine.core
    assert core.held_blocks == 0
    found = reached(pool)
    assert np.array_equal(found.blocks, found.used_blocks)
    found.slots[0] |= np.uint64((1 << _FIRST_REFERENCE) - 1)
    assert np.array_equal(found.slots, found.used_slots)
    assert core.used_blocks == int(np.bitwise_count(found.blocks).sum())
    if allocated_blocks is not None:
        assert core.used_blocks == allocated_blocks
