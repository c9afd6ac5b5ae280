"""The pool's pages: 1,024 bytes each, in slots of a map file (docs/FORMAT.md).

All methods are safe from many threads; none holds the lock across Python code.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

NO_MEMORY: Final[int]
READ_FAILED: Final[int]
DAMAGED: Final[int]
NO_SPACE: Final[int]
SLOT_BYTES: Final[int]
KIND_BITMAP: Final[int]
KIND_CATALOG: Final[int]

class Failure(Exception):  # noqa: N818
    """A tree could not be read or changed; nothing was changed, but for what `partial` tells.

    Attributes
    ----------
    result : int
        -2 the map file could not be read, -3 a slot does not hold what it should, -4 no space for a new page.
    code : int
        errno, or 0.
    slot : int
        Which slot of the map file.
    partial : (root, freed, count) or None
        Of `assign` and `fill` when positions behind the first `count` could not be changed: the tree with these
        changed, and what that freed. It takes the place of the tree as it was.
    """

    result: int
    code: int
    slot: int
    partial: tuple[int, npt.NDArray[np.uint64], int] | None

class PageFile:
    """Pages of a map file.

    Parameters
    ----------
    descriptor : int
        The map file, open for reading; it is grown with fallocate, and never written by this class.
    seed : int
        Of the checksums.
    generation : int
        That pages are made in from now on.
    slots : int
        That the file has room for, 3 at least.
    used : uint64 array of shape ((slots + 63) // 64,)
        Bitmap of used slots, lowest bit first.
    cache_bytes : int
        How much memory clean pages may take.
    """

    def __init__(
        self,
        descriptor: int,
        seed: int,
        generation: int,
        slots: int,
        used: npt.NDArray[np.uint64],
        cache_bytes: int,
    ) -> None: ...
    spare: int
    """Slots that only `put`, `prune` and the bitmap of space may take: a checkpoint needs no new space on the host."""

    @property
    def generation(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def free_slots(self) -> int: ...
    @property
    def resident_bytes(self) -> int: ...
    def free_pages(self, refs: npt.NDArray[np.uint64]) -> None:
        """Give pages up, each once: at once, or after the next checkpoint when the last one refers to them."""

    def used_slots(self) -> npt.NDArray[np.uint64]:
        """Bitmap of used slots, without those that wait for a checkpoint."""

    def put(self, kind: int, payload: Buffer) -> int:
        """A new page of a kind with 1 to 1,024 bytes; returns its reference."""

    def get(self, kind: int, ref: int) -> bytes:
        """The 1,024 bytes of a page."""

    def dirty(self) -> npt.NDArray[np.uint64]:
        """Slots whose pages were made since they were last written, in order."""

    def freeze(self) -> int:
        """Begin a new generation: what there is does not change any more. Returns the generation that ended."""

    def stage(self, slots: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """The bytes of slots, with checksums, one behind the other, to be written to the map file."""

    def written(self, slots: npt.NDArray[np.uint64]) -> None:
        """These slots are in the map file. Trees' pages of the current generation stay dirty: they may change yet."""

    def release(self) -> None:
        """The checkpoint that began with the last `freeze` is durable: slots that only older ones needed are free."""
