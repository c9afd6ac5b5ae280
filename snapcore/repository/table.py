"""Where records lie: the table in index objects and in the directories of packs (docs/FORMAT.md, "The table")."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapcore.errors import DamagedError
from snapcore.persist import Buffer
from snapcore.repository.domain import ID_BYTES
from snapcore.repository.record import (
    CHUNK_UNIT_BYTES,
    HEADER_BYTES,
    Form,
    Record,
    RecordKind,
    patch_limit_bytes,
)

FENCE_ENTRIES = 64
ENTRY_LIMIT = 1 << 18
NO_BASE = 0xFFFFFFFF
PACK_ID_BYTES = 16
# Nothing that is stored is longer than a patch of the largest chunk (4 MiB) that changes all of it.
STORED_LIMIT_BYTES = HEADER_BYTES + patch_limit_bytes(4 << 20, CHUNK_UNIT_BYTES)

ENTRY = np.dtype(
    [
        ("key", "<u8"),
        ("rest", "V24"),
        ("pack", "<u4"),
        ("offset", "<u4"),
        ("stored", "<u4"),
        ("plain", "<u4"),
        ("kind", "u1"),
        ("form", "u1"),
        ("codec", "u1"),
        ("zero", "u1"),
        ("base", "<u4"),
    ]
)
_HEADER = struct.Struct("<QIIII")
# An entry as ENTRY has it: key and rest are the id.
_ROW = struct.Struct("<32sIIIIBBBBI")

Entries = npt.NDArray[np.void]
Ids = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Table:
    """Entries sorted by key, the packs they lie in, and the bases that patches name.

    Attributes
    ----------
    packs : tuple of bytes
        Pack ids, 16 bytes each.
    entries : structured array of shape (n,), dtype ENTRY
    bases : V32 array of shape (b,)
    """

    packs: tuple[bytes, ...]
    entries: Entries
    bases: Ids

    def ids(self) -> Ids:
        """The ids of all entries: V32 array of shape (n,)."""
        return entry_ids(self.entries)

    def to_bytes(self) -> bytes:
        """The table as it is stored."""
        count = len(self.entries)
        head = _HEADER.pack(count, len(self.packs), len(self.bases), FENCE_ENTRIES, 0)
        fence = np.ascontiguousarray(self.entries["key"][::FENCE_ENTRIES])
        return b"".join((head, *self.packs, fence.tobytes(), self.entries.tobytes(), self.bases.tobytes()))


def entry_ids(entries: Entries) -> Ids:
    """Ids of entries: V32 array of shape (n,)."""
    head = np.zeros(len(entries), dtype=[("key", "<u8"), ("rest", "V24")])
    head["key"] = entries["key"]
    head["rest"] = entries["rest"]
    return head.view("V32")


def id_keys(ids: Ids) -> npt.NDArray[np.uint64]:
    """First 8 bytes of each id as a number, the key that entries are sorted by."""
    return np.frombuffer(ids.tobytes(), dtype="<u8")[::4].copy()


def ids_of(joined: bytes | bytearray) -> Ids:
    """V32 array of ids that stand one behind the other."""
    return np.frombuffer(joined, dtype="V32")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a stored table begin, checked against its length."""

    count: int
    packs_at: int
    pack_count: int
    fence_at: int
    entries_at: int
    bases_at: int
    base_count: int


