"""Image files as the benchmarks see them: their data extents, and a plain compare of two of them.

Relies on SEEK_DATA and SEEK_HOLE of the file system, and on a C compiler named cc, which builds compare.c
beside this file once into the user's cache folder. The same program is the yardstick for incremental
snapshots, so its argument vector is public too.
"""

import errno
import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from platformdirs import user_cache_path

BLOCK_BYTES = 4096

_SOURCE = Path(__file__).with_name("compare.c")
_COMPILE = ("cc", "-O2", "-pthread")


def data_extents(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (start, end) in bytes of every stretch of a file that is not a hole, in ascending order."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        end = 0
        while True:
            try:
                start = os.lseek(descriptor, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
            yield start, end
    finally:
        os.close(descriptor)


def holes(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (start, end) in bytes of every hole of a file, in ascending order."""
    position = 0
    for start, end in data_extents(path):
        if start > position:
            yield position, start
        position = end
    if (size_bytes := path.stat().st_size) > position:
        yield position, size_bytes


def data_bytes(path: Path) -> int:
    """Bytes of a file that are not holes."""
    return sum(end - start for start, end in data_extents(path))


def copy_sparse(source: Path, target: Path) -> None:
    """Copy an image; blocks of zeros become holes."""
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", source, target], check=True)


def compare_command(first: Path, second: Path, block_bytes: int = BLOCK_BYTES) -> list[str]:
    """Argument vector of the two-thread C compare; it prints the differing blocks and the seconds it took."""
    return [str(_compare_program()), str(first), str(second), str(block_bytes)]


def differing_blocks(first: Path, second: Path, block_bytes: int = BLOCK_BYTES) -> int:
    """Count the blocks in which two images differ; a hole equals zeros."""
    command = compare_command(first, second, block_bytes)
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(printed.split()[0])


def _compare_program() -> Path:
    """Path of the compare program built from the present source, built now if it is not there."""
    key = hashlib.sha256(" ".join(_COMPILE).encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    program = user_cache_path("snapcore-bench") / f"compare-{key}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        unfinished = program.with_name(f"{program.name}.{os.getpid()}")
        subprocess.run([*_COMPILE, "-o", unfinished, _SOURCE], check=True)
        unfinished.rename(program)
    return program
