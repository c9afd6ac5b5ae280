"""Live disks and their snapshots, as users hold them. Both are thin: the work is in the kernel (`snapcore.volume`)."""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from snapcore import extents
from snapcore.core import BLOCK_BYTES, LOG_FULL, LogFull
from snapcore.errors import Error, NotFoundError, UsageError
from snapcore.extents import Extents
from snapcore.pages import Failure
from snapcore.pool import transfer
from snapcore.pool.engine import Engine
from snapcore.pool.failures import typed
from snapcore.pool.hydration import Hydration
from snapcore.pool.lazy import LazyImage
from snapcore.pool.transfer import Exported
from snapcore.progress import ProgressCallback
from snapcore.volume import Volume

Result = TypeVar("Result")
_RUNS = 1 << 16
_TRIES = 16
_WHOLE = 1 << 62

# What kernels say to arguments that are none, and that or a failure.
_BAD_ARGUMENTS = (BufferError, OverflowError, TypeError, ValueError)
_REFUSALS = (Failure, *_BAD_ARGUMENTS)


class Allocation(NamedTuple):
    """Where a disk has what: int64 arrays of shape (n, 2), offset and length in bytes, sorted.

    Attributes
    ----------
    allocated
        Blocks of its own or shared; and what was lost to damage, which cannot be read.
    zero
        Dropped, above an image that the disk reads from.
    absent
        Never written: zeros, or what the image has there.
    """

    allocated: Extents
    zero: Extents
    absent: Extents


class Owner(Protocol):
    """What disks and snapshots ask of the pool that they are in (`snapcore.pool.Pool`)."""

    def create_disk(self, name: str, size_bytes: int | None = None, source: Disk | None = None) -> Disk:
        """What `Pool.create_disk` does."""

    def snapshot_group(self, disks: Sequence[Disk], name: str | None = None) -> list[Snapshot]:
        """What `Pool.snapshot_group` does."""

    def rollback_disk(self, disk: Disk, snapshot: SnapshotRef) -> None:
        """What `Disk.rollback` does."""

    def reset_disk(self, disk: Disk) -> None:
        """What `Disk.reset` does."""

    def resize_disk(self, disk: Disk, size_bytes: int) -> None:
        """What `Disk.resize` does."""

    def delete_disk(self, disk: Disk) -> None:
        """What `Disk.delete` does."""

    def delete_snapshot(self, snapshot: Snapshot) -> None:
        """What `Snapshot.delete` does."""

    def hydrate_disk(self, disk: Disk, rate: float | None, *, wait: bool, progress: ProgressCallback | None) -> None:
        """What `Disk.hydrate` does."""

    def decouple_disk(self, disk: Disk, progress: ProgressCallback | None) -> None:
        """What `Disk.decouple` does."""

    def attaching(self, disk: Disk, holder: str) -> contextlib.AbstractContextManager[None]:
        """What `Disk.attached` does."""


