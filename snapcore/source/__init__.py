"""Where disks come from and go to: raw image files and block devices."""

from snapcore.source.interface import Source
from snapcore.source.raw import RawSource, open_source
from snapcore.source.target import RawTarget, open_target

__all__ = ["RawSource", "RawTarget", "Source", "open_source", "open_target"]
