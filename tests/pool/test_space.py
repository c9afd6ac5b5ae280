"""Space: what no version holds any more is freed, whatever came in between; limits refuse writes and nothing else."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from snapcore.errors import NotFoundError, OutOfSpaceError, UsageError
from snapcore.persist import Buffer
from snapcore.pool import Disk, Pool
from tests.support.mediums import Unsynced
from tests.support.pools import BLOCK_BYTES, MIB, SMALL_LOG_BYTES, check_space

BLOCK = BLOCK_BYTES


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool.create(tmp_path / "pool", log_bytes=SMALL_LOG_BYTES, background=False) as made:
        yield made


def _filled(pool: Pool, name: str, blocks: int, size_bytes: int = MIB) -> Disk:
    disk = pool.create_disk(name, size_bytes)
    disk.pwrite(b"a" * blocks * BLOCK, 0)
    return disk


def _blocks(pool: Pool) -> int:
    pool.checkpoint()
    return pool.usage().allocated_bytes // BLOCK


def test_what_a_clone_and_its_source_both_overwrote_is_freed(pool: Pool) -> None:
    """No snapshot ever showed it: only the ghost that the clone left between them held it."""
    disk = _filled(pool, "disk", 3)
    clone = disk.clone("clone")
    assert _blocks(pool) == 3
    clone.pwrite(b"b" * BLOCK, BLOCK)
    assert _blocks(pool) == 4
    disk.pwrite(b"c" * BLOCK, BLOCK)
    check_space(pool, 4)


def test_what_was_overwritten_before_a_cut_is_freed_after_it(pool: Pool) -> None:
    """The cut puts a snapshot between the disk and the ghost that the disk took a block away from."""
    disk = _filled(pool, "disk", 1)
    clone = disk.clone("clone")
    disk.pwrite(b"b" * BLOCK, 0)
    clone.pwrite(b"c" * BLOCK, 0)
    pool.snapshot_group([disk, clone])
    check_space(pool, 2)


def test_what_was_overwritten_before_a_checkpoint_is_freed_after_a_crash(pool: Pool) -> None:
    """A checkpoint that a full log calls for does not sweep, and a crash right behind it leaves an empty log."""
    disk = _filled(pool, "disk", 1)
    clone = disk.clone("clone")
    disk.pwrite(b"b" * BLOCK, 0)
    clone.pwrite(b"c" * BLOCK, 0)
    pool._engine.checkpoint()
    pool._engine.abandon()
    with Pool.open(pool.path, background=False) as again:
        check_space(again, 2)
    pool._closed = True


def test_a_block_that_was_freed_and_used_again_since_the_checkpoint_outlives_a_crash(tmp_path: Path) -> None:
    """The log that is done again frees it, and uses it, perhaps more than once: it is not punched out after that."""
    path = tmp_path / "small"
    pool = Pool.create(path, limit_bytes=4 * MIB, background=False)
    disk = pool.create_disk("disk", 12 * MIB)
    rounds = [bytes([65 + step]) * 900 * BLOCK for step in range(9)]
    for step, data in enumerate(rounds):
        disk.pwrite(data, step % 3 * 4 * MIB)
        disk.flush()
        if data != rounds[-1]:
            disk.discard(step % 3 * 4 * MIB, 4 * MIB)
    checkpoints, end = pool._engine.checkpoints, pool._engine.core.end_blocks
    pool._engine.abandon()
    assert checkpoints == 0 and end < 4 * 1024, "blocks were used again, and no checkpoint came in between"
    with Pool.open(path, background=False) as again:
        check_space(again, 900)
        assert again.open_disk("disk").pread(900 * BLOCK, 2 * 4 * MIB) == rounds[-1]


def test_blocks_of_a_deleted_snapshot_are_free_only_when_nobody_can_read_it(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its deletion is not durable no sweep takes it, and when one may, its readers are gone."""
    disk = _filled(pool, "disk", 1)
    snapshot = disk.snapshot()
    disk.pwrite(b"b" * BLOCK, 0)
    engine = pool._engine
    commit, sweep = engine.commit, engine.sweep
    seen: list[str] = []

    def checked_commit(what: str) -> None:
        assert snapshot.pread(1, 0) == b"a"
        sweep()
        assert snapshot.pread(1, 0) == b"a", "deleted, but not durably"
        commit(what)
        sweep()
        assert snapshot.pread(1, 0) == b"a", "durable, but still read"
        seen.append("commit")

    def checked_sweep() -> None:
        with pytest.raises(NotFoundError):
            snapshot.pread(1, 0)
        seen.append("sweep")
        sweep()

    monkeypatch.setattr(engine, "commit", checked_commit)
    monkeypatch.setattr(engine, "sweep", checked_sweep)
    snapshot.delete()
    monkeypatch.undo()
    assert seen == ["commit", "sweep"]
    check_space(pool, 1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_deleting_all_snapshots_leaves_what_the_disk_has(pool: Pool, order: tuple[int, ...]) -> None:
    disk = _filled(pool, "disk", 8)
    taken = []
    for step in range(3):
        taken.append(disk.snapshot())
        disk.pwrite(b"d" * (step + 1) * BLOCK, step * BLOCK)
    for place in order:
        pool.delete_snapshot(taken[place])
        check_space(pool)
    check_space(pool, 8)


def test_deleting_everything_leaves_nothing(pool: Pool) -> None:
    disk = _filled(pool, "disk", 8)
    snapshot = disk.snapshot()
    clone = disk.clone("clone")
    clone.pwrite(b"b" * BLOCK, 0)
    disk.delete()
    clone.delete()
    assert _blocks(pool) == 8
    snapshot.delete()
    check_space(pool, 0)


def test_rolling_back_frees_what_was_written_since(pool: Pool) -> None:
    disk = _filled(pool, "disk", 2)
    snapshot = disk.snapshot()
    disk.pwrite(b"b" * 20 * BLOCK, 0)
    assert _blocks(pool) == 22
    disk.rollback(snapshot)
    check_space(pool, 2)


def test_discarding_gives_blocks_back_and_punches_them_out_of_the_data_file(pool: Pool) -> None:
    disk = _filled(pool, "disk", 200)
    disk.flush()
    data = Path(pool.path, "data")
    before = data.stat().st_blocks
    disk.discard(0, 100 * BLOCK)
    check_space(pool, 100)
    assert data.stat().st_blocks <= before - 100 * BLOCK // 512


def test_zeros_for_parts_of_blocks_keep_the_rest(pool: Pool) -> None:
    disk = _filled(pool, "disk", 3)
    disk.write_zeroes(100, 2 * BLOCK)
    assert disk.pread(3 * BLOCK, 0) == b"a" * 100 + bytes(2 * BLOCK) + b"a" * (BLOCK - 100)
    check_space(pool, 2)


def test_discarding_the_last_short_block_frees_it(pool: Pool) -> None:
    disk = pool.create_disk("disk", BLOCK + 10)
    disk.pwrite(b"a" * (BLOCK + 10), 0)
    disk.discard(BLOCK, 10)
    check_space(pool, 1)


def test_freed_space_is_used_again(pool: Pool) -> None:
    """The data file does not grow for ever."""
    disk = _filled(pool, "disk", 256)
    lengths = set()
    for _ in range(20):
        disk.discard(0, MIB)
        pool.checkpoint()
        disk.pwrite(b"b" * MIB, 0)
        pool.checkpoint()
        lengths.add(pool.usage().data_bytes)
    assert max(lengths) <= 4 * MIB


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Pool]:
    with Pool.create(tmp_path / "small", limit_bytes=MIB, log_bytes=SMALL_LOG_BYTES, background=False) as made:
        yield made


