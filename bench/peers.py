"""Measures snapcore and its peers side by side on generations of a disk image, with snapcore's bars.

Every round does each work (full snapshot, an increment of each later generation, restore of the last one,
verify) with one contender after the other, beginning with another one each round, so that a drift of the
machine hits all alike. Before each measured run what it reads is read into the page cache and everything is
synced; restored images are compared with the original and deleted. Relies on generations.py for the images
and, for all repositories at once, on free disk of about ten times their used bytes.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from contenders import Contender, Snapcore, all_contenders, missing_programs
from images import BLOCK_BYTES, data_bytes, differing_blocks
from measure import Command, CommandError, files_below, run, tree_bytes, warm, warm_data
from report import FULL, INCREMENTAL, RESTORE, VERIFY, Sample, Work, rows, table


class WrongRestoreError(RuntimeError):
    """A contender restored something else than it was given."""


class Contest:
    """All contenders on one set of generations, in a folder that may be deleted afterwards."""

    def __init__(self, contenders: Sequence[Contender], images: Sequence[Path], folder: Path) -> None:
        self._contenders = contenders
        self._images = images
        self._folder = folder
        changed_blocks = [differing_blocks(before, after) for before, after in pairwise(images)]
        self._plain_bytes = data_bytes(images[0]) + sum(changed_blocks) * BLOCK_BYTES

    def round(self, number: int) -> Iterator[Sample]:
        """Measure every work of every contender once, from empty repositories."""
        first = number % len(self._contenders)
        order = [*self._contenders[first:], *self._contenders[:first]]
        for contender in order:
            folder = self._folder / contender.name
            shutil.rmtree(folder, ignore_errors=True)
            contender.start(folder, self._images)
        for work in self._works():
            for contender in order:
                if commands := self._commands(contender, work):
                    yield self._measure(number, work, contender, commands)

    def _works(self) -> list[Work]:
        last = len(self._images) - 1
        increments = [Work(INCREMENTAL, generation) for generation in range(1, last + 1)]
        return [Work(FULL, 0), *increments, Work(RESTORE, last), Work(VERIFY, last)]

    def _commands(self, contender: Contender, work: Work) -> list[Command]:
        if work.kind == RESTORE:
            return contender.restore(work.generation, self._restored)
        if work.kind == VERIFY:
            return contender.verify()
        return contender.snapshot(work.generation)

    @property
    def _restored(self) -> Path:
        return self._folder / "restored"

    def _measure(self, number: int, work: Work, contender: Contender, commands: list[Command]) -> Sample:
        self._restored.mkdir()
        self._warm(work, contender)
        stored_before_bytes = tree_bytes(contender.repository)
        os.sync()
        cost, output = run(commands)
        if work.kind in (FULL, INCREMENTAL):
            contender.note_snapshot(output)
        if work.kind == RESTORE:
            self._check_restored(contender, self._images[work.generation])
        shutil.rmtree(self._restored)
        return Sample(
            number,
            work,
            contender.name,
            cost.wall_s,
            cost.cpu_s,
            cost.peak_rss_bytes,
            tree_bytes(contender.repository) - stored_before_bytes,
            self._plain_bytes,
        )

    def _warm(self, work: Work, contender: Contender) -> None:
        """Read into the page cache what the work reads: images, and the repository if it is not empty."""
        if work.kind != VERIFY:
            warm(self._images[work.generation])
        if work.kind == INCREMENTAL:
            warm_data(self._images[work.generation - 1])
        for path in files_below(contender.repository):
            warm_data(path)

    def _check_restored(self, contender: Contender, image: Path) -> None:
        restored = self._restored / image.name
        if restored.stat().st_size != image.stat().st_size:
            raise WrongRestoreError(f"{contender.name} restored {image.name} with another size")
        if blocks := differing_blocks(restored, image):
            raise WrongRestoreError(f"{contender.name} restored {image.name} with {blocks} wrong blocks")


def find_images(folder: Path) -> list[Path]:
    """The generations in a folder, in order."""
    images: list[Path] = []
    while (image := folder / f"gen{len(images)}.img").exists():
        images.append(image)
    if len(images) < 2:
        raise click.ClickException(f"{folder} needs gen0.img and gen1.img at least; make them with generations.py")
    return images


def choose_contenders(snapcore: str | None, only: str | None) -> list[Contender]:
    """The contenders that were asked for, all of which are installed."""
    contenders = all_contenders(snapcore)
    names = [each.name for each in contenders]
    wanted = only.split(",") if only else names
    if unknown := set(wanted).difference(names):
        raise click.ClickException(f"no contender {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [each for each in contenders if each.name in wanted]
    if missing := missing_programs(chosen):
        raise click.ClickException(f"not installed: {', '.join(missing)}; leave them out with --only")
    return chosen


def measure(contest: Contest, runs: int) -> list[Sample]:
    """Measure all rounds; each figure is told on standard error as it comes."""
    samples = []
    for number in range(runs):
        for sample in contest.round(number):
            said = f"round {number + 1}, {sample.work.title}, {sample.contender}: {sample.wall_s:.2f} s"
            click.echo(said, err=True)
            samples.append(sample)
    return samples


@click.command()
@click.argument("folder", metavar="GENERATIONS_DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--runs", default=3, show_default=True, type=click.IntRange(min=1), help="Rounds.")
@click.option(
    "--work",
    "work_folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for repositories, deleted afterwards; by default beside the generations.",
)
@click.option("--only", help="Names of contenders, with commas; ratios need borg-4m, compare and cp.")
@click.option("--snapcore", help="The snapcore executable; by default on PATH or beside this interpreter.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def main(
    folder: Path,
    runs: int,
    work_folder: Path | None,
    only: str | None,
    snapcore: str | None,
    as_json: bool,
) -> None:
    """Measure snapcore and its peers on the images in GENERATIONS_DIR."""
    images = find_images(folder.resolve())
    contenders = choose_contenders(snapcore, only)
    parent = (work_folder or folder).resolve()
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix="peers-", dir=parent) as temporary:
            samples = measure(Contest(contenders, images, Path(temporary)), runs)
    except (CommandError, WrongRestoreError) as error:
        raise click.ClickException(str(error)) from error
    measured = rows(samples)
    if as_json:
        result = {"cpus": os.cpu_count(), "rounds": runs, "rows": [asdict(row) for row in measured]}
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo(table(measured, judged=Snapcore.NAME))


if __name__ == "__main__":
    main()
