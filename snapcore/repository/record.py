"""One record of a pack: 64 bytes of header and a payload (docs/FORMAT.md, "Packs"), full or as a patch.

Every length is checked before use; a decoded payload is never larger than the caller's limit.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from snapcore import scan
from snapcore.errors import DamagedError, UnsupportedFormatError
from snapcore.keys.sealing import RECORD_OVERHEAD_BYTES, RecordSealer
from snapcore.persist import Buffer
from snapcore.repository import codec
from snapcore.repository.domain import ID_BYTES, PLAIN, Domain

HEADER_BYTES = 64
CHUNK_UNIT_BYTES = 4096
NODE_UNIT_BYTES = 32

_MAGIC = b"SREC"
_HEADER = struct.Struct("<4sBBBBII32sQ")
_CHECKED_BYTES = _HEADER.size
# What a sealed payload is bound to: the header up to its checksums.
_BOUND = struct.Struct("<4sBBBBII32s")
BOUND_BYTES = _BOUND.size
_SEAL_AT = 7
Mask = npt.NDArray[np.bool]

_PATCH = struct.Struct("<32sII")


class RecordKind(IntEnum):
    """What a record holds."""

    CHUNK = 1
    NODE = 2
    DIRECTORY = 3


class Form(IntEnum):
    """Whole, or as what differs from a base that is stored whole."""

    FULL = 0
    PATCH = 1


UNIT_BYTES = {RecordKind.CHUNK: CHUNK_UNIT_BYTES, RecordKind.NODE: NODE_UNIT_BYTES}


_KINDS = {int(kind): kind for kind in RecordKind}
_FORMS = {int(form): form for form in Form}


# Tuples, for there is one of each for every chunk that is read or moved.
class Record(NamedTuple):
    """A record ready to be appended to a pack.

    Attributes
    ----------
    plain_bytes : int
        Length of the payload before compression.
    base : bytes or None
        Id of the base when it is a patch.
    """

    kind: RecordKind
    form: Form
    id: bytes
    header: Buffer
    payload: Buffer
    codec: codec.Codec
    plain_bytes: int
    base: bytes | None

    @property
    def sealed(self) -> bool:
        """Whether the payload is sealed."""
        return self.header[_SEAL_AT] != 0

    @property
    def stored_bytes(self) -> int:
        """Header and payload."""
        return HEADER_BYTES + len(self.payload)


class Content(NamedTuple):
    """What a record is made of: the whole object, or the plain form of a patch when a base is named."""

    id: bytes
    plain: Buffer
    base: bytes | None


class RecordHeader(NamedTuple):
    """What a checked header says."""

    kind: RecordKind
    form: Form
    codec: int
    payload_bytes: int
    plain_bytes: int
    id: bytes
    checksum: int
    sealed: bool
    bound: bytes


class Encoded(NamedTuple):
    """What a record is made of when its payload is encoded already.

    Attributes
    ----------
    plain_bytes : int
        Length of the payload before it was encoded.
    """

    id: bytes
    codec: codec.Codec
    payload: Buffer
    plain_bytes: int
    base: bytes | None


def make(
    kind: RecordKind,
    record_id: bytes,
    plain: Buffer,
    compression: str,
    base: bytes | None = None,
    domain: Domain = PLAIN,
) -> Record:
    """A record of `plain`: the whole object, or the plain form of a patch when a base is named."""
    return make_many(kind, [Content(record_id, plain, base)], compression, domain)[0]


def make_many(kind: RecordKind, contents: Sequence[Content], compression: str, domain: Domain = PLAIN) -> list[Record]:
    """A record of each, sealed where the domain is."""
    encoded = codec.encode_many([content.plain for content in contents], compression)
    parts = [
        Encoded(content.id, *form, len(content.plain), content.base)
        for content, form in zip(contents, encoded, strict=True)
    ]
    return make_encoded(kind, parts, domain)


def make_encoded(kind: RecordKind, parts: Sequence[Encoded], domain: Domain = PLAIN) -> list[Record]:
    """A record of each, sealed where the domain is."""
    if domain.sealing is None:
        return [_finished(kind, part, _bound(kind, part, False, len(part.payload)), part.payload) for part in parts]
    sealer = domain.sealing.record_sealer()
    return [_sealed_record(kind, part, sealer, domain.id) for part in parts]


def _sealed_record(kind: RecordKind, part: Encoded, sealer: RecordSealer, domain_id: bytes) -> Record:
    bound = _bound(kind, part, True, len(part.payload) + RECORD_OVERHEAD_BYTES)
    return _finished(kind, part, bound, sealer.seal(part.payload, bound + domain_id))


def _bound(kind: RecordKind, part: Encoded, sealed: bool, stored_bytes: int) -> bytes:
    """The header up to its checksums."""
    form = Form.FULL if part.base is None else Form.PATCH
    return _BOUND.pack(_MAGIC, kind, part.codec, form, sealed, stored_bytes, part.plain_bytes, part.id)


def _finished(kind: RecordKind, part: Encoded, bound: bytes, payload: Buffer) -> Record:
    checked = bound + xxhash.xxh3_64_intdigest(payload).to_bytes(8, "little")
    header = checked + xxhash.xxh3_64_intdigest(checked).to_bytes(8, "little")
    form = Form.FULL if part.base is None else Form.PATCH
    return Record(kind, form, part.id, header, payload, part.codec, part.plain_bytes, part.base)


def parse_header(data: Buffer, where: str) -> RecordHeader:
    """Check the header at the start of `data`.

    Raises
    ------
    DamagedError, UnsupportedFormatError
    """
    if len(data) < HEADER_BYTES:
        raise DamagedError(f"{where}: {len(data)} bytes are too few for a record")
    magic, kind, how, form, seal, payload_bytes, plain_bytes, record_id, checksum = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise DamagedError(f"{where}: no record begins here")
    claimed = int.from_bytes(data[_CHECKED_BYTES:HEADER_BYTES], "little")
    if xxhash.xxh3_64_intdigest(data[:_CHECKED_BYTES]) != claimed:
        raise DamagedError(f"{where}: the record's header does not match its checksum")
    if seal not in (0, 1) or kind not in _KINDS or form not in _FORMS:
        raise UnsupportedFormatError(
            f"{where}: a record of kind {kind}, form {form}, seal {seal}; install a newer version"
        )
    bound = bytes(data[:BOUND_BYTES])
    return RecordHeader(
        _KINDS[kind], _FORMS[form], how, payload_bytes, plain_bytes, record_id, checksum, seal == 1, bound
    )


def check_payload(head: RecordHeader, payload: Buffer, where: str) -> None:
    """Check a payload as it is stored, for which no key is needed; DamagedError when it is not what it was."""
    if len(payload) != head.payload_bytes:
        raise DamagedError(f"{where}: a payload of {len(payload)} bytes where {head.payload_bytes} belong")
    if xxhash.xxh3_64_intdigest(payload) != head.checksum:
        raise DamagedError(f"{where}: the payload does not match its checksum")


def payload_plain(head: RecordHeader, payload: Buffer, limit_bytes: int, where: str, domain: Domain = PLAIN) -> Buffer:
    """Check, open and decode a payload: the object itself, or the plain form of a patch."""
    return payload_opened(head, payload, limit_bytes, where, domain)[1]


def payload_opened(
    head: RecordHeader, payload: Buffer, limit_bytes: int, where: str, domain: Domain = PLAIN
) -> tuple[Buffer, Buffer]:
    """Check, open and decode a payload: as it is between the two, and decoded."""
    if head.plain_bytes > limit_bytes:
        raise DamagedError(f"{where}: says that it decodes to {head.plain_bytes} of at most {limit_bytes} bytes")
    check_payload(head, payload, where)
    if head.sealed != (domain.sealing is not None):
        found = "a sealed record where open ones belong" if head.sealed else "an open record in a sealed domain"
        raise DamagedError(f"{where}: {found}")
    try:
        if domain.sealing is not None:
            payload = domain.sealing.open_record(payload, head.bound + domain.id)
        return payload, codec.decode(head.codec, payload, head.plain_bytes)
    except DamagedError as error:
        raise DamagedError(f"{where}: {error}") from error


def patch_limit_bytes(object_bytes: int, unit_bytes: int) -> int:
    """The longest that the plain form of a patch of such an object can be."""
    return _PATCH.size + -(-object_bytes // unit_bytes // 8) + 1 + object_bytes


def make_patch(plain: Buffer, base_id: bytes, base: Buffer, unit_bytes: int) -> bytes | None:
    """The plain form of a patch from `base` to `plain`; None when over half of the units differ."""
    return make_masked_patch(plain, base_id, differing_units(plain, base, unit_bytes), unit_bytes)


def make_masked_patch(plain: Buffer, base_id: bytes, mask: Mask, unit_bytes: int) -> bytes | None:
    """The same where it is known which units differ at the most."""
    if int(mask.sum()) * 2 > len(mask):
        return None
    units = np.frombuffer(plain, dtype=np.uint8).reshape(-1, unit_bytes)[mask]
    bits = np.packbits(mask, bitorder="little").tobytes()
    return b"".join((_PATCH.pack(base_id, unit_bytes, len(mask)), bits, units.tobytes()))


def differing_units(plain: Buffer, base: Buffer, unit_bytes: int) -> Mask:
    """Which units of two objects differ."""
    if unit_bytes >= 512:
        return scan.differing_mask(plain, base, unit_bytes).view(np.bool)
    a = np.frombuffer(plain, dtype=np.uint64).reshape(-1, unit_bytes // 8)
    b = np.frombuffer(base, dtype=np.uint64).reshape(-1, unit_bytes // 8)
    differs: Mask = (a != b).any(axis=1)
    return differs


def patch_base(patch: Buffer, where: str) -> bytes:
    """Id of the base that the plain form of a patch names."""
    if len(patch) < _PATCH.size:
        raise DamagedError(f"{where}: a patch of {len(patch)} bytes")
    return bytes(patch[:ID_BYTES])


def patch_mask(patch: Buffer, units: int, unit_bytes: int, where: str) -> Mask:
    """Which units a patch replaces; every length is checked."""
    mask_bytes = (units + 7) // 8
    if len(patch) < _PATCH.size + mask_bytes:
        raise DamagedError(f"{where}: a patch of {len(patch)} bytes for a mask of {mask_bytes}")
    _, found_unit, found_units = _PATCH.unpack_from(patch)
    if found_unit != unit_bytes or found_units != units:
        raise DamagedError(f"{where}: a patch of {found_units} × {found_unit} bytes for {units} × {unit_bytes}")
    bits = np.frombuffer(patch, dtype=np.uint8, count=mask_bytes, offset=_PATCH.size)
    mask: Mask = np.unpackbits(bits, count=units, bitorder="little").view(np.bool)
    changed = int(mask.sum())
    if len(patch) != _PATCH.size + mask_bytes + changed * unit_bytes:
        raise DamagedError(f"{where}: a patch of {len(patch)} bytes holds no {changed} units of {unit_bytes}")
    return mask


def apply_patch(patch: Buffer, base: Buffer, unit_bytes: int, where: str) -> bytearray:
    """The object that a patch makes of its base."""
    units = len(base) // unit_bytes
    mask = patch_mask(patch, units, unit_bytes, where)
    changed = int(mask.sum())
    plain = bytearray(base)
    target = np.frombuffer(plain, dtype=np.uint8).reshape(units, unit_bytes)
    start = len(patch) - changed * unit_bytes
    target[mask] = np.frombuffer(patch, dtype=np.uint8, offset=start).reshape(changed, unit_bytes)
    return plain
