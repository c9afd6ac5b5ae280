"""The command line: one file a command group, nothing here but the root of the tree and the exit codes.

Exit codes: 0 done, 1 failed (an error of `snapcore.Error`, or damage found), 2 usage, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from snapcore.errors import Error, UsageError
from snapcore.version import VERSION

# A command, or a group of them, is an object of the same name in the file of that name beside this one.
COMMANDS = ("demo", "diff", "repo", "restore", "snapshot", "verify")


class _Commands(click.Group):
    """Imports the file of a command when that command is asked for: what a short one takes is mostly imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"snapcore.cli.{cmd_name}"), cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION)
def root() -> None:
    """Snapshots of disk images: full, then changed blocks only; any can be deleted, any restores the whole disk."""


def main() -> None:
    """Run a command; errors go to standard error, a line each."""
    try:
        code = root.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("snapcore: interrupted; run it again to go on", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has enough; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Error as error:
        click.echo(f"snapcore: {error}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        click.echo(f"snapcore: {error.strerror or error}{where}", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
