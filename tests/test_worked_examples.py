"""The worked examples of the service's contract, on a repository and on pool disks. A block is a chunk, a GiB a MiB.

Of example 6 the part about keys, and examples 8 to 10 (policies, billing) speak of parts above both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapcore import Manifest, NotFoundError, Repository
from snapcore.extents import intersection, total_bytes
from snapcore.pool import Disk as PoolDisk
from snapcore.pool import Pool
from snapcore.pool import Snapshot as PoolSnapshot
from snapcore.store import MemoryStore
from tests.support.pools import check_space

BLOCK = 4096
MIB = 1 << 20


class Disk:
    """A disk image and the repository of its snapshots; every block that is written gets content of its own."""

    def __init__(self, folder: Path, size_bytes: int, chunk_bytes: int) -> None:
        self.repository = Repository.create(MemoryStore(), chunk_bytes=chunk_bytes, compression="none")
        self.path = folder / "disk"
        self._folder = folder
        self._random = random.Random(1)
        self.write(0, 0)
        with self.path.open("r+b") as file:
            file.truncate(size_bytes)

    def write(self, offset_bytes: int, length_bytes: int) -> bytes:
        """New content at a place. Returns it."""
        data = self._random.randbytes(length_bytes)
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.seek(offset_bytes)
            file.write(data)
        return data

    def snapshot(self) -> Manifest:
        """Take a snapshot."""
        return self.repository.snapshot(self.path, disk="disk").snapshot

    def restored(self, snapshot: Manifest) -> bytes:
        """All bytes of a snapshot."""
        path = self._folder / f"restored-{snapshot.id}"
        self.repository.restore(snapshot, path)
        return path.read_bytes()

    def stored(self) -> int:
        """Bytes of the disk's blocks that the repository holds."""
        return self.repository.usage().plain_bytes

    def delete(self, snapshot: Manifest) -> int:
        """Delete a snapshot and collect. Returns the bytes of blocks that were freed."""
        before = self.stored()
        expected = self.repository.unique([snapshot]).plain_bytes
        self.repository.delete(snapshot)
        self.repository.collect()
        assert self.repository.verify().ok
        assert before - self.stored() == expected
        return expected


def test_1_deleting_the_middle_snapshot_frees_what_only_it_holds(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 4 * BLOCK, BLOCK)
    a, b, c, d = (disk.write(place * BLOCK, BLOCK) for place in range(4))
    first = disk.snapshot()
    b1, c1 = disk.write(1 * BLOCK, BLOCK), disk.write(2 * BLOCK, BLOCK)
    second = disk.snapshot()
    b2 = disk.write(1 * BLOCK, BLOCK)
    third = disk.snapshot()

    assert disk.restored(first) == a + b + c + d
    assert disk.restored(second) == a + b1 + c1 + d
    assert disk.restored(third) == a + b2 + c1 + d

    assert disk.delete(second) == 1 * BLOCK, "B1 is freed, C1 stays"
    with pytest.raises(NotFoundError):
        disk.repository.find(second.id)
    (tmp_path / f"restored-{third.id}").unlink()
    assert disk.restored(third) == a + b2 + c1 + d
    assert disk.stored() == 6 * BLOCK, "A, B, C, D of the first, B2 and C1 of the third"


def test_2_what_the_next_snapshot_needs_of_a_deleted_one_stays_with_it(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 8 * BLOCK, BLOCK)
    disk.write(0, 6 * BLOCK)
    s0 = disk.snapshot()
    disk.write(4 * BLOCK, 3 * BLOCK)
    s1 = disk.snapshot()
    disk.write(6 * BLOCK, 2 * BLOCK)
    s2 = disk.snapshot()
    assert disk.stored() == (6 + 3 + 2) * BLOCK
    contents = {snapshot.id: disk.restored(snapshot) for snapshot in (s0, s2)}

    assert disk.delete(s1) == 1 * BLOCK, "of the three that it changed two are in the next one too"
    reached = {data[at : at + BLOCK] for data in contents.values() for at in range(0, len(data), BLOCK)}
    assert disk.stored() == len(reached - {bytes(BLOCK)}) * BLOCK
    for snapshot in (s0, s2):
        (tmp_path / f"restored-{snapshot.id}").unlink()
        assert disk.restored(snapshot) == contents[snapshot.id]


def test_3_the_first_snapshot_holds_what_is_written_and_the_next_one_becomes_the_base(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 200 * MIB, MIB)
    disk.write(40 * MIB, 122 * MIB)
    first = disk.snapshot()
    assert first.written_bytes == first.changed_bytes == disk.stored() == 122 * MIB
    disk.write(40 * MIB, 2 * MIB)
    second = disk.snapshot()
    assert second.changed_bytes == 2 * MIB

    assert disk.delete(first) == 2 * MIB
    assert disk.stored() == second.written_bytes == 122 * MIB
    assert disk.restored(second) == disk.path.read_bytes()
    disk.write(0, MIB)
    assert disk.snapshot().parent == second.id


