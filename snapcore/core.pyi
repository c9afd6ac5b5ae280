"""An open pool as its kernels share it: files, the one mutex, and what has failed. Safe from many threads."""

from typing import Final

import numpy as np
import numpy.typing as npt

from snapcore.blockmap import Trees
from snapcore.pages import Failure
from snapcore.persist import Medium

LOG_FULL: Final[int]
WRITE_FAILED: Final[int]
STOPPED: Final[int]
DETACHED: Final[int]
LIMIT_REACHED: Final[int]
DATA_READ_FAILED: Final[int]
BACKING_READ_FAILED: Final[int]
BACKING_CHANGED: Final[int]
OUT_OF_RANGE: Final[int]
NOT_WRITABLE: Final[int]
BLOCK_OUTSIDE: Final[int]
DATA_LOST: Final[int]
WOULD_WAIT: Final[int]
NOT_HERE: Final[int]
FETCH_FAILED: Final[int]
BLOCK_BYTES: Final[int]
PIECE_BLOCKS: Final[int]
NOT_CONSISTENT: Final[int]

class LogFull(Failure):
    """A checkpoint must come first; nothing was done, or a part of the range was, as any failed write may leave it."""

class Core:
    """Space, log and volumes of a pool, over the trees of its map file.

    Parameters
    ----------
    data, log : int
        Descriptors. `medium` does the persistent operations; None is the operating system, called directly.
    used : uint64 array
        Bitmap of used blocks; no block at or behind `end` is used.
    limit_blocks : int
        0 is none.
    """

    page_file: Trees

    def __init__(
        self,
        page_file: Trees,
        data: int,
        log: int,
        medium: Medium | None,
        *,
        seed: int,
        used: npt.NDArray[np.uint64],
        end: int,
        limit_blocks: int,
        log_sectors: int,
        log_next: int,
        commit_number: int,
        space_root: int,
    ) -> None: ...
    limit_blocks: int
    @property
    def failed(self) -> int:
        """0, or the errno for which nothing is written any more."""
    @property
    def used_blocks(self) -> int: ...
    @property
    def held_blocks(self) -> int:
        """Free, but not to be used yet; and those of writes on their way."""
    @property
    def end_blocks(self) -> int: ...
    @property
    def space_root(self) -> int: ...
    @property
    def commits(self) -> int: ...
    @property
    def log_next(self) -> int: ...
    @property
    def commit_number(self) -> int: ...
    @property
    def log_free_sectors(self) -> int: ...
    @property
    def pending_bytes(self) -> int:
        """Records that no commit has taken yet."""
    @property
    def reclaimable(self) -> bool: ...
    def stop(self, code: int) -> None:
        """Write nothing any more, for the reason `code` (errno)."""
    def close(self) -> None:
        """Use the files no more: volumes are detached, those that come too, and what is under way is waited for."""