class Readable(abc.ABC):
    """What can be read: a disk or a snapshot. It is a `Source` too, so whatever takes images takes it."""

    def __init__(self, pool: Owner, engine: Engine, volume: Volume) -> None:
        self.pool = pool
        self._engine = engine
        self._volume = volume

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What it is called."""

    @property
    def size_bytes(self) -> int:
        """Its length."""
        return self._volume.size_bytes

    @property
    def volume(self) -> Volume:
        """The kernel's side of it, for a server that reads and writes without the interpreter."""
        return self._volume

    def make_room(self, result: int, code: int) -> bool:
        """For such a server, when a write of its failed with a result and an errno: whether it is worth another try."""
        try:
            return self._engine.retry((LogFull if result == LOG_FULL else Failure)(result, code, 0))
        except (Error, Failure):
            return False

    def _what(self) -> str:
        return f"{type(self).__name__.lower()} {self.name!r}"

    def _image(self) -> str:
        # A version that was deleted is not in the catalog any more.
        record = self._engine.catalog.versions.get(self._volume.version)
        if record is None or not record.backing:
            return ""
        image = self._engine.catalog.backings[record.backing]
        return image.path if image.region is None else f"snapshot {image.region.snapshot} in {image.region.url}"

    def _lazy(self) -> LazyImage | None:
        """The image that it reads from, if that fills up from a region."""
        record = self._engine.catalog.versions.get(self._volume.version)
        image = None if record is None else self._engine.catalog.backings.get(record.backing)
        return None if image is None or image.region is None else self._engine.versions.backings.lazy(image.id)

    def _do(self, function: Callable[..., Result], *arguments: object, refusal: BaseException | None = None) -> Result:
        """Call the kernel, or go on from what it answered; make room and try again where that helps."""
        for left in range(_TRIES, -1, -1):
            try:
                if refusal is not None:
                    before, refusal = refusal, None
                    raise before
                return function(*arguments)
            except Failure as failure:
                if left and self._engine.retry(failure):
                    continue
                for argument in arguments:
                    if isinstance(argument, int) and argument < 0:
                        raise UsageError(f"{self._what()}: offset or length {argument} is negative") from None
                with self._engine.reading():
                    image = self._lazy()
                    fetched = "" if image is None else image.error
                    raise typed(failure, self._engine.folder, self._what(), self._image(), fetched) from None
            except _BAD_ARGUMENTS as error:
                raise UsageError(f"{self._what()}: {error}") from None
        raise AssertionError

    def pread_into(self, buffer: Buffer, offset_bytes: int) -> int:
        """Fill a buffer.

        Parameters
        ----------
        buffer : writable bytes-like object
        offset_bytes : int

        Returns
        -------
        int
            Bytes read: less than the buffer only at the end.

        Raises
        ------
        ReadError, DamagedError
            What lies there cannot be read; nothing wrong is handed out.
        SourceChangedError
            The image that it reads from was changed.
        NotFoundError
            It was deleted meanwhile, or the pool was closed.
        """
        try:
            return self._volume.pread_into(buffer, offset_bytes)
        except _REFUSALS as refusal:
            return self._do(self._volume.pread_into, buffer, offset_bytes, refusal=refusal)

    def pread(self, length_bytes: int, offset_bytes: int) -> bytes:
        """Bytes at an offset; fewer at the end."""
        data = bytearray(max(0, min(length_bytes, self.size_bytes - offset_bytes)))
        return bytes(data[: self.pread_into(data, offset_bytes)])

    def pread_many(self, offsets_bytes: npt.NDArray[np.int64], buffers: npt.NDArray[np.uint8]) -> int:
        """Many reads of one length in one call.

        Parameters
        ----------
        offsets_bytes : int64 array of shape (n,)
        buffers : uint8 array of shape (n, length)
            Row i is filled from offset i; all must lie inside.

        Returns
        -------
        int
            Bytes read.
        """
        return self._do(self._volume.pread_many, offsets_bytes, buffers)

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        """Fill `target` (as a `Source`)."""
        if self.pread_into(target, offset_bytes) < len(target):
            raise UsageError(f"{self._what()}: the range from offset {offset_bytes} on is not all inside of it")

    def check_unchanged(self) -> None:  # noqa: B027 - there is nothing to do, for both
        """As a `Source`: a snapshot does not change; who reads a disk that is written takes what comes."""

    def data_extents(self, offset_bytes: int = 0, length_bytes: int | None = None) -> Extents:
        """Where data may be, in all of it or in a range: int64 array of shape (n, 2), offset and length in bytes."""
        allocation = self.extents(offset_bytes, length_bytes)
        if self._image():
            return extents.union(allocation.allocated, allocation.absent)
        return allocation.allocated

    def extents(self, offset_bytes: int = 0, length_bytes: int | None = None) -> Allocation:
        """What is where, from the map alone, in blocks of 4 KiB clipped to the range."""
        stop = self.size_bytes if length_bytes is None else min(self.size_bytes, offset_bytes + length_bytes)
        if not 0 <= offset_bytes <= max(stop, 0):
            raise UsageError(f"{self._what()}: the offset {offset_bytes} is not inside of it")
        at, last = offset_bytes // BLOCK_BYTES, (stop + BLOCK_BYTES - 1) // BLOCK_BYTES
        parts = [np.empty((0, 3), dtype=np.int64)]
        while at < last:
            with self.still():
                runs, at = self._engine.core.page_file.runs(self._root(), at, last, _RUNS)
            parts.append(runs)
        runs = np.concatenate(parts)
        mapped = runs[:, 2] != 1
        allocated = extents.clipped(extents.merged(runs[mapped, :2] * BLOCK_BYTES), offset_bytes, stop)
        zero = extents.clipped(extents.merged(runs[~mapped, :2] * BLOCK_BYTES), offset_bytes, stop)
        both = extents.union(allocated, zero)
        absent = extents.clipped(extents.gaps(both, stop), offset_bytes, stop)
        return Allocation(allocated, zero, absent)

    def export(
        self,
        target: str | os.PathLike[str],
        *,
        in_place: bool = False,
        progress: ProgressCallback | None = None,
        executor: Executor | None = None,
    ) -> Exported:
        """Copy it into a new file, or into an existing file or block device. Durable on return; holes stay holes.

        Of a disk that is written meanwhile a mixture comes out: export a snapshot of it to get an instant.

        Parameters
        ----------
        target : path
        in_place : bool
            The target exists: write only what differs. A file gets this disk's size.
        progress, executor
            As for `Pool.import_image`. After a cancelled or interrupted export, start it again: it goes on.

        Raises
        ------
        ExistsError, NotFoundError, BusyError, RefusedError, UsageError, ReadError, DamagedError, OutOfSpaceError,
        StoreError
        """
        with self._engine.reading() as catalog:
            images = [os.path.join(self._engine.folder, record.path) for record in catalog.backings.values()]
        return transfer.export(
            self,
            target,
            folder=self._engine.folder,
            images=images,
            in_place=in_place,
            progress=progress,
            executor=executor,
        )

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """While the map of this version is walked."""
        with self._engine.still([self._volume.version], self._what()):
            if not self._volume.attached:
                raise NotFoundError(f"{self._what()}: it was deleted or closed")
            yield

    def _root(self) -> int:
        return self._volume.root


