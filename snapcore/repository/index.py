"""Where every record lies: a look-up by id over all index objects, in bounded memory.

Small index objects are kept whole, up to `RESIDENT_ENTRIES` entries (64 bytes each); of larger ones only the fences
stay in memory, and a look-up reads the 64 entries behind one; the pages that were used last are kept. What the own
session has stored since its last index object is in a dict. Reading is safe from many threads; `add` belongs to one.

What cannot be read counts as missing, so that it is stored again: records that a verify marked as damaged,
records of packs that are away, and patches whose base is nowhere in full. The latter two are no
damage: a collection keeps packs that hold dead patches, and a writer whose session was ended may write its index
object after its packs, or the bases of its patches, were collected.

Which packs are away depends on who asks (`Index.load`): a writer goes by the generation that it has seen and trusts the
index objects that count in it; whoever only reads takes all index objects, for what is read is checked.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from snapcore.errors import DamagedError, Error, NotFoundError, ReadError, StoreError, UnsupportedFormatError
from snapcore.repository import envelope, pack, table
from snapcore.repository.domain import ID_BYTES, PLAIN, Domain
from snapcore.repository.envelope import Kind
from snapcore.repository.generations import Generation
from snapcore.repository.table import ENTRY, FENCE_ENTRIES, NO_BASE, PACK_ID_BYTES, Entries, Ids, Table
from snapcore.store.interface import Store

PREFIX = "index/"
RESIDENT_ENTRIES = 1 << 19
# Of at most 3.7 kB each.
_PAGES_KEPT = 4096
_BASES_PAGE = 64
_HEAD_BYTES = 4096
_VALUES = ["rest", "pack", "offset", "stored", "plain", "kind", "form", "base"]

# Small index objects that a writer leaves alone, and how many it leaves when it merges.
MERGE_ABOVE = 32
_MERGE_TO = 8
_LOADS = 5

_OF_SEALED_DOMAIN = re.compile(r"index/[0-9a-f]{32}/(?:[0-9a-f]{8}-)?[0-9a-f]{32}")
_TAIL = re.compile(r"(?:([0-9a-f]{8})-)?([0-9a-f]{32})")

BadPlaces = frozenset[tuple[bytes, int]]
Answer = TypeVar("Answer")


class Place(NamedTuple):
    """Where a record lies.

    Attributes
    ----------
    slot : int
        Number of the entry among all index objects; -1 for what the own session has just stored.
    pack, base : bytes
        Pack id (16), id of the base (32) or None.
    offset, stored, plain : int
        Bytes: offset in the pack, whole length of the record, length of the payload after decoding.
    kind, form : int
        RecordKind, Form.
    """

    slot: int
    pack: bytes
    offset: int
    stored: int
    plain: int
    kind: int
    form: int
    base: bytes | None


class ReplacedError(DamagedError):
    """An index object has gone while it was in use: another one stands in its place."""


class _Unreadable:
    """Places that count as missing: marked ones, and those in packs that are away."""

    __slots__ = ("away", "marked")

    def __init__(self, marked: BadPlaces, away: frozenset[bytes] = frozenset()) -> None:
        self.marked = marked
        self.away = away

    def __contains__(self, place: tuple[bytes, int]) -> bool:
        return place[0] in self.away or place in self.marked


class _Resident:
    """A table kept in memory."""

    def __init__(self, contents: Table, first_slot: int) -> None:
        self._table = contents
        self._keys = np.ascontiguousarray(contents.entries["key"])
        self.first_slot = first_slot
        self.entries = len(contents.entries)

    def places(self, wanted: bytes, bad: _Unreadable) -> Iterator[Place]:
        """Every place of an object, but the bad ones."""
        key = int.from_bytes(wanted[:8], "little")
        row = int(np.searchsorted(self._keys, np.uint64(key)))
        found = self._table
        return _matches(found.entries, row, wanted, key, found.packs, self._base, self.first_slot, bad)

    def find_many(self, ids: Ids, keys: npt.NDArray[np.uint64], places: list[Place | None], bad: _Unreadable) -> None:
        """Fill in where `places` is still None; one search for all keys."""
        if self.entries == 0:
            return
        rows = np.minimum(np.searchsorted(self._keys, keys), self.entries - 1)
        hits = np.flatnonzero(self._keys[rows] == keys)
        found = self._table
        values = found.entries[rows[hits]][_VALUES].tolist()
        for number, row, value in zip(hits.tolist(), rows[hits].tolist(), values, strict=True):
            if places[number] is not None:
                continue
            rest, pack_place, offset, stored, plain, kind, form, base = value
            wanted = ids[number].tobytes()
            pack_id = found.packs[pack_place]
            if rest != wanted[8:] or (pack_id, offset) in bad:
                places[number] = next(self.places(wanted, bad), None)
                continue
            base_id = None if base == NO_BASE else self._base(base)
            places[number] = Place(self.first_slot + row, pack_id, offset, stored, plain, kind, form, base_id)

    def packs(self) -> tuple[bytes, ...]:
        """Ids of the packs that entries name."""
        return self._table.packs

    def all_entries(self) -> Table:
        return self._table

    def _base(self, number: int) -> bytes:
        return self._table.bases[number : number + 1].tobytes()


class _Pages:
    """The pages of all index objects that were used last, a fixed number of them."""

    def __init__(self) -> None:
        self._pages: OrderedDict[tuple[str, int], npt.NDArray[np.void]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str, offset_bytes: int, read: Callable[[], npt.NDArray[np.void]]) -> npt.NDArray[np.void]:
        """The page at an offset of an object; `read` gives it when it is not here."""
        key = name, offset_bytes
        with self._lock:
            page = self._pages.get(key)
            if page is not None:
                self._pages.move_to_end(key)
                return page
        try:
            page = read()
        except NotFoundError as error:
            raise ReplacedError(f"{error}; another one has taken its place meanwhile, try again") from error
        with self._lock:
            self._pages[key] = page
            while len(self._pages) > _PAGES_KEPT:
                self._pages.popitem(last=False)
        return page


class _Paged:
    """An index object of which only the fence is in memory; 64 entries are read at a time and checked."""

    def __init__(
        self, store: Store, name: str, size_bytes: int, first_slot: int, pages: _Pages, domain: Domain
    ) -> None:
        self._store = store
        self._domain = domain
        self._pages = pages
        self._name = name
        self._body = envelope.Body(store, name, size_bytes, _tail(name, domain)[1], domain)
        self.first_slot = first_slot
        body_bytes = self._body.length_bytes
        self._layout = table.layout(self._read(0, min(_HEAD_BYTES, body_bytes)), body_bytes, name)
        self.entries = self._layout.count
        found = self._layout
        head = self._read(0, found.entries_at)
        self._packs = table.parse_packs(head, found)
        self._fence = np.frombuffer(head, dtype="<u8", offset=found.fence_at)

    def _read(self, offset_bytes: int, length_bytes: int) -> bytes:
        return self._body.read(offset_bytes, length_bytes)

    def _page(self, number: int) -> Entries:
        start = number * FENCE_ENTRIES
        # One entry more than the fence stands for: equal keys may cross a page's border.
        count = min(FENCE_ENTRIES + 1, self.entries - start)
        offset_bytes = self._layout.entries_at + start * ENTRY.itemsize

        def read() -> Entries:
            page = np.frombuffer(self._read(offset_bytes, count * ENTRY.itemsize), dtype=ENTRY)
            table.check_entries(page, self._layout, self._name)
            return page

        return self._pages.get(self._name, offset_bytes, read)

    def _base(self, number: int) -> bytes:
        start = number - number % _BASES_PAGE
        count = min(_BASES_PAGE, self._layout.base_count - start)
        offset_bytes = self._layout.bases_at + start * ID_BYTES
        page = self._pages.get(
            self._name, offset_bytes, lambda: table.ids_of(self._read(offset_bytes, count * ID_BYTES))
        )
        return page[number - start : number - start + 1].tobytes()

    def places(self, wanted: bytes, bad: _Unreadable) -> Iterator[Place]:
        """Every place of an object, but the bad ones."""
        key = int.from_bytes(wanted[:8], "little")
        number = max(int(np.searchsorted(self._fence, np.uint64(key), side="left")) - 1, 0)
        while number < len(self._fence) and int(self._fence[number]) <= key:
            page = self._page(number)
            row = int(np.searchsorted(page["key"], np.uint64(key)))
            slot = self.first_slot + number * FENCE_ENTRIES
            yield from _matches(page, row, wanted, key, self._packs, self._base, slot, bad)
            number += 1

    def find_many(self, ids: Ids, keys: npt.NDArray[np.uint64], places: list[Place | None], bad: _Unreadable) -> None:
        """Fill in where `places` is still None; a page a look-up."""
        del keys
        for number, place in enumerate(places):
            if place is None:
                places[number] = next(self.places(ids[number].tobytes(), bad), None)

    def packs(self) -> tuple[bytes, ...]:
        """Ids of the packs that entries name."""
        return self._packs

    def all_entries(self) -> Table:
        return load(self._store, self._name, self._domain)


def _matches(
    entries: Entries,
    row: int,
    wanted: bytes,
    key: int,
    packs: tuple[bytes, ...],
    base_id: Callable[[int], bytes],
    first_slot: int,
    bad: _Unreadable,
) -> Iterator[Place]:
    rest = wanted[8:]
    while row < len(entries):
        entry = entries[row]
        if int(entry["key"]) != key:
            return
        pack_id = packs[entry["pack"]]
        if entry["rest"].tobytes() == rest and (pack_id, int(entry["offset"])) not in bad:
            base = int(entry["base"])
            yield Place(
                first_slot + row,
                pack_id,
                int(entry["offset"]),
                int(entry["stored"]),
                int(entry["plain"]),
                int(entry["kind"]),
                int(entry["form"]),
                None if base == NO_BASE else base_id(base),
            )
        row += 1


class Index:
    """All index objects of a domain and what the own session adds."""

    def __init__(self, store: Store, bad: BadPlaces = frozenset(), domain: Domain = PLAIN) -> None:
        self._store = store
        self._domain = domain
        self._parts: list[_Resident | _Paged] = []
        self._pages = _Pages()
        self._new: dict[bytes, Place] = {}
        self._bad = _Unreadable(bad)
        self._doomed: _Unreadable | None = None
        self._again: Callable[[], Index] | None = None
        self._taken_up: list[Table] = []
        self._renewal = threading.Lock()
        self._resident = 0
        self.slots = 0
        self.names: frozenset[str] = frozenset()

    @classmethod
    def load(
        cls,
        store: Store,
        bad: BadPlaces = frozenset(),
        damaged: Callable[[str, Error], None] | None = None,
        domain: Domain = PLAIN,
        *,
        seen: Generation | None = None,
        there: Callable[[], Iterable[bytes]] | None = None,
    ) -> Index:
        """The index objects of a domain that the store lists.

        Parameters
        ----------
        bad : frozenset of (pack id, offset)
            Records that count as missing.
        damaged : callable, optional
            Is told of index objects that cannot be read; without it the first one is an error. The checksums of
            large ones, of which a look-up reads a part only, are checked then too.
        domain : Domain
        seen : Generation, optional
            Of a writer: only index objects that count in it, without the packs that are away in it. When index
            objects go while they are in use, the index is loaded anew.
        there : callable, optional
            Ids of all packs that are there; records of others are missing. Asked after the index objects were
            listed: a pack is there before an index object names it.
        """
        for _ in range(_LOADS):
            index = cls(store, bad, domain)
            if seen is not None:
                index._again = lambda: cls.load(store, bad, damaged, domain, seen=seen, there=there)
            try:
                index._read_all(damaged, seen)
            except (NotFoundError, ReplacedError):
                # Another one has taken its place.
                continue
            if there is not None:
                index._bad.away = frozenset(index.packs().difference(there()))
            elif seen is not None:
                index._bad.away = seen.away
                index._doomed = _Unreadable(bad, seen.doomed)
            return index
        raise StoreError(f"the index of {store.url} is replaced all the time; try again later")

    def _read_all(self, damaged: Callable[[str, Error], None] | None, seen: Generation | None) -> None:
        store, domain = self._store, self._domain
        found = sorted(listed(store, domain), key=lambda item: (item[1], item[0]))
        if seen is not None:
            found = [item for item in found if counts(item[0], domain, seen)]
        self.names = frozenset(name for name, _ in found)
        small: list[Table] = []
        for name, size_bytes in found:
            entries = size_bytes // ENTRY.itemsize
            try:
                if self._resident + entries <= RESIDENT_ENTRIES:
                    small.append(load(store, name, domain))
                    self._resident += len(small[-1].entries)
                else:
                    if damaged is not None:
                        load(store, name, domain)
                    self._add_part(_Paged(store, name, size_bytes, self.slots, self._pages, domain))
            except (DamagedError, ReadError, UnsupportedFormatError) as error:
                if damaged is None or isinstance(error, ReplacedError):
                    raise
                damaged(name, error)
        if small:
            # Many small objects cost a look-up each: one table of them all costs one.
            self._add_part(_Resident(table.merge(small), self.slots))

    def without(self, away: Iterable[bytes]) -> Index:
        """The same entries and slots, with the records of these packs, and of those that were away, missing."""
        other = Index(self._store, self._bad.marked, self._domain)
        other._parts, other._pages, other.slots, other.names = self._parts, self._pages, self.slots, self.names
        other._bad.away = self._bad.away | frozenset(away)
        return other

    @property
    def away(self) -> frozenset[bytes]:
        """Packs whose records count as missing."""
        return self._bad.away

    def _add_part(self, part: _Resident | _Paged) -> None:
        self._parts.append(part)
        self.slots += part.entries

    def add_table(self, contents: Table) -> None:
        """Take up what lies in packs that no index object names."""
        self._taken_up.append(contents)
        self._add_part(_Resident(contents, self.slots))

    def add(self, record_id: bytes, place: Place) -> None:
        """Note what the own session has stored."""
        self._new[record_id] = place

    def is_new(self, record_id: bytes) -> bool:
        """Whether the own session has stored it since its last index object."""
        return record_id in self._new

    def written(self, name: str, contents: Table, size_bytes: int) -> None:
        """The own session's entries are in an index object now and leave the dict."""
        if self._resident + len(contents.entries) <= RESIDENT_ENTRIES:
            self._resident += len(contents.entries)
            self._add_part(_Resident(contents, self.slots))
        else:
            self._add_part(_Paged(self._store, name, size_bytes, self.slots, self._pages, self._domain))
        for record_id in contents.ids():
            self._new.pop(record_id.tobytes(), None)

    def find(self, record_id: bytes) -> Place | None:
        """Where a record lies, full or as a patch whose base is there; None when it is nowhere."""
        return self._renewing(lambda: self._find(record_id))

    def _find(self, record_id: bytes) -> Place | None:
        for place in self._places(record_id):
            if place.base is None or self.find_full(place.base) is not None:
                return place
        return None

    def find_full(self, record_id: bytes) -> Place | None:
        """Where a record lies in full, as the base of a patch must; None when it does nowhere."""
        return self._renewing(lambda: next((place for place in self._places(record_id) if place.base is None), None))

    def find_condemned(self, record_id: bytes, *, full: bool = False) -> Place | None:
        """Where a writer may read what it may not rely on: in a pack that is condemned, and that its parent may need.

        All that a parent reaches stays until the writer has ended; but what rests on it must not be stored.
        """
        bad = self._doomed
        if bad is None:
            return None

        def look() -> Place | None:
            places = (place for part in self._parts for place in part.places(record_id, bad))
            return next((place for place in places if not full or place.base is None), None)

        return self._renewing(look)

    def _places(self, record_id: bytes) -> Iterator[Place]:
        place = self._new.get(record_id)
        if place is not None:
            yield place
        for part in self._parts:
            yield from part.places(record_id, self._bad)

    def find_many(self, ids: Ids) -> list[Place | None]:
        """Where records lie, in the order of `ids` (V32 array of shape (n,)); see `find`."""
        places = self._first_places(ids)
        bases = list({place.base for place in places if place is not None and place.base is not None})
        if bases:
            full = self.find_many_full(table.ids_of(b"".join(bases)))
            lost = {base for base, place in zip(bases, full, strict=True) if place is None}
            for number, place in enumerate(places):
                if place is not None and place.base in lost:
                    places[number] = self.find(ids[number].tobytes())
        return places

    def find_many_full(self, ids: Ids) -> list[Place | None]:
        """Where records lie in full, in the order of `ids`; see `find_full`."""
        places = self._first_places(ids)
        for number, place in enumerate(places):
            if place is not None and place.base is not None:
                places[number] = self.find_full(ids[number].tobytes())
        return places

    def _first_places(self, ids: Ids) -> list[Place | None]:
        return self._renewing(lambda: self._look_up(ids))

    def _look_up(self, ids: Ids) -> list[Place | None]:
        places: list[Place | None] = [None] * len(ids)
        if self._new:
            joined = ids.tobytes()
            places = [self._new.get(joined[start : start + ID_BYTES]) for start in range(0, len(joined), ID_BYTES)]
        keys = table.id_keys(ids)
        for part in self._parts:
            part.find_many(ids, keys, places, self._bad)
        return places

    def _renewing(self, question: Callable[[], Answer]) -> Answer:
        """The answer, by the index objects of now when one of those in use has gone. Slots change then."""
        for _ in range(_LOADS):
            parts = self._parts
            try:
                return question()
            except ReplacedError:
                if self._again is None:
                    raise
                with self._renewal:
                    if self._parts is parts:
                        self._renew(self._again())
        return question()

    def _renew(self, fresh: Index) -> None:
        for contents in self._taken_up:
            fresh._add_part(_Resident(contents, fresh.slots))
        self.slots, self.names, self._resident, self._pages = fresh.slots, fresh.names, fresh._resident, fresh._pages
        self._bad, self._doomed = fresh._bad, fresh._doomed
        self._parts = fresh._parts

    def packs(self) -> set[bytes]:
        """Ids of all packs that an entry names."""
        return {pack_id for contents in self.tables() for pack_id in contents.packs}

    def tables(self) -> list[Table]:
        """All tables, in the order of their slots. Larger than memory allows for very large repositories."""
        try:
            return [part.all_entries() for part in self._parts]
        except NotFoundError as error:
            raise ReplacedError(f"{error}; another one has taken its place meanwhile, try again") from error


