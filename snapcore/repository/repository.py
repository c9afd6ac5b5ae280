"""The cold tier: snapshots in a folder or object store, content-addressed; any of them restores the whole disk."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import replace

from snapcore import extents
from snapcore.errors import DamagedError, NotFoundError, ReadError, UnsupportedFormatError, UsageError
from snapcore.extents import Extents
from snapcore.persist import Medium
from snapcore.progress import ProgressCallback
from snapcore.repository import (
    codec,
    collect,
    config,
    create,
    difference,
    groups,
    manifest,
    marks,
    rebuild,
    restore,
    session,
    verify,
)
from snapcore.repository.collect import Collected
from snapcore.repository.config import CHUNK_BYTES, Config
from snapcore.repository.context import Context
from snapcore.repository.create import CHECKED_SHARE, Created, Request
from snapcore.repository.domain import PLAIN
from snapcore.repository.groups import Group
from snapcore.repository.manifest import Manifest
from snapcore.repository.marks import Usage
from snapcore.repository.reader import SnapshotReader
from snapcore.repository.restore import Restored
from snapcore.repository.session import Session
from snapcore.repository.verify import Verified
from snapcore.source import Source, Target, open_source, open_target
from snapcore.store import Store, open_store, with_cache

SnapshotLike = Manifest | str
_ID_PART = re.compile(r"[0-9a-f]{4,32}")


class Repository:
    """A repository. Make one with `Repository.create`, open it with `Repository.open`.

    Every method may be called from many threads and processes at once; `collect` refuses while a snapshot is being
    taken, and says by whom.
    """

    def __init__(self, store: Store, found: Config) -> None:
        self._context = Context(with_cache(store, found.id), found, PLAIN)
        # What looks after the store itself sees no cache of it.
        self._direct = replace(self._context, store=store)

    @classmethod
    def create(
        cls, place: str | os.PathLike[str] | Store, *, chunk_bytes: int = CHUNK_BYTES, compression: str = "lz4"
    ) -> Repository:
        """Make a new repository.

        Parameters
        ----------
        place : path or Store
            A folder that is empty or not there yet, `s3://BUCKET/PREFIX`, or a store of your own.
        chunk_bytes : int
            A power of two from 4 KiB to 4 MiB. Smaller chunks share more and cost more index (56 bytes each).
        compression : str
            "lz4", "zstd" or "none".

        Raises
        ------
        ExistsError
            Something is there already.
        """
        store = open_store(place)
        return cls(store, config.create(store, chunk_bytes, compression))

    @classmethod
    def open(cls, place: str | os.PathLike[str] | Store) -> Repository:
        """Open a repository; NotFoundError where there is none, UnsupportedFormatError for a newer one."""
        store = open_store(place)
        return cls(store, config.load(store))

    @property
    def url(self) -> str:
        """Where it is."""
        return self._context.store.url

    @property
    def id(self) -> str:
        """Its own id: 32 hexadecimal digits."""
        return self._context.config.id

    @property
    def chunk_bytes(self) -> int:
        """Length of a chunk."""
        return self._context.config.chunk_bytes

    @property
    def compression(self) -> str:
        """What new chunks are compressed with unless told otherwise."""
        return self._context.config.compression

    def snapshot(
        self,
        source: str | os.PathLike[str] | Source,
        *,
        disk: str,
        parent: SnapshotLike | None = None,
        changed: Extents | Iterable[tuple[int, int]] | None = None,
        paranoid: bool = False,
        allow_changing: bool = False,
        compression: str | None = None,
        label: str | None = None,
        tags: dict[str, str] | None = None,
        checked_share: float = CHECKED_SHARE,
        origin: str | None = None,
        group: str | None = None,
        progress: ProgressCallback | None = None,
        executor: Executor | None = None,
    ) -> Created:
        """Take a snapshot of a disk image, a block device or any other source.

        Parameters
        ----------
        source : path or Source
        disk : str
            Name of the disk: its snapshots make a chain.
        parent : snapshot, optional
            What to compare with; default: the disk's newest snapshot here. One of another disk is fine for a disk
            that was made from it.
        changed : int64 array of shape (n, 2) or pairs of (offset, length), optional
            All byte ranges that may differ from the parent, known from elsewhere. Only they are read, and a random
            share of the rest, which must be the same.
        paranoid : bool
            Compare by content id and not by the fingerprints that this host remembers.
        allow_changing : bool
            Accept a source that is written meanwhile: the snapshot may then mix old and new blocks.
        compression : str, optional
            "lz4", "zstd" or "none"; default: the repository's.
        label : str, optional
            A name to find the snapshot by: 1 to 255 printable characters that do not look like an id.
        tags : dict of str, optional
            For people: up to 64, keys of up to 128 characters, values of up to 256.
        checked_share : float
            How much of what `changed` does not name is compared all the same; 16 chunks at least.
        origin : str, optional
            Where else these very bytes are, for whoever asks later.
        group : str, optional
            Id of the group that it will belong to.
        progress : callable, optional
            Gets a `Progress` for each span; raising there cancels, and nothing is visible of the snapshot.
        executor : concurrent.futures.Executor, optional
            Threads to work on; default: one a core. Not processes, and not the pool that this call itself runs on: it
            would wait for a thread that waits for it.

        Raises
        ------
        SourceChangedError
            The source was written meanwhile, or `changed` does not name everything.
        BusyError, FencedError, ReadError, OutOfSpaceError, NotFoundError, UsageError, StoreError
        """
        if label is not None and (not label.isprintable() or not 1 <= len(label) <= 255 or _ID_PART.fullmatch(label)):
            raise UsageError(
                f"a snapshot's name has 1 to 255 printable signs and does not look like an id, not {label!r}"
            )
        request = Request(
            disk=manifest.check_disk(disk),
            parent=None if parent is None else self.find(parent),
            changed=None if changed is None else _changed(changed),
            paranoid=paranoid,
            compression=None if compression is None else codec.check_compression(compression),
            label=label,
            tags=manifest.check_tags(tags or {}),
            checked_share=checked_share,
            origin=origin,
            group=group,
        )
        with ExitStack() as stack:
            if isinstance(source, (str, os.PathLike)):
                opened: Source = stack.enter_context(open_source(os.fspath(source), allow_changing=allow_changing))
            else:
                opened = source
            if opened.size_bytes > manifest.SIZE_LIMIT_BYTES:
                raise UsageError(
                    f"{opened.name} has {opened.size_bytes} bytes; {manifest.SIZE_LIMIT_BYTES} are the most"
                )
            return create.create(self._context, opened, request, progress, executor)

    def snapshots(self, disk: str | None = None) -> list[Manifest]:
        """All snapshots, or those of one disk: by disk, in the order of the chain."""
        names = manifest.names(self._context.store, self._context.domain, disk)
        found = [self._manifest(name) for name in names]
        return sorted(
            (item for item in found if item is not None),
            key=lambda item: (item.disk, item.sequence, item.created, item.id),
        )

    def _manifest(self, name: str) -> Manifest | None:
        try:
            return manifest.read(self._context.store, name, self._context.domain, self.chunk_bytes)
        except DamagedError as error:
            raise DamagedError(
                f"{error}: this snapshot is lost. `snapcore snapshot delete {manifest.id_in(name)}` removes what is "
                "left of it; until then neither lists nor collections are complete, and they are refused"
            ) from error

    def find(self, snapshot: SnapshotLike) -> Manifest:
        """The snapshot of an id, of the beginning of one (from 4 digits on) or of a label, when only one has it."""
        if isinstance(snapshot, Manifest):
            snapshot = snapshot.id
        names = list(manifest.names(self._context.store))
        if _ID_PART.fullmatch(snapshot):
            matching = [name for name in names if manifest.id_in(name).startswith(snapshot)]
        else:
            matching = []
        found = [item for item in (self._manifest(name) for name in matching) if item is not None]
        if not found:
            found = [item for item in self.snapshots() if item.label == snapshot]
        if not found:
            raise NotFoundError(f"{self.url} has no snapshot {snapshot!r}; see `snapcore snapshot list -r {self.url}`")
        if len(found) > 1:
            listed = ", ".join(item.id for item in found[:5])
            raise UsageError(f"{snapshot!r} stands for {len(found)} snapshots: {listed}; give more digits")
        return found[0]

    def diff(
        self, a: SnapshotLike, b: SnapshotLike, start: int = 0, stop: int | None = None, *, of: Repository | None = None
    ) -> Extents:
        """Where two snapshots differ, on chunk borders: int64 array of shape (n, 2), offset and length in bytes.

        Any two snapshots of the repository, or of it and another; costs what differs. Behind the end of the smaller
        disk, everything that is not zero differs.

        Parameters
        ----------
        a, b : snapshot
        start, stop : int
            Only this part, in bytes.
        of : Repository, optional
            That `b` is in, if it is another one: of the same chunk size and keys (`comparable`).
        """
        other = of or self
        if not self.comparable(other):
            raise UsageError(f"{self.url} and {other.url} name the same bytes differently; compare what they hold")
        old, new = self.find(a), other.find(b)
        return difference.differing(
            self._context,
            old,
            other._context,
            new,
            start,
            max(old.size_bytes, new.size_bytes) if stop is None else stop,
        )

    def comparable(self, other: Repository) -> bool:
        """Whether the same bytes have the same id in both."""
        mine, theirs = self._context, other._context
        return self.chunk_bytes == other.chunk_bytes and mine.domain.id == theirs.domain.id

    def extents(self, snapshot: SnapshotLike, start: int = 0, stop: int | None = None) -> Extents:
        """Where a snapshot is not zero, on chunk borders; all of it or from `start` to `stop`."""
        found = self.find(snapshot)
        return difference.written(self._context, found, start, found.size_bytes if stop is None else stop)

    def put_group(self, group: Group) -> None:
        """Make a group of snapshots that are all there; ExistsError when it is there already."""
        groups.write(self._context.store, group)

    def groups(self) -> list[Group]:
        """All groups, oldest first."""
        return groups.load(self._context.store)

    def group(self, ref: str) -> Group:
        """The group of an id, of the beginning of one or of a name that only one has."""
        return groups.find(self._context.store, ref)

    def delete_group(self, group: Group) -> None:
        """The snapshots are no group any more; they stay."""
        self._context.store.delete(groups.PREFIX + group.id)

    def fill(
        self,
        snapshot: SnapshotLike,
        target: Target,
        *,
        within: Extents | None = None,
        progress: ProgressCallback | None = None,
        executor: Executor | None = None,
    ) -> Restored:
        """Write a snapshot into an open target of its size, which is its owner's to make durable.

        Parameters
        ----------
        snapshot : snapshot
        target : Target
        within : int64 array of shape (n, 2), optional
            The target is known to differ nowhere else.
        progress, executor
            As in `snapshot`.
        """
        return restore.restore(
            self._context.objects(),
            self.find(snapshot),
            target,
            allow_damaged=False,
            within=within,
            progress=progress,
            executor=executor,
        )

    def restore(
        self,
        snapshot: SnapshotLike,
        target: str | os.PathLike[str],
        *,
        in_place: bool = False,
        allow_damaged: bool = False,
        progress: ProgressCallback | None = None,
        executor: Executor | None = None,
        medium: Medium | None = None,
    ) -> Restored:
        """Write a snapshot to a new file, or into an existing file or block device. Durable on return.

        Parameters
        ----------
        snapshot : snapshot
        target : path
        in_place : bool
            The target exists: write only what differs. A file gets the snapshot's size.
        allow_damaged : bool
            Write zeros where the repository is damaged, and list those ranges in the result.
        progress, executor
            As in `snapshot`. After a cancelled or interrupted restore, start it again: it goes on.
        medium : Medium, optional
            What writes to the target, for tests; default: the operating system.

        Raises
        ------
        ExistsError, NotFoundError, BusyError, RefusedError, UsageError, DamagedError, OutOfSpaceError, StoreError
        """
        wanted = self.find(snapshot)
        folder = self._context.store.folder
        with open_target(
            os.fspath(target), wanted.size_bytes, in_place=in_place, forbidden_folder=folder, medium=medium
        ) as opened:
            return restore.restore(
                self._context.objects(),
                wanted,
                opened,
                allow_damaged=allow_damaged,
                progress=progress,
                executor=executor,
            )

    def open_snapshot(self, snapshot: SnapshotLike) -> SnapshotReader:
        """A snapshot as a file to read anywhere in."""
        return SnapshotReader(self._context.objects(), self.find(snapshot))

    def unique(self, snapshots: Sequence[SnapshotLike]) -> Usage:
        """What only these snapshots hold together: the bytes that `delete` and `collect` would free."""
        chosen = [self.find(snapshot) for snapshot in snapshots]
        ids = {snapshot.id for snapshot in chosen}
        others = [snapshot for snapshot in self.snapshots() if snapshot.id not in ids]
        return marks.unique(self._context.objects(), chosen, others)

    def usage(self) -> Usage:
        """What all snapshots hold together."""
        return marks.unique(self._context.objects(), self.snapshots(), [])

    def stored_bytes(self) -> int:
        """Bytes of all objects of the repository."""
        return sum(size_bytes for _, size_bytes in self._context.store.list(""))

    def delete(self, snapshot: SnapshotLike) -> str:
        """Delete a snapshot, wherever it stands in its chain; no other one changes. Returns its id.

        `collect` frees the space. One whose manifest is damaged is found by its id.
        """
        wanted = snapshot.id if isinstance(snapshot, Manifest) else snapshot
        names = [name for name in manifest.names(self._context.store) if manifest.id_in(name).startswith(wanted)]
        if not _ID_PART.fullmatch(wanted) or len(names) != 1:
            found = self.find(snapshot)
            names = [manifest.name(self._context.domain, found.disk, found.sequence, found.id)]
        self._refuse_tombstone(names[0])
        self._context.store.delete(names[0])
        return manifest.id_in(names[0])

    def _refuse_tombstone(self, name: str) -> None:
        """NotFoundError for a name that fences a writer: without the tombstone it could commit after all."""
        with contextlib.suppress(DamagedError, UnsupportedFormatError, ReadError):
            if self._manifest(name) is None:
                raise NotFoundError(f"{self.url} has no snapshot {manifest.id_in(name)}; it was never committed")

    def collect(self, *, progress: ProgressCallback | None = None) -> Collected:
        """Free what no snapshot reaches.

        Raises
        ------
        BusyError
            A snapshot is being taken, or another collection runs; the message names it.
        DamagedError
            Something reachable is missing: nothing was removed. Run `verify`, and delete or heal what it names.
        """
        return collect.collect(self._direct, self.snapshots, progress)

    def verify(self, *, progress: ProgressCallback | None = None, executor: Executor | None = None) -> Verified:
        """Read and check everything. What is damaged is marked, so that the next snapshot stores it again.

        BusyError when collections keep moving what is being read.
        """
        return verify.verify(self._direct, progress, executor)

    def rebuild_index(self, *, progress: ProgressCallback | None = None) -> int:
        """Make the index anew from the packs. Returns the number of entries; refuses like `collect`."""
        return rebuild.rebuild_index(self._direct, progress)

    def sessions(self) -> list[Session]:
        """Who works on the repository now, or died at it."""
        return session.sessions(self._context.store)

    def end_session(self, session_id: str) -> str:
        """End a session, by its id or the beginning of it. Returns the id.

        A writer that lives after all is refused at its commit. A collector must be known to be dead, and so must
        whoever left a session that is damaged.
        """
        found = [item for item in session.ids(self._context.store) if item.startswith(session_id)]
        if len(found) != 1:
            raise NotFoundError(f"{self.url} has {len(found)} sessions {session_id!r}")
        session.end_by_id(self._context.store, found[0])
        return found[0]


def _changed(changed: Extents | Iterable[tuple[int, int]]) -> Extents:
    return extents.from_pairs(changed)
