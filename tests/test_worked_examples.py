"""The worked examples of the service's contract, on a repository. A block is a chunk, a GiB a MiB.

Examples 6 (keys) and 8 to 10 (policies, billing) speak of parts above the repository.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from snapcore import Manifest, NotFoundError, Repository
from snapcore.extents import intersection, total_bytes
from snapcore.store import MemoryStore

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
