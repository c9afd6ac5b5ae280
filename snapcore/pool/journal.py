"""Reads the log of a pool: commits since the last checkpoint, whole and in order, or an error that says where it is
damaged (docs/FORMAT.md, "Log sector")."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from snapcore.errors import DamagedError, ReadError
from snapcore.log import read_sectors
from snapcore.pool import events
from snapcore.pool.superblock import Superblock

SECTOR_BYTES = 512
_HEADER_BYTES = 24
_PAYLOAD_BYTES = 488
_MAP_BYTES = 24
_WHOLE, _DAMAGED = 1, 2
_LAST_OF_COMMIT = 1
_POSITION_BITS = 40


@dataclass(frozen=True, slots=True)
class Map:
    """Positions of a version that were remapped."""

    version: int
    position: int
    count: int
    entry: int


Record = Map | events.Event


@dataclass(frozen=True, slots=True)
class Journal:
    """What the log holds behind a checkpoint.

    Attributes
    ----------
    commits : list of bytes
        Payload of each whole commit.
    log_next, commit_number : int
        Of the sector and the commit that come next.
    """

    commits: list[bytes]
    log_next: int
    commit_number: int

    def records(self, where: str) -> Iterator[Record]:
        """All records, in order."""
        for payload in self.commits:
            yield from parse(payload, where)


def read(path: str, descriptor: int, superblock: Superblock, *, leniently: bool = False) -> Journal:
    """Read and check the log; `leniently` ends it where it is damaged."""
    size_bytes = superblock.log_sectors * SECTOR_BYTES
    data = _read_all(path, descriptor, size_bytes)
    places = (superblock.log_next + np.arange(superblock.log_sectors)) % superblock.log_sectors
    sectors = read_sectors(data, superblock.seed)[places]
    if not leniently and np.any(sectors[:, 0] == _DAMAGED) and not np.any(sectors[:, 0] == _WHOLE):
        raise _damage(path, int(places[np.argmax(sectors[:, 0] == _DAMAGED)]), "no sector is of this pool; the first")
    count = _length(path, sectors, places, superblock, leniently=leniently)
    commits: list[bytes] = []
    number, start = superblock.commit_number, 0
    for last in np.flatnonzero(sectors[:count, 4] & _LAST_OF_COMMIT):
        if np.any(sectors[start : last + 1, 2] != number % (1 << 32)):
            raise _damage(path, int(places[start]), "a commit is out of order")
        pieces = [_payload(path, data, int(places[i]), int(sectors[i, 3])) for i in range(start, last + 1)]
        commits.append(b"".join(pieces))
        number, start = number + 1, int(last) + 1
    if not leniently:
        _check_end(path, sectors, places, start, number, superblock)
    return Journal(commits, superblock.log_next + start, number)


def _read_all(path: str, descriptor: int, size_bytes: int) -> bytearray:
    if os.fstat(descriptor).st_size < size_bytes:
        raise DamagedError(f"{path} is shorter than its {size_bytes} bytes; restore the pool from a backup")
    data = bytearray(size_bytes)
    view, done = memoryview(data), 0
    while done < size_bytes:
        try:
            got = os.preadv(descriptor, [view[done:]], done)
        except OSError as error:
            raise ReadError(path, done, size_bytes - done, error.errno or 0, error.strerror or "") from None
        if not got:
            raise DamagedError(f"{path} ends at {done} of its {size_bytes} bytes; restore the pool from a backup")
        done += got
    return data


def _payload(path: str, data: bytearray, place: int, used: int) -> bytes:
    if used > _PAYLOAD_BYTES:
        raise _damage(path, place, "a sector holds more than it can")
    start = place * SECTOR_BYTES + _HEADER_BYTES
    return bytes(data[start : start + used])


def _damage(path: str, place: int, what: str) -> DamagedError:
    return DamagedError(
        f"{path}: {what} at offset {place * SECTOR_BYTES}; flushed writes behind it would be lost; restore the pool "
        "from a backup, or give them up with `snapcore pool check --repair`"
    )


def _length(
    path: str,
    sectors: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
    superblock: Superblock,
    *,
    leniently: bool,
) -> int:
    """How many sectors follow one another from the start."""
    numbers = superblock.log_next + np.arange(len(sectors))
    good = (sectors[:, 0] == _WHOLE) & (sectors[:, 1] == numbers)
    count = len(good) if good.all() else int(np.argmin(good))
    if count < len(sectors) and sectors[count, 0] == _DAMAGED and not leniently:
        raise _damage(path, int(places[count]), "a sector is damaged")
    return count


def _check_end(
    path: str,
    sectors: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
    end: int,
    commit: int,
    superblock: Superblock,
) -> None:
    """Behind the end there may be sectors of the next commit, which was torn, and of none after it."""
    numbers = superblock.log_next + np.arange(len(sectors))
    later = (sectors[:, 0] == _WHOLE) & (sectors[:, 1] == numbers) & (sectors[:, 2] != commit % (1 << 32))
    later[:end] = False
    if later.any() or ((sectors[:, 0] == _WHOLE) & (sectors[:, 1] > numbers)).any():
        raise _damage(path, int(places[end]), "a part of the log is missing")


def parse(payload: bytes, where: str) -> Iterator[Record]:
    """Records of one commit."""
    at = 0
    while at < len(payload):
        kind = int.from_bytes(payload[at : at + 4], "little")
        second = int.from_bytes(payload[at + 4 : at + 8], "little")
        if kind == 1 and at + _MAP_BYTES <= len(payload):
            place = int.from_bytes(payload[at + 8 : at + 16], "little")
            entry = int.from_bytes(payload[at + 16 : at + 24], "little")
            yield Map(second, place & ((1 << _POSITION_BITS) - 1), place >> _POSITION_BITS, entry)
            at += _MAP_BYTES
        elif kind == 2 and at + 8 + second <= len(payload):
            try:
                yield events.decode(payload[at + 8 : at + 8 + second])
            except msgspec.DecodeError as error:
                raise DamagedError(f"{where}: an event in the log cannot be read: {error}") from None
            at += 8 + (second + 7) // 8 * 8
        else:
            raise DamagedError(f"{where}: a record in the log is of kind {kind}, which this snapcore does not know")
