"""Stores records: collects them into packs, uploads packs in the background, and writes index objects behind them.

The write order is packs, then index (docs/FORMAT.md, "Write order"). Records are readable at once, from the pack in
the making too. Memory: the packs being filled (one for chunks, one for nodes), `_UPLOADS` packs under way, and the
entries since the last index object. All methods belong to one thread; only `reader` is for many.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from snapcore.persist import Buffer
from snapcore.repository import codec, index, pack, record, table
from snapcore.repository.index import Index, Place
from snapcore.repository.objects import Base, Objects
from snapcore.repository.pack import PackBuilder
from snapcore.repository.record import Content, Record, RecordKind
from snapcore.repository.table import Table, ids_of
from snapcore.store.interface import Reader, Store

_UPLOADS = 2
# 2**16 entries stand for 4 GiB of chunks of 64 KiB, and for some 30 MB of Python objects.
_INDEX_ENTRIES = 1 << 16
# Behind this many packs an index object is written, so that of an interrupted upload only few packs are named nowhere.
_INDEX_PACKS = 8


class PendingReader:
    """Reads packs from the store, and those that are not there yet from memory."""

    def __init__(self, store: Reader) -> None:
        self._store = store
        self.pending: dict[str, PackBuilder] = {}

    def get(self, name: str, limit_bytes: int) -> bytes:
        return self._store.get(name, limit_bytes)

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        builder = self.pending.get(name)
        if builder is not None:
            return builder.record_at(offset_bytes)[:length_bytes]
        return self._store.get_range(name, offset_bytes, length_bytes)

    def size(self, name: str) -> int:
        return self._store.size(name)


class Storer:
    """Puts records into a repository.

    Parameters
    ----------
    store : Store
    known : Index
        Is told of every record that is put.
    objects : Objects
        Reads through `reader`; gives the bases of node patches.
    reader : PendingReader
    compression : str
    seen : int
        Number of the generation that the session has seen.
    """

    def __init__(
        self, store: Store, known: Index, objects: Objects, reader: PendingReader, compression: str, seen: int
    ) -> None:
        self._store = store
        self._index = known
        self._objects = objects
        self._reader = reader
        self._domain = objects.domain
        self._compression = codec.check_compression(compression)
        self._builders: dict[RecordKind, PackBuilder] = {}
        self._executor = ThreadPoolExecutor(_UPLOADS, thread_name_prefix="snapcore-upload")
        self._uploads: deque[tuple[Future[int], PackBuilder, Table]] = deque()
        self._tables: list[Table] = []
        self._entries = 0
        self._seen = seen
        self.new_bytes = 0
        self.stored_bytes = 0

    def put(self, items: list[Record]) -> None:
        """Store records, except those whose objects are stored already."""
        places = self._index.find_many(ids_of(b"".join(item.id for item in items)))
        for item, place in zip(items, places, strict=True):
            if place is None and not self._index.is_new(item.id):
                self._append(item)

    def _append(self, item: Record) -> None:
        builder = self._builders.get(item.kind)
        if builder is None:
            builder = self._builders[item.kind] = PackBuilder(self._domain)
            self._reader.pending[builder.name] = builder
        offset_bytes = builder.add(item)
        place = Place(
            -1, builder.id, offset_bytes, item.stored_bytes, item.plain_bytes, item.kind, item.form, item.base
        )
        self._index.add(item.id, place)
        self.new_bytes += item.plain_bytes
        if builder.size_bytes >= pack.PACK_BYTES:
            self._upload(item.kind)

    def put_node(self, plain: Buffer, old_id: bytes) -> bytes:
        """Store a tree node, as a patch of what stood in its place where that is shorter. Returns its id."""
        node_id = self._objects.domain.node_id(plain)
        if self._index.find(node_id) is None:
            base = self._objects.bases(RecordKind.NODE, ids_of(old_id))[0] if any(old_id) else None
            found = content(RecordKind.NODE, node_id, plain, base)
            self._append(record.make_many(RecordKind.NODE, [found], self._compression, self._domain)[0])
        return node_id

    def add_table(self, contents: Table) -> None:
        """Let the next index object name records of packs that are in the store already."""
        self._tables.append(contents)

    def finish(self) -> None:
        """Everything put so far is durable and in the index when this returns."""
        for kind in list(self._builders):
            self._upload(kind)
        while self._uploads:
            self._uploaded()
        self._write_index()
        self._executor.shutdown()

    def abandon(self) -> None:
        """Stop after an error: wait for what is under way, index what was uploaded so that it is found again."""
        self._builders.clear()
        error: Exception | None = None
        while self._uploads:
            try:
                self._uploaded()
            except Exception as failed:  # noqa: BLE001 - all uploads are waited for before the first error is raised
                error = error or failed
        self._executor.shutdown()
        self._write_index()
        if error is not None:
            raise error

    def _upload(self, kind: RecordKind) -> None:
        builder = self._builders.pop(kind)
        buffers, contents = builder.finish()
        while len(self._uploads) >= _UPLOADS:
            self._uploaded()
        future = self._executor.submit(self._store.put_new, builder.name, buffers)
        self._uploads.append((future, builder, contents))

    def _uploaded(self) -> None:
        future, builder, contents = self._uploads.popleft()
        self.stored_bytes += future.result()
        del self._reader.pending[builder.name]
        self._tables.append(contents)
        self._entries += len(contents.entries)
        if self._entries >= _INDEX_ENTRIES or len(self._tables) >= _INDEX_PACKS:
            self._write_index()

    def _write_index(self) -> None:
        if not self._tables:
            return
        for part in table.split(table.merge(self._tables)):
            name, size_bytes = index.write(self._store, part, self._domain, self._seen)
            self.stored_bytes += size_bytes
            self._index.written(name, part, size_bytes)
        self._tables.clear()
        self._entries = 0


def content(kind: RecordKind, object_id: bytes, plain: Buffer, base: Base | None) -> Content:
    """An object as a record holds it: a patch, or whole where there is no base or over half of it differs."""
    if base is not None:
        patch = record.make_patch(plain, base.id, base.plain, record.UNIT_BYTES[kind])
        if patch is not None:
            return Content(object_id, patch, base.id)
    return Content(object_id, plain, None)
