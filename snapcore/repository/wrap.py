"""Key objects: the root of a domain wrapped by one holder, and the marks beside them (docs/FORMAT.md, "Keys").

Nothing here knows a secret. What is read may come from anybody: it counts when it unwraps.
"""

from __future__ import annotations

import base64
import re

import msgspec

from snapcore.errors import DamagedError
from snapcore.keys.interface import Parameters, Place
from snapcore.keys.wrapping import WRAPPED_BYTES
from snapcore.repository import envelope
from snapcore.repository.envelope import Kind
from snapcore.store.interface import Reader

PREFIX = "keys/"
NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_LIMIT_BYTES = 64 << 10
_ID = re.compile(r"[0-9a-f]{32}")
_KIND = re.compile(r"[a-z0-9-]{1,32}")
_OBJECT = re.compile(r"keys/([0-9a-f]{32})/(?:(disabled)|([0-9a-f]{32})(-removal)?)")


class Wrap(msgspec.Struct, frozen=True, kw_only=True):
    """A root that one holder can unwrap.

    Attributes
    ----------
    domain, holder : str
        Ids, 32 hexadecimal digits each.
    name : str
        Of the key, for people.
    kind : str
        Of the holder.
    parameters : dict
        What leads the holder to its wrapping key.
    created : str
        UTC, RFC 3339, for people.
    wrapped : str
        Base64.
    """

    domain: str
    holder: str
    name: str
    kind: str
    parameters: Parameters
    created: str
    wrapped: str = ""

    @property
    def place(self) -> Place:
        """What the wrapping key is for."""
        return Place(self.domain, self.holder)

    @property
    def bound(self) -> bytes:
        """All that the wrapped root is bound to: every member but itself."""
        members = msgspec.to_builtins(self)
        del members["wrapped"]
        return msgspec.json.encode(members, order="deterministic")

    @property
    def wrapped_bytes(self) -> bytes:
        """The wrapped root."""
        return base64.b64decode(self.wrapped)

    def with_root(self, wrapped: bytes) -> Wrap:
        """The same with its wrapped root."""
        return msgspec.structs.replace(self, wrapped=base64.b64encode(wrapped).decode())

    def to_bytes(self) -> bytes:
        """The whole object."""
        return envelope.sealed(Kind.KEY, bytes.fromhex(self.holder), msgspec.json.encode(self))


class Found(msgspec.Struct, frozen=True):
    """What the name of a key object says: the domain, and a holder or a mark."""

    domain: str
    holder: str | None
    mark: bool


def parse_name(object_name: str) -> Found | None:
    """What the name of an object under `keys/` says; None for one that does not belong there."""
    match = _OBJECT.fullmatch(object_name)
    return None if match is None else Found(match[1], match[3], match[3] is None or match[4] is not None)


def name(domain: str, holder: str) -> str:
    """Name of a wrap in the store."""
    return f"{PREFIX}{domain}/{holder}"


def removal_name(domain: str, holder: str) -> str:
    """Name of the mark that says that a holder is being removed."""
    return f"{name(domain, holder)}-removal"


def disabled_name(domain: str) -> str:
    """Name of the mark that says that a key is disabled."""
    return f"{PREFIX}{domain}/disabled"


def mark(holder: str) -> bytes:
    """A mark as an object."""
    return envelope.sealed(Kind.KEY, bytes.fromhex(holder), b"{}")


def read(store: Reader, domain: str, holder: str) -> Wrap:
    """A wrap, every field within its bounds; DamagedError, NotFoundError, UnsupportedFormatError."""
    where = name(domain, holder)
    data = store.get(where, _LIMIT_BYTES)
    kind, _, body = envelope.opened(data, where, bytes.fromhex(holder))
    envelope.expect(kind, Kind.KEY, where)
    found = envelope.from_json(body, Wrap, where)
    try:
        wrapped = base64.b64decode(found.wrapped, validate=True)
    except ValueError as error:
        raise DamagedError(f"{where} holds no wrapped root: {error}") from error
    whole = (
        (found.domain, found.holder) == (domain, holder)
        and _ID.fullmatch(domain)
        and _ID.fullmatch(holder)
        and NAME.fullmatch(found.name)
        and _KIND.fullmatch(found.kind)
        and len(wrapped) == WRAPPED_BYTES
    )
    if not whole:
        raise DamagedError(f"{where} has members that are none or contradict its name")
    return found
