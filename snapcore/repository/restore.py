"""Writes a snapshot to a target: whole into a new one, only what differs into an existing one.

A new target is all holes, so only data is written. In an existing one each chunk is hashed where it lies and
fetched only when its id differs; of a fetched chunk the pages that differ are written, and zero pages become holes.
Either way a restore that was interrupted can be started again: what is right already stays.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np

from snapcore import extents, scan
from snapcore.errors import DamagedError
from snapcore.extents import Extents
from snapcore.parallel import SPAN_BYTES, executor_or_own, in_order
from snapcore.progress import Meter, ProgressCallback
from snapcore.repository import tree
from snapcore.repository.domain import ZERO_ID
from snapcore.repository.manifest import Manifest
from snapcore.repository.objects import Objects
from snapcore.repository.table import ids_of
from snapcore.repository.tree import FANOUT
from snapcore.source import Target


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did.

    Attributes
    ----------
    written_bytes : int
        Bytes written to the target, or made holes in it.
    missing : int64 array of shape (n, 2)
        Offset and length of what is damaged in the repository; zeros stand there now.
    duration_s : float
    """

    written_bytes: int
    missing: Extents
    duration_s: float


@dataclass(frozen=True, slots=True)
class _Piece:
    """Chunks from `first` on that shall have these ids, joined; no ids: all zero."""

    first: int
    count: int
    ids: bytes | None