def layout(head: Buffer, total_bytes: int, where: str) -> Layout:
    """Parts of a table of `total_bytes` bytes that begins with `head`."""
    if len(head) < _HEADER.size:
        raise DamagedError(f"{where}: a table of {len(head)} bytes")
    count, packs, bases, fence, zero = _HEADER.unpack_from(head)
    if fence != FENCE_ENTRIES or zero or count > ENTRY_LIMIT or packs > count or bases > count:
        raise DamagedError(f"{where}: a table of {count} entries, {packs} packs, {bases} bases, fence {fence}")
    fence_at = _HEADER.size + packs * PACK_ID_BYTES
    entries_at = fence_at + -(-count // FENCE_ENTRIES) * 8
    bases_at = entries_at + count * ENTRY.itemsize
    if bases_at + bases * ID_BYTES != total_bytes:
        raise DamagedError(f"{where}: a table of {count} entries does not fit into {total_bytes} bytes")
    return Layout(count, _HEADER.size, packs, fence_at, entries_at, bases_at, bases)


def parse(data: Buffer, where: str) -> Table:
    """Check and read a whole table; every field of every entry is within its bounds afterwards."""
    found = layout(data, len(data), where)
    packs = parse_packs(data, found)
    entries = np.frombuffer(data, dtype=ENTRY, count=found.count, offset=found.entries_at)
    bases = np.frombuffer(data, dtype="V32", count=found.base_count, offset=found.bases_at)
    if (entries["key"][1:] < entries["key"][:-1]).any():
        raise DamagedError(f"{where}: entries out of order")
    check_entries(entries, found, where)
    return Table(packs, entries, bases)


def parse_packs(data: Buffer, found: Layout) -> tuple[bytes, ...]:
    """The pack ids of a stored table."""
    starts = range(found.packs_at, found.fence_at, PACK_ID_BYTES)
    return tuple(bytes(data[start : start + PACK_ID_BYTES]) for start in starts)


def check_entries(entries: Entries, found: Layout, where: str) -> None:
    """DamagedError unless every field of every entry is within its bounds."""
    patch = entries["form"] == Form.PATCH
    right = (
        (entries["pack"] < found.pack_count)
        & (entries["stored"] >= HEADER_BYTES)
        & (entries["stored"] <= STORED_LIMIT_BYTES)
        & ((entries["kind"] == RecordKind.CHUNK) | (entries["kind"] == RecordKind.NODE))
        & (entries["form"] <= Form.PATCH)
        & np.where(patch, entries["base"] < found.base_count, entries["base"] == NO_BASE)
    )
    if not right.all():
        bad = int(np.flatnonzero(~right)[0])
        raise DamagedError(f"{where}: entry {bad} of the table has a field out of its bounds")


class TableBuilder:
    """Collects (record, pack, offset) and makes a sorted table of them."""

    def __init__(self) -> None:
        self._packs: dict[bytes, int] = {}
        self._bases: dict[bytes, int] = {}
        self._rows = bytearray()

    def __len__(self) -> int:
        return len(self._rows) // _ROW.size

    def add(self, record: Record, pack: bytes, offset_bytes: int) -> None:
        """Note where a record lies."""
        base = NO_BASE
        if record.base is not None:
            base = self._bases.setdefault(record.base, len(self._bases))
        self._rows += _ROW.pack(
            record.id,
            self._packs.setdefault(pack, len(self._packs)),
            offset_bytes,
            record.stored_bytes,
            record.plain_bytes,
            record.kind,
            record.form,
            record.codec,
            0,
            base,
        )

    def table(self) -> Table:
        """What was noted, sorted by key."""
        rows = np.frombuffer(bytes(self._rows), dtype=ENTRY)
        order = np.argsort(rows["key"], kind="stable")
        return Table(tuple(self._packs), rows[order], ids_of(b"".join(self._bases)))


def merge(tables: list[Table]) -> Table:
    """One table with the entries of all; of several entries for one id and place, one stays."""
    packs: dict[bytes, int] = {}
    bases: dict[bytes, int] = {}
    parts = []
    for table in tables:
        pack_places = np.array([packs.setdefault(pack, len(packs)) for pack in table.packs], dtype=np.uint32)
        base_places = np.array([bases.setdefault(base.tobytes(), len(bases)) for base in table.bases], dtype=np.uint32)
        part = table.entries.copy()
        if len(part):
            part["pack"] = pack_places[part["pack"]]
        patch = part["base"] != NO_BASE
        if patch.any():
            part["base"][patch] = base_places[part["base"][patch]]
        parts.append(part)
    rows = np.concatenate(parts) if parts else np.empty(0, dtype=ENTRY)
    # Keys are the beginnings of hashes: as a rule all are different, and then the other columns need not be looked at.
    rows = rows[np.argsort(rows["key"], kind="stable")]
    if (rows["key"][1:] == rows["key"][:-1]).any():
        rows = rows[np.lexsort((rows["offset"], rows["pack"], rows["key"]))]
        rows = rows[np.concatenate(([True], rows[1:] != rows[:-1]))]
    return Table(tuple(packs), rows, ids_of(b"".join(bases)))


def split(table: Table, limit: int = ENTRY_LIMIT) -> list[Table]:
    """The table as tables of at most `limit` entries each, by ranges of keys, with the packs and bases they need."""
    parts = []
    for start in range(0, len(table.entries), limit):
        rows = table.entries[start : start + limit].copy()
        used_packs, rows["pack"] = np.unique(rows["pack"], return_inverse=True)
        patch = rows["base"] != NO_BASE
        used_bases, places = np.unique(rows["base"][patch], return_inverse=True)
        rows["base"][patch] = places
        packs = tuple(table.packs[place] for place in used_packs)
        parts.append(Table(packs, rows, table.bases[used_bases]))
    return parts
