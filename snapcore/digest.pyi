"""Block fingerprints: XXH64 of every block of a span, of memory or of a file, in one call without the GIL."""

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

def read_blocks(
    descriptor: int, offset: int, size_bytes: int, block_bytes: int, seed: int, space: Buffer
) -> tuple[int, int, npt.NDArray[np.uint64], npt.NDArray[np.bool]]:
    """Read a range of a file, and tell the XXH64 of each block while it is in the processor's cache.

    Parameters
    ----------
    descriptor : int
        Of a file or device, open for reading.
    offset, size_bytes : int
    block_bytes : int
        A power of two from 512 on. The last block may be short; it counts as filled up with zeros.
    seed : int
    space : writable contiguous bytes-like object
        As long as all blocks; holds them afterwards.

    Returns
    -------
    int
        Bytes that were read.
    int
        0, or where they are fewer than wanted: errno, and 0 when the file ends there.
    uint64 array of shape (blocks,)
        XXH64 of each block that was read whole.
    bool array of shape (blocks,)
        Whether each of them is all zero.
    """
