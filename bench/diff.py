"""`snapcore diff` beside the plain two-thread compare in C (compare.c), taking turns: `python bench/diff.py A B`.

Whole processes are measured, with what starting Python costs; the inner time of the C program is printed too.
Relies on a C compiler. The bar: median of the ratios of wall times at most 1.3.
"""

import statistics
import sys
from pathlib import Path

import click
from contenders import find_snapcore
from images import compare_command
from measure import Command, run, warm_data

_BAR = 1.3


@click.command()
@click.argument("a", type=click.Path(exists=True, path_type=Path))
@click.argument("b", type=click.Path(exists=True, path_type=Path))
@click.option("--runs", default=5, show_default=True, help="Rounds; each runs both, one after the other.")
@click.option("--snapcore", help="The snapcore executable; default: that of this Python.")
def main(a: Path, b: Path, runs: int, snapcore: str | None) -> None:
    """Compare two images with both programs and print times and ratio."""
    ours = Command((find_snapcore(snapcore), "diff", str(a), str(b)))
    theirs = Command(tuple(compare_command(a, b)))
    for image in (a, b):
        warm_data(image)
    ratios, walls = [], []
    for _ in range(runs):
        cost, _ = run([ours])
        base, printed = run([theirs])
        ratios.append(cost.wall_s / base.wall_s)
        walls.append((cost, base))
        click.echo(
            f"snapcore diff {cost.wall_s:.3f} s wall {cost.cpu_s:.3f} s CPU {cost.peak_rss_bytes >> 20} MiB   "
            f"C {base.wall_s:.3f} s wall {base.cpu_s:.3f} s CPU   ({printed.strip()})"
        )
    ratio = statistics.median(ratios)
    click.echo(
        f"snapcore diff takes {ratio:.2f} x the C compare; bar {_BAR}: {'reached' if ratio <= _BAR else 'missed'}"
    )
    sys.exit(ratio > _BAR)


if __name__ == "__main__":
    main()
