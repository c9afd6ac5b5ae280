"""Turns what the kernels report into the typed errors that users see, with the file, the offset and what to do."""

from __future__ import annotations

import errno
import os

from snapcore.core import (
    BACKING_CHANGED,
    BACKING_READ_FAILED,
    BLOCK_BYTES,
    BLOCK_OUTSIDE,
    DATA_LOST,
    DATA_READ_FAILED,
    DETACHED,
    FETCH_FAILED,
    LIMIT_REACHED,
    LOG_FULL,
    NOT_CONSISTENT,
    NOT_WRITABLE,
    OUT_OF_RANGE,
    STOPPED,
    WRITE_FAILED,
)
from snapcore.errors import (
    DamagedError,
    Error,
    NotFoundError,
    OutOfSpaceError,
    ReadError,
    RefusedError,
    SourceChangedError,
    StoreError,
    UsageError,
)
from snapcore.pages import DAMAGED, NO_SPACE, READ_FAILED, SLOT_BYTES, Failure

_FULL = {28, 122, 27}  # ENOSPC, EDQUOT, EFBIG


def typed(failure: Failure, folder: str, what: str, backing: str = "", fetched: str = "") -> Error:
    """The error of a failure in a pool's folder, while doing something to `what`.

    `backing` is the image that it reads from, and `fetched` what went wrong when a part of that was fetched last.
    """
    reason = os.strerror(failure.code) if failure.code else ""
    make = _OF_MAP.get(failure.result) or _OF_WRITING.get(failure.result) or _OF_READING.get(failure.result)
    if make is None:
        return StoreError(f"{what}: {failure}")
    return make(_Case(failure.slot, failure.code, reason, folder, what, backing, fetched))


class _Case:
    """What a message is made of."""

    def __init__(self, where: int, code: int, reason: str, folder: str, what: str, backing: str, fetched: str) -> None:
        self.where, self.code, self.reason = where, code, reason
        self.folder, self.what, self.backing = folder, what, backing
        self.fetched = fetched or reason
        self.map, self.data = os.path.join(folder, "map"), os.path.join(folder, "data")


def _map_damaged(case: _Case) -> Error:
    return DamagedError(
        f"{case.what}: slot {case.where} of {case.map} (offset {case.where * SLOT_BYTES}) does not hold the page "
        f"that it should; run `snapcore pool check {case.folder}`"
    )


def _outside(case: _Case) -> Error:
    return DamagedError(
        f"{case.what}: the map of block {case.where} refers to a place outside of {case.data}; "
        f"run `snapcore pool check {case.folder}`"
    )


def _write_failed(case: _Case) -> Error:
    if case.code in _FULL:
        return OutOfSpaceError(
            f"{case.what}: no space to write to {case.data} ({case.reason}); free some and try again"
        )
    return StoreError(f"{case.what}: {case.data} could not be written at offset {case.where}: {case.reason}")


def _stopped(case: _Case) -> Error:
    if case.code == errno.ESHUTDOWN:
        return NotFoundError(f"{case.what}: the pool {case.folder} is closed")
    if case.code == NOT_CONSISTENT:
        return DamagedError(
            f"{case.what}: the pool {case.folder} has stopped writing: its map frees what is free already; "
            f"close it and run `snapcore pool check {case.folder}`"
        )
    return StoreError(
        f"{case.what}: the pool {case.folder} has stopped writing, because a write of its log or map, or a sync, "
        f"failed ({case.reason}); what was flushed before is safe: see to the medium, close the pool and open it again"
    )


def _changed(case: _Case) -> Error:
    return SourceChangedError(
        f"{case.what}: the image {case.backing} that it reads from was changed after it was taken over; "
        "put it back as it was, or make the disk anew"
    )


def _fetch_failed(case: _Case) -> Error:
    if case.code == errno.ESHUTDOWN:
        return NotFoundError(f"{case.what}: the pool {case.folder} is closed")
    if case.code in _FULL:
        return OutOfSpaceError(
            f"{case.what}: no space in {case.folder} for what comes from {case.backing} ({case.reason}); "
            "free some and try again"
        )
    return StoreError(
        f"{case.what}: what is at offset {case.where} could not be fetched from {case.backing}: {case.fetched}; "
        "try again when it can be reached"
    )


_OF_MAP = {
    READ_FAILED: lambda case: ReadError(case.map, case.where * SLOT_BYTES, SLOT_BYTES, case.code, case.reason),
    DAMAGED: _map_damaged,
    NO_SPACE: lambda case: OutOfSpaceError(
        f"{case.what}: no space to grow {case.map} ({case.reason}); free some and try again"
    ),
    BLOCK_OUTSIDE: _outside,
}
_OF_WRITING = {
    LOG_FULL: lambda case: OutOfSpaceError(f"{case.what}: the log of {case.folder} is full; free space and try again"),
    WRITE_FAILED: _write_failed,
    STOPPED: _stopped,
    LIMIT_REACHED: lambda case: OutOfSpaceError(
        f"{case.what}: the pool {case.folder} has reached its limit of {case.where * BLOCK_BYTES} bytes; "
        "delete snapshots or disks, or raise the limit"
    ),
    NOT_WRITABLE: lambda case: RefusedError(f"{case.what}: it is read-only"),
}
_OF_READING = {
    DETACHED: lambda case: NotFoundError(f"{case.what}: it was deleted or closed"),
    DATA_READ_FAILED: lambda case: ReadError(
        case.data, case.where, BLOCK_BYTES, case.code, case.reason or "the file ends there"
    ),
    DATA_LOST: lambda case: DamagedError(
        f"{case.what}: what was at offset {case.where} was lost to damage and a repair; "
        "whole blocks written there heal it"
    ),
    BACKING_READ_FAILED: lambda case: ReadError(case.backing, case.where, BLOCK_BYTES, case.code, case.reason),
    BACKING_CHANGED: _changed,
    FETCH_FAILED: _fetch_failed,
    OUT_OF_RANGE: lambda case: UsageError(
        f"{case.what}: the range from offset {case.where} on is not all inside of it"
    ),
}
