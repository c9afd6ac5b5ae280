"""What a pool asks of the regions that its lazy disks are filled from; `snapcore.service.Regions` answers it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from snapcore.pool.catalog import Region
from snapcore.source.interface import Source


class RegionEvent(NamedTuple):
    """Something that became of a region under a lazy disk.

    Attributes
    ----------
    kind : str
        "failed": a request failed, and got an I/O error. "back": one succeeded again.
    region : Region
    reason : str
        Why it failed.
    """

    kind: str
    region: Region
    reason: str


class Regions(Protocol):
    """Repositories by where they are. All methods are called from many threads, and may take their time."""

    def open(self, region: Region) -> Source:
        """The snapshot that a region names. It may have a `trace_path`: a file where what is read first is kept."""

    def pin(self, region: Region, pool_id: str, who: str) -> None:
        """The snapshot must not be deleted; doing it again is no error. `who` is for people."""

    def unpin(self, region: Region, pool_id: str) -> None:
        """It may be deleted; no error when it was, or was never pinned."""

    def tell(self, event: RegionEvent) -> None:
        """Something happened; nobody waits for what is made of it."""
