"""The file that an image format lies in: every read of it is checked against its end before anything is believed."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from snapcore.errors import ImageError
from snapcore.extents import Extents
from snapcore.source.raw import RawSource

# What is read of a header or a directory in one piece: QEMU's own bound for those of qcow2.
TABLE_LIMIT_BYTES = 32 << 20


class Container:
    """An open file of some image format; safe on many threads.

    Parameters
    ----------
    file : RawSource
        Its bytes; closed by whoever opened it.
    kind : str
        Name of the format, for messages.
    """

    def __init__(self, file: RawSource, kind: str) -> None:
        self.file = file
        self.kind = kind
        self.name = file.name
        self.size_bytes = file.size_bytes

    def error(self, offset_bytes: int, what: str) -> ImageError:
        """The error for what stands at an offset and cannot be."""
        return ImageError(
            f"{self.name} is no {self.kind} image that can be read: at offset {offset_bytes} {what}; "
            "check it with the program that wrote it, or take another copy"
        )

    def read(self, offset_bytes: int, length_bytes: int, what: str) -> bytes:
        """Bytes that must be there; `what` says what they are."""
        if length_bytes > TABLE_LIMIT_BYTES:
            raise self.error(offset_bytes, f"{what} would have {length_bytes} bytes, more than can be meant")
        if offset_bytes < 0 or offset_bytes > self.size_bytes - length_bytes:
            raise self.error(
                offset_bytes, f"{what} of {length_bytes} bytes reaches behind the file's end at {self.size_bytes}"
            )
        data = bytearray(length_bytes)
        self.file.read_into(memoryview(data), offset_bytes)
        return bytes(data)

    def fields(self, layout: struct.Struct, offset_bytes: int, what: str) -> tuple[int, ...]:
        """A record of numbers that must be there."""
        return layout.unpack(self.read(offset_bytes, layout.size, what))

    def array(self, offset_bytes: int, count: int, dtype: str, what: str) -> npt.NDArray[np.int64]:
        """A table of unsigned numbers that must be there; those of 64 bits keep their bits, the highest as a sign."""
        item = np.dtype(dtype)
        data = self.read(offset_bytes, count * item.itemsize, what)
        found = np.frombuffer(data, dtype=item)
        if item.itemsize < 8:
            return found.astype(np.int64)
        return found.astype(np.uint64).view(np.int64)

    def read_up_to_end(self, target: memoryview, offset_bytes: int) -> None:
        """Fill `target`; what lies behind the end of the file is zeros."""
        there = max(0, min(len(target), self.size_bytes - offset_bytes))
        if there:
            self.file.read_into(target[:there], offset_bytes)
        if there < len(target):
            target[there:] = bytes(len(target) - there)

    def data_extents(self) -> Extents:
        """What of the file is no hole."""
        return self.file.data_extents()
