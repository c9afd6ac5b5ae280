"""The work on spans of a source: read them, find the chunks that differ from the parent's, make their records.

Spans that are scattered travel together (`Piece`): what each costs by itself is a read, all else is done for all their
chunks at once.

Relies on the hints only where they are `trusted`: then a chunk whose fingerprint is the recorded one counts as
unchanged; every other chunk is told by its content id. What is `suspect` (the parent's chunk there is damaged) is
always hashed, and stored again when it is missing.

A patch needs to know which units differ from what it rests on. A map (`MappedSource`) knows what was written since the
parent, and the parent's own patch what it differs in: then nothing below is read, but of one chunk a piece, as a test.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from snapcore import digest, extents, scan
from snapcore.errors import DamagedError, SourceChangedError
from snapcore.extents import Extents
from snapcore.parallel import SPAN_BYTES
from snapcore.repository import record, storer, tree
from snapcore.repository.domain import ID_BYTES
from snapcore.repository.hints import Fingerprints, Hints
from snapcore.repository.objects import Objects
from snapcore.repository.record import Content, Mask, Record, RecordKind
from snapcore.repository.table import ids_of
from snapcore.repository.tree import FANOUT, Node, Places, Root
from snapcore.source import Source
from snapcore.source.interface import BlockSource, MappedSource


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of work: bytes to read, or (`hole`) bytes that are zero."""

    offset_bytes: int
    length_bytes: int
    hole: bool


