"""What happens to versions, as the log tells it (docs/FORMAT.md, EVENT).

An event is applied at run time and in recovery by the same code (versions.py).
"""

from __future__ import annotations

import msgspec

from snapcore.pool.catalog import Backing


class MakeDisk(msgspec.Struct, tag="disk", forbid_unknown_fields=True):
    """A new disk, empty, or with the content of a snapshot (`parent`), or over an image, which others may use."""

    disk: int
    version: int
    name: str
    size_bytes: int
    created_ns: int
    parent: int = 0
    backing: Backing | None = None


class MakeDisks(msgspec.Struct, tag="disks", forbid_unknown_fields=True):
    """Several new disks: all or none."""

    disks: list[MakeDisk]


class Cut(msgspec.Struct, tag="cut", forbid_unknown_fields=True):
    """Snapshots at one instant: (disk, new version, name) each; `group` 0 is none."""

    cuts: list[tuple[int, int, str]]
    created_ns: int
    group: int = 0
    group_name: str = ""


class Clone(msgspec.Struct, tag="clone", forbid_unknown_fields=True):
    """A new disk beside a live one; `ghost` is the version between that both now come from."""

    source: int
    ghost: int
    disk: int
    version: int
    name: str
    created_ns: int
    size_bytes: int


class Rehead(msgspec.Struct, tag="rehead", forbid_unknown_fields=True, omit_defaults=True):
    """A disk goes on from another version: `parent`, or nothing. The old head becomes a ghost.

    `image` is that of `backing`, if it is new.
    """

    disk: int
    version: int
    parent: int
    size_bytes: int
    backing: int
    image: Backing | None = None


class Resize(msgspec.Struct, tag="resize", forbid_unknown_fields=True):
    """A disk has another size."""

    disk: int
    size_bytes: int


class Rename(msgspec.Struct, tag="rename", forbid_unknown_fields=True):
    """A disk has another name."""

    disk: int
    name: str


class Delete(msgspec.Struct, tag="delete", forbid_unknown_fields=True):
    """Snapshots become ghosts."""

    versions: list[int]


class DeleteDisk(msgspec.Struct, tag="delete-disk", forbid_unknown_fields=True):
    """A disk goes, and its head becomes a ghost."""

    disk: int


class Decouple(msgspec.Struct, tag="decouple", forbid_unknown_fields=True):
    """All of an image is here: its region is forgotten."""

    backing: int


class Sweep(msgspec.Struct, tag="sweep", forbid_unknown_fields=True):
    """The part of ghosts around this version is swept."""

    version: int


Event = MakeDisk | MakeDisks | Cut | Clone | Rehead | Resize | Rename | Delete | DeleteDisk | Decouple | Sweep

_decoder = msgspec.msgpack.Decoder(Event)


def encode(event: Event) -> bytes:
    """The bytes in the log."""
    return msgspec.msgpack.encode(event)


def decode(data: bytes) -> Event:
    """Raises msgspec.DecodeError."""
    event: Event = _decoder.decode(data)
    return event
