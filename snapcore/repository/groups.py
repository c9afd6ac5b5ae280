"""Groups: which snapshots were cut at one instant (docs/FORMAT.md, "Sessions, tombstones, damage, groups").

A group's object is written when all its members are there; before that there is no group. Members are ordinary
snapshots and can be deleted alone; then the group lacks them. All are of one domain, and so is the group.
"""

from __future__ import annotations

import contextlib
import re
from typing import Literal

import msgspec

from snapcore.errors import DamagedError, LockedError, NotFoundError, UsageError
from snapcore.repository import envelope
from snapcore.repository.domain import PLAIN, Domain, Domains
from snapcore.repository.envelope import Kind
from snapcore.store.interface import Store

PREFIX = "groups/"
MEMBERS_LIMIT = 128
_ID = re.compile(r"[0-9a-f]{32}")
_ID_PART = re.compile(r"[0-9a-f]{4,32}")


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of a group: the disk's name and the snapshot's id."""

    disk: str
    snapshot: str


class HookRun(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a command around the cut.

    Attributes
    ----------
    exit_code : int or None
        Negative for a signal; None when it could not be run or ran out of time.
    timed_out : bool
    duration_s : float
    """

    exit_code: int | None
    timed_out: bool
    duration_s: float

    @property
    def ok(self) -> bool:
        """Whether it ended well and in time."""
        return self.exit_code == 0


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Snapshots that were cut at one instant.

    Attributes
    ----------
    id : str
        32 hexadecimal digits.
    name : str or None
    created : str
        The instant of the cut, UTC, RFC 3339, for people.
    members : list of Member
    freeze, thaw : HookRun or None
        The commands around the cut.
    consistency : str
        "application" when freeze ended well, else "crash".
    """

    id: str
    name: str | None
    created: str
    members: list[Member]
    freeze: HookRun | None = None
    thaw: HookRun | None = None
    consistency: Literal["application", "crash"] = "crash"


def write(store: Store, group: Group, domain: Domain = PLAIN) -> None:
    """Commit a group of snapshots of a domain."""
    body = msgspec.json.encode(group)
    store.put_new(PREFIX + group.id, [envelope.sealed(Kind.GROUP, bytes.fromhex(group.id), body, domain)])


def load(store: Store, domains: Domains) -> list[Group]:
    """All groups of these domains, oldest first."""
    found = []
    for name, _ in list(store.list(PREFIX)):
        with contextlib.suppress(LockedError):
            found.append(_read(store, name.removeprefix(PREFIX), domains))
    return sorted((group for group in found if group is not None), key=lambda group: (group.created, group.id))


def find(store: Store, ref: str, domains: Domains) -> Group:
    """The group of an id, the beginning of one, or a name that only one has; LockedError for one of no such domain."""
    ids = [name.removeprefix(PREFIX) for name, _ in store.list(PREFIX)]
    matching = [group_id for group_id in ids if _ID_PART.fullmatch(ref) and group_id.startswith(ref)]
    found = [group for group_id in matching if (group := _read(store, group_id, domains)) is not None]
    if not found:
        found = [group for group in load(store, domains) if group.name == ref]
    if not found:
        raise NotFoundError(f"{store.url} has no group {ref!r}; see `snapcore group list -r {store.url}`")
    if len(found) > 1:
        listed = ", ".join(group.id for group in found[:5])
        raise UsageError(f"{ref!r} stands for {len(found)} groups: {listed}; give an id")
    return found[0]


def is_there(store: Store, group_id: str) -> bool:
    """Whether a group is complete."""
    try:
        store.size(PREFIX + group_id)
    except NotFoundError:
        return False
    return True


def _read(store: Store, group_id: str, domains: Domains) -> Group | None:
    where = f"{store.url}/{PREFIX}{group_id}"
    if not _ID.fullmatch(group_id):
        raise DamagedError(f"{where} is no name of a group; remove what does not belong there")
    try:
        data = store.get(PREFIX + group_id, envelope.OBJECT_LIMIT_BYTES)
    except NotFoundError:
        return None
    object_id, domain_id = bytes.fromhex(group_id), envelope.domain_of(data)
    domain = domains.get(domain_id)
    if domain is None:
        envelope.check_stored(data, where, object_id)
        raise LockedError(f"{where} is of the domain {domain_id.hex()}, whose key is not unlocked", domain_id.hex())
    kind, _, body = envelope.opened(data, where, object_id, domain)
    envelope.expect(kind, Kind.GROUP, where)
    group = envelope.from_json(body, Group, where)
    ids = [member.snapshot for member in group.members]
    if group.id != group_id or not 1 <= len(ids) <= MEMBERS_LIMIT or not all(map(_ID.fullmatch, ids)):
        raise DamagedError(f"{where} has members that contradict each other or its name")
    return group
