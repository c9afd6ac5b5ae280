"""The 64 bytes that every object begins with, and the checksum that most end with (docs/FORMAT.md, "The envelope").

The bodies of objects of a sealed domain are opened on the way in and sealed on the way out, here and nowhere else.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TypeVar

import blake3
import msgspec

from snapcore.errors import DamagedError, UnsupportedFormatError
from snapcore.keys import sealing
from snapcore.repository.domain import DOMAIN_ID_BYTES, PLAIN, Domain
from snapcore.store.interface import Reader

HEADER_BYTES = 64
CHECKSUM_BYTES = 32
FORMAT_VERSION = 1
BODY_LIMIT_BYTES = 64 << 20
JSON_LIMIT_BYTES = 16 << 20
OBJECT_LIMIT_BYTES = HEADER_BYTES + BODY_LIMIT_BYTES + CHECKSUM_BYTES

_MAGIC = b"SNAPCORE"
_HEADER = struct.Struct("<8sHHIII16s16sQ")
_KIND_AT, _DOMAIN_AT = 8, 24

JsonBody = TypeVar("JsonBody")


class Kind(IntEnum):
    """What an object is."""

    CONFIG = 1
    MANIFEST = 2
    SESSION = 3
    TOMBSTONE = 4
    INDEX = 5
    PACK = 6
    DAMAGE = 7
    KEY = 8
    GENERATION = 9
    SUMMARY = 10
    GROUP = 11
    PIN = 12
    IMAGE = 13


def header(kind: Kind, object_id: bytes, body_bytes: int, domain: Domain = PLAIN) -> bytes:
    """The header of an object of a domain whose body, as it is stored, has that length."""
    return _HEADER.pack(_MAGIC, kind, FORMAT_VERSION, 0, 0, 0, domain.id, object_id, body_bytes)


def sealed(kind: Kind, object_id: bytes, body: bytes, domain: Domain = PLAIN) -> bytes:
    """A whole object: header, body, checksum."""
    if domain.sealing is None:
        head = header(kind, object_id, len(body))
    else:
        head = header(kind, object_id, sealing.sealed_body_bytes(len(body)), domain)
        body = domain.sealing.seal_body(body, head)
    return head + body + blake3.blake3(head).update(body).digest()


def domain_of(data: bytes) -> bytes:
    """Id of the domain that an object names; nothing about it has been checked."""
    return data[_DOMAIN_AT : _DOMAIN_AT + DOMAIN_ID_BYTES]


def kind_of(data: bytes) -> int:
    """Kind that an object names; nothing about it has been checked."""
    return int.from_bytes(data[_KIND_AT : _KIND_AT + 2], "little")


def check_header(
    data: bytes, where: str, object_id: bytes | None = None, domain: Domain | None = PLAIN
) -> tuple[Kind, bytes, int]:
    """Check a header. Returns the kind, the id and the length of the body as it is stored.

    Raises
    ------
    DamagedError
        It is none, or not that of the object that was asked for, or of another domain (None: any will do).
    UnsupportedFormatError
        A version or feature that this software does not know.
    """
    if len(data) < HEADER_BYTES:
        raise DamagedError(f"{where} has {len(data)} bytes, too few for an object; run `snapcore verify`")
    magic, kind, version, incompatible, _, _, domain_id, found_id, body_bytes = _HEADER.unpack_from(data)
    if magic != _MAGIC or kind not in Kind.__members__.values():
        raise DamagedError(f"{where} is not an object of snapcore (first bytes {data[:10].hex()})")
    if version != FORMAT_VERSION or incompatible:
        raise UnsupportedFormatError(
            f"{where} has format {version} with features {incompatible:#x}; "
            f"this software reads format {FORMAT_VERSION}: install a newer one"
        )
    if domain is not None and domain_id != domain.id:
        raise DamagedError(f"{where} is of the domain {domain_id.hex()} where one of {domain.id.hex()} belongs")
    if object_id is not None and found_id != object_id:
        raise DamagedError(f"{where} holds the object {found_id.hex()}; it was moved or exchanged")
    return Kind(kind), found_id, body_bytes


def opened(
    data: bytes, where: str, object_id: bytes | None = None, domain: Domain = PLAIN
) -> tuple[Kind, bytes, memoryview]:
    """Check a whole object. Returns its kind, id and body; raises as `check_header` does."""
    kind, found_id, body = check_stored(data, where, object_id, domain)
    if domain.sealing is not None:
        try:
            body = memoryview(domain.sealing.open_body(body, data[:HEADER_BYTES]))
        except DamagedError as error:
            raise DamagedError(f"{where} does not open: {error}") from error
    return kind, found_id, body


def check_stored(
    data: bytes, where: str, object_id: bytes | None = None, domain: Domain | None = None
) -> tuple[Kind, bytes, memoryview]:
    """Check an object as it is stored, for which no key is needed. Returns its kind, id and stored body."""
    try:
        kind, found_id, body_bytes = check_header(data, where, object_id, domain)
    except UnsupportedFormatError as error:
        # Only a checksum that is right makes a strange version a newer one; else it is a bit that has flipped.
        if blake3.blake3(data[:-CHECKSUM_BYTES]).digest() != data[-CHECKSUM_BYTES:]:
            raise DamagedError(f"{where} does not match its checksum") from error
        raise
    if body_bytes > BODY_LIMIT_BYTES or len(data) != HEADER_BYTES + body_bytes + CHECKSUM_BYTES:
        raise DamagedError(f"{where} has {len(data)} bytes and says that its body has {body_bytes}")
    end = HEADER_BYTES + body_bytes
    view = memoryview(data)
    if blake3.blake3(view[:end]).digest() != data[end:]:
        raise DamagedError(f"{where} does not match its checksum")
    return kind, found_id, view[HEADER_BYTES:end]


class Body:
    """The body of a large object, read in parts. Not checked against the checksum of the whole.

    Parameters
    ----------
    store : Reader
    name : str
    size_bytes : int
        Of the whole object.
    object_id : bytes
    domain : Domain
        Parts of a sealed body are opened, and so checked as far as they reach.
    """

    def __init__(self, store: Reader, name: str, size_bytes: int, object_id: bytes, domain: Domain) -> None:
        self._store = store
        self._name = name
        self._sealing = domain.sealing
        self._stored_bytes = size_bytes - HEADER_BYTES - CHECKSUM_BYTES
        self.length_bytes = self._stored_bytes
        if self._sealing is not None:
            data = store.get_range(name, 0, HEADER_BYTES + sealing.SALT_BYTES)
            _, _, stored_bytes = check_header(data, name, object_id, domain)
            self._header, self._salt = data[:HEADER_BYTES], data[HEADER_BYTES:]
            self.length_bytes = sealing.plain_body_bytes(self._stored_bytes)
            if stored_bytes != self._stored_bytes or self.length_bytes < 0:
                raise DamagedError(f"{name} has {size_bytes} bytes and says that its body has {stored_bytes}")

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """A range of the plain body."""
        if offset_bytes < 0 or length_bytes < 0 or offset_bytes + length_bytes > self.length_bytes:
            raise DamagedError(f"{self._name} has no {length_bytes} bytes at {offset_bytes} of its body")
        if self._sealing is None or length_bytes == 0:
            return self._store.get_range(self._name, HEADER_BYTES + offset_bytes, length_bytes)
        first, start, stop = sealing.sealed_range(offset_bytes, length_bytes, self._stored_bytes)
        found = self._store.get_range(self._name, HEADER_BYTES + start, stop - start)
        try:
            plain = self._sealing.open_segments(self._salt, first, found, self._header)
        except DamagedError as error:
            raise DamagedError(f"{self._name} does not open: {error}") from error
        skip = offset_bytes - first * sealing.SEGMENT_BYTES
        return plain[skip : skip + length_bytes]


def expect(kind: Kind, wanted: Kind, where: str) -> None:
    """DamagedError when an object is of another kind than its name says."""
    if kind != wanted:
        raise DamagedError(f"{where} is a {kind.name.lower()} where a {wanted.name.lower()} belongs")


def from_json(body: memoryview, body_type: type[JsonBody], where: str) -> JsonBody:
    """Decode a JSON body strictly; unknown members are ignored, wrong ones are DamagedError."""
    if len(body) > JSON_LIMIT_BYTES:
        raise DamagedError(f"{where} has a body of {len(body)} bytes where {JSON_LIMIT_BYTES} are the most")
    try:
        return msgspec.json.decode(body, type=body_type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedError(f"{where} cannot be read: {error}") from error
