"""The content of the golden pool: the same on every machine and in every version."""

from __future__ import annotations

import random

from snapcore.pool import Pool
from tests.support.lazy_regions import Regions

BLOCK = 4096
MIB = 1 << 20
SIZE = 64 * BLOCK + 777


def fill(pool: Pool) -> None:
    """Make versions of every kind: heads, snapshots, a group, a clone's ghost, a rollback."""
    source = random.Random(20261122)
    one = pool.create_disk("one", SIZE)
    two = pool.create_disk("two", 2 * SIZE)
    for disk in (one, two):
        for block in source.sample(range(64), 9):
            disk.pwrite(source.randbytes(BLOCK), block * BLOCK)
    one.pwrite(b"the end", SIZE - 7)
    pool.snapshot_group([one, two], "both")
    one.pwrite(b"in the middle of a block", 5 * BLOCK + 100)
    one.discard(0, 3 * BLOCK)
    one.snapshot("later")
    clone = one.clone("clone")
    clone.pwrite(source.randbytes(2 * BLOCK), 20 * BLOCK)
    one.pwrite(source.randbytes(BLOCK), 30 * BLOCK)
    pool.snapshot("later").delete()
    two.pwrite(b"lost", 0)
    two.rollback("both")
    two.pwrite(b"kept", BLOCK)
    pool.create_disk("from a snapshot", source=pool.snapshots(one)[0])


def contents(pool: Pool) -> dict[str, bytes]:
    """What every version holds."""
    versions = [*pool.disks(), *pool.snapshots()]
    return {f"{version.id} {version.name}": version.pread(version.size_bytes, 0) for version in versions}


def fill_lazy(pool: Pool, regions: Regions) -> None:
    """Make lazy disks of every kind: two over one image, one rolled back to another, one without its region."""
    source = random.Random(20261124)
    # Each block is another, and all can be packed well.
    data = b"".join(source.randbytes(16) * 256 for _ in range(256)) + bytes(MIB)
    data += b"".join(source.randbytes(16) * 256 for _ in range(256)) + source.randbytes(777)
    one = pool.create_disk("one", source=regions.put("1" * 32, data))
    pool.create_disk("two", len(data) + BLOCK, source=regions.put("1" * 32, data))
    one.pwrite(source.randbytes(BLOCK), 5 * BLOCK)
    one.pwrite(b"in the middle of a block", 100)
    one.snapshot("cut")
    back = pool.create_disk("back", SIZE)
    pool.rollback_disk(back, regions.put("2" * 32, data[::-1]))
    back.pread(1, 0)
    free = pool.create_disk("free", source=regions.put("3" * 32, data[MIB:]))
    free.pwrite(b"own", 0)
    free.decouple()


def lazy_contents(pool: Pool) -> dict[str, bytes]:
    """What the first MiB of every version holds, and all of the one that is decoupled."""
    versions = [*pool.disks(), *pool.snapshots()]
    return {
        f"{version.id} {version.name}": version.pread(version.size_bytes if version.name == "free" else MIB, 0)
        for version in versions
    }