@dataclass(slots=True)
class _Missing:
    """Chunks that could not be read."""

    rows: list[tuple[int, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, first: int, count: int) -> None:
        with self.lock:
            self.rows.append((first, count))


def restore(
    objects: Objects,
    snapshot: Manifest,
    target: Target,
    *,
    allow_damaged: bool,
    within: Extents | None = None,
    progress: ProgressCallback | None = None,
    executor: Executor | None = None,
) -> Restored:
    """Fill a target (of the snapshot's size) with a snapshot; see `Repository.restore`.

    `within`: only there the target may differ from it, on any borders.
    """
    started = time.monotonic()
    missing = _Missing()
    work = _Fill(objects, snapshot, target, missing if allow_damaged else None)
    meter = Meter(progress, "restore", snapshot.size_bytes)
    done = 0
    with executor_or_own(executor, objects.reach.threads) as hands:
        pieces = _pieces(objects, snapshot, target, missing if allow_damaged else None, within)
        for piece in in_order(hands, work, pieces, objects.reach.threads + 2):
            stop = min((piece.first + piece.count) * objects.chunk_bytes, snapshot.size_bytes)
            meter.advance(stop - done)
            done = stop
    meter.advance(snapshot.size_bytes - done)
    rows = extents.from_pairs(missing.rows) * objects.chunk_bytes
    return Restored(target.written_bytes, extents.clipped(rows, 0, snapshot.size_bytes), time.monotonic() - started)


def _pieces(
    objects: Objects, snapshot: Manifest, target: Target, missing: _Missing | None, within: Extents | None
) -> Iterator[_Piece]:
    """Pieces of work in ascending order; ranges that are zero on both sides are left out."""
    filled = target.data_extents()
    if within is None:
        yield from _pieces_of(objects, snapshot, filled, missing, 0, snapshot.chunks)
        return
    for offset, length in extents.aligned(within, objects.chunk_bytes, snapshot.size_bytes).tolist():
        first, stop = offset // objects.chunk_bytes, -(-(offset + length) // objects.chunk_bytes)
        yield from _pieces_of(objects, snapshot, filled, missing, first, stop)


def _pieces_of(
    objects: Objects, snapshot: Manifest, filled: Extents, missing: _Missing | None, begin: int, end: int
) -> Iterator[_Piece]:
    """Those of the chunks from `begin` up to `end`."""
    step = max(1, min(FANOUT, objects.reach.span_bytes // objects.chunk_bytes))
    at = begin

    def lost(first: int, count: int, error: DamagedError) -> None:
        if missing is None:
            raise error
        # A node stands for more than the part that is asked for.
        low, high = max(begin, first), min(end, first + count)
        missing.add(low, high - low)

    for first, leaf in tree.leaves(snapshot.tree, objects.node, begin, end, damaged=lost, expect=objects.expect_nodes):
        yield from _zeros(filled, at, first, objects.chunk_bytes)
        for slot in range(0, FANOUT, step):
            low, high = max(begin, first + slot), min(end, first + slot + step)
            part = leaf[low - first : max(low, high) - first]
            if part.any():
                yield _Piece(low, high - low, part.tobytes())
            else:
                yield from _zeros(filled, low, high, objects.chunk_bytes)
        at = first + FANOUT
    yield from _zeros(filled, at, end, objects.chunk_bytes)


def _zeros(filled: Extents, start: int, stop: int, chunk_bytes: int) -> Iterator[_Piece]:
    """Pieces for what of a zero range holds data in the target."""
    rows = extents.clipped(filled, start * chunk_bytes, stop * chunk_bytes)
    for offset, length in extents.spans(rows, SPAN_BYTES):
        first = offset // chunk_bytes
        yield _Piece(first, -(-(offset + length) // chunk_bytes) - first, None)


class _Fill:
    """The work on one piece; safe on many threads at once."""

    def __init__(self, objects: Objects, snapshot: Manifest, target: Target, missing: _Missing | None) -> None:
        self._objects = objects
        self._snapshot = snapshot
        self._target = target
        self._missing = missing
        self._chunk_bytes = objects.chunk_bytes
        self._local = threading.local()

    def __call__(self, piece: _Piece) -> _Piece:
        size = self._chunk_bytes
        offset = piece.first * size
        length = min(piece.count * size, self._snapshot.size_bytes - offset)
        if length <= 0:
            return piece
        new = self._space("new", piece.count * size)
        if self._target.fresh:
            self._fetch(piece, new, list(range(piece.count)))
            self._target.write_data(new[:length], offset)
            return piece
        old = self._space("old", piece.count * size)
        self._target.read_into(old[:length], offset)
        old[length:] = bytes(len(old) - length)
        new[:] = old
        self._fetch(piece, new, self._differing(piece, old))
        self._target.write_change(old[:length], new[:length], offset)
        return piece

    def _differing(self, piece: _Piece, old: memoryview) -> list[int]:
        """Which chunks of the target are not what they shall be."""
        size = self._chunk_bytes
        zero = scan.zero_mask(old, size)
        slots = []
        for slot in range(piece.count):
            wanted = self._wanted(piece, slot)
            if wanted == ZERO_ID:
                if not zero[slot]:
                    slots.append(slot)
            elif zero[slot] or self._objects.domain.chunk_id(old[slot * size : (slot + 1) * size]) != wanted:
                slots.append(slot)
        return slots

    def _fetch(self, piece: _Piece, new: memoryview, slots: list[int]) -> None:
        """Put the chunks of these slots into `new`; zeros where a chunk is zero or missing."""
        size = self._chunk_bytes
        wanted = []
        for slot in slots:
            if self._wanted(piece, slot) == ZERO_ID:
                new[slot * size : (slot + 1) * size] = bytes(size)
            else:
                wanted.append(slot)
        if not wanted or piece.ids is None:
            return
        ids = np.frombuffer(piece.ids, dtype=np.uint8).reshape(-1, 32)[wanted]
        for number, plain in self._objects.chunks(ids_of(ids.tobytes())):
            slot = wanted[number]
            if isinstance(plain, DamagedError):
                if self._missing is None:
                    raise plain
                self._missing.add(piece.first + slot, 1)
                plain = bytes(size)
            new[slot * size : (slot + 1) * size] = plain

    @staticmethod
    def _wanted(piece: _Piece, slot: int) -> bytes:
        return ZERO_ID if piece.ids is None else piece.ids[slot * 32 : (slot + 1) * 32]

    def _space(self, name: str, size_bytes: int) -> memoryview:
        """Memory of this thread, used again for each piece."""
        space: memoryview | None = getattr(self._local, name, None)
        if space is None or len(space) < size_bytes:
            # Begins on a page: then long writes need no copy on their way past the page cache (persist.py).
            space = memoryview(mmap.mmap(-1, max(size_bytes, SPAN_BYTES)))
            setattr(self._local, name, space)
        return space[:size_bytes]
