"""What a running system does to the files of its disk, apart from package management.

A database rewrites random 8-KiB pages and syncs them in groups, a log grows, files are deleted. Relies on a
mounted system disk; promises the same writes for the same disk and generation.
"""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

PAGE_BYTES = 8192
FILLED_PAGE_BYTES = 6960
PAGE_HEADER_BYTES = 16
WORD_BYTES = 8
PAGES_PER_WRITE = 1024
PAGES_PER_FSYNC = 32
DELETED_FILES_SHARE = 0.02


def database_path(root: Path) -> Path:
    """The database-like file of a disk."""
    return root / "srv/database/pages"


def database_pages(rng: np.random.Generator, count: int) -> npt.NDArray[np.uint8]:
    """Pages of a database, of shape (count, 8192): a random header, words by Zipf's law, then free space."""
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
    vocabulary = np.random.default_rng(0).choice(letters, (4096, WORD_BYTES))
    ranks = np.minimum(rng.zipf(1.3, (count, PAGE_BYTES // WORD_BYTES)), len(vocabulary)) - 1
    pages: npt.NDArray[np.uint8] = vocabulary[ranks].reshape(count, PAGE_BYTES)
    pages[:, :PAGE_HEADER_BYTES] = rng.integers(0, 256, (count, PAGE_HEADER_BYTES), dtype=np.uint8)
    pages[:, FILLED_PAGE_BYTES:] = 0
    return pages


def write_database(root: Path, size_bytes: int) -> None:
    """Make the database, of that size rounded down to pages."""
    rng = np.random.default_rng(1)
    path = database_path(root)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        for start in range(0, size_bytes // PAGE_BYTES, PAGES_PER_WRITE):
            count = min(PAGES_PER_WRITE, size_bytes // PAGE_BYTES - start)
            file.write(database_pages(rng, count).tobytes())


def update_database(root: Path, generation: int, changed_bytes: int) -> None:
    """Write random pages of the database anew, as many as make up these bytes, and sync every few of them."""
    rng = np.random.default_rng([generation, 1])
    with database_path(root).open("r+b") as file:
        total_pages = os.fstat(file.fileno()).st_size // PAGE_BYTES
        changed_pages = min(total_pages, max(0, changed_bytes) // PAGE_BYTES)
        numbers = rng.permutation(total_pages)[:changed_pages]
        for start in range(0, changed_pages, PAGES_PER_FSYNC):
            group = numbers[start : start + PAGES_PER_FSYNC]
            for number, page in zip(group, database_pages(rng, len(group)), strict=True):
                os.pwrite(file.fileno(), page.tobytes(), int(number) * PAGE_BYTES)
            os.fsync(file.fileno())


def append_log(root: Path, generation: int, size_bytes: int) -> None:
    """Append about that many bytes of lines to the system log."""
    rng = np.random.default_rng([generation, 2])
    written_bytes = second = 0
    with (root / "var/log/syslog").open("a") as file:
        while written_bytes < size_bytes:
            second += int(rng.integers(0, 60))
            port, process = rng.integers(1024, 65536, 2)
            stamp = f"gen{generation} +{second:08}s"
            written_bytes += file.write(f"{stamp} sshd[{process}]: Connection closed, port {port} [preauth]\n")


def delete_documentation(root: Path, generation: int) -> None:
    """Delete a random share of the documentation files."""
    rng = np.random.default_rng([generation, 3])
    found = (root / "usr/share/doc").glob("**/*")
    files = sorted(path for path in found if path.is_file() and not path.is_symlink())
    for index in rng.permutation(len(files))[: round(len(files) * DELETED_FILES_SHARE)]:
        files[index].unlink()
