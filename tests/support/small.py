"""A small repository with everything in it: two disks, three snapshots each, patches, a collection in between.

And what is needed to hold a damaged copy of it against the truth.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from snapcore import Error, Repository, extents
from snapcore.extents import Extents
from snapcore.persist import Medium
from snapcore.repository.manifest import Manifest
from snapcore.store import MemoryStore
from tests.support.forge import Objects, objects_of, store_of

PAGE = 4096


class Bytes:
    """A source in memory. `hook` is called before each read."""

    def __init__(self, data: bytes, hook: Callable[[], None] | None = None) -> None:
        self._data = data
        self._hook = hook
        self.name = "memory"

    @property
    def size_bytes(self) -> int:
        return len(self._data)

    def data_extents(self) -> Extents:
        return extents.from_pairs([(0, len(self._data))])

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        if self._hook is not None:
            self._hook()
        target[:] = self._data[offset_bytes : offset_bytes + len(target)]

    def check_unchanged(self) -> None:
        return


@dataclass
class Small:
    """The repository: its objects, and what each snapshot holds.

    Attributes
    ----------
    objects : dict of name to bytes
    older_index : dict of name to bytes
        All index objects as they once were; later snapshots are not in them.
    snapshots : dict of id to Manifest
    content : dict of id to bytes
    disks : dict of disk to the id of its newest snapshot
    """

    objects: Objects = field(default_factory=dict)
    older_index: Objects = field(default_factory=dict)
    snapshots: dict[str, Manifest] = field(default_factory=dict)
    content: dict[str, bytes] = field(default_factory=dict)
    disks: dict[str, str] = field(default_factory=dict)

    def newest(self, disk: str) -> bytes:
        """What the newest snapshot of a disk holds."""
        return self.content[self.disks[disk]]


def changed_pages(data: bytes, random_: random.Random, pages: list[int], start: int = 100) -> bytes:
    """The data with some bytes of these pages other than they were."""
    copy = bytearray(data)
    for page in pages:
        at = page * PAGE + start
        copy[at : at + 40] = random_.randbytes(40)
    return bytes(copy)


def make_small(chunk_bytes: int, chunks: int, compression: str = "lz4", seed: int = 1) -> Small:
    """Make one. Disks have `chunks` chunks, the last one not whole, a stretch of zeros, and a part in common."""
    random_ = random.Random(seed)
    store = MemoryStore()
    repository = Repository.create(store, chunk_bytes=chunk_bytes, compression=compression)
    made = Small()
    pages = chunk_bytes // PAGE
    size = chunks * chunk_bytes - 1000

    def chunk() -> bytes:
        # Half of each page is noise and half a pattern: compressible, and different everywhere.
        return b"".join(random_.randbytes(200) + bytes([random_.randrange(256)]) * (PAGE - 200) for _ in range(pages))

    common = b"".join(chunk() for _ in range(chunks // 4))
    for number, disk in enumerate(("one", "two")):
        data = common + b"".join(chunk() for _ in range(chunks - chunks // 4))
        hole = chunks // 2 * chunk_bytes
        data = (data[:hole] + bytes(chunk_bytes) + data[hole + chunk_bytes :])[:size]
        for step in range(4):
            created = repository.snapshot(Bytes(data), disk=disk)
            if step == 0 and number == 0:
                first = created.snapshot.id
            if not (step == 0 and number == 0):
                made.snapshots[created.snapshot.id] = created.snapshot
                made.content[created.snapshot.id] = data
                made.disks[disk] = created.snapshot.id
            last = chunks * pages - 2
            data = changed_pages(data, random_, sorted({step, pages + step, last - step}))
            if step == 1 and number == 0:
                made.older_index |= {name: body for name, body in objects_of(store).items() if name[:6] == "index/"}
                repository.delete(first)
                repository.collect()
            if step == 2 and number == 1:
                break
    made.objects = objects_of(store)
    return made


@dataclass
class Reading:
    """What could be read of a repository.

    Attributes
    ----------
    listed : bool
        The list of all snapshots could be read.
    errors : list of Error
    lost : dict of id to set of chunk numbers
        What of each snapshot could not be read; None for a snapshot that cannot be found.
    """

    listed: bool = True
    errors: list[Error] = field(default_factory=list)
    lost: dict[str, set[int] | None] = field(default_factory=dict)


def read_all(small: Small, objects: Objects) -> Reading:
    """Read all that can be read of a damaged copy, chunk by chunk; AssertionError when a byte is wrong."""
    found = Reading()
    try:
        repository = Repository.open(store_of(objects))
    except Error as error:
        found.errors.append(error)
        found.listed = False
        found.lost = dict.fromkeys(small.snapshots)
        return found
    try:
        repository.snapshots()
    except Error as error:
        found.errors.append(error)
        found.listed = False
    for snapshot_id, content in small.content.items():
        try:
            reader = repository.open_snapshot(snapshot_id)
        except Error as error:
            found.errors.append(error)
            found.lost[snapshot_id] = None
            continue
        found.lost[snapshot_id] = set()
        assert reader.size_bytes == len(content)
        size = repository.chunk_bytes
        for number, start in enumerate(range(0, len(content), size)):
            buffer = bytearray(min(size, len(content) - start))
            try:
                reader.pread_into(buffer, start)
            except Error as error:
                found.errors.append(error)
                found.lost[snapshot_id].add(number)  # type: ignore[union-attr]
            else:
                assert buffer == content[start : start + size], f"wrong bytes in chunk {number} of {snapshot_id}"
    return found


def chunks_in(rows: Extents, chunk_bytes: int) -> set[int]:
    """Numbers of the chunks that extents touch."""
    return {
        number
        for offset, length in np.asarray(rows).tolist()
        for number in range(offset // chunk_bytes, -(-(offset + length) // chunk_bytes))
    }


class Careless(Medium):
    """A medium that makes nothing durable: for tests of what is read, which need not wait for a disk."""

    def sync(self, descriptor: int) -> None:
        return

    def sync_folder(self, path: str) -> None:
        return


def restored(repository: Repository, snapshot_id: str, folder: Path) -> bytes:
    """The bytes of a snapshot by way of restore."""
    target = folder / f"{snapshot_id}-{os.urandom(4).hex()}"
    repository.restore(snapshot_id, target, medium=Careless())
    data = target.read_bytes()
    target.unlink()
    return data
