"""Reads everything: each record against its checksums and its id, each tree down to its chunks, each index entry.

Of domains whose key is not unlocked all stored bytes are read and held against their checksums (scrub.py).
What is bad is named with its pack and offset and with the snapshots and byte ranges that it hits, and marked in the
repository: marked records count as missing, so the next snapshot with the same content stores them again.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from snapcore import extents
from snapcore.errors import (
    BusyError,
    DamagedError,
    Error,
    LockedError,
    MissingObjectError,
    NotFoundError,
    ReadError,
    UnsupportedFormatError,
)
from snapcore.extents import Extents
from snapcore.parallel import executor_or_own, in_order
from snapcore.progress import Meter, ProgressCallback
from snapcore.repository import damage, images, index, intact, manifest, pack, record, scrub, tree
from snapcore.repository.context import Context
from snapcore.repository.damage import Bad
from snapcore.repository.domain import ZERO_ID, Domain, Domains
from snapcore.repository.index import Index, Place
from snapcore.repository.intact import Intact
from snapcore.repository.manifest import Manifest
from snapcore.repository.objects import Objects
from snapcore.repository.record import RecordKind
from snapcore.repository.share import Share
from snapcore.repository.table import Entries, Ids, entry_ids, id_keys, ids_of
from snapcore.repository.tree import FANOUT, used_slots
from snapcore.store import Store

Found = TypeVar("Found")

# Collections that may end while everything is read, before it is given up.
_ATTEMPTS = 3
_RUNS_LIMIT = 1 << 15
# Per pack: one that was made to be a nuisance can hold millions of records that are wrong.
_PROBLEMS_LIMIT = 1000

# (offset, id) of a record → (kind, form, whole length, length after decoding)
_Records = dict[tuple[int, bytes], tuple[int, int, int, int]]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be.

    Attributes
    ----------
    where : str
        Object (and offset) in the store.
    what : str
    """

    where: str
    what: str


@dataclass(frozen=True, slots=True)
class Hit:
    """What damage means for a snapshot.

    Attributes
    ----------
    snapshot, disk : str
    ranges : int64 array of shape (n, 2)
        Offset and length of what cannot be restored.
    """

    snapshot: str
    disk: str
    ranges: Extents


@dataclass(frozen=True, slots=True)
class Verified:
    """What a verification found.

    Attributes
    ----------
    snapshots, locked_snapshots, packs, records : int
        How many were read; of locked ones, those under keys that are not unlocked, only the stored bytes were checked.
    plain_bytes, stored_bytes : int
        Of the records: after decoding, and as stored.
    problems : list of Problem
        Empty when all is well.
    hits : list of Hit
        Snapshots that cannot be restored whole.
    marked : int
        Records that are now marked to be stored again.
    duration_s : float
    """

    snapshots: int
    locked_snapshots: int
    packs: int
    records: int
    plain_bytes: int
    stored_bytes: int
    problems: list[Problem]
    hits: list[Hit]
    marked: int
    duration_s: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not self.hits


@dataclass(frozen=True, slots=True)
class _Task:
    """A pack to check, and the index entries that say what lies in it."""

    pack_id: bytes
    size_bytes: int | None
    entries: list[Entries]


@dataclass(slots=True)
class _Report:
    """What became of one pack. Lost is what no snapshot may need: of packs that are gone, patches without a base."""

    size_bytes: int = 0
    records: int = 0
    plain_bytes: int = 0
    bad: list[Bad] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    lost: list[Bad] = field(default_factory=list)
    lost_problems: list[Problem] = field(default_factory=list)
    unnamed: int = 0

    def add(self, where: str, what: str) -> None:
        """Name a record that is damaged, or only count it when many have been named."""
        if len(self.problems) < _PROBLEMS_LIMIT:
            self.problems.append(Problem(where, what))
        else:
            self.unnamed += 1


