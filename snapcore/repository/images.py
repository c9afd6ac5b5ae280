"""Images: templates of machines, each a root of its own (docs/FORMAT.md, "Sessions, … images").

An image holds the whole manifests of its snapshots: collections keep what it reaches, and it can be read, whatever
became of those manifests. All of its snapshots are of one domain, and so is it. It is made by a writer's session that
stores nothing, so all that collections promise writers holds for it (docs/DESIGN.md, "Two tiers", Images).
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

import msgspec

from snapcore.errors import DamagedError, Error, ExistsError, LockedError, NotFoundError, RefusedError, UsageError
from snapcore.repository import envelope, manifest, session
from snapcore.repository.domain import Domain, Domains
from snapcore.repository.envelope import Kind
from snapcore.repository.manifest import Manifest
from snapcore.store.interface import Store

PREFIX = session.IMAGES
SYSTEM = "/dev/xvda"
SNAPSHOTS_LIMIT = 16
TEXT_LIMIT = 128
_ID = re.compile(r"[0-9a-f]{32}")
_ID_PART = re.compile(r"[0-9a-f]{4,32}")
_DATA_DEVICE = re.compile(r"/dev/xvd[b-z]")
_ARCHITECTURE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Boot = Literal["bios", "uefi"]


class ImageDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk of an image.

    Attributes
    ----------
    device : str
        "/dev/xvda" is the system disk; others are "/dev/xvdb" to "/dev/xvdz".
    min_size_bytes : int
        A disk made of it has this size, or a larger one.
    snapshot : Manifest or None
        None: an empty disk.
    sha256 : str or None
        Of the snapshot's bytes, if somebody wanted it.
    """

    device: str
    min_size_bytes: int
    snapshot: Manifest | None
    sha256: str | None = None


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """A template that machines are made of.

    Attributes
    ----------
    id : str
        32 hexadecimal digits.
    name : str
    created : str
        UTC, RFC 3339, for people.
    architecture, boot, os : str
        For who makes machines: "x86_64", …; "bios" or "uefi"; any text.
    disks : list of ImageDisk
        The system disk first, then by device.
    tags : dict of str
    software : str
    key : str or None
        Id of the key that it and its snapshots are under.
    """

    id: str
    name: str
    created: str
    architecture: str
    boot: Boot
    os: str
    disks: list[ImageDisk]
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    software: str = ""
    key: str | None = None

    @property
    def snapshots(self) -> list[Manifest]:
        """Of its disks that are not empty."""
        return [disk.snapshot for disk in self.disks if disk.snapshot is not None]

    def disk(self, device: str) -> ImageDisk:
        """The disk of a device; "xvdb" will do for "/dev/xvdb"."""
        for disk in self.disks:
            if disk.device == full_device(device):
                return disk
        raise NotFoundError(f"image {self.name} has no disk {device!r}, but {', '.join(d.device for d in self.disks)}")


def full_device(device: str) -> str:
    """A device with its folder."""
    return device if device.startswith("/dev/") else f"/dev/{device}"


class Labels(msgspec.Struct, frozen=True, kw_only=True):
    """What an image says of itself; `Image` tells what each means. Checked by `check`."""

    name: str
    architecture: str = "x86_64"
    boot: Boot = "bios"
    os: str = ""
    tags: dict[str, str] = msgspec.field(default_factory=dict)

    def check(self) -> None:
        """UsageError for what cannot be."""
        if not _is_name(self.name):
            raise UsageError(
                f"an image's name has 2 to {TEXT_LIMIT} printable characters, a letter first, and does not look like "
                f"an id, not {self.name!r}"
            )
        if not _ARCHITECTURE.fullmatch(self.architecture):
            raise UsageError(f"an architecture is a word like x86_64 or aarch64, not {self.architecture!r}")
        if self.boot not in ("bios", "uefi"):
            raise UsageError(f"a machine boots by bios or uefi, not {self.boot!r}")
        if not _is_text(self.os):
            raise UsageError(f"an os is told in up to {TEXT_LIMIT} printable characters, not {self.os!r}")
        manifest.check_tags(self.tags)


def _is_text(text: str) -> bool:
    return len(text) <= TEXT_LIMIT and not any(unicodedata.category(sign)[0] == "C" for sign in text)


def _is_name(name: str) -> bool:
    return len(name) >= 2 and name[0].isalpha() and _is_text(name) and not _ID_PART.fullmatch(name)


