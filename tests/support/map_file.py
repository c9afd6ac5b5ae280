"""Map files of pools for the tests of kernels: made, saved, and opened again."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from snapcore.blockmap import Trees
from snapcore.pages import SLOT_BYTES, PageFile

SEED = 2**64 - 5
CATALOG = 32
Words = npt.NDArray[np.uint64]


def bitmap(slots: int, used: Iterable[int] = ()) -> Words:
    """A bitmap of slots as the kernel takes it."""
    words = np.zeros((slots + 63) // 64, dtype=np.uint64)
    for slot in used:
        words[slot // 64] |= np.uint64(1 << slot % 64)
    return words


def members(words: Words) -> set[int]:
    """What is marked in a bitmap."""
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def slot_of(ref: int) -> int:
    """The slot that a reference names."""
    return ref & (1 << 48) - 1


def opened(descriptor: int, slots: int = 3, generation: int = 1, used: Words | None = None, cache: int = 0) -> Trees:
    """Pages of a file; of an empty one, if nothing else is said."""
    return Trees(descriptor, SEED, generation, slots, bitmap(slots) if used is None else used, cache)


@contextmanager
def new_file() -> Iterator[int]:
    """An empty file."""
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


def save(pages: PageFile, descriptor: int) -> None:
    """Write all that is not written, and begin a new generation."""
    slots = pages.dirty()
    pages.freeze()
    staged = pages.stage(slots).tobytes()
    for number, slot in enumerate(slots.tolist()):
        os.pwrite(descriptor, staged[number * SLOT_BYTES : (number + 1) * SLOT_BYTES], slot * SLOT_BYTES)
    pages.written(slots)
    pages.release()


def reopened(pages: PageFile, descriptor: int, cache: int = 0) -> Trees:
    """Another view of a saved file."""
    return opened(descriptor, pages.slots, pages.generation, pages.used_slots(), cache)


@contextmanager
def files_no_longer_than(size_bytes: int) -> Iterator[None]:
    """As on a file system without space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
