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
    from snapcore.cli import difference
    from snapcore.source.compare import differing_rows

    with output.bar() as progress:
        rows = differing_rows(a, b, block_bytes=block, progress=progress)
    if as_json:
        output.print_json({"extents": list(zip(rows[::2], rows[1::2], strict=True))})
    else:
        difference.show(rows)
