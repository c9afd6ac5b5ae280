"""The disks of many machines from one image: time and bytes; some of the machines boot.

    python bench/launch.py [--machines 200] [--boot 10] [--data-mib 1024] [--folder DIR]

The image is an ext4 root of 8 GiB with files of /usr, and a small init that reads some of them, writes and powers off.
Bytes are those of blocks on the host. Booting needs what tests/support/guest.py asks for.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from snapcore import Image, NbdServer, Pool, Repository, open_image
from snapcore.repository import Labels
from snapcore.service import Regions
from snapcore.service import image as images
from tests.support.guest import make_guest, make_root

MIB = 1 << 20
GIB = 1 << 30
WORK = """
/bin/busybox cat /usr/bin/* > /dev/null 2>&1
/bin/busybox dd if=/dev/urandom of=/written bs=64k count=16 2>/dev/null
echo "GUEST: done"
"""


def taken(place: Path) -> int:
    """Bytes that files take on the host."""
    return sum(path.lstat().st_blocks * 512 for path in place.rglob("*") if path.is_file())


def make_system(folder: Path, data_bytes: int) -> Path:
    """The root, with files of /usr up to so many bytes."""
    left = data_bytes
    for source in sorted(path for top in ("bin", "lib") for path in Path("/usr", top).rglob("*")):
        size = source.lstat().st_size
        if not source.is_file() or source.is_symlink() or size > left:
            continue
        target = folder / "root" / source.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        left -= size
    # The guest reads what is in there: a few programs.
    kept = sorted((folder / "root/usr/bin").iterdir())
    for program in kept[40:]:
        program.unlink()
    return make_root(folder, WORK, 8 * GIB)


def main() -> None:
    """Print what launching takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--machines", type=int, default=200)
    parser.add_argument("--boot", type=int, default=10)
    parser.add_argument("--data-mib", type=int, default=1024)
    parser.add_argument("--folder", default=None)
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="snapcore-launch-", dir=options.folder))
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    try:
        work(place, options.machines, options.boot, options.data_mib * MIB)
    finally:
        shutil.rmtree(place)


def work(place: Path, machines: int, boots: int, data_bytes: int) -> None:
    """Import, launch, boot."""
    system = make_system(place, data_bytes)
    print(f"image file: {system.stat().st_size >> 30} GiB, {taken_file(system) >> 20} MiB on the host")
    repository = Repository.create(place / "repo")
    started = time.monotonic()
    with open_image(system) as source:
        made = images.take(repository, Labels(name="debian"), source)
    spent = time.monotonic() - started
    print(f"image import: {spent:.2f} s, {repository.stored_bytes() >> 20} MiB stored")
    started = time.monotonic()
    shutil.copyfile(system, place / "copy")
    print(f"one plain copy of the file, for comparison: {time.monotonic() - started:.2f} s, not synced")
    (place / "copy").unlink()
    launch(place, repository, made, machines, boots)
    launch_whole(place, repository, made, machines)


def taken_file(path: Path) -> int:
    """Bytes that a file takes on the host."""
    return path.stat().st_blocks * 512


def launch(place: Path, repository: Repository, made: Image, machines: int, boots: int) -> None:
    """Lazy machines, of which some boot."""
    names = images.names("vm-###", machines)
    with Pool.create(place / "pool", regions=Regions()) as pool:
        before = taken(place / "pool")
        started = time.monotonic()
        images.launch(pool, repository, made, names)
        spent = time.monotonic() - started
        after = taken(place / "pool")
        started = time.monotonic()
        pool.open_disk(names[-1]).pread(4096, 1024)
        first_s = time.monotonic() - started
        print(
            f"launch of {machines}: {spent * 1000:.0f} ms, {(after - before) >> 10} KiB in the pool; "
            f"first read of the last machine: {first_s * 1000:.1f} ms"
        )
        if boots:
            boot(place, pool, names[:boots])


def boot(place: Path, pool: Pool, names: list[str]) -> None:
    """Let machines boot, two at a time."""
    guest = make_guest(place)
    socket = Path(tempfile.mkdtemp(prefix="snapcore-nbd-")) / "nbd"
    took: list[float] = []

    def run(name: str) -> str:
        started = time.monotonic()
        said = guest.boot(socket, name)
        took.append(time.monotonic() - started)
        return said

    before = taken(place / "pool")
    with NbdServer(pool, listen=[f"unix:{socket}"]), ThreadPoolExecutor(2) as hands:
        first = run(names[0])
        fetched = pool.open_disk(names[0]).hydration()
        said = [first, *hands.map(run, names[1:])]
    shutil.rmtree(socket.parent)
    assert all("GUEST: done" in text for text in said), said
    assert fetched is not None
    after = pool.open_disk(names[0]).hydration()
    assert after is not None
    print(
        f"{len(names)} booted, wrote 1 MiB and powered off: the first in {took[0]:.1f} s, others in "
        f"{sum(took[1:]) / max(1, len(took) - 1):.1f} s each, two at a time"
    )
    print(
        f"fetched for the first {fetched.here_bytes >> 10} KiB of {fetched.total_bytes >> 20} MiB "
        f"({100 * fetched.here_bytes / fetched.total_bytes:.2f} %), for the others "
        f"{(after.here_bytes - fetched.here_bytes) >> 10} KiB; all that the pool took: "
        f"{(taken(place / 'pool') - before) >> 10} KiB"
    )


def launch_whole(place: Path, repository: Repository, made: Image, machines: int) -> None:
    """Machines that need the repository no more."""
    with Pool.create(place / "whole", regions=Regions()) as pool:
        started = time.monotonic()
        images.launch(pool, repository, made, images.names("vm-###", machines), whole=True)
        spent = time.monotonic() - started
        print(f"launch of {machines} with --whole: {spent:.2f} s, {taken(place / 'whole') >> 20} MiB in the pool")


if __name__ == "__main__":
    main()
