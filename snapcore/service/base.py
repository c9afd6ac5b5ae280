"""Against what a snapshot of a pool is archived: the archived snapshot whose local twin differs least from it.

Local and archived snapshots are matched by `origin` alone (docs/DESIGN.md, "Two tiers"); what the journal says is
checked against it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from snapcore import extents
from snapcore.errors import LockedError, NotFoundError
from snapcore.extents import Extents
from snapcore.pool import Disk, Pool, Snapshot
from snapcore.repository import NO_KEY, KeyChoice, Manifest, Repository
from snapcore.service.journal import Journal

# The newest ones that a disk is compared with; a look costs what differs, up to the best one so far.
_LOOKED_AT = 64


@dataclass(frozen=True, slots=True)
class Twins:
    """A local snapshot and the archived one that holds the same bytes."""

    local: Snapshot
    archived: Manifest


@dataclass(frozen=True, slots=True)
class Base:
    """What to compare with, and all that may differ from it."""

    twins: Twins
    changed: Extents


def origin_of(pool: Pool, snapshot: Snapshot) -> str:
    """What an archived twin of a local snapshot has as `origin`."""
    return f"{origin_prefix(pool)}{snapshot.id}:{snapshot.created_ns}"


def origin_prefix(pool: Pool) -> str:
    """What the origins of all twins of a pool's snapshots begin with."""
    return f"pool:{pool.id}:"


def key_word(key: str | KeyChoice | None) -> str | None:
    """Which key was asked for, as files have it: empty for none."""
    return "" if isinstance(key, KeyChoice) else key


def key_choice(word: str | None) -> str | KeyChoice | None:
    """What `key_word` was made of."""
    return NO_KEY if word == "" else word


class Known:
    """Which local snapshots of a pool have twins in a repository."""

    def __init__(self, pool: Pool, journal: Journal, repository: Repository) -> None:
        self._pool = pool
        self._repository = repository
        self._hints = journal.twins(repository.id)

    def twin(self, snapshot: Snapshot) -> Manifest | None:
        """The archived twin that the journal knows of, when it can be read."""
        hint = self._hints.get(snapshot.id)
        if hint is None:
            return None
        try:
            found = self._repository.find(hint)
        except (NotFoundError, LockedError):
            return None
        return found if found.origin == origin_of(self._pool, snapshot) else None

    def look(self, disks: Iterable[str], snapshots: Iterable[Snapshot], group: str | None = None) -> None:
        """Find twins of snapshots by reading all manifests of these chains; those in a group go before others."""
        wanted = {origin_of(self._pool, snapshot): snapshot.id for snapshot in snapshots}
        for disk in {*disks}:
            for item in self._repository.snapshots(disk):
                if item.origin in wanted and (item.group == group or wanted[item.origin] not in self._hints):
                    self._hints[wanted[item.origin]] = item.id

    def has_hint(self, snapshot: Snapshot) -> bool:
        """Whether there should be a twin."""
        return snapshot.id in self._hints

    def base(self, version: Snapshot | Disk, chain: str, like: Manifest | None = None) -> Base | None:
        """The twins that differ least from a version; None when none is of a common origin with it.

        With `like` only those that are under the same key as that one.
        """
        relatives = self._pool.relatives(version)
        if not any(map(self.has_hint, relatives)):
            self.look([chain, *(item.disk for item in relatives)], relatives)
        candidates = [item for item in relatives if self.has_hint(item)]
        # The disk's own first, the newest of them before all: mostly the best, and then the others end early.
        candidates.sort(key=lambda item: (item.disk_id == _disk_of(version), item.created_ns), reverse=True)
        best: Base | None = None
        for item in candidates[:_LOOKED_AT]:
            rows = self._difference(item, version, None if best is None else extents.total_bytes(best.changed))
            twin = None if rows is None else self.twin(item)
            if rows is not None and twin is not None and (like is None or twin.key == like.key):
                best = Base(Twins(item, twin), rows)
        return best

    def _difference(self, one: Snapshot, other: Snapshot | Disk, least: int | None) -> Extents | None:
        """Where two versions differ; None when that is as much as `least`, or one was deleted meanwhile."""
        parts, total = [np.empty((0, 2), np.int64)], 0
        try:
            for rows in self._pool.diff_parts(one, other):
                total += extents.total_bytes(rows)
                if least is not None and total >= least:
                    return None
                parts.append(rows)
        except NotFoundError:
            return None
        return extents.merged(np.concatenate(parts))


def _disk_of(version: Snapshot | Disk) -> str:
    return version.disk_id if isinstance(version, Snapshot) else version.id
