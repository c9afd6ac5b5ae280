"""Snapshots of disk images: full, then changed blocks only; any can be deleted, any restores the whole disk."""

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
