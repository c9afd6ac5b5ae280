"""Facts about block devices: their size, and who holds them."""

from __future__ import annotations

import os
import stat

# mountinfo(5) writes these four signs in octal.
_ESCAPES = {r"\040": " ", r"\011": "\t", r"\012": "\n", r"\134": "\\"}


def size_bytes(descriptor: int) -> int:
    """Length of a file or block device."""
    status = os.fstat(descriptor)
    if stat.S_ISBLK(status.st_mode):
        return os.lseek(descriptor, 0, os.SEEK_END)
    return status.st_size


def holder(descriptor: int, *, writing: bool) -> str | None:
    """Who holds a block device: a mount of it or of one of its partitions, or a device stacked on it.

    Parameters
    ----------
    descriptor : int
    writing : bool
        Ask only for who may write: mounts that are read-only do not count.
    """
    number = os.fstat(descriptor).st_rdev
    numbers = _with_partitions(os.major(number), os.minor(number))
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        lines = []
    for line in lines:
        fields = line.split(" ")
        read_only = "ro" in fields[5].split(",")
        if fields[2] in numbers and not (writing and read_only):
            return f"the mount at {_unescaped(fields[4])}"
    for found in sorted(numbers):
        folder = f"/sys/dev/block/{found}/holders"
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        if names:
            return f"the device {names[0]}"
    return None


def _with_partitions(major: int, minor: int) -> set[str]:
    own = f"{major}:{minor}"
    numbers = {own}
    folder = f"/sys/dev/block/{own}"
    if os.path.isdir(folder):
        for name in os.listdir(folder):
            path = os.path.join(folder, name, "dev")
            if os.path.exists(os.path.join(folder, name, "partition")) and os.path.exists(path):
                with open(path, encoding="ascii") as file:
                    numbers.add(file.read().strip())
    return numbers


def _unescaped(text: str) -> str:
    for escape, sign in _ESCAPES.items():
        text = text.replace(escape, sign)
    return text
