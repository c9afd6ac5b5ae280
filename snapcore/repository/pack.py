"""Packs: records one behind the other, a directory and a footer (docs/FORMAT.md, "Packs")."""

from __future__ import annotations

import re
import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from snapcore.errors import DamagedError, ReadError
from snapcore.persist import Buffer
from snapcore.repository import envelope, record, table
from snapcore.repository.codec import Codec
from snapcore.repository.domain import PLAIN, ZERO_ID, Domain
from snapcore.repository.envelope import Kind
from snapcore.repository.record import Form, Record, RecordHeader, RecordKind
from snapcore.repository.table import Table, TableBuilder
from snapcore.store.interface import Lister, Reader

PACK_BYTES = 16 << 20
PACK_LIMIT_BYTES = 1 << 30
DIRECTORY_LIMIT_BYTES = 64 << 20
FOOTER_BYTES = 32
# Of a pack on a failing medium, stretches of this length are read or given up.
_STRETCH_BYTES = 64 << 10

_FOOTER = struct.Struct("<8sQQQ")
_FOOTER_MAGIC = b"SNAPFOOT"
PREFIX = "packs/"
_NAME = re.compile(r"packs/(?:([0-9a-f]{32})/)?([0-9a-f]{32})")


def name(pack_id: bytes, domain: Domain = PLAIN) -> str:
    """Name of a pack in the store."""
    return f"{PREFIX}{domain.folder}{pack_id.hex()}"


def is_name(found: str) -> bool:
    """Whether an object of this name is a pack."""
    return _NAME.fullmatch(found) is not None


def sizes(store: Lister, domain: Domain = PLAIN) -> dict[bytes, int]:
    """Id and size in bytes of every pack of a domain in a store; what has no name of a pack is left out."""
    found = {}
    for listed, size_bytes in store.list(PREFIX + domain.folder):
        match = _NAME.fullmatch(listed)
        if match and match[1] == domain.key_id:
            found[bytes.fromhex(match[2])] = size_bytes
    return found


class PackBuilder:
    """A pack of a domain in the making, in memory. It takes no record that is not sealed as the domain is."""

    def __init__(self, domain: Domain = PLAIN) -> None:
        self.id = secrets.token_bytes(16)
        self.name = name(self.id, domain)
        self.size_bytes = envelope.HEADER_BYTES
        self._domain = domain
        self._buffers: list[Buffer] = [envelope.header(Kind.PACK, self.id, 0, domain)]
        self._builder = TableBuilder()
        self._records: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._builder)

    def add(self, item: Record) -> int:
        """Append a record. Returns its offset."""
        if item.sealed != (self._domain.sealing is not None):
            raise ValueError(f"the record of {item.id.hex()} is not sealed as the domain of the pack is")
        offset_bytes = self.size_bytes
        self._records[offset_bytes] = len(self._buffers)
        self._buffers += (item.header, item.payload)
        self.size_bytes += item.stored_bytes
        self._builder.add(item, self.id, offset_bytes)
        return offset_bytes

    def record_at(self, offset_bytes: int) -> bytes:
        """A record that was added: header and payload."""
        first = self._records[offset_bytes]
        return b"".join(self._buffers[first : first + 2])

    def finish(self) -> tuple[list[Buffer], Table]:
        """All buffers of the whole pack, and the table of what lies in it."""
        contents = self._builder.table()
        directory = record.make(RecordKind.DIRECTORY, ZERO_ID, contents.to_bytes(), "none", domain=self._domain)
        fields = struct.pack("<8sQQ", _FOOTER_MAGIC, self.size_bytes, directory.stored_bytes)
        footer = fields + xxhash.xxh3_64_intdigest(fields).to_bytes(8, "little")
        return [*self._buffers, directory.header, directory.payload, footer], contents


def read_directory(store: Reader, pack_id: bytes, size_bytes: int, domain: Domain = PLAIN) -> Table:
    """The table at the end of a pack; DamagedError when it cannot be read (then `records` still may)."""
    where = name(pack_id, domain)
    head, data = stored_directory(store, where, size_bytes)
    body = record.payload_plain(head, data, DIRECTORY_LIMIT_BYTES, where, domain)
    contents = table.parse(body, f"directory of {where}")
    if any(found != pack_id for found in contents.packs):
        raise DamagedError(f"{where}: its directory speaks of another pack; it was moved or exchanged")
    return contents


