"""`snapcore pool`: the pool itself."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from snapcore.cli import output

if TYPE_CHECKING:
    from snapcore.pool import PoolUsage, VersionUsage

directory = click.argument("place", metavar="DIR", envvar="SNAPCORE_POOL")


@click.group()
def pool() -> None:
    """Make, look at, check and tidy a pool of live disks."""


@pool.command()
@directory
@click.option(
    "--limit", type=output.Size(), default="0", help="How much disks and snapshots may take; default: no limit."
)
@output.json_option
def init(place: str, limit: int, as_json: bool) -> None:
    """Make a pool in DIR, which is empty or not there yet."""
    from snapcore.pool import Pool

    with Pool.create(place, limit_bytes=limit, background=False) as made:
        facts = {"path": made.path, "limit_bytes": made.limit_bytes}
    if as_json:
        output.print_json(facts)
    else:
        click.echo(f"made the pool {output.text(facts['path'])}")


@pool.command()
@directory
@output.json_option
def info(place: str, as_json: bool) -> None:
    """Show what a pool holds and takes."""
    from snapcore.pool import Pool

    with Pool.open(place, read_only=True) as found:
        usage = found.usage()
        disks = [item for item in usage.versions if item.kind == "disk"]
        facts = {
            "path": found.path,
            "disks": len(disks),
            "snapshots": len(usage.versions) - len(disks),
            "disks_bytes": sum(item.size_bytes for item in disks),
            **_totals(usage),
        }
    if as_json:
        output.print_json(facts)
        return
    click.echo(f"pool     {output.text(facts['path'])}")
    click.echo(f"holds    {facts['disks']} disks and {facts['snapshots']} snapshots")
    click.echo(f"offers   {output.size(sum(item.size_bytes for item in disks))} on its disks")
    _say_totals(usage)


@pool.command()
@directory
@output.json_option
def usage(place: str, as_json: bool) -> None:
    """Show what each disk and snapshot takes, and what deleting it alone would free."""
    from snapcore.pool import Pool

    with Pool.open(place, read_only=True) as found:
        usage = found.usage()
    if as_json:
        kinds = {kind: [_taken(item) for item in usage.versions if item.kind == kind] for kind in ("disk", "snapshot")}
        output.print_json(_totals(usage) | {"disks": kinds["disk"], "snapshots": kinds["snapshot"]})
        return
    rows = [
        [
            item.kind,
            item.id,
            item.name if item.kind == "disk" else f"{item.name} of {item.disk}",
            output.size(item.size_bytes),
            output.size(item.mapped_bytes),
            output.size(item.unique_bytes),
        ]
        for item in usage.versions
    ]
    output.table(["what", "id", "name", "size", "mapped", "freed if deleted"], rows, right=frozenset({3, 4, 5}))
    click.echo()
    _say_totals(usage)


def _taken(item: VersionUsage) -> dict[str, object]:
    return {
        "id": item.id,
        "name": item.name,
        "disk": item.disk,
        "size_bytes": item.size_bytes,
        "mapped_bytes": item.mapped_bytes,
        "unique_bytes": item.unique_bytes,
    }


def _totals(usage: PoolUsage) -> dict[str, object]:
    return {
        "limit_bytes": usage.limit_bytes,
        "allocated_bytes": usage.allocated_bytes,
        "held_bytes": usage.held_bytes,
        "free_bytes": usage.free_bytes,
        "data_bytes": usage.data_bytes,
        "map_bytes": usage.map_bytes,
        "log_bytes": usage.log_bytes,
        "log_used_bytes": usage.log_used_bytes,
    }


def _say_totals(usage: PoolUsage) -> None:
    of_limit = "no limit" if usage.free_bytes is None else f"{output.size(usage.free_bytes)} left to the limit"
    click.echo(f"data     {output.size(usage.allocated_bytes)} in use, {of_limit}")
    click.echo(f"map      {output.size(usage.map_bytes)}")
    click.echo(f"log      {output.size(usage.log_bytes)}, {output.size(usage.log_used_bytes)} in use")


@pool.command()
@directory
@click.option("--repair", is_flag=True, help="Put right what can be, and list what is lost.")
@output.json_option
def check(place: str, repair: bool, as_json: bool) -> None:
    """Look at all that a pool's disks refer to; exit code 1 when problems remain or something is lost."""
    from snapcore.pool.check import check

    started = time.monotonic()
    found = check(place, repair=repair)
    ok = not found.lost and (found.repaired or not found.problems)
    if as_json:
        output.print_json(
            {
                "ok": ok,
                "problems": found.problems,
                "lost": found.lost,
                "repaired": found.repaired,
                "versions": found.versions,
                "pages": found.pages,
                "blocks": found.blocks,
                "duration_s": round(time.monotonic() - started, 6),
            }
        )
    else:
        for problem in found.problems:
            click.echo(f"{'repaired' if found.repaired else 'problem'}: {output.text(problem)}")
        for lost in found.lost:
            click.echo(f"lost: {output.text(lost)}")
        if ok:
            click.echo(f"all is well: {found.versions} versions, {found.pages} pages, {found.blocks} blocks")
        elif found.problems and not found.repaired:
            click.echo(f"run `snapcore pool check {output.text(place)} --repair` to put right what can be")
    if not ok:
        click.get_current_context().exit(1)


@pool.command()
@directory
@output.json_option
def compact(place: str, as_json: bool) -> None:
    """Give back to the host what the pool does not use."""
    from snapcore.pool import Pool

    with Pool.open(place) as found:
        done = found.compact()
    if as_json:
        output.print_json({"freed_bytes": done.freed_bytes, "data_bytes": done.data_bytes, "map_bytes": done.map_bytes})
    else:
        click.echo(
            f"freed {output.size(done.freed_bytes)}; the data takes {output.size(done.data_bytes)} of the host, "
            f"the map {output.size(done.map_bytes)}"
        )
