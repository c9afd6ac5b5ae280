"""Snapshots of either tier as one thing: bytes to read, and where two of them differ.

| two versions | differ where |
| --- | --- |
| of one pool and a common origin | the maps say so: exact to 4 KiB; written again with the same bytes counts |
| of repositories with the same keys and chunks | the trees say so: exact to the chunk |
| across the tiers, with a twin that is archived there | their bytes differ, of what maps and trees leave over |
| any others | their bytes differ |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from snapcore import extents, scan
from snapcore.extents import Extents
from snapcore.parallel import SPAN_BYTES
from snapcore.pool import Disk, Pool, Snapshot
from snapcore.repository import Manifest, Repository, SnapshotReader
from snapcore.service.base import Base, Known
from snapcore.service.journal import Journal

PAGE_BYTES = 4096
# Bounds the memory of a diff by trees: 16 Mi chunks of 64 KiB.
_TREES_BYTES = 1 << 40


@dataclass(frozen=True)
class Local:
    """A snapshot or disk of a pool."""

    version: Snapshot | Disk
    pool: Pool

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.version.name} in {self.pool.path}"

    @property
    def size_bytes(self) -> int:
        """Length of the disk."""
        return self.version.size_bytes

    @property
    def unit_bytes(self) -> int:
        """What it tells apart."""
        return PAGE_BYTES

    def data_extents(self, start: int = 0, stop: int | None = None) -> Extents:
        """Where data may be."""
        end = self.size_bytes if stop is None else min(stop, self.size_bytes)
        return extents.from_pairs(self.version.data_extents(start, end - start)) if start < end else extents.empty()

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        """Fill `target`."""
        self.version.read_into(target, offset_bytes)


@dataclass(frozen=True)
class Remote:
    """A snapshot of a repository. A `Source` too."""

    snapshot: Manifest
    repository: Repository
    _reader: list[SnapshotReader] = field(default_factory=list, compare=False, repr=False)

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.snapshot.id} in {self.repository.url}"

    @property
    def size_bytes(self) -> int:
        """Length of the disk."""
        return self.snapshot.size_bytes

    @property
    def unit_bytes(self) -> int:
        """What it tells apart."""
        return self.repository.chunk_bytes

    def data_extents(self, start: int = 0, stop: int | None = None) -> Extents:
        """Where data may be."""
        return self.repository.extents(self.snapshot, start, stop)

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        """Fill `target`."""
        if not self._reader:
            self._reader.append(self.repository.open_snapshot(self.snapshot))
        self._reader[0].pread_into(target, offset_bytes)


Side = Local | Remote


def differing(a: Side, b: Side, start: int, stop: int) -> Iterator[Extents]:
    """Where two versions differ between two bytes, in parts, in ascending order. Behind its end a disk is zero."""
    if isinstance(a, Local) and isinstance(b, Local) and a.pool is b.pool and a.pool.related(a.version, b.version):
        yield from a.pool.diff_parts(a.version, b.version, start, stop)
    elif (
        isinstance(a, Remote)
        and isinstance(b, Remote)
        and a.repository.comparable(a.snapshot, b.snapshot, of=b.repository)
    ):
        for at in range(start, stop, _TREES_BYTES):
            end = min(stop, at + _TREES_BYTES)
            yield a.repository.diff(a.snapshot, b.snapshot, at, end, of=b.repository)
    else:
        yield from _compared(a, b, _candidates(a, b, start, stop))


def _candidates(a: Side, b: Side, start: int, stop: int) -> Extents:
    """Where two versions may differ."""
    if isinstance(a, Local) and isinstance(b, Remote):
        found = across(a, b, start, stop)
    elif isinstance(a, Remote) and isinstance(b, Local):
        found = across(b, a, start, stop)
    else:
        found = None
    if found is not None:
        return found
    return extents.clipped(extents.union(a.data_extents(start, stop), b.data_extents(start, stop)), start, stop)


def across(local: Local, remote: Remote, start: int = 0, stop: int | None = None) -> Extents | None:
    """Where a local version may differ from an archived one, by the twin nearest to it; None when there is none."""
    base = _base(local, remote)
    if base is None:
        return None
    end = max(local.size_bytes, remote.size_bytes) if stop is None else stop
    there = remote.repository.diff(base.twins.archived, remote.snapshot, start, end)
    found = extents.union(extents.clipped(base.changed, start, end), there)
    # Behind the end of the twin its map says nothing.
    sizes = [local.size_bytes, remote.size_bytes, base.twins.local.size_bytes]
    if len({*sizes}) > 1:
        found = extents.union(found, extents.from_pairs([(min(sizes), max(sizes) - min(sizes))]))
    return extents.clipped(found, start, end)


def _base(local: Local, remote: Remote) -> Base | None:
    known = Known(local.pool, Journal(local.pool.path), remote.repository)
    return known.base(local.version, remote.snapshot.disk, remote.snapshot)


def _compared(a: Side, b: Side, rows: Extents) -> Iterator[Extents]:
    """What of `rows` differs, to the page."""
    whole = extents.aligned(rows, PAGE_BYTES, max(a.size_bytes, b.size_bytes))
    for offset, length in extents.spans(whole, SPAN_BYTES):
        one, two = _read(a, offset, length), _read(b, offset, length)
        found = scan.differing_extents(one, two, PAGE_BYTES)
        if len(found):
            found[:, 0] += offset
            yield found


def _read(side: Side, offset: int, length: int) -> memoryview:
    data = memoryview(bytearray(length))
    inside = max(0, min(length, side.size_bytes - offset))
    if inside:
        side.read_into(data[:inside], offset)
    return data