def test_4_a_later_snapshot_holds_what_was_changed_and_added(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 200 * MIB, MIB)
    disk.write(0, 50 * MIB)
    assert disk.snapshot().changed_bytes == 50 * MIB
    assert disk.stored() == 50 * MIB
    disk.write(10 * MIB, 20 * MIB)
    disk.write(100 * MIB, 10 * MIB)
    later = disk.snapshot()
    assert later.changed_bytes == 30 * MIB
    assert later.written_bytes == 60 * MIB
    assert disk.stored() == 80 * MIB


def test_5_a_chain_stores_its_first_snapshot_and_all_changes(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 20 * MIB, MIB)
    disk.write(0, 10 * MIB)
    disk.snapshot()
    disk.write(0, 4 * MIB)
    disk.snapshot()
    disk.write(12 * MIB, 2 * MIB)
    disk.snapshot()
    assert disk.stored() == 16 * MIB


def test_5_deleting_the_first_frees_what_the_second_has_overwritten(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 20 * MIB, MIB)
    disk.write(0, 10 * MIB)
    first = disk.snapshot()
    disk.write(0, 4 * MIB)
    second = disk.snapshot()
    assert disk.stored() == 14 * MIB
    assert disk.delete(first) == 4 * MIB
    assert disk.stored() == 10 * MIB
    assert disk.restored(second) == disk.path.read_bytes()


def test_7_unique_is_what_differs_from_the_previous_and_from_the_next(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 64 * BLOCK, BLOCK)
    chooser = random.Random(7)
    chain = []
    for _ in range(6):
        for place in chooser.sample(range(64), 20):
            disk.write(place * BLOCK, BLOCK)
        chain.append(disk.snapshot())
    repository = disk.repository
    for previous, this, following in zip(chain, chain[1:], chain[2:], strict=False):
        both = intersection(repository.diff(previous, this), repository.diff(this, following), 64 * BLOCK)
        assert repository.unique([this]).plain_bytes == total_bytes(both) > 0


