"""The cold tier: snapshots in a folder or object store, content-addressed; any of them restores the whole disk."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace

from snapcore import extents
from snapcore.errors import (
    DamagedError,
    LockedError,
    NotFoundError,
    ReadError,
    RefusedError,
    UnsupportedFormatError,
    UsageError,
)
from snapcore.extents import Extents
from snapcore.keys import Holder
from snapcore.persist import Medium
from snapcore.progress import ProgressCallback
from snapcore.repository import (
    codec,
    collect,
    config,
    copy,
    copy_rules,
    create,
    difference,
    groups,
    images,
    lineage,
    make_image,
    manifest,
    marks,
    pins,
    rebuild,
    restore,
    session,
    summaries,
    verify,
)
from snapcore.repository.collect import Collected, Patience
from snapcore.repository.config import CHUNK_BYTES, Config
from snapcore.repository.context import Context
from snapcore.repository.copy import Copied, Way
from snapcore.repository.copy_rules import Destination
from snapcore.repository.create import CHECKED_SHARE, Created, Request
from snapcore.repository.domain import PLAIN, Domain
from snapcore.repository.groups import Group
from snapcore.repository.images import Boot, Image, ImageDisk, Labels
from snapcore.repository.index import ReplacedError
from snapcore.repository.keyring import Key, Keyring
from snapcore.repository.lineage import KeyChoice
from snapcore.repository.manifest import Manifest
from snapcore.repository.marks import Usage
from snapcore.repository.pins import Pin
from snapcore.repository.reader import SnapshotReader
from snapcore.repository.restore import Restored
from snapcore.repository.session import Session
from snapcore.repository.share import Share, Whole
from snapcore.repository.verify import Verified
from snapcore.source import Source, Target, open_as_named, open_target
from snapcore.store import Store, open_store, with_cache

SnapshotLike = Manifest | str
_LOADS = 3
_ID_PART = re.compile(r"[0-9a-f]{4,32}")


@dataclass(frozen=True, slots=True)
class LockedSnapshot:
    """A snapshot under a key that is not unlocked: that it is there is all that can be told.

    Attributes
    ----------
    id : str
    key : str
        Id of the key.
    """

    id: str
    key: str


class Repository:
    """A repository. Make one with `Repository.create`, open it with `Repository.open`.

    What is sealed under a key is seen once the key is unlocked: `open` with its holder, or `unlock`. `keyring` makes
    keys and changes who holds them.

    Every method may be called from many threads, processes and hosts at once, `collect` among them.
    """

    def __init__(self, store: Store, found: Config) -> None:
        self._context = Context(with_cache(store, found.id), found, PLAIN)
        # What looks after the store itself sees no cache of it.
        self._direct = replace(self._context, store=store)
        self.keyring = Keyring(store)

    @classmethod
    def create(
        cls, place: str | os.PathLike[str] | Store, *, chunk_bytes: int = CHUNK_BYTES, compression: str = "lz4"
    ) -> Repository:
        """Make a new repository.

        Parameters
        ----------
        place : path or Store
            A folder that is empty or not there yet, `s3://BUCKET/PREFIX`, or a store of your own.
        chunk_bytes : int
            A power of two from 4 KiB to 4 MiB. Smaller chunks share more and cost more index (56 bytes each).
        compression : str
            "lz4", "zstd" or "none".

        Raises
        ------
        ExistsError
            Something is there already.
        """
        store = open_store(place)
        return cls(store, config.create(store, chunk_bytes, compression))

    @classmethod
    def open(cls, place: str | os.PathLike[str] | Store, *, keys: Sequence[Holder] = ()) -> Repository:
        """Open a repository, and unlock keys of it.

        Parameters
        ----------
        place : path or Store
        keys : sequence of Holder
            `KeyFile`, `Passphrase`, `AwsKms` or others; each must open a key.

        Raises
        ------
        NotFoundError
            There is none.
        LockedError
            One of the holders opens no key.
        UnsupportedFormatError
            It is a newer one.
        """
        store = open_store(place)
        opened = cls(store, config.load(store))
        for holder in keys:
            opened.unlock(holder)
        return opened

    def unlock(self, holder: Holder) -> list[Key]:
        """Unlock every key that a holder opens; LockedError when it opens none."""
        return self.keyring.unlock(holder)

    def _of(self, domain: Domain) -> Context:
        """What work on a domain needs. LockedError when its key was disabled."""
        self.keyring.check_enabled(domain)
        return replace(self._context, domain=domain)

    def _of_snapshot(self, snapshot: Manifest) -> Context:
        domain_id = PLAIN.id if snapshot.key is None else bytes.fromhex(snapshot.key)
        domain = self.keyring.domains.get(domain_id)
        if domain is None:
            raise self.keyring.locked(LockedError(f"the snapshot {snapshot.id} is sealed", snapshot.key))
        return self._of(domain)

    def _all(self) -> list[Context]:
        """All domains that are unlocked, for who looks after the store itself."""
        return [replace(self._direct, domain=self._of(domain).domain) for domain in self.keyring.domains.values()]

    @property
    def url(self) -> str:
        """Where it is."""
        return self._context.store.url

    @property
    def id(self) -> str:
        """Its own id: 32 hexadecimal digits."""
        return self._context.config.id

    @property
    def chunk_bytes(self) -> int:
        """Length of a chunk."""
        return self._context.config.chunk_bytes

    @property
    def compression(self) -> str:
        """What new chunks are compressed with unless told otherwise."""
        return self._context.config.compression

    def snapshot(
        self,
        source: str | os.PathLike[str] | Source,
        *,
        disk: str,
        parent: SnapshotLike | None = None,
        changed: Extents | Iterable[tuple[int, int]] | None = None,
        paranoid: bool = False,
        allow_changing: bool = False,
        compression: str | None = None,
        label: str | None = None,
        tags: dict[str, str] | None = None,
        key: str | KeyChoice | None = None,
        checked_share: float = CHECKED_SHARE,
        origin: str | None = None,
        group: str | None = None,
        progress: ProgressCallback | None = None,
        executor: Executor | None = None,
    ) -> Created:
        """Take a snapshot of a disk image, a block device or any other source.

        Parameters
        ----------
        source : path or Source
            A path that ends in .qcow2, .vhd, .vhdx or .vmdk is an image of that format, any other one a raw image or a
            device; `open_image` opens what has a backing file or another name.
        disk : str
            Name of the disk: its snapshots make a chain.
        parent : snapshot, optional
            What to compare with; default: the disk's newest snapshot here. One of another disk is fine for a disk
            that was made from it.
        changed : int64 array of shape (n, 2) or pairs of (offset, length), optional
            All byte ranges that may differ from the parent, known from elsewhere. Only they are read, and a random
            share of the rest, which must be the same.
        paranoid : bool
            Compare by content id and not by the fingerprints that this host remembers.
        allow_changing : bool
            Accept a source that is written meanwhile: the snapshot may then mix old and new blocks.
        compression : str, optional
            "lz4", "zstd" or "none"; default: the repository's.
        label : str, optional
            A name to find the snapshot by: 1 to 255 printable characters that do not look like an id.
        tags : dict of str, optional
            For people: up to 64, keys of up to 128 characters, values of up to 256.
        key : str or NO_KEY, optional
            Name or id of the unlocked key that it shall be under, or under none. Default: that of the disk's chain,
            or of the parent. The first snapshot of a disk in a repository that has keys must say.
        checked_share : float
            How much of what `changed` does not name is compared all the same; 16 chunks at least.
        origin : str, optional
            Where else these very bytes are, for whoever asks later.
        group : str, optional
            Id of the group that it will belong to.
        progress : callable, optional
            Gets a `Progress` for each span; raising there cancels, and nothing is visible of the snapshot.
        executor : concurrent.futures.Executor, optional
            Threads to work on; default: one a core. Not processes, and not the pool that this call itself runs on: it
            would wait for a thread that waits for it.

        Raises
        ------
        SourceChangedError
            The source was written meanwhile, or `changed` does not name everything.
        LockedError
            The key is not unlocked, or disabled.
        RefusedError
            The disk's chain is under another key, or would become a plain one.
        BusyError, FencedError, ReadError, OutOfSpaceError, NotFoundError, UsageError, StoreError
        """
        if label is not None and (not label.isprintable() or not 1 <= len(label) <= 255 or _ID_PART.fullmatch(label)):
            raise UsageError(
                f"a snapshot's name has 1 to 255 printable signs and does not look like an id, not {label!r}"
            )
        manifest.check_disk(disk)
        line = lineage.choose(
            self.keyring,
            self.url,
            disk,
            key,
            None if parent is None else self.find(parent),
            lambda domain: create.newest(replace(self._context, domain=domain), disk) is not None,
        )
        request = Request(
            disk=disk,
            parent=line.parent,
            # A list of changes speaks of the parent that was named.
            changed=None if changed is None or line.reason else _changed(changed),
            paranoid=paranoid,
            compression=None if compression is None else codec.check_compression(compression),
            label=label,
            tags=manifest.check_tags(tags or {}),
            reason=line.reason,
            checked_share=checked_share,
            origin=origin,
            group=group,
        )
        with ExitStack() as stack:
            if isinstance(source, (str, os.PathLike)):
                opened: Source = stack.enter_context(open_as_named(source, allow_changing=allow_changing))
            else:
                opened = source
            if opened.size_bytes > manifest.SIZE_LIMIT_BYTES:
                raise UsageError(
                    f"{opened.name} has {opened.size_bytes} bytes; {manifest.SIZE_LIMIT_BYTES} are the most"
                )
            return create.create(replace(self._context, domain=line.domain), opened, request, progress, executor)

    def copy_from(
        self,
        source: Repository,
        snapshots: Sequence[SnapshotLike],
        *,
        key: str | KeyChoice | None = None,
        chain: bool = False,
        limit_bytes_per_s: int | None = None,
        progress: ProgressCallback | None = None,
        executor: Executor | None = None,
    ) -> Iterator[Copied]:
        """Copy snapshots of another repository into this one, or of this one under another key.

        Each is durable when it is yielded. A copy has a new id, no tags, and says in `copied` where it comes from. An
        interrupted one is started again: what it stored is used. What is refused is so before anything is copied.

        Parameters
        ----------
        source : Repository
            May be this one.
        snapshots : sequence of snapshot
        key : str or NO_KEY, optional
            Name or id of the unlocked key, of this repository, that the copies shall be under. Default: that of the
            disk's chain here, else that of the source, when it is a key of this repository too (`Keyring.share`).
        chain : bool
            Of each disk, copy all earlier snapshots too, oldest first, but those that have a copy here.
        limit_bytes_per_s : int, optional
            Read no more than that of the source.
        progress, executor
            As in `snapshot`; for each snapshot anew.

        Raises
        ------
        RefusedError
            What is encrypted would become plain, or a copy in the same repository would not be under another key.
        LockedError
            The key of a source, or that of a copy, is not unlocked, or disabled.
        BusyError, FencedError, DamagedError, NotFoundError, OutOfSpaceError, UsageError, StoreError
        """
        wanted = [source.find(snapshot) for snapshot in snapshots]
        ways = [self._way(source, snapshot, key, limit_bytes_per_s) for snapshot in wanted]
        if not chain:
            work = list(zip(ways, wanted, strict=True))
        else:
            work = [
                (way, snapshot)
                for way, last in zip(ways, wanted, strict=True)
                for snapshot in source._uncopied(way, last)
            ]
        done: set[str] = set()

        def each() -> Iterator[Copied]:
            for way, snapshot in work:
                if snapshot.id not in done:
                    done.add(snapshot.id)
                    yield copy.copy(way, snapshot, progress, executor)

        return each()

    def _way(
        self, source: Repository, snapshot: Manifest, key: str | KeyChoice | None, limit_bytes_per_s: int | None
    ) -> Way:
        origin = source._of_snapshot(snapshot)

        def has_chain(domain: Domain) -> bool:
            return create.newest(replace(self._context, domain=domain), snapshot.disk) is not None

        to = Destination(self.url, self.keyring, self.id == source.id)
        chosen = copy_rules.choose(origin.domain, snapshot, to, key, has_chain)

        def others(disk: str) -> bool:
            contexts = [replace(self._context, domain=domain) for domain in self.keyring.domains.values()]
            return any(
                next(copy.copies(origin, context, disk), None) is not None
                for context in contexts
                if context.domain.id != chosen.id
            )

        return Way(origin, replace(self._context, domain=chosen), source.find, others, limit_bytes_per_s)

    def _uncopied(self, way: Way, last: Manifest) -> list[Manifest]:
        """The snapshots of a chain up to one that have no copy, oldest first."""
        copied = {
            found.copied.snapshot
            for found in copy.copies(way.source, way.target, last.disk)
            if found.copied is not None
        }
        return [
            found
            for found in self.snapshots(last.disk)
            if found.key == last.key and found.sequence <= last.sequence and found.id not in copied
        ]

    def snapshots(self, disk: str | None = None) -> list[Manifest]:
        """All snapshots that can be read, or those of one disk: by disk, in the order of the chain.

        Those under keys that are not unlocked are in `locked_snapshots`.
        """
        if disk is None:
            listed = list(manifest.listed(self._context.store))
        else:
            domains = self.keyring.domains.values()
            listed = [item for domain in domains for item in manifest.listed(self._context.store, domain, disk)]
        held = self._summaries(len(listed))
        found = []
        for item in listed:
            with contextlib.suppress(LockedError):
                found.append(self._manifest(item[0], held.get(item)))
        return sorted(
            (item for item in found if item is not None),
            key=lambda item: (item.disk, item.sequence, item.created, item.id),
        )

    def locked_snapshots(self) -> list[LockedSnapshot]:
        """Snapshots under keys that are not unlocked."""
        found = []
        listed = list(manifest.listed(self._context.store))
        held = self._summaries(len(listed))
        for item in listed:
            try:
                self._manifest(item[0], held.get(item))
            except LockedError as error:
                found.append(LockedSnapshot(manifest.id_in(item[0]), str(error.key)))
        return found

    def _summaries(self, count: int) -> dict[tuple[str, int], bytes]:
        """Bytes of manifests, where so many are to be read that it pays."""
        return summaries.load(self._context.store) if count > summaries.LOOSE else {}

    def _manifest(self, name: str, data: bytes | None = None) -> Manifest | None:
        if data is not None:
            where = f"{self.url}/{name}"
            with contextlib.suppress(DamagedError):
                return manifest.parse(data, where, name, self.keyring.domains, self.chunk_bytes)
        try:
            return manifest.read(self._context.store, name, self.keyring.domains, self.chunk_bytes)
        except DamagedError as error:
            raise DamagedError(
                f"{error}: this snapshot is lost. `snapcore snapshot delete {manifest.id_in(name)}` removes what is "
                "left of it; until then neither lists nor collections are complete, and they are refused"
            ) from error

    def find(self, snapshot: SnapshotLike) -> Manifest:
        """The snapshot of an id, of the beginning of one (from 4 digits on) or of a label, when only one has it."""
        if isinstance(snapshot, Manifest):
            snapshot = snapshot.id
        names = list(manifest.names(self._context.store))
        if _ID_PART.fullmatch(snapshot):
            matching = [name for name in names if manifest.id_in(name).startswith(snapshot)]
        else:
            matching = []
        found = []
        locked: LockedError | None = None
        for name in matching:
            try:
                item = self._manifest(name)
            except LockedError as error:
                locked = error
            else:
                found += [] if item is None else [item]
        if locked is not None and not found:
            raise self.keyring.locked(locked)
        if not found:
            found = [item for item in self.snapshots() if item.label == snapshot]
        if not found:
            found = self._held(snapshot)
        if not found:
            raise NotFoundError(f"{self.url} has no snapshot {snapshot!r}; see `snapcore snapshot list -r {self.url}`")
        if len(found) > 1:
            listed = ", ".join(item.id for item in found[:5])
            raise UsageError(f"{snapshot!r} stands for {len(found)} snapshots: {listed}; give more digits")
        return found[0]

    def _held(self, ref: str) -> list[Manifest]:
        """What images hold of that id, or that begins so: it has no manifest any more (docs/DESIGN.md, Images)."""
        if not _ID_PART.fullmatch(ref):
            return []
        held = {item.id: item for image in self.images() for item in image.snapshots}
        return [item for item in held.values() if item.id.startswith(ref)]

    def diff(
        self, a: SnapshotLike, b: SnapshotLike, start: int = 0, stop: int | None = None, *, of: Repository | None = None
    ) -> Extents:
        """Where two snapshots differ, on chunk borders: int64 array of shape (n, 2), offset and length in bytes.

        Any two snapshots of the repository, or of it and another; costs what differs. Behind the end of the smaller
        disk, everything that is not zero differs.

        Parameters
        ----------
        a, b : snapshot
        start, stop : int
            Only this part, in bytes.
        of : Repository, optional
            That `b` is in, if it is another one: of the same chunk size (`comparable`).

        Raises
        ------
        RefusedError
            They are under different keys: the same content has two ids then.
        """
        other = of or self
        old, new = self.find(a), other.find(b)
        if old.key != new.key:
            raise RefusedError(
                f"the snapshots {old.id} and {new.id} are under different keys: restore both, and compare"
            )
        if not self.comparable(old, new, of=other):
            raise UsageError(f"{self.url} and {other.url} have chunks of different sizes; compare what they hold")
        one = self._of_snapshot(old)
        return difference.differing(
            one,
            old,
            one if other is self else other._of_snapshot(new),
            new,
            start,
            max(old.size_bytes, new.size_bytes) if stop is None else stop,
        )

    def comparable(self, a: Manifest, b: Manifest, *, of: Repository | None = None) -> bool:
        """Whether the same bytes have the same id in both: in `a`, and in `b`, which is in `of` or here too."""
        return self.chunk_bytes == (of or self).chunk_bytes and a.key == b.key

    def extents(self, snapshot: SnapshotLike, start: int = 0, stop: int | None = None) -> Extents:
        """Where a snapshot is not zero, on chunk borders; all of it or from `start` to `stop`."""
        found = self.find(snapshot)
        return difference.written(self._of_snapshot(found), found, start, found.size_bytes if stop is None else stop)

    def put_group(self, group: Group) -> None:
        """Make a group of snapshots that are all there. It is sealed under their key.

        Raises
        ------
        ExistsError
            It is there already.
        RefusedError
            They are under different keys.
        LockedError, NotFoundError, StoreError
        """
        members = [self.find(member.snapshot) for member in group.members]
        if len({member.key for member in members}) > 1:
            raise RefusedError(f"the members of the group {group.id} are under different keys; a group is under one")
        groups.write(self._context.store, group, self._of_snapshot(members[0]).domain)

    def groups(self) -> list[Group]:
        """All groups, oldest first, but those under keys that are not unlocked."""
        return groups.load(self._context.store, self.keyring.domains)

    def group(self, ref: str) -> Group:
        """The group of an id, of the beginning of one or of a name that only one has."""
        try:
            return groups.find(self._context.store, ref, self.keyring.domains)
        except LockedError as error:
            raise self.keyring.locked(error) from error

    def delete_group(self, group: Group) -> None:
        """The snapshots are no group any more; they stay."""
        self._context.store.delete(groups.PREFIX + group.id)

    def create_image(
        self,
        name: str,
        system: SnapshotLike,
        data: Mapping[str, SnapshotLike | int] | None = None,
        *,
        architecture: str = "x86_64",
        boot: Boot = "bios",
        os: str = "",
        min_size_bytes: int | None = None,
        tags: dict[str, str] | None = None,
        checksums: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Image:
        """Make an image, a template of machines, of snapshots that are here. They cannot be deleted while it is there.

        Parameters
        ----------
        name : str
            2 to 128 printable characters, a letter first.
        system : snapshot
            Of the system disk, /dev/xvda.
        data : mapping of str to snapshot or int, optional
            By device, /dev/xvdb to /dev/xvdz: a snapshot, up to 16, or the size in bytes of an empty disk.
        architecture, boot, os : str
            For who makes machines of it: "x86_64", …; "bios" or "uefi"; any text.
        min_size_bytes : int, optional
            Of the system disk; default: the snapshot's size.
        tags : dict of str, optional
        checksums : bool
            Read all of it, and note the SHA-256 of each disk.
        progress : callable, optional
            As in `snapshot`, of that reading.

        Raises
        ------
        RefusedError
            The snapshots are under different keys, or one is of a group that is not complete.
        UsageError, NotFoundError, LockedError, DamagedError, BusyError, FencedError, StoreError
        """
        labels = Labels(name=name, architecture=architecture, boot=boot, os=os, tags=tags or {})
        labels.check()
        found = self.find(system)
        disks = [
            ImageDisk(device=images.SYSTEM, min_size_bytes=min_size_bytes or found.size_bytes, snapshot=found),
            *(self._image_disk(device, wanted) for device, wanted in (data or {}).items()),
        ]
        images.check_disks(disks)
        if checksums:
            disks = make_image.with_checksums(disks, self.open_snapshot, progress)
        return make_image.make(self._of_snapshot(found), labels, disks)

    def _image_disk(self, device: str, wanted: SnapshotLike | int) -> ImageDisk:
        snapshot = None if isinstance(wanted, int) else self.find(wanted)
        size_bytes = wanted if isinstance(wanted, int) else self.find(wanted).size_bytes
        return ImageDisk(device=images.full_device(device), min_size_bytes=size_bytes, snapshot=snapshot)

    def images(self) -> list[Image]:
        """All images, oldest first, but those under keys that are not unlocked."""
        try:
            return images.load(self._context.store, self.keyring.domains, self.chunk_bytes)
        except DamagedError as error:
            raise _lost_image(error) from error

    def image(self, ref: Image | str) -> Image:
        """The image of an id, of the beginning of one or of a name that only one has."""
        wanted = ref.id if isinstance(ref, Image) else ref
        try:
            return images.find(self._context.store, wanted, self.keyring.domains, self.chunk_bytes)
        except LockedError as error:
            raise self.keyring.locked(error) from error
        except DamagedError as error:
            raise _lost_image(error) from error

    def delete_image(self, image: Image | str) -> str:
        """Delete an image; its snapshots stay, and can be deleted then. Returns its id.

        One that is damaged is found by its id.
        """
        wanted = image.id if isinstance(image, Image) else image
        ids = images.matching(self._context.store, wanted)
        with contextlib.suppress(DamagedError):
            ids = [self.image(wanted).id]
        if len(ids) != 1:
            raise NotFoundError(f"{self.url} has {len(ids)} images {wanted!r}")
        images.delete(self._context.store, ids[0])
        return ids[0]

    def check_deletable(self, snapshots: Sequence[SnapshotLike]) -> None:
        """RefusedError when an image holds one of these, which names it."""
        ids = {item.id if isinstance(item, Manifest) else item for item in snapshots}
        for image in self.images():
            for held in image.snapshots:
                if held.id in ids:
                    raise RefusedError(
                        f"the snapshot {held.id} of {held.disk} is in use by the image {image.name}; "
                        f"`snapcore image delete {image.id} -r {self.url}` removes that"
                    )

    def fill(
        self,
        snapshot: SnapshotLike,
        target: Target,
        *,
        within: Extents | None = None,
        progress: ProgressCallback | None = None,
        executor: Executor | None = None,
    ) -> Restored:
        """Write a snapshot into an open target of its size, which is its owner's to make durable.

        Parameters
        ----------
        snapshot : snapshot
        target : Target
        within : int64 array of shape (n, 2), optional
            The target is known to differ nowhere else.
        progress, executor
            As in `snapshot`.
        """
        wanted = self.find(snapshot)
        return restore.restore(
            self._of_snapshot(wanted).objects(),
            wanted,
            target,
            allow_damaged=False,
            within=within,
            progress=progress,
            executor=executor,
        )

    def restore(
        self,
        snapshot: SnapshotLike,
        target: str | os.PathLike[str],
        *,
        in_place: bool = False,
        allow_damaged: bool = False,
        progress: ProgressCallback | None = None,
        executor: Executor | None = None,
        medium: Medium | None = None,
    ) -> Restored:
        """Write a snapshot to a new file, or into an existing file or block device. Durable on return.

        Parameters
        ----------
        snapshot : snapshot
        target : path
        in_place : bool
            The target exists: write only what differs. A file gets the snapshot's size.
        allow_damaged : bool
            Write zeros where the repository is damaged, and list those ranges in the result.
        progress, executor
            As in `snapshot`. After a cancelled or interrupted restore, start it again: it goes on.
        medium : Medium, optional
            What writes to the target, for tests; default: the operating system.

        Raises
        ------
        ExistsError, NotFoundError, BusyError, RefusedError, UsageError, DamagedError, OutOfSpaceError, StoreError
        """
        wanted = self.find(snapshot)
        context = self._of_snapshot(wanted)
        folder = self._context.store.folder
        with open_target(
            os.fspath(target), wanted.size_bytes, in_place=in_place, forbidden_folder=folder, medium=medium
        ) as opened:
            return restore.restore(
                context.objects(),
                wanted,
                opened,
                allow_damaged=allow_damaged,
                progress=progress,
                executor=executor,
            )

    def open_snapshot(self, snapshot: SnapshotLike, *, hands: Executor | None = None) -> SnapshotReader:
        """A snapshot as a file to read anywhere in; with threads, what lies in several packs is fetched at once."""
        wanted = self.find(snapshot)
        return SnapshotReader(self._of_snapshot(wanted).objects(hands), wanted)

    @property
    def is_far(self) -> bool:
        """Whether it is in no folder of this host, so that each request takes its time."""
        return self._context.store.folder is None

    def unique(self, snapshots: Sequence[SnapshotLike]) -> Usage:
        """What only these snapshots hold together: the bytes that `delete` and `collect` would free."""
        chosen = [self.find(snapshot) for snapshot in snapshots]
        ids = {snapshot.id for snapshot in chosen}
        others = [snapshot for snapshot in self.snapshots() if snapshot.id not in ids]
        return self._usage(chosen, [*others, *self._in_images()])

    def usage(self) -> Usage:
        """What all snapshots and images that can be read hold together."""
        return self._usage([*self.snapshots(), *self._in_images()], [])

    def _in_images(self) -> list[Manifest]:
        return [snapshot for image in self.images() for snapshot in image.snapshots]

    def _usage(self, chosen: list[Manifest], others: list[Manifest]) -> Usage:
        """What these hold and those do not; chains under different keys share nothing."""
        parts = [Usage(0, 0)]
        for key in {snapshot.key for snapshot in chosen}:
            mine = [snapshot for snapshot in chosen if snapshot.key == key]
            rest = [snapshot for snapshot in others if snapshot.key == key]
            parts.append(_unique(self._of_snapshot(mine[0]), mine, rest))
        return Usage(sum(part.plain_bytes for part in parts), sum(part.stored_bytes for part in parts))

    def stored_bytes(self) -> int:
        """Bytes of all objects of the repository."""
        return sum(size_bytes for _, size_bytes in self._context.store.list(""))

    def pin(self, snapshot: SnapshotLike, who: str, *, pin_id: str | None = None) -> Pin:
        """Say who needs a snapshot: it is not deleted by mistake until `unpin`.

        Parameters
        ----------
        snapshot : snapshot
        who : str
            For people: who, and where.
        pin_id : str, optional
            32 hexadecimal digits; doing it again under the same id is no error. Default: random ones.

        Raises
        ------
        BusyError
            It is being deleted.
        NotFoundError, LockedError, StoreError
        """
        found = self.find(snapshot)
        domain = self._of_snapshot(found).domain
        name = manifest.name(domain, found.disk, found.sequence, found.id)
        return pins.put(self._direct.store, found.id, name, who, pin_id, domain)

    def unpin(self, snapshot_id: str, pin_id: str) -> None:
        """Who had pinned a snapshot needs it no more; no error when the pin or the snapshot is gone already."""
        pins.removed(self._direct.store, snapshot_id, pin_id)

    def pins(self, snapshot: SnapshotLike | None = None) -> list[Pin]:
        """Who needs a snapshot, or any; also of snapshots that are gone, and deletions that were interrupted."""
        if snapshot is None:
            return pins.load(self._direct.store, self.keyring.domains)
        return pins.of_snapshot(self._direct.store, self.find(snapshot).id, self.keyring.domains)

    def check_unpinned(self, snapshot: SnapshotLike) -> None:
        """RefusedError, which says by whom, when a snapshot is pinned."""
        found = self.find(snapshot)
        pins.refuse(self._direct.store, found.id, self.pins(found))

    def remove_pin(self, ref: str) -> str:
        """Remove a pin that nobody needs, by its id or the beginning of it. Returns the id."""
        return pins.remove(self._direct.store, ref)

    def delete(self, snapshot: SnapshotLike, *, force: bool = False) -> str:
        """Delete a snapshot, wherever it stands in its chain; no other one changes. Returns its id.

        `collect` frees the space. One whose manifest is damaged is found by its id. One that an image holds is
        refused.

        Parameters
        ----------
        snapshot : snapshot
        force : bool
            Also one that is pinned. Lazy disks that are filled from it get errors for what they have not fetched.

        Raises
        ------
        RefusedError
            It is pinned, or an image holds it; the message says by whom, or which.
        """
        wanted = snapshot.id if isinstance(snapshot, Manifest) else snapshot
        names = [name for name in manifest.names(self._context.store) if manifest.id_in(name).startswith(wanted)]
        if not _ID_PART.fullmatch(wanted) or len(names) != 1:
            found = self.find(snapshot)
            names = [manifest.name(self._of_snapshot(found).domain, found.disk, found.sequence, found.id)]
        domain = self._deletable(names[0])
        snapshot_id = manifest.id_in(names[0])
        with pins.deleting(self._direct.store, snapshot_id, domain or PLAIN, force=force):
            self.check_deletable([snapshot_id])
            if domain is None:
                self._context.store.delete(names[0])
            else:
                manifest.delete(self._context.store, names[0], domain)
        return snapshot_id

    def _deletable(self, name: str) -> Domain | None:
        """The domain of a snapshot that is to be deleted; None for one that cannot be read, from which nobody begins.

        NotFoundError for a name that fences a writer: without the tombstone it could commit after all.
        """
        with contextlib.suppress(DamagedError, UnsupportedFormatError, ReadError):
            try:
                found = self._manifest(name)
            except LockedError as error:
                raise self.keyring.locked(error) from error
            if found is None:
                raise NotFoundError(f"{self.url} has no snapshot {manifest.id_in(name)}; it was never committed")
            return self._of_snapshot(found).domain
        return None

    def collect(
        self,
        *,
        wait_s: float = 0.0,
        patience_s: float = collect.WEEK_S,
        progress: ProgressCallback | None = None,
        executor: Executor | None = None,
    ) -> Collected:
        """Free what no snapshot reaches; what is under keys that are not unlocked is left alone.

        Others go on working meanwhile. What a writer may rely on that is at work now is only condemned; the next
        collection after its end removes it.

        Parameters
        ----------
        wait_s : float
            How long to wait for such writers.
        patience_s : float
            Of those that began longer ago nobody waits for the end; they have to take their snapshots again.
        progress, executor
            As in `snapshot`.

        Raises
        ------
        DamagedError
            Something reachable is missing: nothing was removed. Run `verify`, and delete or heal what it names.
        """
        patience = Patience(wait_s, patience_s)
        parts = [
            collect.collect(
                context, functools.partial(self._snapshots_of, context.domain), patience, progress, executor
            )
            for context in self._all()
        ]
        return Collected(
            sum(part.freed_bytes for part in parts),
            sum(part.removed_packs for part in parts),
            sum(part.rewritten_packs for part in parts),
            sum(part.live_bytes for part in parts),
            sum(part.condemned_packs for part in parts),
            sum(part.condemned_bytes for part in parts),
            tuple(found for part in parts for found in part.waiting_for),
        )

    def _snapshots_of(self, domain: Domain) -> list[Manifest]:
        return [item for item in [*self.snapshots(), *self._in_images()] if item.key == domain.key_id]

    def verify(
        self,
        *,
        share: Share | None = None,
        progress: ProgressCallback | None = None,
        executor: Executor | None = None,
        in_flight: int | None = None,
    ) -> Verified:
        """Read and check everything. What is damaged is marked, so that the next snapshot stores it again.

        Of what is under keys that are not unlocked, only that it is as it was stored is checked.

        Parameters
        ----------
        share : Part or Sample, optional
            Read only these packs; that every snapshot has all its chunks is checked in any case.
        progress : callable, optional
        executor : concurrent.futures.Executor, optional
            Threads, processes, or workers on other hosts (`dask.distributed.Client.get_executor()`), which open the
            repository where this one says that it is. The keys that are unlocked go to them with the work.
        in_flight : int, optional
            Packs that are checked at once; default: two more than this host has processors.

        Raises
        ------
        BusyError
            Collections keep moving what is being read.
        """
        return verify.verify(self._all(), share or Whole(), progress, executor, in_flight)

    def rebuild_index(self, *, progress: ProgressCallback | None = None) -> int:
        """Make the index anew from the packs. Returns the number of entries."""
        return sum(rebuild.rebuild_index(context, progress) for context in self._all())

    def sessions(self) -> list[Session]:
        """Who works on the repository now, or died at it."""
        return session.sessions(self._context.store)

    def end_session(self, session_id: str) -> str:
        """End a session, by its id or the beginning of it. Returns the id.

        A writer that lives after all is refused at its commit, and begins anew. Whoever left a session that is damaged
        must be known to be dead.
        """
        found = [item for item in session.ids(self._context.store) if item.startswith(session_id)]
        if len(found) != 1:
            raise NotFoundError(f"{self.url} has {len(found)} sessions {session_id!r}")
        session.end_by_id(self._context.store, found[0])
        return found[0]


def _unique(context: Context, mine: list[Manifest], rest: list[Manifest]) -> Usage:
    """What only `mine` hold, by the index of now when a part of it is replaced meanwhile."""
    for _ in range(_LOADS - 1):
        with contextlib.suppress(ReplacedError):
            return marks.unique(context.objects(), mine, rest)
    return marks.unique(context.objects(), mine, rest)


def _lost_image(error: DamagedError) -> DamagedError:
    return DamagedError(
        f"{error}: this image is lost. `snapcore image delete ID` removes what is left of it; until then lists and "
        "collections are refused, and so are deletions of snapshots, which it may hold"
    )


def _changed(changed: Extents | Iterable[tuple[int, int]]) -> Extents:
    return extents.from_pairs(changed)
