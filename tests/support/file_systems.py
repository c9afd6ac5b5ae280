"""The ext4 on a version of a disk, after its journal has done what it has to."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snapcore.pool import Disk, Snapshot


@contextmanager
def recovered(version: Disk | Snapshot, folder: Path) -> Iterator[Path]:
    """An image of it in which the journal has done what it has to."""
    image = folder / f"recovered-{version.id}"
    version.export(image)
    subprocess.run(["e2fsck", "-fy", "-E", "journal_only", image], capture_output=True, check=False)
    try:
        yield image
    finally:
        image.unlink()


def check_file_system(snapshot: Snapshot, folder: Path) -> None:
    """Clean, after its journal has done what it has to."""
    with recovered(snapshot, folder) as image:
        done = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def file_in(version: Disk | Snapshot, path: str, folder: Path) -> bytes:
    """A file in the file system."""
    with recovered(version, folder) as image:
        return subprocess.run(["debugfs", "-R", f"cat {path}", image], capture_output=True, check=True).stdout
