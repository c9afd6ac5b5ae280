"""Snapshots of disk images: full, then changed blocks only; any can be deleted, any restores the whole disk.

The larger parts are imported when their names are first used, so that a program starts as fast as it can.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from snapcore.errors import (
    BusyError,
    CancelledError,
    DamagedError,
    Error,
    ExistsError,
    FencedError,
    MissingObjectError,
    NotFoundError,
    OutOfSpaceError,
    ReadError,
    RefusedError,
    SourceChangedError,
    StoreError,
    UnsupportedFormatError,
    UsageError,
)

if TYPE_CHECKING:
    from snapcore.progress import Progress
    from snapcore.repository import Manifest, Repository, SnapshotReader
    from snapcore.source.compare import diff_images

__all__ = [
    "BusyError",
    "CancelledError",
    "DamagedError",
    "Error",
    "ExistsError",
    "FencedError",
    "Manifest",
    "MissingObjectError",
    "NotFoundError",
    "OutOfSpaceError",
    "Progress",
    "ReadError",
    "RefusedError",
    "Repository",
    "SnapshotReader",
    "SourceChangedError",
    "StoreError",
    "UnsupportedFormatError",
    "UsageError",
    "diff_images",
]

_HOMES = {
    "Manifest": "snapcore.repository",
    "Progress": "snapcore.progress",
    "Repository": "snapcore.repository",
    "SnapshotReader": "snapcore.repository",
    "diff_images": "snapcore.source.compare",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'snapcore' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found
