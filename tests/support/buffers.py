"""Buffers of every make that the kernels read, with the same bytes in them."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st

if TYPE_CHECKING:
    from typing_extensions import Buffer


def _array(data: bytes) -> Buffer:
    return np.frombuffer(data, dtype=np.uint8).copy()


def _read_only_array(data: bytes) -> Buffer:
    return np.frombuffer(data, dtype=np.uint8)


def _unaligned(data: bytes) -> Buffer:
    return memoryview(b"\xff" * 3 + data + b"\xff" * 5)[3 : 3 + len(data)]


MAKES: dict[str, Callable[[bytes], Buffer]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "array": _array,
    "read-only array": _read_only_array,
    "unaligned slice": _unaligned,
}
MAPPED = "mapping"


@contextmanager
def buffer_of(make: str, data: bytes) -> Iterator[Buffer]:
    """A buffer of one make. An empty file cannot be mapped, so an empty mapping is empty bytes."""
    if make != MAPPED or not data:
        yield MAKES.get(make, bytes)(data)
        return
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        with mmap.mmap(file.fileno(), len(data), access=mmap.ACCESS_READ) as mapped:
            yield mapped


def makes() -> st.SearchStrategy[str]:
    """Any make of buffer."""
    return st.sampled_from([*MAKES, MAPPED])


@st.composite
def mostly_zero(draw: st.DrawFn, longest_bytes: int) -> bytes:
    """Bytes with long runs of zeros: what disks look like."""
    data = bytearray(draw(st.integers(0, longest_bytes)))
    if data:
        for at in draw(st.lists(st.integers(0, len(data) - 1), max_size=6)):
            data[at] = draw(st.integers(1, 255))
    return bytes(data)


@st.composite
def pairs(draw: st.DrawFn, longest_bytes: int) -> tuple[bytes, bytes]:
    """Two buffers of one length that differ in a few bytes, or in none."""
    a = draw(mostly_zero(longest_bytes))
    b = bytearray(a)
    if b:
        for at in draw(st.lists(st.integers(0, len(b) - 1), max_size=4)):
            b[at] ^= draw(st.integers(0, 255))
    return a, bytes(b)
