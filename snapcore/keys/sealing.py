"""AES-256-GCM over records and objects (docs/FORMAT.md, "Sealing").

Each `Sealer` has a salt of its own, fresh from the operating system, and so a key of its own; its messages are
numbered from 0. It lives for one call and is kept nowhere, so no (key, nonce) is ever used twice, whatever is
restarted, forked or done again. Deriving a key costs 5 µs (2-core EPYC VM), a message of 32 KiB 2 µs.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from functools import lru_cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snapcore.errors import DamagedError
from snapcore.keys.root import derived
from snapcore.persist import Buffer

SALT_BYTES = 16
NUMBER_BYTES = 4
TAG_BYTES = 16
# What a sealed record's payload is longer than the plain one.
RECORD_OVERHEAD_BYTES = SALT_BYTES + NUMBER_BYTES + TAG_BYTES
SEGMENT_BYTES = 16 << 10
_SEALED_SEGMENT_BYTES = SEGMENT_BYTES + TAG_BYTES
_NONCE_BYTES = 12
_NONCE_REST = bytes(_NONCE_BYTES - NUMBER_BYTES)
_MESSAGES_LIMIT = 1 << 32
# Of some 600 bytes each: a span of records has one salt, each node its own.
_CIPHERS_KEPT = 1024


class Sealing:
    """Seals and opens what belongs to one domain. Safe from many threads.

    Parameters
    ----------
    record_key, object_key : bytes
        32 bytes each, the domain's own.
    """

    def __init__(self, record_key: bytes, object_key: bytes) -> None:
        self._record_key = record_key
        self._object_key = object_key
        self._record_cipher = lru_cache(_CIPHERS_KEPT)(lambda salt: _cipher(self._record_key, salt))

    def __reduce__(self) -> tuple[type[Sealing], tuple[bytes, bytes]]:
        """For another process that whoever has the keys hands work to. Nothing else makes bytes of them."""
        return Sealing, (self._record_key, self._object_key)

    def record_sealer(self) -> RecordSealer:
        """What seals the records of one batch."""
        salt = secrets.token_bytes(SALT_BYTES)
        return RecordSealer(salt, _cipher(self._record_key, salt))

    def open_record(self, payload: Buffer, bound: bytes) -> bytearray:
        """The payload of a record before it was sealed; DamagedError when it or what it is bound to was changed."""
        if len(payload) < RECORD_OVERHEAD_BYTES:
            raise DamagedError(f"a sealed payload of {len(payload)} bytes")
        view = memoryview(payload)
        head = SALT_BYTES + NUMBER_BYTES
        nonce = bytes(view[SALT_BYTES:head]) + _NONCE_REST
        plain = bytearray(len(view) - RECORD_OVERHEAD_BYTES)
        try:
            self._record_cipher(bytes(view[:SALT_BYTES])).decrypt_into(nonce, view[head:], bound, plain)
        except InvalidTag as error:
            raise DamagedError("it was changed, moved from elsewhere or sealed under another key") from error
        return plain

    def seal_body(self, body: Buffer, bound: bytes) -> bytes:
        """The sealed body of an object; `sealed_body_bytes` says how long it is."""
        salt = secrets.token_bytes(SALT_BYTES)
        cipher = _cipher(self._object_key, salt)
        view = memoryview(body)
        sealed = [salt]
        for number, start in enumerate(range(0, max(len(view), 1), SEGMENT_BYTES)):
            sealed.append(cipher.encrypt(_nonce(number), view[start : start + SEGMENT_BYTES], bound))
        return b"".join(sealed)

    def open_body(self, sealed: Buffer, bound: bytes) -> bytes:
        """The body of an object before it was sealed; DamagedError when it or what it is bound to was changed."""
        body_bytes = plain_body_bytes(len(sealed))
        if body_bytes < 0:
            raise DamagedError(f"a sealed body of {len(sealed)} bytes")
        view = memoryview(sealed)
        return self.open_segments(bytes(view[:SALT_BYTES]), 0, view[SALT_BYTES:], bound)

    def open_segments(self, salt: bytes, first: int, sealed: Buffer, bound: bytes) -> bytes:
        """The plain bytes of neighbouring segments of an object, from number `first` on."""
        cipher = _cipher(self._object_key, salt)
        try:
            return b"".join(
                cipher.decrypt(_nonce(first + number), part, bound) for number, part in enumerate(_parts(sealed))
            )
        except InvalidTag as error:
            raise DamagedError("it was changed, moved from elsewhere or sealed under another key") from error


class RecordSealer:
    """Seals the records of one batch: one salt, a number for each. For one thread."""

    def __init__(self, salt: bytes, cipher: AESGCM) -> None:
        self._salt = salt
        self._cipher = cipher
        self._number = 0

    def seal(self, payload: Buffer, bound: bytes) -> bytearray:
        """Salt, number, ciphertext, tag: `RECORD_OVERHEAD_BYTES` more than the payload."""
        if self._number >= _MESSAGES_LIMIT:
            raise OverflowError("a batch of records has no number left")
        number = self._number.to_bytes(NUMBER_BYTES, "little")
        self._number += 1
        head = SALT_BYTES + NUMBER_BYTES
        sealed = bytearray(len(payload) + RECORD_OVERHEAD_BYTES)
        sealed[:SALT_BYTES] = self._salt
        sealed[SALT_BYTES:head] = number
        self._cipher.encrypt_into(number + _NONCE_REST, payload, bound, memoryview(sealed)[head:])
        return sealed


def sealed_body_bytes(body_bytes: int) -> int:
    """Length of a sealed body."""
    return SALT_BYTES + body_bytes + max(1, -(-body_bytes // SEGMENT_BYTES)) * TAG_BYTES


def plain_body_bytes(sealed_bytes: int) -> int:
    """Length of the body that was sealed; below 0 for what is no length of a sealed body."""
    rest = sealed_bytes - SALT_BYTES
    segments = max(1, -(-rest // _SEALED_SEGMENT_BYTES))
    body_bytes = rest - segments * TAG_BYTES
    return body_bytes if sealed_body_bytes(max(body_bytes, 0)) == sealed_bytes else -1


def sealed_range(offset_bytes: int, length_bytes: int, sealed_bytes: int) -> tuple[int, int, int]:
    """Where in a sealed body the segments of a range of the plain one lie: number of the first, start and stop."""
    first = offset_bytes // SEGMENT_BYTES
    last = max(first, (offset_bytes + length_bytes - 1) // SEGMENT_BYTES)
    start = SALT_BYTES + first * _SEALED_SEGMENT_BYTES
    return first, start, min(SALT_BYTES + (last + 1) * _SEALED_SEGMENT_BYTES, sealed_bytes)


def _parts(sealed: Buffer) -> Iterator[memoryview]:
    view = memoryview(sealed)
    for start in range(0, len(view), _SEALED_SEGMENT_BYTES):
        yield view[start : start + _SEALED_SEGMENT_BYTES]


def _cipher(key: bytes, salt: bytes) -> AESGCM:
    return AESGCM(derived(key, "salt", salt=salt))


def _nonce(number: int) -> bytes:
    return number.to_bytes(_NONCE_BYTES, "little")
