"""The pool's trees: pages of 128 entries in slots of a map file, five levels, named by their roots (docs/FORMAT.md).

An entry is 0 (absent), 1 (zero), 2 (lost: a repair found nothing readable there) or a reference: to a page above the
leaves, to a block in them. Positions are block numbers of a disk, below 2 ** 35. All methods are safe from many
threads; none holds the lock across Python code.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

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

    slice_pages: int
    """How many pages `tally` and `exclusive` look at before they let others have the lock."""

    @property
    def generation(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def free_slots(self) -> int: ...
    @property
    def resident_bytes(self) -> int: ...
    def lookup(self, root: int, first: int, count: int) -> npt.NDArray[np.uint64]:
        """Entries of `count` positions from `first` on."""

    def assign(self, root: int, parent: int, first: int, count: int, entry: int) -> tuple[int, npt.NDArray[np.uint64]]:
        """Map positions from `first` on to the blocks from `entry` on.

        Returns
        -------
        root : int
            The tree as it is now; `root` as it was is no longer to be used, unless it was shared with `parent`.
        freed : uint64 array
            Blocks that this tree held, that it holds no more, and that `parent` does not hold at that position.
        """

    def fill(self, root: int, parent: int, first: int, count: int, entry: int) -> tuple[int, npt.NDArray[np.uint64]]:
        """Make positions 0 (absent) or 1 (zero); whole subtrees in one step. Returns what `assign` does."""

    def difference(self, a: int, b: int, first: int, last: int, limit: int) -> tuple[npt.NDArray[np.int64], int]:
        """Runs of positions whose entries differ, from `first` up to `last`; shared pages are skipped.

        Returns
        -------
        runs : int64 array of shape (n, 2), n <= limit
            Position and count.
        resume : int
            `last`, or where to go on when there were more.
        """

    def runs(self, root: int, first: int, last: int, limit: int) -> tuple[npt.NDArray[np.int64], int]:
        """Runs of positions that are not absent: (position, count, entry), 1 or the first of consecutive blocks."""

    def tally(self, root: int, other: int = 0) -> tuple[int, int, int]:
        """Blocks of `root`, blocks of `other` and pages of `root`, all without the pages that both share."""

    def exclusive(self, root: int, others: Iterable[int]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Blocks, and references of pages, that `root` holds and none of `others` holds at the same place."""

    def prune(self, root: int, others: Iterable[int]) -> int:
        """The root of a tree with what of `root` the others hold at the same place. Frees nothing."""

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

    def mark(
        self,
        root: int,
        family: int,
        slots: npt.NDArray[np.uint64],
        blocks: npt.NDArray[np.uint64],
        owners: npt.NDArray[np.uint32],
        block_limit: int,
    ) -> npt.NDArray[np.int64]:
        """Mark what a tree reaches in the two bitmaps; pages that are marked are not entered again.

        `owners` (zeros at first, shape (block_limit + slots,)) remembers at which place of which family a block or
        slot was found.

        Returns
        -------
        int64 array of shape (n, 3), n <= 1000
            Problem, position, and slot or block: 1 a page that cannot be read, 2 a page at two places, 3 a block
            outside of the data file, 4 a block at two places.
        """
