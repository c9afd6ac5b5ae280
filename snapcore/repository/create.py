"""Takes a snapshot: reads what may have changed, stores what is new, makes the next tree, commits a manifest.

The steps and what a crash leaves after each: docs/FORMAT.md, "Write order". The work on spans runs on an executor
(reading.py); one thread takes the results in order, so that packs and trees do not depend on the number of threads.
Memory: a span and its records for each piece in flight, and the packs of `Storer`.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from snapcore import extents, scan
from snapcore.errors import (
    BusyError,
    DamagedError,
    Error,
    ExistsError,
    FencedError,
    NotFoundError,
    ReadError,
    RefusedError,
    SourceChangedError,
)
from snapcore.extents import Extents
from snapcore.parallel import SPAN_BYTES, executor_or_own, in_order
from snapcore.persist import Buffer
from snapcore.progress import Meter, ProgressCallback
from snapcore.repository import damage, generations, index, manifest, pack, session, summaries, tree
from snapcore.repository.context import Context
from snapcore.repository.domain import ZERO_ID
from snapcore.repository.generations import Generation
from snapcore.repository.hints import Hints, NoHints
from snapcore.repository.index import BadPlaces, Index
from snapcore.repository.manifest import CopiedFrom, Manifest
from snapcore.repository.objects import Objects
from snapcore.repository.reading import Outcome, Piece, Reading, RecordSource, Span, places_of
from snapcore.repository.session import Session
from snapcore.repository.storer import PendingReader, Storer
from snapcore.repository.tree import EMPTY, FANOUT, Root, TreeWriter
from snapcore.source import Source
from snapcore.version import VERSION

CHECKED_SHARE = 0.001
_CHECKED_AT_LEAST = 16
# A chain that nobody collects is summarised by its writers, now and then.
_SUMMARISE_EVERY = 64
# Of a writer that is taken for dead, of a parent that is deleted.
_TRIES = 3
_REGISTRATIONS = 10
_PIECE_SPANS = 256


@dataclass(frozen=True, slots=True)
class Created:
    """What `create` did.

    Attributes
    ----------
    snapshot : Manifest
    read_bytes : int
        Read from the source.
    duration_s : float
    """

    snapshot: Manifest
    read_bytes: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Request:
    """What is wanted of `create`; `Repository.snapshot` says what each means."""

    disk: str
    parent: Manifest | None = None
    changed: Extents | None = None
    paranoid: bool = False
    compression: str | None = None
    label: str | None = None
    tags: dict[str, str] | None = None
    reason: str | None = None
    created: str | None = None
    copied: CopiedFrom | None = None
    checked_share: float = CHECKED_SHARE
    origin: str | None = None
    group: str | None = None


def create(
    context: Context,
    source: Source,
    request: Request,
    progress: ProgressCallback | None = None,
    executor: Executor | None = None,
) -> Created:
    """Take a snapshot of a source; see `Repository.snapshot`."""
    started = time.monotonic()
    for left in reversed(range(_TRIES)):
        try:
            again = left < _TRIES - 1
            snapshot, read_bytes = _attempt(context, source, request, progress, executor, take_up=again)
        except FencedError:
            # Somebody took this writer for dead. What it stored is found by its id, where it was not collected.
            if not left:
                raise
        else:
            return Created(snapshot, read_bytes, time.monotonic() - started)
    raise AssertionError("unreachable")


def _attempt(
    context: Context,
    source: Source,
    request: Request,
    progress: ProgressCallback | None,
    executor: Executor | None,
    *,
    take_up: bool,
) -> tuple[Manifest, int]:
    """One session, from its registration to its end. Returns the snapshot and how many bytes were read.

    With `take_up`, packs that no index object names are used in any case: some are the own ones of the last session.
    """
    place = _register(context, request)
    job: _Job | None = None
    try:
        gone = [other for other in session.sessions(context.store) if session.is_gone(other)]
        job = _Job(context, source, request, place, take_up=take_up or bool(gone))
        snapshot = job.run(progress, executor)
    except BaseException as error:
        fenced = isinstance(error, (DamagedError, NotFoundError)) and session.was_ended(context.store, place.own)
        _leave(context, place.own, job)
        if fenced:
            # Anything may be gone that it relied on.
            raise FencedError(f"the session {place.own.id} was ended by somebody else: {error}") from error
        raise
    job.close()
    # The snapshot is there: what is left to tidy now, the next create or collect does.
    with contextlib.suppress(Error):
        session.check(context.store, place.own)
        index.merge_small(context.store, context.domain, place.seen)
    if snapshot.sequence % _SUMMARISE_EVERY == 0:
        summaries.refresh_if_possible(context.store)
    with contextlib.suppress(Error):
        session.end_dead(context.store, gone)
    with contextlib.suppress(Error):
        session.withdraw(context.store, place.own)
    return snapshot, job.read_bytes


def newest(context: Context, disk: str) -> Manifest | None:
    """The last snapshot of a disk's chain."""
    for name in reversed(list(manifest.names(context.store, context.domain, disk))):
        found = manifest.read(context.store, name, context.domains, context.config.chunk_bytes)
        if found is not None:
            return found
    return None