# Spans in ascending order; of data no more than SPAN_BYTES together.
Piece = tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a hole, or of spans of data: the new ids of all their chunks, or None where nothing changed."""

    spans: Piece
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


def places_of(spans: Piece, chunk_bytes: int) -> Places:
    """Numbers of the chunks of spans, in order."""
    ranges = [
        np.arange(span.offset_bytes // chunk_bytes, -(-(span.offset_bytes + span.length_bytes) // chunk_bytes))
        for span in spans
    ]
    return np.concatenate(ranges)


def _units_of(written: Extents, places: Places, chunk_bytes: int) -> Mask:
    """Which units of chunks at ascending places lie in extents, if only in part: array of shape (n, units)."""
    units = chunk_bytes // record.CHUNK_UNIT_BYTES
    start, stop = int(places[0]) * chunk_bytes, (int(places[-1]) + 1) * chunk_bytes
    low, high = np.searchsorted(written[:, 0] + written[:, 1], start, "right"), np.searchsorted(written[:, 0], stop)
    rows = extents.clipped(written[low:high], start, stop)
    firsts = rows[:, 0] // record.CHUNK_UNIT_BYTES
    counts = -(-(rows[:, 0] + rows[:, 1]) // record.CHUNK_UNIT_BYTES) - firsts
    numbers = np.repeat(firsts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    slots = np.minimum(np.searchsorted(places, numbers // units), len(places) - 1)
    inside = places[slots] == numbers // units
    mask = np.zeros((len(places), units), dtype=np.bool)
    mask[slots[inside], numbers[inside] % units] = True
    return mask


class Reading:
    """The work on one piece; safe on many threads at once."""

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
        written: Extents | None = None,
    ) -> None:
        self._source = source
        self._blocks = source if isinstance(source, BlockSource) else None
        self._objects = objects
        self._parent = parent
        self._hints = hints
        self._trusted = trusted
        self._suspect = suspect
        self._written = None
        if isinstance(source, MappedSource) and source.map_bytes <= record.CHUNK_UNIT_BYTES:
            self._written = written
        self._compression = compression
        self._chunk_bytes = objects.chunk_bytes
        self._local = threading.local()

    def __call__(self, piece: Piece) -> list[Outcome]:
        return [
            outcome
            for hole, spans in itertools.groupby(piece, lambda span: span.hole)
            for outcome in (map(self._clear, spans) if hole else [self._read(tuple(spans))])
        ]

    def _clear(self, span: Span) -> Outcome:
        first = span.offset_bytes // self._chunk_bytes
        stop = -(-(span.offset_bytes + span.length_bytes) // self._chunk_bytes)
        if stop - first <= FANOUT:
            gone = len(tree.used_slots(self.parent_ids(np.arange(first, stop))))
        else:
            gone = 0
            for start, leaf in self._leaves(first, stop):
                used = tree.used_slots(leaf) + start
                gone += int(((used >= first) & (used < stop)).sum())
        return Outcome((span,), None, None, gone, -gone, [])

    def _leaves(self, first: int, stop: int) -> Iterator[tuple[int, Node]]:
        # What of the parent cannot be read counts as not there: it is in `suspect` and read from the source.
        return tree.leaves(self._parent, self._objects.node, first, stop, damaged=lambda *_: None)

    def parent_ids(self, places: Places) -> Node:
        """Ids of the parent's chunks at ascending places: uint8 array of shape (n, 32)."""
        ids = np.zeros((len(places), ID_BYTES), dtype=np.uint8)
        for low, high in tree.by_leaf(places):
            try:
                leaf = tree.leaf(self._parent, self._objects.node, int(places[low]))
            except DamagedError:
                if not self._suspect_mask(places[low:high]).all():
                    raise
                # What is found in the source there counts as new.
                continue
            if leaf is not None:
                ids[low:high] = leaf[places[low:high] % FANOUT]
        return ids

    def chunks(self, offset_bytes: int, length_bytes: int) -> memoryview:
        """Bytes of the source from a chunk's border on, zeros to the next border behind; valid until the next call."""
        return self._load((Span(offset_bytes, length_bytes, False),))[0]

    def _load(self, spans: Piece) -> tuple[memoryview, Fingerprints, Mask]:
        """The chunks of spans as bytes, valid until the next call, their fingerprints, and which are zero."""
        size = self._chunk_bytes
        lengths = [-(-span.length_bytes // size) * size for span in spans]
        view = self._space(sum(lengths))
        ends = list(itertools.accumulate(lengths))
        parts = [view[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        if self._blocks is not None:
            found = [
                self._blocks.read_blocks(part, span.offset_bytes, span.length_bytes, size, self._hints.seed)
                for part, span in zip(parts, spans, strict=True)
            ]
            prints, zero = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        else:
            for part, span in zip(parts, spans, strict=True):
                self._source.read_into(part[: span.length_bytes], span.offset_bytes)
                part[span.length_bytes :] = bytes(len(part) - span.length_bytes)
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

    def _read(self, spans: Piece) -> Outcome:
        data, prints, zero = self._load(spans)
        size = self._chunk_bytes
        places = places_of(spans, size)
        suspect = self._suspect_mask(places)
        same = self._unchanged(places, prints, zero) & ~suspect
        if same.all():
            return Outcome(spans, None, prints, 0, 0, [])
        old = self.parent_ids(places)
        ids = old.copy()
        ids[zero] = 0
        open_slots = np.flatnonzero(~same & ~zero).tolist()
        plains = {slot: data[slot * size : (slot + 1) * size] for slot in open_slots}
        chunk_ids = b"".join(map(self._objects.domain.chunk_id, plains.values()))
        ids[open_slots] = np.frombuffer(chunk_ids, dtype=np.uint8).reshape(-1, ID_BYTES)
        changed = (ids != old).any(axis=1)
        new = [slot for slot in open_slots if changed[slot] or suspect[slot]]
        masks = None if self._written is None else _units_of(self._written, places, size)
        records = self._records(plains, ids, old, new, masks)
        more = int(ids.any(axis=1).sum()) - int(old.any(axis=1).sum())
        return Outcome(spans, ids, prints, int(changed.sum()), more, records)

    def _unchanged(self, places: Places, prints: Fingerprints, zero: Mask) -> Mask:
        """Which chunks are known to be what they were in the parent without a look at their content ids."""
        if not self._trusted:
            return np.zeros(len(prints), dtype=np.bool)
        known = self._hints.read(places)
        same: Mask = (prints == known) & (prints != 0)
        quiet = zero & (known == 0)
        # Without a fingerprint: zero in the parent too, or not known.
        if (same | quiet).all() and quiet.any():
            same |= quiet & ~self.parent_ids(places).any(axis=1)
        return same

    def _records(
        self,
        plains: dict[int, memoryview],
        ids: Node,
        old: Node,
        slots: list[int],
        masks: Mask | None = None,
    ) -> list[Record]:
        """Records of chunks that are nowhere yet, as patches of what stood there where that is shorter.

        With `masks`, of shape (n, units), it is known what of each was written.
        """
        places = self._objects.index.find_many(ids_of(ids[slots].tobytes()))
        slots = [slot for slot, place in zip(slots, places, strict=True) if place is None]
        were_there = set(tree.used_slots(old).tolist())
        patchable = [slot for slot in slots if slot in were_there]
        if masks is None:
            found = self._objects.bases(RecordKind.CHUNK, ids_of(old[patchable].tobytes()))
            bases = dict(zip(patchable, found, strict=True))
            contents = [
                storer.content(RecordKind.CHUNK, ids[slot].tobytes(), plains[slot], bases.get(slot)) for slot in slots
            ]
        else:
            patches = self._known_patches(plains, old, patchable, masks)
            contents = [Content(ids[slot].tobytes(), *patches.get(slot, (plains[slot], None))) for slot in slots]
        return record.make_many(RecordKind.CHUNK, contents, self._compression, self._objects.domain)

    def _known_patches(
        self, plains: dict[int, memoryview], old: Node, slots: list[int], masks: Mask
    ) -> dict[int, tuple[bytes, bytes]]:
        """Patches, and what they rest on, where a patch is shorter."""
        unit_bytes = record.CHUNK_UNIT_BYTES
        # Of chunks that were written anew for the most part nobody asks what was there.
        slots = [slot for slot in slots if int(masks[slot].sum()) * 2 <= masks.shape[1]]
        patches = {}
        for slot, below in zip(
            slots, self._objects.resting(RecordKind.CHUNK, ids_of(old[slots].tobytes())), strict=True
        ):
            if below is None:
                continue
            patch = record.make_masked_patch(plains[slot], below.base_id, masks[slot] | below.mask, unit_bytes)
            if patch is not None:
                patches[slot] = patch, below.base_id
        if slots:
            self._check_mask(plains, old, random.choice(slots), masks)
        return patches

    def _check_mask(self, plains: dict[int, memoryview], old: Node, slot: int, masks: Mask) -> None:
        """Compare one chunk with its parent all the same; a lie is an error."""
        try:
            before = self._objects.chunk(old[slot].tobytes())
        except DamagedError:
            return
        if (record.differing_units(plains[slot], before, record.CHUNK_UNIT_BYTES) & ~masks[slot]).any():
            raise SourceChangedError(
                f"the list of changes leaves out bytes of {self._source.name} that differ from the parent; take the "
                "snapshot without a list"
            )

    def _suspect_mask(self, places: Places) -> Mask:
        mask = np.zeros(len(places), dtype=np.bool)
        size = self._chunk_bytes
        start, stop = int(places[0]) * size, (int(places[-1]) + 1) * size
        for offset, length in extents.clipped(self._suspect, start, stop).tolist():
            mask |= (places >= offset // size) & (places < -(-(offset + length) // size))
        return mask
