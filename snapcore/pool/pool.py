"""A pool: live disks on this host that share blocks with their snapshots (docs/DESIGN.md, "The pool")."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from types import TracebackType
from typing import NamedTuple

import numpy as np

from snapcore import extents
from snapcore.core import BLOCK_BYTES
from snapcore.errors import (
    BusyError,
    NotFoundError,
    RefusedError,
    UnsupportedFormatError,
    UsageError,
    from_os_error,
)
from snapcore.extents import Extents
from snapcore.persist import Medium
from snapcore.pool import changes, events, files, recovery, transfer
from snapcore.pool.catalog import Backing, Catalog, Region, Version
from snapcore.pool.checkpoint import first_map
from snapcore.pool.compact import Compacted, compact
from snapcore.pool.disk import Disk, Readable, Snapshot, SnapshotRef
from snapcore.pool.engine import Engine
from snapcore.pool.holds import key_of
from snapcore.pool.regions import Regions
from snapcore.pool.superblock import Superblock, checksum, new_uuid
from snapcore.pool.usage import PoolUsage, measure
from snapcore.progress import ProgressCallback
from snapcore.source import interface as images
from snapcore.source.formats import RAW
from snapcore.source.image import check_raw

VersionRef = Snapshot | Disk | str | int
Source = Snapshot | Disk | Region | str | os.PathLike[str]

MAX_GROUP = 128
MAX_MADE = 1024
_LOG_BYTES = 8 << 20
_CACHE_BYTES = 256 << 20
_DIFF_RUNS = 1 << 16


class NewDisk(NamedTuple):
    """One of several disks that are made at once.

    Attributes
    ----------
    name : str
    size_bytes : int, optional
        By default that of the source.
    source : Snapshot or Region, optional
        What it holds at first; nothing: an empty disk.
    """

    name: str
    size_bytes: int | None = None
    source: Snapshot | Region | None = None


class Pool:
    """Live disks in one folder, owned by one process. Made by `create` and `open`; a context manager.

    All methods may be called from many threads. Wherever a snapshot is asked for, the object, its id, or its name will
    do if only one has it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._holders: dict[int, Counter[str]] = {}
        self._exclusive: dict[int, str] = {}
        self._holders_lock = threading.Lock()
        self._readers: dict[int, Snapshot] = {}
        self._closed = False

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        limit_bytes: int = 0,
        log_bytes: int = _LOG_BYTES,
        medium: Medium | None = None,
        background: bool = True,
        regions: Regions | None = None,
    ) -> Pool:
        """Make a pool in a folder that is empty or not there, and open it.

        Parameters
        ----------
        path : path
        limit_bytes : int
            How much disks and snapshots may take on this host together; 0 is no limit but the host's.
        log_bytes : int
            Size of the log, 64 KiB at least: a checkpoint comes each time that half of it is used.
        medium, background, regions
            As for `open`.

        Raises
        ------
        ExistsError, OutOfSpaceError, StoreError, UsageError
        """
        if log_bytes < 65536 or log_bytes % 512 or limit_bytes < 0:
            raise UsageError("a log has at least 65,536 bytes, in whole sectors of 512; a limit is not negative")
        uuid = new_uuid()
        seed = int.from_bytes(uuid[:8], "little")
        map_bytes, ref, catalog = first_map(seed)
        superblock = Superblock(
            uuid=uuid,
            generation=1,
            log_sectors=log_bytes // files.SECTOR_BYTES,
            log_next=0,
            commit_number=1,
            catalog_ref=ref,
            catalog_bytes=len(catalog),
            catalog_xxh64=checksum(catalog, seed),
            slots=4,
            end_blocks=0,
            space_root=0,
            limit_bytes=limit_bytes // BLOCK_BYTES * BLOCK_BYTES,
            clean=True,
        )
        files.make(os.fspath(path), medium or Medium(), superblock, map_bytes)
        return cls.open(path, medium=medium, background=background, regions=regions)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        cache_bytes: int = _CACHE_BYTES,
        medium: Medium | None = None,
        background: bool = True,
        regions: Regions | None = None,
    ) -> Pool:
        """Open a pool, recovering what was flushed before a crash.

        Parameters
        ----------
        path : path
        read_only : bool
            Nothing is written, and others may read it too, while nobody owns it.
        cache_bytes : int
            Memory for pages of the maps that are not changed.
        medium : Medium, optional
            Does all persistent operations; tests record them.
        background : bool
            Checkpoints come in time from a thread of the pool's own. Without it they come when the log is full.
        regions : Regions, optional
            Where lazy disks are filled from: `snapcore.service.Regions()`, or your own.

        Raises
        ------
        NotFoundError, BusyError, DamagedError, UnsupportedFormatError, ReadError, OutOfSpaceError
        """
        if np.little_endian is False:
            raise UnsupportedFormatError("pools need a little-endian machine")
        opened_files = files.open_files(os.fspath(path), medium or Medium(), read_only=read_only)
        try:
            opened = recovery.open_state(opened_files, cache_bytes, regions=regions)
            try:
                return cls(Engine(opened_files, opened, read_only=read_only, background=background))
            except BaseException:
                opened.versions.close()
                raise
        except OSError as error:
            opened_files.close()
            raise from_os_error(error, f"opening the pool {os.fspath(path)}") from error
        except BaseException:
            opened_files.close()
            raise

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Flush, write a checkpoint and let go. Reads and writes that are under way are waited for."""
        if not self._closed:
            self._closed = True
            self._engine.close()

    @property
    def id(self) -> str:
        """Its own id, 32 hexadecimal digits. A copy of the folder has the same one."""
        return self._engine.checkpointer.superblock.uuid.hex()

    @property
    def path(self) -> str:
        """The pool's folder."""
        return self._engine.folder

    @property
    def read_only(self) -> bool:
        """Whether it was opened so."""
        return self._engine.read_only

    @property
    def is_whole(self) -> bool:
        """Whether no disk or snapshot needs a region for what it holds."""
        with self._reading() as catalog:
            lazy = [record.id for record in catalog.backings.values() if record.region is not None]
            images = [self._engine.versions.backings.lazy(number) for number in lazy]
        return all(image is not None and image.is_whole for image in images)

    @property
    def limit_bytes(self) -> int:
        """How much disks and snapshots may take together; 0 is no limit. It can be set."""
        return self._engine.limit_bytes

    @limit_bytes.setter
    def limit_bytes(self, limit_bytes: int) -> None:
        """Set it, durably; what is taken already stays."""
        if limit_bytes < 0:
            raise UsageError("a limit is not negative")
        self._writable("setting the limit")
        self._engine.limit_bytes = limit_bytes // BLOCK_BYTES * BLOCK_BYTES
        self._engine.core.limit_blocks = limit_bytes // BLOCK_BYTES
        self.checkpoint()

    # Finding

    def disks(self) -> list[Disk]:
        """All live disks, by name."""
        with self._reading() as catalog:
            records = sorted(catalog.disks.values(), key=lambda record: record.name)
            return [Disk(self, self._engine, record.id) for record in records]

    def open_disk(self, name: str) -> Disk:
        """The disk of a name or id."""
        with self._reading() as catalog:
            for record in catalog.disks.values():
                if name in (record.name, str(record.id)):
                    return Disk(self, self._engine, record.id)
        raise NotFoundError(f"there is no disk {name!r} in {self.path}; `snapcore disk list -p {self.path}` shows all")

    def snapshots(self, disk: Disk | str | None = None) -> list[Snapshot]:
        """All snapshots, or a disk's own, oldest first."""
        number = None if disk is None else int((disk if isinstance(disk, Disk) else self.open_disk(disk)).id)
        with self._reading() as catalog:
            records = [record for record in catalog.of_kind("snapshot") if number is None or record.disk == number]
            return [self._snapshot(record) for record in records]

    def snapshot(self, ref: SnapshotRef) -> Snapshot:
        """The snapshot of an id or of a name that only one has."""
        with self._reading() as catalog:
            return self._snapshot(self._find(catalog, ref))

    def _snapshot(self, record: Version) -> Snapshot:
        found = self._readers.get(record.id)
        if found is None:
            volume = self._engine.versions.open_volume(record.id)
            found = self._readers[record.id] = Snapshot(self, self._engine, volume)
        return found

    def _find(self, catalog: Catalog, ref: SnapshotRef, disk: int | None = None) -> Version:
        """A snapshot's record; names of `disk` go first."""
        if isinstance(ref, Snapshot):
            if ref.pool is not self:
                raise UsageError(f"snapshot {ref.name!r} is of another pool")
            ref = ref.id
        text = str(ref)
        if text.isdecimal():
            record = catalog.versions.get(int(text))
            if record is not None and record.kind == "snapshot":
                return record
        named = [record for record in catalog.of_kind("snapshot") if record.name == text]
        named = [record for record in named if record.disk == disk] or named
        if len(named) == 1:
            return named[0]
        if named:
            ids = ", ".join(f"{record.id} (of {record.disk_name})" for record in named)
            raise UsageError(f"several snapshots are called {text!r}: {ids}; name one by its id")
        raise NotFoundError(
            f"there is no snapshot {text!r} in {self.path}; `snapcore snapshot list -p {self.path}` shows all"
        )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Catalog]:
        self._check_open()
        with self._engine.reading() as catalog:
            yield catalog

    def _check_open(self) -> None:
        if self._closed:
            raise NotFoundError(f"the pool {self.path} is closed")

    def _writable(self, doing: str) -> None:
        if self._closed:
            raise NotFoundError(f"{doing}: the pool {self.path} is closed")
        if self._engine.read_only:
            raise RefusedError(f"{doing}: the pool {self.path} was opened for reading only")

    # Making

    def create_disk(
        self,
        name: str,
        size_bytes: int | None = None,
        source: Source | None = None,
        *,
        image_format: str | None = None,
    ) -> Disk:
        """Make a disk, in constant time.

        Parameters
        ----------
        name : str
            Unique; a letter first.
        size_bytes : int, optional
            By default that of the source.
        source : Snapshot, Disk, Region, str or path, optional
            Nothing: an empty disk. A snapshot or a disk (the object, id or name): what it holds now. A path object or a
            str with the path of a raw image: the disk reads from the image what it has not got itself, so the image
            must stay where and as it is; `import_image` copies instead. A `Region`: what a snapshot in a
            repository holds; it can be used at once, and what is read first is fetched first.
        image_format : str, optional
            "raw": the image is raw whatever its name and its first bytes say.

        Raises
        ------
        ExistsError
            There is a disk of that name.
        RefusedError
            The image is of another format than raw, by its name or its first bytes.
        UsageError
            No size, or one smaller than the source.
        """
        self._writable(f"making disk {name!r}")
        if image_format not in (None, RAW):
            raise UsageError(f"only raw images can be under a disk, not {image_format}; import it instead")
        found = self._source(source)
        if isinstance(found, str) and image_format is None:
            check_raw(found)
        if isinstance(found, Disk):
            return self._clone(found, name, size_bytes)
        if isinstance(found, Region):
            return self._make_lazy(name, size_bytes, found)

        def prepare(catalog: Catalog) -> changes.Prepared[int]:
            changes.check_new_name(catalog, self.path, name)
            if found is None:
                return changes.make_disk(catalog, name, size_bytes)
            if isinstance(found, Snapshot):
                return changes.make_disk_from(catalog, name, size_bytes, self._find(catalog, found), str(source))
            return changes.make_disk_over(catalog, name, size_bytes, found, str(source))

        number = self._engine.change(f"making disk {name!r}", prepare)
        return Disk(self, self._engine, number)

    def create_disks(self, wanted: Sequence[NewDisk]) -> list[Disk]:
        """Make several disks at once, in constant time each: after a crash there are all of them or none.

        Parameters
        ----------
        wanted : sequence of NewDisk
            1 to 1,024. Those that are made from one region share what is fetched.

        Raises
        ------
        ExistsError
            There is a disk of one of the names.
        UsageError
            Two of one name, no size, or one smaller than the source.
        """
        what = f"making {len(wanted)} disks"
        self._writable(what)
        if not 1 <= len(wanted) <= MAX_MADE:
            raise UsageError(f"{what}: 1 to {MAX_MADE} are made at once")
        names = Counter(item.name for item in wanted)
        if len(names) < len(wanted):
            raise UsageError(f"{what}: two are called {names.most_common(1)[0][0]!r}")
        with self._reading() as catalog:
            for item in wanted:
                changes.check_new_name(catalog, self.path, item.name)
        regions = {key_of(item.source): item.source for item in wanted if isinstance(item.source, Region)}
        with contextlib.ExitStack() as pinned:
            # In one order: two that make disks from the same regions do not wait for each other.
            images = {key: pinned.enter_context(self._lazy_image(regions[key], what)) for key in sorted(regions)}
            # Who does not know of images that fill up does not know of this event.
            self._engine.allow_lazy()

            def prepare(catalog: Catalog) -> changes.Prepared[list[int]]:
                made: dict[tuple[str, str], Backing] = {}
                for key, image in images.items():
                    made[key] = image(catalog, 2 * len(wanted) + len(made))
                found: list[changes.Wanted] = []
                for name, size_bytes, source in wanted:
                    changes.check_new_name(catalog, self.path, name)
                    if isinstance(source, Region):
                        found.append((name, size_bytes, made[key_of(source)]))
                    else:
                        found.append((name, size_bytes, None if source is None else self._find(catalog, source)))
                return changes.make_disks(catalog, found)

            numbers = self._engine.change(what, prepare)
        return [Disk(self, self._engine, number) for number in numbers]

    def _make_lazy(self, name: str, size_bytes: int | None, region: Region) -> Disk:
        what = f"making disk {name!r}"
        with self._reading() as catalog:
            changes.check_new_name(catalog, self.path, name)
        with self._lazy_image(region, what) as image:

            def prepare(catalog: Catalog) -> changes.Prepared[int]:
                changes.check_new_name(catalog, self.path, name)
                return changes.make_lazy_disk(catalog, name, size_bytes, image(catalog, 2), region.snapshot)

            number = self._engine.change(what, prepare)
        return Disk(self, self._engine, number)

    @contextlib.contextmanager
    def _lazy_image(self, region: Region, what: str) -> Iterator[Callable[[Catalog, int], Backing]]:
        """What finds or makes the image of a snapshot in a region, behind so many new numbers; pinned meanwhile."""
        backings, holds = self._engine.versions.backings, self._engine.holds
        if backings.regions is None or holds is None:
            raise UsageError(f"{what}: the pool {self.path} was opened without regions")
        source = backings.regions.open(region)
        if not 0 < source.size_bytes <= changes.MAX_SIZE_BYTES:
            raise UsageError(f"{what}: a snapshot of {source.size_bytes} bytes cannot be under a disk")
        self._engine.allow_lazy()

        def image(catalog: Catalog, used: int) -> Backing:
            record = changes.lazy_image(catalog, region, source.size_bytes, used)
            if record.id not in catalog.backings:
                try:
                    backings.make(record, source)
                except OSError as error:
                    raise from_os_error(error, what) from error
            return record

        with holds.pinned(region):
            yield image

    def _source(self, source: Source | None) -> Snapshot | Disk | Region | str | None:
        """A snapshot, a disk, a region, or the path of an image."""
        if source is None or isinstance(source, (Snapshot, Disk, Region)):
            return source
        if not isinstance(source, str):
            return os.fspath(source)
        with contextlib.suppress(NotFoundError):
            return self.snapshot(source)
        with contextlib.suppress(NotFoundError):
            return self.open_disk(source)
        if os.path.exists(source):
            return source
        raise NotFoundError(f"there is no snapshot, disk or image {source!r}")

    def import_image(
        self,
        name: str,
        image: str | os.PathLike[str] | images.Source,
        *,
        size_bytes: int | None = None,
        allow_changing: bool = False,
        progress: ProgressCallback | None = None,
        executor: Executor | None = None,
    ) -> Disk:
        """Copy an image or block device into a new disk. Holes and zero blocks take nothing; durable on return.

        Parameters
        ----------
        name : str
            Of the disk. Until all is there it is called otherwise; a failed or cancelled import leaves none.
        image : path or Source
            A path has the format that its name says, and its first bytes must agree: see `snapcore.open_image`, which
            opens any other. A version of another pool will do too.
        size_bytes : int, optional
            Of the disk, if it shall be longer than the image.
        allow_changing : bool
            Do not mind a raw image that is written meanwhile, or a device that is mounted for writing.
        progress : callable, optional
            Gets a `Progress` for each step; raising there cancels.
        executor : Executor, optional
            Runs the copying; default: a thread a core.

        Raises
        ------
        ExistsError, NotFoundError, BusyError, UsageError, ReadError, SourceChangedError, OutOfSpaceError, StoreError
        """
        self._writable(f"importing disk {name!r}")
        with self._reading() as catalog:
            changes.check_new_name(catalog, self.path, name)
        return transfer.import_image(
            self,
            name,
            image,
            size_bytes=size_bytes,
            allow_changing=allow_changing,
            progress=progress,
            executor=executor,
        )

    def _clone(self, source: Disk, name: str, size_bytes: int | None) -> Disk:
        def prepare(catalog: Catalog) -> changes.Prepared[int]:
            changes.check_new_name(catalog, self.path, name)
            return changes.clone(catalog, self._number(catalog, source), name, size_bytes)

        number = self._engine.change(f"cloning disk {source.name!r}", prepare)
        return Disk(self, self._engine, number)

    def _number(self, catalog: Catalog, disk: Disk) -> int:
        if disk.pool is not self:
            raise UsageError(f"disk {disk.name!r} is of another pool")
        if int(disk.id) not in catalog.disks:
            raise NotFoundError(f"disk {disk.name!r} was deleted")
        return int(disk.id)

    def snapshot_group(self, disks: Sequence[Disk | str], name: str | None = None) -> list[Snapshot]:
        """Snapshots of several disks at one instant: no write that came after one that is missing is in any of them.

        All or nothing, and durable when this returns. Writers wait while the cut is made in memory, readers do not.

        Parameters
        ----------
        disks : sequence of Disk or str
            At most 128.
        name : str, optional
            Of each of the snapshots, and of the group when there are several.

        Returns
        -------
        list of Snapshot
            In the order of `disks`.
        """
        found = [disk if isinstance(disk, Disk) else self.open_disk(disk) for disk in disks]
        what = "cutting " + ", ".join(repr(disk.name) for disk in found[:3]) + (", …" if len(found) > 3 else "")
        self._writable(what)
        if not 1 <= len(found) <= MAX_GROUP or len({disk.id for disk in found}) < len(found):
            raise UsageError(f"a group has 1 to {MAX_GROUP} disks, each once")
        changes.check_name_of_snapshot(name)

        def prepare(catalog: Catalog) -> changes.Prepared[list[int]]:
            return changes.cut(catalog, [self._number(catalog, disk) for disk in found], name)

        versions = self._engine.change(what, prepare)
        with self._reading() as catalog:
            return [self._snapshot(self._find(catalog, version)) for version in versions]

    # Changing

    def rollback_disk(self, disk: Disk, snapshot: SnapshotRef | Region) -> None:
        """What `Disk.rollback` does; or to a snapshot that is only in a region, as a lazy disk."""
        what = f"rolling back disk {disk.name!r}"
        self._writable(what)
        with contextlib.ExitStack() as stack:
            image = stack.enter_context(self._lazy_image(snapshot, what)) if isinstance(snapshot, Region) else None

            def prepare(catalog: Catalog) -> changes.Prepared[None]:
                number = self._number(catalog, disk)
                self._check_free(number, what)
                if image is not None:
                    return changes.roll_back_to(catalog, number, image(catalog, 1))
                assert not isinstance(snapshot, Region)
                return changes.roll_back(catalog, number, self._find(catalog, snapshot, number))

            self._engine.change(what, prepare)
        self._engine.sweep()

    def reset_disk(self, disk: Disk) -> None:
        """What `Disk.reset` does."""
        self._writable(f"resetting disk {disk.name!r}")

        def prepare(catalog: Catalog) -> changes.Prepared[None]:
            number = self._number(catalog, disk)
            self._check_free(number, f"resetting disk {disk.name!r}")
            return changes.reset(catalog, number)

        self._engine.change(f"resetting disk {disk.name!r}", prepare)
        self._engine.sweep()

    def resize_disk(self, disk: Disk, size_bytes: int) -> None:
        """What `Disk.resize` does."""
        self._writable(f"resizing disk {disk.name!r}")

        def prepare(catalog: Catalog) -> changes.Prepared[None]:
            return changes.resize(catalog, self._number(catalog, disk), size_bytes)

        # Behind the old end the last block holds zeros: nobody could write there, not even before a crash.
        self._engine.change(f"resizing disk {disk.name!r}", prepare, hold=True)

    def rename_disk(self, disk: Disk, name: str) -> None:
        """Give a disk another name; its snapshots remember the one that it had."""
        self._writable(f"renaming disk {disk.name!r}")

        def prepare(catalog: Catalog) -> changes.Prepared[None]:
            changes.check_new_name(catalog, self.path, name)
            return events.Rename(self._number(catalog, disk), name), [], None

        self._engine.change(f"renaming disk {disk.name!r}", prepare)

    def hydrate_disk(
        self, disk: Disk, rate: float | None = None, *, wait: bool = False, progress: ProgressCallback | None = None
    ) -> None:
        """What `Disk.hydrate` does."""
        what = f"hydrating disk {disk.name!r}"
        self._writable(what)
        image = disk._lazy()
        if image is None or image.is_whole:
            return
        if self._engine.versions.backings.regions is None:
            raise UsageError(f"{what}: the pool {self.path} was opened without regions")
        self.plan_hydration(disk, rate or 0.0)
        hydrator = self._engine.versions.backings.hydrator(image.record.id)
        if hydrator is not None:
            hydrator.start(rate)
            if wait:
                hydrator.wait(what, progress)

    def plan_hydration(self, disk: Disk, rate: float | None) -> None:
        """Remember, across reopening, whether the rest of a lazy disk shall be fetched; `resume_hydration` does it.

        Parameters
        ----------
        disk : Disk
        rate : float or None
            Bytes in a second, 0 for as fast as it goes; None: not at all, and what runs is stopped.
        """
        what = f"hydrating disk {disk.name!r}"
        self._writable(what)
        if rate is not None and not rate >= 0:
            raise UsageError(f"{what}: a rate is a number of bytes a second, not {rate}")
        image, holds = disk._lazy(), self._engine.holds
        if image is None or holds is None:
            return
        holds.wish(image.region, rate)
        hydrator = self._engine.versions.backings.hydrator(image.record.id)
        if rate is None and hydrator is not None:
            hydrator.stop()

    def resume_hydration(self) -> None:
        """Go on with what was planned before the pool was opened, in the background."""
        self._writable("hydrating disks")
        backings, holds = self._engine.versions.backings, self._engine.holds
        wishes = {} if holds is None else holds.wishes()
        with self._reading() as catalog:
            records = [*catalog.backings.values()]
        for record in records:
            image, hydrator = backings.lazy(record.id), backings.hydrator(record.id)
            if record.region is None or image is None or hydrator is None or image.is_whole:
                continue
            rate = wishes.get(key_of(record.region))
            if rate is not None and not hydrator.state.running:
                hydrator.start(rate or None)

    def decouple_disk(self, disk: Disk, progress: ProgressCallback | None = None) -> None:
        """What `Disk.decouple` does."""
        what = f"decoupling disk {disk.name!r}"
        self.hydrate_disk(disk, wait=True, progress=progress)
        self._writable(what)
        image = disk._lazy()
        if image is None:
            return
        try:
            image.save()
            image.seal()
        except OSError as error:
            raise from_os_error(error, what) from error
        number = image.record.id

        def prepare(catalog: Catalog) -> changes.Prepared[None]:
            if number not in catalog.backings:
                raise NotFoundError(f"{what}: it was deleted meanwhile")
            return events.Decouple(number), [], None

        self._engine.change(what, prepare)
        # From here on the log tells nothing of a region, and what says that something is here is not looked at.
        self._engine.checkpoint()

    # Deleting

    def delete_disk(self, disk: Disk | str) -> None:
        """Delete a disk (the object, id or name); its snapshots stay, and remember it."""
        found = disk if isinstance(disk, Disk) else self.open_disk(disk)
        self._writable(f"deleting disk {found.name!r}")

        def prepare(catalog: Catalog) -> changes.Prepared[None]:
            number = self._number(catalog, found)
            self._check_free(number, f"deleting disk {found.name!r}")
            return events.DeleteDisk(number), [number], None

        self._engine.change(f"deleting disk {found.name!r}", prepare)
        self._engine.sweep()

    def delete_snapshot(self, snapshot: SnapshotRef) -> None:
        """Delete a snapshot, the first, a middle or the last one: what only it holds is freed, nothing else changes."""
        self.delete_snapshots([snapshot])

    def delete_snapshots(self, snapshots: Iterable[SnapshotRef]) -> None:
        """Delete several at once, all or nothing."""
        refs = [*snapshots]
        self._writable("deleting snapshots")
        if not refs:
            return

        def prepare(catalog: Catalog) -> changes.Prepared[list[int]]:
            return changes.delete(catalog, {self._find(catalog, ref).id for ref in refs})

        self._engine.change("deleting snapshots", prepare, self._detach_readers)
        self._engine.sweep()

    def _detach_readers(self, versions: list[int]) -> None:
        """Nobody reads these snapshots any more, before others use their blocks."""
        for version in versions:
            reader = self._readers.pop(version, None)
            if reader is not None:
                reader._volume.detach()

    # Asking

    def diff(self, a: VersionRef | None, b: VersionRef, start: int = 0, stop: int | None = None) -> Extents:
        """Where two versions of a family differ, from the map alone; exact to the block of 4 KiB.

        Parameters
        ----------
        a, b : Snapshot, Disk, or the id or name of one
            `a` None: everything that `b` has.
        start, stop : int
            Only this part, in bytes.

        Returns
        -------
        int64 array of shape (n, 2)
            Offset and length in bytes, sorted.
        """
        return extents.merged(np.concatenate([np.empty((0, 2), np.int64), *self.diff_parts(a, b, start, stop)]))

    def diff_parts(
        self, a: VersionRef | None, b: VersionRef, start: int = 0, stop: int | None = None
    ) -> Iterator[Extents]:
        """`diff` in parts of at most 65,536 extents, which take no more memory than that; go on at any `start`."""
        if start < 0:
            raise UsageError(f"the differences from offset {start} on: an offset is not negative")
        one = None if a is None else self._version(a)
        two = self._version(b)
        end = max(two.size_bytes, one.size_bytes if one is not None else 0)
        end = end if stop is None else min(end, stop)
        with self._reading() as catalog:
            families = {catalog.family(_at(catalog, version)) for version in (one or two, two)}
            if one is not None and len(families) > 1:
                raise UsageError(
                    f"{one.name!r} and {two.name!r} are of no common origin; compare what they hold instead"
                )
        at, last = start // BLOCK_BYTES, (end + BLOCK_BYTES - 1) // BLOCK_BYTES
        pages = self._engine.core.page_file
        while at < last:
            with two.still(), one.still() if one is not None else contextlib.nullcontext():
                root = one._root() if one is not None else 0
                runs, at = pages.difference(root, two._root(), at, last, _DIFF_RUNS)
            yield extents.clipped(runs * BLOCK_BYTES, start, end)

    def relatives(self, ref: VersionRef) -> list[Snapshot]:
        """All snapshots that `diff` can compare a version with: those of a common origin, oldest first."""
        version = self._version(ref)
        with self._reading() as catalog:
            families = catalog.families()
            own = families[_at(catalog, version)]
            return [self._snapshot(record) for record in catalog.of_kind("snapshot") if families[record.id] == own]

    def related(self, a: VersionRef, b: VersionRef) -> bool:
        """Whether two versions are of a common origin."""
        one, two = self._version(a), self._version(b)
        with self._reading() as catalog:
            return catalog.family(_at(catalog, one)) == catalog.family(_at(catalog, two))

    def _version(self, ref: VersionRef) -> Readable:
        if isinstance(ref, (Snapshot, Disk)):
            if ref.pool is not self:
                raise UsageError(f"{ref.name!r} is of another pool")
            return ref
        with contextlib.suppress(NotFoundError):
            return self.snapshot(ref)
        with contextlib.suppress(NotFoundError):
            return self.open_disk(str(ref))
        raise NotFoundError(f"there is no snapshot or disk {ref!r} in {self.path}")

    def usage(self) -> PoolUsage:
        """What disks, snapshots and the pool take. Cost grows with what each version has of its own; writers wait."""
        self._check_open()
        self._engine.sweep()
        with self._reading() as catalog, self._engine.still(catalog.versions):
            return measure(self._engine)

    def unique_bytes(self, versions: Iterable[VersionRef]) -> int:
        """What would be free if all of these were deleted."""
        self._check_open()
        found = [self._version(ref) for ref in versions]
        self._engine.sweep()
        with self._reading() as catalog, self._engine.still(catalog.versions):
            return self._engine.versions.unique_blocks([_at(catalog, one) for one in found]) * BLOCK_BYTES

    def flush(self) -> None:
        """Everything that was written to any disk before survives a power cut when this returns."""
        self._writable("flushing")
        self._engine.commit("flushing")

    def checkpoint(self) -> None:
        """Write the maps, free what is free for good, and begin the log anew. Comes by itself in time."""
        self._writable("writing a checkpoint")
        self._engine.sweep()
        self._engine.checkpoint()

    def compact(self) -> Compacted:
        """Give back to the host what the pool does not use. Writes wait meanwhile."""
        self._writable("compacting")
        return compact(self._engine)

    # Who uses what

    def reader_of(self, path: str | os.PathLike[str]) -> str | None:
        """Who would read other bytes if a file were written: a disk or snapshot over it, the pool itself, or None."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        with self._reading() as catalog:
            images = {record.id: os.path.join(self.path, record.path) for record in catalog.backings.values()}
            versions = [record for record in catalog.versions.values() if record.backing]
            over = [(catalog.disks.get(record.disk), record) for record in versions]
        for disk, record in over:
            if _is_same_file(found, images[record.backing]):
                if disk is not None:
                    return f"disk {disk.name!r}"
                return f"snapshot {record.name or record.id} of disk {record.disk_name!r}"
        own = (os.path.join(self.path, name) for name in os.listdir(self.path))
        return f"the pool {self.path}" if any(_is_same_file(found, file) for file in own) else None

    @contextlib.contextmanager
    def attaching(self, disk: Disk, holder: str) -> Iterator[None]:
        """What `Disk.attached` does."""
        number = int(disk.id)
        with self._holders_lock:
            if number in self._exclusive:
                raise BusyError(
                    f"attaching to disk {disk.name!r}: it is in use by {self._exclusive[number]}; wait for that"
                )
            self._holders.setdefault(number, Counter())[holder] += 1
        try:
            yield
        finally:
            with self._holders_lock:
                self._holders[number][holder] -= 1
                self._holders[number] += Counter()

    @contextlib.contextmanager
    def holding(self, disks: Sequence[Disk], holder: str) -> Iterator[None]:
        """Have disks for oneself alone: BusyError when somebody is attached to one, and nobody can meanwhile."""
        numbers = [int(disk.id) for disk in disks]
        with self._holders_lock:
            for disk, number in zip(disks, numbers, strict=True):
                self._refuse_holders(number, f"{holder}: disk {disk.name!r}")
            self._exclusive |= dict.fromkeys(numbers, holder)
        try:
            yield
        finally:
            with self._holders_lock:
                for number in numbers:
                    del self._exclusive[number]

    def _check_free(self, disk: int, doing: str) -> None:
        with self._holders_lock:
            self._refuse_holders(disk, doing)

    def _refuse_holders(self, disk: int, doing: str) -> None:
        holders = sorted(self._holders.get(disk, ()))
        holders += [self._exclusive[disk]] if disk in self._exclusive else []
        if holders:
            raise BusyError(f"{doing}: it is in use by {', '.join(holders)}; disconnect there first")


def _at(catalog: Catalog, version: Readable) -> int:
    """The number of a version that is still there."""
    record = catalog.versions.get(version._volume.version)
    if record is None or record.kind == "ghost":
        raise NotFoundError(f"{version._what()}: it was deleted")
    return record.id


def _is_same_file(status: os.stat_result, path: str) -> bool:
    try:
        return os.path.samestat(status, os.stat(path))
    except (OSError, ValueError):
        # ValueError: no file has such a name.
        return False