@dataclass(frozen=True, slots=True)
class _Registered:
    """A session, the name under which it will commit, the parent, and the generation that it has seen."""

    own: Session
    object_name: str
    parent: Manifest | None
    seen: Generation


def _register(context: Context, request: Request) -> _Registered:
    """Steps "see", "register" and "look": a session that names the manifest to come, a generation and a parent."""
    store, domain = context.store, context.domain
    parents_gone = 0
    for _ in range(_REGISTRATIONS):
        seen = generations.latest(store, domain)
        last = newest(context, request.disk)
        parent = request.parent or last
        sequence = 1 + (last.sequence if last else 0)
        if sequence > manifest.SEQUENCE_LIMIT:
            raise RefusedError(f"the chain of {request.disk} has no number left; go on under another disk's name")
        name = manifest.name(domain, request.disk, sequence, secrets.token_hex(16))
        own = session.register(store, session.CREATE, name, domain=domain, generation=seen.number)
        try:
            if generations.latest_number(store, domain) == seen.number:
                if parent is None or _is_there(context, parent):
                    return _Registered(own, name, parent, seen)
                parents_gone += 1
        except BaseException:
            _leave(context, own, None)
            raise
        session.withdraw(store, own)
        if parents_gone == _TRIES:
            raise BusyError(f"snapshots of {request.disk} are being deleted; try again when that is done")
    raise BusyError(f"collections of {store.url} follow each other without a pause; try again later")


def _is_there(context: Context, snapshot: Manifest) -> bool:
    name = manifest.name(context.domain, snapshot.disk, snapshot.sequence, snapshot.id)
    return manifest.read_now(context.store, name, context.domains, context.config.chunk_bytes) is not None


def _leave(context: Context, own: Session, job: _Job | None) -> None:
    """End after an error. What was stored stays findable: by an index object, or by the session that is left."""
    try:
        if job is not None:
            job.abandon()
            if job.commit_tried:
                # A commit without an answer may arrive later, when a collection has removed what it relies on.
                session.end(context.store, own)
    except Exception:  # noqa: BLE001 - the first error is on its way to the caller
        session.abandon(own)
        return
    with contextlib.suppress(Error):
        session.withdraw(context.store, own)


