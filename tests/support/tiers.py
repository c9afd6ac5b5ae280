"""What tests of both tiers share: disks with content, and what a snapshot holds in either."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator

from snapcore import Manifest, Repository
from snapcore.pool import Disk, Pool, Snapshot
from tests.support.pools import quick_folder

CHUNK = 64 << 10
PAGE = 4096


def disk(pool: Pool, name: str, chunks: int = 40, seed: int = 1) -> Disk:
    """A disk with noise in every second chunk."""
    dice = random.Random(seed)
    made = pool.create_disk(name, chunks * CHUNK + 777)
    for chunk in range(0, chunks, 2):
        made.pwrite(dice.randbytes(CHUNK), chunk * CHUNK)
    return made


def scribble(version: Disk, seed: int, writes: int = 5) -> None:
    """Write here and there, and drop something."""
    dice = random.Random(seed)
    for _ in range(writes):
        at = dice.randrange(version.size_bytes)
        version.pwrite(dice.randbytes(min(5000, version.size_bytes - at)), at)
    at = dice.randrange(version.size_bytes // CHUNK) * CHUNK
    version.discard(at, min(2 * CHUNK, version.size_bytes - at))


def local_bytes(version: Disk | Snapshot) -> bytes:
    """All bytes of a version."""
    return version.pread(version.size_bytes, 0)


def archived_bytes(repository: Repository, snapshot: Manifest | str) -> bytes:
    """All bytes of an archived snapshot."""
    return repository.open_snapshot(snapshot).read()


@contextlib.contextmanager
def quick_pool() -> Iterator[Pool]:
    """A pool in memory that is gone afterwards."""
    folder = quick_folder()
    try:
        with Pool.create(folder / "pool", background=False) as made:
            yield made
    finally:
        shutil.rmtree(folder)
