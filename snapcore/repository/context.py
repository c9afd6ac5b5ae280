"""What every piece of work on a repository needs: its store, its parameters and its keys."""

from __future__ import annotations

from dataclasses import dataclass

from snapcore.repository import damage
from snapcore.repository.config import Config
from snapcore.repository.domain import Domain
from snapcore.repository.index import Index
from snapcore.repository.objects import Objects
from snapcore.store import Store


@dataclass(frozen=True, slots=True)
class Context:
    """A repository that is open."""

    store: Store
    config: Config
    domain: Domain

    def index(self) -> Index:
        """Where records lie, as the store says now; damaged ones are left out."""
        return Index.load(self.store, damage.places(damage.load(self.store)))

    def objects(self) -> Objects:
        """Reads chunks and nodes by the index as it is now."""
        return Objects(self.store, self.index(), self.domain, self.config.chunk_bytes)
