"""Makes hostile objects: takes the objects of a repository apart, changes fields, and puts right every checksum again.

An attacker who can write to a repository can do all of this; what it cannot do is to find two contents with one id.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import blake3
import numpy as np
import xxhash

from snapcore.repository import codec, envelope, pack, table
from snapcore.repository.domain import PLAIN
from snapcore.repository.record import RecordKind
from snapcore.store import MemoryStore, Store

Objects = dict[str, bytes]

HEAD = envelope.HEADER_BYTES
_RECORD = struct.Struct("<4sBBBBII32sQ")
_PATCH = struct.Struct("<32sII")
_ENVELOPE = struct.Struct("<8sHHIII16s16sQ")
ENVELOPE_FIELDS = ("magic", "kind", "version", "incompatible", "compatible", "clear", "domain", "id", "body_bytes")


def objects_of(store: Store) -> Objects:
    """All objects of a store."""
    return {name: store.get(name, 1 << 40) for name, _ in store.list("")}


def store_of(objects: Objects) -> MemoryStore:
    """A store in memory with these objects, whatever their names."""
    store = MemoryStore()
    store._objects.update(objects)
    return store


def enveloped(head: bytes, body: bytes) -> bytes:
    """An object of these parts with the checksum that belongs to them."""
    return head + body + blake3.blake3(head + body).digest()


def body_of(data: bytes) -> bytes:
    """The body of an object that is not a pack."""
    return data[HEAD:-32]


def with_body(data: bytes, body: bytes) -> bytes:
    """The object with another body, its length and checksum right."""
    return enveloped(data[: HEAD - 8] + len(body).to_bytes(8, "little"), body)


def with_header(data: bytes, **fields: Any) -> bytes:
    """The object with other values in its envelope header, the checksum right (packs have none)."""
    values = dict(zip(ENVELOPE_FIELDS, _ENVELOPE.unpack_from(data), strict=True)) | fields
    head = _ENVELOPE.pack(*values.values())
    kind = int.from_bytes(data[8:10], "little")
    return head + data[HEAD:] if kind == envelope.Kind.PACK else enveloped(head, body_of(data))


def with_members(data: bytes, **members: Any) -> bytes:
    """The JSON object with other members."""
    return with_body(data, json.dumps(json.loads(body_of(data)) | members).encode())


@dataclass
class Rec:
    """One record of a pack, every field free to be wrong."""

    kind: int
    codec: int
    form: int
    seal: int
    plain_bytes: int
    id: bytes
    payload: bytes
    payload_bytes: int | None = None
    checksum: int | None = None

    def to_bytes(self) -> bytes:
        """The record with checksums that are right unless they were set."""
        checksum = xxhash.xxh3_64_intdigest(self.payload) if self.checksum is None else self.checksum
        size = len(self.payload) if self.payload_bytes is None else self.payload_bytes
        head = _RECORD.pack(
            b"SREC", self.kind, self.codec, self.form, self.seal, size, self.plain_bytes, self.id, checksum
        )
        return head + xxhash.xxh3_64_intdigest(head).to_bytes(8, "little") + self.payload


def records_of(data: bytes) -> list[Rec]:
    """The chunks and nodes in a pack that is whole."""
    found = []
    for item in pack.records(data, "pack"):
        head = item.header
        if head is not None and head.kind != RecordKind.DIRECTORY:
            found.append(Rec(head.kind, head.codec, head.form, 0, head.plain_bytes, head.id, bytes(item.payload)))
    return found


def full(kind: RecordKind, plain: bytes, object_id: bytes | None = None) -> Rec:
    """A record of an object as it is; its right id unless another one is given."""
    if object_id is None:
        object_id = PLAIN.chunk_id(plain) if kind == RecordKind.CHUNK else PLAIN.node_id(plain)
    return Rec(kind, 0, 0, 0, len(plain), object_id, plain)


def patch(kind: RecordKind, object_id: bytes, base: bytes, unit: int, units: int, mask: bytes, data: bytes) -> Rec:
    """A patch record, every field free to be wrong."""
    plain = _PATCH.pack(base, unit, units) + mask + data
    return Rec(kind, 0, 1, 0, len(plain), object_id, plain)


def packed(records: Iterable[Rec], pack_id: bytes) -> tuple[bytes, np.ndarray]:
    """A pack of these records and the entries (dtype ENTRY) that tell the truth about where they lie."""
    data = envelope.header(envelope.Kind.PACK, pack_id, 0)
    rows = []
    for item in records:
        raw = item.to_bytes()
        key = int.from_bytes(item.id[:8], "little")
        # Forms other than 0 name base 0 where the table has one.
        base = 0 if item.form else table.NO_BASE
        rows.append(
            (key, item.id[8:], 0, len(data), len(raw), item.plain_bytes, item.kind, item.form, item.codec, 0, base)
        )
        data += raw
    entries = np.array(rows, dtype=table.ENTRY)
    return data, entries[np.argsort(entries["key"], kind="stable")]


def finished(data: bytes, directory: bytes) -> bytes:
    """A pack with its directory and footer."""
    whole = Rec(RecordKind.DIRECTORY, 0, 0, 0, len(directory), bytes(32), directory).to_bytes()
    return data + whole + footer(len(data), len(whole))


def footer(offset: int, length: int) -> bytes:
    """A footer that says so, checksum right."""
    fields = struct.pack("<8sQQ", b"SNAPFOOT", offset, length)
    return fields + xxhash.xxh3_64_intdigest(fields).to_bytes(8, "little")


def table_bytes(entries: np.ndarray, packs: Iterable[bytes], bases: Iterable[bytes] = ()) -> bytes:
    """A table as it is stored."""
    joined = b"".join(bases)
    return table.Table(tuple(packs), entries, np.frombuffer(joined, dtype="V32")).to_bytes()


def indexed(entries: np.ndarray, packs: Iterable[bytes], bases: Iterable[bytes], object_id: bytes) -> bytes:
    """An index object."""
    body = table_bytes(entries, packs, bases)
    return envelope.sealed(envelope.Kind.INDEX, object_id, body)


def names(objects: Objects, folder: str) -> list[str]:
    """Names of the objects of a kind, sorted."""
    return sorted(name for name in objects if name.startswith(folder))


def plain_of(item: Rec) -> bytes:
    """The payload of a record that is whole, decoded."""
    return bytes(codec.decode(item.codec, item.payload, item.plain_bytes))
