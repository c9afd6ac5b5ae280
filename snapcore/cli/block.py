"""`snapcore block`: blocks of snapshots for other tools, as JSON lines."""

from __future__ import annotations

import base64
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from snapcore.cli import output
from snapcore.cli.unlocking import Unlocking, chain_options, key_options
from snapcore.errors import UsageError

if TYPE_CHECKING:
    from snapcore.pool import Pool
    from snapcore.repository import KeyChoice, Repository
    from snapcore.service import Local, Remote

_start = click.option("--start", type=int, default=0, show_default=True, help="First block to look at.")
_limit = click.option("--limit", type=int, default=1000, show_default=True, help="Blocks in a page: 1 to 10,000.")
_block_size = click.option("--block-size", type=output.Size(), help="A power of two up to 4M; default: a chunk or 4K.")
_state = click.option(
    "--state", type=click.Path(), help="Folder in which blocks wait; default: the user's state folder."
)


@click.group()
def block() -> None:
    """List, compare, read and write blocks of snapshots, as JSON lines.

    A SNAPSHOT is in the repository (-r) or pool (-p) that is given, or has the form DIR:SNAPSHOT.
    """


class _Places:
    """Repositories and pools that are open, each once."""

    def __init__(self, stack: contextlib.ExitStack, repo: str | None, pool: str | None, keys: Unlocking) -> None:
        self._stack = stack
        self._keys = keys
        self._default = pool or repo
        self._pools: dict[str, Pool] = {}
        self._repositories: dict[str, Repository] = {}

    def find(self, ref: str) -> Local | Remote:
        """A snapshot of either tier."""
        from snapcore.cli import pooled
        from snapcore.service import Local, Remote

        folder, sign, name = ref.rpartition(":")
        place = folder if sign else self._default
        if place is None:
            raise click.UsageError(f"say where {ref!r} is: -r DIR, -p DIR, or DIR:SNAPSHOT")
        key = os.path.realpath(place)
        if os.path.exists(os.path.join(place, "superblock")):
            if key not in self._pools:
                self._pools[key] = self._stack.enter_context(pooled.opened(place, self._keys.regions(), read_only=True))
            return Local(pooled.find(self._pools[key], name), self._pools[key])
        if key not in self._repositories:
            self._repositories[key] = self._keys.open(place)
        return Remote(self._repositories[key].find(name), self._repositories[key])


@contextlib.contextmanager
def _places(repo: str | None, pool: str | None, keys: Unlocking) -> Iterator[_Places]:
    with contextlib.ExitStack() as stack:
        yield _Places(stack, repo, pool, keys)


def _anywhere(command: click.decorators.FC) -> click.decorators.FC:
    repository = click.option("-r", "--repo", envvar="SNAPCORE_REPO", metavar="DIR", help="The repository.")
    return repository(click.option("-p", "--pool", metavar="DIR", help="The pool; it counts more than -r.")(command))


def _pages(command: Callable[..., None]) -> Callable[..., None]:
    """What commands have that list blocks, a page a line."""
    return _anywhere(_start(_limit(_block_size(key_options(output.json_option(command))))))


@block.command("list")
@click.argument("ref", metavar="SNAPSHOT")
@_pages
def list_(
    ref: str,
    repo: str | None,
    pool: str | None,
    start: int,
    limit: int,
    block_size: int | None,
    keys: Unlocking,
    as_json: bool,
) -> None:
    """List blocks that may hold data, a page a line; `next_block` of the last line seen is where to --start again."""
    from snapcore.service import list_blocks

    with _places(repo, pool, keys) as places:
        for page in list_blocks(places.find(ref), start=start, page_blocks=limit, block_bytes=block_size):
            output.print_json(page._asdict())


@block.command()
@click.argument("a", metavar="SNAPSHOT")
@click.argument("b", metavar="SNAPSHOT")
@_pages
def diff(
    a: str,
    b: str,
    repo: str | None,
    pool: str | None,
    start: int,
    limit: int,
    block_size: int | None,
    keys: Unlocking,
    as_json: bool,
) -> None:
    """List blocks in which two snapshots differ, of either tier, a page a line."""
    from snapcore.service import list_changed_blocks

    with _places(repo, pool, keys) as places:
        one, two = places.find(a), places.find(b)
        for page in list_changed_blocks(one, two, start=start, page_blocks=limit, block_bytes=block_size):
            output.print_json(page._asdict())


