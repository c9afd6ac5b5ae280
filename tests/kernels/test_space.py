"""Blocks are held until what freed them is durable, and free when they are reclaimed. That no block is ever
taken twice or lost is seen in whole pools (tests/support/pools.py, `check_space`)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import log, space
from snapcore.core import NOT_CONSISTENT
from snapcore.volume import Volume
from tests.support.cores import new_core
from tests.support.map_file import members


@given(st.sets(st.integers(0, 99), min_size=1), st.sets(st.integers(0, 99)))
def test_what_is_freed_is_held_until_it_is_durable_and_reclaimed(written: set[int], freed: set[int]) -> None:
    with new_core(sectors=1024) as (core, _):
        volume = Volume(core, root=0, parent=0, size_bytes=1 << 20, version=1, writable=True)
        for block in written:
            volume.pwrite(b"x" * 4096, block * 4096)
        blocks = core.page_file.lookup(volume.root, 0, 100)
        assert members(space.used_bitmap(core)) == {int(block) for block in blocks if block}
        gone = blocks[sorted(written & freed)]
        ready = core.held_blocks
        space.free_blocks(core, gone)
        assert members(space.used_bitmap(core)) == {int(block) for block in blocks if block} - set(gone.tolist())
        assert (core.used_blocks, core.held_blocks) == (len(written) - len(gone), ready + len(gone))
        assert not core.reclaimable
        log.commit(core)
        assert core.held_blocks == ready + len(gone) and core.reclaimable == bool(len(gone))
        assert space.reclaim(core) == 0
        assert core.held_blocks == 0 and not core.reclaimable


@pytest.mark.parametrize("block", [5, 2**40, 2**64 - 1])
def test_a_block_that_is_freed_though_it_is_free_stops_the_pool(block: int) -> None:
    with new_core() as (core, _):
        space.free_blocks(core, np.array([block], dtype=np.uint64))
        assert core.failed == NOT_CONSISTENT
        assert (core.used_blocks, core.held_blocks) == (0, 0)
