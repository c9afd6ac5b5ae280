"""`snapcore group`: snapshots of several disks of a pool at one instant."""

from __future__ import annotations

import time

import click

from snapcore.cli import output


@click.group()
def group() -> None:
    """Take snapshots of several disks of a pool at one instant."""


@group.command()
@click.argument("disks", metavar="DISK…", nargs=-1, required=True)
@output.pool_option
@click.option("--name", help="Of each of the snapshots.")
@output.json_option
def create(disks: tuple[str, ...], place: str, name: str | None, as_json: bool) -> None:
    """Cut a snapshot of each DISK, all at one instant."""
    from snapcore.cli import pooled
    from snapcore.pool import Pool

    with Pool.open(place) as found:
        started = time.monotonic()
        made = found.snapshot_group(disks, name)
        spent = time.monotonic() - started
        if as_json:
            facts = {"id": made[0].group, "name": name, "created": output.instant(made[0].created_ns)}
            members = [pooled.snapshot_facts(item) for item in made]
            output.print_json(facts | {"snapshots": members, "duration_s": round(spent, 6)})
            return
        for item in made:
            click.echo(f"snapshot {item.id} of {output.text(item.disk)}")


@group.command("list")
@output.pool_option
@output.json_option
def list_(place: str, as_json: bool) -> None:
    """List groups of which snapshots are there; with --json one object a line."""
    from snapcore.cli import pooled
    from snapcore.pool import Pool, Snapshot

    groups: dict[str, list[Snapshot]] = {}
    with Pool.open(place, read_only=True) as found:
        for item in found.snapshots():
            if item.group is not None:
                groups.setdefault(item.group, []).append(item)
        for number, members in groups.items():
            if as_json:
                first = pooled.snapshot_facts(members[0])
                facts = {"id": number, "name": first["name"], "created": first["created"]}
                output.print_json(facts | {"snapshots": [pooled.snapshot_facts(item) for item in members]})
    if as_json:
        return
    rows = [
        [
            number,
            "" if members[0].name == members[0].id else members[0].name,
            output.instant(members[0].created_ns)[:19],
            ", ".join(f"{item.id} of {item.disk}" for item in members),
        ]
        for number, members in groups.items()
    ]
    output.table(["id", "name", "created (UTC)", "snapshots"], rows)
