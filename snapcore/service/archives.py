"""Archives: snapshots of a pool on their way to repositories (docs/DESIGN.md, "Two tiers").

| state | means |
| --- | --- |
| progressing | wanted: waits for its turn, or is being read and stored |
| accomplished | there, and the journal says so |
| failed | the last try ended with an error; it stays wanted unless it was cancelled |

One thread of its own runs a disk's archives one after the other; spans of all run on one set of threads.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import msgspec

from snapcore.errors import CancelledError, Error, NotFoundError, RefusedError, SourceChangedError, UsageError
from snapcore.parallel import usable_cores
from snapcore.pool import Disk, Pool, Snapshot
from snapcore.progress import Progress, ProgressCallback
from snapcore.repository import KeyChoice, Manifest, Repository
from snapcore.service.base import Base, Known, Twins, key_choice, key_word, origin_of
from snapcore.service.delta import Delta, Pace
from snapcore.service.journal import Journal, Wanted

State = Literal["progressing", "accomplished", "failed"]

PER_DISK = 10
_AT_ONCE = 4
_TRIES = 3
_NICE = 10


@dataclass(frozen=True, slots=True)
class Archived:
    """What an archive did.

    Attributes
    ----------
    local, archived
        The two snapshots.
    base : Twins or None
        What it was compared with.
    read_bytes : int
        From the pool.
    duration_s : float
        From its turn to the commit.
    fallback_reason : str or None
        Why more was read than what changed.
    """

    local: Snapshot
    archived: Manifest
    base: Twins | None
    read_bytes: int
    duration_s: float
    fallback_reason: str | None


class Archive:
    """One archive under way."""

    def __init__(
        self,
        repository: Repository,
        snapshot: Snapshot,
        wanted: Wanted,
        pace: Pace,
        progress: ProgressCallback | None,
        *,
        looked: bool,
    ) -> None:
        self.repository = repository
        self.snapshot = snapshot
        self.wanted = wanted
        self.progress: Progress | None = None
        self._pace = pace
        self._callback = progress
        self._looked = looked
        self._future: Future[Archived] = Future()

    @property
    def state(self) -> State:
        """Where it stands."""
        if not self._future.done():
            return "progressing"
        return "failed" if self._future.exception() is not None else "accomplished"

    def result(self, timeout_s: float | None = None) -> Archived:
        """Wait for it. Raises what it failed with."""
        return self._future.result(timeout_s)

    def stop(self) -> None:
        """Let it end with CancelledError; it stays wanted."""
        self._pace.stop()

    def ended(self) -> BaseException | None:
        """Wait for it. Returns what it failed with, if it did."""
        return self._future.exception()

    def step(self, progress: Progress) -> None:
        """Note how far it is, and tell who wanted to know."""
        self._pace.check()
        self.progress = progress
        if self._callback is not None:
            self._callback(progress)


class Archives:
    """Archives of the snapshots of a pool. A context manager: leaving it waits for all, or stops all after an error.

    What is stopped stays wanted: `unfinished` names it, `finish` goes on with it.
    """

    def __init__(self, pool: Pool, journal: Journal | None = None) -> None:
        self.pool = pool
        self.journal = journal or Journal(pool.path)
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[Archive]] = {}
        self._running: dict[str, Archive] = {}
        self._turns = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="snapcore-archive", initializer=_be_nice)
        self._hands = ThreadPoolExecutor(usable_cores(), thread_name_prefix="snapcore-span", initializer=_be_nice)

    def __enter__(self) -> Archives:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.stop()
        self.close()

    def close(self) -> None:
        """Wait for all that is under way."""
        for archive in self.under_way():
            archive.ended()
        self._turns.shutdown()
        self._hands.shutdown()

    def stop(self) -> None:
        """Stop all that is under way; it stays wanted."""
        for archive in self.under_way():
            archive.stop()

    def under_way(self) -> list[Archive]:
        """Archives that this process has begun and not ended."""
        with self._lock:
            waiting = [archive for queue in self._waiting.values() for archive in queue]
            return [*self._running.values(), *waiting]

    def archive(
        self,
        repository: Repository,
        what: Disk | Snapshot,
        *,
        name: str | None = None,
        disk: str | None = None,
        tags: dict[str, str] | None = None,
        key: str | KeyChoice | None = None,
        rate_bytes_s: int = 0,
        progress: ProgressCallback | None = None,
    ) -> Archive:
        """Begin to archive a snapshot, or a disk of which one is cut first.

        Parameters
        ----------
        repository : Repository
        what : Disk or Snapshot
        name : str, optional
            Of the snapshot that is cut, and of the archived one; default for that: the local one's.
        disk : str, optional
            Name of the chain; default: the disk's name at the cut.
        tags : dict of str, optional
        key : str or NO_KEY, optional
            As for `Repository.snapshot`.
        rate_bytes_s : int
            Read no faster than this; 0: as fast as possible.
        progress : callable, optional
            Called from other threads; raising there cancels.

        Raises
        ------
        RefusedError
            Ten archives of the disk are under way.
        ExistsError, NotFoundError, UsageError, StoreError
        """
        self._refuse_many(what.id if isinstance(what, Disk) else what.disk_id)
        snapshot = what.snapshot(name) if isinstance(what, Disk) else what
        called = name or (None if snapshot.name == snapshot.id else snapshot.name)
        wanted = Wanted(
            id=secrets.token_hex(16),
            repository=repository.id,
            url=repository.url,
            snapshots=[snapshot.id],
            disk=disk,
            name=called,
            tags=tags or {},
            key=key_word(key),
        )
        again = [
            item for item in self.journal.wanted(repository.id) if item.snapshots == [snapshot.id] and not item.group
        ]
        if again:
            # It may have failed because nobody said which key.
            wanted = again[0] if key is None else msgspec.structs.replace(again[0], key=wanted.key)
        self.journal.want(wanted)
        return self.begin(repository, wanted, snapshot, rate_bytes_s, progress, looked=isinstance(what, Disk))

    def begin(
        self,
        repository: Repository,
        wanted: Wanted,
        snapshot: Snapshot,
        rate_bytes_s: int = 0,
        progress: ProgressCallback | None = None,
        *,
        looked: bool = True,
    ) -> Archive:
        """Begin with one snapshot of what the journal says is wanted; `looked`: it is known to have no twin yet."""
        archive = Archive(repository, snapshot, wanted, Pace(rate_bytes_s), progress, looked=looked)
        with self._lock:
            queue = self._waiting.setdefault(snapshot.disk_id, deque())
            queue.append(archive)
            if len(queue) == 1 and snapshot.disk_id not in self._running:
                self._turns.submit(self._turn, snapshot.disk_id)
        return archive

    def finish(
        self, repository: Repository, rate_bytes_s: int = 0, progress: ProgressCallback | None = None
    ) -> list[Archive]:
        """Go on with all archives of single snapshots that are wanted for a repository and not under way."""
        begun = []
        for wanted in self.unfinished(repository):
            if wanted.group:
                continue
            try:
                snapshot = self.pool.snapshot(wanted.snapshots[0])
            except NotFoundError:
                # Deleted meanwhile: nobody wants it any more.
                self.journal.drop(wanted.id)
                continue
            begun.append(self.begin(repository, wanted, snapshot, rate_bytes_s, progress, looked=False))
        return begun

    def unfinished(self, repository: Repository) -> list[Wanted]:
        """What is wanted for a repository and not under way: left by a crash, a failure or a stop."""
        busy = {archive.wanted.id for archive in self.under_way()}
        return [item for item in self.journal.wanted(repository.id) if item.id not in busy]

    def cancel(self, archive: Archive) -> None:
        """Stop an archive that is progressing, and want it no more. Nothing of it is visible; the local snapshot stays.

        One that was past stopping, with its last bytes on their way, is deleted when it is there.
        """
        if archive.state == "accomplished":
            return
        archive.stop()
        if archive.ended() is None:
            with contextlib.suppress(NotFoundError):
                archive.repository.delete(archive.result().archived)
        self.journal.drop(archive.wanted.id)

    def delete_snapshots(self, snapshots: Sequence[Snapshot]) -> None:
        """Delete local snapshots; archives of them that are under way are cancelled first."""
        ids = {snapshot.id for snapshot in snapshots}
        for archive in self.under_way():
            if archive.snapshot.id in ids:
                self.cancel(archive)
        self.pool.delete_snapshots(snapshots)
        for wanted in self.journal.wanted():
            # What a group has in the repository goes when its archive is gone on with.
            if ids & {*wanted.snapshots} and not wanted.group:
                self.journal.drop(wanted.id)

    def keep_local(self, repository: Repository, disk_id: str, count: int) -> list[Snapshot]:
        """Delete all but the newest local snapshots of a disk that are archived in a repository. Returns them.

        What is not archived there, what is on its way anywhere, and the newest archived one in any repository stays.
        """
        if count < 1:
            raise UsageError(f"at least one local snapshot is kept, the next one's base, not {count}")
        own = [item for item in self.pool.snapshots() if item.disk_id == disk_id]
        known = Known(self.pool, self.journal, repository)
        archived = [item for item in own if known.has_hint(item)]
        kept = {local for wanted in self.journal.wanted() for local in wanted.snapshots}
        for place in self.journal.repositories():
            there = self.journal.twins(place)
            kept |= {item.id for item in [item for item in own if item.id in there][-1:]}
        # A hint alone is no reason to delete anything.
        gone = [item for item in archived[:-count] if item.id not in kept and known.twin(item) is not None]
        self.pool.delete_snapshots(gone)
        return gone

    def _refuse_many(self, disk_id: str) -> None:
        count = sum(archive.snapshot.disk_id == disk_id for archive in self.under_way())
        if count >= PER_DISK:
            raise RefusedError(
                f"{count} archives of disk {disk_id} are under way, and {PER_DISK} are the most; wait for one"
            )

    def _turn(self, disk_id: str) -> None:
        """One archive of a disk; the next one of the disk waits behind the other disks' turns."""
        with self._lock:
            archive = self._running[disk_id] = self._waiting[disk_id].popleft()
        outcome = self._outcome(archive)
        with self._lock:
            del self._running[disk_id]
            if self._waiting[disk_id]:
                self._turns.submit(self._turn, disk_id)
        outcome()

    def _outcome(self, archive: Archive) -> Callable[[], None]:
        """Run it. Returns what tells those who wait."""
        try:
            done = self._run(archive)
        except BaseException as error:  # noqa: BLE001 - whoever waits for the archive gets it
            failed = error
            if not archive.wanted.group:
                with contextlib.suppress(Error):
                    self._failed(archive, error)
            return lambda: archive._future.set_exception(failed)
        return lambda: archive._future.set_result(done)

    def _failed(self, archive: Archive, error: BaseException) -> None:
        if not self._is_there(archive.snapshot):
            self.journal.drop(archive.wanted.id)
        elif not isinstance(error, CancelledError):
            self.journal.want(msgspec.structs.replace(archive.wanted, error=str(error)))

    def _is_there(self, snapshot: Snapshot) -> bool:
        try:
            self.pool.snapshot(snapshot.id)
        except NotFoundError:
            return False
        return True

    def _run(self, archive: Archive) -> Archived:
        archive._pace.check()
        started = time.monotonic()
        repository, snapshot, wanted = archive.repository, archive.snapshot, archive.wanted
        chain = wanted.disk or snapshot.disk
        known = Known(self.pool, self.journal, repository)
        if not archive._looked:
            # A crash may have come between the commit and the journal.
            known.look([chain], [snapshot], wanted.id if wanted.group else None)
        # A group's members must be its own.
        twin = known.twin(snapshot)
        if twin is not None and twin.group == (wanted.id if wanted.group else None):
            done = Archived(snapshot, twin, None, 0, time.monotonic() - started, None)
        else:
            done = self._store(archive, known, chain, started)
        if not wanted.group:
            alive = [item.id for item in self.pool.snapshots()]
            self.journal.done(wanted, {snapshot.id: done.archived.id}, alive)
        return done

    def _store(self, archive: Archive, known: Known, chain: str, started: float) -> Archived:
        snapshot = archive.snapshot
        reason: str | None = None
        for _ in range(_TRIES):
            base = None if reason else known.base(snapshot, chain)
            try:
                made = self._create(archive, base, chain)
            except SourceChangedError as error:
                reason = f"{error}: everything was read and compared"
                continue
            except NotFoundError:
                # The base was deleted meanwhile, on either side; or the snapshot itself.
                if base is None or not self._is_there(snapshot):
                    raise
                continue
            manifest, read_bytes = made
            if base is None and manifest.parent is not None:
                reason = reason or (
                    f"no local snapshot of a common origin is archived in {archive.repository.url}: everything was read"
                )
            twins = None if base is None else base.twins
            spent = time.monotonic() - started
            return Archived(snapshot, manifest, twins, read_bytes, spent, reason or manifest.fallback_reason)
        raise NotFoundError(f"snapshots that {snapshot.name} of {snapshot.disk} is compared with keep being deleted")

    def _create(self, archive: Archive, base: Base | None, chain: str) -> tuple[Manifest, int]:
        repository, snapshot, wanted = archive.repository, archive.snapshot, archive.wanted
        changed = None if base is None else base.changed
        done = repository.snapshot(
            Delta(snapshot, changed, repository.chunk_bytes, archive._pace),
            disk=chain,
            parent=None if base is None else base.twins.archived,
            changed=changed,
            # The maps know what changed: the fewest are compared.
            checked_share=0.0,
            label=wanted.name,
            tags=wanted.tags,
            key=key_choice(wanted.key),
            origin=origin_of(self.pool, snapshot),
            group=wanted.id if wanted.group else None,
            progress=archive.step,
            executor=self._hands,
        )
        return done.snapshot, done.read_bytes


def _be_nice() -> None:
    """What this thread does waits for guests; so do the threads that it starts."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
