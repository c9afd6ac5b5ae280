"""Manifests: one a snapshot, the only commit point (docs/FORMAT.md, "Manifest")."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Iterable, Iterator

import msgspec

from snapcore.errors import DamagedError, ExistsError, LockedError, NotFoundError, UsageError
from snapcore.repository import envelope, tree
from snapcore.repository.domain import PLAIN, Domain, Domains
from snapcore.repository.envelope import Kind
from snapcore.repository.tree import Root
from snapcore.store.interface import Store

PREFIX = "snapshots/"
DELETED = "deleted/"
DISK_NAME_LIMIT = 255
SIZE_LIMIT_BYTES = 1 << 60
SEQUENCE_LIMIT = 0xFFFFFFFF
TAGS_LIMIT = 64
TAG_KEY_LIMIT = 128
TAG_VALUE_LIMIT = 256
_COUNT_LIMIT_BYTES = 1 << 62
_ID = re.compile(r"[0-9a-f]{32}")
_ROOT = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"snapshots/([0-9a-f]{16})/([0-9a-f]{8})-([0-9a-f]{32})")


class CopiedFrom(msgspec.Struct, frozen=True, kw_only=True):
    """Where a copy comes from.

    Attributes
    ----------
    repository, snapshot : str
        Ids, 32 hexadecimal digits each: of the repository, and of the snapshot in it.
    key : str or None
        Id of the key that the snapshot is under there.
    sequence : int
        Of the snapshot there.
    root : str
        Of its tree, in hexadecimal.
    at : str
        When it was copied: UTC, RFC 3339, for people.
    """

    repository: str
    snapshot: str
    key: str | None
    sequence: int
    root: str
    at: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot. Immutable; all sizes in bytes.

    Attributes
    ----------
    id, disk, parent : str
        Own id (32 hexadecimal digits), name of the disk, id of the snapshot it was compared with or None.
    sequence : int
        1 + that of the parent: the order within the disk's chain.
    created : str
        UTC, RFC 3339, for people; of a copy, that of its source.
    size_bytes, chunk_bytes, levels, root
        Size of the disk, of a chunk, height of the tree, its root id in hexadecimal.
    written_bytes, changed_bytes, new_bytes, stored_bytes : int
        In chunks that are not all zero; in chunks that differ from the parent's; added before
        compression; added to the repository.
    fallback_reason : str or None
        Why more was read or hashed than what changed.
    label, tags, source, software
        For people.
    key : str or None
        Id of the key that it is sealed under, 32 hexadecimal digits; None for a plain one.
    copied : CopiedFrom or None
        Of a copy, where it comes from.
    origin : str or None
        Where else these very bytes are: a snapshot of a pool, say.
    group : str or None
        Id of the group that it belongs to.
    """

    id: str
    disk: str
    sequence: int
    parent: str | None
    created: str
    size_bytes: int
    chunk_bytes: int
    levels: int
    root: str
    written_bytes: int
    changed_bytes: int
    new_bytes: int
    stored_bytes: int
    fallback_reason: str | None = None
    label: str | None = None
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    source: str | None = None
    software: str = ""
    key: str | None = None
    copied: CopiedFrom | None = None
    origin: str | None = None
    group: str | None = None

    @property
    def tree(self) -> Root:
        """Root of the snapshot's tree."""
        return Root(bytes.fromhex(self.root), self.levels)

    @property
    def chunks(self) -> int:
        """Chunks of the disk, zero ones included."""
        return -(-self.size_bytes // self.chunk_bytes)


# Its public name.
Snapshot = Manifest


def check_disk(disk: str) -> str:
    """The name of a disk, when it is one: 1 to 255 printable characters."""
    if not 1 <= len(disk) <= DISK_NAME_LIMIT or any(unicodedata.category(sign)[0] == "C" for sign in disk):
        raise UsageError(f"a disk's name has 1 to {DISK_NAME_LIMIT} printable characters, not {disk!r}")
    return disk


def check_tags(tags: dict[str, str]) -> dict[str, str]:
    """Tags, when they are some: few, short and printable."""
    for key, value in tags.items():
        if not f"{key}{value}".isprintable():
            raise UsageError(f"keys and values of tags are printable text, not {key!r}: {value!r}")
        if len(key) > TAG_KEY_LIMIT or len(value) > TAG_VALUE_LIMIT:
            raise UsageError(
                f"a tag has a key of up to {TAG_KEY_LIMIT} signs and a value of up to {TAG_VALUE_LIMIT}, "
                f"not {len(key)} and {len(value)} as {key[:TAG_KEY_LIMIT]!r} has"
            )
    if len(tags) > TAGS_LIMIT:
        raise UsageError(f"a snapshot has up to {TAGS_LIMIT} tags, not {len(tags)}")
    return dict(tags)


def name(domain: Domain, disk: str, sequence: int, snapshot_id: str) -> str:
    """Name of a manifest in the store."""
    return f"{PREFIX}{domain.disk_tag(disk)}/{sequence:08x}-{snapshot_id}"


def is_name(object_name: str) -> bool:
    """Whether an object of this name is a manifest or a tombstone."""
    return _NAME.fullmatch(object_name) is not None


def names(store: Store, domain: Domain | None = None, disk: str | None = None) -> Iterator[str]:
    """Names of all manifests (and tombstones), or of those of one disk in the order of its chain."""
    return (found for found, _ in listed(store, domain, disk))


def listed(store: Store, domain: Domain | None = None, disk: str | None = None) -> Iterator[tuple[str, int]]:
    """(name, size in bytes) of the same."""
    prefix = PREFIX
    if domain is not None and disk is not None:
        prefix = f"{PREFIX}{domain.disk_tag(disk)}/"
    for found, size_bytes in store.list(prefix):
        if not _NAME.fullmatch(found):
            raise DamagedError(f"{store.url}/{found} is no name of a snapshot; remove what does not belong there")
        yield found, size_bytes


def id_in(object_name: str) -> str:
    """The snapshot's id in the name of its manifest."""
    return object_name[-32:]


def write(store: Store, object_name: str, manifest: Manifest, domain: Domain = PLAIN) -> int:
    """Commit a snapshot: ExistsError when a tombstone was put in its place, UsageError when nobody could read it."""
    if manifest.key != domain.key_id:
        raise ValueError(f"a manifest of the key {manifest.key} for the domain {domain}")
    body = msgspec.json.encode(manifest)
    if len(body) > envelope.JSON_LIMIT_BYTES:
        raise UsageError(
            f"label, tags and the source's name make a manifest of {len(body)} bytes where "
            f"{envelope.JSON_LIMIT_BYTES} are the most"
        )
    return store.put_new(object_name, [envelope.sealed(Kind.MANIFEST, bytes.fromhex(manifest.id), body, domain)])


def write_tombstone(store: Store, object_name: str) -> None:
    """Fence a writer: its commit under this name fails from now on. ExistsError when it has committed."""
    store.put_new(object_name, [envelope.sealed(Kind.TOMBSTONE, bytes.fromhex(id_in(object_name)), b"{}")])


def read(store: Store, object_name: str, domains: Domains, chunk_bytes: int) -> Manifest | None:
    """A manifest, every field checked, its chunk size too; None for a tombstone or one that was deleted meanwhile.

    LockedError for one that is well, as far as can be seen, and of none of these domains.
    """
    try:
        data = store.get(object_name, envelope.OBJECT_LIMIT_BYTES)
    except NotFoundError:
        return None
    return parse(data, f"{store.url}/{object_name}", object_name, domains, chunk_bytes)


def read_now(store: Store, object_name: str, domains: Domains, chunk_bytes: int) -> Manifest | None:
    """A manifest that is there now, as `read`: one that only a cache remembers is not."""
    try:
        size_bytes = store.size(object_name)
        data = store.get(object_name, envelope.OBJECT_LIMIT_BYTES)
    except NotFoundError:
        return None
    if len(data) != size_bytes:
        # It was deleted, and a tombstone came to stand there.
        return None
    return parse(data, f"{store.url}/{object_name}", object_name, domains, chunk_bytes)


def parse(data: bytes, where: str, object_name: str, domains: Domains, chunk_bytes: int) -> Manifest | None:
    """A manifest that stands, or stood, under a name, from its bytes; see `read`."""
    object_id = bytes.fromhex(id_in(object_name))
    found = envelope.domain_of(data)
    # Tombstones stand in the clear: whoever ends a session need not have its key.
    domain = PLAIN if envelope.kind_of(data) == Kind.TOMBSTONE else domains.get(found)
    if domain is None:
        envelope.check_stored(data, where, object_id)
        raise LockedError(f"{where} is of the domain {found.hex()}, whose key is not unlocked", found.hex())
    kind, _, body = envelope.opened(data, where, object_id, domain)
    if kind == Kind.TOMBSTONE:
        return None
    envelope.expect(kind, Kind.MANIFEST, where)
    manifest = envelope.from_json(body, Manifest, where)
    named = name(domain, manifest.disk, manifest.sequence, manifest.id)
    if object_name != named or not is_sound(manifest, domain, chunk_bytes):
        raise DamagedError(f"{where} has members that contradict each other or its name")
    return manifest


def is_sound(manifest: Manifest, domain: Domain, chunk_bytes: int) -> bool:
    """Whether no member of a manifest contradicts another one, or the domain."""
    counts = (manifest.written_bytes, manifest.changed_bytes, manifest.new_bytes, manifest.stored_bytes)
    return bool(
        0 <= manifest.size_bytes <= SIZE_LIMIT_BYTES
        and manifest.chunk_bytes == chunk_bytes
        and manifest.levels == tree.levels_for(manifest.chunks)
        and _ROOT.fullmatch(manifest.root)
        and (manifest.copied is None or _is_whole(manifest.copied))
        and all(0 <= count <= _COUNT_LIMIT_BYTES for count in counts)
        and manifest.key == domain.key_id
        and is_name(name(domain, manifest.disk, manifest.sequence, manifest.id))
    )


def delete(store: Store, object_name: str, domain: Domain) -> None:
    """Remove a manifest, and leave its bytes under `deleted/` until the collections that may still need them are over.

    A writer may have begun from this snapshot: all below its root stays until that writer has ended.
    """
    data = store.get(object_name, envelope.OBJECT_LIMIT_BYTES)
    with contextlib.suppress(ExistsError):
        # There from a deletion that died before the removal.
        store.put_new(f"{DELETED}{domain.folder}{object_name.removeprefix(PREFIX)}", [data])
    store.delete(object_name)


def deleted(store: Store, domain: Domain) -> list[str]:
    """What follows `deleted/`, and the domain, in the names of the deleted manifests of a domain."""
    prefix = DELETED + domain.folder
    found = (name.removeprefix(prefix) for name, _ in store.list(prefix))
    return [tail for tail in found if is_name(PREFIX + tail)]


def read_deleted(store: Store, tail: str, domain: Domain, chunk_bytes: int) -> Manifest | None:
    """A deleted manifest; None for one that is needed no more."""
    name = f"{DELETED}{domain.folder}{tail}"
    try:
        data = store.get(name, envelope.OBJECT_LIMIT_BYTES)
    except NotFoundError:
        return None
    return parse(data, f"{store.url}/{name}", PREFIX + tail, {domain.id: domain}, chunk_bytes)


def forget_deleted(store: Store, tails: Iterable[str], domain: Domain) -> int:
    """Remove deleted manifests. Returns the bytes freed."""
    freed_bytes = 0
    for tail in tails:
        name = f"{DELETED}{domain.folder}{tail}"
        with contextlib.suppress(NotFoundError):
            size_bytes = store.size(name)
            store.delete(name)
            freed_bytes += size_bytes
    return freed_bytes


def _is_whole(copied: CopiedFrom) -> bool:
    ids = [copied.repository, copied.snapshot, *([] if copied.key is None else [copied.key])]
    return bool(
        all(map(_ID.fullmatch, ids)) and _ROOT.fullmatch(copied.root) and 0 <= copied.sequence <= SEQUENCE_LIMIT
    )
