"""The worked examples 1 to 7 of the service's contract across both tiers. A block is a chunk, a GiB a MiB.

Of example 6 the part about keys is not here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from snapcore import MemoryStore, Repository
from snapcore.extents import intersection, total_bytes
from snapcore.pool import Disk, Pool
from snapcore.service import Archived, Archives
from tests.support.tiers import archived_bytes, local_bytes, quick_pool

BLOCK = 4096
MIB = 1 << 20


class Service:
    """A disk of a pool and the repository that it is archived in; every write has content of its own."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.repository = Repository.create(MemoryStore(), chunk_bytes=BLOCK, compression="none")
        self._random = random.Random(1)

    def disk(self, name: str, size_bytes: int) -> Disk:
        """An empty disk."""
        return self.pool.create_disk(name, size_bytes)

    def write(self, disk: Disk, offset_bytes: int, length_bytes: int) -> bytes:
        """New content at a place. Returns it."""
        data = self._random.randbytes(length_bytes)
        disk.pwrite(data, offset_bytes)
        return data

    def archive(self, disk: Disk) -> Archived:
        """Cut and archive."""
        with Archives(self.pool) as archives:
            done = archives.archive(self.repository, disk).result()
        assert archived_bytes(self.repository, done.archived) == local_bytes(done.local) == local_bytes(disk)
        return done

    def stored(self) -> tuple[int, int]:
        """Bytes of blocks in the repository, and in the pool."""
        return self.repository.usage().plain_bytes, self.pool.usage().allocated_bytes

    def delete(self, done: Archived) -> tuple[int, int]:
        """Delete in both tiers. Returns the bytes of blocks that were freed in each."""
        before = self.stored()
        unique = self.repository.unique([done.archived]).plain_bytes, self.pool.unique_bytes([done.local])
        with Archives(self.pool) as archives:
            archives.delete_snapshots([done.local])
        self.repository.delete(done.archived)
        self.repository.collect()
        assert self.repository.verify().ok
        after = self.stored()
        assert (before[0] - after[0], before[1] - after[1]) == unique
        return unique


@pytest.fixture
def service() -> Iterator[Service]:
    with quick_pool() as pool:
        yield Service(pool)


def test_1_deleting_the_middle_snapshot_frees_what_only_it_holds(service: Service) -> None:
    disk = service.disk("disk", 4 * BLOCK)
    a, _, _, d = (service.write(disk, place * BLOCK, BLOCK) for place in range(4))
    service.archive(disk)
    service.write(disk, BLOCK, BLOCK)
    c1 = service.write(disk, 2 * BLOCK, BLOCK)
    second = service.archive(disk)
    b2 = service.write(disk, BLOCK, BLOCK)
    third = service.archive(disk)
    assert service.delete(second) == (BLOCK, BLOCK)
    assert local_bytes(third.local) == archived_bytes(service.repository, third.archived) == a + b2 + c1 + d


def test_2_what_the_next_snapshot_needs_of_a_deleted_one_stays_with_it(service: Service) -> None:
    disk = service.disk("disk", 8 * BLOCK)
    service.write(disk, 0, 6 * BLOCK)
    s0 = service.archive(disk)
    service.write(disk, 4 * BLOCK, 3 * BLOCK)
    s1 = service.archive(disk)
    service.write(disk, 6 * BLOCK, 2 * BLOCK)
    s2 = service.archive(disk)
    contents = [archived_bytes(service.repository, item.archived) for item in (s0, s2)]
    assert service.delete(s1) == (BLOCK, BLOCK)
    reached = {data[at : at + BLOCK] for data in contents for at in range(0, len(data), BLOCK)} - {bytes(BLOCK)}
    assert service.stored() == (len(reached) * BLOCK, len(reached) * BLOCK)
    assert [archived_bytes(service.repository, item.archived) for item in (s0, s2)] == contents


def test_3_the_first_snapshot_holds_what_is_written_and_the_next_one_becomes_the_base(service: Service) -> None:
    disk = service.disk("disk", 20 * MIB)
    service.write(disk, 0, 12 * MIB)
    first = service.archive(disk)
    assert first.archived.written_bytes == first.read_bytes == 12 * MIB
    service.write(disk, 0, BLOCK)
    second = service.archive(disk)
    assert second.read_bytes == BLOCK
    service.delete(first)
    assert service.stored() == (12 * MIB, 12 * MIB)
    service.write(disk, MIB, BLOCK)
    third = service.archive(disk)
    assert third.base is not None and third.base.archived.id == second.archived.id and third.read_bytes == BLOCK


def test_4_what_changed_and_what_was_added_is_stored(service: Service) -> None:
    disk = service.disk("disk", 200 * BLOCK)
    service.write(disk, 0, 50 * BLOCK)
    assert service.archive(disk).archived.changed_bytes == 50 * BLOCK
    service.write(disk, 30 * BLOCK, 30 * BLOCK)
    done = service.archive(disk)
    assert done.archived.changed_bytes == done.read_bytes == 30 * BLOCK
    assert service.stored() == (80 * BLOCK, 80 * BLOCK)


def test_5_a_chain_takes_what_its_snapshots_reach(service: Service) -> None:
    disk = service.disk("disk", 20 * BLOCK)
    service.write(disk, 0, 10 * BLOCK)
    a = service.archive(disk)
    service.write(disk, 2 * BLOCK, 4 * BLOCK)
    b = service.archive(disk)
    assert service.stored() == (14 * BLOCK, 14 * BLOCK)
    service.write(disk, 10 * BLOCK, 2 * BLOCK)
    service.archive(disk)
    assert service.stored() == (16 * BLOCK, 16 * BLOCK)
    assert service.delete(a) == (4 * BLOCK, 4 * BLOCK)
    assert service.delete(b) == (0, 0)
    assert service.stored() == (12 * BLOCK, 12 * BLOCK)


def test_6_the_first_snapshot_of_a_disk_made_from_a_snapshot_stores_what_was_written_since(service: Service) -> None:
    disk = service.disk("disk", 20 * BLOCK)
    service.write(disk, 0, 10 * BLOCK)
    origin = service.archive(disk)
    made = service.pool.create_disk("made", source=origin.local)
    service.write(made, 8 * BLOCK, 4 * BLOCK)
    done = service.archive(made)
    assert (done.archived.changed_bytes, done.read_bytes) == (4 * BLOCK, 4 * BLOCK)
    assert service.stored() == (14 * BLOCK, 14 * BLOCK)


def test_7_unique_bytes_are_what_differs_from_both_neighbours(service: Service) -> None:
    disk = service.disk("disk", 30 * BLOCK)
    service.write(disk, 0, 20 * BLOCK)
    first = service.archive(disk)
    service.write(disk, 4 * BLOCK, 10 * BLOCK)
    middle = service.archive(disk)
    service.write(disk, 10 * BLOCK, 12 * BLOCK)
    last = service.archive(disk)
    for differ, unique in (
        (service.repository.diff, service.repository.unique([middle.archived]).plain_bytes),
        (service.pool.diff, service.pool.unique_bytes([middle.local])),
    ):
        ends = (first.archived, middle.archived, last.archived) if differ == service.repository.diff else (
            first.local, middle.local, last.local,
        )  # fmt: skip
        both = intersection(differ(ends[0], ends[1]), differ(ends[1], ends[2]), disk.size_bytes)  # type: ignore[operator]
        assert total_bytes(both) == unique == 4 * BLOCK
