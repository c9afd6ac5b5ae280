"""Images for tests of the formats: sparse disks of all sorts of content, and QEMU's tools, which are the oracle."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import numpy as np

from snapcore import extents
from snapcore.source.interface import Source

# What qemu-img calls the formats.
QEMU = {"raw": "raw", "qcow2": "qcow2", "vhd": "vpc", "vhdx": "vhdx", "vmdk": "vmdk"}


def make_raw(path: Path, size_bytes: int, writes: int, seed: int = 1) -> bytes:
    """A sparse file with runs of random bytes, of text, and of zeros that were written. Returns what is in it."""
    dice = random.Random(seed)
    with path.open("xb") as file:
        file.truncate(size_bytes)
        for _ in range(writes if size_bytes else 0):
            start = dice.randrange(-(-size_bytes // 512)) * 512
            length = min(dice.choice((512, 4096, 70_000, 300_000)), size_bytes - start)
            file.seek(start)
            file.write(dice.choice((dice.randbytes(length), (b"snapshot" * length)[:length], bytes(length))))
    return path.read_bytes()


def qemu_img(*words: str | Path) -> str:
    """Run qemu-img; what it prints."""
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"qemu-img {' '.join(map(str, words))}: {done.stdout}{done.stderr}"
    return done.stdout


def qemu_io(image: Path, kind: str, *commands: str) -> None:
    """Change an image with qemu-io."""
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", QEMU[kind], *words, str(image)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr


def as_qemu_reads(image: Path, kind: str) -> bytes:
    """The disk in an image, converted by qemu-img."""
    out = image.with_name(image.name + ".by-qemu")
    out.unlink(missing_ok=True)
    qemu_img("convert", "-f", QEMU[kind], "-O", "raw", image, out)
    return out.read_bytes()


def content(source: Source, step_bytes: int = 3 << 20) -> bytes:
    """All bytes of a disk, in steps that begin anywhere in a unit; and nothing but zeros is outside its extents."""
    data = bytearray(source.size_bytes)
    for start in range(0, len(data), step_bytes):
        source.read_into(memoryview(data)[start : start + step_bytes], start)
    rows = extents.from_pairs(source.data_extents())
    for start, length in extents.gaps(rows, len(data)).tolist():
        assert not np.frombuffer(data, np.uint8, length, start).any(), f"data at {start} is in no extent"
    assert not len(rows) or rows[-1].sum() <= len(data)
    return bytes(data)


def assert_good(image: Path, kind: str, raw: Path) -> None:
    """qemu-img finds nothing wrong with an image, and the same disk in it as in a raw one."""
    if kind in ("qcow2", "vmdk"):
        qemu_img("check", "-f", QEMU[kind], image)
    qemu_img("compare", "-f", "raw", "-F", QEMU[kind], raw, image)
