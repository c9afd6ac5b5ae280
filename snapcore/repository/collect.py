"""Frees the space of what no snapshot reaches, beside writers, readers and other collectors.

A collection goes in rounds: each makes of the latest generation the next one, by the steps that docs/FORMAT.md, "Write
order", has in a table and tests/support/collection_protocol.py explores; the comments here name them. A round that
finds another one published in its place starts over. Whatever happens, every reachable record is findable at every
instant: new packs and index objects are durable before old ones go, and a pack goes only when a published generation
dooms it.

Work is on one domain: packs, index objects and manifests of domains without a key are not touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapcore.errors import DamagedError, MissingObjectError, NotFoundError
from snapcore.parallel import executor_or_own, in_order
from snapcore.progress import Meter, ProgressCallback
from snapcore.repository import codec, damage, generations, index, manifest, pack, record, session, summaries, table
from snapcore.repository.context import Context
from snapcore.repository.domain import Domain
from snapcore.repository.generations import Generation
from snapcore.repository.index import Index, ReplacedError
from snapcore.repository.manifest import Manifest
from snapcore.repository.marks import Marks
from snapcore.repository.objects import Objects
from snapcore.repository.pack import PackBuilder
from snapcore.repository.record import Record, RecordKind
from snapcore.repository.session import Session
from snapcore.repository.table import NO_BASE, Table
from snapcore.store import Store

# A pack is written anew when most of it is dead. Others follow, the deadest first, while over a twentieth of the
# repository is dead, or as long as little has been moved: so small repositories end exact and large ones are spared.
_DEAD_SHARE = 0.5
_WASTE_SHARE = 0.05
_CHEAP_BYTES = 64 << 20
# Packs below this size are joined once they fill a whole one: each is a request to make and an object to pay for.
_SMALL_BYTES = pack.PACK_BYTES // 4
# More index objects than this are joined even when nothing is removed.
_INDEX_OBJECTS = 8


# Rounds of one collection: condemn, doom, forget deleted manifests; more only beside busy writers.
_ROUNDS = 6
# Times that a round starts over because others were at it.
_STARTS = 5
WEEK_S = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection did.

    Attributes
    ----------
    freed_bytes : int
        By which the repository is smaller.
    removed_packs, rewritten_packs : int
        Packs that are gone, and packs that had records moved out of them.
    live_bytes : int
        Of all packs that are left.
    condemned_packs, condemned_bytes : int
        What goes with the next collection after those in `waiting_for` have ended.
    waiting_for : tuple of Session
        Writers that may still rely on it.
    """

    freed_bytes: int
    removed_packs: int
    rewritten_packs: int
    live_bytes: int
    condemned_packs: int = 0
    condemned_bytes: int = 0
    waiting_for: tuple[Session, ...] = ()


@dataclass(frozen=True, slots=True)
class Patience:
    """How a collection treats writers that began before what it has condemned.

    Attributes
    ----------
    wait_s : float
        How long to wait for them.
    patience_s : float
        Who began longer ago is fenced: its snapshot is taken again, or refused. No question of safety.
    """

    wait_s: float = 0.0
    patience_s: float = WEEK_S


def collect(
    context: Context,
    snapshots: Callable[[], list[Manifest]],
    patience: Patience,
    progress: ProgressCallback | None = None,
    executor: Executor | None = None,
) -> Collected:
    """Remove what no snapshot reaches; see `Repository.collect`. `snapshots` lists all of the domain."""
    store, domain = context.store, context.domain
    own = session.register(store, session.COLLECT, domain=domain)
    done = _Done()
    waiting: list[Session] = []
    try:
        with executor_or_own(executor) as hands:
            for _ in range(_ROUNDS):
                seen = generations.latest(store, domain)  # step see
                waiting = session.wait_for_older(store, domain, seen.number, patience.wait_s, patience.patience_s)
                if waiting or not _round(context, seen, snapshots, done, progress, hands):
                    break
        _tidy(context, own, done)
        condemned = generations.latest(store, domain).away
    finally:
        session.withdraw(store, own)
    sizes = pack.sizes(store, domain)
    left = [sizes[pack_id] for pack_id in condemned if pack_id in sizes]
    return Collected(
        done.freed_bytes,
        done.removed_packs,
        done.rewritten_packs,
        sum(sizes.values()),
        len(left),
        sum(left),
        tuple(waiting),
    )


