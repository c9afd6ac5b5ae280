"""What versions, disks and groups there are: the records, the version tree between them, and their bytes.

A version is a head (a live disk), a snapshot, or a ghost (deleted, but still between others). Everything here is
plain data; the roots of heads live in the kernel while the pool is open.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from snapcore.errors import DamagedError

# Numbers are of 32 bits in the log; a change takes a few hundred at the most.
MAX_ID = (1 << 32) - (1 << 16)
MIN_CHUNK_BYTES = 4096
MAX_CHUNK_BYTES = 64 << 20

Kind = Literal["head", "snapshot", "ghost"]


class Version(msgspec.Struct, forbid_unknown_fields=True):
    """A root of a tree.

    Attributes
    ----------
    id, parent : int
        Never used twice; parent 0 is none.
    root : int
        Of a head: as of the checkpoint that this was read from.
    disk : int
        That it belongs to, or belonged to.
    disk_name : str
        As it was at the cut, for when the disk is gone.
    backing : int
        Image that absent blocks are read from, or 0.
    group : int
        That it was cut in, or 0.
    stirred : bool
        A ghost that may hold what nobody needs.
    """

    id: int
    parent: int
    kind: Kind
    root: int
    size_bytes: int
    disk: int
    disk_name: str = ""
    name: str = ""
    created_ns: int = 0
    backing: int = 0
    group: int = 0
    stirred: bool = False


class DiskRecord(msgspec.Struct, forbid_unknown_fields=True):
    """A live disk: its head, and what it came from (`origin_kind` "", "snapshot", "image" or "disk")."""

    id: int
    name: str
    head: int
    created_ns: int
    origin_kind: str = ""
    origin: int = 0


class Region(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A snapshot in a repository: where that is, the ids of both, and the length of the repository's chunks."""

    url: str
    repository: str
    snapshot: str
    chunk_bytes: int


