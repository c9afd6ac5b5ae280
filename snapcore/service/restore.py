"""Archived snapshots into disks of a pool: a new disk, or what differs into one that is there (docs/DESIGN.md)."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass

from snapcore import scan
from snapcore.errors import Error, ExistsError, RefusedError
from snapcore.extents import Extents, empty, total_bytes
from snapcore.pool import Disk, Pool
from snapcore.progress import ProgressCallback
from snapcore.repository import Manifest, Repository
from snapcore.service.tiers import PAGE_BYTES, Local, Remote, across

PARTIAL = ".snapcore-restore"
_NAME_LETTERS = 128


@dataclass(frozen=True, slots=True)
class RestoredDisk:
    """What a restore into a pool did.

    Attributes
    ----------
    disk : Disk
    written_bytes : int
    looked_at_bytes : int or None
        How much of the disk was compared; None: all of it, for nothing told what may differ.
    duration_s : float
    """

    disk: Disk
    written_bytes: int
    looked_at_bytes: int | None
    duration_s: float


class DiskTarget:
    """A disk of a pool as a `Target`."""

    def __init__(self, disk: Disk, *, fresh: bool) -> None:
        self.fresh = fresh
        self.written_bytes = 0
        self._disk = disk
        self._lock = threading.Lock()

    def data_extents(self) -> Extents:
        """What of it may be other than zero."""
        return empty() if self.fresh else self._disk.data_extents()

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        """Fill `target` with what stands there now."""
        self._disk.read_into(target, offset_bytes)

    def write_data(self, data: memoryview, offset_bytes: int) -> None:
        """Write the pages of `data` that are not zero."""
        for start, length in scan.nonzero_extents(data, PAGE_BYTES).tolist():
            self._disk.pwrite(data[start : start + length], offset_bytes + start)
            self._count(length)

    def write_change(self, old: memoryview, new: memoryview, offset_bytes: int) -> None:
        """Write the pages in which `new` differs from `old`; zeros give their space back."""
        for start, length in scan.differing_extents(old, new, PAGE_BYTES).tolist():
            part = new[start : start + length]
            for zero_start, zero_length in scan.zero_extents(part, PAGE_BYTES).tolist():
                self._disk.write_zeroes(offset_bytes + start + zero_start, zero_length)
                self._count(zero_length)
            self.write_data(part, offset_bytes + start)

    def _count(self, count_bytes: int) -> None:
        with self._lock:
            self.written_bytes += count_bytes


def into_new_disk(
    pool: Pool, name: str, repository: Repository, snapshot: Manifest, progress: ProgressCallback | None = None
) -> RestoredDisk:
    """Make a disk that holds an archived snapshot. It has another name until all is there, and is durable on return.

    Raises
    ------
    ExistsError
        There is a disk of that name.
    BusyError
        Another restore makes it.
    DamagedError, OutOfSpaceError, StoreError
    """
    if any(disk.name == name for disk in pool.disks()):
        raise ExistsError(
            f"there is a disk {name!r} in {pool.path} already; give --in-place to write what differs into it"
        )
    unfinished = name[: _NAME_LETTERS - len(PARTIAL)] + PARTIAL
    for left in pool.disks():
        if left.name == unfinished:
            # Of a restore that a crash ended; one that is under way holds its disk.
            pool.delete_disk(left)
    disk = pool.create_disk(unfinished, snapshot.size_bytes)
    try:
        with disk.attached(f"the restore of {snapshot.id}"):
            target = DiskTarget(disk, fresh=True)
            done = repository.fill(snapshot, target, progress=progress)
            disk.flush()
            pool.rename_disk(disk, name)
    except BaseException:
        # What went wrong first counts.
        with contextlib.suppress(Error):
            pool.delete_disk(disk)
        raise
    return RestoredDisk(disk, target.written_bytes, None, done.duration_s)


def into_disk(
    pool: Pool, disk: Disk, repository: Repository, snapshot: Manifest, progress: ProgressCallback | None = None
) -> RestoredDisk:
    """Make a disk hold an archived snapshot, writing only what differs. Durable on return.

    Nobody may be attached to the disk. It grows to the snapshot's size. After an error or a crash it holds a mixture:
    start again, or roll it back.

    Raises
    ------
    BusyError
        Somebody is attached to the disk.
    RefusedError
        The disk is longer than the snapshot.
    DamagedError, OutOfSpaceError, StoreError
    """
    if disk.size_bytes > snapshot.size_bytes:
        raise RefusedError(
            f"disk {disk.name!r} has {disk.size_bytes} bytes and snapshot {snapshot.id} {snapshot.size_bytes}: a disk "
            "does not become shorter; restore to a new disk, or roll back to a local snapshot"
        )
    with pool.holding([disk], f"the restore of {snapshot.id}"):
        within = across(Local(disk, pool), Remote(snapshot, repository))
        if disk.size_bytes < snapshot.size_bytes:
            disk.resize(snapshot.size_bytes)
        target = DiskTarget(disk, fresh=False)
        done = repository.fill(snapshot, target, within=within, progress=progress)
        disk.flush()
    looked_at = None if within is None else total_bytes(within)
    return RestoredDisk(disk, target.written_bytes, looked_at, done.duration_s)
