"""The cold tier: trees, chunks, packs, index, manifests, collection (docs/FORMAT.md)."""

from snapcore.repository.collect import Collected
from snapcore.repository.create import Created
from snapcore.repository.groups import Group, HookRun, Member
from snapcore.repository.manifest import Manifest, Snapshot
from snapcore.repository.marks import Usage
from snapcore.repository.reader import SnapshotReader
from snapcore.repository.repository import Repository
from snapcore.repository.restore import Restored
from snapcore.repository.session import Session
from snapcore.repository.verify import Hit, Problem, Verified

__all__ = [
    "Collected",
    "Created",
    "Group",
    "Hit",
    "HookRun",
    "Manifest",
    "Member",
    "Problem",
    "Repository",
    "Restored",
    "Session",
    "Snapshot",
    "SnapshotReader",
    "Usage",
    "Verified",
]
