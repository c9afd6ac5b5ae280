"""The files of a pool: making them, locking, opening (docs/FORMAT.md, "The pool")."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from dataclasses import dataclass

from snapcore.errors import BusyError, ExistsError, NotFoundError, UnsupportedFormatError, from_os_error
from snapcore.persist import Medium
from snapcore.pool.superblock import COPY_BYTES, COPY_OFFSETS, FILE_BYTES, Superblock

SECTOR_BYTES = 512
_ZEROS = bytes(1 << 20)


@dataclass(slots=True)
class Files:
    """Open files of a pool.

    Attributes
    ----------
    folder : str
    medium : Medium
        Does every persistent operation.
    read_only : bool
    lock, superblock, log, map, data : int
        Descriptors.
    """

    folder: str
    medium: Medium
    read_only: bool
    lock: int
    superblock: int
    log: int
    map: int
    data: int

    def path(self, name: str) -> str:
        """Of a file of the pool."""
        return os.path.join(self.folder, name)

    def close(self) -> None:
        """Close all, and let others open the pool."""
        for descriptor in (self.superblock, self.log, self.map, self.data, self.lock):
            os.close(descriptor)


def make(folder: str, medium: Medium, superblock: Superblock, map_bytes: bytes) -> None:
    """Make the files of a new pool. Until the superblock has its name there is no pool, whatever a crash leaves."""
    made: list[str] = []

    def make_file(name: str, pieces: list[bytes]) -> str:
        made.append(os.path.join(folder, name))
        _make_file(medium, made[-1], pieces)
        return made[-1]

    try:
        medium.make_folder(folder)
        if os.listdir(folder):
            raise ExistsError(f"{folder} is not empty; make the pool in a folder of its own")
        make_file("lock", [])
        make_file("data", [])
        make_file("map", [map_bytes])
        log_bytes = superblock.log_sectors * SECTOR_BYTES
        pieces = [_ZEROS] * (log_bytes // len(_ZEROS)) + [_ZEROS[: log_bytes % len(_ZEROS)]]
        make_file("log", [piece for piece in pieces if piece])
        copies = bytearray(FILE_BYTES)
        for offset in COPY_OFFSETS:
            copies[offset : offset + COPY_BYTES] = superblock.encode()
        unnamed = make_file("superblock.new", [bytes(copies)])
        made.append(os.path.join(folder, "superblock"))
        medium.sync_folder(folder)
        medium.rename(unnamed, os.path.join(folder, "superblock"))
        medium.sync_folder(folder)
        medium.sync_folder(os.path.dirname(os.path.abspath(folder)))
    except OSError as error:
        # So that one may try again in the same folder. What makes it a pool goes first.
        for path in reversed(made):
            with contextlib.suppress(OSError):
                medium.unlink(path)
        raise from_os_error(error, f"making the pool {folder}") from error


def _make_file(medium: Medium, path: str, pieces: list[bytes]) -> None:
    descriptor = medium.create(path)
    try:
        offset = 0
        for piece in pieces:
            offset += medium.write_at(descriptor, [piece], offset)
        medium.sync(descriptor)
    finally:
        medium.close(descriptor)


def open_files(folder: str, medium: Medium, *, read_only: bool) -> Files:
    """Lock the pool and open its files."""
    descriptors: list[int] = []
    try:
        if not os.path.exists(os.path.join(folder, "superblock")):
            raise NotFoundError(f"{folder} is no pool; make one with `snapcore pool init {folder}`")
        mode = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
        descriptors.append(os.open(os.path.join(folder, "lock"), mode))
        _lock(descriptors[0], folder, read_only=read_only)
        names = ("superblock", "log", "map", "data")
        descriptors.extend(os.open(os.path.join(folder, name), mode) for name in names)
    except BaseException as error:
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(error, OSError):
            raise from_os_error(error, f"opening the pool {folder}") from error
        raise
    return Files(folder, medium, read_only, *descriptors)


def _lock(descriptor: int, folder: str, *, read_only: bool) -> None:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BusyError(
                f"the pool {folder} is open elsewhere: one process owns it, or several read it; close it there first"
            ) from None
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise UnsupportedFormatError(f"{folder} lies on a file system without locks; a pool needs them") from None
        raise