def listed(store: Store, domain: Domain = PLAIN) -> list[tuple[str, int]]:
    """(name, size in bytes) of every index object of a domain; of the plain one, also of what has another name."""
    found = store.list(PREFIX + domain.folder)
    return [item for item in found if domain.folder or not _OF_SEALED_DOMAIN.fullmatch(item[0])]


def has_old_names(store: Store, domain: Domain) -> bool:
    """Whether there are index objects of before generations."""
    return any(len(name.rpartition("/")[2]) == 2 * PACK_ID_BYTES for name, _ in listed(store, domain))


def _tail(name: str, domain: Domain) -> tuple[int, bytes]:
    """What the name of an index object says: the generation that its writer had seen, and its id."""
    match = _TAIL.fullmatch(name.removeprefix(PREFIX + domain.folder))
    if match is None:
        raise DamagedError(f"{name} is no name of an index object; remove it")
    return int(match[1] or "0", 16), bytes.fromhex(match[2])


def counts(name: str, domain: Domain, seen: Generation) -> bool:
    """Whether a writer that has seen a generation trusts an index object (docs/FORMAT.md, "Write order")."""
    tail = name.removeprefix(PREFIX + domain.folder)
    return tail in seen.index or _tail(name, domain)[0] >= seen.number - 1


def load(store: Store, name: str, domain: Domain = PLAIN) -> Table:
    """Read one index object whole and check it."""
    _, object_id = _tail(name, domain)
    data = store.get(name, envelope.OBJECT_LIMIT_BYTES)
    kind, _, body = envelope.opened(data, name, object_id, domain)
    envelope.expect(kind, Kind.INDEX, name)
    return table.parse(body, name)


