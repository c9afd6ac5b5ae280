"""What a source is: a disk of a fixed size whose bytes can be read."""

from __future__ import annotations

from typing import Protocol

from snapcore.extents import Extents


class Source(Protocol):
    """A disk to take a snapshot of. Reads may come from many threads."""

    @property
    def name(self) -> str:
        """What it is, for messages and for the snapshot's record."""

    @property
    def size_bytes(self) -> int:
        """Length of the disk."""

    def data_extents(self) -> Extents:
        """Where data may be; everything else reads as zeros.

        int64 array of shape (n, 2): offset and length in bytes, sorted or not; they may overlap.
        """

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        """Fill `target` from the disk.

        Raises
        ------
        ReadError
            The medium failed there.
        SourceChangedError
            The disk ends before that.
        """

    def check_unchanged(self) -> None:
        """SourceChangedError when the content may have changed since the source was opened."""
