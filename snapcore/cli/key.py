"""`snapcore key`: make keys, and say who holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from snapcore.cli import output
from snapcore.cli.unlocking import Unlocking, key_options, new_holder
from snapcore.errors import UsageError

if TYPE_CHECKING:
    from snapcore.repository import Key, KeyHolder


def _new_holder_options(prefix: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options that name a new holder; `prefix` keeps them apart from those that unlock."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        for option, name, value, text in (
            ("kms", "new_kms", "ARN", "A key of AWS KMS."),
            ("passphrase-file", "new_passphrase_file", "FILE", "The passphrase in the first line of FILE."),
            ("key-file", "new_key_file", "FILE", "A key file; made when it is not there yet."),
        ):
            command = click.option(f"--{prefix}{option}", name, metavar=value, help=text)(command)
        text = "A passphrase, asked for on the terminal."
        return click.option(f"--{prefix}passphrase", "new_passphrase", is_flag=True, help=text)(command)

    return decorated


@click.group()
def key() -> None:
    """Make keys, and say who holds them. Snapshots under a key can be read by its holders only."""


@key.command()
@click.argument("name")
@output.repository_option
@_new_holder_options("")
@output.json_option
def create(
    name: str,
    place: str,
    new_key_file: str | None,
    new_passphrase: bool,
    new_passphrase_file: str | None,
    new_kms: str | None,
    as_json: bool,
) -> None:
    """Make the key NAME with one holder. Whoever loses all holders of a key has lost what is under it."""
    from snapcore.repository import Repository

    repository = Repository.open(place)
    made = repository.keyring.create(name, new_holder(new_key_file, new_passphrase, new_passphrase_file, new_kms))
    _print_key(made, f"made the key {name}", as_json=as_json)


def _print_key(made: Key, line: str, *, as_json: bool) -> None:
    if as_json:
        output.print_json(made)
    else:
        click.echo(f"{line} ({made.id}), held by {', '.join(holder.kind for holder in made.holders)}")


def _print_holder(name: str, made: KeyHolder, *, as_json: bool) -> None:
    if as_json:
        output.print_json({"key": name, "holder": made.id, "kind": made.kind})
    else:
        click.echo(f"the key {name} is held by the {made.kind} {made.id}")


@key.command("list")
@output.repository_option
@output.json_option
def list_(place: str, as_json: bool) -> None:
    """List keys and their holders; with --json one key a line."""
    from snapcore.repository import Repository

    found = Repository.open(place).keyring.listed()
    if as_json:
        for item in found:
            output.print_json(item)
        return
    rows = [
        [item.name, item.id, "disabled" if item.disabled else "enabled", holder.id, holder.kind, holder.created[:19]]
        for item in found
        for holder in item.holders
    ]
    output.table(["key", "id", "state", "holder", "kind", "created (UTC)"], rows)


@key.command()
@click.argument("name")
@output.repository_option
@key_options
@_new_holder_options("new-")
@output.json_option
def add(
    name: str,
    place: str,
    keys: Unlocking,
    new_key_file: str | None,
    new_passphrase: bool,
    new_passphrase_file: str | None,
    new_kms: str | None,
    as_json: bool,
) -> None:
    """Give the key NAME one more holder. No data is written again."""
    keyring = keys.open(place).keyring
    keyring.find(name)
    made = keyring.add(name, new_holder(new_key_file, new_passphrase, new_passphrase_file, new_kms))
    _print_holder(name, made, as_json=as_json)


@key.command()
@click.argument("name")
@output.repository_option
@key_options
@click.option("--holder", metavar="ID", help="The holder that goes; may be left away when there is one.")
@_new_holder_options("new-")
@output.json_option
def rotate(
    name: str,
    place: str,
    keys: Unlocking,
    holder: str | None,
    new_key_file: str | None,
    new_passphrase: bool,
    new_passphrase_file: str | None,
    new_kms: str | None,
    as_json: bool,
) -> None:
    """Put a new holder of the key NAME in the place of an old one. No data is written again."""
    keyring = keys.open(place).keyring
    domain = keyring.find(name)
    holders = next(item.holders for item in keyring.listed() if item.id == domain.key_id)
    if holder is None and len(holders) > 1:
        raise UsageError(f"the key {name} has {len(holders)} holders; say which one goes: --holder ID")
    old = holders[0].id if holder is None else holder
    made = keyring.rotate(name, old, new_holder(new_key_file, new_passphrase, new_passphrase_file, new_kms))
    _print_holder(name, made, as_json=as_json)


@key.command()
@click.argument("name")
@output.repository_option
@click.option("--holder", metavar="ID", required=True, help="The holder that goes, as `snapcore key list` names it.")
@output.json_option
def remove(name: str, place: str, holder: str, as_json: bool) -> None:
    """Take the key NAME from a holder; refused for the last one."""
    from snapcore.repository import Repository

    gone = Repository.open(place).keyring.remove(name, holder)
    if as_json:
        output.print_json({"key": name, "removed": gone})
    else:
        click.echo(f"the key {name} is no longer held by {gone}")


@key.command()
@click.argument("name")
@output.repository_option
@output.json_option
def disable(name: str, place: str, as_json: bool) -> None:
    """Refuse all work with the key NAME. Who has a holder and a copy of the repository can still read it."""
    from snapcore.repository import Repository

    _print_key(Repository.open(place).keyring.disable(name), f"disabled the key {name}", as_json=as_json)


@key.command()
@click.argument("name")
@output.repository_option
@output.json_option
def enable(name: str, place: str, as_json: bool) -> None:
    """Allow work with the key NAME again."""
    from snapcore.repository import Repository

    _print_key(Repository.open(place).keyring.enable(name), f"enabled the key {name}", as_json=as_json)


@key.command()
@click.argument("name")
@output.repository_option
@key_options
@click.option("--to", "target", metavar="DIR", required=True, help="The other repository.")
@_new_holder_options("new-")
@output.json_option
def share(
    name: str,
    place: str,
    keys: Unlocking,
    target: str,
    new_key_file: str | None,
    new_passphrase: bool,
    new_passphrase_file: str | None,
    new_kms: str | None,
    as_json: bool,
) -> None:
    """Make the key NAME one of another repository too: copies between the two need not be sealed anew."""
    from snapcore.repository import Repository

    keyring = keys.open(place).keyring
    keyring.find(name)
    other = Repository.open(target)
    holder = new_holder(new_key_file, new_passphrase, new_passphrase_file, new_kms)
    made = keyring.share(name, other.keyring, holder)
    _print_key(made, f"{other.url} has the key {name}", as_json=as_json)
