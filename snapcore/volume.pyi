"""The pool's data path. Everything here is safe from many threads and lets go of the interpreter while it works."""

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from snapcore.core import Core
from snapcore.presence import Presence

def close_gates(volumes: Iterable[Volume]) -> None:
    """Let no write begin, and wait for those that have begun."""

def open_gates(volumes: Iterable[Volume]) -> None:
    """Let writes begin again."""

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
    presence, fetch
        Of an image that is not all here: what is, and a callable that gets the bytes from one offset to another; it
        returns 0 when they are here, else an errno.
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
        presence: Presence | None = None,
        fetch: Callable[[int, int], int] | None = None,
    ) -> None: ...
    def replay(self, position: int, count: int, entry: int) -> None:
        """Do a MAP record again."""
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
    def change_backing(
        self,
        backing: int,
        backing_bytes: int,
        backing_mtime_ns: int,
        presence: Presence | None = None,
        fetch: Callable[[int, int], int] | None = None,
    ) -> None:
        """Read absent blocks from another image."""
    def pread_into(self, buffer: Buffer, offset: int) -> int:
        """Fill a buffer; returns how many bytes, fewer at the end."""
    def pread_many(self, offsets: npt.NDArray[np.int64], buffers: npt.NDArray[np.uint8]) -> int:
        """Fill row i of `buffers`, of shape (n, length), from offset i; returns how many bytes."""
    def pwrite(self, data: Buffer, offset: int) -> int:
        """Write all of a buffer; returns how many bytes."""
    def zero(self, offset: int, size_bytes: int) -> None:
        """Make a range read as zeros; whole blocks are given up."""