class _Job:
    """One snapshot in the making."""

    def __init__(
        self, context: Context, source: Source, request: Request, place: _Registered, *, take_up: bool
    ) -> None:
        self._context = context
        self._source = source
        self._request = request
        self._place = place
        self._parent = place.parent
        self.commit_tried = False
        self._size_bytes = source.size_bytes
        # A source of one's own may name them in any order.
        self._filled = extents.from_pairs(source.data_extents())
        self._chunk_bytes = context.config.chunk_bytes
        self._chunks = -(-self._size_bytes // self._chunk_bytes)
        self.read_bytes = 0
        marked = damage.load(context.store)
        known = self._load(damage.places(marked))
        reader = PendingReader(context.store)
        self._objects = Objects(reader, known, context.domain, self._chunk_bytes, reach=context.reach)
        self._compression = request.compression or context.config.compression
        self._storer = Storer(context.store, known, self._objects, reader, self._compression, place.seen.number)
        if take_up:
            self._take_up(known)
        # What other writers published, dead ones included, may not be durable yet, and this snapshot will rely on it.
        context.store.settle(pack.PREFIX + context.domain.folder)
        context.store.settle(index.PREFIX + context.domain.folder)
        if isinstance(source, RecordSource):
            self._hints: Hints = NoHints()
        else:
            self._hints = Hints(context.config.id, context.domain.disk_tag(request.disk), self._chunk_bytes)
        self._lost_nodes: set[bytes] = set()
        self._suspect = self._damaged_in_parent(known, {bytes.fromhex(bad.id) for bad in marked})
        self._fallback_reason = self._why_more()

    def _load(self, bad: BadPlaces) -> Index:
        """Step "load": what may be relied on."""
        context, seen = self._context, self._place.seen
        there = None
        if seen.number == 0 and index.has_old_names(context.store, context.domain):
            # Earlier versions of this software had no generations; of packs that their collectors removed, a writer
            # that was ended may have written an index object since.
            there = lambda: pack.sizes(context.store, context.domain).keys()  # noqa: E731
        return Index.load(context.store, bad, domain=context.domain, seen=seen, there=there)

    def _take_up(self, known: Index) -> None:
        """Take up packs that no index object names, of writers on this host that died before they wrote one.

        Of a writer that lives both name them in the end, which costs entries and harms nothing: a pack has its name
        when it is whole, and a patch whose base is in none of the packs is not taken for a chunk.
        """
        context = self._context
        for pack_id, size_bytes in index.unindexed_packs(context.store, known.packs(), context.domain):
            if pack_id in self._place.seen.away:
                continue
            with contextlib.suppress(DamagedError, NotFoundError, ReadError):
                contents = pack.read_directory(context.store, pack_id, size_bytes, context.domain)
                known.add_table(contents)
                self._storer.add_table(contents)

    def _damaged_in_parent(self, known: Index, marked: set[bytes]) -> Extents:
        """Where chunks of the parent are damaged, or nodes above them."""
        missing = {bad for bad in marked if known.find(bad) is None and known.find_condemned(bad) is None}
        if self._parent is None or not missing:
            return extents.empty()
        ranges: list[tuple[int, int]] = []

        def load(node_id: bytes) -> Buffer:
            try:
                return self._objects.node(node_id)
            except DamagedError:
                self._lost_nodes.add(node_id)
                raise

        walk = tree.leaves(
            self._parent.tree,
            load,
            damaged=lambda first, count, _: ranges.append((first, count)),
        )
        for first, leaf in walk:
            slots = [slot for slot in tree.used_slots(leaf).tolist() if leaf[slot].tobytes() in missing]
            ranges += [(first + slot, 1) for slot in slots]
        # Cut in chunks first: in bytes, what lies below a high node may be more than a number holds.
        rows = extents.clipped(extents.from_pairs(ranges), 0, self._chunks) * self._chunk_bytes
        return extents.clipped(rows, 0, self._size_bytes)

    def _why_more(self) -> str | None:
        request, parent = self._request, self._parent
        if request.reason is not None or request.copied is not None:
            return request.reason
        if parent is None:
            if request.changed is None:
                return None
            return "the disk has no earlier snapshot here, so the list of changes was not used and all of it was read"
        if request.changed is not None:
            return None
        if request.paranoid:
            return "paranoid: every chunk was compared by its content id"
        if self._hints.snapshot is None:
            return "this host has no fingerprints of the disk: every chunk was compared by its content id"
        if self._hints.snapshot != parent.id:
            return (
                f"the fingerprints on this host are of snapshot {self._hints.snapshot} and not of the parent "
                f"{parent.id}: every chunk was compared by its content id"
            )
        return None

    def run(self, progress: ProgressCallback | None, executor: Executor | None) -> Manifest:
        """Steps "store" and "commit"."""
        object_name = self._place.object_name
        parent, request = self._parent, self._request
        levels = tree.levels_for(self._chunks)
        old = parent.tree if parent else EMPTY
        region = self._changed_region()
        changed = None if region is None else extents.aligned(region, self._chunk_bytes, self._size_bytes)
        trusted = parent is not None and self._hints.snapshot == parent.id and not request.paranoid
        reading = self._reading(old, region, trusted=trusted and request.changed is None)
        base = (
            tree.fitted(old, levels, self._node_or_nothing, self._storer.put_node) if parent else Root(ZERO_ID, levels)
        )
        writer = TreeWriter(base, self._node_or_nothing, self._storer.put_node)
        if changed is None:
            self._hints.begin_new()
        elif trusted:
            self._hints.begin_edit()
        data, pieces = self._plan(changed)
        meter = Meter(progress, "read", extents.total_bytes(data))
        totals = _Totals()
        with executor_or_own(executor) as hands:
            if parent is not None and changed is not None and not isinstance(self._source, RecordSource):
                self._check_unchanged_sample(reading, changed)
            for outcomes in in_order(hands, reading, pieces):
                for outcome in outcomes:
                    self._apply(outcome, writer, totals)
                    read_bytes = sum(span.length_bytes for span in outcome.spans if not span.hole)
                    self.read_bytes += read_bytes
                    meter.advance(read_bytes)
        root = writer.finish()
        self._source.check_unchanged()
        self._storer.finish()
        written_bytes = (parent.written_bytes if parent else 0) + totals.more_chunks * self._chunk_bytes
        if self._lost_nodes:
            # What was below them before is unknown, so the difference is as well.
            leaves = tree.leaves(root, self._objects.node)
            written_bytes = sum(len(tree.used_slots(leaf)) for _, leaf in leaves) * self._chunk_bytes
        snapshot = Manifest(
            id=manifest.id_in(object_name),
            disk=request.disk,
            sequence=int(object_name[-41:-33], 16),
            parent=parent.id if parent else None,
            created=request.created or datetime.now(UTC).isoformat(timespec="milliseconds"),
            size_bytes=self._size_bytes,
            chunk_bytes=self._chunk_bytes,
            levels=root.levels,
            root=root.id.hex(),
            written_bytes=max(0, written_bytes),
            changed_bytes=totals.changed_chunks * self._chunk_bytes,
            new_bytes=self._storer.new_bytes,
            stored_bytes=self._storer.stored_bytes,
            fallback_reason=self._fallback_reason,
            label=request.label,
            tags=request.tags or {},
            # A path may hold bytes that are no text; it is for people only.
            source=self._source.name.encode("utf-8", "backslashreplace").decode(),
            software=f"snapcore {VERSION}",
            key=self._context.domain.key_id,
            copied=request.copied,
            origin=request.origin,
            group=request.group,
        )
        self._commit(snapshot)
        self._hints.finish(snapshot.id, self._chunks)
        return snapshot

    def _reading(self, old: Root, written: Extents | None, *, trusted: bool) -> Reading:
        """What works on a piece."""
        if isinstance(self._source, RecordSource):
            return self._source.reading(self._objects, old, suspect=self._suspect, compression=self._compression)
        return Reading(
            self._source,
            self._objects,
            old,
            self._hints,
            trusted=trusted,
            suspect=self._suspect,
            compression=self._compression,
            written=written,
        )

    def _node_or_nothing(self, object_id: bytes) -> Buffer:
        """A node of the parent; an empty one where it is damaged, for then all below it is written anew."""
        try:
            return self._objects.node(object_id)
        except DamagedError:
            # Any other node may be well the next time: what lies below it is not written anew.
            if object_id not in self._lost_nodes:
                raise
            return bytes(tree.NODE_BYTES)

    def _changed_region(self) -> Extents | None:
        """What may differ from the parent; None for anything."""
        changed, parent = self._request.changed, self._parent
        if changed is None or parent is None:
            return None
        if parent.size_bytes != self._size_bytes:
            # The chunk at the shorter one's end holds other bytes or ends elsewhere; what lies behind it is new.
            start = min(parent.size_bytes, self._size_bytes) // self._chunk_bytes * self._chunk_bytes
            changed = extents.union(changed, extents.from_pairs([(start, self._size_bytes - start)]))
        return extents.union(changed, self._suspect)

    def _plan(self, changed: Extents | None) -> tuple[Extents, Iterator[Piece]]:
        """What to read, and the pieces of work in ascending order: spans of data and the holes between them."""
        size_bytes = self._size_bytes
        region = extents.from_pairs([(0, size_bytes)]) if changed is None else changed
        data = extents.aligned(self._filled, self._chunk_bytes, size_bytes)
        data = extents.intersection(data, region, size_bytes)
        holes = extents.difference(region, data, size_bytes)

        def spans() -> Iterator[Span]:
            rows = [(offset, length, False) for offset, length in data.tolist()]
            rows += [(offset, length, True) for offset, length in holes.tolist()]
            for offset, length, hole in sorted(rows):
                if hole or length <= SPAN_BYTES:
                    yield Span(offset, length, hole)
                    continue
                for start, count in extents.spans(extents.from_pairs([(offset, length)]), SPAN_BYTES):
                    yield Span(start, count, False)
            if self._parent is not None:
                end, old_end = self._chunks, FANOUT**self._parent.levels
                if old_end > end:
                    yield Span(end * self._chunk_bytes, (old_end - end) * self._chunk_bytes, True)

        if isinstance(self._source, RecordSource):
            return data, ((span,) for span in spans())
        return data, _gathered(spans())

    def _apply(self, outcome: Outcome, writer: TreeWriter, totals: _Totals) -> None:
        self._storer.put(outcome.records)
        places = places_of(outcome.spans, self._chunk_bytes) if not outcome.spans[0].hole else None
        if places is None:
            (span,) = outcome.spans
            first = span.offset_bytes // self._chunk_bytes
            stop = -(-(span.offset_bytes + span.length_bytes) // self._chunk_bytes)
            writer.clear(first, min(stop, FANOUT**writer.levels))
            self._hints.clear(first, stop)
        else:
            if outcome.ids is not None:
                writer.replace(places, outcome.ids)
            if outcome.fingerprints is not None:
                self._hints.write(places, outcome.fingerprints)
        totals.changed_chunks += outcome.changed_chunks
        totals.more_chunks += outcome.more_chunks

    def _check_unchanged_sample(self, reading: Reading, changed: Extents) -> None:
        """Read a random share of what is said to be unchanged and compare; a lie is an error."""
        rest = extents.gaps(changed, self._size_bytes)
        inside = extents.intersection(rest, self._filled, self._size_bytes)
        for part in (inside, rest):
            for chunk in self._some_chunks(extents.aligned(part, self._chunk_bytes, self._size_bytes)):
                offset = chunk * self._chunk_bytes
                length = min(self._chunk_bytes, self._size_bytes - offset)
                plain = reading.chunks(offset, length)
                zero = scan.zero_mask(plain, self._chunk_bytes)[0]
                found = ZERO_ID if zero else self._context.domain.chunk_id(plain)
                if found != reading.parent_ids(np.array([chunk]))[0].tobytes():
                    raise SourceChangedError(
                        f"the list of changes does not name the {length} bytes at offset {offset} of "
                        f"{self._source.name}, and they differ from the parent; take the snapshot without a list"
                    )

    def _some_chunks(self, rows: Extents) -> list[int]:
        counts = -(-rows[:, 1] // self._chunk_bytes)
        total = int(counts.sum())
        wanted = min(total, max(_CHECKED_AT_LEAST, int(total * self._request.checked_share)))
        picks = np.array(sorted(random.SystemRandom().sample(range(total), wanted)), dtype=np.int64)
        ends = np.cumsum(counts)
        row = np.searchsorted(ends, picks, side="right")
        chunks = rows[row, 0] // self._chunk_bytes + picks - (ends[row] - counts[row])
        found: list[int] = chunks.tolist()
        return found

    def _commit(self, snapshot: Manifest) -> None:
        own, object_name = self._place.own, self._place.object_name
        try:
            # Damaged sessions are ended without a tombstone, for the name of the manifest is lost with them.
            session.check(self._context.store, own)
            self.commit_tried = True
            manifest.write(self._context.store, object_name, snapshot, self._context.domain)
        except (ExistsError, FencedError) as error:
            if isinstance(error, ExistsError) and self._is_committed(snapshot):
                # A request that somebody on the way repeated was refused the second time.
                return
            raise FencedError(
                f"the session of snapshot {snapshot.id} was ended by somebody else before it was done; nothing is "
                "visible, take the snapshot again: what it stored is used"
            ) from error

    def _is_committed(self, snapshot: Manifest) -> bool:
        """Whether the name of the manifest holds it, and no tombstone."""
        context = self._context
        return (
            manifest.read(context.store, self._place.object_name, context.domains, context.config.chunk_bytes)
            == snapshot
        )

    def abandon(self) -> None:
        """After an error: keep what was stored findable, let go of everything."""
        self._hints.close()
        self._storer.abandon()

    def close(self) -> None:
        """Let go of everything."""
        self._hints.close()


def _gathered(spans: Iterator[Span]) -> Iterator[Piece]:
    """Spans that are scattered, together: up to SPAN_BYTES of data and `_PIECE_SPANS` spans a piece."""
    piece: list[Span] = []
    data_bytes = 0
    for span in spans:
        if piece and (data_bytes + span.length_bytes * (not span.hole) > SPAN_BYTES or len(piece) == _PIECE_SPANS):
            yield tuple(piece)
            piece, data_bytes = [], 0
        piece.append(span)
        data_bytes += span.length_bytes * (not span.hole)
    if piece:
        yield tuple(piece)


@dataclass(slots=True)
class _Totals:
    """Sums over all spans, in chunks."""

    changed_chunks: int = 0
    more_chunks: int = 0