def verify(
    contexts: Sequence[Context],
    share: Share,
    progress: ProgressCallback | None = None,
    executor: Executor | None = None,
    in_flight: int | None = None,
) -> Verified:
    """Read and check everything; see `Repository.verify`. One context for each domain that is unlocked."""
    started = time.monotonic()
    store = contexts[0].store
    with executor_or_own(executor) as hands:
        for _ in range(_ATTEMPTS):
            before, packs = _names(store), _packs(store)
            # What is marked in packs that are not read now stays marked.
            kept = [bad for bad in damage.load(store) if not share.holds(bytes.fromhex(bad.pack))]
            try:
                found, bad = _attempt_all(contexts, _Way(share, kept, hands, in_flight, progress))
            except (DamagedError, NotFoundError):
                if before <= _names(store):
                    raise
                continue
            # What a collection has moved or removed meanwhile is neither bad nor lost. Index objects come and go.
            if found.ok or packs <= _packs(store):
                marked = _mark(store, bad + kept, found.problems)
                return replace(found, marked=marked, duration_s=time.monotonic() - started)
    raise BusyError(
        f"a collection is at work on {store.url}: what is there changed while it was verified, {_ATTEMPTS} times. "
        f"See `snapcore repo sessions {store.url}` and verify again when it is done"
    )


@dataclass(frozen=True, slots=True)
class _Way:
    """Which packs are read and by whom, and what else is known to be bad."""

    share: Share
    kept: list[Bad]
    hands: Executor
    in_flight: int | None
    progress: ProgressCallback | None


def _names(store: Store) -> set[str]:
    """Every index object and pack."""
    return {name for name, _ in store.list(index.PREFIX)} | _packs(store)


def _packs(store: Store) -> set[str]:
    """Every pack; only collections remove some."""
    return {name for name, _ in store.list(pack.PREFIX)}


def _attempt_all(contexts: Sequence[Context], way: _Way) -> tuple[Verified, list[Bad]]:
    """Read and check every domain once, those without a key as far as that goes."""
    parts = [_attempt(context, way) for context in contexts]
    locked, locked_bad = scrub.scrub(
        contexts[0].store,
        frozenset(context.domain.id for context in contexts),
        way.share,
        way.progress,
        way.hands,
        way.in_flight,
    )
    problems = [Problem(where, what) for where, what in locked.problems]
    strays = [name for name, _ in contexts[0].store.list(pack.PREFIX) if not pack.is_name(name)]
    problems += [Problem(name, "this is no name of a pack; remove what does not belong there") for name in strays]
    found = [part for part, _ in parts]
    return (
        Verified(
            snapshots=sum(part.snapshots for part in found),
            locked_snapshots=locked.snapshots,
            packs=sum(part.packs for part in found) + locked.packs,
            records=sum(part.records for part in found) + locked.records,
            plain_bytes=sum(part.plain_bytes for part in found),
            stored_bytes=sum(part.stored_bytes for part in found) + locked.stored_bytes,
            # A manifest whose header is damaged is met with every domain.
            problems=list(dict.fromkeys([problem for part in found for problem in part.problems] + problems)),
            hits=[hit for part in found for hit in part.hits],
            marked=0,
            duration_s=0.0,
        ),
        [bad for _, rows in parts for bad in rows] + locked_bad,
    )


def _attempt(context: Context, way: _Way) -> tuple[Verified, list[Bad]]:
    """Read and check everything once. Returns also what is to be marked."""
    problems: list[Problem] = []
    snapshots = _snapshots(context, problems)
    ids = {item.id for item in snapshots}
    held = [item for item in _in_images(context, problems) if item.id not in ids]

    def there() -> set[bytes]:
        return set(pack.sizes(context.store, context.domain))

    # Marks of an earlier verify are left out here: a record that reads well again counts as good again.
    known = Index.load(
        context.store,
        damaged=lambda name, error: problems.append(Problem(name, str(error))),
        domain=context.domain,
        there=there,
    )
    objects = Objects(context.store, known, context.domain, context.config.chunk_bytes)
    tasks = [task for task in _tasks(context, known) if way.share.holds(task.pack_id)]
    meter = Meter(way.progress, "verify", sum(task.size_bytes or 0 for task in tasks))
    reports = []
    for report in in_order(way.hands, _CheckPack(context.store, objects), tasks, way.in_flight):
        meter.advance(report.size_bytes)
        reports.append(report)
        problems += report.problems
    bad = [row for report in reports for row in report.bad]
    sound = None
    if bad or way.kept:
        rest = Index.load(
            context.store, damage.places(bad + way.kept), damaged=lambda *_: None, domain=context.domain, there=there
        )
        objects = Objects(context.store, rest, context.domain, context.config.chunk_bytes)
    elif not any(report.lost for report in reports):
        sound = _Sound(known)
    hits = list(_hits([*snapshots, *held], objects, sound))
    if hits:
        # Only then is it damage: see the index on entries that lead nowhere.
        bad += [row for report in reports for row in report.lost]
        problems += [problem for report in reports for problem in report.lost_problems]
    found = Verified(
        len(snapshots),
        0,
        len(tasks),
        sum(report.records for report in reports),
        sum(report.plain_bytes for report in reports),
        sum(report.size_bytes for report in reports),
        problems,
        hits,
        0,
        0.0,
    )
    return found, bad