class Backing(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A raw image that disks read from; it must stay as it was. With a region: one that fills up from there."""

    id: int
    path: str
    size_bytes: int
    mtime_ns: int
    region: Region | None = None

    @property
    def is_own(self) -> bool:
        """Whether it is the pool's: in its folder, which may move. Others have absolute paths."""
        return self.path == f"lazy/{self.id}.data"


class Group(msgspec.Struct, forbid_unknown_fields=True):
    """Snapshots that were cut at one instant."""

    id: int
    name: str
    created_ns: int


class _Stored(msgspec.Struct, forbid_unknown_fields=True):
    versions: list[Version]
    disks: list[DiskRecord]
    backings: list[Backing]
    groups: list[Group]
    next_id: int
    slots: bytes


@dataclass(slots=True)
class Catalog:
    """All records, by id, and the children of each version."""

    versions: dict[int, Version] = field(default_factory=dict)
    disks: dict[int, DiskRecord] = field(default_factory=dict)
    backings: dict[int, Backing] = field(default_factory=dict)
    groups: dict[int, Group] = field(default_factory=dict)
    children: dict[int, set[int]] = field(default_factory=dict)
    next_id: int = 1

    def use_ids(self, *ids: int) -> None:
        """These numbers are taken."""
        self.next_id = max(self.next_id, *(number + 1 for number in ids))

    def add(self, version: Version) -> None:
        """Put a version under its parent."""
        self.versions[version.id] = version
        self.children[version.id] = set()
        if version.parent:
            self.children[version.parent].add(version.id)

    def move(self, version: int, parent: int) -> None:
        """Give a version another parent."""
        record = self.versions[version]
        if record.parent:
            self.children[record.parent].discard(version)
        record.parent = parent
        if parent:
            self.children[parent].add(version)

    def remove(self, version: int) -> None:
        """Take a version out; its only child, if it has one, goes to its parent."""
        record = self.versions[version]
        for child in [*self.children[version]]:
            self.move(child, record.parent)
        if record.parent:
            self.children[record.parent].discard(version)
        del self.versions[version], self.children[version]

    def neighbours(self, version: int) -> Iterator[int]:
        """Parent and children."""
        if self.versions[version].parent:
            yield self.versions[version].parent
        yield from self.children[version]

    def of_kind(self, kind: Kind) -> list[Version]:
        """All versions of a kind, oldest first."""
        return [record for _, record in sorted(self.versions.items()) if record.kind == kind]

    def part(self, members: Iterable[int]) -> tuple[list[int], list[int]]:
        """These versions with all ghosts that hang together with them, and the visible ones beside (DESIGN: C, B)."""
        chosen = set(members)
        inside: set[int] = set()
        beside: set[int] = set()
        ahead = [*chosen]
        while ahead:
            version = ahead.pop()
            if version in inside:
                continue
            inside.add(version)
            for other in self.neighbours(version):
                if self.versions[other].kind == "ghost" or other in chosen:
                    ahead.append(other)
                else:
                    beside.add(other)
        return sorted(inside), sorted(beside)

    def family(self, version: int) -> int:
        """The oldest ancestor."""
        while self.versions[version].parent:
            version = self.versions[version].parent
        return version

    def families(self) -> dict[int, int]:
        """The oldest ancestor of each version."""
        found: dict[int, int] = {}
        for version in self.versions:
            way = []
            while version not in found and self.versions[version].parent:
                way.append(version)
                version = self.versions[version].parent
            oldest = found.setdefault(version, version)
            found.update(dict.fromkeys(way, oldest))
        return found

    def encode(self, roots: dict[int, int], slots: bytes) -> bytes:
        """As bytes; heads get the roots given."""
        versions = [
            msgspec.structs.replace(record, root=roots[number]) if number in roots else record
            for number, record in sorted(self.versions.items())
        ]
        records = ([*self.disks.values()], [*self.backings.values()], [*self.groups.values()])
        return msgspec.msgpack.encode(_Stored(versions, *records, self.next_id, slots))


def decode(data: bytes, where: str) -> tuple[Catalog, bytes]:
    """The catalog, and the bitmap of used slots."""
    try:
        stored = msgspec.msgpack.decode(data, type=_Stored)
        catalog = Catalog(next_id=stored.next_id)
        catalog.backings = {record.id: record for record in stored.backings}
        catalog.groups = {record.id: record for record in stored.groups}
        catalog.disks = {record.id: record for record in stored.disks}
        catalog.versions = {record.id: record for record in stored.versions}
        catalog.children = {number: set() for number in catalog.versions}
        for record in stored.versions:
            if record.parent:
                catalog.children[record.parent].add(record.id)
    except (msgspec.DecodeError, KeyError, ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: the catalog cannot be read: {error}; restore the pool from a backup") from None
    check(catalog, where)
    return catalog, stored.slots


def check(catalog: Catalog, where: str) -> None:
    """Every reference leads somewhere, and ancestors come to an end; else a DamagedError."""
    try:
        _check_versions(catalog)
        _check_disks(catalog)
    except (KeyError, ValueError) as error:
        raise DamagedError(f"{where}: the catalog cannot be right: {error}; restore the pool from a backup") from None


def _check_versions(catalog: Catalog) -> None:
    for record in catalog.versions.values():
        if not 0 <= record.size_bytes <= 1 << 47 or not 0 < record.id < 1 << 32 or not 0 <= record.root < 1 << 64:
            raise ValueError(f"version {record.id} has values that none has")
        if record.backing and record.backing not in catalog.backings:
            raise ValueError(f"version {record.id} refers to an image that is not there")
        if record.kind == "head" and (catalog.children[record.id] or catalog.disks[record.disk].head != record.id):
            raise ValueError(f"version {record.id} is no disk's head")
    good: set[int] = {0}
    for number in catalog.versions:
        path: dict[int, None] = {}
        while number not in good:
            if number in path:
                raise ValueError(f"version {number} is its own ancestor")
            path[number] = None
            number = catalog.versions[number].parent
        good.update(path)
    for backing in catalog.backings.values():
        if not 0 <= backing.size_bytes <= 1 << 47 or not -(1 << 63) <= backing.mtime_ns < 1 << 63:
            raise ValueError(f"image {backing.id} has values that none has")
        if backing.is_own or backing.region is not None:
            _check_own(backing)


def _check_own(backing: Backing) -> None:
    """A name that leads nowhere else, and chunks of which a bitmap can be made."""
    chunk_bytes = backing.region.chunk_bytes if backing.region is not None else MAX_CHUNK_BYTES
    if (
        not backing.is_own
        or not backing.size_bytes
        or not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES
        or chunk_bytes & (chunk_bytes - 1)
    ):
        raise ValueError(f"image {backing.id} has values that none of the pool's own has")


def _check_disks(catalog: Catalog) -> None:
    for disk in catalog.disks.values():
        if catalog.versions[disk.head].kind != "head" or catalog.versions[disk.head].disk != disk.id:
            raise ValueError(f"disk {disk.id} has no head")
        if disk.origin_kind == "image" and disk.origin not in catalog.backings:
            raise ValueError(f"disk {disk.id} refers to an image that is not there")
    if len({disk.name for disk in catalog.disks.values()}) != len(catalog.disks):
        raise ValueError("two disks have one name")
    numbers = [0, *catalog.versions, *catalog.disks, *catalog.backings, *catalog.groups]
    if not max(numbers) < catalog.next_id <= MAX_ID or min(numbers) < 0:
        raise ValueError("numbers would be used twice, or there are none left")