def stored_directory(store: Reader, where: str, size_bytes: int) -> tuple[RecordHeader, bytes]:
    """Header and payload of the directory record, as stored, of the pack of that name."""
    if size_bytes < envelope.HEADER_BYTES + record.HEADER_BYTES + FOOTER_BYTES:
        raise DamagedError(f"{where} has {size_bytes} bytes, too few for a pack")
    footer = store.get_range(where, size_bytes - FOOTER_BYTES, FOOTER_BYTES)
    magic, offset_bytes, length_bytes, checksum = _FOOTER.unpack(footer)
    end = size_bytes - FOOTER_BYTES
    if magic != _FOOTER_MAGIC or xxhash.xxh3_64_intdigest(footer[:24]) != checksum:
        raise DamagedError(f"{where}: the footer does not match its checksum")
    if length_bytes > DIRECTORY_LIMIT_BYTES or offset_bytes + length_bytes != end:
        raise DamagedError(f"{where}: a directory of {length_bytes} bytes at {offset_bytes} of {size_bytes}")
    data = store.get_range(where, offset_bytes, length_bytes)
    head = record.parse_header(data, f"{where} at {offset_bytes}")
    if head.kind != RecordKind.DIRECTORY:
        raise DamagedError(f"{where} at {offset_bytes}: a {head.kind.name.lower()} where the directory belongs")
    return head, data[record.HEADER_BYTES :]


def contents(store: Reader, pack_id: bytes, size_bytes: int, domain: Domain = PLAIN) -> Table:
    """The table of what lies in a pack: its directory, or what a scan still finds where that cannot be read."""
    try:
        return read_directory(store, pack_id, size_bytes, domain)
    except (DamagedError, ReadError):
        where = name(pack_id, domain)
        if size_bytes > PACK_LIMIT_BYTES:
            raise DamagedError(f"{where} has {size_bytes} bytes where {PACK_LIMIT_BYTES} are the most") from None
        return scan_directory(b"".join(_readable(store, where, 0, size_bytes)), pack_id, domain)


def _readable(store: Reader, where: str, offset_bytes: int, length_bytes: int) -> Iterator[bytes]:
    """A range of a pack, with zeros for stretches that the medium does not give."""
    try:
        yield store.get_range(where, offset_bytes, length_bytes)
    except ReadError:
        if length_bytes <= _STRETCH_BYTES:
            yield bytes(length_bytes)
            return
        half = length_bytes // 2
        yield from _readable(store, where, offset_bytes, half)
        yield from _readable(store, where, offset_bytes + half, length_bytes - half)


@dataclass(frozen=True, slots=True)
class Found:
    """A record met while reading a pack from its start.

    Attributes
    ----------
    offset_bytes : int
    header : RecordHeader or None
        None where no valid header stands; `problem` says why.
    payload : memoryview
    """

    offset_bytes: int
    header: RecordHeader | None
    payload: memoryview
    problem: str | None


def records(data: Buffer, where: str) -> Iterator[Found]:
    """Every record of a pack's bytes, the directory included; goes on behind a damaged one at the next magic."""
    whole = bytes(data)
    view = memoryview(whole)
    lost = False
    offset_bytes = envelope.HEADER_BYTES
    end = len(data) - FOOTER_BYTES
    while offset_bytes < end:
        try:
            head = record.parse_header(
                view[offset_bytes : offset_bytes + record.HEADER_BYTES], f"{where} at {offset_bytes}"
            )
            stop = offset_bytes + record.HEADER_BYTES + head.payload_bytes
            if stop > len(data):
                raise DamagedError(f"{where} at {offset_bytes}: a record that ends beyond the pack")
        except DamagedError as error:
            # One message for a stretch of damage, however many false beginnings lie in it.
            if not lost:
                yield Found(offset_bytes, None, view[:0], str(error))
            lost = True
            offset_bytes = whole.find(b"SREC", offset_bytes + 1)
            if offset_bytes < 0:
                return
            continue
        lost = False
        yield Found(offset_bytes, head, view[offset_bytes + record.HEADER_BYTES : stop], None)
        offset_bytes = stop


def scan_directory(data: Buffer, pack_id: bytes, domain: Domain = PLAIN) -> Table:
    """The table of what can still be read of a pack whose directory is lost."""
    where = name(pack_id, domain)
    builder = TableBuilder()
    for found in records(data, where):
        head = found.header
        if head is None or head.kind == RecordKind.DIRECTORY:
            continue
        try:
            plain = record.payload_plain(head, found.payload, table.STORED_LIMIT_BYTES, where, domain)
            base = record.patch_base(plain, where) if head.form == Form.PATCH else None
        except DamagedError:
            continue
        kept = Record(
            head.kind,
            head.form,
            head.id,
            b"",
            found.payload,
            Codec(head.codec),
            head.plain_bytes,
            base,
        )
        builder.add(kept, pack_id, found.offset_bytes)
    return builder.table()