def _snapshots(context: Context, problems: list[Problem]) -> list[Manifest]:
    """All manifests of the domain that can be read."""
    return list(_readable(context, manifest.PREFIX, manifest.read, "snapshot", problems))


def _in_images(context: Context, problems: list[Problem]) -> list[Manifest]:
    """All snapshots that images of the domain hold."""
    found = _readable(context, images.PREFIX, images.read, "image", problems)
    return list({item.id: item for image in found for item in image.snapshots}.values())


def _readable(
    context: Context,
    prefix: str,
    read: Callable[[Store, str, Domains, int], Found | None],
    what: str,
    problems: list[Problem],
) -> Iterator[Found]:
    """What can be read below a prefix; what cannot is a problem, unless it is of another domain."""
    for name, _ in list(context.store.list(prefix)):
        try:
            found = read(context.store, name, context.domains, context.config.chunk_bytes)
        except LockedError:
            continue
        except (DamagedError, UnsupportedFormatError, ReadError, ValueError) as error:
            problems.append(Problem(name, f"this {what} is lost: {error}"))
        else:
            if found is not None:
                yield found


def _tasks(context: Context, known: Index) -> list[_Task]:
    """Every pack that the store holds or an index object names."""
    entries: dict[bytes, list[Entries]] = {}
    for contents in known.tables():
        rows = contents.entries[np.argsort(contents.entries["pack"], kind="stable")]
        borders = np.searchsorted(rows["pack"], np.arange(len(contents.packs) + 1))
        for number, pack_id in enumerate(contents.packs):
            entries.setdefault(pack_id, []).append(rows[borders[number] : borders[number + 1]])
    sizes = pack.sizes(context.store, context.domain)
    return [_Task(pack_id, sizes.get(pack_id), entries.get(pack_id, [])) for pack_id in sorted(sizes | entries)]


