"""Archives of pool disks: against the bare work on what changed, by the size of the disk, and beside a guest.

    python bench/archive.py [--gib 2] [--folder DIR]

Ratios of one run, on cached files; each figure is the best of three, archive and bare work in turns.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import blake3

from snapcore import LocalStore, Repository, extents, lz
from snapcore.pool import Disk, Pool, Snapshot
from snapcore.service import Archived, Archives

CHUNK = 64 << 10
MIB = 1 << 20
GIB = 1 << 30


def noise(dice: random.Random, length: int) -> bytes:
    """Bytes of which about half can be compressed."""
    return b"".join(dice.randbytes(2048) + bytes([dice.randrange(1, 256)]) * 2048 for _ in range(length // 4096))


def fill(disk: Disk, length: int, stride: int = MIB) -> None:
    """Write a MiB every `stride` until `length` is written."""
    dice = random.Random(1)
    for number in range(length // MIB):
        disk.pwrite(noise(dice, MIB), number * stride)


def change(disk: Disk, dice: random.Random, total: int, run: int, places: int) -> None:
    """Overwrite `total` bytes in runs of `run` bytes, at random places of `places` runs."""
    for place in dice.sample(range(places), total // run):
        disk.pwrite(noise(dice, max(run, 4096))[:run], place * run)


def bare(snapshot: Snapshot, rows: extents.Extents) -> float:
    """Seconds to read, hash and compress these bytes, on two threads and in spans, and nothing else."""
    from concurrent.futures import ThreadPoolExecutor

    started = time.monotonic()
    spans = list(extents.spans(rows, 4 * MIB))
    joined: list[list[tuple[int, int]]] = [[]]
    filled = 0
    for span in spans:
        if filled + span[1] > 4 * MIB:
            joined.append([])
            filled = 0
        joined[-1].append(span)
        filled += span[1]

    def work(parts: list[tuple[int, int]]) -> int:
        data = bytearray(sum(length for _, length in parts))
        view, at = memoryview(data), 0
        for offset, length in parts:
            snapshot.pread_into(view[at : at + length], offset)
            at += length
        pieces = [view[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
        for piece in pieces:
            blake3.blake3(piece).digest()
        return len(lz.pack_blocks(pieces, 16))

    with ThreadPoolExecutor(2) as hands:
        list(hands.map(work, joined))
    return time.monotonic() - started


def archive(pool: Pool, repository: Repository, disk: Disk) -> tuple[Archived, float]:
    """Cut and archive. Returns seconds from the cut to completeness too."""
    with Archives(pool) as archives:
        started = time.monotonic()
        done = archives.archive(repository, disk).result()
        return done, time.monotonic() - started


def ratios(folder: Path, gib: int) -> Iterator[str]:
    """1 % changed, in runs of a MiB and of 4 KiB."""
    with Pool.create(folder / "one") as pool:
        repository = Repository.create(LocalStore(str(folder / "repo")))
        disk = pool.create_disk("disk", gib * GIB)
        fill(disk, gib * GIB)
        archive(pool, repository, disk)
        dice = random.Random(2)
        for run in (MIB, CHUNK, 4096):
            total = gib * GIB // 100 // MIB * MIB
            best, plain, stored = [], [], []
            for _ in range(3):
                change(disk, dice, total, run, gib * GIB // run)
                pool.checkpoint()
                before = pool.snapshots()[-1]
                done, spent = archive(pool, repository, disk)
                rows = extents.aligned(pool.diff(before, done.local), CHUNK, disk.size_bytes)
                best.append(spent)
                plain.append(bare(done.local, rows))
                stored.append(done.archived.stored_bytes / total)
            yield (
                f"1 % changed in runs of {run >> 10} KiB: {min(best):.3f} s, {min(best) / min(plain):.2f} x reading, "
                f"hashing and compressing the {extents.total_bytes(rows) >> 20} MiB of chunks ({min(plain):.3f} s); "
                f"stored {min(stored):.2f} x the {total >> 20} MiB changed"
            )


def sizes(folder: Path) -> Iterator[str]:
    """A GiB changed on 10 GiB and on 10 TiB."""
    spent = {}
    for name, size in (("10 GiB", 10 * GIB), ("10 TiB", 10 << 40)):
        with Pool.create(folder / name.replace(" ", "")) as pool:
            repository = Repository.create(LocalStore(str(folder / f"repo-{size}")))
            disk = pool.create_disk("disk", size)
            # As much mapped in both, in the large one spread over all of it.
            fill(disk, 2 * GIB, size // 2048)
            archive(pool, repository, disk)
            times = []
            for turn in range(3):
                dice = random.Random(turn)
                for number in range(1024):
                    disk.pwrite(noise(dice, MIB), number * (size // 1024))
                pool.checkpoint()
                os.sync()
                times.append(archive(pool, repository, disk)[1])
            spent[name] = min(times)
        shutil.rmtree(folder / name.replace(" ", ""))
        shutil.rmtree(folder / f"repo-{size}")
    yield f"1 GiB changed: {spent['10 GiB']:.2f} s on 10 GiB, {spent['10 TiB'] / spent['10 GiB']:.2f} x that on 10 TiB"


def guest(folder: Path) -> Iterator[str]:
    """Random 4-KiB reads and writes over NBD by fio, alone and while a large archive runs."""
    import json
    import subprocess

    from snapcore.server import NbdServer

    if shutil.which("fio") is None:
        yield "guest beside an archive: needs fio"
        return
    with Pool.create(folder / "guest") as pool:
        disk, other = pool.create_disk("disk", 4 * GIB), pool.create_disk("other", 4 * GIB)
        fill(disk, GIB)
        fill(other, GIB)
        pool.checkpoint()
        os.sync()
        with NbdServer(pool, listen=[f"unix:{folder}/socket"]):

            def load(seconds: int) -> float:
                words = [
                    "fio", "--name=guest", "--ioengine=nbd", f"--uri=nbd+unix:///disk?socket={folder}/socket",
                    "--rw=randrw", "--bs=4k", "--iodepth=4", "--size=1g", f"--runtime={seconds}", "--time_based",
                    "--output-format=json", f"--output={folder}/fio.json",
                ]  # fmt: skip
                subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
                found = json.loads((folder / "fio.json").read_text())["jobs"][0]
                return float(found["read"]["iops"] + found["write"]["iops"])

            load(2)
            alone, beside = [], []
            for turn in range(2):
                alone.append(load(4))
                stop = threading.Event()

                def keep_on(turn: int = turn, stop: threading.Event = stop) -> None:
                    number = 0
                    while not stop.is_set():
                        number += 1
                        # A repository that has nothing: all of the disk is read, hashed, compressed and stored.
                        place = Repository.create(LocalStore(str(folder / f"repo-{turn}-{number}")))
                        archive(pool, place, other)

                worker = threading.Thread(target=keep_on)
                worker.start()
                beside.append(load(4))
                stop.set()
                worker.join()
    share = statistics.mean(beside) / statistics.mean(alone)
    yield f"guest, random 4 KiB over NBD: {share:.2f} x its speed while archives run"


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=int, default=2, help="size of the disk of which 1 %% changes")
    parser.add_argument("--folder", type=Path, help="where to work")
    parser.add_argument("parts", nargs="*", default=["ratios", "sizes", "guest"])
    words = parser.parse_args()
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    folder = Path(tempfile.mkdtemp(dir=words.folder))
    try:
        for part, lines in (
            ("ratios", lambda: ratios(folder, words.gib)),
            ("sizes", lambda: sizes(folder)),
            ("guest", lambda: guest(folder)),
        ):
            for line in lines() if part in words.parts else ():
                print(line, flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
