"""The oracle of the repository tests: a disk as a dict of its pages, and the tree that docs/FORMAT.md makes of it.

Written from the format's description alone; it shares no code with the engine.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import blake3

PAGE_BYTES = 4096
FANOUT = 128
ZERO_ID = bytes(32)

_CHUNK_KEY = blake3.blake3(b"", derive_key_context="snapcore 2026 plain chunk").digest()
_NODE_KEY = blake3.blake3(b"", derive_key_context="snapcore 2026 plain node").digest()


class SparseDisk:
    """A disk of which only the pages that are not all zero are kept."""

    def __init__(self, size_bytes: int, pages: dict[int, bytes] | None = None) -> None:
        self.size_bytes = size_bytes
        self.pages = dict(pages or {})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseDisk):
            return NotImplemented
        return self.size_bytes == other.size_bytes and self.pages == other.pages

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SparseDisk({self.size_bytes} bytes, pages {sorted(self.pages)})"

    def copy(self) -> SparseDisk:
        """The disk as it is now."""
        return SparseDisk(self.size_bytes, self.pages)

    def write(self, offset_bytes: int, data: bytes) -> None:
        """Overwrite bytes within the disk."""
        done = 0
        while done < len(data):
            number, skip = divmod(offset_bytes + done, PAGE_BYTES)
            part = data[done : done + PAGE_BYTES - skip]
            page = bytearray(self.pages.get(number, bytes(PAGE_BYTES)))
            page[skip : skip + len(part)] = part
            self._put(number, bytes(page))
            done += len(part)

    def clear(self, offset_bytes: int, length_bytes: int) -> None:
        """Make a range zero; costs what is there."""
        stop = offset_bytes + length_bytes
        for number in list(self.pages):
            first = max(offset_bytes - number * PAGE_BYTES, 0)
            last = min(stop - number * PAGE_BYTES, PAGE_BYTES)
            if first < last:
                page = bytearray(self.pages[number])
                page[first:last] = bytes(last - first)
                self._put(number, bytes(page))

    def resize(self, size_bytes: int) -> None:
        """Cut or grow by zeros."""
        if size_bytes < self.size_bytes:
            self.clear(size_bytes, self.size_bytes - size_bytes)
        self.size_bytes = size_bytes

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Bytes of a range, less at the disk's end."""
        stop = min(offset_bytes + length_bytes, self.size_bytes)
        if stop <= offset_bytes:
            return b""
        first, last = offset_bytes // PAGE_BYTES, -(-stop // PAGE_BYTES)
        joined = b"".join(self.pages.get(number, bytes(PAGE_BYTES)) for number in range(first, last))
        return joined[offset_bytes - first * PAGE_BYTES : stop - first * PAGE_BYTES]

    def chunks(self, chunk_bytes: int) -> dict[int, bytes]:
        """Every chunk that is not all zero, padded with zeros to the chunk size."""
        width = chunk_bytes // PAGE_BYTES
        return {
            number: b"".join(self.pages.get(number * width + place, bytes(PAGE_BYTES)) for place in range(width))
            for number in sorted({page // width for page in self.pages})
        }

    def chunk_ids(self, chunk_bytes: int) -> dict[int, bytes]:
        """Id of every chunk that is not all zero."""
        return {
            number: blake3.blake3(plain, key=_CHUNK_KEY).digest() for number, plain in self.chunks(chunk_bytes).items()
        }

    def tree(self, chunk_bytes: int) -> tuple[bytes, int, set[bytes]]:
        """(root id, levels, ids of all nodes) of the disk's tree."""
        count = -(-self.size_bytes // chunk_bytes)
        levels = 1
        while FANOUT**levels < count:
            levels += 1
        row = self.chunk_ids(chunk_bytes)
        nodes: set[bytes] = set()
        for _ in range(levels):
            above: dict[int, bytearray] = {}
            for place, object_id in row.items():
                node = above.setdefault(place // FANOUT, bytearray(FANOUT * 32))
                node[place % FANOUT * 32 : place % FANOUT * 32 + 32] = object_id
            row = {place: blake3.blake3(bytes(node), key=_NODE_KEY).digest() for place, node in above.items()}
            nodes |= set(row.values())
        return row.get(0, ZERO_ID), levels, nodes

    def differing_chunks(self, other: SparseDisk, chunk_bytes: int) -> list[int]:
        """Numbers of the chunks in which two disks differ; behind a disk's end lie zeros."""
        mine, theirs = self.chunks(chunk_bytes), other.chunks(chunk_bytes)
        return sorted(number for number in mine.keys() | theirs.keys() if mine.get(number) != theirs.get(number))

    def _put(self, number: int, page: bytes) -> None:
        if any(page):
            self.pages[number] = page
        else:
            self.pages.pop(number, None)


def read_sparse(path: str | os.PathLike[str]) -> SparseDisk:
    """An image file as the operating system shows it; holes are not read."""
    disk = SparseDisk(Path(path).stat().st_size)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for start, stop in _data(descriptor, disk.size_bytes):
            for at in range(start // PAGE_BYTES * PAGE_BYTES, stop, 1 << 20):
                part = os.pread(descriptor, min(1 << 20, stop - at), at)
                disk.write(at, part)
    finally:
        os.close(descriptor)
    return disk


def data_ranges(path: str | os.PathLike[str]) -> list[tuple[int, int]]:
    """(start, stop) of what is no hole in a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _data(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def data_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a file that are no hole. Not `st_blocks`: that counts the file system's own blocks too."""
    return sum(stop - start for start, stop in data_ranges(path))


def _data(descriptor: int, size_bytes: int) -> list[tuple[int, int]]:
    found = []
    at = 0
    while at < size_bytes:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        at = os.lseek(descriptor, start, os.SEEK_HOLE)
        found.append((start, at))
    return found


def extents_of(numbers: list[int], block_bytes: int, size_bytes: int) -> list[list[int]]:
    """[offset, length] of runs of sorted block numbers, cut at the size."""
    rows: list[list[int]] = []
    for number in numbers:
        start, stop = number * block_bytes, min((number + 1) * block_bytes, size_bytes)
        if stop <= start:
            continue
        if rows and rows[-1][0] + rows[-1][1] == start:
            rows[-1][1] = stop - rows[-1][0]
        else:
            rows.append([start, stop - start])
    return rows
