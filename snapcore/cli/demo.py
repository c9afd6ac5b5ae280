"""`snapcore demo`: the main job on a real image, from the first snapshot to the comparison of every restored byte."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import click

from snapcore.cli import output
from snapcore.errors import DamagedError, ExistsError


@dataclass(frozen=True, slots=True)
class _Step:
    """A row of the table."""

    name: str
    read_bytes: int
    changed_bytes: int
    stored_bytes: int
    duration_s: float
    copy_s: float

    def cells(self) -> list[str]:
        return [
            self.name,
            output.size(self.read_bytes),
            output.size(self.changed_bytes),
            output.size(self.stored_bytes),
            f"{self.duration_s:.2f} s",
            f"{self.duration_s / self.copy_s:.2f}",
        ]


@click.command()
@click.argument("image", type=click.Path(exists=True, dir_okay=False), required=False)
@click.option("--keep", type=click.Path(), metavar="DIR", help="Work in DIR, a new folder, and leave everything there.")
def demo(image: str | None, keep: str | None) -> None:
    """Show the main job on a copy of IMAGE, or on an ext4 image made of files of this machine."""
    if keep is not None:
        try:
            os.makedirs(keep)
        except FileExistsError as error:
            raise ExistsError(f"{keep} exists already; name a new folder") from error
        _show(os.path.abspath(keep), image, kept=True)
        return
    import tempfile

    with tempfile.TemporaryDirectory(prefix="snapcore-demo-") as folder:
        _show(folder, image, kept=False)


def _show(folder: str, image: str | None, *, kept: bool) -> None:
    from snapcore.cli.demo_image import DemoDisk, copy_sparse
    from snapcore.repository import Repository
    from snapcore.source.compare import diff_images

    os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
    disk = DemoDisk(folder, image)
    click.echo(f"the disk: {disk.what}, {output.size(os.path.getsize(disk.path))}")
    repository = Repository.create(os.path.join(folder, "repo"))
    steps: list[_Step] = []
    taken: list[tuple[str, str]] = []
    for generation, name in enumerate(("full snapshot", "after the first change", "after the second change")):
        if generation:
            click.echo(f"change {generation}: {disk.change(generation)}")
        original = os.path.join(folder, f"generation{generation}.img")
        started = time.monotonic()
        copy_sparse(disk.path, original)
        copy_s = time.monotonic() - started
        with output.bar() as progress:
            done = repository.snapshot(disk.path, disk="demo", progress=progress)
        made = done.snapshot
        steps.append(_Step(name, done.read_bytes, made.changed_bytes, made.stored_bytes, done.duration_s, copy_s))
        taken.append((made.id, original))
    if verdict := disk.check():
        click.echo(verdict)
    click.echo()
    headings = ["snapshot", "read", "changed", "stored", "time", "time ÷ cp"]
    output.table(headings, [step.cells() for step in steps], right=frozenset({1, 2, 3, 4, 5}))
    click.echo("(cp: cp --sparse=always of the same image and a sync of the copy; it stores the whole disk each time)")
    click.echo()

    middle, _ = taken.pop(1)
    frees = repository.unique([middle])
    repository.delete(middle)
    freed = repository.collect()
    click.echo(
        f"deleted the middle snapshot: only it held {output.size(frees.stored_bytes)}; "
        f"freed {output.size(freed.freed_bytes)}"
    )
    for snapshot, original in taken:
        target = os.path.join(folder, f"restored-{snapshot[:12]}.img")
        with output.bar() as progress:
            restored = repository.restore(snapshot, target, progress=progress)
        if len(diff_images(target, original)) or os.path.getsize(target) != os.path.getsize(original):
            raise DamagedError(f"{target} is not what {original} is: please report this")
        click.echo(f"restored {snapshot[:12]} in {restored.duration_s:.2f} s: every byte is the same as it was")
    checked = repository.verify()
    if not checked.ok:
        raise DamagedError(f"the repository {repository.url} does not verify: please report this")
    rate = checked.plain_bytes / checked.duration_s
    click.echo(f"verified {output.size(checked.plain_bytes)} of data at {output.size(int(rate))}/s")
    click.echo()
    place = repository.url if kept else "REPO"
    click.echo("try next:")
    if not kept:
        click.echo("  snapcore repo init REPO")
    click.echo(f"  snapcore snapshot create IMAGE -r {place} --disk NAME")
    click.echo(f"  snapcore snapshot list -r {place}")
    click.echo(f"  snapcore restore ID TARGET -r {place}")
