"""`snapcore copy`: copy snapshots into another repository, or under another key."""

from __future__ import annotations

import click

from snapcore.cli import output
from snapcore.cli.unlocking import Unlocking, key_options


@click.command()
@click.argument("snapshots", metavar="SNAPSHOT…", nargs=-1, required=True)
@click.option("--from", "source", metavar="A", required=True, envvar="SNAPCORE_REPO", help="Where they are.")
@click.option("--to", "target", metavar="B", required=True, help="Where they go; A itself, under another key.")
@click.option("--key", metavar="NAME", help="The key of B that the copies shall be under.")
@click.option("--no-key", is_flag=True, help="The copies shall be plain ones; refused for what is encrypted.")
@click.option("--chain", is_flag=True, help="The earlier snapshots of the disk too, but those that have a copy.")
@click.option("--limit-rate", type=output.Size(), metavar="BYTES", help="Read no more than that a second: 10M, 1G, …")
@key_options
@output.json_option
def copy(
    snapshots: tuple[str, ...],
    source: str,
    target: str,
    key: str | None,
    no_key: bool,
    chain: bool,
    limit_rate: int | None,
    keys: Unlocking,
    as_json: bool,
) -> None:
    """Copy snapshots from one repository to another: the first of a disk in full, later ones what changed.

    Under the key that they have, when B has that key too (`snapcore key share`); else under another one of B. What is
    encrypted stays so. Interrupted, start it again: it goes on. With --json one object a line.
    """
    if key is not None and no_key:
        raise click.UsageError("--key and --no-key exclude each other")
    from snapcore.repository import NO_KEY

    one, other = keys.open_both(source, target)
    with output.bar() as progress:
        work = other.copy_from(
            one,
            snapshots,
            key=NO_KEY if no_key else key,
            chain=chain,
            limit_bytes_per_s=limit_rate,
            progress=progress,
        )
        for done in work:
            made = done.snapshot
            if as_json:
                output.print_json(
                    {
                        "id": made.id,
                        "source_id": done.source.id,
                        "disk": made.disk,
                        "key": made.key,
                        "parent": made.parent,
                        "created": made.created,
                        "new_bytes": made.new_bytes,
                        "stored_bytes": made.stored_bytes,
                        "moved_bytes": done.moved_bytes,
                        "fallback_reason": made.fallback_reason,
                        "duration_s": round(done.duration_s, 6),
                    }
                )
                continue
            rate = done.moved_bytes / done.duration_s if done.duration_s else 0
            click.echo(f"copied {done.source.id} of {output.text(made.disk)} to {made.id}")
            click.echo(
                f"  moved {output.size(done.moved_bytes)}, stored {output.size(made.stored_bytes)} in "
                f"{done.duration_s:.2f} s ({output.size(int(rate))}/s)"
            )
            if made.fallback_reason:
                click.echo(f"  note: {output.text(made.fallback_reason)}")
