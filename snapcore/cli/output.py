"""What all commands print with: one JSON object, tables for people, a bar on a terminal.

Libraries are imported where they are used: a command that prints a line does not wait for those that draw tables.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import click
from click.core import ParameterSource

from snapcore.errors import UsageError

if TYPE_CHECKING:
    from snapcore.extents import Extents
    from snapcore.progress import Progress, ProgressCallback

_IN_REPOSITORY = "The repository, a folder or s3://BUCKET/PREFIX; SNAPCORE_REPO in the environment stands for it."
_IN_POOL = "The pool; SNAPCORE_POOL in the environment stands for it."

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
repository_option = click.option(
    "-r",
    "--repo",
    "place",
    required=True,
    envvar="SNAPCORE_REPO",
    metavar="DIR",
    help=_IN_REPOSITORY,
)
pool_option = click.option(
    "-p",
    "--pool",
    "place",
    required=True,
    envvar="SNAPCORE_POOL",
    metavar="DIR",
    help=_IN_POOL,
)


class Place(NamedTuple):
    """Where snapshots are: a folder, and whether a pool or a repository is in it."""

    path: str
    is_pool: bool


def place_option(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command both `-r` and `-p`, and calls it with the one that was given as `place`."""

    def called(context: click.Context, /, repo: str | None, pool: str | None, **options: object) -> None:
        # What stands in the words of the command counts more than what stands in the environment.
        given = [name for name in ("repo", "pool") if context.params[name] is not None]
        written = [name for name in given if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        chosen = written or given
        if len(chosen) != 1:
            raise click.UsageError("give one place: a repository (-r DIR) or a pool (-p DIR)")
        command(place=Place(str(context.params[chosen[0]]), chosen == ["pool"]), **options)

    functools.update_wrapper(called, command)
    repository = click.option("-r", "--repo", envvar="SNAPCORE_REPO", metavar="DIR", help=_IN_REPOSITORY)
    pool = click.option("-p", "--pool", envvar="SNAPCORE_POOL", metavar="DIR", help=_IN_POOL)
    return repository(pool(click.pass_context(called)))


def places_option(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command `-r`, `-p` or both, as `repo` and `pool`; those in its words, else those in the environment."""

    def called(context: click.Context, /, repo: str | None, pool: str | None, **options: object) -> None:
        given = {name: value for name, value in (("repo", repo), ("pool", pool)) if value is not None}
        written = {
            name: value
            for name, value in given.items()
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        }
        chosen = written or given
        if not chosen or (len(chosen) == 2 and not written):
            raise click.UsageError(
                "give one place: a repository (-r DIR) or a pool (-p DIR); or both, to archive a disk of the pool"
            )
        command(repo=chosen.get("repo"), pool=chosen.get("pool"), **options)

    functools.update_wrapper(called, command)
    repository = click.option("-r", "--repo", envvar="SNAPCORE_REPO", metavar="DIR", help=_IN_REPOSITORY)
    in_pool = click.option("-p", "--pool", envvar="SNAPCORE_POOL", metavar="DIR", help=_IN_POOL)
    return repository(in_pool(click.pass_context(called)))


def tag_pairs(tags: Sequence[str]) -> dict[str, str]:
    """Tags from words of the form KEY=VALUE."""
    pairs = [tag.partition("=") for tag in tags]
    for key, sign, _ in pairs:
        if not key or not sign:
            raise click.UsageError(f"a tag has the form KEY=VALUE, not {key!r}")
    return {key: value for key, _, value in pairs}


def print_json(value: object) -> None:
    """One line of JSON on standard output."""
    import msgspec

    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def extents_json(rows: Extents) -> list[list[int]]:
    """Extents as JSON has them: [[offset, length], …]."""
    pairs: list[list[int]] = rows.tolist()
    return pairs


def print_extents(rows: Extents) -> None:
    """Offset and length in bytes, a line each."""
    sys.stdout.write("".join(f"{offset} {length}\n" for offset, length in rows.tolist()))


def text(value: object) -> str:
    """For a terminal: what is not printable is escaped, for it may come from somebody else."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in str(value))


def size(count_bytes: int) -> str:
    """A number of bytes for people, in binary units."""
    value = float(count_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def instant(since_1970_ns: int) -> str:
    """A point in time, UTC, as ISO 8601 has it; to the millisecond."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(since_1970_ns // 1_000_000 / 1000, UTC).isoformat(timespec="milliseconds")


class Size(click.ParamType[int]):
    """A size on the command line: bytes, or with one of the suffixes K, M, G, T (binary)."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The size in bytes."""
        if isinstance(value, int):
            return value
        text = str(value).strip().upper().removesuffix("IB").removesuffix("B")
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}.get(text[-1:], 1)
        try:
            return int(text.rstrip("KMGT")) * factor
        except ValueError:
            self.fail(f"{value!r} is no size; give bytes, or 64K, 20G, …", param, ctx)


class Hydrate(click.ParamType[float]):
    """How the rest of a lazy disk is fetched: bytes in a second, 0 (`full`) as fast as it goes, less (`off`) not."""

    name = "hydrate"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The rate."""
        words = {"full": 0.0, "off": -1.0}
        if str(value) in words:
            return words[str(value)]
        rate = Size().convert(value, param, ctx)
        if rate <= 0:
            self.fail(f"{value!r} is no rate; give bytes in a second, like 50M, or full, or off", param, ctx)
        return float(rate)


def hydrate_option(text: str, default: str | None) -> Callable[[click.decorators.FC], click.decorators.FC]:
    """`--hydrate RATE|full|off`."""
    words, shown = "RATE|full|off", default is not None
    return click.option("--hydrate", type=Hydrate(), default=default, metavar=words, show_default=shown, help=text)


rate_option = click.option(
    "--rate",
    type=Size(),
    default=0,
    metavar="SIZE",
    help="Bytes a second that are read at most; default: as fast as it goes.",
)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()) -> None:
    """Print a table for people; `right` are the columns of numbers."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if number in right else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*map(text, row))
    # Outside a terminal lines are as long as they need to be, for grep.
    Console(width=None if sys.stdout.isatty() else 240, markup=False, highlight=False).print(shown)


def read_changed(path: str) -> list[tuple[int, int]]:
    """Extents from a file: {"extents": [[offset, length], …]} as `diff --json` prints, or the list alone."""
    import msgspec

    try:
        with click.open_file(path, "rb") as file:
            found = msgspec.json.decode(file.read())
        rows = found["extents"] if isinstance(found, dict) else found
        return msgspec.convert(rows, list[tuple[int, int]])
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (KeyError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"{path} holds no list of extents [[offset, length], …]: {error}") from error


@contextmanager
def bar() -> Iterator[ProgressCallback | None]:
    """A progress bar with bytes, rate and time left, on standard error and only on a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as shown:
        tasks: dict[str, progress.TaskID] = {}

        def update(step: Progress) -> None:
            if step.stage not in tasks:
                tasks[step.stage] = shown.add_task(step.stage, total=step.total_bytes)
            shown.update(tasks[step.stage], completed=step.done_bytes)

        yield update
