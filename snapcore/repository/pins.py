"""Pins: who needs a snapshot of this repository, so that nobody deletes it by mistake (docs/FORMAT.md, "Pins").

A pin and a deletion meet without a lock: each puts an object first and looks then. Of two at once one sees the other at
least; both may, and then both give way.

| who | puts | then looks for | and else |
| --- | --- | --- | --- |
| a pin | the pin | marks of deletions, and the manifest | takes the pin away: BusyError, NotFoundError |
| a deletion | its mark | pins | takes the mark away: RefusedError |

A crash leaves a pin that nobody needs, which is listed and can be removed, or a mark of a deletion, which the next
deletion removes: neither loses anything.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec

from snapcore.errors import BusyError, DamagedError, ExistsError, LockedError, NotFoundError, RefusedError, UsageError
from snapcore.repository import envelope
from snapcore.repository.domain import Domain, Domains
from snapcore.repository.envelope import Kind
from snapcore.store.interface import Store

PREFIX = "pins/"
WHO_LIMIT = 1024
_ID = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"pins/([0-9a-f]{32})/([0-9a-f]{32})")
_LISTED = 3


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """Who needs a snapshot.

    Attributes
    ----------
    id, snapshot : str
        32 hexadecimal digits each.
    who : str
        For people; empty where it cannot be read.
    created : str
        UTC, RFC 3339, for people.
    deletes : bool
        No pin but the mark of a deletion that is under way, or was interrupted.
    """

    id: str
    snapshot: str
    who: str
    created: str
    deletes: bool = False

    @property
    def name(self) -> str:
        """Name of its object."""
        return f"{PREFIX}{self.snapshot}/{self.id}"

    def describe(self) -> str:
        """For messages."""
        return f"{self.who or 'somebody whose pin cannot be read'} (pin {self.id})"


def put(store: Store, snapshot: str, manifest_name: str, who: str, pin_id: str | None, domain: Domain) -> Pin:
    """Pin a snapshot; one of that id may be there already.

    Raises
    ------
    BusyError
        It is being deleted.
    NotFoundError
        It is there no more.
    """
    if not who.isprintable() or not 1 <= len(who) <= WHO_LIMIT:
        raise UsageError(f"who needs a snapshot is told in 1 to {WHO_LIMIT} printable signs, not {who!r}")
    if pin_id is not None and not _ID.fullmatch(pin_id):
        raise UsageError(f"a pin's id has 32 hexadecimal digits, not {pin_id!r}")
    pin = _new(snapshot, who, pin_id or secrets.token_hex(16))
    new = True
    try:
        _write(store, pin, domain)
    except ExistsError:
        new = False
    try:
        marks = [other for other in of_snapshot(store, snapshot, {domain.id: domain}) if other.deletes]
        if marks:
            raise BusyError(
                f"snapshot {snapshot} of {store.url} is being deleted; if that was interrupted, delete it again, or "
                f"`snapcore pin remove {marks[0].id} -r {store.url}`"
            )
        try:
            store.size(manifest_name)
        except NotFoundError:
            raise NotFoundError(f"{store.url} has no snapshot {snapshot} any more") from None
    except BaseException:
        if new:
            with contextlib.suppress(NotFoundError):
                store.delete(pin.name)
        raise
    return pin


def _new(snapshot: str, who: str, pin_id: str, *, deletes: bool = False) -> Pin:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Pin(id=pin_id, snapshot=snapshot, who=who, created=now, deletes=deletes)


def _write(store: Store, pin: Pin, domain: Domain) -> None:
    store.put_new(pin.name, [envelope.sealed(Kind.PIN, bytes.fromhex(pin.id), msgspec.json.encode(pin), domain)])


@contextlib.contextmanager
def deleting(store: Store, snapshot: str, domain: Domain, *, force: bool) -> Iterator[None]:
    """While a snapshot is deleted. RefusedError, which names who needs it, unless forced; then its pins go with it."""
    mark = _new(snapshot, "a deletion", secrets.token_hex(16), deletes=True)
    _write(store, mark, domain)
    try:
        found = of_snapshot(store, snapshot, {domain.id: domain})
        if not force:
            refuse(store, snapshot, found)
        yield
    except BaseException:
        with contextlib.suppress(NotFoundError):
            store.delete(mark.name)
        raise
    for pin in found:
        with contextlib.suppress(NotFoundError):
            store.delete(pin.name)


def refuse(store: Store, snapshot: str, found: list[Pin]) -> None:
    """RefusedError when there are pins."""
    held = [pin for pin in found if not pin.deletes]
    if held:
        listed = "; ".join(pin.describe() for pin in held[:_LISTED]) + ("; …" if len(held) > _LISTED else "")
        raise RefusedError(
            f"snapshot {snapshot} of {store.url} is needed by {listed}. Decouple or delete the disks there; "
            f"`snapcore pin remove` removes a pin that nobody needs; --force deletes the snapshot all the same, and "
            "what those disks have not fetched by then is lost to them"
        )


def of_snapshot(store: Store, snapshot: str, domains: Domains) -> list[Pin]:
    """Pins of a snapshot, and marks of its deletions."""
    return _load(store, f"{PREFIX}{snapshot}/", domains)


def load(store: Store, domains: Domains) -> list[Pin]:
    """All pins and marks, by snapshot."""
    return _load(store, PREFIX, domains)


def _load(store: Store, prefix: str, domains: Domains) -> list[Pin]:
    found = [_read(store, name, domains) for name, _ in list(store.list(prefix))]
    return [pin for pin in found if pin is not None]


def remove(store: Store, ref: str) -> str:
    """Remove the pin or mark of an id or the beginning of one. Returns the id."""
    names = [name for name, _ in store.list(PREFIX) if name.rpartition("/")[2].startswith(ref)]
    if not names or not ref:
        raise NotFoundError(f"{store.url} has no pin {ref!r}; see `snapcore pin list -r {store.url}`")
    if len(names) > 1:
        raise UsageError(f"{ref!r} stands for {len(names)} pins; give more digits")
    store.delete(names[0])
    return names[0].rpartition("/")[2]


def _read(store: Store, name: str, domains: Domains) -> Pin | None:
    """A pin; None for one that went meanwhile. One that cannot be read holds its snapshot all the same."""
    parsed = _NAME.fullmatch(name)
    if parsed is None:
        raise DamagedError(f"{store.url}/{name} is no name of a pin; remove what does not belong there")
    snapshot, pin_id = parsed.groups()
    where = f"{store.url}/{name}"
    try:
        data = store.get(name, envelope.OBJECT_LIMIT_BYTES)
    except NotFoundError:
        return None
    try:
        domain = domains.get(envelope.domain_of(data))
        if domain is None:
            raise LockedError(f"{where} is under a key that is not unlocked")
        kind, _, body = envelope.opened(data, where, bytes.fromhex(pin_id), domain)
        envelope.expect(kind, Kind.PIN, where)
        pin = envelope.from_json(body, Pin, where)
    except (DamagedError, LockedError):
        pin = None
    if pin is None or (pin.id, pin.snapshot) != (pin_id, snapshot):
        return Pin(id=pin_id, snapshot=snapshot, who="", created="")
    return pin


def removed(store: Store, snapshot: str, pin_id: str) -> None:
    """There is no pin of that id on that snapshot any more."""
    with contextlib.suppress(NotFoundError):
        store.delete(f"{PREFIX}{snapshot}/{pin_id}")
