"""Mediums for tests: one that does not wait for the disk, and one that fails or tells what it was asked."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from snapcore.persist import Buffer, Medium


class Unsynced(Medium):
    """The real file system without waiting for the disk: for tests that are not about power cuts."""

    def sync(self, descriptor: int) -> None:
        os.fstat(descriptor)

    def sync_folder(self, path: str) -> None:
        os.stat(path)


class Failing(Unsynced):
    """Fails one primitive with an error of the operating system, and lists what was called.

    Parameters
    ----------
    primitive : str
        Name of the method that fails; "" for none.
    code : int
        The errno.
    """

    def __init__(self, primitive: str = "", code: int = errno.EIO) -> None:
        self.primitive = primitive
        self.code = code
        self.calls: list[tuple[str, str]] = []

    def _note(self, primitive: str, path: str = "") -> None:
        self.calls.append((primitive, path))
        if primitive == self.primitive:
            raise OSError(self.code, os.strerror(self.code))

    def create(self, path: str, mode: int = 0o666) -> int:
        self._note("create", path)
        return super().create(path, mode)

    def write_at(self, descriptor: int, buffers: Sequence[Buffer], offset_bytes: int) -> int:
        # Half of it is on the disk when it fails.
        joined = b"".join(buffers)
        super().write_at(descriptor, [joined[: len(joined) // 2]], offset_bytes)
        self._note("write_at")
        return super().write_at(descriptor, buffers, offset_bytes)

    def sync(self, descriptor: int) -> None:
        self._note("sync")
        super().sync(descriptor)

    def link(self, source: str, target: str) -> None:
        self._note("link", target)
        super().link(source, target)

    def unlink(self, path: str) -> None:
        self._note("unlink", path)
        super().unlink(path)

    def make_folder(self, path: str) -> None:
        self._note("make_folder", path)
        super().make_folder(path)

    def sync_folder(self, path: str) -> None:
        self._note("sync_folder", path)
        super().sync_folder(path)
