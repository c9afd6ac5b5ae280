"""Every generation restores identical, whatever was deleted before: `python bench/deletions.py DIR [--orders 4]`.

Takes snapshots of the images that generations.py made, then deletes them one by one in several orders, collects after
each deletion, and restores every snapshot that is left: the same bytes as its image, clean by e2fsck, and as sparse.
"""

import os
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import click
from images import data_bytes

from snapcore import Repository, diff_images


def check(repository: Repository, snapshot: str, image: Path, folder: Path) -> None:
    """Restore one snapshot and compare it with its image."""
    target = folder / "restored.img"
    repository.restore(snapshot, target)
    if len(diff_images(str(target), str(image))) or target.stat().st_size != image.stat().st_size:
        raise click.ClickException(f"{snapshot} does not restore to what {image} is")
    if data_bytes(target) > data_bytes(image):
        raise click.ClickException(f"{target} has fewer holes than {image}")
    subprocess.run(["e2fsck", "-fn", target], check=True, capture_output=True)
    target.unlink()


def orders(count: int, wanted: int) -> list[list[int]]:
    """Oldest first, newest first, from the middle outwards, then random ones."""
    middle = sorted(range(count), key=lambda number: abs(number - count // 2))
    found = [list(range(count)), list(range(count))[::-1], middle]
    source = random.Random(5)
    while len(found) < wanted:
        found.append(source.sample(range(count), count))
    return found[:wanted]


@click.command()
@click.argument("generations", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--orders", "wanted", default=4, show_default=True, help="Orders of deletion to try.")
@click.option("--work", type=click.Path(path_type=Path), help="Where to work; default: the system's temporary folder.")
def main(generations: Path, wanted: int, work: Path | None) -> None:
    """Try all of it and print a line for each order."""
    images = sorted(generations.glob("gen?.img"))
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        folder = Path(scratch)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        first = Repository.create(folder / "repository")
        ids = [first.snapshot(image, disk="disk").snapshot.id for image in images]
        for order in orders(len(images), wanted):
            # Objects never change, so links are a copy.
            shutil.copytree(folder / "repository", folder / "copy", copy_function=os.link)
            repository = Repository.open(folder / "copy")
            left = dict(enumerate(ids))
            for number in order:
                for other, snapshot in left.items():
                    check(repository, snapshot, images[other], folder)
                repository.delete(left.pop(number))
                repository.collect()
            size_bytes = sum(path.stat().st_size for path in (folder / "copy" / "packs").iterdir())
            if size_bytes:
                raise click.ClickException(f"{size_bytes} bytes of packs are left of nothing")
            shutil.rmtree(folder / "copy")
            click.echo(f"deleted in the order {order}: all others restored identical, clean and as sparse each time")


if __name__ == "__main__":
    main()
