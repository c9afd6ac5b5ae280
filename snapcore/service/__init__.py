"""What makes one service of both tiers: archives of a pool's snapshots, groups, images, and blocks for other tools."""

from snapcore.service.archives import Archive, Archived, Archives
from snapcore.service.base import Twins
from snapcore.service.blocks import Block, Page, list_blocks, list_changed_blocks, read_block
from snapcore.service.hooks import Hooks
from snapcore.service.image import Machine
from snapcore.service.lazy import Regions
from snapcore.service.restore import RestoredDisk, into_disk, into_new_disk
from snapcore.service.staging import Session, Staging
from snapcore.service.tiers import Local, Remote

__all__ = [
    "Archive",
    "Archived",
    "Archives",
    "Block",
    "Hooks",
    "Local",
    "Machine",
    "Page",
    "Regions",
    "Remote",
    "RestoredDisk",
    "Session",
    "Staging",
    "Twins",
    "into_disk",
    "into_new_disk",
    "list_blocks",
    "list_changed_blocks",
    "read_block",
]
