"""The log of a pool and its commits. Everything is safe from many threads and lets go of the interpreter meanwhile."""

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from snapcore.core import Core

def read_sectors(data: Buffer, seed: int) -> npt.NDArray[np.int64]:
    """What log sectors say.

    Returns
    -------
    int64 array of shape (n, 5)
        State (0 all zeros, 1 whole, 2 damaged), sector number, commit number, payload bytes, flags.
    """

def append_event(core: Core, payload: Buffer) -> None:
    """Add an EVENT record to the buffer."""

def commit(core: Core) -> None:
    """Make durable what was written and logged before."""

def freeze(core: Core) -> tuple[int, npt.NDArray[np.uint64], npt.NDArray[np.uint64], int, int, int, int]:
    """Commit, and begin a checkpoint at that moment.

    Returns
    -------
    generation, dirty slots, bitmap of used slots, next log sector, next commit, end of the data, root of space
    """

def release(core: Core, log_tail: int) -> None:
    """The checkpoint is durable: the log before this sector and the pages that only older ones needed are free."""
