"""Copies one snapshot into another repository, or under another key (docs/DESIGN.md, "Copies").

The copy is made by `create`, from a source that is a snapshot: its session, its commit and what a crash leaves are
those of any writer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime

from snapcore.errors import BusyError, DamagedError, NotFoundError
from snapcore.extents import Extents
from snapcore.progress import Progress, ProgressCallback
from snapcore.repository import create, manifest, moving
from snapcore.repository.context import Context
from snapcore.repository.copy_memo import FileMemo
from snapcore.repository.create import Request
from snapcore.repository.manifest import CopiedFrom, Manifest
from snapcore.repository.moving import MovedSource, Moving, NearObjects, Resealing, SnapshotSource
from snapcore.repository.objects import Objects
from snapcore.repository.reading import Reading
from snapcore.repository.tree import Root
from snapcore.source import Source
from snapcore.store.rate import RateReader

_TRIES = 3


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy did.

    Attributes
    ----------
    snapshot : Manifest
        The copy; its `new_bytes`, `stored_bytes` and `fallback_reason` are those of any snapshot.
    source : Manifest
    moved_bytes : int
        Read of the packs of the source, as stored.
    duration_s : float
    """

    snapshot: Manifest
    source: Manifest
    moved_bytes: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Way:
    """From where and to where.

    Attributes
    ----------
    source, target : Context
        Each of the domain that the snapshot is in, or goes to.
    find : callable
        Finds a snapshot in the source's repository by its id; NotFoundError.
    others : callable
        Whether a disk has a chain over there in another domain.
    limit_bytes_per_s : int or None
        Of what is read.
    """

    source: Context
    target: Context
    find: Callable[[str], Manifest]
    others: Callable[[str], bool]
    limit_bytes_per_s: int | None

    @property
    def moves(self) -> bool:
        """Whether records move as they are: chunks have the same ids on both sides."""
        return self.source.domain.id == self.target.domain.id and self.same_chunks

    @property
    def same_chunks(self) -> bool:
        """Whether chunks have the same length on both sides."""
        return self.source.config.chunk_bytes == self.target.config.chunk_bytes


@dataclass(frozen=True, slots=True)
class _Base:
    """What a copy is compared with.

    Attributes
    ----------
    parent : Manifest or None
        Over there.
    root : Root or None
        The tree, in the terms of the source, of what the parent holds.
    reason : str or None
        Why there is no root although there could be one.
    """

    parent: Manifest | None
    root: Root | None
    reason: str | None


def copies(source: Context, target: Context, disk: str) -> Iterator[Manifest]:
    """Copies in `target` of snapshots of one disk in the repository and domain of `source`, newest first."""
    for snapshot in _newest_first(target, disk):
        copied = snapshot.copied
        if copied is not None and (copied.repository, copied.key) == (source.config.id, source.domain.key_id):
            yield snapshot


def _newest_first(context: Context, disk: str) -> Iterator[Manifest]:
    for name in reversed(list(manifest.names(context.store, context.domain, disk))):
        found = manifest.read(context.store, name, context.domains, context.config.chunk_bytes)
        if found is not None:
            yield found


def copy(
    way: Way, snapshot: Manifest, progress: ProgressCallback | None = None, executor: Executor | None = None
) -> Copied:
    """Copy a snapshot; see `Repository.copy_from`."""
    started = time.monotonic()
    reader = RateReader(way.source.store, way.limit_bytes_per_s)
    objects = Objects(
        reader,
        way.source.index(),
        way.source.domain,
        way.source.config.chunk_bytes,
        renew=way.source.index,
        reach=way.source.reach,
    )
    if way.moves:
        objects = NearObjects(objects, way.target.objects())
    job = _Job(way, snapshot, objects)
    made = job.run(None if progress is None else lambda step: progress(_named(step)), executor)
    return Copied(made, snapshot, reader.read_bytes, time.monotonic() - started)


def _named(step: Progress) -> Progress:
    return step._replace(stage="copy")


