"""What a holder of keys is: something outside the repository that gives the same wrapping key again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Parameters = dict[str, str | int]
WRAPPING_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Place:
    """What a wrapping key is for: the ids, in hexadecimal, of a domain and of the holder's object in it."""

    domain: str
    holder: str


@runtime_checkable
class Holder(Protocol):
    """Gives wrapping keys of 32 bytes. Safe from many threads.

    A holder keeps its secret out of its `repr`, and of the messages of its errors.
    """

    @property
    def kind(self) -> str:
        """What kind of holder it is, as key objects name it: 1 to 32 of a-z, 0-9, "-"."""

    def make(self, place: Place) -> tuple[Parameters, bytearray]:
        """A wrapping key that was never used, and parameters that lead to it again. The caller wipes the key.

        LockedError when the holder cannot give one.
        """

    def find(self, parameters: Parameters, place: Place) -> bytearray:
        """The wrapping key of these parameters, which may come from anybody; the caller wipes it.

        LockedError when the holder cannot give it; DamagedError for parameters that nobody could have written. A key
        that is the wrong one is no error here: what it shall open will not open.
        """
