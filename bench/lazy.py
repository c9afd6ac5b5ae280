"""What a lazy disk costs: its first read, and its hydration beside a restore of the same snapshot, in one run.

    python bench/lazy.py IMAGE [DIR] [--runs 5]

IMAGE is any disk image (`mke2fs -t ext4 -d /usr/lib IMAGE 4G` makes one of real files). The repository is a folder in
DIR, as are the restored file and the pool. Restores and hydrations take turns; both end when all is durable. The first
read is of 4 KiB in the middle of a disk that was made just before, in the same process. Medians, and their ratio.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from snapcore import Repository
from snapcore.pool import Pool
from snapcore.service import Regions


def restored(repository: Repository, snapshot: str, folder: Path) -> float:
    """Seconds of a restore into a new file."""
    target = folder / "restored.img"
    started = time.perf_counter()
    repository.restore(snapshot, target)
    spent = time.perf_counter() - started
    target.unlink()
    return spent


def hydrated(regions: Regions, where: str, folder: Path) -> tuple[float, float, float]:
    """Seconds of making a lazy disk, of its first read, and of its hydration from then on, in a new pool."""
    region = regions.find(where)
    assert region is not None
    with Pool.create(folder / "pool", regions=regions) as pool:
        started = time.perf_counter()
        disk = pool.create_disk("lazy", source=region)
        made = time.perf_counter()
        disk.pread(4096, disk.size_bytes // 2 // 4096 * 4096)
        read = time.perf_counter()
        disk.hydrate(wait=True)
        whole = time.perf_counter()
    for path in sorted((folder / "pool").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / "pool").rmdir()
    return made - started, read - made, whole - read


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--runs", type=int, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as scratch:
        folder = Path(scratch)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        repository = Repository.create(folder / "repo")
        snapshot = repository.snapshot(chosen.image, disk="d").snapshot
        regions = Regions()
        restores, hydrations = [], []
        for number in range(chosen.runs + 1):
            os.sync()
            restore_s = restored(repository, snapshot.id, folder)
            os.sync()
            hydration = hydrated(regions, f"{folder / 'repo'}:{snapshot.id}", folder)
            # The first pair warms caches.
            if number:
                restores.append(restore_s)
                hydrations.append(hydration)
    written = snapshot.written_bytes / 1e9
    restore_s = statistics.median(restores)
    make_s, read_s, hydrate_s = (statistics.median(found[part] for found in hydrations) for part in range(3))
    print(f"{written:.2f} GB of data in a disk of {snapshot.size_bytes / 1e9:.2f} GB")
    print(f"making a lazy disk     {make_s * 1e3:8.1f} ms")
    print(f"first read of 4 KiB    {read_s * 1e3:8.1f} ms")
    print(f"restore                {restore_s:8.2f} s  {written / restore_s:6.2f} GB/s")
    print(f"hydration              {hydrate_s:8.2f} s  {written / hydrate_s:6.2f} GB/s")
    print(f"hydration / restore    {restore_s / hydrate_s:8.2f}")


if __name__ == "__main__":
    main()
