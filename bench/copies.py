"""What copies cost: within a key against `cp` of the same packs, under another key, and of an increment. One run.

    python bench/copies.py IMAGE [DIR] [--runs 5]

IMAGE is any disk image (`mke2fs -t ext4 -d /usr/lib IMAGE 4G` makes one of real files). Snapshots of it, and of it
with 2 % of its pages changed, are taken into a plain and a sealed repository in DIR. Then copies and `cp` take turns,
each into a folder of its own; every command is a process of its own. A copy is durable when it ends, so `cp` is
measured with a sync, and without one. Prints medians.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
from pathlib import Path

from measure import Command, Cost, run

PAGE_BYTES = 4096
CHANGED_SHARE = 0.02


class Place:
    """A folder with repositories, a key file and a cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key_file = str(folder / "key")

    def snapcore(self, *words: str) -> tuple[Cost, str]:
        """Run a command of snapcore."""
        environment = os.environ | {"XDG_CACHE_HOME": str(self.folder / "cache")}
        return run([Command(("snapcore", *words), environment)])

    def repository(self, name: str) -> str:
        """Make an empty repository; its path."""
        path = str(self.folder / name)
        self.snapcore("repo", "init", path)
        return path

    def snapshot(self, image: Path, name: str, repository: str, *words: str) -> None:
        """Take a snapshot of an image."""
        self.snapcore("snapshot", "create", str(image), "--disk", "d", "--name", name, "-r", repository, *words)

    def copy(self, name: str, source: str, target: str, *words: str) -> tuple[Cost, dict[str, int]]:
        """Copy a snapshot; the cost and what the command says."""
        cost, output = self.snapcore("copy", name, "--from", source, "--to", target, "--json", *words)
        return cost, json.loads(output)

    def prepare(self, image: Path) -> tuple[dict[str, str], float]:
        """A plain and a sealed repository with two snapshots each; the packs of the first; GB of data in the image."""
        plain, sealed = self.repository("plain"), self.repository("sealed")
        self.snapcore("key", "create", "bench", "-r", sealed, "--key-file", self.key_file)
        changed = self.folder / "changed.img"
        run([Command(("cp", "--sparse=always", str(image), str(changed)))])
        random_ = random.Random(1)
        with changed.open("r+b") as file:
            pages = changed.stat().st_size // PAGE_BYTES
            for page in random_.sample(range(pages), int(pages * CHANGED_SHARE)):
                file.seek(page * PAGE_BYTES)
                file.write(random_.randbytes(PAGE_BYTES))
        for name, found in (("one", image), ("two", changed)):
            self.snapshot(found, name, plain)
            self.snapshot(found, name, sealed, "--key", "bench", "--key-file", self.key_file)
            if name == "one":
                shutil.copytree(Path(plain) / "packs", self.folder / "packs-of-one")
        changed.unlink()
        _, output = self.snapcore("snapshot", "show", "one", "-r", plain, "--json")
        return {"plain": plain, "sealed": sealed}, json.loads(output)["written_bytes"] / 1e9


def objects_in(repository: str) -> int:
    """How many objects a repository has."""
    return sum(path.is_file() for path in Path(repository).rglob("*"))


def round_of(place: Place, repositories: dict[str, str], written_gb: float) -> dict[str, float]:
    """One measurement of everything."""
    found: dict[str, float] = {}
    key = ("--key-file", place.key_file)
    target = place.repository("to")
    before = objects_in(target)
    os.sync()
    cost, said = place.copy("one", repositories["plain"], target)
    found["plain_copy_s"] = cost.wall_s
    # All objects that are left, and the session.
    found["put_requests_per_12_mib"] = (objects_in(target) - before + 1) / (said["stored_bytes"] / (12 << 20))
    _, said = place.copy("two", repositories["plain"], target)
    found["increment_moved_to_stored"] = said["moved_bytes"] / said["stored_bytes"]
    shutil.rmtree(target)
    target = place.repository("to")
    place.snapcore(
        "key", "share", "bench", "-r", repositories["sealed"], "--to", target, *key, "--new-key-file", key[1]
    )
    os.sync()
    found["sealed_copy_s"] = place.copy("one", repositories["sealed"], target, *key)[0].wall_s
    shutil.rmtree(target)
    for source in repositories:
        target = place.repository("to")
        # Another key of the same holder, so that one option unlocks both.
        place.snapcore("key", "create", "other", "-r", target, *key)
        os.sync()
        cost, _ = place.copy("one", repositories[source], target, "--key", "other", *key)
        found[f"{source}_to_other_key_s"] = cost.wall_s
        found[f"{source}_to_other_key_gb_per_cpu_s"] = written_gb / cost.cpu_s
        _, said = place.copy("two", repositories[source], target, "--key", "other", *key)
        found[f"{source}_to_other_key_increment_moved_to_stored"] = said["moved_bytes"] / said["stored_bytes"]
        shutil.rmtree(target)
    return found | copied_packs(place)


def copied_packs(place: Place) -> dict[str, float]:
    """Seconds of `cp` of all that the first snapshot stored, with and without a sync."""
    packs, copied = place.folder / "packs-of-one", place.folder / "cp"
    os.sync()
    synced, _ = run([Command(("sh", "-c", f"cp -r '{packs}' '{copied}' && sync -f '{copied}'"))])
    shutil.rmtree(copied)
    alone, _ = run([Command(("cp", "-r", str(packs), str(copied)))])
    shutil.rmtree(copied)
    return {"cp_and_sync_s": synced.wall_s, "cp_s": alone.wall_s}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--runs", type=int, default=3)
    chosen = parser.parse_args()
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as scratch:
        place = Place(Path(scratch))
        repositories, written_gb = place.prepare(chosen.image.resolve())
        for number in range(chosen.runs + 1):
            found = round_of(place, repositories, written_gb)
            # The first round warms caches.
            if number:
                rounds.append(found)
    medians = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
    for name, value in medians.items():
        print(f"{name:55} {value:8.3f}")
    for name in ("plain_copy_s", "sealed_copy_s"):
        for other in ("cp_and_sync_s", "cp_s"):
            print(f"{other} / {name:40} {medians[other] / medians[name]:8.3f}")


if __name__ == "__main__":
    main()
