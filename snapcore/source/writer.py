"""What writes one format: the pieces of a disk come in order, and go into a sink."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from snapcore.source.sink import Sink


class Piece(NamedTuple):
    """Some units of the disk that follow each other and are not all zero.

    Attributes
    ----------
    offset_bytes : int
        In the disk.
    data : memoryview
        As they are; valid until the writer returns.
    packed : list of bytes
        Each of them packed, where the writer packs; empty for one that is all zero.
    """

    offset_bytes: int
    data: memoryview
    packed: list[bytes]


class Writer(Protocol):
    """What a format does with the disk."""

    @property
    def size_bytes(self) -> int:
        """Of the disk as the format has it: that of the source, or up to a sector more."""

    @property
    def unit_bytes(self) -> int:
        """What zeros are looked for in, and what is packed: a power of two up to a span."""

    @property
    def pack(self) -> Callable[[memoryview], bytes] | None:
        """Packs a unit, on many threads at once."""

    def begin(self, sink: Sink) -> None:
        """Write what stands in front."""

    def put(self, sink: Sink, piece: Piece) -> None:
        """Write a piece; they come in order."""

    def end(self, sink: Sink) -> None:
        """Write what stands behind."""
