"""The measurements behind choices that docs/DESIGN.md and comments quote: `python bench/choices.py IMAGE`.

Reading by pread against populated mappings, writing past the page cache against through it, and LZ4's acceleration.
IMAGE is a real disk image of at least 2 GiB, which are read; a GiB is written beside it. Best of three runs each.
"""

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import lz4.block
import numpy as np

from snapcore import extents, lz, persist, scan
from snapcore.source import open_source

_SPAN_BYTES = 4 << 20
_WINDOW_BYTES = 1 << 20
_CHUNK_BYTES = 64 << 10
_TOTAL_BYTES = 1 << 30
_OBJECT_BYTES = 16 << 20
_RUNS = 3


def best(work: Callable[[], object]) -> tuple[float, float]:
    """Least wall and CPU seconds of some runs."""
    walls, cpus = [], []
    for _ in range(_RUNS):
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall_s)
        cpus.append(time.process_time() - cpu_s)
    return min(walls), min(cpus)


def reading(image: Path, threads: int) -> None:
    """Compare the first GiB of an image with the second, read by pread and through populated mappings."""
    with open(image, "rb") as file, mmap.mmap(file.fileno(), 2 * _TOTAL_BYTES, access=mmap.ACCESS_READ) as mapped:

        def by_pread(start: int) -> None:
            left, right = np.empty((2, _WINDOW_BYTES), dtype=np.uint8)
            for offset in range(start, start + _SPAN_BYTES, _WINDOW_BYTES):
                os.preadv(file.fileno(), [left], offset)
                os.preadv(file.fileno(), [right], offset + _TOTAL_BYTES)
                scan.differing_mask(left, right, 4096)

        def by_mapping(start: int) -> None:
            for offset in range(start, start + _SPAN_BYTES, _WINDOW_BYTES):
                both = (offset, offset + _TOTAL_BYTES)
                for place in both:
                    scan.populate(mapped, place, _WINDOW_BYTES)
                left, right = (np.frombuffer(mapped, np.uint8, _WINDOW_BYTES, place) for place in both)
                scan.differing_mask(left, right, 4096)
                for place in both:
                    mapped.madvise(mmap.MADV_DONTNEED, place, _WINDOW_BYTES)

        spans = range(0, _TOTAL_BYTES, _SPAN_BYTES)
        for name, work in (("pread", by_pread), ("mapped, populated", by_mapping)):
            with ThreadPoolExecutor(threads) as hands:
                wall_s, _ = best(lambda work=work, hands=hands: list(hands.map(work, spans)))
            click.echo(f"compare, {threads} threads, {name:18} {_TOTAL_BYTES / wall_s / 1e9:6.1f} GB/s of each image")


def writing(folder: Path) -> None:
    """Write a GiB in objects of 16 MiB with two threads, each synced, past the page cache and through it."""
    data = os.urandom(_OBJECT_BYTES)
    medium = persist.Medium()
    usual = persist._DIRECT_FROM_BYTES

    def write(number: int) -> None:
        path = folder / str(number)
        descriptor = medium.create(str(path))
        medium.write_at(descriptor, [data], 0)
        medium.sync(descriptor)
        medium.close(descriptor)
        path.unlink()

    for name, threshold in (("past the cache", usual), ("through the cache", 1 << 62)):
        persist._DIRECT_FROM_BYTES = threshold
        with ThreadPoolExecutor(2) as hands:
            wall_s, cpu_s = best(lambda hands=hands: list(hands.map(write, range(_TOTAL_BYTES // _OBJECT_BYTES))))
        click.echo(f"write and sync 1 GiB, {name:18} {wall_s:6.2f} s wall {cpu_s:6.2f} s CPU")
    persist._DIRECT_FROM_BYTES = usual


def packing(image: Path) -> None:
    """LZ4 on chunks taken from all over the image's data, one thread."""
    chunks = []
    with open_source(str(image), allow_changing=True) as source:
        for offset, length in extents.spans(source.data_extents(), _SPAN_BYTES):
            if length >= _CHUNK_BYTES:
                chunk = memoryview(bytearray(_CHUNK_BYTES))
                source.read_into(chunk, offset)
                chunks.append(bytes(chunk))
    total = len(chunks) * _CHUNK_BYTES
    for acceleration in (1, 2, 4):
        packed: list[bytes] = []

        def pack(acceleration: int = acceleration, packed: list[bytes] = packed) -> None:
            packed[:] = [
                lz4.block.compress(chunk, store_size=False, mode="fast", acceleration=acceleration) for chunk in chunks
            ]

        def decode(packed: list[bytes] = packed) -> None:
            for chunk, block in zip(chunks, packed, strict=True):
                scan.same_bytes(lz4.block.decompress(block, uncompressed_size=_CHUNK_BYTES), chunk)

        _, pack_s = best(pack)
        _, decode_s = best(decode)
        packing_row(f"package, acceleration {acceleration}", total, packed, pack_s + decode_s)
    blocks: list[bytes | None] = []

    def by_kernel() -> None:
        blocks[:] = [block for start in range(0, len(chunks), 64) for block in lz.pack_blocks(chunks[start:][:64], 32)]

    _, cpu_s = best(by_kernel)
    kept = [block or chunk for block, chunk in zip(blocks, chunks, strict=True)]
    packing_row("kernel", total, kept, cpu_s)


def packing_row(name: str, total_bytes: int, packed: list[bytes], cpu_s: float) -> None:
    """What came of one way to pack and check."""
    # As the repository does: what gains too little is kept as it is.
    kept_bytes = sum(len(block) if len(block) <= _CHUNK_BYTES * 31 // 32 else _CHUNK_BYTES for block in packed)
    rate = total_bytes / cpu_s / 1e9
    click.echo(f"LZ4, packed and checked, {name:24} {total_bytes / kept_bytes:.2f} : 1 at {rate:.2f} GB/s")


@click.command()
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(image: Path) -> None:
    """Measure all of it and print a line each."""
    for threads in (1, 2):
        reading(image, threads)
    with tempfile.TemporaryDirectory(dir=image.parent) as folder:
        writing(Path(folder))
    packing(image)


if __name__ == "__main__":
    main()
