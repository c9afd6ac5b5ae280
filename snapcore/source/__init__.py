"""Where disks come from and go to: raw images, block devices, and images of other formats."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from snapcore.source.export import Written, send_image, write_image
    from snapcore.source.image import open_as_named, open_image
    from snapcore.source.interface import Source, Target
    from snapcore.source.raw import RawSource, open_source
    from snapcore.source.target import RawTarget, open_target

__all__ = [
    "RawSource",
    "RawTarget",
    "Source",
    "Target",
    "Written",
    "open_as_named",
    "open_image",
    "open_source",
    "open_target",
    "send_image",
    "write_image",
]

_HOMES = {
    "RawSource": "snapcore.source.raw",
    "RawTarget": "snapcore.source.target",
    "Source": "snapcore.source.interface",
    "Target": "snapcore.source.interface",
    "Written": "snapcore.source.export",
    "open_as_named": "snapcore.source.image",
    "open_image": "snapcore.source.image",
    "open_source": "snapcore.source.raw",
    "open_target": "snapcore.source.target",
    "send_image": "snapcore.source.export",
    "write_image": "snapcore.source.export",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'snapcore.source' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found
