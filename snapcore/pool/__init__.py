"""The hot tier: live disks that take snapshots, clones and rollbacks in constant time."""

from __future__ import annotations

from snapcore.pool.catalog import Region
from snapcore.pool.check import Checked, check
from snapcore.pool.compact import Compacted
from snapcore.pool.disk import Allocation, Disk, Snapshot
from snapcore.pool.hydration import Hydration
from snapcore.pool.pool import NewDisk, Pool
from snapcore.pool.regions import RegionEvent, Regions
from snapcore.pool.transfer import Exported
from snapcore.pool.usage import PoolUsage, VersionUsage

__all__ = [
    "Allocation",
    "Checked",
    "Compacted",
    "Disk",
    "Exported",
    "Hydration",
    "NewDisk",
    "Pool",
    "PoolUsage",
    "Region",
    "RegionEvent",
    "Regions",
    "Snapshot",
    "VersionUsage",
    "check",
]