class Living:
    """A pool, and what its disks and snapshots take; every block that is written gets content of its own."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._random = random.Random(1)

    def write(self, disk: PoolDisk, offset_bytes: int, length_bytes: int) -> bytes:
        """New content at a place. Returns it."""
        data = self._random.randbytes(length_bytes)
        disk.pwrite(data, offset_bytes)
        return data

    def stored(self) -> int:
        """Bytes of blocks that some disk or snapshot holds."""
        check_space(self.pool)
        return self.pool.usage().allocated_bytes

    def delete(self, snapshot: PoolSnapshot) -> int:
        """Delete a snapshot. Returns the bytes that were freed, which is what was foretold."""
        before = self.stored()
        expected = self.pool.unique_bytes([snapshot])
        snapshot.delete()
        assert before - self.stored() == expected
        return expected


@pytest.fixture
def living(tmp_path: Path) -> Iterator[Living]:
    with Pool.create(tmp_path / "pool", background=False) as pool:
        yield Living(pool)


def _all(version: PoolDisk | PoolSnapshot) -> bytes:
    return version.pread(version.size_bytes, 0)


def test_1_on_a_pool_deleting_the_middle_snapshot_frees_what_only_it_holds(living: Living) -> None:
    disk = living.pool.create_disk("disk", 4 * BLOCK)
    a, b, c, d = (living.write(disk, place * BLOCK, BLOCK) for place in range(4))
    first = disk.snapshot()
    b1, c1 = living.write(disk, 1 * BLOCK, BLOCK), living.write(disk, 2 * BLOCK, BLOCK)
    second = disk.snapshot()
    b2 = living.write(disk, 1 * BLOCK, BLOCK)
    third = disk.snapshot()
    assert [_all(version) for version in (first, second, third)] == [a + b + c + d, a + b1 + c1 + d, a + b2 + c1 + d]

    assert living.delete(second) == 1 * BLOCK, "B1 is freed, C1 stays"
    with pytest.raises(NotFoundError):
        living.pool.snapshot(second.id)
    assert _all(third) == a + b2 + c1 + d
    assert living.stored() == 6 * BLOCK, "A, B, C, D of the first, B2 and C1 of the third"
    disk.rollback(third)
    assert _all(disk) == a + b2 + c1 + d


def test_2_on_a_pool_what_the_next_snapshot_needs_of_a_deleted_one_stays_with_it(living: Living) -> None:
    disk = living.pool.create_disk("disk", 8 * BLOCK)
    living.write(disk, 0, 6 * BLOCK)
    s0 = disk.snapshot()
    living.write(disk, 4 * BLOCK, 3 * BLOCK)
    s1 = disk.snapshot()
    living.write(disk, 6 * BLOCK, 2 * BLOCK)
    s2 = disk.snapshot()
    assert living.stored() == (6 + 3 + 2) * BLOCK
    contents = {snapshot: _all(snapshot) for snapshot in (s0, s2)}

    assert living.delete(s1) == 1 * BLOCK, "of the three that it changed two are in the next one too"
    reached = {data[at : at + BLOCK] for data in contents.values() for at in range(0, len(data), BLOCK)}
    assert living.stored() == len(reached - {bytes(BLOCK)}) * BLOCK
    assert {snapshot: _all(snapshot) for snapshot in (s0, s2)} == contents


def test_3_on_a_pool_the_first_snapshot_holds_what_is_written_and_the_next_one_becomes_the_base(
    living: Living,
) -> None:
    disk = living.pool.create_disk("disk", 200 * MIB)
    living.write(disk, 40 * MIB, 122 * MIB)
    first = disk.snapshot()
    assert total_bytes(living.pool.diff(None, first)) == living.stored() == 122 * MIB
    living.write(disk, 40 * MIB, 2 * MIB)
    second = disk.snapshot()
    assert total_bytes(living.pool.diff(first, second)) == 2 * MIB
    content = _all(second)

    assert living.delete(first) == 2 * MIB
    assert total_bytes(living.pool.diff(None, second)) == living.stored() == 122 * MIB
    assert _all(second) == content
    living.write(disk, 0, MIB)
    assert total_bytes(living.pool.diff(second, disk.snapshot())) == MIB


def test_4_on_a_pool_a_later_snapshot_holds_what_was_changed_and_added(living: Living) -> None:
    disk = living.pool.create_disk("disk", 200 * MIB)
    living.write(disk, 0, 50 * MIB)
    first = disk.snapshot()
    assert living.stored() == 50 * MIB
    living.write(disk, 10 * MIB, 20 * MIB)
    living.write(disk, 100 * MIB, 10 * MIB)
    later = disk.snapshot()
    assert total_bytes(living.pool.diff(first, later)) == 30 * MIB
    assert total_bytes(later.extents().allocated) == 60 * MIB
    assert living.stored() == 80 * MIB


def test_5_on_a_pool_a_chain_stores_its_first_snapshot_and_all_changes(living: Living) -> None:
    disk = living.pool.create_disk("disk", 20 * MIB)
    for offset, length in ((0, 10 * MIB), (0, 4 * MIB), (12 * MIB, 2 * MIB)):
        living.write(disk, offset, length)
        disk.snapshot()
    assert living.stored() == 16 * MIB


def test_5_on_a_pool_deleting_the_first_frees_what_the_second_has_overwritten(living: Living) -> None:
    disk = living.pool.create_disk("disk", 20 * MIB)
    living.write(disk, 0, 10 * MIB)
    first = disk.snapshot()
    living.write(disk, 0, 4 * MIB)
    second = disk.snapshot()
    content = _all(second)
    assert living.stored() == 14 * MIB
    assert living.delete(first) == 4 * MIB
    assert living.stored() == 10 * MIB
    assert _all(second) == content


def test_6_on_a_pool_a_disk_of_a_snapshot_stores_what_is_written_to_it(living: Living) -> None:
    disk = living.pool.create_disk("disk", 20 * MIB)
    living.write(disk, 0, 10 * MIB)
    origin = disk.snapshot()
    copy = living.pool.create_disk("copy", source=origin)
    before = living.stored()
    living.write(copy, 8 * MIB, 4 * MIB)
    first = copy.snapshot()
    assert living.stored() - before == 4 * MIB
    assert total_bytes(living.pool.diff(origin, first)) == 4 * MIB
    assert total_bytes(first.extents().allocated) == 12 * MIB, "two of the four are behind what the origin holds"
    assert _all(origin) == _all(disk)


def test_7_on_a_pool_unique_is_what_differs_from_the_previous_and_from_the_next(living: Living) -> None:
    disk = living.pool.create_disk("disk", 64 * BLOCK)
    chooser = random.Random(7)
    chain = []
    for _ in range(6):
        for place in chooser.sample(range(64), 20):
            living.write(disk, place * BLOCK, BLOCK)
        chain.append(disk.snapshot())
    pool = living.pool
    # What a snapshot holds itself: where the previous one has a block and it has none, nothing would be freed.
    for previous, this, following in zip(chain, chain[1:], chain[2:], strict=False):
        both = intersection(pool.diff(previous, this), pool.diff(this, following), 64 * BLOCK)
        assert pool.unique_bytes([this]) == total_bytes(both) > 0
