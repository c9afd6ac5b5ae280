"""`snapcore pin`: who needs which snapshots of a repository."""

from __future__ import annotations

import click

from snapcore.cli import output
from snapcore.cli.unlocking import Unlocking, key_options


@click.group()
def pin() -> None:
    """Show and remove what keeps snapshots of a repository from being deleted."""


@pin.command("list")
@output.repository_option
@key_options
@output.json_option
def list_(place: str, keys: Unlocking, as_json: bool) -> None:
    """List pins: who needs which snapshot; with --json one object a line.

    One whose snapshot is gone, or whose owner is, is left over from a crash or a loss: `snapcore pin remove`.
    """
    found = keys.open(place)
    there = {item.id for item in found.snapshots()} | {item.id for item in found.locked_snapshots()}
    rows = []
    for item in found.pins():
        state = "deletion" if item.deletes else "pin" if item.snapshot in there else "stale"
        if as_json:
            facts = {"id": item.id, "snapshot": item.snapshot, "who": item.who, "created": item.created}
            output.print_json(facts | {"state": state})
        rows.append([item.id[:12], item.snapshot[:12], state, item.created[:19], item.who])
    if not as_json:
        output.table(["id", "snapshot", "state", "created (UTC)", "who"], rows)


@pin.command()
@click.argument("ids", metavar="ID…", nargs=-1, required=True)
@output.repository_option
@output.json_option
def remove(ids: tuple[str, ...], place: str, as_json: bool) -> None:
    """Remove pins that nobody needs any more."""
    from snapcore.repository import Repository

    found = Repository.open(place)
    for ref in ids:
        gone = found.remove_pin(ref)
        if as_json:
            output.print_json({"removed": gone})
        else:
            click.echo(f"removed {gone}")