def test_a_write_beyond_the_limit_is_refused_and_nothing_else_is_touched(small: Pool) -> None:
    disk = _filled(small, "disk", 250, 4 * MIB)
    with pytest.raises(OutOfSpaceError, match=r"'disk'.*limit of 1048576 bytes"):
        disk.pwrite(b"b" * 9 * BLOCK, 248 * BLOCK)
    assert disk.pread(2 * BLOCK, 248 * BLOCK) == b"a" * 2 * BLOCK
    disk.pwrite(b"c" * 6 * BLOCK, 250 * BLOCK)
    disk.pwrite(b"d" * 256 * BLOCK, 0)
    assert small.usage().free_bytes == 0


def test_reads_cuts_and_deletions_go_on_in_a_full_pool_and_writes_once_there_is_room(small: Pool) -> None:
    disk = _filled(small, "disk", 256, 4 * MIB)
    snapshot = disk.snapshot()
    with pytest.raises(OutOfSpaceError):
        disk.pwrite(b"b", 0)
    assert disk.pread(MIB, 0) == b"a" * MIB
    snapshot.delete()
    disk.pwrite(b"b", 0)
    second = disk.snapshot()
    with pytest.raises(OutOfSpaceError):
        disk.pwrite(b"c", 0)
    disk.discard(0, MIB)
    second.delete()
    disk.pwrite(b"c" * MIB, MIB)


def test_what_only_a_ghost_holds_makes_room_when_a_write_needs_it(small: Pool) -> None:
    """Blocks that a clone and its source both left are free for the asking, without a checkpoint in between."""
    disk = _filled(small, "disk", 80, MIB)
    clone = disk.clone("clone")
    disk.pwrite(b"b" * 80 * BLOCK, 0)
    clone.pwrite(b"c" * 80 * BLOCK, 0)
    disk.pwrite(b"d" * 96 * BLOCK, 80 * BLOCK)
    assert (disk.pread(1, 0), clone.pread(1, 0)) == (b"b", b"c")


