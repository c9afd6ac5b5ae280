"""Where an image is written to from front to back: a new file, or a pipe.

A file gets what was not zero; a pipe gets every byte. Small pieces are collected, large ones go as they are.
"""

from __future__ import annotations

import os
from typing import Protocol

from snapcore.errors import StoreError, UsageError, from_os_error
from snapcore.source.target import RawTarget

_COLLECT_BYTES = 4 << 20
_ZEROS = memoryview(bytes(1 << 20))


class Sink(Protocol):
    """Takes the bytes of an image in order."""

    position: int

    def append(self, data: memoryview | bytes) -> None:
        """The next bytes; they are taken or copied before this returns."""

    def append_zeros(self, count_bytes: int) -> None:
        """So many zeros."""

    def rewrite(self, data: bytes, offset_bytes: int) -> None:
        """Fill in what was left open; a pipe cannot."""

    def finish(self) -> None:
        """Nothing comes any more."""


class FileSink:
    """A file that is empty at first. `position` is where the next byte goes."""

    def __init__(self, target: RawTarget) -> None:
        self.position = 0
        self._target = target
        self._collected = bytearray()

    def append(self, data: memoryview | bytes) -> None:
        """See `Sink.append`."""
        if len(data) >= _COLLECT_BYTES // 8:
            self._write_collected()
            self._target.write_data(memoryview(data), self.position)
        else:
            self._collected += data
        self.position += len(data)
        if len(self._collected) >= _COLLECT_BYTES:
            self._write_collected()

    def append_zeros(self, count_bytes: int) -> None:
        """See `Sink.append_zeros`: a hole."""
        self._write_collected()
        self.position += count_bytes

    def rewrite(self, data: bytes, offset_bytes: int) -> None:
        """See `Sink.rewrite`."""
        self._target.write_data(memoryview(data), offset_bytes)

    def finish(self) -> None:
        """See `Sink.finish`: zeros at the end count too."""
        self._write_collected()
        self._target.set_size(self.position)

    def _write_collected(self) -> None:
        if self._collected:
            self._target.write_data(memoryview(self._collected), self.position - len(self._collected))
            self._collected = bytearray()


class PipeSink:
    """A descriptor that is written in order and stays the caller's."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.position = 0
        self._descriptor = descriptor
        self._name = name

    def append(self, data: memoryview | bytes) -> None:
        """See `Sink.append`."""
        view = memoryview(data)
        self.position += len(view)
        while view:
            try:
                written = os.write(self._descriptor, view)
            except BrokenPipeError as error:
                raise StoreError(f"whoever reads {self._name} has gone; the image is not complete") from error
            except OSError as error:
                raise from_os_error(error, f"writing {self._name}") from error
            view = view[written:]

    def append_zeros(self, count_bytes: int) -> None:
        """See `Sink.append_zeros`."""
        for start in range(0, count_bytes, len(_ZEROS)):
            self.append(_ZEROS[: min(len(_ZEROS), count_bytes - start)])

    def rewrite(self, data: bytes, offset_bytes: int) -> None:
        """See `Sink.rewrite`."""
        raise UsageError(f"{self._name} is a pipe, in which nothing can be written at {offset_bytes} any more")

    def finish(self) -> None:
        """See `Sink.finish`."""