class Snapshot(Readable):
    """An immutable point in time of a disk.

    Attributes
    ----------
    id : str
        Decimal digits; never used twice in a pool.
    disk, disk_id : str
        Of the disk that it was cut from, which may be gone.
    created_ns : int
        Since 1970, UTC.
    group : str or None
        Id of the group that it was cut in.
    """

    def __init__(self, pool: Owner, engine: Engine, volume: Volume) -> None:
        super().__init__(pool, engine, volume)
        record = engine.catalog.versions[volume.version]
        self.id = str(record.id)
        self._name = record.name
        self.disk = record.disk_name
        self.disk_id = str(record.disk)
        self.created_ns = record.created_ns
        self.group = str(record.group) if record.group else None

    def __repr__(self) -> str:
        return f"<Snapshot {self.id} {self._name!r} of {self.disk!r}>"

    @property
    def name(self) -> str:
        """As it was cut; the id where it has none."""
        return self._name or self.id

    def delete(self) -> None:
        """Free what only this snapshot holds; no other changes by a byte."""
        self.pool.delete_snapshot(self)


class Disk(Readable):
    """A live disk: read, written, cut, rolled back and cloned, from many threads at once.

    Attributes
    ----------
    id : str
        Decimal digits; never used twice in a pool.
    """

    def __init__(self, pool: Owner, engine: Engine, number: int) -> None:
        try:
            super().__init__(pool, engine, engine.versions.volume_of(number))
            self._name = engine.catalog.disks[number].name
        except KeyError:
            raise NotFoundError(f"disk {number} was deleted meanwhile") from None
        self.id = str(number)
        self._number = number

    def __repr__(self) -> str:
        return f"<Disk {self.id} {self._name!r}>"

    @property
    def name(self) -> str:
        """Unique among the disks of a pool."""
        record = self._engine.catalog.disks.get(self._number)
        if record is not None:
            self._name = record.name
        return self._name

    @property
    def created_ns(self) -> int:
        """When it was made: nanoseconds since 1970, UTC."""
        return self._engine.catalog.disks[self._number].created_ns

    @property
    def origin(self) -> tuple[str, str] | None:
        """What it was made from: "snapshot" or "disk" and id, "image" and path, "region" and where. None: empty."""
        record = self._engine.catalog.disks[self._number]
        if record.origin_kind == "image":
            image = self._engine.catalog.backings[record.origin]
            if image.region is not None:
                return "region", f"{image.region.url}:{image.region.snapshot}"
            return "image", image.path
        return (record.origin_kind, str(record.origin)) if record.origin_kind else None

    def pwrite(self, data: Buffer, offset_bytes: int, *, fua: bool = False) -> int:
        """Write at any offset and length.

        What overlaps a write that is under way waits for it. With `fua` it is durable when this returns, else after the
        next `flush`.

        Returns
        -------
        int
            Bytes written, which is all of them.

        Raises
        ------
        OutOfSpaceError
            The pool's limit or the host's space is used up. Blocks of the range hold old or new bytes, no other
            is touched.
        UsageError
            The range is not inside the disk.
        StoreError
            The pool has stopped writing (see the message), or the medium failed.
        """
        try:
            written = self._volume.pwrite(data, offset_bytes)
        except _REFUSALS as refusal:
            written = self._do(self._volume.pwrite, data, offset_bytes, refusal=refusal)
        if fua:
            self.flush()
        return written

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        """Make a range read as zeros; whole blocks in it give their space back. Cost grows with what was there."""
        self._do(self._volume.zero, offset_bytes, length_bytes)

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """The range is not needed: it reads as zeros from now on, all of it, and gives its space back."""
        self.write_zeroes(offset_bytes, length_bytes)

    def flush(self) -> None:
        """Everything that was written before survives a power cut when this returns."""
        self._engine.commit(f"flushing {self._what()}")

    def snapshot(self, name: str | None = None) -> Snapshot:
        """Cut a snapshot, in constant time. It holds every write that was handed in before and survives a power cut."""
        return self.pool.snapshot_group([self], name)[0]

    def rollback(self, snapshot: SnapshotRef) -> None:
        """Go back to one of this disk's own snapshots, its size with it. All snapshots stay.

        Raises
        ------
        RefusedError
            The snapshot is another disk's.
        BusyError
            Somebody is attached to the disk; the message names them.
        """
        self.pool.rollback_disk(self, snapshot)

    def clone(self, name: str) -> Disk:
        """A new disk with what this one holds now, in constant time, without a snapshot to look after."""
        return self.pool.create_disk(name, source=self)

    def reset(self) -> None:
        """Go back to the snapshot or image that the disk came from, or to empty."""
        self.pool.reset_disk(self)

    def hydration(self) -> Hydration | None:
        """How much is here of the snapshot in a region that it reads from; None where there is none."""
        with self._engine.reading():
            image = self._lazy()
            hydrator = None if image is None else self._engine.versions.backings.hydrator(image.record.id)
            return None if hydrator is None else hydrator.state

    def hydrate(
        self, rate: float | None = None, *, wait: bool = False, progress: ProgressCallback | None = None
    ) -> None:
        """Fetch all that is not here yet, in the background; for all disks from the same snapshot.

        Parameters
        ----------
        rate : float, optional
            Bytes in a second at the most.
        wait : bool
            Return when all is here, and raise when a fetch fails; the background tries again all the same.
        progress : callable, optional
            Gets a `Progress` now and then while one waits; raising there ends the waiting and the fetching.

        Raises
        ------
        StoreError
            A fetch failed while one waited.
        """
        self.pool.hydrate_disk(self, rate, wait=wait, progress=progress)

    def decouple(self, progress: ProgressCallback | None = None) -> None:
        """Fetch all that is not here yet, then forget the region, durably: the disk needs it no more."""
        self.pool.decouple_disk(self, progress)

    def resize(self, size_bytes: int) -> None:
        """Grow; what is new reads as zeros."""
        self.pool.resize_disk(self, size_bytes)

    def delete(self) -> None:
        """Delete the disk; its snapshots stay."""
        self.pool.delete_disk(self)

    @contextlib.contextmanager
    def attached(self, holder: str) -> Iterator[None]:
        """Say who uses the disk: while somebody does, rollback, reset and deletion are refused in their name."""
        with self.pool.attaching(self, holder):
            yield


SnapshotRef = Snapshot | str | int
