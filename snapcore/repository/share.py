"""Which packs a partial verification reads: a fixed share of them, or a sample.

A share is told by the pack's id alone, so that nothing has to be remembered: `Part(3, 30)` on the third night of thirty
reads what no other night does, whichever host does it, and a pack that is new meanwhile is read on its own night. A
sample is another one each time. Which of the two: a month of parts has read everything that was there all month, a
sample finds wide damage sooner.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Protocol

import blake3

from snapcore.errors import UsageError


class Share(Protocol):
    """Some of the packs."""

    def holds(self, pack_id: bytes) -> bool:
        """Whether a pack is among them."""


@dataclass(frozen=True, slots=True)
class Whole:
    """All packs."""

    def holds(self, pack_id: bytes) -> bool:
        """Any is."""
        del pack_id
        return True


@dataclass(frozen=True, slots=True)
class Part:
    """The `number`-th of `of` parts, from 1 on."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise UsageError(f"a part is one of 1/{max(self.of, 1)} to {max(self.of, 1)}/{max(self.of, 1)}")

    def holds(self, pack_id: bytes) -> bool:
        """Whether its id gives the part's number."""
        return int.from_bytes(pack_id[:8], "little") % self.of == self.number - 1


@dataclass(frozen=True, slots=True)
class Sample:
    """Each pack with the same probability, drawn anew for each sample."""

    fraction: float
    salt: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise UsageError(f"a sample is a fraction above 0 and up to 1, not {self.fraction}")

    def holds(self, pack_id: bytes) -> bool:
        """Whether it was drawn."""
        drawn = int.from_bytes(blake3.blake3(self.salt + pack_id).digest(8), "little")
        return drawn < self.fraction * 2.0**64
