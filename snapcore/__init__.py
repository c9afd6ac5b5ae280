"""Snapshots of disk images: full, then changed blocks only; any can be deleted, any restores the whole disk.

A pool holds live disks that take snapshots, clones and rollbacks in constant time; its snapshots are
`snapcore.pool.Snapshot`.

The larger parts are imported when their names are first used, so that a program starts as fast as it can.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from snapcore.errors import (
    BusyError,
    CancelledError,
    ChecksumError,
    ConflictError,
    DamagedError,
    Error,
    ExistsError,
    ExpiredError,
    FencedError,
    ImageError,
    LockedError,
    MissingObjectError,
    NotFoundError,
    OutOfSpaceError,
    ReadError,
    RefusedError,
    SourceChangedError,
    StoreError,
    StoreRefusedError,
    UnsupportedFormatError,
    UsageError,
)

if TYPE_CHECKING:
    from snapcore.keys import AwsKms, Holder, KeyFile, Passphrase
    from snapcore.pool import Disk, Pool, PoolUsage
    from snapcore.progress import Progress, ProgressCallback
    from snapcore.repository import (
        NO_KEY,
        Collected,
        Created,
        Image,
        ImageDisk,
        Key,
        Keyring,
        LockedSnapshot,
        Manifest,
        Repository,
        Restored,
        Session,
        Snapshot,
        SnapshotReader,
        Usage,
        Verified,
    )
    from snapcore.server import NbdServer
    from snapcore.source import Source, Written, open_image, send_image, write_image
    from snapcore.source.compare import diff_images
    from snapcore.store import LocalStore, MemoryStore, Store, open_store

__all__ = [
    "NO_KEY",
    "AwsKms",
    "BusyError",
    "CancelledError",
    "ChecksumError",
    "Collected",
    "ConflictError",
    "Created",
    "DamagedError",
    "Disk",
    "Error",
    "ExistsError",
    "ExpiredError",
    "FencedError",
    "Holder",
    "Image",
    "ImageDisk",
    "ImageError",
    "Key",
    "KeyFile",
    "Keyring",
    "LocalStore",
    "LockedError",
    "LockedSnapshot",
    "Manifest",
    "MemoryStore",
    "MissingObjectError",
    "NbdServer",
    "NotFoundError",
    "OutOfSpaceError",
    "Passphrase",
    "Pool",
    "PoolUsage",
    "Progress",
    "ProgressCallback",
    "ReadError",
    "RefusedError",
    "Repository",
    "Restored",
    "Session",
    "Snapshot",
    "SnapshotReader",
    "Source",
    "SourceChangedError",
    "Store",
    "StoreError",
    "StoreRefusedError",
    "UnsupportedFormatError",
    "Usage",
    "UsageError",
    "Verified",
    "Written",
    "diff_images",
    "open_image",
    "open_store",
    "send_image",
    "write_image",
]

_HOMES = {
    "AwsKms": "snapcore.keys",
    "Holder": "snapcore.keys",
    "Image": "snapcore.repository",
    "ImageDisk": "snapcore.repository",
    "Key": "snapcore.repository",
    "KeyFile": "snapcore.keys",
    "Keyring": "snapcore.repository",
    "LockedSnapshot": "snapcore.repository",
    "NO_KEY": "snapcore.repository",
    "Passphrase": "snapcore.keys",
    "Collected": "snapcore.repository",
    "Created": "snapcore.repository",
    "Disk": "snapcore.pool",
    "LocalStore": "snapcore.store",
    "Manifest": "snapcore.repository",
    "MemoryStore": "snapcore.store",
    "NbdServer": "snapcore.server",
    "Pool": "snapcore.pool",
    "PoolUsage": "snapcore.pool",
    "Progress": "snapcore.progress",
    "ProgressCallback": "snapcore.progress",
    "Repository": "snapcore.repository",
    "Restored": "snapcore.repository",
    "Session": "snapcore.repository",
    "Snapshot": "snapcore.repository",
    "SnapshotReader": "snapcore.repository",
    "Source": "snapcore.source",
    "Store": "snapcore.store",
    "Usage": "snapcore.repository",
    "Verified": "snapcore.repository",
    "Written": "snapcore.source",
    "diff_images": "snapcore.source.compare",
    "open_store": "snapcore.store",
    "open_image": "snapcore.source",
    "send_image": "snapcore.source",
    "write_image": "snapcore.source",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'snapcore' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found