def test_a_limit_can_be_raised_lowered_and_is_kept(small: Pool) -> None:
    disk = _filled(small, "disk", 256, 4 * MIB)
    small.limit_bytes = 2 * MIB
    disk.pwrite(b"b" * MIB, MIB)
    small.limit_bytes = MIB
    with pytest.raises(OutOfSpaceError):
        disk.pwrite(b"c" * BLOCK, 2 * MIB)
    assert small.usage().free_bytes == 0
    disk.pwrite(b"c" * BLOCK, 0)
    small.close()
    with Pool.open(small.path, background=False) as again:
        assert again.limit_bytes == again.usage().limit_bytes == MIB
        again.limit_bytes = 0
        again.open_disk("disk").pwrite(b"c" * BLOCK, 2 * MIB)
        assert again.usage().free_bytes is None
        with pytest.raises(UsageError, match="negative"):
            again.limit_bytes = -1


def test_a_pool_that_nobody_closed_is_collected_without_harm(tmp_path: Path) -> None:
    """In cycles the collector takes things apart in any order."""
    code = (
        "import gc, sys\n"
        "from snapcore.pool import Pool\n"
        "pool = Pool.create(sys.argv[1], background=False)\n"
        "disk = pool.create_disk('disk', 1 << 20)\n"
        "pool.mine = [pool, disk.snapshot(), disk.clone('clone')]\n"
        "del pool, disk\n"
        "gc.collect()\n"
        "print('well')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path / "pool")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "well\n", "")


class _Zeros(Unsynced):
    """Notes the writes of nothing but zeros to the data, and fails them when asked to."""

    def __init__(self, pool: Path) -> None:
        self.data = pool / "data"
        self.lengths: list[int] = []
        self.code = 0

    def write_at(self, descriptor: int, buffers: Sequence[Buffer], offset_bytes: int) -> int:
        joined = b"".join(buffers)
        if not any(joined) and os.path.samestat(os.fstat(descriptor), os.stat(self.data)):
            if self.code:
                raise OSError(self.code, os.strerror(self.code))
            self.lengths.append(len(joined) // BLOCK)
        return super().write_at(descriptor, buffers, offset_bytes)


READY_BLOCKS = 64


def test_small_writes_get_blocks_that_were_written_before(tmp_path: Path) -> None:
    """Then the host need not allocate for each. None of them is taken for used, and none is kept for long."""
    medium = _Zeros(tmp_path / "pool")
    with Pool.create(tmp_path / "pool", background=False, medium=medium) as pool:
        disk = _filled(pool, "disk", 256)
        disk.snapshot()
        core = pool._engine.core
        disk.pwrite(b"b" * 17 * BLOCK, 0)
        disk.pwrite(b"b" * BLOCK, 100 * BLOCK)
        assert medium.lengths == [], "a long one, and a first small one"
        for block in range(20, 20 + READY_BLOCKS):
            disk.pwrite(b"c" * BLOCK, block * BLOCK)
            disk.flush()
        assert medium.lengths == [READY_BLOCKS]
        assert core.held_blocks == 1, "one of these writes came before they were ready"
        disk.pwrite(b"d" * 2 * BLOCK, 94 * BLOCK)
        disk.flush()
        disk.pwrite(b"d" * BLOCK, 96 * BLOCK)
        assert medium.lengths == [READY_BLOCKS] * 2
        check_space(pool, 256 + 18 + READY_BLOCKS + 3)
        pool.close()
        held = os.stat(tmp_path / "pool" / "data").st_blocks * 512 // BLOCK
        assert held == 256 + 18 + READY_BLOCKS + 3, "what was ready is punched out"


def test_blocks_that_were_made_ready_are_there_for_who_needs_them(tmp_path: Path) -> None:
    """The limit is reached by what is written and not by what might be."""
    with Pool.create(tmp_path / "pool", background=False, limit_bytes=400 * BLOCK) as pool:
        disk, other = _filled(pool, "disk", 200), pool.create_disk("other", MIB)
        disk.snapshot()
        for block in range(5):
            disk.pwrite(b"b" * BLOCK, block * BLOCK)
            disk.flush()
        assert pool.usage().held_bytes > 40 * BLOCK
        other.pwrite(b"o" * 195 * BLOCK, 0)
        with pytest.raises(OutOfSpaceError):
            disk.pwrite(b"c" * BLOCK, 9 * BLOCK)
        assert disk.pread(BLOCK, 9 * BLOCK) == b"a" * BLOCK
        check_space(pool, 400)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_is_done_where_nothing_can_be_made_ready(tmp_path: Path, code: int) -> None:
    medium = _Zeros(tmp_path / "pool")
    with Pool.create(tmp_path / "pool", background=False, medium=medium) as pool:
        disk = _filled(pool, "disk", 200)
        disk.snapshot()
        medium.code = code
        for block in range(20):
            disk.pwrite(b"b" * BLOCK, block * BLOCK)
            disk.flush()
        assert disk.pread(20 * BLOCK, 0) == b"b" * 20 * BLOCK
        check_space(pool, 220)


def test_a_disk_that_goes_leaves_nothing_that_was_made_ready(tmp_path: Path) -> None:
    with Pool.create(tmp_path / "pool", background=False) as pool:
        disk = _filled(pool, "disk", 200)
        disk.snapshot()
        for block in range(5):
            disk.pwrite(b"b" * BLOCK, block * BLOCK)
            disk.flush()
        pool.delete_disk("disk")
        del disk
        check_space(pool, 200)
