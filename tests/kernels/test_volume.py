"""What writes of volumes leave in the log and in memory. What they read and write has its twin in the model of a whole
pool (tests/pool/test_model.py)."""

from __future__ import annotations

import pytest

from snapcore import log
from snapcore.core import LogFull
from snapcore.volume import Volume
from tests.support.cores import new_core


def test_writes_that_follow_one_another_share_a_record() -> None:
    with new_core() as (core, _):
        volume = Volume(core, root=0, parent=0, size_bytes=1 << 40, version=3, writable=True)
        for block in range(100):
            volume.pwrite(bytes(4096), block * 4096)
        assert core.pending_bytes == 24


def scatter(volume: Volume, written: list[int]) -> None:
    """Write every other block, and list them."""
    for block in range(0, 10**6, 2):
        volume.pwrite(b"x" * 4096, block * 4096)
        written.append(block)


def test_a_write_that_the_log_has_no_room_for_changes_nothing() -> None:
    with new_core(sectors=16) as (core, _):
        volume = Volume(core, root=0, parent=0, size_bytes=1 << 40, version=3, writable=True)
        written: list[int] = []
        with pytest.raises(LogFull):
            scatter(volume, written)
        buffer = bytearray(4096)
        volume.pread_into(buffer, (written[-1] + 2) * 4096)
        assert buffer == bytes(4096)
        # Those that are ready for the next writes are held.
        assert core.used_blocks == len(written) and core.held_blocks < 64
        log.commit(core)
        assert core.log_free_sectors > 0
