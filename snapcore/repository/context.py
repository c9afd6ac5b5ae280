"""What every piece of work on a repository needs: its store, its parameters and the keys of one domain.

Work is on one domain: packs, index objects and manifests of others are not seen.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from snapcore.repository import damage, pack
from snapcore.repository.config import Config
from snapcore.repository.domain import Domain, Domains
from snapcore.repository.index import Index
from snapcore.repository.objects import FAR, NEAR, Objects, Reach
from snapcore.store import Store


@dataclass(frozen=True, slots=True)
class Context:
    """A repository that is open."""

    store: Store
    config: Config
    domain: Domain

    @property
    def domains(self) -> Domains:
        """The domain by its id."""
        return {self.domain.id: self.domain}

    def index(self) -> Index:
        """Where records lie, as the store says now; damaged ones are left out."""
        return Index.load(self.store, damage.places(damage.load(self.store)), domain=self.domain)

    def exact_index(self) -> Index:
        """The same, after all packs were listed: what lies in packs that are gone is left out too."""
        marked = damage.places(damage.load(self.store))
        return Index.load(
            self.store, marked, domain=self.domain, there=lambda: pack.sizes(self.store, self.domain).keys()
        )

    def objects(self, hands: Executor | None = None) -> Objects:
        """Reads chunks and nodes, also while a collection moves them."""
        return Objects(
            self.store,
            self.index(),
            self.domain,
            self.config.chunk_bytes,
            renew=self.exact_index,
            reach=self.reach,
            hands=hands,
        )

    @property
    def reach(self) -> Reach:
        """How far a read of the store goes."""
        return FAR if self.store.folder is None else NEAR
