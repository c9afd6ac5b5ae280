"""The bars of the pool, each as a ratio or a count of one run: `python bench/pool.py [FOLDER] [--only NAME,…]`.

Raw files in the same folder are the measure: os.preadv, os.pwrite and os.fdatasync from the same process, alternating.
Medians of rounds; CPU by getrusage where the bar asks for CPU.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from snapcore.persist import Medium
from snapcore.pool import Disk, Pool

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
BLOCK = 4096
ROUNDS = 7


def cpu_s() -> float:
    """CPU time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def timed(function: Callable[..., object], *arguments: object) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def write_raw(raw: int, data: bytes, offsets: Iterable[int], *, sync: bool = False) -> None:
    """Write the same at all offsets of a raw file, synced each."""
    pwrite, fdatasync = os.pwrite, os.fdatasync
    for offset in offsets:
        pwrite(raw, data, offset)
        if sync:
            fdatasync(raw)


def write_disk(disk: Disk, data: bytes, offsets: Iterable[int], *, sync: bool = False) -> None:
    """The same to a disk."""
    pwrite, flush = disk.pwrite, disk.flush
    for offset in offsets:
        pwrite(data, offset)
        if sync:
            flush()


def show(name: str, got: str, bar: str) -> None:
    """A line of the report."""
    print(f"{name:<58} {got:<44} {bar}", flush=True)


@contextmanager
def pool_in(folder: Path, **options: Any) -> Iterator[Pool]:
    """A new pool that is gone afterwards."""
    path = Path(tempfile.mkdtemp(dir=folder))
    try:
        with Pool.create(path / "pool", **options) as pool:
            yield pool
    finally:
        shutil.rmtree(path)


@contextmanager
def raw_in(folder: Path, size_bytes: int) -> Iterator[int]:
    """A raw file that is written full."""
    path = folder / "raw"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        data = os.urandom(MIB)
        for offset in range(0, size_bytes, MIB):
            os.pwrite(descriptor, data, offset)
        os.fsync(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)
        path.unlink()


def fill(disk: Disk, size_bytes: int) -> None:
    """Write the beginning of a disk."""
    data = os.urandom(MIB)
    for offset in range(0, size_bytes, MIB):
        disk.pwrite(data, offset)
    disk.flush()


def percentile(values: list[float], share: float) -> float:
    """Of a list."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


class Stopwatch(Medium):
    """Counts syncs and the time that they take, which is the medium's and not ours."""

    def __init__(self) -> None:
        self.syncs = 0
        self.seconds = 0.0

    def sync(self, descriptor: int) -> None:
        start = time.perf_counter()
        super().sync(descriptor)
        self.seconds += time.perf_counter() - start
        self.syncs += 1

    def beside(self, function: Callable[..., object], *arguments: object) -> tuple[float, int]:
        """How long a call takes beside its syncs, and how many it does."""
        syncs, seconds = self.syncs, self.seconds
        took = timed(function, *arguments)
        return took - (self.seconds - seconds), self.syncs - syncs