def _round(
    context: Context,
    seen: Generation,
    snapshots: Callable[[], list[Manifest]],
    done: _Done,
    progress: ProgressCallback | None,
    hands: Executor,
) -> bool:
    """Make the next generation, when there is something to do. Whether there may be more."""
    for left in reversed(range(_STARTS)):
        try:
            return _Round(context, seen, snapshots, done, hands).run(progress)
        except (DamagedError, NotFoundError) as error:
            # What somebody else has moved, merged or removed since it was listed is no damage.
            replaced = isinstance(error, (NotFoundError, ReplacedError))
            later = generations.latest_number(context.store, context.domain) != seen.number
            if not left or not (replaced or later):
                raise
            seen = generations.latest(context.store, context.domain)
            if session.wait_for_older(context.store, context.domain, seen.number, 0.0, float("inf")):
                return True
    raise AssertionError("unreachable")


def _tidy(context: Context, own: Session, done: _Done) -> None:
    """Remove what writers left behind that are gone, and summarise manifests."""
    store = context.store
    others = [item for item in session.sessions(store) if item.id != own.id]
    if not session.end_dead(store, others):
        done.freed_bytes += store.sweep()
    summaries.refresh_if_possible(store)


@dataclass(slots=True)
class _Done:
    """What the rounds of a collection did so far."""

    freed_bytes: int = 0
    removed_packs: int = 0
    rewritten_packs: int = 0