def write(store: Store, contents: Table, domain: Domain = PLAIN, seen: int = 0) -> tuple[str, int]:
    """Store one index object of who has seen generation `seen`. Returns its name and size in bytes."""
    object_id = secrets.token_bytes(PACK_ID_BYTES)
    name = f"{PREFIX}{domain.folder}{seen:08x}-{object_id.hex()}"
    return name, store.put_new(name, [envelope.sealed(Kind.INDEX, object_id, contents.to_bytes(), domain)])


def without_packs(contents: Table, away: Iterable[bytes]) -> Table:
    """A table without the entries of these packs."""
    lost = set(away)
    places = [number for number, pack_id in enumerate(contents.packs) if pack_id in lost]
    if not places:
        return contents
    return Table(contents.packs, contents.entries[~np.isin(contents.entries["pack"], places)], contents.bases)


def merge_small(store: Store, domain: Domain, seen: Generation) -> int:
    """Step "merge" of a writer: when there are many small index objects, make one of the smallest. Returns how many.

    The merged one is there before the others go. It holds entries of condemned packs too, which may be spared, but none
    of doomed ones. Each turn takes the smallest ones, so that an entry is written again some log2 times in all.
    """
    most_bytes = ENTRY.itemsize * table.ENTRY_LIMIT
    found = [item for item in listed(store, domain) if counts(item[0], domain, seen) and item[1] < most_bytes // 2]
    if len(found) <= MERGE_ABOVE:
        return 0
    found.sort(key=lambda item: (item[1], item[0]))
    chosen: list[str] = []
    total_bytes = 0
    for name, size_bytes in found:
        if total_bytes + size_bytes > most_bytes or (
            len(found) - len(chosen) <= _MERGE_TO and size_bytes > total_bytes
        ):
            break
        chosen.append(name)
        total_bytes += size_bytes
    try:
        tables = [without_packs(load(store, name, domain), seen.doomed) for name in chosen]
    except NotFoundError:
        # Somebody else is at it.
        return 0
    for part in table.split(table.merge(tables)):
        write(store, part, domain, seen.number)
    for name in chosen:
        with contextlib.suppress(NotFoundError):
            store.delete(name)
    return len(chosen)


def unindexed_packs(store: Store, known: set[bytes], domain: Domain = PLAIN) -> list[tuple[bytes, int]]:
    """(id, size in bytes) of packs of a domain in the store that no entry names."""
    sizes = pack.sizes(store, domain)
    return [(pack_id, size_bytes) for pack_id, size_bytes in sizes.items() if pack_id not in known]