def changes_of_versions(folder: Path) -> None:
    """Snapshot, clone, rollback: p99 of the time beside the syncs, and the syncs, at two sizes and three depths."""
    for size in (GIB, 10 * TIB):
        watch = Stopwatch()
        with pool_in(folder, medium=watch, background=False) as pool:
            disk = pool.create_disk("disk", size)
            rng = random.Random(1)
            made = 0
            for depth in (0, 100, 1000):
                while made < depth:
                    disk.pwrite(b"x" * BLOCK, rng.randrange(size // BLOCK) * BLOCK)
                    disk.snapshot()
                    made += 1
                results = {"snapshot": [watch.beside(disk.snapshot) for _ in range(200)]}
                results["clone"] = [watch.beside(disk.clone, f"c{depth}n{i}") for i in range(200)]
                target = disk.snapshot()
                results["rollback"] = [watch.beside(disk.rollback, target) for _ in range(200)]
                made += 201
                for name, values in results.items():
                    times, syncs = [took for took, _ in values], [count for _, count in values]
                    show(
                        f"{name}, {size // GIB} GiB, depth {depth}: p99 beside syncs",
                        f"{percentile(times, 0.99) * 1e3:.2f} ms (median {percentile(times, 0.5) * 1e3:.2f}), "
                        f"{statistics.median(syncs):.0f} sync",
                        "1 ms, 1 sync",
                    )
                for i in range(200):
                    pool.delete_disk(f"c{depth}n{i}")


def reads(folder: Path) -> None:
    """Random 4-KiB reads of a warm disk against os.preadv, at depth 0 and 1,000."""
    size = 256 * MIB
    offsets = [random.Random(2).randrange(size // BLOCK) * BLOCK for _ in range(50_000)]
    buffer = bytearray(BLOCK)
    with pool_in(folder) as pool, raw_in(folder, size) as raw:
        disk = pool.create_disk("disk", TIB)
        fill(disk, size)

        def from_raw() -> None:
            for offset in offsets:
                os.preadv(raw, [buffer], offset)

        def from_disk() -> None:
            pread_into = disk.pread_into
            for offset in offsets:
                pread_into(buffer, offset)

        batch = np.array(offsets, dtype=np.int64)
        rows = np.ones((len(offsets), BLOCK), dtype=np.uint8)
        by_depth: dict[int, list[float]] = {}
        for depth in (0, 1000):
            if depth:
                rng = random.Random(3)
                for _ in range(depth):
                    disk.pwrite(b"y" * BLOCK, rng.randrange(size // BLOCK) * BLOCK)
                    disk.snapshot()
            from_disk()
            pairs = [(timed(from_raw), timed(from_disk)) for _ in range(ROUNDS)]
            by_depth[depth] = [disk_s for _, disk_s in pairs]
            ratio = statistics.median(raw_s / disk_s for raw_s, disk_s in pairs)
            show(f"random 4-KiB reads, depth {depth}", f"{ratio:.2f} x os.preadv", "0.7")
            start = cpu_s()
            disk.pread_many(batch, rows)
            show(f"batch of them, depth {depth}", f"{(cpu_s() - start) / len(offsets) * 1e6:.2f} us of CPU each", "2")
        again = statistics.median(by_depth[1000]) / statistics.median(by_depth[0])
        show("the same at depth 1,000 and 0", f"{again:.2f}", "0.9 to 1.1")


def writes(folder: Path) -> None:
    """Writes against os.pwrite of a raw file that is written full."""
    size = 256 * MIB
    data = os.urandom(BLOCK)
    rng = random.Random(4)
    with pool_in(folder) as pool, raw_in(folder, size) as raw:
        disk = pool.create_disk("disk", TIB)
        fill(disk, size)

        def places() -> list[int]:
            return [block * BLOCK for block in rng.sample(range(size // BLOCK), 20_000)]

        def rate(redirected: bool) -> float:
            ratios = []
            for _ in range(ROUNDS):
                offsets = places()
                if redirected:
                    disk.snapshot()
                os.fsync(raw)
                disk.flush()
                raw_s = timed(write_raw, raw, data, offsets)
                os.fsync(raw)
                disk_s = timed(write_disk, disk, data, offsets)
                disk.flush()
                ratios.append(raw_s / disk_s)
            for snapshot in pool.snapshots() if redirected else ():
                snapshot.delete()
            return statistics.median(ratios)

        show("random 4-KiB writes, the disk's own blocks", f"{rate(False):.2f} x os.pwrite", "0.8")
        show("random 4-KiB writes right after a snapshot", f"{rate(True):.2f} x os.pwrite", "0.6")
        # What the deleted snapshots held is punched out before anything else is timed.
        pool.checkpoint()
        for redirected, bar in ((False, "0.8"), (True, "0.45")):
            ratios = []
            for _ in range(ROUNDS):
                offsets = places()[:100]
                if redirected:
                    disk.snapshot()
                raw_s = timed(functools.partial(write_raw, sync=True), raw, data, offsets)
                disk_s = timed(functools.partial(write_disk, sync=True), disk, data, offsets)
                ratios.append(raw_s / disk_s)
            name = "redirected" if redirected else "own"
            show(f"write + flush each, {name} blocks", f"{statistics.median(ratios):.2f} x pwrite + fdatasync", bar)


def sequential_writes(folder: Path) -> None:
    """MiB by MiB, on a disk that was written in order: what random writes have scattered is written block by block."""
    size = 256 * MIB
    big = os.urandom(MIB)
    with pool_in(folder) as pool, raw_in(folder, size) as raw:
        disk = pool.create_disk("disk", TIB)
        fill(disk, size)
        ratios = []
        for _ in range(ROUNDS):
            raw_s = timed(write_raw, raw, big, range(0, size, MIB))
            os.fsync(raw)
            ratios.append(raw_s / timed(write_disk, disk, big, range(0, size, MIB)))
            disk.flush()
        show("sequential 1-MiB writes", f"{statistics.median(ratios):.2f} x os.pwrite", "0.8")


def differences(folder: Path) -> None:
    """Diff of 5,000 random changes, what the map costs to write, and deletion of a middle snapshot."""
    for size in (TIB, 10 * TIB):
        with pool_in(folder, log_bytes=8 * MIB) as pool:
            disk = pool.create_disk("disk", size)
            rng = random.Random(5)
            for block in rng.sample(range(size // BLOCK), 5000):
                disk.pwrite(b"a" * BLOCK, block * BLOCK)
            before = disk.snapshot()
            pool.checkpoint()
            changed = rng.sample(range(size // BLOCK), 5000)
            written = pool._engine.checkpointer.written_bytes
            log = pool._engine.core.log_next
            for block in changed:
                disk.pwrite(b"b" * BLOCK, block * BLOCK)
            pool.checkpoint()
            metadata = pool._engine.checkpointer.written_bytes - written + (pool._engine.core.log_next - log) * 512
            pages = pool._engine.core.page_file.exclusive(disk._root(), [before._root()])[1]
            times = [timed(pool.diff, before, disk) for _ in range(20)]
            found = len(pool.diff(before, disk))
            show(f"diff of {found} changes, {size // TIB} TiB", f"{statistics.median(times) * 1e3:.1f} ms", "10 ms")
            show(
                f"map and log written for 5,000 changes, {size // TIB} TiB",
                f"{metadata / (len(pages) * 1040):.2f} x their {len(pages)} pages ({metadata / 1e6:.1f} MB)",
                "1.5",
            )
    for count in (1000, 10_000, 100_000):
        with pool_in(folder) as pool:
            disk = pool.create_disk("disk", TIB)
            rng = random.Random(6)
            fill(disk, 64 * MIB)
            disk.snapshot("a")
            places = rng.sample(range(TIB // BLOCK // 1024), count)
            for letter in "bc":
                for block in places:
                    disk.pwrite(b"d" * BLOCK, block * BLOCK)
                disk.snapshot(letter)
            unique = pool.unique_bytes(["b"])
            took = timed(pool.delete_snapshot, "b")
            show(
                f"deletion of a middle snapshot that frees {unique // BLOCK} blocks",
                f"{took * 1e3:.1f} ms, {took / (unique // BLOCK) * 1e6:.2f} us a block",
                "grows with what it frees",
            )


def opening(folder: Path) -> None:
    """Opening a pool with 1,000 snapshots."""
    with pool_in(folder) as pool:
        disk = pool.create_disk("disk", 10 * TIB)
        rng = random.Random(7)
        for _ in range(1000):
            disk.pwrite(b"z" * BLOCK, rng.randrange(10 * TIB // BLOCK) * BLOCK)
            disk.snapshot()
        path = pool.path
        pool.close()
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            opened = Pool.open(path)
            times.append(time.perf_counter() - start)
            opened.close()
        show("opening a pool with 1,000 snapshots", f"{statistics.median(times) * 1e3:.0f} ms", "100 ms")


def memory(folder: Path) -> None:
    """RAM for a 16-TiB disk with 1 TiB mapped, in a process of its own. The data stays a hole: only the map is real."""
    child = os.fork()
    if child == 0:
        with pool_in(folder, log_bytes=64 * MIB) as pool:
            disk = pool.create_disk("disk", 16 * TIB)
            map_terabyte(pool, disk)
            pool.checkpoint()
            rng = random.Random(8)
            buffer = bytearray(BLOCK)
            for _ in range(200_000):
                disk.pread_into(buffer, rng.randrange(TIB // BLOCK) * 16 * BLOCK)
            status = Path("/proc/self/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines())
            own = int(fields["RssAnon"].split()[0]) // 1024
            show("RAM, 16-TiB disk with 1 TiB mapped", f"{own} MiB of its own", "600 MiB")
            sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)


def map_terabyte(pool: Pool, disk: Disk) -> None:
    """Map every sixteenth 16th of the disk as writes would, without their data."""
    volume = disk._volume
    os.truncate(os.path.join(pool.path, "data"), TIB + GIB)
    block = 256
    for position in range(0, 16 * TIB // BLOCK, 16 * 128):
        volume.replay(position, 128, block)
        block += 128
        if position % (1 << 26) == 0:
            pool._engine.checkpoint()


SECTIONS = {
    "versions": changes_of_versions,
    "reads": reads,
    "writes": writes,
    "sequential": sequential_writes,
    "differences": differences,
    "opening": opening,
    "memory": memory,
}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default=tempfile.gettempdir(), type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS))
    arguments = parser.parse_args()
    for name in arguments.only.split(","):
        SECTIONS[name](arguments.folder)


if __name__ == "__main__":
    main()
