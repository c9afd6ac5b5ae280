"""What commands share that read and write images of any format: options, opening one, and writing one."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from snapcore.cli import output
from snapcore.source import formats

if TYPE_CHECKING:
    from snapcore.progress import ProgressCallback
    from snapcore.source import Source, Written

PIPE = "-"

read_format_option = click.option(
    "--format",
    "read_format",
    type=click.Choice(formats.READ_FORMATS),
    help="Of IMAGE. Default: what its name says, and the first bytes must agree.",
)
backing_option = click.option(
    "--backing-in",
    "backing_folders",
    multiple=True,
    metavar="DIR",
    help="Where backing files of IMAGE may be opened; nowhere else they are. May be given several times.",
)
written_format_option = click.option(
    "--format",
    "written_format",
    type=click.Choice(formats.WRITTEN_FORMATS),
    help="Of TARGET: qcow2 version 3, VHD fixed, VMDK stream-optimised. Default: what its name says.",
)
packing_option = click.option(
    "--packing",
    type=click.Choice(formats.COMPRESSIONS),
    help="Compress the clusters of a qcow2 image.",
)


def format_of(target: str, written_format: str | None) -> str:
    """The format that is written: what was asked for, else what the name says."""
    return written_format or formats.check_written(formats.of_name(target))


def check_target(target: str, written_format: str, packing: str | None, *, in_place: bool, as_json: bool) -> bool:
    """Whether the target is an image that `write` writes; False for the raw file that others write in place too."""
    if written_format == formats.RAW and packing is None and target != PIPE:
        return False
    if in_place:
        raise click.UsageError("--in-place is for raw images and devices; another format needs a new name")
    if packing is not None and written_format != "qcow2":
        raise click.UsageError(f"--packing is for qcow2; {written_format} has no choice")
    if target == PIPE and written_format == "qcow2":
        raise click.UsageError("qcow2 cannot go to standard output: its header is known last; name a file")
    if target == PIPE and as_json:
        raise click.UsageError("standard output takes the image or the JSON, not both")
    if target == PIPE and sys.stdout.isatty():
        raise click.UsageError("standard output is a terminal; send it to a file or a program")
    return True


def write(
    source: Source,
    target: str,
    written_format: str,
    packing: str | None,
    forbidden_folder: str,
    progress: ProgressCallback | None,
) -> Written:
    """Write a disk to a new file or to standard output."""
    from snapcore.source import send_image, write_image

    if target != PIPE:
        return write_image(
            source,
            target,
            written_format,
            compression=packing,
            forbidden_folder=forbidden_folder,
            progress=progress,
        )
    return send_image(source, sys.stdout.fileno(), written_format, name="standard output", progress=progress)


def say_written(done: Written, facts: dict[str, object], verb: str, *, as_json: bool) -> None:
    """Print what was done; nothing when standard output is the image."""
    if facts["target"] == PIPE:
        return
    facts |= {"format": done.format, "file_bytes": done.file_bytes, "duration_s": round(done.duration_s, 6)}
    if as_json:
        output.print_json(facts)
        return
    # What lies on the medium: holes take nothing.
    taken = os.stat(str(facts["target"])).st_blocks * 512
    line = f"{verb} {facts['target']}, {done.format}: {output.size(taken)} in {done.duration_s:.2f} s"
    click.echo(output.text(line))
