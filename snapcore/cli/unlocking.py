"""What commands that read what is sealed share: the options that unlock keys, and new holders for `snapcore key`.

A passphrase comes from a file, the environment or a terminal, never from the words of a command, which everybody on the
host can see. What stands in the words of a command counts more than what stands in the environment.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from snapcore.keys import Holder
    from snapcore.pool import RegionEvent
    from snapcore.repository import KeyChoice, Repository
    from snapcore.service import Regions

_OPTIONS = {
    "key_file": ("--key-file", "SNAPCORE_KEY_FILE", "FILE", "Unlock the keys that this key file opens."),
    "passphrase_file": (
        "--passphrase-file",
        "SNAPCORE_PASSPHRASE_FILE",
        "FILE",
        "Unlock the keys that the first line of FILE opens; SNAPCORE_PASSPHRASE may hold a passphrase too.",
    ),
    "kms": ("--kms", "SNAPCORE_KMS", "ARN", "Unlock the keys that this key of AWS KMS opens."),
}
# The names of these options.
KEY_OPTIONS = tuple(_OPTIONS)
_PASSPHRASE = "SNAPCORE_PASSPHRASE"


class Unlocking:
    """The holders that a command was given."""

    def __init__(self, values: dict[str, str]) -> None:
        self._values = values

    def open(self, place: str) -> Repository:
        """Open a repository and unlock keys; on a terminal a passphrase is asked for when nothing was given."""
        from snapcore.repository import Repository

        found = Repository.open(place)
        holders = self.holders()
        for holder in holders:
            found.unlock(holder)
        if not holders:
            _ask(found)
        return found

    def open_both(self, one: str, other: str) -> tuple[Repository, Repository]:
        """Open two repositories and unlock keys: each holder must open a key of one of them at least."""
        from snapcore.errors import LockedError
        from snapcore.repository import Repository

        found = Repository.open(one), Repository.open(other)
        holders = self.holders()
        for holder in holders:
            failed = []
            for repository in found:
                try:
                    repository.unlock(holder)
                except LockedError as error:
                    failed.append(error)
            if len(failed) == len(found):
                raise LockedError("; ".join(map(str, failed)), failed[0].key)
        if not holders:
            for repository in found:
                _ask(repository)
        return found

    def regions(self, on_event: Callable[[RegionEvent], None] | None = None) -> Regions:
        """Where lazy disks of a pool are filled from: what is sealed there is read with the same keys."""
        from snapcore.service import Regions

        return Regions(self.holders(), on_event=on_event)

    def holders(self) -> list[Holder]:
        """What the words of the command name, else what the environment does."""
        from snapcore.keys import AwsKms, KeyFile, Passphrase

        makers: dict[str, Callable[[str], Holder]] = {
            "key_file": KeyFile,
            "passphrase_file": Passphrase.from_file,
            "passphrase": Passphrase,
            "kms": AwsKms,
        }
        return [makers[name](value) for name, value in self._values.items()]


def key_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that unlock keys, and calls it with what they say as `keys`."""

    def called(context: click.Context, /, **options: object) -> None:
        given = {name: str(options[name]) for name in _OPTIONS if options[name] is not None}
        rest = {name: value for name, value in options.items() if name not in _OPTIONS}
        written = {
            name: value
            for name, value in given.items()
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        }
        if not written and os.environ.get(_PASSPHRASE):
            given["passphrase"] = os.environ[_PASSPHRASE]
        command(keys=Unlocking(written or given), **rest)

    functools.update_wrapper(called, command)
    wrapped: Callable[..., None] = click.pass_context(called)
    for name, (option, variable, value, text) in reversed(_OPTIONS.items()):
        wrapped = click.option(option, name, envvar=variable, metavar=value, help=f"{text} Environment: {variable}.")(
            wrapped
        )
    return wrapped


def chain_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that say under which key a chain goes, as `key`: a name, NO_KEY or None."""

    def called(key: str | None, no_key: bool, **options: object) -> None:
        chosen: str | KeyChoice | None = key
        if no_key:
            from snapcore.repository import NO_KEY

            if key is not None:
                raise click.UsageError("--key and --no-key exclude each other")
            chosen = NO_KEY
        command(key=chosen, **options)

    functools.update_wrapper(called, command)
    named = click.option("--key", metavar="NAME", help="The key that the disk's chain shall be, or is, under.")
    return named(click.option("--no-key", is_flag=True, help="The disk's chain shall be, or is, a plain one.")(called))


def _ask(repository: Repository) -> None:
    """Ask for a passphrase where somebody can answer and one would open something."""
    from snapcore.keys import Passphrase

    if not (sys.stdin.isatty() and sys.stderr.isatty() and repository.keyring.any()):
        return
    usable = [key for key in repository.keyring.listed() if not key.disabled]
    if not any(holder.kind == Passphrase.kind for key in usable for holder in key.holders):
        return
    answer = _prompt("passphrase (empty: go on without)")
    if answer:
        repository.unlock(Passphrase(answer))


def _prompt(text: str, *, confirm: bool = False) -> str:
    answer: str = click.prompt(
        text, hide_input=True, err=True, default="", show_default=False, confirmation_prompt=confirm
    )
    return answer


def new_holder(key_file: str | None, passphrase: bool, passphrase_file: str | None, kms: str | None) -> Holder:
    """The one holder that the options name; a key file that is not there yet is made."""
    from snapcore.keys import AwsKms, KeyFile, Passphrase

    given = [value for value in (key_file, passphrase or None, passphrase_file, kms) if value is not None]
    if len(given) != 1:
        raise click.UsageError("name one new holder: a key file, a passphrase, a passphrase file or a key of AWS KMS")
    if key_file is not None:
        return KeyFile(key_file) if os.path.lexists(key_file) else KeyFile.create(key_file)
    if passphrase_file is not None:
        return Passphrase.from_file(passphrase_file)
    if kms is not None:
        return AwsKms(kms)
    if not sys.stdin.isatty():
        raise click.UsageError("a new passphrase is asked for on a terminal; elsewhere it comes from a passphrase file")
    return Passphrase(_prompt("new passphrase", confirm=True))
