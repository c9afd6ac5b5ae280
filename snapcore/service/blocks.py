"""Blocks of snapshots for other tools: which there are, which differ, and their bytes with a checksum.

A block is `block_bytes` long, a power of two and a whole number of what each side tells apart (4 KiB in a pool, a chunk
in a repository); the last one of a disk may be shorter. Lists come in pages that name where to go on. A block that is
not listed is zero, or does not differ. Checksums are SHA-256 of a block's bytes, base64.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from snapcore.errors import UsageError
from snapcore.extents import Extents
from snapcore.service import tiers
from snapcore.service.tiers import Side

BLOCK_LIMIT_BYTES = 4 << 20
PAGE_BLOCKS = 10_000


class Page(NamedTuple):
    """Blocks in ascending order.

    Attributes
    ----------
    block_bytes, size_bytes : int
        Length of a block, and of the disk (the longer one of two).
    blocks : list of int
        Their numbers.
    next_block : int or None
        Where the next page starts; None behind the last one.
    """

    block_bytes: int
    size_bytes: int
    blocks: list[int]
    next_block: int | None


@dataclass(frozen=True, slots=True)
class Block:
    """A block, its bytes and their checksum."""

    index: int
    data: bytes
    checksum: str


def checksum(data: bytes | memoryview) -> str:
    """SHA-256, base64."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def list_blocks(
    side: Side, *, start: int = 0, page_blocks: int = PAGE_BLOCKS, block_bytes: int | None = None
) -> Iterator[Page]:
    """Blocks in which data may be, in pages.

    Parameters
    ----------
    side : Local or Remote
    start : int
        First block to look at.
    page_blocks : int
        At most so many in a page: 1 to 10,000.
    block_bytes : int, optional
        Default: what the side tells apart.
    """
    size = block_size(block_bytes, side)
    parts = iter([side.data_extents(_first_byte(start, size), side.size_bytes)])
    yield from _pages(parts, size, side.size_bytes, page_blocks)


def list_changed_blocks(
    a: Side, b: Side, *, start: int = 0, page_blocks: int = PAGE_BLOCKS, block_bytes: int | None = None
) -> Iterator[Page]:
    """Blocks in which `b` differs from `a`, in pages; any two, of any tier (snapcore/service/tiers.py says how).

    Parameters
    ----------
    a, b : Local or Remote
    start, page_blocks
        As for `list_blocks`.
    block_bytes : int, optional
        Default: the larger one of what the two sides tell apart.
    """
    size = block_size(block_bytes, a, b)
    longest = max(a.size_bytes, b.size_bytes)
    parts = tiers.differing(a, b, _first_byte(start, size), longest)
    yield from _pages(parts, size, longest, page_blocks)


def read_block(side: Side, index: int, *, block_bytes: int | None = None) -> Block:
    """A block's bytes and their checksum; UsageError for one that is not inside of the disk."""
    size = block_size(block_bytes, side)
    offset = _first_byte(index, size)
    if offset >= side.size_bytes:
        raise UsageError(f"block {index} of {size} bytes is not inside of {side.name}, which has {side.size_bytes}")
    data = bytearray(min(size, side.size_bytes - offset))
    side.read_into(memoryview(data), offset)
    return Block(index, bytes(data), checksum(memoryview(data)))


def block_size(block_bytes: int | None, *sides: Side) -> int:
    """The length of a block for these sides; UsageError when what was asked for is none."""
    least = max(side.unit_bytes for side in sides)
    if block_bytes is None:
        return least
    if block_bytes & (block_bytes - 1) or not least <= block_bytes <= BLOCK_LIMIT_BYTES:
        raise UsageError(f"a block has a power of two of bytes from {least} to {BLOCK_LIMIT_BYTES}, not {block_bytes}")
    return block_bytes


def _first_byte(index: int, block_bytes: int) -> int:
    if not 0 <= index < 1 << 62:
        raise UsageError(f"a block's number is not negative, and not {index}")
    return index * block_bytes


def _pages(parts: Iterable[Extents], block_bytes: int, size_bytes: int, page_blocks: int) -> Iterator[Page]:
    """Extents as pages of blocks; there is always a last page, which may be empty."""
    if not 1 <= page_blocks <= PAGE_BLOCKS:
        raise UsageError(f"a page has 1 to {PAGE_BLOCKS} blocks, not {page_blocks}")
    page: list[int] = []
    for block in _numbers(parts, block_bytes):
        if len(page) == page_blocks:
            yield Page(block_bytes, size_bytes, page, block)
            page = []
        page.append(block)
    yield Page(block_bytes, size_bytes, page, None)


def _numbers(parts: Iterable[Extents], block_bytes: int) -> Iterator[int]:
    """Numbers of the blocks that extents touch, each once."""
    at = 0
    for rows in parts:
        firsts = np.maximum(rows[:, 0] // block_bytes, at)
        stops = -(-(rows[:, 0] + rows[:, 1]) // block_bytes)
        for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True):
            yield from range(max(first, at), stop)
            at = max(at, stop)
