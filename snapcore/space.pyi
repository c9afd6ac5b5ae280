"""The space of a pool's data file. Everything is safe from many threads and lets go of the interpreter meanwhile."""

import numpy as np
import numpy.typing as npt

from snapcore.core import Core

def reclaim(core: Core) -> int:
    """Punch out blocks that are free for good, and let them be used. Returns 0, or errno of a failed punch."""

def free_blocks(core: Core, blocks: npt.NDArray[np.uint64]) -> None:
    """No version holds these blocks any more."""

def rewrite(core: Core) -> None:
    """Write the whole bitmap of used blocks at the next checkpoint."""

def settle_freed(core: Core) -> None:
    """The replay has ended: free, after the next commit, what records freed and none used again."""

def used_bitmap(core: Core) -> npt.NDArray[np.uint64]:
    """One bit a block, lowest first."""
