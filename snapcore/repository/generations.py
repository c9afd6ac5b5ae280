"""Generations: what collections condemn and doom, a numbered list in which create-if-absent decides who goes on.

| list | holds packs that | writers | collectors |
| --- | --- | --- | --- |
| condemned | nothing reached when it was made | do not use them | spare or doom them in the next generation |
| doomed | nothing reaches, and nobody relies on | do not use them | remove them, at any time |

The latest one counts and is complete. Its successor can be published by one collector only, so what was decided from
it is never decided twice (docs/DESIGN.md, "Collection").
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass

import msgspec

from snapcore.errors import DamagedError, ExistsError, NotFoundError, RefusedError, StoreError
from snapcore.repository import envelope
from snapcore.repository.domain import Domain
from snapcore.repository.envelope import Kind
from snapcore.store.interface import Store

PREFIX = "generations/"
# So that the body stays far below what is read as JSON: the next collection condemns the rest.
CONDEMNED_LIMIT = 100_000
IGNORED_LIMIT = 50_000
_NUMBER_LIMIT = 0xFFFFFFFF
_LOADS = 5
_NUMBER = re.compile(r"[0-9a-f]{8}")
_PACK = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation of a domain.

    Attributes
    ----------
    number : int
        0 for that before the first collection.
    condemned, doomed : frozenset of bytes
        Pack ids.
    index : frozenset of str
        Names of the index objects that were there and clean: they name no pack that is doomed or gone.
    ignored : frozenset of str
        Names of deleted manifests that were there before the marking.
    """

    number: int = 0
    condemned: frozenset[bytes] = frozenset()
    doomed: frozenset[bytes] = frozenset()
    index: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()

    @property
    def away(self) -> frozenset[bytes]:
        """Packs that no writer may use."""
        return self.condemned | self.doomed


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    condemned: list[str]
    doomed: list[str]
    index: list[str]
    ignored: list[str]


def latest(store: Store, domain: Domain) -> Generation:
    """The generation that counts."""
    for _ in range(_LOADS):
        number = latest_number(store, domain)
        if number == 0:
            return Generation()
        try:
            return _read(store, domain, number)
        except NotFoundError:
            # A later one is there meanwhile.
            continue
    raise StoreError(f"the generations of {store.url} change all the time; try again later")


def latest_number(store: Store, domain: Domain) -> int:
    """Its number."""
    return max((number for number, _ in _numbers(store, domain)), default=0)


def publish(store: Store, domain: Domain, generation: Generation) -> int | None:
    """Make the successor of what was seen (steps "publish" and "confirm").

    Returns its size in bytes; None when another one is the latest now.
    """
    if generation.number > _NUMBER_LIMIT:
        raise RefusedError(f"{store.url} has had {_NUMBER_LIMIT} collections; copy what it holds to a new repository")
    body = _Body(
        number=generation.number,
        condemned=sorted(item.hex() for item in generation.condemned),
        doomed=sorted(item.hex() for item in generation.doomed),
        index=sorted(generation.index),
        ignored=sorted(generation.ignored),
    )
    data = envelope.sealed(Kind.GENERATION, _id(generation.number), msgspec.json.encode(body), domain)
    try:
        size_bytes = store.put_new(_name(domain, generation.number), [data])
    except ExistsError:
        return None
    return size_bytes if latest_number(store, domain) == generation.number else None


def clear(store: Store, domain: Domain, number: int) -> int:
    """Remove the generations before this one, which is published. Returns the bytes freed."""
    freed_bytes = 0
    for old, size_bytes in _numbers(store, domain):
        if old < number:
            with contextlib.suppress(NotFoundError):
                store.delete(_name(domain, old))
                freed_bytes += size_bytes
    return freed_bytes


def _numbers(store: Store, domain: Domain) -> list[tuple[int, int]]:
    """(number, size in bytes) of all that there are."""
    prefix = PREFIX + domain.folder
    found = ((name.removeprefix(prefix), size_bytes) for name, size_bytes in store.list(prefix))
    return [(int(name, 16), size_bytes) for name, size_bytes in found if _NUMBER.fullmatch(name)]


def _name(domain: Domain, number: int) -> str:
    return f"{PREFIX}{domain.folder}{number:08x}"


def _id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def _read(store: Store, domain: Domain, number: int) -> Generation:
    name = _name(domain, number)
    where = f"{store.url}/{name}"
    data = store.get(name, envelope.OBJECT_LIMIT_BYTES)
    kind, _, body = envelope.opened(data, where, _id(number), domain)
    envelope.expect(kind, Kind.GENERATION, where)
    found = envelope.from_json(body, _Body, where)
    packs = [*found.condemned, *found.doomed]
    if found.number != number or not all(map(_PACK.fullmatch, packs)):
        raise DamagedError(f"{where} has members that contradict its name or name no packs")
    return Generation(
        number,
        frozenset(map(bytes.fromhex, found.condemned)),
        frozenset(map(bytes.fromhex, found.doomed)),
        frozenset(found.index),
        frozenset(found.ignored),
    )
