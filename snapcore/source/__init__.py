"""Where disks come from and go to: raw image files and block devices."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from snapcore.source.interface import Source
    from snapcore.source.raw import RawSource, open_source
    from snapcore.source.target import RawTarget, open_target

__all__ = ["RawSource", "RawTarget", "Source", "open_source", "open_target"]

_HOMES = {
    "RawSource": "snapcore.source.raw",
    "RawTarget": "snapcore.source.target",
    "Source": "snapcore.source.interface",
    "open_source": "snapcore.source.raw",
    "open_target": "snapcore.source.target",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'snapcore.source' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found
