"""The tree of commands."""

from __future__ import annotations

import importlib

import click

from snapcore.version import VERSION

# A command, or a group of them, is an object of the same name in the file of that name beside this one, where a hyphen
# becomes an underscore.
COMMANDS = (
    "block",
    "copy",
    "demo",
    "diff",
    "disk",
    "group",
    "image",
    "key",
    "nbd-mount",
    "pin",
    "pool",
    "repo",
    "restore",
    "serve",
    "snapshot",
    "verify",
)


class _Commands(click.Group):
    """Imports the file of a command when that command is asked for: what a short one takes is mostly imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"snapcore.cli.{name}"), name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION)
def root() -> None:
    """Snapshots of disk images: full, then changed blocks only; any can be deleted, any restores the whole disk."""


def run() -> int:
    """Run a command; what is wrong with its words goes to standard error. Returns the exit code."""
    try:
        code = root.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort as error:
        raise KeyboardInterrupt from error
    return code if isinstance(code, int) else 0
