"""Frees the space of what no snapshot reaches (docs/FORMAT.md, "Write order").

Packs without a reachable record go; of packs that are mostly dead the reachable records are moved, as they are stored,
into new packs. New packs and a new index are durable before the old index goes, and the old index is gone before any
pack goes, so every reachable record is findable at every instant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapcore.errors import DamagedError
from snapcore.progress import Meter, ProgressCallback
from snapcore.repository import codec, damage, index, pack, record, session, table
from snapcore.repository.context import Context
from snapcore.repository.index import Index
from snapcore.repository.manifest import Manifest
from snapcore.repository.marks import Marks
from snapcore.repository.objects import Objects
from snapcore.repository.pack import PackBuilder
from snapcore.repository.record import Record, RecordKind
from snapcore.repository.session import Session
from snapcore.repository.table import NO_BASE, Table

# A pack is written anew when most of it is dead. Others follow, the deadest first, while over a twentieth of the
# repository is dead, or as long as little has been moved: so small repositories end exact and large ones are spared.
_DEAD_SHARE = 0.5
_WASTE_SHARE = 0.05
_CHEAP_BYTES = 64 << 20
# Packs below this size are joined once they fill a whole one: each is a request to make and an object to pay for.
_SMALL_BYTES = pack.PACK_BYTES // 4
# More index objects than this are joined even when nothing is removed.
_INDEX_OBJECTS = 8


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection did.

    Attributes
    ----------
    freed_bytes : int
        By which the repository is smaller.
    removed_packs, rewritten_packs : int
        Packs that are gone, and how many of those had records moved out of them.
    live_bytes : int
        Of all packs that are left.
    """

    freed_bytes: int
    removed_packs: int
    rewritten_packs: int
    live_bytes: int


def collect(
    context: Context, snapshots: Callable[[], list[Manifest]], progress: ProgressCallback | None = None
) -> Collected:
    """Remove what no snapshot reaches; see `Repository.collect`. `snapshots` lists all, once nobody writes."""
    own = session.register(context.store, session.COLLECT, hidden=context.domain.sealing is not None)
    try:
        session.refuse_while_busy(context.store, own, session.CREATE, context.store.url)
        session.refuse_while_busy(context.store, own, session.COLLECT, context.store.url)
        return _Collection(context, own, snapshots()).run(progress)
    finally:
        session.withdraw(context.store, own)


class _Collection:
    """One collection, with nobody else writing."""

    def __init__(self, context: Context, own: Session, snapshots: list[Manifest]) -> None:
        self._own = own
        self._store = context.store
        self._domain = context.domain
        self._sizes = pack.sizes(self._store, self._domain)
        self._old_index = dict(index.listed(self._store, self._domain))
        known = context.index()
        adopted = self._adopt(known)
        self._objects = Objects(self._store, known, context.domain, context.config.chunk_bytes)
        marks = Marks(self._objects)
        for snapshot in snapshots:
            marks.add(snapshot)
        self._tables = known.tables()
        self._reached = marks.reached
        self._adopted = adopted
        self._freed_bytes = 0

    def _adopt(self, known: Index) -> bool:
        """Let the index know of packs that no index object names."""
        found = index.unindexed_packs(self._store, known.packs(), self._domain)
        for pack_id, size_bytes in found:
            known.add_table(pack.contents(self._store, pack_id, size_bytes, self._domain))
        return bool(found)

    def run(self, progress: ProgressCallback | None) -> Collected:
        """Steps 4 to 7 of the write order."""
        # A deletion whose process died may not be durable: its snapshot must not come back to find its packs gone.
        self._store.settle("")
        live, garbage = self._record_bytes()
        dead = {pack_id for pack_id in self._sizes if live[pack_id] == 0}
        moved_from = self._to_rewrite(live, garbage)
        meter = Meter(progress, "collect", sum(live[pack_id] for pack_id in moved_from))
        moved = self._rewrite(moved_from, meter)
        if dead or moved_from or self._adopted or len(self._old_index) > _INDEX_OBJECTS:
            self._replace_index(moved, dead | moved_from)
        for pack_id in sorted(dead | moved_from):
            session.check(self._store, self._own)
            self._store.delete(pack.name(pack_id, self._domain))
            self._freed_bytes += self._sizes[pack_id]
        self._forget_damage(dead | moved_from)
        self._freed_bytes += self._store.sweep()
        left = sum(pack.sizes(self._store, self._domain).values())
        return Collected(self._freed_bytes, len(dead | moved_from), len(moved_from), left)

    def _parts(self) -> Iterator[tuple[Table, npt.NDArray[np.bool]]]:
        """Every table with the marks of its entries."""
        start = 0
        for contents in self._tables:
            yield contents, self._reached[start : start + len(contents.entries)]
            start += len(contents.entries)

    def _record_bytes(self) -> tuple[dict[bytes, int], dict[bytes, int]]:
        """Bytes of the records of each pack: reachable ones, and others."""
        live = dict.fromkeys(self._sizes, 0)
        dead = dict.fromkeys(self._sizes, 0)
        for contents, reached in self._parts():
            for sums, chosen in ((live, reached), (dead, ~reached)):
                rows = contents.entries[chosen]
                counts = np.bincount(rows["pack"], weights=rows["stored"], minlength=len(contents.packs))
                for pack_id, stored in zip(contents.packs, counts.tolist(), strict=True):
                    sums[pack_id] = sums.get(pack_id, 0) + int(stored)
        return live, dead

    def _to_rewrite(self, live: dict[bytes, int], dead: dict[bytes, int]) -> set[bytes]:
        used = [pack_id for pack_id in self._sizes if live[pack_id]]
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

    def _rewrite(self, chosen: set[bytes], meter: Meter) -> list[Table]:
        """Move the reachable records of the chosen packs into new ones. Returns what lies in those."""
        builders: dict[int, PackBuilder] = {}
        written: list[Table] = []

        def finish(builder: PackBuilder) -> None:
            buffers, contents = builder.finish()
            self._freed_bytes -= self._store.put_new(builder.name, buffers)
            written.append(contents)

        for contents, reached in self._parts():
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

    def _replace_index(self, moved: list[Table], gone: set[bytes]) -> None:
        """Steps 5 and 6: the new index is there before the old one goes. Entries of packs that have vanished go too."""
        session.check(self._store, self._own)
        left = self._sizes.keys() - gone
        kept = []
        for contents, _ in self._parts():
            lost = [number for number, pack_id in enumerate(contents.packs) if pack_id not in left]
            kept.append(
                Table(contents.packs, contents.entries[~np.isin(contents.entries["pack"], lost)], contents.bases)
            )
        for part in table.split(table.merge([*kept, *moved])):
            _, size_bytes = index.write(self._store, part, self._domain)
            self._freed_bytes -= size_bytes
        for name, size_bytes in self._old_index.items():
            session.check(self._store, self._own)
            self._store.delete(name)
            self._freed_bytes += size_bytes

    def _forget_damage(self, gone: set[bytes]) -> None:
        marked = damage.load(self._store)
        left = [bad for bad in marked if bytes.fromhex(bad.pack) not in gone]
        if len(left) < len(marked):
            damage.replace(self._store, left)
