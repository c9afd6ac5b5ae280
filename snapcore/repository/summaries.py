"""Summaries: many manifests in one object, so that a list of ten thousand snapshots costs names and a few objects.

Nothing is trusted that would not be without them: a summary holds the very bytes that lie under the names, and each is
opened and checked as if it had been read from there (docs/FORMAT.md, "Sessions, tombstones, damage"). Names are always
listed; a manifest counts only while its name is, with that very length. What a summary does not hold is read by itself,
and a summary that is damaged or has gone is as good as none.

They are levelled: a new one takes in the older ones that are not much larger than itself.
"""

from __future__ import annotations

import contextlib
import secrets
import struct
from collections.abc import Iterator

from snapcore.errors import DamagedError, Error, NotFoundError, ReadError, UnsupportedFormatError
from snapcore.repository import envelope, manifest
from snapcore.repository.envelope import Kind
from snapcore.store.interface import Store

PREFIX = "summaries/"
# Manifests that are read by themselves before they are summarised.
LOOSE = 32
_BODY_LIMIT_BYTES = envelope.BODY_LIMIT_BYTES // 2
_LENGTHS = struct.Struct("<HI")


def load(store: Store) -> dict[tuple[str, int], bytes]:
    """Bytes of manifests by name and length, from all summaries."""
    held: dict[tuple[str, int], bytes] = {}
    for name, _ in list(store.list(PREFIX)):
        with contextlib.suppress(DamagedError, NotFoundError, ReadError, UnsupportedFormatError):
            held |= {(item, len(data)): data for item, data in _read(store, name)}
    return held


def refresh(store: Store) -> bool:
    """Summarise when more than `LOOSE` manifests are in no summary. Whether that was so.

    Needs no agreement with anybody: summaries hold what never changes, and whoever misses one reads the manifests.
    """
    listed = [item for item in store.list(manifest.PREFIX) if manifest.is_name(item[0])]
    sizes = dict(store.list(PREFIX))
    parts: dict[str, list[tuple[str, bytes]]] = {}
    for name in sizes:
        with contextlib.suppress(DamagedError, NotFoundError, ReadError):
            parts[name] = list(_read(store, name))
    held = {(item, len(data)) for rows in parts.values() for item, data in rows}
    loose = [item for item in listed if item not in held]
    if len(loose) <= LOOSE:
        return False
    there = set(listed)
    rows = []
    for name, _ in loose:
        with contextlib.suppress(NotFoundError):
            rows.append((name, store.get(name, envelope.OBJECT_LIMIT_BYTES)))
    total_bytes = sum(len(data) for _, data in rows)
    gone = [name for name in sizes if name not in parts]
    for name in sorted(parts, key=lambda name: sizes[name]):
        if sizes[name] > 2 * total_bytes or total_bytes + sizes[name] > _BODY_LIMIT_BYTES:
            break
        rows += [(item, data) for item, data in parts[name] if (item, len(data)) in there]
        total_bytes += sizes[name]
        gone.append(name)
    for body in _bodies(sorted(dict(rows).items())):
        object_id = secrets.token_bytes(16)
        store.put_new(PREFIX + object_id.hex(), [envelope.sealed(Kind.SUMMARY, object_id, body)])
    for name in gone:
        with contextlib.suppress(NotFoundError):
            store.delete(name)
    return True


def refresh_if_possible(store: Store) -> None:
    """The same, as housekeeping that must not fail the work it follows."""
    with contextlib.suppress(Error):
        refresh(store)


def _bodies(rows: list[tuple[str, bytes]]) -> Iterator[bytes]:
    body = bytearray()
    for name, data in rows:
        if body and len(body) + len(data) > _BODY_LIMIT_BYTES:
            yield bytes(body)
            body.clear()
        body += _LENGTHS.pack(len(name), len(data)) + name.encode() + data
    if body:
        yield bytes(body)


def _read(store: Store, name: str) -> Iterator[tuple[str, bytes]]:
    """What a summary holds; of one that is damaged nothing, DamagedError."""
    try:
        object_id = bytes.fromhex(name.removeprefix(PREFIX))
    except ValueError as error:
        raise DamagedError(f"{name} is no name of a summary") from error
    kind, _, body = envelope.opened(store.get(name, envelope.OBJECT_LIMIT_BYTES), name, object_id)
    envelope.expect(kind, Kind.SUMMARY, name)
    at = 0
    while at < len(body):
        if at + _LENGTHS.size > len(body):
            raise DamagedError(f"{name}: a row that ends beyond the summary")
        name_bytes, data_bytes = _LENGTHS.unpack_from(body, at)
        start = at + _LENGTHS.size + name_bytes
        if start + data_bytes > len(body):
            raise DamagedError(f"{name}: a row that ends beyond the summary")
        item = bytes(body[at + _LENGTHS.size : start]).decode("ascii", "replace")
        if manifest.is_name(item):
            yield item, bytes(body[start : start + data_bytes])
        at = start + data_bytes
