"""The work on one span of a source: read it, find the chunks that differ from the parent's, make their records.

Relies on the hints only where they are `trusted`: then a chunk whose fingerprint is the recorded one counts as
unchanged; every other chunk is told by its content id. What is `suspect` (the parent's chunk there is damaged) is
always hashed, and stored again when it is missing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from snapcore import digest, extents, scan
from snapcore.errors import DamagedError
from snapcore.extents import Extents
from snapcore.parallel import SPAN_BYTES
from snapcore.repository import record, storer, tree
from snapcore.repository.domain import ID_BYTES
from snapcore.repository.hints import Fingerprints, Hints
from snapcore.repository.objects import Objects
from snapcore.repository.record import Record, RecordKind
from snapcore.repository.table import ids_of
from snapcore.repository.tree import FANOUT, Node, Root
from snapcore.source import Source
from snapcore.source.interface import BlockSource

Mask = npt.NDArray[np.bool]


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of work: bytes to read, or (`hole`) bytes that are zero."""

    offset_bytes: int
    length_bytes: int
    hole: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a span: the new ids of its chunks, or None where nothing changed."""

    span: Span
    ids: Node | None
    fingerprints: Fingerprints | None
    changed_chunks: int
    more_chunks: int
    records: list[Record]


@runtime_checkable
class RecordSource(Source, Protocol):
    """A source whose chunks are records somewhere already: it makes of a span what `Reading` makes of bytes.

    Its list of changes is known to be true, and no fingerprints are kept.
    """

    def reading(self, objects: Objects, parent: Root, *, suspect: Extents, compression: str) -> Reading:
        """The work on one span; safe on many threads at once."""


class Reading:
    """The work on one span; safe on many threads at once."""

    def __init__(
        self,
        source: Source,
        objects: Objects,
        parent: Root,
        hints: Hints,
        *,
        trusted: bool,
        suspect: Extents,
        compression: str,
    ) -> None:
        self._source = source
        self._blocks = source if isinstance(source, BlockSource) else None
        self._objects = objects
        self._parent = parent
        self._hints = hints
        self._trusted = trusted
        self._suspect = suspect
        self._compression = compression
        self._chunk_bytes = objects.chunk_bytes
        self._local = threading.local()

    def __call__(self, span: Span) -> Outcome:
        return self._clear(span) if span.hole else self._read(span)

    def _clear(self, span: Span) -> Outcome:
        first = span.offset_bytes // self._chunk_bytes
        stop = -(-(span.offset_bytes + span.length_bytes) // self._chunk_bytes)
        if stop - first <= FANOUT:
            gone = len(tree.used_slots(self.parent_ids(first, stop - first)))
        else:
            gone = 0
            for start, leaf in self._leaves(first, stop):
                used = tree.used_slots(leaf) + start
                gone += int(((used >= first) & (used < stop)).sum())
        return Outcome(span, None, None, gone, -gone, [])

    def _leaves(self, first: int, stop: int) -> Iterator[tuple[int, Node]]:
        # What of the parent cannot be read counts as not there: it is in `suspect` and read from the source.
        return tree.leaves(self._parent, self._objects.node, first, stop, damaged=lambda *_: None)

    def parent_ids(self, first: int, count: int) -> Node:
        """Ids of the parent's chunks from `first` on: uint8 array of shape (count, 32)."""
        ids = np.zeros((count, ID_BYTES), dtype=np.uint8)
        for start in range(first // FANOUT * FANOUT, first + count, FANOUT):
            try:
                leaf = tree.leaf(self._parent, self._objects.node, start)
            except DamagedError:
                low, high = max(first, start), min(first + count, start + FANOUT)
                if not self._suspect_mask(low, high - low).all():
                    raise
                # What is found in the source there counts as new.
                continue
            if leaf is not None:
                low, high = max(first, start), min(first + count, start + FANOUT)
                ids[low - first : high - first] = leaf[low - start : high - start]
        return ids

    def chunks(self, offset_bytes: int, length_bytes: int) -> memoryview:
        """Bytes of the source from a chunk's border on, zeros to the next border behind; valid until the next call."""
        return self._load(offset_bytes, length_bytes)[0]

    def _load(self, offset_bytes: int, length_bytes: int) -> tuple[memoryview, Fingerprints, Mask]:
        """The chunks of a range as bytes, valid until the next call, their fingerprints, and which are zero."""
        size = self._chunk_bytes
        view = self._space(-(-length_bytes // size) * size)
        if self._blocks is not None:
            prints, zero = self._blocks.read_blocks(view, offset_bytes, length_bytes, size, self._hints.seed)
        else:
            self._source.read_into(view[:length_bytes], offset_bytes)
            view[length_bytes:] = bytes(len(view) - length_bytes)
            prints = digest.xxh64_blocks(view, size, self._hints.seed)
            zero = scan.zero_mask(view, size).view(np.bool)
        prints[zero] = 0
        return view, prints, zero

    def _space(self, length_bytes: int) -> memoryview:
        """Memory of this thread."""
        space: memoryview | None = getattr(self._local, "space", None)
        if space is None or len(space) < length_bytes:
            space = self._local.space = memoryview(bytearray(max(length_bytes, SPAN_BYTES)))
        return space[:length_bytes]

    def _read(self, span: Span) -> Outcome:
        data, prints, zero = self._load(span.offset_bytes, span.length_bytes)
        size = self._chunk_bytes
        first, count = span.offset_bytes // size, len(prints)
        suspect = self._suspect_mask(first, count)
        same = self._unchanged(first, prints, zero) & ~suspect
        if same.all():
            return Outcome(span, None, prints, 0, 0, [])
        old = self.parent_ids(first, count)
        ids = old.copy()
        ids[zero] = 0
        open_slots = np.flatnonzero(~same & ~zero).tolist()
        plains = {slot: data[slot * size : (slot + 1) * size] for slot in open_slots}
        chunk_ids = b"".join(map(self._objects.domain.chunk_id, plains.values()))
        ids[open_slots] = np.frombuffer(chunk_ids, dtype=np.uint8).reshape(-1, ID_BYTES)
        changed = (ids != old).any(axis=1)
        new = [slot for slot in open_slots if changed[slot] or suspect[slot]]
        records = self._records(plains, ids, old, new)
        more = int(ids.any(axis=1).sum()) - int(old.any(axis=1).sum())
        return Outcome(span, ids, prints, int(changed.sum()), more, records)

    def _unchanged(self, first: int, prints: Fingerprints, zero: Mask) -> Mask:
        """Which chunks are known to be what they were in the parent without a look at their content ids."""
        if not self._trusted:
            return np.zeros(len(prints), dtype=np.bool)
        known = self._hints.read(first, len(prints))
        same: Mask = (prints == known) & (prints != 0)
        quiet = zero & (known == 0)
        # Without a fingerprint: zero in the parent too, or not known.
        if (same | quiet).all() and quiet.any():
            same |= quiet & ~self.parent_ids(first, len(prints)).any(axis=1)
        return same

    def _records(self, plains: dict[int, memoryview], ids: Node, old: Node, slots: list[int]) -> list[Record]:
        places = self._objects.index.find_many(ids_of(ids[slots].tobytes()))
        slots = [slot for slot, place in zip(slots, places, strict=True) if place is None]
        were_there = set(tree.used_slots(old).tolist())
        patchable = [slot for slot in slots if slot in were_there]
        found = self._objects.bases(RecordKind.CHUNK, ids_of(old[patchable].tobytes()))
        bases = dict(zip(patchable, found, strict=True))
        contents = [
            storer.content(RecordKind.CHUNK, ids[slot].tobytes(), plains[slot], bases.get(slot)) for slot in slots
        ]
        return record.make_many(RecordKind.CHUNK, contents, self._compression, self._objects.domain)

    def _suspect_mask(self, first: int, count: int) -> Mask:
        mask = np.zeros(count, dtype=np.bool)
        size = self._chunk_bytes
        for start, length in extents.clipped(self._suspect, first * size, (first + count) * size).tolist():
            mask[start // size - first : -(-(start + length) // size) - first] = True
        return mask
