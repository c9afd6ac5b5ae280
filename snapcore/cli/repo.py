"""`snapcore repo`: the repository itself."""

from __future__ import annotations

import click

from snapcore.cli import output
from snapcore.cli.unlocking import Unlocking, key_options

directory = click.argument("place", metavar="PLACE", envvar="SNAPCORE_REPO")


@click.group()
def repo() -> None:
    """Make, look at and tidy a repository."""


@repo.command()
@directory
@click.option("--chunk-size", type=output.Size(), default="64K", show_default=True, help="4K to 4M, a power of two.")
@click.option("--compression", type=click.Choice(["lz4", "zstd", "none"]), default="lz4", show_default=True)
@output.json_option
def init(place: str, chunk_size: int, compression: str, as_json: bool) -> None:
    """Make a repository in PLACE: a folder that is empty or not there yet, or s3://BUCKET/PREFIX."""
    from snapcore.repository import Repository

    made = Repository.create(place, chunk_bytes=chunk_size, compression=compression)
    if as_json:
        output.print_json({"id": made.id, "url": made.url, "chunk_bytes": made.chunk_bytes})
    else:
        click.echo(f"made the repository {made.url}")


@repo.command()
@directory
@key_options
@output.json_option
def info(place: str, keys: Unlocking, as_json: bool) -> None:
    """Show parameters and sizes."""
    found = keys.open(place)
    snapshots = found.snapshots()
    locked = found.locked_snapshots()
    usage = found.usage()
    facts = {
        "id": found.id,
        "url": found.url,
        "chunk_bytes": found.chunk_bytes,
        "compression": found.compression,
        "snapshots": len(snapshots),
        "locked_snapshots": len(locked),
        "disks": len({item.disk for item in snapshots}),
        "reachable_plain_bytes": usage.plain_bytes,
        "reachable_stored_bytes": usage.stored_bytes,
        "stored_bytes": found.stored_bytes(),
    }
    if as_json:
        output.print_json(facts)
        return
    click.echo(f"repository  {found.url}")
    click.echo(f"id          {found.id}")
    click.echo(f"chunks      {output.size(found.chunk_bytes)}, {found.compression}")
    click.echo(f"holds       {facts['snapshots']} snapshots of {facts['disks']} disks")
    if locked:
        click.echo(f"locked      {len(locked)} snapshots more, under keys that are not unlocked")
    click.echo(f"needed      {output.size(usage.plain_bytes)} of data in {output.size(usage.stored_bytes)}")
    click.echo(f"stored      {output.size(found.stored_bytes())}; `snapcore repo collect` frees what is not needed")


@repo.command()
@directory
@key_options
@click.option(
    "--wait", "wait_s", type=click.FloatRange(0), default=0.0, metavar="SECONDS", help="How long to wait for writers."
)
@click.option(
    "--patience",
    "patience_s",
    type=click.FloatRange(0),
    default=604800.0,
    show_default=True,
    metavar="SECONDS",
    help="Writers that began longer ago are taken for dead; one that lives takes its snapshot again.",
)
@output.json_option
def collect(place: str, keys: Unlocking, wait_s: float, patience_s: float, as_json: bool) -> None:
    """Free the space of what no snapshot needs any more; what is under keys that are not unlocked stays.

    Others go on working. What a writer that is at work now may rely on goes with the next collection after its end.
    """
    found = keys.open(place)
    with output.bar() as progress:
        done = found.collect(wait_s=wait_s, patience_s=patience_s, progress=progress)
    if as_json:
        output.print_json(
            {
                "freed_bytes": done.freed_bytes,
                "removed_packs": done.removed_packs,
                "rewritten_packs": done.rewritten_packs,
                "live_bytes": done.live_bytes,
                "condemned_packs": done.condemned_packs,
                "condemned_bytes": done.condemned_bytes,
                "waiting_for": [item.id for item in done.waiting_for],
            }
        )
    else:
        click.echo(
            f"freed {output.size(done.freed_bytes)}: {done.removed_packs} packs removed, "
            f"{done.rewritten_packs} of them after moving what is needed; {output.size(done.live_bytes)} are left"
        )
        for item in done.waiting_for:
            click.echo(
                f"{output.size(done.condemned_bytes)} may go when this has ended: {output.text(item.describe())}"
            )


@repo.command("rebuild-index")
@directory
@key_options
@output.json_option
def rebuild_index(place: str, keys: Unlocking, as_json: bool) -> None:
    """Make the index anew from the packs; that of keys which are not unlocked stays as it is."""
    found = keys.open(place)
    with output.bar() as progress:
        entries = found.rebuild_index(progress=progress)
    if as_json:
        output.print_json({"entries": entries})
    else:
        click.echo(f"the index names {entries} records")


@repo.command()
@directory
@click.option(
    "--end",
    "ended",
    metavar="ID",
    help="End this session. A writer that lives is refused at its commit, and takes its snapshot again.",
)
@output.json_option
def sessions(place: str, ended: str | None, as_json: bool) -> None:
    """List who works on the repository, or end a session."""
    from snapcore.repository import Repository

    found = Repository.open(place)
    if ended is not None:
        gone = found.end_session(ended)
        if as_json:
            output.print_json({"ended": gone})
        else:
            click.echo(f"ended {gone}")
        return
    listed = found.sessions()
    if as_json:
        for item in listed:
            output.print_json(item)
    elif not listed:
        click.echo("nobody works on the repository")
    else:
        rows = [[item.id, item.work, item.host, str(item.process), item.since] for item in listed]
        output.table(["id", "work", "host", "process", "since"], rows)
