"""Which chunks of an image are here already; safe from many threads."""

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

class Presence:
    """A bitmap over the chunks of an image of `size_bytes`, in chunks of `chunk_bytes`; nothing is here at first."""

    def __init__(self, size_bytes: int, chunk_bytes: int) -> None: ...
    @property
    def chunks(self) -> int:
        """How many the image has."""
    @property
    def here(self) -> int:
        """How many of them are here."""
    def add(self, first: int, count: int) -> None:
        """These chunks are here: their bytes can be read."""
    def missing(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Runs of chunks of a range that are not here: shape (n, 2), first chunk and count."""
    def to_bytes(self) -> bytes:
        """The bitmap, lowest bit first, in whole words of 8 bytes."""
    def load(self, data: Buffer) -> None:
        """Be what `to_bytes` gave; only before others know of this object."""
