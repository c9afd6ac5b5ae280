"""The 64 bytes that every object begins with, and the checksum that most end with (docs/FORMAT.md, "The envelope")."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TypeVar

import blake3
import msgspec

from snapcore.errors import DamagedError, UnsupportedFormatError

HEADER_BYTES = 64
CHECKSUM_BYTES = 32
FORMAT_VERSION = 1
BODY_LIMIT_BYTES = 64 << 20
JSON_LIMIT_BYTES = 16 << 20
OBJECT_LIMIT_BYTES = HEADER_BYTES + BODY_LIMIT_BYTES + CHECKSUM_BYTES
PLAIN_DOMAIN = bytes(16)

_MAGIC = b"SNAPCORE"
_HEADER = struct.Struct("<8sHHIII16s16sQ")

Body = TypeVar("Body")


class Kind(IntEnum):
    """What an object is."""

    CONFIG = 1
    MANIFEST = 2
    SESSION = 3
    TOMBSTONE = 4
    INDEX = 5
    PACK = 6
    DAMAGE = 7
    GROUP = 10


def header(kind: Kind, object_id: bytes, body_bytes: int) -> bytes:
    """The header of an object of the plain domain."""
    return _HEADER.pack(_MAGIC, kind, FORMAT_VERSION, 0, 0, 0, PLAIN_DOMAIN, object_id, body_bytes)


def sealed(kind: Kind, object_id: bytes, body: bytes) -> bytes:
    """A whole object: header, body, checksum."""
    head = header(kind, object_id, len(body))
    return head + body + blake3.blake3(head).update(body).digest()


def check_header(data: bytes, where: str, object_id: bytes | None = None) -> tuple[Kind, bytes, int]:
    """Check a header. Returns the kind, the id and the length of the body.

    Raises
    ------
    DamagedError
        It is none, or not that of the object that was asked for.
    UnsupportedFormatError
        A version, feature or domain that this software does not know.
    """
    if len(data) < HEADER_BYTES:
        raise DamagedError(f"{where} has {len(data)} bytes, too few for an object; run `snapcore verify`")
    magic, kind, version, incompatible, _, _, domain, found_id, body_bytes = _HEADER.unpack_from(data)
    if magic != _MAGIC or kind not in Kind.__members__.values():
        raise DamagedError(f"{where} is not an object of snapcore (first bytes {data[:10].hex()})")
    if version != FORMAT_VERSION or incompatible:
        raise UnsupportedFormatError(
            f"{where} has format {version} with features {incompatible:#x}; "
            f"this software reads format {FORMAT_VERSION}: install a newer one"
        )
    if domain != PLAIN_DOMAIN:
        raise UnsupportedFormatError(f"{where} belongs to the encrypted domain {domain.hex()}: no key for it")
    if object_id is not None and found_id != object_id:
        raise DamagedError(f"{where} holds the object {found_id.hex()}; it was moved or exchanged")
    return Kind(kind), found_id, body_bytes


def opened(data: bytes, where: str, object_id: bytes | None = None) -> tuple[Kind, bytes, memoryview]:
    """Check a whole object. Returns its kind, id and body; raises as `check_header` does."""
    try:
        kind, found_id, body_bytes = check_header(data, where, object_id)
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


def expect(kind: Kind, wanted: Kind, where: str) -> None:
    """DamagedError when an object is of another kind than its name says."""
    if kind != wanted:
        raise DamagedError(f"{where} is a {kind.name.lower()} where a {wanted.name.lower()} belongs")


def from_json(body: memoryview, body_type: type[Body], where: str) -> Body:
    """Decode a JSON body strictly; unknown members are ignored, wrong ones are DamagedError."""
    if len(body) > JSON_LIMIT_BYTES:
        raise DamagedError(f"{where} has a body of {len(body)} bytes where {JSON_LIMIT_BYTES} are the most")
    try:
        return msgspec.json.decode(body, type=body_type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedError(f"{where} cannot be read: {error}") from error
