"""What the commands on a pool's disks and snapshots share: finding, and how things are shown."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from snapcore.cli import output
from snapcore.errors import NotFoundError, RefusedError

if TYPE_CHECKING:
    from snapcore.pool import Disk, Pool, Regions, Snapshot
    from snapcore.service.journal import Journal


def opened(place: str, regions: Regions, *, read_only: bool) -> Pool:
    """A pool to read from. With lazy disks that are not all here it is opened as its owner: what is read is kept."""
    from snapcore.pool import Pool

    found = Pool.open(place, read_only=read_only, regions=regions)
    if not read_only or found.is_whole:
        return found
    found.close()
    return Pool.open(place, regions=regions)


def hydrate(pool: Pool, rate: float | None) -> None:
    """Fetch the rest of lazy disks in the background: at a rate (0: none, below 0: not at all), or as planned."""
    if pool.read_only:
        return
    for disk in pool.disks() if rate is not None else ():
        if rate is not None:
            pool.plan_hydration(disk, rate if rate >= 0 else None)
    pool.resume_hydration()


def find(pool: Pool, ref: str) -> Disk | Snapshot:
    """The disk or the snapshot of a name or id; the disk if there are both."""
    with suppress(NotFoundError):
        return pool.open_disk(ref)
    with suppress(NotFoundError):
        return pool.snapshot(ref)
    raise NotFoundError(
        f"there is no disk or snapshot {ref!r} in {pool.path}; `snapcore disk list -p {pool.path}` and "
        f"`snapcore snapshot list -p {pool.path}` show all"
    )


def own_snapshot(pool: Pool, disk: Disk, ref: str) -> Snapshot:
    """The snapshot of a disk that it can be rolled back to."""
    for item in pool.snapshots(disk):
        if ref in (item.id, item.name):
            return item
    other = pool.snapshot(ref)
    raise RefusedError(
        f"snapshot {other.name} is of disk {other.disk!r}, not of {disk.name!r}; make a new disk from it instead"
    )


def disk_facts(disk: Disk) -> dict[str, object]:
    """A disk as JSON has it."""
    origin = disk.origin
    return {
        "id": disk.id,
        "name": disk.name,
        "size_bytes": disk.size_bytes,
        "created": output.instant(disk.created_ns),
        "from": None if origin is None else {origin[0]: origin[1]},
    }


def snapshot_facts(snapshot: Snapshot) -> dict[str, object]:
    """A snapshot as JSON has it."""
    return {
        "id": snapshot.id,
        "disk": snapshot.disk,
        "disk_id": snapshot.disk_id,
        "name": None if snapshot.name == snapshot.id else snapshot.name,
        "size_bytes": snapshot.size_bytes,
        "created": output.instant(snapshot.created_ns),
        "group": snapshot.group,
    }


def archive_facts(journal: Journal, snapshot: Snapshot) -> list[dict[str, object]]:
    """Where a snapshot is archived, or on its way to."""
    found: list[dict[str, object]] = []
    for place in journal.repositories():
        twin = journal.twins(place).get(snapshot.id)
        if twin is not None:
            found.append({"repository": place, "snapshot": twin, "state": "accomplished", "error": None})
    for wanted in journal.wanted():
        if snapshot.id in wanted.snapshots:
            state = "failed" if wanted.error else "progressing"
            found.append({"repository": wanted.repository, "snapshot": None, "state": state, "error": wanted.error})
    return found


def show_facts(facts: dict[str, object]) -> None:
    """Facts for people, a line each."""
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{kind} {name}" for kind, name in value.items())
        elif key.endswith("_bytes") and isinstance(value, int):
            value = f"{value} ({output.size(value)})"
        print(f"{key:16} {'-' if value is None else output.text(value)}")
