"""What a source is: a disk of a fixed size whose bytes can be read."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

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


class Target(Protocol):
    """A disk of a fixed size to fill. Calls may come from many threads, for ranges that do not overlap.

    Attributes
    ----------
    fresh : bool
        Everything in it reads as zeros still.
    written_bytes : int
        Bytes written or made zero so far.
    """

    fresh: bool
    written_bytes: int

    def data_extents(self) -> Extents:
        """What of it may be other than zero."""

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        """Fill `target` with what stands there now."""

    def write_data(self, data: memoryview, offset_bytes: int) -> None:
        """Write what of `data` is not zero; the rest must be zero already."""

    def write_change(self, old: memoryview, new: memoryview, offset_bytes: int) -> None:
        """Write what of `new` differs from `old`, which is what stands there."""


@runtime_checkable
class BlockSource(Source, Protocol):
    """A source that digests while it reads; of any other that is done afterwards."""

    def read_blocks(
        self, target: memoryview, offset_bytes: int, length_bytes: int, block_bytes: int, seed: int
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool]]:
        """XXH64 of each block of a range, filled up with zeros at its end, and whether it is all zero.

        `target` is as long as the blocks and holds them afterwards. Raises what `read_into` raises.
        """


@runtime_checkable
class MappedSource(Source, Protocol):
    """A source whose list of changes comes from a map: what is in it was written, and nothing else was.

    Attributes
    ----------
    map_bytes : int
        To how many bytes the map is exact, a power of two.
    """

    map_bytes: int
