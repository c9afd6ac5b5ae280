"""Every error that snapcore raises on purpose, in one tree under `Error`.

A message says what happened, to which object, where (file, offset, id) and what to do next. Errors of the
operating system that concern one request keep their `errno` and are raised `from` the original.
"""

from __future__ import annotations

import errno


class Error(Exception):
    """Base of all errors of snapcore."""


class UsageError(Error, ValueError):
    """An argument is not acceptable: a bad name, size, address or combination."""


class NotFoundError(Error, LookupError):
    """A repository, snapshot, disk or stored object does not exist."""


class ExistsError(Error):
    """Something already stands where a new thing would go."""


class BusyError(Error):
    """Another process or a mount holds what is needed; the message names the holder."""


class RefusedError(Error):
    """The request is understood and not allowed; the message says which rule forbids it."""


class LockedError(Error):
    """What is asked for is sealed under a key that was not given, is not the right one, or is disabled.

    `key` is the id of that key, where there is one.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key

    def __reduce__(self) -> tuple[type[LockedError], tuple[str, str | None]]:
        return type(self), (str(self), self.key)


class UnsupportedFormatError(Error):
    """Stored data was written by a newer or different version than this one can read."""


class DamagedError(Error):
    """Stored bytes do not match their checksum or id. Nothing wrong was handed out."""


class ImageError(Error):
    """An image file of some format contradicts itself or was cut off; nothing of what it says there was believed."""


class MissingObjectError(DamagedError):
    """A reachable object is in no pack that the index knows."""


class ReadError(Error):
    """The operating system could not read a byte range of a file or device."""

    def __init__(self, path: str, offset_bytes: int, length_bytes: int, code: int, reason: str) -> None:
        super().__init__(
            f"cannot read {length_bytes} bytes at offset {offset_bytes} of {path}: {reason}; "
            "check the medium, then try again"
        )
        self.path = path
        self.offset_bytes = offset_bytes
        self.length_bytes = length_bytes
        self.errno = code
        self.reason = reason

    def __reduce__(self) -> tuple[type[ReadError], tuple[str, int, int, int, str]]:
        # The message alone, which is what pickle would pass, does not make one anew.
        return type(self), (self.path, self.offset_bytes, self.length_bytes, self.errno, self.reason)


class SourceChangedError(Error):
    """A source was written or resized while it was read, or a list of changes about it is untrue."""


class OutOfSpaceError(Error):
    """The medium is full. What was acknowledged before is intact; free space and try again."""


class StoreError(Error):
    """The store under a repository failed for a reason other than those above."""


class StoreRefusedError(StoreError):
    """The store will not do it, however often it is asked: credentials, permission, or something it cannot do."""


class FencedError(Error):
    """This writer's session was ended by another process before it committed; run the work again."""


class CancelledError(Error):
    """The caller stopped the work; nothing of it is visible."""


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def from_os_error(error: OSError, doing: str) -> Error:
    """The typed error for an OSError of a persistent write or a store call.

    Parameters
    ----------
    error : OSError
        What the operating system said.
    doing : str
        What was tried, to whom, in words that complete "while …".
    """
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return OutOfSpaceError(f"no space left while {doing} ({reason}); free some and try again")
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"{reason} while {doing}")
    return StoreError(f"{reason} while {doing}")