class _Round:
    """One round: from what is seen to the next generation."""

    def __init__(
        self,
        context: Context,
        seen: Generation,
        snapshots: Callable[[], list[Manifest]],
        done: _Done,
        hands: Executor,
    ) -> None:
        self._context = context
        self._store, self._domain = context.store, context.domain
        self._seen = seen
        self._done = done
        self._hands = hands
        # A deletion whose process died may not be durable: its snapshot must not come back to find its packs gone.
        self._store.settle("")
        known = manifest.deleted(self._store, self._domain)  # step known
        self._known = known[: generations.IGNORED_LIMIT]
        roots = snapshots()  # steps list, read
        pinned = self._read_deleted()  # step pinned
        self._sizes: dict[bytes, int] = {}
        whole = Index.load(  # steps index, packs
            self._store,
            damage.places(damage.load(self._store)),
            domain=self._domain,
            there=self._list_packs,
        )
        self._old_index = sorted(whole.names)
        # Entries of packs that are gone: what a writer that was fenced wrote late.
        self._stale = bool(whole.away)
        self._adopted = self._adopt(whole)
        whole = whole.without(seen.doomed)
        self._marks(whole, roots, pinned)  # step mark
        self._tables = whole.tables()

    def _list_packs(self) -> set[bytes]:
        self._sizes = pack.sizes(self._store, self._domain)
        return set(self._sizes)

    def _read_deleted(self) -> list[Manifest] | None:
        """Deleted snapshots that may bind what is condemned; None when one cannot be read, and all may."""
        found: list[Manifest] = []
        if not self._seen.condemned:
            return found
        for tail in manifest.deleted(self._store, self._domain):
            if tail not in self._seen.ignored:
                try:
                    read = manifest.read_deleted(self._store, tail, self._domain, self._context.config.chunk_bytes)
                except (DamagedError, NotFoundError):
                    return None
                found += [read] if read is not None else []
        return found

    def _adopt(self, known: Index) -> bool:
        """Let the index know of packs that no index object names."""
        named = known.packs()
        strays = [(pack_id, size_bytes) for pack_id, size_bytes in self._sizes.items() if pack_id not in named]
        found = False
        for contents in in_order(self._hands, _Contents(self._store, self._domain), strays):
            if contents is not None:
                known.add_table(contents)
                found = True
        return found

    def _marks(self, whole: Index, roots: list[Manifest], pinned: list[Manifest] | None) -> None:
        objects = Objects(self._store, whole, self._domain, self._context.config.chunk_bytes)
        marks = Marks(objects, whole.without(self._seen.condemned))
        for snapshot in roots:
            marks.add(snapshot)
        self._reached = marks.reached
        self._bound: npt.NDArray[np.bool] | None = None
        if pinned is not None:
            bound = marks.copy()
            try:
                for snapshot in pinned:
                    bound.add(snapshot)
            except MissingObjectError:
                return
            self._bound = bound.reached

    def run(self, progress: ProgressCallback | None) -> bool:
        """Decide, publish and remove. Whether there was something to do."""
        seen, there = self._seen, self._sizes.keys()
        live, garbage = self._record_bytes(self._reached)
        doomed = set(seen.doomed & there)
        if self._bound is not None:
            bound, _ = self._record_bytes(self._bound)
            doomed |= {pack_id for pack_id in seen.condemned & there if not bound[pack_id]}
        left = there - doomed
        dead = {pack_id for pack_id in left if not live[pack_id]}
        moved_from = self._to_rewrite(live, garbage, left)
        condemned = frozenset(sorted(dead)[: generations.CONDEMNED_LIMIT]) | frozenset(moved_from)
        anew = bool(doomed) or self._stale or self._adopted or len(self._old_index) > _INDEX_OBJECTS
        if condemned == seen.condemned and not anew and not self._known:
            self._done.freed_bytes += generations.clear(self._store, self._domain, seen.number)
            return False
        meter = Meter(progress, "collect", sum(live[pack_id] for pack_id in moved_from))
        moved = self._move(moved_from, meter)
        written = self._write_index(moved, doomed, anew)
        names = written if anew else [*self._old_index, *written]
        prefix = index.PREFIX + self._domain.folder
        following = Generation(
            seen.number + 1,
            condemned,
            frozenset(doomed),
            frozenset(name.removeprefix(prefix) for name in names),
            frozenset(self._known),
        )
        size_bytes = generations.publish(self._store, self._domain, following)  # steps publish, confirm
        if size_bytes is None:
            return True
        self._done.freed_bytes -= size_bytes
        self._done.rewritten_packs += len(moved_from)
        self._remove(self._old_index if anew else [], following)
        return True

    def _remove(self, superseded: list[str], following: Generation) -> None:
        """Steps "drop index", "drop packs" and "clear": from here on anybody may do it, at any time."""
        for name in superseded:
            with contextlib.suppress(NotFoundError):
                size_bytes = self._store.size(name)
                self._store.delete(name)
                self._done.freed_bytes += size_bytes
        for pack_id in sorted(following.doomed):
            with contextlib.suppress(NotFoundError):
                self._store.delete(pack.name(pack_id, self._domain))
                self._done.freed_bytes += self._sizes[pack_id]
                self._done.removed_packs += 1
        self._forget_damage(following.doomed)
        freed_bytes = manifest.forget_deleted(self._store, sorted(self._seen.ignored), self._domain)
        freed_bytes += generations.clear(self._store, self._domain, following.number)
        self._done.freed_bytes += freed_bytes

    def _parts(self, marked: npt.NDArray[np.bool]) -> Iterator[tuple[Table, npt.NDArray[np.bool]]]:
        """Every table with the marks of its entries."""
        start = 0
        for contents in self._tables:
            yield contents, marked[start : start + len(contents.entries)]
            start += len(contents.entries)

    def _record_bytes(self, marked: npt.NDArray[np.bool]) -> tuple[dict[bytes, int], dict[bytes, int]]:
        """Bytes of the records of each pack: marked ones, and others."""
        live = dict.fromkeys(self._sizes, 0)
        dead = dict.fromkeys(self._sizes, 0)
        for contents, reached in self._parts(marked):
            for sums, chosen in ((live, reached), (dead, ~reached)):
                rows = contents.entries[chosen]
                counts = np.bincount(rows["pack"], weights=rows["stored"], minlength=len(contents.packs))
                for pack_id, stored in zip(contents.packs, counts.tolist(), strict=True):
                    sums[pack_id] = sums.get(pack_id, 0) + int(stored)
        return live, dead

    def _to_rewrite(self, live: dict[bytes, int], dead: dict[bytes, int], left: set[bytes]) -> set[bytes]:
        used = [pack_id for pack_id in left if live[pack_id]]
        small = {pack_id for pack_id in used if self._sizes[pack_id] < _SMALL_BYTES}
        chosen = small if sum(live[pack_id] for pack_id in small) >= pack.PACK_BYTES else set()
        waste = sum(dead[pack_id] for pack_id in used)
        allowed = _WASTE_SHARE * sum(live.values())
        moved = 0
        share = {pack_id: dead[pack_id] / (live[pack_id] + dead[pack_id]) for pack_id in used}
        for pack_id in sorted((item for item in used if dead[item]), key=lambda item: (-share[item], item)):
            if share[pack_id] >= _DEAD_SHARE or waste > allowed or moved + live[pack_id] <= _CHEAP_BYTES:
                chosen.add(pack_id)
                moved += live[pack_id]
                waste -= dead[pack_id]
        return chosen

    def _move(self, chosen: set[bytes], meter: Meter) -> list[Table]:
        """Step "move": put the reachable records of the chosen packs into new ones. Returns what lies in those."""
        builders: dict[int, PackBuilder] = {}
        written: list[Table] = []

        def finish(builder: PackBuilder) -> None:
            buffers, contents = builder.finish()
            self._done.freed_bytes -= self._store.put_new(builder.name, buffers)
            written.append(contents)

        for contents, reached in self._parts(self._reached):
            places = [number for number, pack_id in enumerate(contents.packs) if pack_id in chosen]
            rows = contents.entries[reached & np.isin(contents.entries["pack"], places)]
            for row in rows[np.lexsort((rows["offset"], rows["pack"]))]:
                item = self._moved(row, contents)
                builder = builders.setdefault(item.kind, PackBuilder(self._domain))
                builder.add(item)
                meter.advance(item.stored_bytes)
                if builder.size_bytes >= pack.PACK_BYTES:
                    finish(builders.pop(item.kind))
        for builder in builders.values():
            finish(builder)
        return written

    def _moved(self, row: np.void, contents: Table) -> Record:
        """A record as it is stored, its checksums checked."""
        pack_id = contents.packs[row["pack"]]
        name = pack.name(pack_id, self._domain)
        where = f"{name} at {row['offset']}"
        raw = self._store.get_range(name, int(row["offset"]), int(row["stored"]))
        head = record.parse_header(raw, where)
        payload = raw[record.HEADER_BYTES :]
        if head.id != row["key"].tobytes() + row["rest"].tobytes() or head.kind != row["kind"]:
            raise DamagedError(f"{where}: the record of {head.id.hex()} is not the one that the index names")
        record.payload_plain(head, payload, table.STORED_LIMIT_BYTES, where, self._domain)
        base = None if row["base"] == NO_BASE else contents.bases[row["base"]].tobytes()
        kind = RecordKind(head.kind)
        return Record(
            kind,
            head.form,
            head.id,
            raw[: record.HEADER_BYTES],
            payload,
            codec.Codec(head.codec),
            head.plain_bytes,
            base,
        )

    def _write_index(self, moved: list[Table], doomed: set[bytes], anew: bool) -> list[str]:
        """Step "write index": of what was moved, or of everything that is there and not doomed. Returns the names."""
        tables = list(moved)
        if anew:
            named = {pack_id for contents in self._tables for pack_id in contents.packs}
            lost = doomed | (named - self._sizes.keys())
            tables += [index.without_packs(contents, lost) for contents in self._tables]
        written = []
        for part in table.split(table.merge(tables)):
            name, size_bytes = index.write(self._store, part, self._domain, self._seen.number)
            written.append(name)
            self._done.freed_bytes -= size_bytes
        return written

    def _forget_damage(self, gone: frozenset[bytes]) -> None:
        marked = damage.load(self._store)
        left = [bad for bad in marked if bytes.fromhex(bad.pack) not in gone]
        if len(left) < len(marked):
            damage.replace(self._store, left)


@dataclass(frozen=True, slots=True)
class _Contents:
    """Reads what lies in packs that no index object names; None of one that has gone meanwhile."""

    store: Store
    domain: Domain

    def __call__(self, stray: tuple[bytes, int]) -> Table | None:
        try:
            return pack.contents(self.store, *stray, self.domain)
        except NotFoundError:
            return None
