"""Small disks with something of everything: noise, patterns, zeros, an end within a chunk."""

from __future__ import annotations

import random
from pathlib import Path

PAGE_BYTES = 4096


def disk(seed: int, pages: int) -> bytes:
    """A disk of so many pages and a half."""
    random_ = random.Random(seed)
    parts = []
    for number in range(pages):
        kind = number % 4
        if kind == 0:
            parts.append(bytes(PAGE_BYTES))
        elif kind == 1:
            parts.append(bytes([random_.randrange(1, 256)]) * PAGE_BYTES)
        else:
            parts.append(random_.randbytes(PAGE_BYTES))
    return b"".join(parts) + random_.randbytes(PAGE_BYTES // 2)


def changed(data: bytes, seed: int, pages: int = 4) -> bytes:
    """The disk after some writes: short ones, a page, zeros."""
    random_ = random.Random(seed)
    copy = bytearray(data)
    for number in range(pages):
        page = random_.randrange(len(copy) // PAGE_BYTES)
        start = page * PAGE_BYTES
        if number % 3 == 0:
            copy[start + 100 : start + 140] = random_.randbytes(40)
        elif number % 3 == 1:
            copy[start : start + PAGE_BYTES] = random_.randbytes(PAGE_BYTES)
        else:
            copy[start : start + PAGE_BYTES] = bytes(PAGE_BYTES)
    return bytes(copy)


def image(path: Path, data: bytes) -> Path:
    """The disk as a file."""
    path.write_bytes(data)
    return path
