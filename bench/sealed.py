"""What a key costs: full snapshots and restores of an image, plain and encrypted, in one run.

    python bench/sealed.py IMAGE [DIR] [--runs 5] [--peers]

IMAGE is any disk image (`mke2fs -t ext4 -d /usr/lib IMAGE 4G` makes one of real files). Plain and encrypted ones take
turns, each snapshot into a repository of its own in DIR, which is made before and removed after; every command is a
process of its own. Prints medians, and ratios of medians. With --peers, encrypted full snapshots by borg
(repokey-blake2, LZ4, fixed chunks of 64 KiB) and restic take their turns too.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path

from contenders import Borg, Contender, Restic
from measure import Command, run

KINDS = ("plain", "sealed")


def command(folder: Path, *words: str) -> Command:
    """A command of snapcore with a cache of its own: no fingerprint of an earlier run helps."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "SNAPCORE_REPO": str(folder / "repo")}
    return Command(("snapcore", *words), environment)


def once(kind: str, image: Path, scratch: Path) -> dict[str, float]:
    """Seconds of a full snapshot and of a restore, wall and CPU, and bytes stored."""
    folder = scratch / kind
    folder.mkdir()
    unlock: tuple[str, ...] = ()
    take = ("snapshot", "create", str(image), "--disk", "d", "--name", "the one")
    run([command(folder, "repo", "init", str(folder / "repo"))])
    if kind == "sealed":
        unlock = ("--key-file", str(folder / "key"))
        run([command(folder, "key", "create", "bench", *unlock)])
        take += (*unlock, "--key", "bench")
    os.sync()
    taken, _ = run([command(folder, *take)])
    os.sync()
    restored, _ = run([command(folder, "restore", "the one", str(folder / "out.img"), *unlock)])
    stored = sum(path.stat().st_size for path in (folder / "repo").rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return {
        "snapshot_s": taken.wall_s,
        "snapshot_cpu_s": taken.cpu_s,
        "restore_s": restored.wall_s,
        "restore_cpu_s": restored.cpu_s,
        "stored_bytes": stored,
        "peak_rss_bytes": taken.peak_rss_bytes,
    }


def once_of_peer(peer: Contender, image: Path, scratch: Path) -> float:
    """Seconds of a full snapshot by another program, into a new repository."""
    folder = scratch / peer.name
    peer.start(folder, [image])
    os.sync()
    cost, _ = run(peer.snapshot(0))
    shutil.rmtree(folder)
    return cost.wall_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help="measure borg and restic too")
    chosen = parser.parse_args()
    peers = [Borg("borg-64k-encrypted", 64 << 10, "repokey-blake2"), Restic()] if chosen.peers else []
    peers_s: dict[str, list[float]] = {peer.name: [] for peer in peers}
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(dir=chosen.folder) as scratch:
        for number in range(chosen.runs + 1):
            for kind in KINDS if number % 2 else KINDS[::-1]:
                costs = once(kind, chosen.image.resolve(), Path(scratch))
                # The first pair warms caches.
                if number:
                    found[kind].append(costs)
            for peer in peers if number else ():
                peers_s[peer.name].append(once_of_peer(peer, chosen.image.resolve(), Path(scratch)))
    print(f"{'':16} {'plain':>14} {'sealed':>14} {'ratio':>7}")
    for name in found["plain"][0]:
        plain, sealed = (statistics.median(costs[name] for costs in found[kind]) for kind in KINDS)
        print(f"{name:16} {plain:14,.2f} {sealed:14,.2f} {sealed / plain:7.3f}")
    sealed_s = statistics.median(costs["snapshot_s"] for costs in found["sealed"])
    for name, seconds in peers_s.items():
        median_s = statistics.median(seconds)
        print(f"{name}: full snapshot {median_s:.2f} s; sealed / {name} {sealed_s / median_s:.3f}")


if __name__ == "__main__":
    main()
