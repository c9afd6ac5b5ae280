"""Which records snapshots reach: one mark a record, set by walking trees, shared subtrees once.

What collection, metering and "what would I gain by deleting this" ask for. Memory: two bytes an index entry and the
columns of the entries.

A record is reached in two ways: as itself, and then all below it is reached too, or as the base of a patch, and then
nothing below it is. A node that was met as a base first is still walked when a snapshot reaches it as itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapcore.errors import DamagedError
from snapcore.repository.domain import ZERO_ID
from snapcore.repository.index import Index, Place
from snapcore.repository.manifest import Manifest
from snapcore.repository.objects import Objects, missing
from snapcore.repository.record import RecordKind
from snapcore.repository.table import Ids, ids_of
from snapcore.repository.tree import used_slots


@dataclass(frozen=True, slots=True)
class Usage:
    """Sizes of a set of records.

    Attributes
    ----------
    plain_bytes : int
        Payloads of chunks and patches of chunks, before compression.
    stored_bytes : int
        Everything, tree nodes and headers included, as stored.
    """

    plain_bytes: int
    stored_bytes: int


class Marks:
    """Marks over all records of an index.

    Parameters
    ----------
    objects : Objects
    preferred : Index, optional
        The same entries, fewer of which are there: of several copies of a record, one of those counts.
    """

    def __init__(self, objects: Objects, preferred: Index | None = None) -> None:
        self._objects = objects
        self._index: Index = objects.index
        self._preferred = preferred or self._index
        self.reached: npt.NDArray[np.bool] = np.zeros(self._index.slots, dtype=np.bool)
        self._walked: npt.NDArray[np.bool] = np.zeros(self._index.slots, dtype=np.bool)

    def copy(self) -> Marks:
        """The same marks, to be added to on their own."""
        other = Marks(self._objects, self._preferred)
        other.reached[:] = self.reached
        other._walked[:] = self._walked
        return other

    def add(self, snapshot: Manifest) -> None:
        """Mark everything that a snapshot reaches.

        Raises
        ------
        DamagedError
            A node cannot be read, or something reachable is in no pack: what lies below is unknown.
        """
        level = snapshot.levels
        frontier = {snapshot.tree.id} - {ZERO_ID}
        while frontier and level:
            below: set[bytes] = set()
            for node_id in self._new(RecordKind.NODE, frontier, snapshot):
                node = np.frombuffer(self._objects.node(node_id), dtype=np.uint8).reshape(-1, 32)
                children = node[used_slots(node)]
                if level > 1:
                    below.update(child.tobytes() for child in children)
                else:
                    self._mark_chunks(ids_of(children.tobytes()), snapshot)
            frontier = below
            level -= 1

    def _new(self, kind: RecordKind, ids: Iterable[bytes], snapshot: Manifest) -> list[bytes]:
        """Mark records; returns those below which nothing was marked before, in a fixed order."""
        found = []
        for object_id in sorted(ids):
            place = self._preferred.find(object_id) or self._index.find(object_id)
            if self._mark(kind, object_id, place, snapshot):
                found.append(object_id)
        return found

    def _mark_chunks(self, ids: Ids, snapshot: Manifest) -> None:
        for number, place in enumerate(self._preferred.find_many(ids)):
            object_id = ids[number].tobytes()
            self._mark(RecordKind.CHUNK, object_id, place or self._index.find(object_id), snapshot)

    def _mark(self, kind: RecordKind, object_id: bytes, place: Place | None, snapshot: Manifest) -> bool:
        slot = self._reach(kind, object_id, place, snapshot)
        if self._walked[slot]:
            return False
        self._walked[slot] = True
        if place is not None and place.base is not None:
            base = self._preferred.find_full(place.base) or self._index.find_full(place.base)
            self._reach(kind, place.base, base, snapshot)
        return True

    def _reach(self, kind: RecordKind, object_id: bytes, place: Place | None, snapshot: Manifest) -> int:
        if place is None or place.kind != kind:
            raise DamagedError(f"snapshot {snapshot.id} of {snapshot.disk}: {missing(kind, object_id)}")
        self.reached[place.slot] = True
        return place.slot

    def usage(self, chosen: npt.NDArray[np.bool]) -> Usage:
        """Sizes of the records that are chosen, by slot."""
        plain_bytes = stored_bytes = start = 0
        for contents in self._index.tables():
            rows = contents.entries[chosen[start : start + len(contents.entries)]]
            start += len(contents.entries)
            plain_bytes += int(rows["plain"][rows["kind"] == RecordKind.CHUNK].sum(dtype=np.int64))
            stored_bytes += int(rows["stored"].sum(dtype=np.int64))
        return Usage(plain_bytes, stored_bytes)


def unique(objects: Objects, chosen: list[Manifest], others: list[Manifest]) -> Usage:
    """What a set of snapshots reaches and no other snapshot does: what their deletion frees."""
    rest = Marks(objects)
    for snapshot in others:
        rest.add(snapshot)
    mine = rest.copy()
    for snapshot in chosen:
        mine.add(snapshot)
    return mine.usage(mine.reached & ~rest.reached)
