"""Image formats beside qemu-img, taking turns: `python bench/formats.py DIR`.

Whole processes are measured, with what starting Python costs, on cached images. The disk is made of the files below
/usr, with holes between them. snapcore's results are durable when it ends; so are those of
`qemu-img convert -t writeback`, which the bar counts against. Its default, which leaves everything in the page cache,
is shown beside it.
"""

import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
from contenders import find_snapcore
from measure import Command, run, warm_data

_BAR = 1.2
_RUN_BYTES = 3 << 20
_HOLE_BYTES = 5 << 20
_FILE_BYTES = 4 << 20


@dataclass(frozen=True)
class Job:
    """One piece of work: by snapcore into a name, and by qemu-img with a cache mode into a name."""

    name: str
    ours: Callable[[str], Command]
    theirs: Callable[[str, str], Command]
    image: Path


def make_disk(path: Path, data_bytes: int) -> None:
    """A sparse disk with the content of real files."""
    left, used, at = data_bytes, 0, 0
    with path.open("xb") as disk:
        for file in sorted(Path("/usr").rglob("*")):
            if not file.is_file() or file.is_symlink():
                continue
            length = min(file.stat().st_size, left, _FILE_BYTES)
            with file.open("rb") as content:
                disk.seek(at)
                disk.write(content.read(length))
            at += -(-length // 4096) * 4096
            used, left = used + length, left - length
            if used >= _RUN_BYTES:
                at, used = at + _HOLE_BYTES, 0
            if left == 0:
                break
        disk.truncate(-(-at // (1 << 20)) << 20)


def convert(*words: str | Path) -> Command:
    """A call of `qemu-img convert`."""
    return Command(("qemu-img", "convert", *map(str, words)))


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--mib", default=2048, show_default=True, help="Of data; a quarter of it where zlib packs.")
@click.option("--rounds", default=5, show_default=True, help="Each runs all, one after the other.")
@click.option("--only", default="", metavar="TEXT", help="Only jobs whose names hold it: import, zstd, ….")
@click.option("--snapcore", help="The snapcore executable; default: that of this Python.")
def main(folder: Path, mib: int, rounds: int, only: str, snapcore: str | None) -> None:
    """Print medians of times and of their ratios."""
    place = Path(tempfile.mkdtemp(prefix="snapcore-formats-", dir=folder))
    try:
        chosen = [job for job in jobs(place, mib << 20, find_snapcore(snapcore)) if only in job.name]
        missed = measure(chosen, place, rounds)
    finally:
        shutil.rmtree(place)
    sys.exit(missed)


def jobs(place: Path, data_bytes: int, ours: str) -> list[Job]:
    """Imports of qcow2 and exports to it, plain and packed."""
    found = []
    pool = str(place / "pool")
    run([Command((ours, "pool", "init", pool))])
    for name, part, packing in (("plain", 1, None), ("zlib", 4, "zlib"), ("zstd", 1, "zstd")):
        raw, image = place / f"{name}.raw", place / f"{name}.qcow2"
        make_disk(raw, data_bytes // part)
        options = () if packing is None else ("-c", "-o", f"compression_type={packing}")
        chosen = () if packing is None else ("--packing", packing)
        run([convert("-f", "raw", "-O", "qcow2", *options, raw, image)])
        run([Command((ours, "disk", "import", str(raw), "--name", name, "-p", pool))])

        def import_ours(out: str, image: Path = image) -> Command:
            return Command((ours, "disk", "import", str(image), "--name", out, "-p", pool))

        def import_theirs(cache: str, out: str, image: Path = image) -> Command:
            return convert("-t", cache, "-f", "qcow2", "-O", "raw", image, place / out)

        def export_ours(out: str, name: str = name, chosen: tuple[str, ...] = chosen) -> Command:
            target = str(place / out)
            return Command((ours, "disk", "export", name, target, "--format", "qcow2", *chosen, "-p", pool))

        def export_theirs(cache: str, out: str, raw: Path = raw, options: tuple[str, ...] = options) -> Command:
            return convert("-t", cache, "-f", "raw", "-O", "qcow2", *options, raw, place / out)

        found.append(Job(f"import {name}", import_ours, import_theirs, image))
        found.append(Job(f"export {name}", export_ours, export_theirs, raw))
    return found


def measure(found: list[Job], place: Path, rounds: int) -> int:
    """Run all jobs and print a line for each. Returns how many missed the bar."""
    missed = 0
    click.echo(
        f"{'':14} {'snapcore':>9} {'-t writeback':>13} {'ratio':>6} {'-t unsafe':>10} {'ratio':>6}  CPU of both, memory"
    )
    for job in found:
        warm_data(job.image)
        walls: list[tuple[float, float, float, float, float]] = []
        peak_bytes = 0
        for number in range(rounds):
            cost, _ = run([job.ours("out")])
            peak_bytes = max(peak_bytes, cost.peak_rss_bytes)
            clean(place, job)
            durable, _ = run([job.theirs("writeback", "out")])
            clean(place, None)
            loose, _ = run([job.theirs("unsafe", "out")])
            clean(place, None)
            run([Command(("sync",))])
            if number:
                # The first round fills caches.
                walls.append((cost.wall_s, durable.wall_s, loose.wall_s, cost.cpu_s, durable.cpu_s))
        ours, theirs, fast, cpu, their_cpu = (statistics.median(column) for column in zip(*walls, strict=True))
        ratio = statistics.median(mine / its for mine, its, *_ in walls)
        loosely = statistics.median(mine / its for mine, _, its, *_ in walls)
        missed += ratio > _BAR
        click.echo(
            f"{job.name:14} {ours:8.2f}s {theirs:12.2f}s {ratio:6.2f} {fast:9.2f}s {loosely:6.2f}  "
            f"{cpu:.2f} and {their_cpu:.2f}, {peak_bytes >> 20} MiB"
        )
    click.echo(f"bar {_BAR} against -t writeback: {'missed by ' + str(missed) if missed else 'reached'}")
    return missed


def clean(place: Path, job: Job | None) -> None:
    """Remove what was made."""
    if job is not None and job.name.startswith("import"):
        command = job.ours("out").arguments
        run([Command((command[0], "disk", "delete", "out", "-p", str(place / "pool")))])
    (place / "out").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
