"""Joins a pool's lazy disks to the repositories that they are filled from."""

from __future__ import annotations

from snapcore.errors import NotFoundError, UsageError
from snapcore.pool import Region
from snapcore.repository import Repository, SnapshotReader


def open_region(region: Region) -> SnapshotReader:
    """The snapshot that a region names, by its id, in the repository of that id."""
    found = Repository.open(region.url)
    if found.id != region.repository:
        raise NotFoundError(f"{region.url} is another repository now: {found.id}, not {region.repository}")
    return found.open_snapshot(region.snapshot)


def region_of(text: str) -> Region | None:
    """The region that `REPO:SNAPSHOT` names; None when the part before the last colon is no repository."""
    place, colon, snapshot = text.rpartition(":")
    if not colon or not place or place in ("s3", "memory"):
        return None
    try:
        found = Repository.open(place)
    except NotFoundError:
        return None
    if not snapshot:
        raise UsageError(f"{text!r} names no snapshot behind the colon")
    return Region(found.url, found.id, found.find(snapshot).id, found.chunk_bytes)
