"""`snapcore verify`: read everything and say what is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from snapcore.cli import output
from snapcore.cli.unlocking import Unlocking, key_options
from snapcore.errors import UsageError

if TYPE_CHECKING:
    from snapcore.repository.share import Share


@click.command()
@output.repository_option
@key_options
@click.option("--part", metavar="K/N", help="Read the K-th of N parts of the packs: one each night reads all.")
@click.option("--sample", metavar="P%", help="Read so much of the packs, chosen at random.")
@click.option("--dask", "scheduler", metavar="ADDRESS", help="Spread the work over the workers of a Dask cluster.")
@output.json_option
def verify(
    place: str, keys: Unlocking, part: str | None, sample: str | None, scheduler: str | None, as_json: bool
) -> None:
    """Read everything in the repository and check it; exit code 1 when something is damaged.

    Of what is under keys that are not unlocked, the stored bytes are checked. With --dask, unlocked keys go to the
    workers with the work: use a scheduler under TLS.
    """
    share = _share(part, sample)
    found = keys.open(place)
    with output.bar() as progress, ExitStack() as stack:
        executor, in_flight = stack.enter_context(_workers(scheduler)) if scheduler else (None, None)
        done = found.verify(share=share, progress=progress, executor=executor, in_flight=in_flight)
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


def _share(part: str | None, sample: str | None) -> Share | None:
    """Which packs to read; None for all."""
    from snapcore.repository.share import Part, Sample

    if part is not None and sample is not None:
        raise click.UsageError("give --part or --sample, not both")
    try:
        if part is not None:
            number, _, of = part.partition("/")
            return Part(int(number), int(of))
        if sample is not None:
            return Sample(float(sample.removesuffix("%")) / 100)
    except ValueError as error:
        raise click.UsageError(f"--part is K/N, as 3/30; --sample a percentage, as 1%: {error}") from error
    return None


@contextmanager
def _workers(scheduler: str) -> Iterator[tuple[Executor, int]]:
    """The workers of a cluster as an executor, and how many pieces of work keep them busy."""
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise UsageError("--dask needs the library dask: pip install 'snapcore[dask]'") from error
    connect: Any = Client
    client = connect(scheduler)
    with client, client.get_executor(pure=False) as executor:
        yield executor, 2 * max(1, sum(client.nthreads().values()))