class _CheckPack:
    """The work on one pack; safe on many threads at once. The bases of patches are read from their own packs."""

    def __init__(self, store: Store, objects: Objects) -> None:
        self._store = store
        self._objects = objects
        self._domain = objects.domain
        self._intact = Intact(objects)
        self._run = secrets.token_bytes(16)

    def __reduce__(self) -> tuple[Callable[..., _CheckPack], tuple[Store, Domain, int, bytes]]:
        """For another process, which loads an index of its own, once a run."""
        return _check_pack_elsewhere, (self._store, self._domain, self._objects.chunk_bytes, self._run)

    def __call__(self, task: _Task) -> _Report:
        name = pack.name(task.pack_id, self._domain)
        report = _Report(size_bytes=task.size_bytes or 0)
        right: _Records = {}
        baseless: _Records = {}
        try:
            if task.size_bytes is None:
                raise NotFoundError(f"the pack {name} is gone")
            data = self._store.get(name, pack.PACK_LIMIT_BYTES)
        except NotFoundError as error:
            report.lost_problems.append(Problem(name, str(error)))
            for entries in task.entries:
                self._compare(entries, task.pack_id, right, report.lost, report.lost_problems)
            return report
        except (ReadError, DamagedError) as error:
            report.problems.append(Problem(name, str(error)))
            right = self._one_by_one(task, report) if isinstance(error, ReadError) else right
        else:
            content = self._intact(data, _InMemory(data), task.pack_id, task.entries)
            if content is not None:
                report.records, report.plain_bytes = content
                return report
            self._check_frame(data, task.pack_id, report)
            self._check_records(data, name, report, right, baseless)
        for entries in task.entries:
            self._compare(entries, task.pack_id, right | baseless, report.bad, report.problems)
        report.lost += [Bad(pack=task.pack_id.hex(), offset=offset, id=lost.hex()) for offset, lost in sorted(baseless)]
        return report

    def _check_frame(self, data: bytes, pack_id: bytes, report: _Report) -> None:
        try:
            intact.opened(data, _InMemory(data), pack_id, self._domain)
        except (DamagedError, UnsupportedFormatError) as error:
            report.problems.append(Problem(pack.name(pack_id, self._domain), str(error)))

    def _check_records(
        self,
        data: bytes,
        name: str,
        report: _Report,
        right: _Records,
        baseless: _Records,
    ) -> None:
        try:
            self._check_each(data, name, report, right, baseless)
        except UnsupportedFormatError as error:
            report.problems.append(Problem(name, str(error)))
        if report.unnamed:
            report.problems.append(Problem(name, f"{report.unnamed} more records are damaged"))

    def _check_each(
        self,
        data: bytes,
        name: str,
        report: _Report,
        right: _Records,
        baseless: _Records,
    ) -> None:
        for found in pack.records(data, name):
            where = f"{name} at {found.offset_bytes}"
            head = found.header
            if head is None:
                report.add(where, found.problem or "unreadable")
            elif head.kind != RecordKind.DIRECTORY:
                try:
                    self._objects.checked(head.kind, head, found.payload, where)
                except MissingObjectError as error:
                    baseless[found.offset_bytes, head.id] = _fields(head)
                    report.lost_problems.append(Problem(where, str(error)))
                except DamagedError as error:
                    report.add(where, str(error))
                else:
                    right[found.offset_bytes, head.id] = _fields(head)
                    report.records += 1
                    if head.kind == RecordKind.CHUNK:
                        report.plain_bytes += self._objects.chunk_bytes

    def _one_by_one(self, task: _Task, report: _Report) -> _Records:
        """What can still be read of a pack on a failing medium."""
        right: _Records = {}
        name = pack.name(task.pack_id, self._domain)
        for entries in task.entries:
            for object_id, entry in zip(entry_ids(entries), entries, strict=True):
                try:
                    raw = self._store.get_range(name, int(entry["offset"]), int(entry["stored"]))
                    where = f"{name} at {entry['offset']}"
                    head = record.parse_header(raw, where)
                    if head.id != object_id.tobytes() or head.kind == RecordKind.DIRECTORY:
                        continue
                    self._objects.checked(head.kind, head, raw[record.HEADER_BYTES :], where)
                except (DamagedError, NotFoundError, ReadError, UnsupportedFormatError):
                    continue
                right[int(entry["offset"]), head.id] = _fields(head)
                report.records += 1
        return right

    def _compare(
        self, entries: Entries, pack_id: bytes, right: _Records, bad: list[Bad], problems: list[Problem]
    ) -> None:
        """Index entries that lead to no good record are bad."""
        values = entries[["offset", "kind", "form", "stored", "plain"]].tolist()
        for object_id, (offset, *fields) in zip(entry_ids(entries), values, strict=True):
            if right.get((offset, object_id.tobytes())) != tuple(fields):
                where = f"{pack.name(pack_id, self._domain)} at {offset}"
                bad.append(Bad(pack=pack_id.hex(), offset=offset, id=object_id.tobytes().hex()))
                problems.append(Problem(where, f"no readable record of {object_id.tobytes().hex()}"))


# The last run that this process was given packs of.
_elsewhere: dict[bytes, _CheckPack] = {}
_elsewhere_lock = threading.Lock()


def _check_pack_elsewhere(store: Store, domain: Domain, chunk_bytes: int, run: bytes) -> _CheckPack:
    with _elsewhere_lock:
        if run not in _elsewhere:
            known = Index.load(
                store, damaged=lambda *_: None, domain=domain, there=lambda: pack.sizes(store, domain).keys()
            )
            _elsewhere.clear()
            _elsewhere[run] = _CheckPack(store, Objects(store, known, domain, chunk_bytes))
        return _elsewhere[run]


def _fields(head: record.RecordHeader) -> tuple[int, int, int, int]:
    """What an index entry says of a record, beside its place and its id."""
    return int(head.kind), int(head.form), record.HEADER_BYTES + head.payload_bytes, head.plain_bytes


