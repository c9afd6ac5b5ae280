"""Loop devices and file systems on them, for tests that run as root."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def loop_device(image: Path, *, read_only: bool = False) -> Iterator[str]:
    """A loop device over an image file."""
    options = ["--read-only"] if read_only else []
    device = _run("losetup", "--find", "--show", *options, str(image)).strip()
    try:
        yield device
    finally:
        _run("losetup", "--detach", device)


@contextmanager
def mounted(device: str, folder: Path, options: str = "rw") -> Iterator[Path]:
    """A device mounted on a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    _run("mount", "-o", options, device, str(folder))
    try:
        yield folder
    finally:
        _run("umount", str(folder))


def make_file_system(kind: str, target: str) -> None:
    """An empty file system of a kind (ext4, xfs, btrfs) on a device or image."""
    force = {"ext4": "-F", "xfs": "-f", "btrfs": "-f"}[kind]
    _run(f"mkfs.{kind}", "-q", force, target)


@contextmanager
def file_system(kind: str, place: Path, size_bytes: int = 512 << 20) -> Iterator[Path]:
    """A new file system of a kind, in a sparse image below `place`, mounted."""
    image = place / f"{kind}.img"
    with image.open("xb") as file:
        file.truncate(size_bytes)
    make_file_system(kind, str(image))
    with loop_device(image) as device, mounted(device, place / kind) as folder:
        yield folder


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout
