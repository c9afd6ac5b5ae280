"""The pool's trees: pages of 128 entries, five levels, named by their roots (docs/FORMAT.md).

An entry is 0 (absent), 1 (zero), 2 (lost: a repair found nothing readable there) or a reference: to a page above the
leaves, to a block in them. Positions are block numbers of a disk, below 2 ** 35. All methods are safe from many
threads; none holds the lock across Python code.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from snapcore.pages import PageFile

class Trees(PageFile):
    """The pages of a map file, and the trees among them."""

    slice_pages: int
    """How many pages `tally` and `exclusive` look at before they let others have the lock."""

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
