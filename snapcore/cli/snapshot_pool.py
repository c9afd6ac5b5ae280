"""The commands of `snapcore snapshot` where the place is a pool."""

from __future__ import annotations

import time

import click

from snapcore import extents
from snapcore.cli import output, pooled
from snapcore.errors import NotFoundError
from snapcore.pool import Pool
from snapcore.service.archives import Archives
from snapcore.service.journal import Journal


def create(place: str, disk: str, name: str | None, *, as_json: bool) -> None:
    """Cut a snapshot of a disk."""
    with Pool.open(place) as found:
        wanted = found.open_disk(disk)
        started = time.monotonic()
        made = wanted.snapshot(name)
        spent = time.monotonic() - started
        if as_json:
            output.print_json(pooled.snapshot_facts(made) | {"duration_s": round(spent, 6)})
        else:
            called = "" if name is None else f", called {output.text(name)}"
            click.echo(f"snapshot {made.id} of {output.text(made.disk)}{called}")


def list_(place: str, disk: str | None, *, as_json: bool) -> None:
    """List snapshots, all or those of a disk, which may be gone."""
    with Pool.open(place, read_only=True) as found:
        try:
            listed = found.snapshots(disk)
        except NotFoundError:
            # Snapshots remember a disk that is gone.
            listed = [item for item in found.snapshots() if disk in (item.disk, item.disk_id)]
            if not listed:
                raise
        if as_json:
            journal = Journal(place)
            for item in listed:
                output.print_json(pooled.snapshot_facts(item) | {"archives": pooled.archive_facts(journal, item)})
            return
        rows = [
            [
                item.id,
                item.disk,
                "" if item.name == item.id else item.name,
                output.instant(item.created_ns)[:19],
                item.group or "",
                output.size(item.size_bytes),
            ]
            for item in listed
        ]
    output.table(["id", "disk", "name", "created (UTC)", "group", "size"], rows, right=frozenset({5}))


def show(place: str, refs: tuple[str, ...], *, as_json: bool) -> None:
    """Show snapshots, and what deleting all of them would free."""
    with Pool.open(place, read_only=True) as found:
        chosen = [found.snapshot(ref) for ref in refs]
        unique = found.unique_bytes(chosen)
        facts = [
            pooled.snapshot_facts(item) | {"mapped_bytes": extents.total_bytes(item.extents().allocated)}
            for item in chosen
        ]
    if as_json:
        shown = facts[0] if len(facts) == 1 else {"ids": [item["id"] for item in facts]}
        output.print_json(shown | {"unique_bytes": unique})
        return
    for item in facts:
        pooled.show_facts(item)
        click.echo()
    click.echo(f"deleting {'this' if len(facts) == 1 else 'these'} frees {output.size(unique)}")


def diff(place: str, a: str, b: str, *, as_json: bool) -> None:
    """Print where two versions differ."""
    with Pool.open(place, read_only=True) as found:
        rows = found.diff(a, b)
    if as_json:
        output.print_json({"extents": output.extents_json(rows)})
    else:
        output.print_extents(rows)


def delete(place: str, refs: tuple[str, ...], *, as_json: bool) -> None:
    """Delete snapshots, all or none."""
    with Pool.open(place) as found:
        gone = [found.snapshot(ref) for ref in refs]
        with Archives(found) as archives:
            archives.delete_snapshots(gone)
    for item in gone:
        if as_json:
            output.print_json({"deleted": item.id})
        else:
            click.echo(f"deleted {item.id}")