def check_disks(disks: Sequence[ImageDisk]) -> list[ImageDisk]:
    """Disks of an image, in order, when they can be those of one.

    Raises
    ------
    UsageError, RefusedError
    """
    found = sorted(disks, key=lambda disk: disk.device)
    system = [disk for disk in found if disk.device == SYSTEM]
    if len(system) != 1 or system[0].snapshot is None:
        raise RefusedError(f"an image has one system disk, {SYSTEM}, made of a snapshot; {len(system)} were given")
    for disk in found:
        if disk.device != SYSTEM and not _DATA_DEVICE.fullmatch(disk.device):
            raise UsageError(f"the devices of data disks are /dev/xvdb to /dev/xvdz, not {disk.device!r}")
        least = 1 if disk.snapshot is None else disk.snapshot.size_bytes
        if not least <= disk.min_size_bytes <= manifest.SIZE_LIMIT_BYTES:
            raise UsageError(f"{disk.device} has {least} bytes at least, and {disk.min_size_bytes} were asked for")
    if len({disk.device for disk in found}) < len(found):
        raise UsageError("each device of an image is one disk: two were given for one")
    if sum(disk.snapshot is not None for disk in found) > 1 + SNAPSHOTS_LIMIT:
        raise UsageError(f"an image has up to {SNAPSHOTS_LIMIT} data disks that are made of snapshots")
    if len({disk.snapshot.key for disk in found if disk.snapshot is not None}) > 1:
        raise RefusedError(
            "the snapshots are under different keys, and an image is under one: copy them under one "
            "(`snapcore copy … --key NAME`), and make the image of the copies"
        )
    return found


def write(store: Store, image: Image, domain: Domain) -> None:
    """Commit an image: ExistsError when a tombstone was put in its place."""
    body = msgspec.json.encode(image)
    if len(body) > envelope.JSON_LIMIT_BYTES:
        raise UsageError(f"an image of {len(body)} bytes, where {envelope.JSON_LIMIT_BYTES} are the most: fewer tags")
    data = envelope.sealed(Kind.IMAGE, bytes.fromhex(image.id), body, domain)
    try:
        store.put_new(PREFIX + image.id, [data])
    except ExistsError:
        # A request that somebody on the way repeated was refused the second time.
        if store.get(PREFIX + image.id, envelope.OBJECT_LIMIT_BYTES) != data:
            raise


def load(store: Store, domains: Domains, chunk_bytes: int) -> list[Image]:
    """All images of these domains, oldest first."""
    found = []
    for name, _ in list(store.list(PREFIX)):
        with contextlib.suppress(LockedError):
            found.append(read(store, name, domains, chunk_bytes))
    return sorted((item for item in found if item is not None), key=lambda item: (item.created, item.id))


def find(store: Store, ref: str, domains: Domains, chunk_bytes: int) -> Image:
    """The image of an id, the beginning of one, or a name that only one has; LockedError for one of no such domain."""
    names = [name for name, _ in store.list(PREFIX) if _ID_PART.fullmatch(ref) and _id_in(name).startswith(ref)]
    found = [item for name in names if (item := read(store, name, domains, chunk_bytes)) is not None]
    if not found:
        found = [item for item in load(store, domains, chunk_bytes) if item.name == ref]
    if not found:
        raise NotFoundError(f"{store.url} has no image {ref!r}; see `snapcore image list -r {store.url}`")
    if len(found) > 1:
        listed = ", ".join(item.id for item in found[:5])
        raise UsageError(f"{ref!r} stands for {len(found)} images: {listed}; give an id")
    return found[0]


def delete(store: Store, image_id: str) -> None:
    """Remove an image, one that is damaged too. Its snapshots stay."""
    store.delete(PREFIX + image_id)


def matching(store: Store, ref: str) -> list[str]:
    """Ids of the images, readable or not, that begin so."""
    return [_id_in(name) for name, _ in store.list(PREFIX) if _ID_PART.fullmatch(ref) and _id_in(name).startswith(ref)]


def _id_in(name: str) -> str:
    return name.removeprefix(PREFIX)


def read(store: Store, name: str, domains: Domains, chunk_bytes: int) -> Image | None:
    """An image, every field checked; None for a tombstone, or one that was deleted meanwhile. See `manifest.read`."""
    where = f"{store.url}/{name}"
    if not session.is_image(name):
        raise DamagedError(f"{where} is no name of an image; remove what does not belong there")
    try:
        data = store.get(name, envelope.OBJECT_LIMIT_BYTES)
    except NotFoundError:
        return None
    object_id = bytes.fromhex(_id_in(name))
    if envelope.kind_of(data) == Kind.TOMBSTONE:
        envelope.opened(data, where, object_id)
        return None
    domain_id = envelope.domain_of(data)
    domain = domains.get(domain_id)
    if domain is None:
        envelope.check_stored(data, where, object_id)
        raise LockedError(f"{where} is of the domain {domain_id.hex()}, whose key is not unlocked", domain_id.hex())
    kind, _, body = envelope.opened(data, where, object_id, domain)
    envelope.expect(kind, Kind.IMAGE, where)
    image = envelope.from_json(body, Image, where)
    if not _is_sound(image, _id_in(name), domain, chunk_bytes):
        raise DamagedError(f"{where} has members that contradict each other or its name")
    return image


def _is_sound(image: Image, image_id: str, domain: Domain, chunk_bytes: int) -> bool:
    try:
        Labels(name=image.name, architecture=image.architecture, boot=image.boot, os=image.os, tags=image.tags).check()
        in_order = check_disks(image.disks) == image.disks
    except Error:
        return False
    return (
        in_order
        and image.id == image_id
        and image.key == domain.key_id
        and all(manifest.is_sound(item, domain, chunk_bytes) for item in image.snapshots)
        and all(disk.sha256 is None or _SHA256.fullmatch(disk.sha256) for disk in image.disks)
    )
