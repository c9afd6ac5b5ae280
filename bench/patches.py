"""Measures what an increment keeps when few pages of many chunks changed: the patch bar.

Takes an image, writes 5,000 random 4-KiB blocks into the data and 128 MiB of random data into a hole of a
copy, lets snapcore store both as versions of one disk, and divides the new bytes that snapcore reports for
the second one, before compression, by the bytes of the 4-KiB blocks that differ. Relies on generations.py for
an image, and on free disk of about three times its used bytes.
"""

import json
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from contenders import Snapcore, find_snapcore
from images import BLOCK_BYTES, copy_sparse, data_extents, differing_blocks, holes
from measure import CommandError, run

PATCHED_BLOCKS = 5_000
APPENDED_BYTES = 128 << 20
MOST_KEPT = 1.3
_WRITE_BYTES = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """What changed between two images, and what the second snapshot kept of it before compression."""

    changed_bytes: int
    new_bytes: int
    stored_bytes: int
    ratio: float
    passed: bool


def patch(image: Path, rng: random.Random) -> None:
    """Change an image: random blocks inside its data, and new data in its largest hole."""
    starts = [start for extent in data_extents(image) for start in range(*extent, BLOCK_BYTES)]
    if len(starts) < PATCHED_BLOCKS:
        raise click.ClickException(f"{image.name} has only {len(starts)} blocks of data, {PATCHED_BLOCKS} needed")
    start, end = max(holes(image), key=lambda hole: hole[1] - hole[0], default=(0, 0))
    if end - start < APPENDED_BYTES:
        raise click.ClickException(f"{image.name} has no hole of {APPENDED_BYTES} bytes")
    with image.open("r+b") as file:
        for offset in rng.sample(starts, PATCHED_BLOCKS):
            os.pwrite(file.fileno(), rng.randbytes(BLOCK_BYTES), offset)
        for offset in range(start, start + APPENDED_BYTES, _WRITE_BYTES):
            os.pwrite(file.fileno(), rng.randbytes(_WRITE_BYTES), offset)


def measure(image: Path, snapcore: Snapcore, folder: Path) -> Outcome:
    """Store an image and a patched copy of it, and measure the increment."""
    patched = folder / "patched.img"
    copy_sparse(image, patched)
    patch(patched, random.Random(5))
    changed_bytes = differing_blocks(image, patched) * BLOCK_BYTES
    snapcore.start(folder / snapcore.name, [image, patched])
    run(snapcore.snapshot(0))
    _, output = run(snapcore.snapshot(1))
    printed = json.loads(output)
    ratio = printed["new_bytes"] / changed_bytes
    return Outcome(changed_bytes, printed["new_bytes"], printed["stored_bytes"], ratio, ratio <= MOST_KEPT)


@click.command()
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--work",
    "work_folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the copy and the repository, deleted afterwards; by default beside the image.",
)
@click.option("--snapcore", help="The snapcore executable; by default on PATH or beside this interpreter.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def main(image: Path, work_folder: Path | None, snapcore: str | None, as_json: bool) -> None:
    """Measure the patch bar on IMAGE, such as gen0.img of a set made by generations.py."""
    image = image.resolve()
    parent = (work_folder or image.parent).resolve()
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix="patches-", dir=parent) as temporary:
            outcome = measure(image, Snapcore(find_snapcore(snapcore)), Path(temporary))
    except CommandError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(asdict(outcome)))
        return
    verdict = "pass" if outcome.passed else "FAIL"
    click.echo(f"changed 4-KiB blocks  {outcome.changed_bytes / 1e6:8.1f} MB")
    click.echo(f"new bytes             {outcome.new_bytes / 1e6:8.1f} MB, stored {outcome.stored_bytes / 1e6:.1f} MB")
    click.echo(f"new ÷ changed         {outcome.ratio:8.2f} (≤ {MOST_KEPT}: {verdict})")


if __name__ == "__main__":
    main()