class _InMemory:
    """The bytes of one object as a store."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def get(self, name: str, limit_bytes: int) -> bytes:
        del name, limit_bytes
        return self._data

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        if offset_bytes + length_bytes > len(self._data):
            raise DamagedError(f"{name} ends at byte {len(self._data)}")
        return self._data[offset_bytes : offset_bytes + length_bytes]

    def size(self, name: str) -> int:
        del name
        return len(self._data)


def _mark(store: Store, bad: list[Bad], problems: list[Problem]) -> int:
    """Mark what is bad so that it is stored again. A repository that cannot be written is only reported."""
    try:
        if bad or next(iter(store.list(damage.PREFIX)), None) is not None:
            damage.replace(store, bad)
    except Error as error:
        problems.append(Problem(damage.PREFIX, f"what is damaged could not be marked: {error}"))
        return 0
    return len(bad)


class _Sound:
    """The chunks of a repository in which every index entry leads to a record that is right."""

    def __init__(self, known: Index) -> None:
        parts = [contents.ids()[contents.entries["kind"] == RecordKind.CHUNK] for contents in known.tables()]
        ids = np.concatenate([np.empty(0, dtype="V32"), *parts])
        self._ids = ids[np.argsort(id_keys(ids), kind="stable")]
        self._keys = id_keys(self._ids)

    def holds(self, ids: Ids) -> bool:
        """Whether all of these are there. What is not, or shares its first bytes with another one, is a no."""
        if len(self._ids) == 0:
            return len(ids) == 0
        rows = np.minimum(np.searchsorted(self._keys, id_keys(ids)), len(self._ids) - 1)
        return bool((self._ids[rows] == ids).all())


def _hits(snapshots: list[Manifest], objects: Objects, sound: _Sound | None) -> Iterator[Hit]:
    """Snapshots that need something that is missing, with the byte ranges; shared subtrees are looked at once.

    What is `sound`, where that is known, need not be looked for one by one.
    Of more than `_RUNS_LIMIT` runs below a node, only those of its children that are hit are told apart.
    """
    seen: dict[tuple[bytes, int], Extents] = {}

    def lost(node_id: bytes, level: int) -> Extents:
        """Runs of chunks that are missing below a node, counted from its first chunk."""
        found = seen.get((node_id, level))
        if found is None:
            found = seen[node_id, level] = below(node_id, level)
        return found

    def below(node_id: bytes, level: int) -> Extents:
        try:
            node = tree.opened(node_id, objects.node)
        except (DamagedError, UnsupportedFormatError):
            return extents.from_pairs([(0, FANOUT**level)])
        slots = used_slots(node).tolist()
        if level == 1:
            ids = ids_of(node[slots].tobytes())
            if sound is not None and sound.holds(ids):
                return extents.empty()
            places = objects.index.find_many(ids)
            return extents.from_pairs(
                [(slot, 1) for slot, place in zip(slots, places, strict=True) if not _whole(place, objects.index)]
            )
        width = FANOUT ** (level - 1)
        parts = [(slot, lost(node[slot].tobytes(), level - 1)) for slot in slots]
        rows = np.concatenate([extents.empty(), *(part + np.array([slot * width, 0]) for slot, part in parts)])
        if len(rows) > _RUNS_LIMIT:
            # Nodes that are used again and again can stand for more runs than any memory holds.
            return extents.from_pairs([(slot * width, width) for slot, part in parts if len(part)])
        return extents.merged(rows)

    for snapshot in snapshots:
        if snapshot.tree.id == ZERO_ID:
            continue
        rows = extents.clipped(lost(snapshot.tree.id, snapshot.levels), 0, snapshot.chunks) * snapshot.chunk_bytes
        if len(rows):
            yield Hit(snapshot.id, snapshot.disk, extents.clipped(rows, 0, snapshot.size_bytes))


def _whole(place: Place | None, known: Index) -> bool:
    """Whether a chunk, and the base of its patch, are where they should be."""
    if place is None or place.kind != RecordKind.CHUNK:
        return False
    if place.base is None:
        return True
    base = known.find_full(place.base)
    return base is not None and base.kind == RecordKind.CHUNK
