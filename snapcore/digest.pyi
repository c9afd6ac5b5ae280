"""Block fingerprints: XXH64 of every block of a span in one call without the GIL."""

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

def xxh64_blocks(data: Buffer, block_bytes: int, seed: int = 0) -> npt.NDArray[np.uint64]:
    """XXH64 of each block.

    Parameters
    ----------
    data : contiguous bytes-like object
    block_bytes : int
        From 1 on. The last block may be short.
    seed : int
        0 to 2**64 - 1.

    Returns
    -------
    uint64 array of shape (blocks,)
    """
