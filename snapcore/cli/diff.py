"""`snapcore diff`: where two disk images differ."""

from __future__ import annotations

import click

from snapcore.cli import image_files, output
from snapcore.source import formats

_FORMATS = click.Choice(formats.READ_FORMATS)


@click.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--block", type=output.Size(), default="4K", show_default=True, help="A power of two from 512 on.")
@click.option("--format-a", type=_FORMATS, help="Of A. Default: what its name says; any other name means raw.")
@click.option("--format-b", type=_FORMATS, help="Of B.")
@image_files.backing_option
@output.json_option
def diff(
    a: str,
    b: str,
    block: int,
    format_a: str | None,
    format_b: str | None,
    backing_folders: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print where the images A and B differ: offset and length in bytes, a line each."""
    from snapcore.cli import difference
    from snapcore.source.compare import differing_rows

    with output.bar() as progress:
        rows = differing_rows(
            a,
            b,
            block_bytes=block,
            formats=(format_a, format_b),
            backing_folders=backing_folders,
            progress=progress,
        )
    if as_json:
        output.print_json({"extents": list(zip(rows[::2], rows[1::2], strict=True))})
    else:
        difference.show(rows)