class _Job:
    """One copy in the making."""

    def __init__(self, way: Way, snapshot: Manifest, objects: Objects) -> None:
        self._way = way
        self._snapshot = snapshot
        self._objects = objects

    def run(self, progress: ProgressCallback | None, executor: Executor | None) -> Manifest:
        """The copy, by another base when the one that was chosen is deleted meanwhile."""
        for left in reversed(range(_TRIES)):
            base = self._base()
            try:
                return self._copied(base, progress, executor)
            except BusyError:
                gone = base.parent is not None and base.parent.id not in {
                    found.id for found in _newest_first(self._way.target, base.parent.disk)
                }
                if not left or not gone:
                    raise
        raise AssertionError("unreachable")

    def _copied(self, base: _Base, progress: ProgressCallback | None, executor: Executor | None) -> Manifest:
        snapshot, way = self._snapshot, self._way
        request = Request(
            disk=snapshot.disk,
            parent=base.parent,
            changed=self._changed(base),
            # Two of one name in one repository could not be told apart.
            label=snapshot.label if way.source.config.id != way.target.config.id else None,
            reason=base.reason,
            created=snapshot.created,
            copied=CopiedFrom(
                repository=way.source.config.id,
                snapshot=snapshot.id,
                key=snapshot.key,
                sequence=snapshot.sequence,
                root=snapshot.root,
                at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            ),
        )
        name = f"snapshot {snapshot.id} of {way.source.store.url}"
        if way.moves:
            return self._created(MovedSource(self._objects, snapshot, name, _moving), request, progress, executor)
        if not way.same_chunks:
            return self._created(SnapshotSource(self._objects, snapshot, name), request, progress, executor)
        what = f"{way.source.config.id} {snapshot.id} {way.target.config.id}"
        memo = FileMemo(way.target.domain, what)

        def resealing(source: MovedSource, objects: Objects, parent: Root, suspect: Extents, how: str) -> Reading:
            return Resealing(source, objects, parent, suspect, how, base.root, memo)

        try:
            made = self._created(MovedSource(self._objects, snapshot, name, resealing), request, progress, executor)
            memo.remove()
        finally:
            memo.close()
        return made

    def _created(
        self, source: Source, request: Request, progress: ProgressCallback | None, executor: Executor | None
    ) -> Manifest:
        return create.create(self._way.target, source, request, progress, executor).snapshot

    def _base(self) -> _Base:
        """The newest copy of an earlier snapshot of the chain; else of the one that this was compared with."""
        way, snapshot = self._way, self._snapshot
        lost: str | None = None
        for copy_ in copies(way.source, way.target, snapshot.disk):
            assert copy_.copied is not None
            if copy_.copied.sequence > snapshot.sequence:
                continue
            if way.moves:
                return _Base(copy_, copy_.tree, None)
            root = self._root_of(copy_.copied, snapshot.disk)
            if root is not None:
                return _Base(copy_, root, None)
            lost = lost or copy_.copied.snapshot
        other = self._parent_elsewhere() if lost is None else None
        if other is not None:
            return other
        newest = create.newest(way.target, snapshot.disk)
        return _Base(newest, newest.tree if newest is not None and way.moves else None, self._why(newest, lost))

    def _root_of(self, copied: CopiedFrom, disk: str) -> Root | None:
        """The tree of the snapshot that a copy was made of, when it is still there and still that."""
        context = self._way.source
        name = manifest.name(context.domain, disk, copied.sequence, copied.snapshot)
        try:
            found = manifest.read(context.store, name, context.domains, context.config.chunk_bytes)
        except DamagedError:
            return None
        return None if found is None or found.root != copied.root else found.tree

    def _parent_elsewhere(self) -> _Base | None:
        """For a disk that was made from another one: a copy of the snapshot that this one was compared with."""
        if self._snapshot.parent is None:
            return None
        try:
            parent = self._way.find(self._snapshot.parent)
        except NotFoundError:
            return None
        if parent.disk == self._snapshot.disk or parent.key != self._snapshot.key:
            return None
        for copy_ in copies(self._way.source, self._way.target, parent.disk):
            if copy_.copied is not None and (copy_.copied.snapshot, copy_.copied.root) == (parent.id, parent.root):
                return _Base(copy_, copy_.tree if self._way.moves else parent.tree, None)
        return None

    def _why(self, newest: Manifest | None, lost: str | None) -> str | None:
        way = self._way
        if lost is not None:
            return (
                f"the snapshot {lost}, of which the last copy in {way.target.store.url} was made, is not in "
                f"{way.source.store.url} any more: all of it was read, and what is new was stored"
            )
        if newest is not None:
            return (
                f"no earlier snapshot of this chain has a copy in {way.target.store.url}: it was compared with "
                f"{newest.id}, the newest of {newest.disk} there"
            )
        if way.others(self._snapshot.disk):
            return "earlier copies are under another key: they share nothing, so all of it was copied"
        return None

    def _changed(self, base: _Base) -> Extents | None:
        """Where the snapshot may differ from what the parent holds; None for anywhere."""
        if base.root is None:
            return None
        found = moving.differing_leaves if self._way.same_chunks else moving.differing_chunks
        snapshot, objects = self._snapshot, self._objects
        return found(objects.node, base.root, snapshot.tree, objects.chunk_bytes, snapshot.size_bytes)


def _moving(source: MovedSource, objects: Objects, parent: Root, suspect: Extents, how: str) -> Reading:
    return Moving(source, objects, parent, suspect, how)