@block.command()
@click.argument("ref", metavar="SNAPSHOT")
@click.argument("numbers", metavar="BLOCK…", type=int, nargs=-1, required=True)
@_anywhere
@_block_size
@key_options
@output.json_option
def read(
    ref: str,
    numbers: tuple[int, ...],
    repo: str | None,
    pool: str | None,
    block_size: int | None,
    keys: Unlocking,
    as_json: bool,
) -> None:
    """Print blocks, one a line: index, data (base64) and SHA-256 of the data (base64)."""
    from snapcore.service import read_block

    with _places(repo, pool, keys) as places:
        side = places.find(ref)
        for number in numbers:
            found = read_block(side, number, block_bytes=block_size)
            data = base64.b64encode(found.data).decode()
            output.print_json({"index": found.index, "data": data, "checksum": found.checksum})


@block.command()
@output.repository_option
@click.option("--disk", required=True, help="Name of the chain.")
@click.option("--size", type=output.Size(), help="Of the disk; default: the parent's.")
@click.option("--parent", metavar="ID", help="What is not put is as in this snapshot; default: zero.")
@_block_size
@click.option(
    "--timeout", type=int, default=3600, show_default=True, help="Seconds without a block until it is given up."
)
@click.option("--name", "label", help="A name to find the snapshot by.")
@_state
@chain_options
@key_options
@output.json_option
def start(
    place: str,
    disk: str,
    size: int | None,
    parent: str | None,
    block_size: int | None,
    timeout: int,
    label: str | None,
    state: str | None,
    key: str | KeyChoice | None,
    keys: Unlocking,
    as_json: bool,
) -> None:
    """Begin a snapshot that is written block by block."""
    from snapcore.service import Staging

    staging = Staging(keys.open(place), state)
    begun = staging.start(disk, size, parent=parent, block_bytes=block_size, timeout_s=timeout, label=label, key=key)
    output.print_json(begun)


@block.command()
@click.argument("session", metavar="ID")
@output.repository_option
@_state
@key_options
@output.json_option
def put(session: str, place: str, state: str | None, keys: Unlocking, as_json: bool) -> None:
    """Put blocks from standard input, one a line as `read` prints them; each that was taken is answered by a line."""
    import msgspec

    from snapcore.service import Staging
    from snapcore.service.blocks import BLOCK_LIMIT_BYTES

    class Line(msgspec.Struct):
        index: int
        data: bytes
        checksum: str

    staging = Staging(keys.open(place), state)
    longest = 2 * BLOCK_LIMIT_BYTES
    while line := sys.stdin.buffer.readline(longest):
        try:
            found = msgspec.json.decode(line, type=Line)
        except msgspec.DecodeError as error:
            raise UsageError(f"a block is a line with index, data and checksum: {error}") from error
        staging.put_block(session, found.index, found.data, found.checksum)
        output.print_json({"index": found.index, "checksum": found.checksum})


@block.command()
@click.argument("session", metavar="ID")
@output.repository_option
@click.option("--count", type=int, required=True, help="How many different blocks were put.")
@click.option("--checksum", help="SHA-256 (base64) of the blocks' SHA-256 one behind the other, by number.")
@_state
@key_options
@output.json_option
def complete(
    session: str, place: str, count: int, checksum: str | None, state: str | None, keys: Unlocking, as_json: bool
) -> None:
    """Make the snapshot of the blocks that were put."""
    from snapcore.service import Staging

    output.print_json(Staging(keys.open(place), state).complete(session, count, checksum))


@block.command()
@click.argument("session", metavar="ID")
@output.repository_option
@_state
@key_options
@output.json_option
def cancel(session: str, place: str, state: str | None, keys: Unlocking, as_json: bool) -> None:
    """Give a snapshot up that is being written."""
    from snapcore.service import Staging

    Staging(keys.open(place), state).cancel(session)
    output.print_json({"cancelled": session})


@block.command()
@output.repository_option
@_state
@key_options
@output.json_option
def sessions(place: str, state: str | None, keys: Unlocking, as_json: bool) -> None:
    """List snapshots that are being written, one a line."""
    from snapcore.service import Staging

    for item in Staging(keys.open(place), state).sessions():
        output.print_json(item)
