"""Objects by id: finds the record, reads it, decodes it, applies a patch, and checks the bytes against the id.

Nothing that does not match its id is handed out. Safe from many threads.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np

from snapcore.errors import DamagedError, MissingObjectError, NotFoundError, ReadError
from snapcore.parallel import SPAN_BYTES, usable_cores
from snapcore.persist import Buffer
from snapcore.repository import pack, record
from snapcore.repository.codec import Codec
from snapcore.repository.domain import Domain
from snapcore.repository.index import Index, Place
from snapcore.repository.record import UNIT_BYTES, Form, Mask, Record, RecordKind
from snapcore.repository.table import Ids, ids_of
from snapcore.repository.tree import NODE_BYTES
from snapcore.store.interface import Reader

NODES_KEPT = 1024
_BASES_KEPT_BYTES = 16 << 20
# Records of one pack that lie this close are read in one go in any case.
_GAP_BYTES = 64 << 10
# Collections that may end while one object is read.
_RENEWALS = 3

Result = TypeVar("Result")
# Makes of (kind, id, place, the record as it is stored, where that is) what is wanted.
Use = Callable[[RecordKind, bytes, Place, memoryview, str], Result]
_CODECS = {int(how): how for how in Codec}
_NO_BASES: Mapping[bytes, Buffer] = MappingProxyType({})


class Reach(NamedTuple):
    """How far a read goes, by what a request costs.

    Attributes
    ----------
    gap_bytes : int
        Records of one pack that lie this close are read in one go, as long as a half of it is wanted.
    run_bytes : int
        The longest read.
    span_bytes : int
        Of a disk, what is asked for at once.
    threads : int
        That ask: as many as there are cores, or more where they wait for the store most of the time.
    """

    gap_bytes: int
    run_bytes: int
    span_bytes: int
    threads: int


# Files of this host; and stores that a request takes milliseconds to.
NEAR = Reach(_GAP_BYTES, SPAN_BYTES, SPAN_BYTES, usable_cores())
FAR = Reach(512 << 10, 2 * SPAN_BYTES, 2 * SPAN_BYTES, max(4, min(8, usable_cores())))


# Pack, offset, number of the object among those that were asked for, and its place.
_Wanted = tuple[bytes, int, int, Place]


class _Run(NamedTuple):
    """Records of one pack that are read in one go."""

    pack: bytes
    start: int
    length: int
    wanted: list[_Wanted]


class _Asked(NamedTuple):
    """Objects that are in no pack, by number; the runs that hold the others, and what gives the bytes of each."""

    lost: list[int]
    runs: list[_Run]
    reads: list[Callable[[], bytes]]


class Base(NamedTuple):
    """An object that a patch may rest on: its id and its bytes."""

    id: bytes
    plain: Buffer


class Resting(NamedTuple):
    """Id of an object that a patch may rest on, and which units of what rests on it now are other ones."""

    base_id: bytes
    mask: Mask


class Opened(NamedTuple):
    """An object that was checked, and, of one that is stored full, its payload as it is once it is not sealed."""

    plain: Buffer
    encoded: tuple[Codec, Buffer] | None


class _Patch(NamedTuple):
    """A patch as it is stored, to be opened when its base is there."""

    id: bytes
    place: Place
    raw: memoryview
    where: str


class Objects:
    """Reads chunks and nodes of one repository.

    Parameters
    ----------
    store : Reader
    index : Index
    domain : Domain
    chunk_bytes : int
        Length of every chunk, in bytes.
    renew : callable, optional
        Loads the index anew when an object is not where it was: a collection may have moved it. Jobs that keep
        collections away need none.
    reach : Reach
        Of the store.
    hands : Executor, optional
        Threads that fetch what lies in several packs at once, where a store is far away.
    """

    def __init__(
        self,
        store: Reader,
        index: Index,
        domain: Domain,
        chunk_bytes: int,
        renew: Callable[[], Index] | None = None,
        reach: Reach = NEAR,
        hands: Executor | None = None,
    ) -> None:
        self.index = index
        self.domain = domain
        self.chunk_bytes = chunk_bytes
        self.store = store
        self.reach = reach
        self._sizes = {RecordKind.CHUNK: chunk_bytes, RecordKind.NODE: NODE_BYTES}
        self.renew = renew
        self._renewal = threading.Lock()
        self._hands = hands
        self._nodes = _Cache(NODES_KEPT)
        self._bases = {
            RecordKind.CHUNK: _Cache(max(2, min(64, _BASES_KEPT_BYTES // chunk_bytes))),
            RecordKind.NODE: _Cache(NODES_KEPT if hands is not None else 64),
        }

    def place(self, kind: RecordKind, object_id: bytes) -> Place:
        """Where an object lies; MissingObjectError when nowhere."""
        place = self.index.find(object_id) or self.index.find_condemned(object_id)
        if place is None or place.kind != kind:
            raise missing(kind, object_id)
        return place

    def chunk(self, object_id: bytes) -> Buffer:
        """Plain bytes of a chunk."""
        return self._found(RecordKind.CHUNK, object_id)

    def node(self, object_id: bytes) -> Buffer:
        """Bytes of a tree node."""
        found = self._nodes.get(object_id)
        if found is None:
            found = self._found(RecordKind.NODE, object_id)
            self._nodes.put(object_id, found)
        return found

    def expect_nodes(self, ids: Ids) -> None:
        """Read nodes that will be asked for, in few reads; what cannot be read is told when it is asked for."""
        unknown = [node_id for node_id in map(bytes, ids.tolist()) if self._nodes.get(node_id) is None]
        with contextlib.suppress(DamagedError):
            wanted = ids_of(b"".join(unknown))
            for number, found in self._opened(RecordKind.NODE, wanted, self.index.find_many(wanted)):
                if not isinstance(found, DamagedError):
                    self._nodes.put(unknown[number], found.plain)

    def nodes(self, object_ids: list[bytes]) -> list[Buffer]:
        """Bytes of many tree nodes, neighbours in a pack in one go."""
        kept = {object_id: self._nodes.get(object_id) for object_id in object_ids}
        found = {object_id: plain for object_id, plain in kept.items() if plain is not None}
        lacking = [object_id for object_id in kept if object_id not in found]
        for number, read in self.opened(RecordKind.NODE, ids_of(b"".join(lacking))):
            if isinstance(read, DamagedError):
                raise read
            self._nodes.put(lacking[number], read.plain)
            found[lacking[number]] = read.plain
        return [found[object_id] for object_id in object_ids]

    def _found(self, kind: RecordKind, object_id: bytes) -> Buffer:
        """The object, by a new index when the present one leads nowhere."""
        return self._renewing(lambda: self._object(kind, object_id, self.place(kind, object_id)))

    def _renewing(self, attempt: Callable[[], Result]) -> Result:
        """What `attempt` finds, by a new index when the present one leads nowhere."""
        for _ in range(_RENEWALS):
            seen = self.index
            try:
                return attempt()
            except DamagedError:
                if not self._renewed(seen):
                    raise
        return attempt()

    def _renewed(self, seen: Index) -> bool:
        """Whether there is another index now than the one that was used."""
        if self.renew is None:
            return False
        with self._renewal:
            if self.index is seen:
                fresh = self.renew()
                if (fresh.names, fresh.away) == (seen.names, seen.away):
                    return False
                self.index = fresh
        return True

    def bases(self, kind: RecordKind, old_ids: Ids) -> list[Base | None]:
        """What patches of the successors of these objects may rest on: for each an object that is stored full.

        That is the object itself, or the base of its own patch. None where there is none or it cannot be read: then the
        successor is stored full as well.
        """
        found: list[Base | None] = [None] * len(old_ids)
        wanted: list[int] = []
        joined = bytearray()
        for number, place in enumerate(self.index.find_many(old_ids)):
            if place is not None and place.kind == kind:
                wanted.append(number)
                joined += place.base or old_ids[number].tobytes()
        base_ids = ids_of(joined)
        for number, plain in self._many(kind, base_ids, self.index.find_many_full(base_ids), self._decoded):
            if not isinstance(plain, DamagedError):
                found[wanted[number]] = Base(base_ids[number].tobytes(), plain)
        return found

    def resting(self, kind: RecordKind, old_ids: Ids) -> list[Resting | None]:
        """On what these objects rest, themselves or by a patch, without a look at the object below.

        None where that cannot be told.
        """
        found: list[Resting | None] = [None] * len(old_ids)
        places = self.index.find_many(old_ids)
        none = np.zeros(self._sizes[kind] // UNIT_BYTES[kind], dtype=np.bool)
        patches = []
        for number, place in enumerate(places):
            if place is not None and place.kind == kind and place.base is None:
                found[number] = Resting(old_ids[number].tobytes(), none)
            elif place is not None:
                patches.append(number)
        wanted = [places[number] for number in patches]
        for number, made in self._many(kind, old_ids[patches], wanted, self._as_resting):
            if not isinstance(made, DamagedError):
                found[patches[number]] = made
        return found

    def chunks(self, ids: Ids) -> Iterator[tuple[int, Buffer | DamagedError]]:
        """(number, bytes or what is wrong) for every chunk of `ids`; neighbours in a pack are read in one go."""
        try:
            places = self._renewing(lambda: self.index.find_many(ids))
        except DamagedError:
            # Part of the index cannot be read: not every chunk need be in that part.
            for number in range(len(ids)):
                yield number, self._chunk_or_error(ids[number].tobytes())
            return
        for number, found in self._opened(RecordKind.CHUNK, ids, places):
            if not isinstance(found, DamagedError):
                yield number, found.plain
            elif self.renew is not None:
                yield number, self._chunk_or_error(ids[number].tobytes())
            else:
                yield number, found

    def full(self, kind: RecordKind, ids: Ids) -> Iterator[tuple[int, Buffer | DamagedError]]:
        """(number, bytes or what is wrong) for every object of `ids`, each as it is stored in full; see `chunks`."""
        return self._many(kind, ids, self.index.find_many_full(ids), self._decoded)

    def stored(self, kind: RecordKind, ids: Ids) -> Iterator[tuple[int, Record | DamagedError]]:
        """(number, record or what is wrong) for every object of `ids`: records as they are stored, not opened.

        Their checksums are checked, and no key is used. A patch is a record with a base, which is to be moved too.
        """
        found = self._many(kind, ids, self.index.find_many(ids), self._as_stored)
        return self._tried_again(kind, ids, self._as_stored, found)

    def opened(
        self, kind: RecordKind, ids: Ids, known: Mapping[bytes, Buffer] = _NO_BASES
    ) -> Iterator[tuple[int, Opened | DamagedError]]:
        """(number, what it holds or what is wrong) for every object of `ids`; see `chunks`.

        `known`: bytes that were found elsewhere, by the ids that they match; a patch that rests on them reads no base.
        """
        found = self._opened(kind, ids, self.index.find_many(ids), known)
        return self._tried_again(kind, ids, self._as_opened, found)

    def _opened(
        self, kind: RecordKind, ids: Ids, places: list[Place | None], known: Mapping[bytes, Buffer] = _NO_BASES
    ) -> Iterator[tuple[int, Opened | DamagedError]]:
        """(number, what it holds or what is wrong) for every object of `ids`.

        All is read once: what patches rest on lies among what is stored full, as a rule, and is read with it.
        """
        bases = dict[bytes, Buffer]()
        lacking = dict[bytes, None]()
        for place in places:
            if place is None or place.base is None:
                continue
            base = known.get(place.base) or self._bases[kind].get(place.base)
            if base is None:
                lacking[place.base] = None
            else:
                bases[place.base] = base
        base_ids = list(lacking)
        joined = ids_of(ids.tobytes() + b"".join(base_ids)) if base_ids else ids
        if base_ids:
            places = places + self.index.find_many_full(ids_of(b"".join(base_ids)))
        patches: list[tuple[int, _Patch]] = []
        for number, found in self._many(kind, joined, places, self._opened_or_patch):
            if isinstance(found, _Patch):
                patches.append((number, found))
            elif number < len(ids):
                yield number, found
            elif isinstance(found, Opened):
                base_id = base_ids[number - len(ids)]
                bases[base_id] = found.plain
                if kind == RecordKind.NODE:
                    self._bases[kind].put(base_id, found.plain)
        for number, patch in patches:
            try:
                opened = self._as_opened(kind, *patch, bases=bases)
            except DamagedError as error:
                yield number, error
            else:
                yield number, opened

    def _opened_or_patch(
        self, kind: RecordKind, object_id: bytes, place: Place, raw: memoryview, where: str
    ) -> Opened | _Patch:
        if place.base is not None:
            return _Patch(object_id, place, raw, where)
        return self._as_opened(kind, object_id, place, raw, where)

    def _tried_again(
        self, kind: RecordKind, ids: Ids, use: Use[Result], results: Iterator[tuple[int, Result | DamagedError]]
    ) -> Iterator[tuple[int, Result | DamagedError]]:
        """The results; of each object that was not where it should be, what `use` makes of it by a new index."""
        for number, found in results:
            if isinstance(found, DamagedError) and self.renew is not None:
                yield number, self._again(kind, ids[number : number + 1], use)
            else:
                yield number, found

    def _again(self, kind: RecordKind, one: Ids, use: Use[Result]) -> Result | DamagedError:
        def attempt() -> Result:
            (_, found), *_ = self._many(kind, one, self.index.find_many(one), use)
            if isinstance(found, DamagedError):
                raise found
            return found

        try:
            return self._renewing(attempt)
        except DamagedError as error:
            return error

    def _chunk_or_error(self, object_id: bytes) -> Buffer | DamagedError:
        try:
            return self._found(RecordKind.CHUNK, object_id)
        except DamagedError as error:
            return error

    def _many(
        self, kind: RecordKind, ids: Ids, places: list[Place | None], use: Use[Result]
    ) -> Iterator[tuple[int, Result | DamagedError]]:
        asked = self._asked(kind, places)
        for number in asked.lost:
            yield number, missing(kind, ids[number].tobytes())
        for run, read in zip(asked.runs, asked.reads, strict=True):
            yield from self._run(kind, run, read, ids, use)

    def _asked(self, kind: RecordKind, places: list[Place | None]) -> _Asked:
        """The reads that get these objects. Where there are threads, several are on their way at once."""
        lost = [number for number, place in enumerate(places) if place is None or place.kind != kind]
        wanted = [
            (place.pack, place.offset, number, place)
            for number, place in enumerate(places)
            if place is not None and place.kind == kind
        ]
        wanted.sort()
        runs = [*_runs(wanted, self.reach)]
        reads: list[Callable[[], bytes]] = [
            functools.partial(self._read, run.pack, run.start, run.length) for run in runs
        ]
        if self._hands is not None and len(runs) > 1:
            reads = [self._hands.submit(read).result for read in reads]
        return _Asked(lost, runs, reads)

    def _run(
        self, kind: RecordKind, run: _Run, read: Callable[[], bytes], ids: Ids, use: Use[Result]
    ) -> Iterator[tuple[int, Result | DamagedError]]:
        data: memoryview | None = None
        name = pack.name(run.pack, self.domain)
        # What is kept of a run keeps all of it in memory: only where that is little more.
        dense = 2 * sum(place.stored for *_, place in run.wanted) >= run.length
        # A run that cannot be read is read record by record, so that only what is damaged is missing.
        with contextlib.suppress(DamagedError):
            data = memoryview(read())
        for _, offset, number, place in run.wanted:
            object_id = ids[number].tobytes()
            try:
                if data is None:
                    raw = memoryview(self._read(place.pack, place.offset, place.stored))
                else:
                    raw = data[offset - run.start : offset - run.start + place.stored]
                    if not dense:
                        raw = memoryview(bytes(raw))
                found = use(kind, object_id, place, raw, f"{name} at {offset}")
            except DamagedError as error:
                yield number, error
            else:
                yield number, found

    def _object(self, kind: RecordKind, object_id: bytes, place: Place) -> Buffer:
        raw = self._read(place.pack, place.offset, place.stored)
        where = f"{pack.name(place.pack, self.domain)} at {place.offset}"
        return self._decoded(kind, object_id, place, memoryview(raw), where)

    def _read(self, pack_id: bytes, offset_bytes: int, length_bytes: int) -> bytes:
        """Bytes of a pack; a pack that is gone or a medium that fails is damage, a store that fails is not."""
        try:
            return self.store.get_range(pack.name(pack_id, self.domain), offset_bytes, length_bytes)
        except (NotFoundError, ReadError) as error:
            raise DamagedError(f"{error}; run `snapcore verify` to see what it hits") from error

    def _base(self, kind: RecordKind, base_id: bytes) -> Buffer:
        found = self._bases[kind].get(base_id)
        if found is None:
            # It may lie somewhere as a patch too: of two writers at once, one may have had something to compare with.
            place = self.index.find_full(base_id) or self.index.find_condemned(base_id, full=True)
            if place is None or place.kind != kind:
                raise missing(kind, base_id)
            found = self._object(kind, base_id, place)
            self._bases[kind].put(base_id, found)
        return found

    def _decoded(self, kind: RecordKind, object_id: bytes, place: Place, raw: memoryview, where: str) -> Buffer:
        return self._as_opened(kind, object_id, place, raw, where).plain

    def _as_stored(self, kind: RecordKind, object_id: bytes, place: Place, raw: memoryview, where: str) -> Record:
        head = self._header(kind, object_id, place, raw, where)
        payload = raw[record.HEADER_BYTES :]
        record.check_payload(head, payload, where)
        how = _CODECS.get(head.codec)
        if how is None:
            raise DamagedError(f"{where}: a payload has the unknown codec {head.codec}")
        header = raw[: record.HEADER_BYTES]
        return Record(kind, head.form, head.id, header, payload, how, head.plain_bytes, place.base)

    def _as_opened(
        self,
        kind: RecordKind,
        object_id: bytes,
        place: Place,
        raw: memoryview,
        where: str,
        bases: Mapping[bytes, Buffer] = _NO_BASES,
    ) -> Opened:
        head = self._header(kind, object_id, place, raw, where)
        payload = raw[record.HEADER_BYTES :]
        if head.form == Form.PATCH:
            return Opened(self.checked(kind, head, payload, where, bases), None)
        encoded, plain = record.payload_opened(head, payload, self._sizes[kind], where, self.domain)
        self._check(kind, head, plain, where)
        return Opened(plain, (_CODECS[head.codec], encoded))

    def _as_resting(self, kind: RecordKind, object_id: bytes, place: Place, raw: memoryview, where: str) -> Resting:
        head = self._header(kind, object_id, place, raw, where)
        size_bytes, unit_bytes = self._sizes[kind], UNIT_BYTES[kind]
        limit_bytes = record.patch_limit_bytes(size_bytes, unit_bytes)
        patch = record.payload_plain(head, raw[record.HEADER_BYTES :], limit_bytes, where, self.domain)
        base_id = record.patch_base(patch, where)
        if base_id != place.base:
            raise DamagedError(f"{where}: the patch rests on {base_id.hex()}, and the index names another base")
        return Resting(base_id, record.patch_mask(patch, size_bytes // unit_bytes, unit_bytes, where))

    @staticmethod
    def _header(kind: RecordKind, object_id: bytes, place: Place, raw: memoryview, where: str) -> record.RecordHeader:
        """The header of a record, when it is the one that the index names."""
        head = record.parse_header(raw, where)
        if head.id != object_id or head.kind != kind:
            raise DamagedError(f"{where}: the record of {head.id.hex()} where that of {object_id.hex()} belongs")
        if head.form != place.form:
            # Were a patch taken for a base, patches could rest on patches, and on themselves.
            raise DamagedError(f"{where}: the record of {head.id.hex()} has not the form that the index names")
        return head

    def checked(
        self,
        kind: RecordKind,
        head: record.RecordHeader,
        payload: Buffer,
        where: str,
        bases: Mapping[bytes, Buffer] = _NO_BASES,
    ) -> Buffer:
        """The object that a record holds, checked against its id.

        Parameters
        ----------
        bases : mapping of id to bytes
            Of what patches rest on, what is read and checked already.

        Raises
        ------
        DamagedError
        """
        size_bytes = self._sizes[kind]
        unit_bytes = UNIT_BYTES[kind]
        if head.form == Form.FULL:
            plain = record.payload_plain(head, payload, size_bytes, where, self.domain)
        else:
            limit_bytes = record.patch_limit_bytes(size_bytes, unit_bytes)
            patch = record.payload_plain(head, payload, limit_bytes, where, self.domain)
            base_id = record.patch_base(patch, where)
            base = bases.get(base_id) or self._base(kind, base_id)
            plain = record.apply_patch(patch, base, unit_bytes, where)
        self._check(kind, head, plain, where)
        return plain

    def _check(self, kind: RecordKind, head: record.RecordHeader, plain: Buffer, where: str) -> None:
        """DamagedError for bytes that are not what the id of the record says."""
        if len(plain) != self._sizes[kind]:
            raise DamagedError(f"{where}: {len(plain)} bytes where {self._sizes[kind]} belong")
        if self.identify(kind, plain) != head.id:
            raise DamagedError(f"{where}: the content of {head.id.hex()} does not match its id")

    def identify(self, kind: RecordKind, plain: Buffer) -> bytes:
        """The id of plain bytes."""
        if kind == RecordKind.CHUNK:
            return self.domain.chunk_id(plain)
        return self.domain.node_id(plain)


def _runs(wanted: list[_Wanted], reach: Reach) -> Iterator[_Run]:
    """What is sorted by pack and offset, in runs."""
    first = 0
    while first < len(wanted):
        pack_id, start, _, place = wanted[first]
        stop = start + place.stored
        lost = 0
        last = first + 1
        while last < len(wanted):
            next_pack, offset, _, place = wanted[last]
            gap = max(0, offset - stop)
            if next_pack != pack_id or offset + place.stored > start + reach.run_bytes:
                break
            if gap > _GAP_BYTES and (gap > reach.gap_bytes or 2 * (lost + gap) > stop - start + gap):
                break
            lost += gap
            stop = max(stop, offset + place.stored)
            last += 1
        yield _Run(pack_id, start, stop - start, wanted[first:last])
        first = last


def missing(kind: RecordKind, object_id: bytes) -> MissingObjectError:
    """The error for an object that no index object names."""
    return MissingObjectError(
        f"the {kind.name.lower()} {object_id.hex()} is in no pack that the index knows; "
        "run `snapcore repo rebuild-index`, then `snapcore verify`"
    )


class _Cache:
    """The most recently used objects, a fixed number of them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: OrderedDict[bytes, Buffer] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, object_id: bytes) -> Buffer | None:
        with self._lock:
            found = self._items.get(object_id)
            if found is not None:
                self._items.move_to_end(object_id)
            return found

    def put(self, object_id: bytes, plain: Buffer) -> None:
        with self._lock:
            self._items[object_id] = plain
            while len(self._items) > self._limit:
                self._items.popitem(last=False)
