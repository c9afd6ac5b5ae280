"""The work on one span of a copy: find the chunks that the other side lacks, and make their records there.

`Moving` within a domain, `Resealing` into another one; both are `Reading` with another way to get at chunks, and safe
on many threads at once. Nothing is decoded that need not be, and no plain byte leaves memory. Why so, and what is
trusted: docs/DESIGN.md, "Copies".
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from snapcore import extents
from snapcore.errors import DamagedError
from snapcore.extents import Extents
from snapcore.persist import Buffer
from snapcore.repository import record, tree
from snapcore.repository.copy_memo import Memo
from snapcore.repository.domain import ID_BYTES
from snapcore.repository.hints import NoHints
from snapcore.repository.manifest import Manifest
from snapcore.repository.objects import Objects
from snapcore.repository.reading import Outcome, Piece, Reading, Span
from snapcore.repository.record import Encoded, Form, Mask, Record, RecordKind
from snapcore.repository.table import ids_of
from snapcore.repository.tree import FANOUT, LoadNode, Node, Root


class SnapshotSource:
    """A snapshot as a source: its bytes, checked against their ids.

    Parameters
    ----------
    objects : Objects
        Of the repository and domain that it is in.
    snapshot : Manifest
    name : str
    """

    def __init__(self, objects: Objects, snapshot: Manifest, name: str) -> None:
        self.name = name
        self._objects = objects
        self._snapshot = snapshot

    @property
    def size_bytes(self) -> int:
        """Length of the disk."""
        return self._snapshot.size_bytes

    def data_extents(self) -> Extents:
        """Whole leaves: what of them is zero costs nothing."""
        size, end = self._objects.chunk_bytes, self._snapshot.chunks
        firsts = [first for first, _ in tree.leaves(self._snapshot.tree, self._objects.node, stop=end)]
        return extents.from_blocks(np.array(firsts, dtype=np.int64) // FANOUT, size * FANOUT, self.size_bytes)

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        """Fill `target` from the disk; DamagedError where it cannot be read."""
        size = self._objects.chunk_bytes
        first, last = offset_bytes // size, (offset_bytes + len(target) - 1) // size
        ids = ids_between(self._snapshot.tree, self._objects.node, first, last - first + 1)
        target[:] = bytes(len(target))
        slots = tree.used_slots(ids)
        for number, plain in self._objects.chunks(ids_of(ids[slots].tobytes())):
            if isinstance(plain, DamagedError):
                raise plain
            start = (first + int(slots[number])) * size - offset_bytes
            low, high = max(start, 0), min(start + size, len(target))
            target[low:high] = memoryview(plain)[low - start : high - start]

    def check_unchanged(self) -> None:
        """Snapshots do not change."""


def ids_between(root: Root, load: LoadNode, first: int, count: int) -> Node:
    """Ids of the chunks from `first` on: uint8 array of shape (count, 32)."""
    ids = np.zeros((count, ID_BYTES), dtype=np.uint8)
    for start in range(first // FANOUT * FANOUT, first + count, FANOUT):
        leaf = tree.leaf(root, load, start)
        if leaf is not None:
            low, high = max(first, start), min(first + count, start + FANOUT)
            ids[low - first : high - first] = leaf[low - start : high - start]
    return ids


@dataclass(frozen=True, slots=True)
class _Work:
    """What one span is about."""

    span: Span
    first: int
    old: Node
    wanted: Node
    suspect: Mask


class _Reading(Reading, ABC):
    """What both ways have in common: ids of the source, and a result."""

    def __init__(
        self,
        source: MovedSource,
        objects: Objects,
        parent: Root,
        suspect: Extents,
        compression: str,
    ) -> None:
        super().__init__(source, objects, parent, NoHints(), trusted=False, suspect=suspect, compression=compression)
        self._from = source.objects
        self._root = source.snapshot.tree

    def _read(self, spans: Piece) -> Outcome:
        # Of a list of changes one at a time: a memo goes by where a span begins.
        (span,) = spans
        size = self._chunk_bytes
        first, count = span.offset_bytes // size, -(-span.length_bytes // size)
        wanted = ids_between(self._root, self._from.node, first, count)
        places = np.arange(first, first + count)
        work = _Work(span, first, self.parent_ids(places), wanted, self._suspect_mask(places))
        ids, records = self._moved(work)
        changed = int((ids != work.old).any(axis=1).sum())
        more = int(ids.any(axis=1).sum()) - int(work.old.any(axis=1).sum())
        return Outcome(spans, ids, None, changed, more, records)

    @abstractmethod
    def _moved(self, work: _Work) -> tuple[Node, list[Record]]:
        """Ids of the chunks over there, and the records that are missing there."""

    def _lacking(self, ids: Node, slots: list[int]) -> list[int]:
        """Those of the slots whose chunks are not over there."""
        places = self._objects.index.find_many(ids_of(ids[slots].tobytes()))
        return [slot for slot, place in zip(slots, places, strict=True) if place is None]


class Moving(_Reading):
    """Within a domain: records move as they are stored."""

    def _moved(self, work: _Work) -> tuple[Node, list[Record]]:
        ids = work.wanted
        changed = ((ids != work.old).any(axis=1) | work.suspect) & ids.any(axis=1)
        slots = self._lacking(ids, np.flatnonzero(changed).tolist())
        if not slots:
            return ids, []
        full: list[Record] = []
        patches: list[tuple[int, Record]] = []
        for number, found in self._from.stored(RecordKind.CHUNK, ids_of(ids[slots].tobytes())):
            if isinstance(found, DamagedError):
                raise found
            if found.form == Form.FULL:
                full.append(found)
            else:
                patches.append((slots[number], found))
        return ids, full + self._patches(work, patches)

    def _patches(self, work: _Work, patches: list[tuple[int, Record]]) -> list[Record]:
        """Patches whose base is full over there as they are; the others anew."""
        bases = self._objects.index.find_many_full(ids_of(b"".join(item.base or b"" for _, item in patches)))
        moved, plains = [], {}
        for (slot, item), base in zip(patches, bases, strict=True):
            if base is None:
                plains[slot] = memoryview(self._from.chunk(item.id))
            else:
                moved.append(item)
        if plains:
            moved += self._records(plains, work.wanted, work.old, list(plains))
        return moved


class Resealing(_Reading):
    """Into another domain: opened and sealed, ids computed anew.

    Parameters
    ----------
    base : Root or None
        Tree of the snapshot that the parent is a copy of.
    memo : Memo
        Ids that an earlier attempt has found.
    """

    def __init__(
        self,
        source: MovedSource,
        objects: Objects,
        parent: Root,
        suspect: Extents,
        compression: str,
        base: Root | None,
        memo: Memo,
    ) -> None:
        super().__init__(source, objects, parent, suspect, compression)
        self._base = base
        self._memo = memo

    def _moved(self, work: _Work) -> tuple[Node, list[Record]]:
        wanted = work.wanted
        ids = work.old.copy()
        todo = np.ones(len(wanted), dtype=np.bool)
        if self._base is not None:
            base_ids = ids_between(self._base, self._from.node, work.first, len(wanted))
            todo = (wanted != base_ids).any(axis=1) | work.suspect
        ids[todo] = 0
        slots = np.flatnonzero(todo & wanted.any(axis=1)).tolist()
        if not slots:
            return ids, []
        known = self._memo.find(work.first, wanted[slots])
        if known is not None and not self._lacking(known, list(range(len(slots)))):
            ids[slots] = known
            return ids, []
        return ids, self._resealed(work, ids, slots)

    def _resealed(self, work: _Work, ids: Node, slots: list[int]) -> list[Record]:
        """Fills in the ids of the slots."""
        near = self._bases_there(work, slots)
        chunk_id = self._objects.domain.chunk_id
        found_ids: dict[int, bytes] = {}
        encoded: dict[int, Encoded] = {}
        patches: dict[int, memoryview] = {}
        for number, found in self._from.opened(RecordKind.CHUNK, ids_of(work.wanted[slots].tobytes()), near):
            if isinstance(found, DamagedError):
                raise found
            slot, found_id = slots[number], chunk_id(found.plain)
            found_ids[slot] = found_id
            # The plain bytes are let go of at once: memory that is used again is quicker than new one.
            if found.encoded is None:
                patches[slot] = memoryview(found.plain)
            else:
                encoded[slot] = Encoded(found_id, *found.encoded, len(found.plain), None)
        joined = b"".join(found_ids[slot] for slot in slots)
        ids[slots] = np.frombuffer(joined, dtype=np.uint8).reshape(-1, ID_BYTES)
        self._memo.note(work.first, work.wanted[slots], ids[slots])
        changed = (ids != work.old).any(axis=1) | work.suspect
        lacking = self._lacking(ids, [slot for slot in slots if changed[slot]])
        parts = [encoded[slot] for slot in lacking if slot in encoded]
        records = record.make_encoded(RecordKind.CHUNK, parts, self._objects.domain)
        plains = {slot: patches[slot] for slot in lacking if slot in patches}
        if plains:
            records += self._records(plains, ids, work.old, list(plains))
        return records

    def _bases_there(self, work: _Work, slots: list[int]) -> dict[bytes, Buffer]:
        """What patches of the source rest on is over there as a rule: then it need not come from the source again."""
        there = set(tree.used_slots(work.old).tolist())
        if not there:
            return {}
        places = self._from.index.find_many(ids_of(work.wanted[slots].tobytes()))
        resting = {
            slot: place.base
            for slot, place in zip(slots, places, strict=True)
            if place is not None and place.base is not None and slot in there
        }
        if not resting:
            return {}
        near = {}
        for base_id, found in zip(
            resting.values(),
            self._objects.bases(RecordKind.CHUNK, ids_of(work.old[list(resting)].tobytes())),
            strict=True,
        ):
            if found is not None and self._from.domain.chunk_id(found.plain) == base_id:
                near[base_id] = found.plain
        return near


class MovedSource(SnapshotSource):
    """A snapshot as a source whose chunks are records; `Reading` of them is made by `make`."""

    def __init__(
        self,
        objects: Objects,
        snapshot: Manifest,
        name: str,
        make: Callable[[MovedSource, Objects, Root, Extents, str], Reading],
    ) -> None:
        super().__init__(objects, snapshot, name)
        self.objects = objects
        self.snapshot = snapshot
        self._make = make

    def reading(self, objects: Objects, parent: Root, *, suspect: Extents, compression: str) -> Reading:
        """The work on one span."""
        return self._make(self, objects, parent, suspect, compression)


class NearObjects(Objects):
    """Objects of a repository, of which those that another one of the same domain has are read there.

    What is read is checked against its id, so it does not matter where.
    """

    def __init__(self, objects: Objects, near: Objects) -> None:
        super().__init__(
            objects.store, objects.index, objects.domain, objects.chunk_bytes, objects.renew, objects.reach
        )
        self._near = near

    def node(self, object_id: bytes) -> Buffer:
        """Bytes of a tree node."""
        if self._near.index.find(object_id) is not None:
            with contextlib.suppress(DamagedError):
                return self._near.node(object_id)
        return super().node(object_id)

    def _base(self, kind: RecordKind, base_id: bytes) -> Buffer:
        if self._near.index.find_full(base_id) is not None:
            with contextlib.suppress(DamagedError):
                return self._near._base(kind, base_id)
        return super()._base(kind, base_id)


def differing_leaves(load: LoadNode, a: Root, b: Root, chunk_bytes: int, size_bytes: int) -> Extents:
    """Where two trees differ, by whole leaves, within `size_bytes`."""
    end = -(-size_bytes // chunk_bytes)
    firsts = [first for first, _ in tree.differing(load, a, b, stop=end)]
    return extents.from_blocks(np.array(firsts, dtype=np.int64) // FANOUT, chunk_bytes * FANOUT, size_bytes)


def differing_chunks(load: LoadNode, a: Root, b: Root, chunk_bytes: int, size_bytes: int) -> Extents:
    """Where two trees differ, by chunks, within `size_bytes`."""
    parts = [np.empty(0, dtype=np.int64)]
    for first, (leaf_a, leaf_b) in tree.differing(load, a, b, stop=-(-size_bytes // chunk_bytes)):
        parts.append(first + np.flatnonzero((leaf_a != leaf_b).any(axis=1)))
    return extents.from_blocks(np.concatenate(parts), chunk_bytes, size_bytes)
