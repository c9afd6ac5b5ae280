"""Facts about block devices: their size, and who holds them."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

# mountinfo(5) writes these four signs in octal.
_ESCAPES = {r"\040": " ", r"\011": "\t", r"\012": "\n", r"\134": "\\"}


def size_bytes(descriptor: int) -> int:
    """Length of a file or block device."""
    status = os.fstat(descriptor)
    if stat.S_ISBLK(status.st_mode):
        return os.lseek(descriptor, 0, os.SEEK_END)
    return status.st_size


def holder(descriptor: int, *, writing: bool) -> str | None:
    """Who holds a block device: a mount of it or of one of its partitions, a device stacked on it, or the kernel.

    Parameters
    ----------
    descriptor : int
    writing : bool
        Ask only for who may write: file systems that are mounted read-only do not count.
    """
    number = os.fstat(descriptor).st_rdev
    numbers = _with_partitions(os.major(number), os.minor(number))
    read_only = False
    for folder, writable in _mounts(numbers):
        if writable or not writing:
            return f"the mount at {folder}"
        read_only = True
    for found in sorted(numbers):
        stacked = f"/sys/dev/block/{found}/holders"
        if names := sorted(_listed(stacked)):
            return f"the device {names[0]}"
    if not read_only and _claimed(descriptor):
        return "the system (a mount that is not seen from here, swap, RAID or a mapper)"
    return None


def _mounts(numbers: set[str]) -> Iterator[tuple[str, bool]]:
    """(folder, whether the file system may write) of every mount of these devices."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split(" ")
        _, source, options = fields[fields.index("-", 6) + 1 :][:3]
        # btrfs has a device number of its own, and names the device only as its source.
        if fields[2] in numbers or _number(_unescaped(source)) in numbers:
            # The options of the file system, not those of the mount: a read-only view of it does not stop it.
            yield _unescaped(fields[4]), "ro" not in options.split(",")


def _number(path: str) -> str | None:
    """MAJOR:MINOR of a block device."""
    try:
        status = os.stat(path) if path.startswith("/") else None
    except OSError:
        return None
    if status is None or not stat.S_ISBLK(status.st_mode):
        return None
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def _claimed(descriptor: int) -> bool:
    """Whether the kernel has given the device to somebody for himself alone."""
    try:
        # O_EXCL on a block device asks just that.
        os.close(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _with_partitions(major: int, minor: int) -> set[str]:
    own = f"{major}:{minor}"
    numbers = {own}
    folder = f"/sys/dev/block/{own}"
    for name in _listed(folder):
        if os.path.exists(os.path.join(folder, name, "partition")):
            # It may go at any time.
            with contextlib.suppress(OSError), open(os.path.join(folder, name, "dev"), encoding="ascii") as file:
                numbers.add(file.read().strip())
    return numbers


def _listed(folder: str) -> list[str]:
    """Names in a folder; none where there is no such folder any more."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _unescaped(text: str) -> str:
    for escape, sign in _ESCAPES.items():
        text = text.replace(escape, sign)
    return text
