"""`snapcore diff`: where two disk images differ."""

from __future__ import annotations

import click

from snapcore.cli import output


@click.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--block", type=output.Size(), default="4K", show_default=True, help="A power of two from 512 on.")
@output.json_option
def diff(a: str, b: str, block: int, as_json: bool) -> None:
    """Print where the images A and B differ: offset and length in bytes, a line each."""
    from snapcore.source.compare import diff_images

    with output.bar() as progress:
        rows = diff_images(a, b, block_bytes=block, progress=progress)
    if as_json:
        output.print_json({"extents": output.extents_json(rows)})
        return
    output.print_extents(rows)
