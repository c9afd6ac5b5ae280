"""The cold tier: trees, chunks, packs, index, manifests, collection (docs/FORMAT.md)."""

from snapcore.repository.collect import Collected
from snapcore.repository.copy import Copied
from snapcore.repository.create import Created
from snapcore.repository.groups import Group, HookRun, Member
from snapcore.repository.images import Image, ImageDisk, Labels
from snapcore.repository.keyring import Key, KeyHolder, Keyring
from snapcore.repository.lineage import NO_KEY, KeyChoice
from snapcore.repository.manifest import CopiedFrom, Manifest, Snapshot
from snapcore.repository.marks import Usage
from snapcore.repository.pins import Pin
from snapcore.repository.reader import SnapshotReader
from snapcore.repository.repository import LockedSnapshot, Repository
from snapcore.repository.restore import Restored
from snapcore.repository.session import Session
from snapcore.repository.verify import Hit, Problem, Verified

__all__ = [
    "NO_KEY",
    "Collected",
    "Copied",
    "CopiedFrom",
    "Created",
    "Group",
    "Hit",
    "HookRun",
    "Image",
    "ImageDisk",
    "Key",
    "KeyChoice",
    "KeyHolder",
    "Keyring",
    "Labels",
    "LockedSnapshot",
    "Manifest",
    "Member",
    "Pin",
    "Problem",
    "Repository",
    "Restored",
    "Session",
    "Snapshot",
    "SnapshotReader",
    "Usage",
    "Verified",
]
