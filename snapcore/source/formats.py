"""The names of image formats, and which one a file's name says."""

from __future__ import annotations

import os

from snapcore.errors import UsageError

RAW = "raw"
READ_FORMATS = (RAW, "qcow2", "vhd", "vhdx", "vmdk")
WRITTEN_FORMATS = (RAW, "qcow2", "vhd", "vmdk")
# Of clusters of qcow2.
COMPRESSIONS = ("zlib", "zstd")

_ENDINGS = {".qcow2": "qcow2", ".vhd": "vhd", ".vpc": "vhd", ".vhdx": "vhdx", ".vmdk": "vmdk"}


def check_read(name: str) -> str:
    """The name of a format that is read, when it is one."""
    if name not in READ_FORMATS:
        raise UsageError(f"there is no image format {name!r}; choose one of {', '.join(READ_FORMATS)}")
    return name


def check_written(name: str) -> str:
    """The name of a format that is written, when it is one."""
    if name not in WRITTEN_FORMATS:
        raise UsageError(f"the image format {name!r} is not written; choose one of {', '.join(WRITTEN_FORMATS)}")
    return name


def of_name(path: str | os.PathLike[str]) -> str:
    """The format that a file's name says: "raw" when it says none."""
    return _ENDINGS.get(os.path.splitext(os.fspath(path))[1].lower(), RAW)
