"""`snapcore verify`: read everything and say what is damaged."""

from __future__ import annotations

import click

from snapcore.cli import output
from snapcore.cli.unlocking import Unlocking, key_options


@click.command()
@output.repository_option
@key_options
@output.json_option
def verify(place: str, keys: Unlocking, as_json: bool) -> None:
    """Read everything in the repository and check it; exit code 1 when something is damaged.

    Of what is under keys that are not unlocked, the stored bytes are checked.
    """
    found = keys.open(place)
    with output.bar() as progress:
        done = found.verify(progress=progress)
    if as_json:
        output.print_json(
            {
                "ok": done.ok,
                "snapshots": done.snapshots,
                "locked_snapshots": done.locked_snapshots,
                "packs": done.packs,
                "records": done.records,
                "plain_bytes": done.plain_bytes,
                "stored_bytes": done.stored_bytes,
                "problems": [{"where": problem.where, "what": problem.what} for problem in done.problems],
                "hits": [
                    {"snapshot": hit.snapshot, "disk": hit.disk, "extents": output.extents_json(hit.ranges)}
                    for hit in done.hits
                ],
                "marked": done.marked,
                "duration_s": round(done.duration_s, 6),
            }
        )
    else:
        for problem in done.problems:
            click.echo(f"damaged: {problem.where}: {problem.what}")
        for hit in done.hits:
            for offset, length in hit.ranges.tolist():
                click.echo(f"hits snapshot {hit.snapshot} of {hit.disk}: {length} bytes at offset {offset}")
        click.echo(
            f"{'all is well' if done.ok else 'damage was found'}: {done.snapshots} snapshots, {done.packs} packs, "
            f"{output.size(done.plain_bytes)} of data in {output.size(done.stored_bytes)}, {done.duration_s:.2f} s"
        )
        if done.locked_snapshots:
            click.echo(
                f"{done.locked_snapshots} more snapshots are under keys that are not unlocked: the checksums of their "
                "stored bytes were checked, and not what is in them"
            )
        if done.marked:
            click.echo(f"{done.marked} records are marked: the next snapshot with the same content heals them")
    if not done.ok:
        click.get_current_context().exit(1)
