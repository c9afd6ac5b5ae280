"""Zero blocks and differing blocks of memory and of files, and the safe way to touch mapped memory before a scan."""

from array import array

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

def zero_mask(data: Buffer, block_bytes: int) -> npt.NDArray[np.uint8]:
    """Which blocks are all zero.

    Parameters
    ----------
    data : contiguous bytes-like object
    block_bytes : int
        A power of two from 512 on. The last block may be short.

    Returns
    -------
    uint8 array of shape (blocks,)
        1 where the block is all zero.
    """

def differing_mask(a: Buffer, b: Buffer, block_bytes: int) -> npt.NDArray[np.uint8]:
    """Which blocks of two buffers of one length differ: uint8 array of shape (blocks,), 1 where they do."""

def same_bytes(a: Buffer, b: Buffer) -> bool:
    """Whether two buffers hold the same bytes."""

def zero_extents(data: Buffer, block_bytes: int, offset: int = 0) -> npt.NDArray[np.int64]:
    """Runs of zero blocks.

    Returns
    -------
    int64 array of shape (n, 2)
        Offset (plus `offset`) and length in bytes, merged and sorted; the last one ends with the buffer.
    """

def nonzero_extents(data: Buffer, block_bytes: int, offset: int = 0) -> npt.NDArray[np.int64]:
    """Runs of blocks that are not all zero, in the shape of `zero_extents`."""

def differing_extents(a: Buffer, b: Buffer, block_bytes: int, offset: int = 0) -> npt.NDArray[np.int64]:
    """Runs of blocks in which two buffers of one length differ, in the shape of `zero_extents`."""

class FileFailure(Exception):  # noqa: N818
    """A file could not be read.

    Attributes
    ----------
    which : int
        0 or 1: the first or the second of two files.
    offset : int
        Where, in bytes.
    code : int
        errno; 0 where the file ends there.
    """

    which: int
    offset: int
    code: int
    def __init__(self, which: int, offset: int, code: int) -> None: ...

def differing_in_files(
    a: int, b: int, offset: int, size_bytes: int, block_bytes: int, space: Buffer
) -> tuple[array[int], int]:
    """Runs of blocks in which a range of two open files differs. Holes are zeros, and not read.

    Parameters
    ----------
    a, b : int
        File descriptors.
    offset, size_bytes : int
        The range, from a block's border on. Both files reach to its end.
    block_bytes : int
        A power of two from 512 on. The last block may be short.
    space : writable contiguous bytes-like object
        Memory for a window of each file, two blocks or more. What the second-level cache holds is fastest.

    Returns
    -------
    rows : array of int64
        Offset and length, offset and length, …: in bytes, merged and sorted.
    data_bytes : int
        How much was no hole in both files.

    Raises
    ------
    FileFailure
    """

def populate(mapped: Buffer, offset: int, size_bytes: int) -> bool:
    """Bring a range of a mapped file into memory, with an error where a touch would be a signal.

    Returns
    -------
    bool
        True when every page is there; False where the kernel has no MADV_POPULATE_READ (before Linux
        5.14, and elsewhere): read the file with `os.preadv` then.

    Raises
    ------
    OSError
        EFAULT: a page lies beyond the end of the file or cannot be read; EIO, EHWPOISON: the medium
        failed.
    """
