"""What a verify found bad: places of records that count as missing from then on, so that they are stored again."""

from __future__ import annotations

import contextlib
import re
import secrets

import msgspec

from snapcore.errors import DamagedError, NotFoundError, UnsupportedFormatError
from snapcore.repository import envelope
from snapcore.repository.envelope import Kind
from snapcore.repository.index import BadPlaces
from snapcore.store.interface import Store

PREFIX = "damage/"
# Of about 130 bytes each: an object of them stays far below the limit of what is read as JSON.
_OBJECT_RECORDS = 50_000
_PACK = re.compile(r"[0-9a-f]{32}")
_ID = re.compile(r"[0-9a-f]{64}")


class Bad(msgspec.Struct, frozen=True, kw_only=True):
    """A record that cannot be read: its pack (hexadecimal), its offset in bytes, its id (hexadecimal)."""

    pack: str
    offset: int
    id: str


class _Body(msgspec.Struct, frozen=True):
    records: list[Bad]


def load(store: Store) -> list[Bad]:
    """All records that are marked as damaged. A list that is damaged itself is ignored: verify makes it anew."""
    marked: dict[tuple[str, int], Bad] = {}
    for name, _ in list(store.list(PREFIX)):
        try:
            data = store.get(name, envelope.OBJECT_LIMIT_BYTES)
            kind, _, body = envelope.opened(data, name, bytes.fromhex(name.removeprefix(PREFIX)))
            envelope.expect(kind, Kind.DAMAGE, name)
            found = envelope.from_json(body, _Body, name).records
        except (DamagedError, NotFoundError, UnsupportedFormatError, ValueError):
            continue
        marked |= {(bad.pack, bad.offset): bad for bad in found if _PACK.fullmatch(bad.pack) and _ID.fullmatch(bad.id)}
    return list(marked.values())


def places(marked: list[Bad]) -> BadPlaces:
    """The marks in the form that the index takes."""
    return frozenset((bytes.fromhex(bad.pack), bad.offset) for bad in marked)


def replace(store: Store, found: list[Bad]) -> None:
    """Make `found` all that is marked."""
    old = [name for name, _ in store.list(PREFIX)]
    for start in range(0, len(found), _OBJECT_RECORDS):
        object_id = secrets.token_bytes(16)
        body = msgspec.json.encode(_Body(found[start : start + _OBJECT_RECORDS]))
        store.put_new(PREFIX + object_id.hex(), [envelope.sealed(Kind.DAMAGE, object_id, body)])
    for name in old:
        # A verification and a collection may both be at it.
        with contextlib.suppress(NotFoundError):
            store.delete(name)
