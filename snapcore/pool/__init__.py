"""The hot tier: live disks that take snapshots, clones and rollbacks in constant time."""

from __future__ import annotations

from snapcore.pool.disk import Allocation, Disk, Snapshot
from snapcore.pool.pool import Pool
from snapcore.pool.usage import PoolUsage, VersionUsage

__all__ = ["Allocation", "Disk", "Pool", "PoolUsage", "Snapshot", "VersionUsage"]
