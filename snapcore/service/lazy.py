"""Joins a pool's lazy disks to the repositories that they are filled from (docs/DESIGN.md, "Lazy disks")."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence

import blake3
import platformdirs

from snapcore.errors import LockedError, NotFoundError, RefusedError, UsageError
from snapcore.extents import Extents
from snapcore.keys import Holder
from snapcore.parallel import Daemons
from snapcore.pool import Disk, Pool, Region, RegionEvent, Snapshot
from snapcore.repository import Repository, SnapshotReader
from snapcore.service.base import origin_of, origin_prefix

_FETCHES = 16
_PIN_CONTEXT = "snapcore 2026 pin"
_NO_PLACES = ("s3", "memory")
_log = logging.getLogger("snapcore.service")


class RegionSnapshot:
    """A snapshot that a lazy disk is filled from, as a `Source`.

    Attributes
    ----------
    trace_path : str
        Where this host keeps what disks from it read first, for all its pools.
    """

    def __init__(self, reader: SnapshotReader, trace_path: str) -> None:
        self._reader = reader
        self.trace_path = trace_path

    @property
    def name(self) -> str:
        """For messages."""
        return self._reader.name

    @property
    def size_bytes(self) -> int:
        """Length of the disk."""
        return self._reader.size_bytes

    def data_extents(self) -> Extents:
        """Where it is not zero."""
        return self._reader.data_extents()

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        """Fill `target`; all requests that it takes are made at once."""
        self._reader.read_into(target, offset_bytes)

    def check_unchanged(self) -> None:
        """A snapshot never changes."""


class Regions:
    """The repositories that lazy disks of pools are filled from: give one to `Pool.open` and `Pool.create`.

    Each repository is opened when it is needed first, and stays open. Safe from many threads.

    Parameters
    ----------
    keys : sequence of Holder
        Unlock what they open in any of the repositories.
    on_event : callable, optional
        Gets a `RegionEvent` each time that a request of a guest fails, and when the region is back; from any thread.
    open_repository : callable, optional
        Gives the repository of a URL; default: `Repository.open`.
    """

    def __init__(
        self,
        keys: Sequence[Holder] = (),
        *,
        on_event: Callable[[RegionEvent], None] | None = None,
        open_repository: Callable[[str], Repository] = Repository.open,
    ) -> None:
        self._keys = keys
        self._on_event = on_event
        self._open_repository = open_repository
        self._lock = threading.Lock()
        self._opening: dict[str, threading.Lock] = {}
        self._open: dict[str, Repository] = {}
        self._hands = Daemons(_FETCHES, "snapcore-region")

    def find(self, text: str) -> Region | None:
        """What `REPO:SNAPSHOT` names; None when the part before the last colon is no repository."""
        place, colon, snapshot = text.rpartition(":")
        if not colon or not place or place in _NO_PLACES:
            return None
        try:
            found = self._repository(place)
        except NotFoundError:
            return None
        if not snapshot:
            raise UsageError(f"{text!r} names no snapshot behind the colon")
        return Region(found.url, found.id, found.find(snapshot).id, found.chunk_bytes)

    def find_own(self, text: str, pool: Pool, disk: Disk) -> Region | Snapshot | None:
        """What `REPO:SNAPSHOT` names, of this disk: in the pool, if it is there too, else in the region.

        Raises
        ------
        RefusedError
            It is of another disk, or a copy.
        """
        region = self.find(text)
        if region is None:
            return None
        found = self._of(region).find(region.snapshot)
        known = {item.disk for item in pool.snapshots(disk)} | {disk.name}
        local = [item for item in pool.snapshots() if origin_of(pool, item) == found.origin]
        of_pool = found.copied is None and (found.origin or "").startswith(origin_prefix(pool))
        if not of_pool or (found.disk not in known if not local else local[0].disk_id != disk.id):
            raise RefusedError(
                f"snapshot {found.id} in {region.url} was not cut from disk {disk.name!r} of {pool.path}; make a new "
                "disk from it instead"
            )
        return local[0] if local else region

    def open(self, region: Region) -> RegionSnapshot:
        """The snapshot that a region names, its map first: the next read fetches what it asks for and nothing else."""
        found = self._of(region)
        reader = found.open_snapshot(region.snapshot, hands=self._hands if found.is_far else None)
        reader.load_map()
        folder = platformdirs.user_cache_path("snapcore") / "traces"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        return RegionSnapshot(reader, str(folder / f"{region.repository}-{region.snapshot}"))

    def pin(self, region: Region, pool_id: str, who: str) -> None:
        """Keep the snapshot from being deleted by mistake; see `Repository.pin`."""
        self._of(region).pin(region.snapshot, who, pin_id=_pin_id(region, pool_id))

    def unpin(self, region: Region, pool_id: str) -> None:
        """What `pin` did is not needed any more."""
        try:
            found = self._of(region)
        except NotFoundError as error:
            # It was removed, or another one is there now: nothing of it is pinned.
            _log.warning("a pin on snapshot %s was not taken back: %s", region.snapshot, error)
            return
        found.unpin(region.snapshot, _pin_id(region, pool_id))

    def tell(self, event: RegionEvent) -> None:
        """Hand an event on."""
        if self._on_event is not None:
            self._on_event(event)

    def _of(self, region: Region) -> Repository:
        found = self._repository(region.url)
        if found.id != region.repository:
            with self._lock:
                self._open.pop(region.url, None)
            raise NotFoundError(f"{region.url} is another repository now: {found.id}, not {region.repository}")
        return found

    def _repository(self, place: str) -> Repository:
        with self._lock:
            opening = self._opening.setdefault(place, threading.Lock())
        # Who needs another repository does not wait for this one.
        with opening:
            found = self._open.get(place)
            if found is None:
                found = self._open_repository(place)
                for holder in self._keys:
                    # It may be for another one; what stays locked says so when it is asked for.
                    with contextlib.suppress(LockedError):
                        found.unlock(holder)
                self._open[place] = found
            return found


def _pin_id(region: Region, pool_id: str) -> str:
    """One a pool and snapshot; it tells nobody which snapshots are of one pool."""
    words = f"{pool_id}:{region.repository}:{region.snapshot}".encode()
    return blake3.blake3(words, derive_key_context=_PIN_CONTEXT).hexdigest(16)
