"""An open pool at work: changes of versions, commits, checkpoints, sweeps, and the thread that does them in time.

Locks, in the order in which they are taken: `_checkpoint_lock`, `_lock` (versions), gates of heads, the kernel's mutex.
A change of versions is: prepare (may refuse), close gates, log the event, apply it, open gates; then commit. Versions
that became ghosts are swept only after that commit (DESIGN, Durability, 5).
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from snapcore import log, space
from snapcore.core import LIMIT_REACHED, WRITE_FAILED, Core, LogFull
from snapcore.errors import Error, NotFoundError, StoreError, from_os_error
from snapcore.pages import NO_SPACE, Failure
from snapcore.pool import events
from snapcore.pool.backings import Leaving
from snapcore.pool.catalog import Catalog
from snapcore.pool.failures import typed
from snapcore.pool.files import Files
from snapcore.pool.holds import Holds
from snapcore.pool.recovery import Opened
from snapcore.pool.superblock import LAZY
from snapcore.volume import Volume, close_gates, open_gates

Result = TypeVar("Result")
_KEEPER_PERIOD_S = 0.25
# How often a change is tried again when others fill the log at the same time.
_TRIES = 16


class Engine:
    """A pool in memory and its files.

    Attributes
    ----------
    limit_bytes : int
        Of used blocks; 0 is none.
    holds : Holds or None
        What it wants of regions; None when it was opened for reading only.
    """

    def __init__(self, files: Files, opened: Opened, *, read_only: bool, background: bool) -> None:
        self.files = files
        self.versions = opened.versions
        self.core: Core = opened.versions.core
        self.checkpointer = opened.checkpointer
        self.read_only = read_only
        self.limit_bytes = opened.checkpointer.superblock.limit_bytes
        self.checkpoints = 0
        self._lock = threading.RLock()
        self._checkpoint_lock = threading.RLock()
        self._fresh_ghosts: set[int] = set()
        self._stop = threading.Event()
        self._keeper: threading.Thread | None = None
        self._closed = False
        self.holds: Holds | None = None
        if not read_only:
            self.checkpointer.keep_back(self.core)
            self._begin(opened)
            pool_id, regions = opened.checkpointer.superblock.uuid.hex(), self.versions.backings.regions
            self.holds = Holds(files.folder, pool_id, files.medium, regions, self.versions.regions_needed)
            if background:
                self._keeper = threading.Thread(target=self._keep, name="snapcore-pool", daemon=True)
                self._keeper.start()

    def _begin(self, opened: Opened) -> None:
        """From now on the log counts."""
        self._begin_log(opened)
        self.versions.backings.remove_unknown(self.catalog.backings.values())

    def _begin_log(self, opened: Opened) -> None:
        try:
            if opened.checkpointer.superblock.clean and not opened.damaged_copies:
                self.checkpointer.reopen(self.versions)
                return
            self.checkpointer.settle(self.core)
        except OSError as error:
            raise from_os_error(error, f"opening the pool {self.files.folder}") from error
        # Neither the log nor a checkpoint that came while others wrote tells which ghosts lost a block to a child.
        for record in self.catalog.of_kind("ghost"):
            record.stirred = True
        self.checkpoint()

    @property
    def folder(self) -> str:
        """Of the pool."""
        return self.files.folder

    @property
    def catalog(self) -> Catalog:
        """Records; to be read under `reading`."""
        return self.versions.catalog

    @contextlib.contextmanager
    def reading(self, what: str = "") -> Iterator[Catalog]:
        """Hold versions still, and turn failures into typed errors."""
        with self._lock:
            try:
                yield self.versions.catalog
            except Failure as failure:
                raise typed(failure, self.folder, what or self.folder) from None

    @contextlib.contextmanager
    def still(self, versions: Iterable[int], what: str = "") -> Iterator[None]:
        """Hold versions still, and writers to heads among them: their roots stay good while a walk uses them."""
        with self.reading(what):
            self._check_open(what or "looking at a map")
            gates = self.versions.heads_beside(versions)
            close_gates(gates)
            try:
                yield
            finally:
                open_gates(gates)

    def change(
        self,
        what: str,
        prepare: Callable[[Catalog], tuple[events.Event, Sequence[int], Result]],
        settle: Callable[[Result], None] | None = None,
        *,
        hold: bool = False,
    ) -> Result:
        """Change versions durably.

        Parameters
        ----------
        what : str
            For messages.
        prepare : callable
            Gets the catalog; returns the event, the disks whose writers must wait, and the result. It is called anew
            when the log was full.
        settle : callable, optional
            Gets the result when the change is durable, before anybody may sweep what it made a ghost.
        hold : bool
            Writers wait until the change is durable: what they write in place would outlive a crash that undoes it.
        """
        held: list[Volume] = []
        try:
            return self._change(what, prepare, settle, held if hold else None)
        finally:
            open_gates(held)

    def _change(
        self,
        what: str,
        prepare: Callable[[Catalog], tuple[events.Event, Sequence[int], Result]],
        settle: Callable[[Result], None] | None,
        held: list[Volume] | None,
    ) -> Result:
        """What `change` does. Gates that stay closed are added to `held`."""
        for _ in range(_TRIES):
            with self._lock:
                self._check_open(what)
                event, disks, result = prepare(self.catalog)
                ghosts = self._ghosts_of(event)
                volumes = [self.versions.volume_of(disk) for disk in disks]
                if held is not None:
                    close_gates(volumes)
                    held += volumes
                if self._log_and_apply(event, volumes, what):
                    self._fresh_ghosts |= ghosts
                    break
            self.checkpoint()
        else:
            raise StoreError(f"{what}: the log of {self.folder} is full each time; try again when less is written")
        self.commit(what)
        with self._lock:
            if settle is not None:
                settle(result)
            self._fresh_ghosts -= ghosts
        return result

    def _ghosts_of(self, event: events.Event) -> set[int]:
        """Versions that an event makes ghosts."""
        match event:
            case events.Delete():
                return set(event.versions)
            case events.DeleteDisk() | events.Rehead():
                return {self.catalog.disks[event.disk].head}
        return set()

    def _log_and_apply(self, event: events.Event, gates: Sequence[Volume], what: str) -> bool:
        """False when the log is full."""
        close_gates(gates)
        try:
            log.append_event(self.core, events.encode(event))
            self.versions.apply(event)
        except LogFull:
            return False
        except Failure as failure:
            raise typed(failure, self.folder, what) from None
        finally:
            open_gates(gates)
        return True

    def commit(self, what: str) -> None:
        """Everything that was done before is durable."""
        self._check_open(what)
        for _ in range(_TRIES):
            try:
                log.commit(self.core)
            except LogFull:
                self.checkpoint()
            except Failure as failure:
                raise typed(failure, self.folder, what) from None
            else:
                return
        raise StoreError(f"{what}: the log of {self.folder} is full each time; try again when less is written")

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise NotFoundError(f"{what}: the pool {self.folder} is closed")

    def allow_lazy(self) -> None:
        """From now on there may be images that fill up: who does not know of them must not open the pool."""
        with self._checkpoint_lock:
            if not self.checkpointer.must_read & LAZY:
                self.checkpointer.must_read |= LAZY
                self.checkpoint()

    def checkpoint(self, *, clean: bool = False) -> None:
        """Bring the map file up to date; the log begins anew."""
        what = f"writing a checkpoint of the pool {self.folder}"
        backings = self.versions.backings
        leaving: list[Leaving] = []
        with self._checkpoint_lock:
            self._check_open(what)
            try:
                with self._lock:
                    frozen = self.checkpointer.freeze(self.versions)
                    leaving = backings.take_leaving()
                    if clean and not any(record.is_own for record in self.catalog.backings.values()):
                        self.checkpointer.must_read &= ~LAZY
                self.checkpointer.write(self.versions, frozen, self.limit_bytes, clean=clean)
            except (OSError, Failure) as error:
                backings.keep_leaving(leaving)
                # What is free for good is given back to the host, so that the next one may have more luck.
                space.reclaim(self.core)
                if isinstance(error, OSError):
                    raise from_os_error(error, what) from error
                raise typed(error, self.folder, what) from None
            self.checkpoints += 1
            # It waits for who reads, of images too.
            space.reclaim(self.core)
            backings.release(leaving)
        if self.holds is not None:
            self.holds.settle()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """A moment in which every block and slot is either used or free: after a checkpoint, without a write."""
        with self._checkpoint_lock, self._lock:
            gates = [*self.versions.volumes.values()]
            close_gates(gates)
            try:
                self.checkpoint()
                yield
            finally:
                open_gates(gates)

    def retry(self, failure: Failure) -> bool:
        """Make room for a write that had none; whether it is worth trying again."""
        if isinstance(failure, LogFull):
            self.checkpoint()
            return True
        if failure.result == LIMIT_REACHED or (
            failure.result in (WRITE_FAILED, NO_SPACE) and failure.code == errno.ENOSPC
        ):
            core = self.core
            waiting, taken = bool(core.held_blocks or core.reclaimable), core.used_blocks + core.held_blocks
            self.sweep()
            self.commit("making room")
            space.reclaim(core)
            return waiting or core.used_blocks + core.held_blocks < taken
        if failure.result == NO_SPACE:
            free_slots = self.core.page_file.free_slots
            self.sweep()
            self.checkpoint()
            return self.core.page_file.free_slots > free_slots
        return False

    def sweep(self) -> None:
        """Free what only ghosts hold. What the map has no space for stays for the next time."""
        if self.read_only:
            return
        for _ in range(_TRIES):
            try:
                if self._sweep_all():
                    return
            except Failure as failure:
                if failure.result == NO_SPACE:
                    return
                raise typed(failure, self.folder, f"sweeping the pool {self.folder}") from None
            self.checkpoint()

    def _sweep_all(self) -> bool:
        """False when the log is full."""
        with self._lock:
            while not self._closed and (version := self._next_to_sweep()):
                inside, beside = self.catalog.part([version])
                gates = self.versions.heads_beside([*inside, *beside])
                close_gates(gates)
                try:
                    plan = self.versions.plan_sweep(version)
                    try:
                        log.append_event(self.core, events.encode(events.Sweep(version)))
                    except Failure:
                        self.versions.drop_plan(plan, version)
                        raise
                    self.versions.sweep(plan)
                except LogFull:
                    return False
                finally:
                    open_gates(gates)
        return True

    def _next_to_sweep(self) -> int:
        """A ghost in whose part all deletions are durable, or 0. Each part is looked at once."""
        seen: set[int] = set()
        for version in self.versions.stirred():
            if version not in seen:
                inside, _ = self.catalog.part([version])
                if self._fresh_ghosts.isdisjoint(inside):
                    return version
                seen.update(inside)
        return 0

    def _keep(self) -> None:
        half = self.checkpointer.superblock.log_sectors // 2
        while not self._stop.wait(_KEEPER_PERIOD_S):
            self.versions.backings.keep()
            if self.core.failed:
                continue
            # A failure shows again, and to somebody, at the next write or flush.
            with contextlib.suppress(Error, Failure, MemoryError):
                if self.core.log_free_sectors < half or self.core.pending_bytes > half * 256:
                    self.sweep()
                    self.checkpoint()
                elif self.core.reclaimable:
                    space.reclaim(self.core)

    def close(self) -> None:
        """Make everything durable and let go of the files. After a failure nothing is written."""
        self._stop.set()
        if self._keeper is not None:
            self._keeper.join()
        self.versions.backings.stop()
        # Nothing may come behind the last checkpoint, which says that the log holds nothing.
        with self._checkpoint_lock, self._lock:
            for volume in [*self.versions.volumes.values()]:
                volume.detach()
            try:
                if not self.read_only and not self.core.failed:
                    self.sweep()
                    self.checkpoint(clean=True)
                self.versions.backings.save()
                if self.holds is not None:
                    self.holds.wait()
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Let go of the files without writing anything, as a crash would."""
        self._stop.set()
        if self._keeper is not None:
            self._keeper.join()
        if self.holds is not None:
            self.holds.close()
        with self._checkpoint_lock, self._lock:
            self._closed = True
            # Descriptors may be another file's from here on.
            self.core.close()
            self.versions.close()
            self.files.close()
