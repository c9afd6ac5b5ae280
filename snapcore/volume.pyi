"""The pool's data path. Everything here is safe from many threads and lets go of the interpreter while it works."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from snapcore.blockmap import Trees
from snapcore.pages import Failure
from snapcore.persist import Medium

class LogFull(Failure):
    """A checkpoint must come first; nothing was done, or a part of the range was, as any failed write may leave it."""

def read_sectors(data: Buffer, seed: int) -> npt.NDArray[np.int64]:
    """What log sectors say.

    Returns
    -------
    int64 array of shape (n, 5)
        State (0 all zeros, 1 whole, 2 damaged), sector number, commit number, payload bytes, flags.
    """

class Core:
    """Space, log and commits of a pool, over the trees of its map file.

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
    def append_event(self, payload: Buffer) -> None:
        """Add an EVENT record to the buffer."""
    def commit(self) -> None:
        """Make durable what was written and logged before."""
    def freeze(self) -> tuple[int, npt.NDArray[np.uint64], npt.NDArray[np.uint64], int, int, int, int]:
        """Commit, and begin a checkpoint at that moment.

        Returns
        -------
        generation, dirty slots, bitmap of used slots, next log sector, next commit, end of the data, root of space
        """
    def release(self, log_tail: int) -> None:
        """The checkpoint is durable: the log before this sector and the pages that only older ones needed are free."""
    def reclaim(self) -> int:
        """Punch out blocks that are free for good, and let them be used. Returns 0, or errno of a failed punch."""
    def free_blocks(self, blocks: npt.NDArray[np.uint64]) -> None:
        """No version holds these blocks any more."""
    def rewrite_space(self) -> None:
        """Write the whole bitmap of used blocks at the next checkpoint."""
    def settle_freed(self) -> None:
        """The replay has ended: free, after the next commit, what records freed and none used again."""
    def used_bitmap(self) -> npt.NDArray[np.uint64]:
        """One bit a block, lowest first."""
    def close_gates(self, volumes: Iterable[Volume]) -> None:
        """Let no write begin, and wait for those that have begun."""
    def open_gates(self, volumes: Iterable[Volume]) -> None:
        """Let writes begin again."""
    def replay(self, volume: Volume, position: int, count: int, entry: int) -> None:
        """Do a MAP record again."""

class Volume:
    """A version that is read, and written if it is a head.

    Parameters
    ----------
    root, parent : int
        Roots of its tree and of its parent's (0: none).
    watched : bool
        Its parent is a ghost, so a write may take a block away from that.
    backing : int
        Descriptor of the image that absent blocks are read from; -1 none, -2 there is one that cannot be opened.
    """

    core: Core

    def __init__(
        self,
        core: Core,
        *,
        root: int,
        parent: int,
        size_bytes: int,
        version: int,
        writable: bool,
        watched: bool = False,
        backing: int = -1,
        backing_bytes: int = 0,
        backing_mtime_ns: int = 0,
    ) -> None: ...
    @property
    def root(self) -> int: ...
    @property
    def parent(self) -> int: ...
    @property
    def frozen_root(self) -> int:
        """As of the last `Core.freeze`."""
    @property
    def size_bytes(self) -> int: ...
    @property
    def version(self) -> int: ...
    @property
    def attached(self) -> bool: ...
    def detach(self) -> None:
        """Refuse all that comes, and wait for what has begun."""
    def take_stirred(self) -> bool:
        """Whether a block was taken away from a ghost since this was asked last."""
    def change(self, *, root: int, parent: int, size_bytes: int, version: int, watched: bool) -> None:
        """Become another version; only while the gate is closed."""
    def change_backing(self, backing: int, backing_bytes: int, backing_mtime_ns: int) -> None:
        """Read absent blocks from another image."""
    def pread_into(self, buffer: Buffer, offset: int) -> int:
        """Fill a buffer; returns how many bytes, fewer at the end."""
    def pread_many(self, offsets: npt.NDArray[np.int64], buffers: npt.NDArray[np.uint8]) -> int:
        """Fill row i of `buffers`, of shape (n, length), from offset i; returns how many bytes."""
    def pwrite(self, data: Buffer, offset: int) -> int:
        """Write all of a buffer; returns how many bytes."""
    def zero(self, offset: int, size_bytes: int) -> None:
        """Make a range read as zeros; whole blocks are given up."""
