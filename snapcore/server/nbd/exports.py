"""What the names of exports mean, and who may use which.

| name | what |
| --- | --- |
| `DISK` | a live disk |
| `@SNAPSHOT`, `DISK@SNAPSHOT` | a snapshot, by id or name; read-only |
| one of these and `?cow` or `?cow=TAG` | a throw-away disk made from the snapshot |
| the name of an image given at the start | a raw file or device |
| nothing | the only disk or image, where there is only one |

A throw-away disk is shared by the connections of one snapshot and tag, and deleted with the last of them. Its name
tells the next start that a crash left it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from snapcore import nbd
from snapcore.errors import BusyError, Error, NotFoundError, RefusedError, UsageError, from_os_error
from snapcore.pool import Disk, Pool, Snapshot
from snapcore.server.nbd.handshake import Facts
from snapcore.server.nbd.protocol import BASE_ALLOCATION, CHANGED_PREFIX, TransmissionFlag
from snapcore.source import device, formats
from snapcore.volume import Volume

_CLONE_NAME = "snapcore-cow-{id}-{token}"
_CLONE_NAMES = re.compile(r"snapcore-cow-[0-9]+-[0-9a-f]{16}")
_COW = re.compile(r"(?P<snapshot>.*)\?cow(=(?P<tag>[0-9A-Za-z._-]{1,64}))?", re.DOTALL)

_ALWAYS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_DF
    | TransmissionFlag.SEND_CACHE
    # A flush makes durable what was written on any connection: there is one log, or one file.
    | TransmissionFlag.CAN_MULTI_CONN
)
# What a file says that may be read and not written.
_NOT_FOR_WRITING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY}
_WRITABLE = TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES


@dataclass(frozen=True)
class Rule:
    """What a client may use.

    Attributes
    ----------
    client : str
        Pattern of names of its certificate (common name, DNS names), or of its PSK identity.
    exports : tuple of str
        Patterns of exports: a disk or image is known by its name, a snapshot as `@ID`, `DISK@ID` and `DISK@NAME`, a
        throw-away disk like its snapshot with `?cow` behind.
    read_only : bool
    """

    client: str
    exports: tuple[str, ...] = ("*",)
    read_only: bool = False


@dataclass(frozen=True)
class Client:
    """Who asks.

    Attributes
    ----------
    address : str
        For messages.
    names : tuple of str
        That TLS has proven.
    """

    address: str
    names: tuple[str, ...] = ()


@dataclass
class Image:
    """A raw file or device that is served under a name."""

    name: str
    path: str
    descriptor: int
    writable: bool

    @property
    def size_bytes(self) -> int:
        """Its length now."""
        return device.size_bytes(self.descriptor)


@dataclass(frozen=True)
class _Clone:
    """A throw-away disk that is wanted."""

    snapshot: Snapshot
    tag: str


_Thing = Disk | Snapshot | Image | _Clone


@dataclass
class Entered:
    """An export that a connection uses.

    Attributes
    ----------
    contexts : list of (id, Volume or None)
        As `snapcore.nbd.Connection` takes them.
    """

    name: str
    export: nbd.Export
    contexts: list[tuple[int, Volume | None]]
    writable: bool
    _undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def leave(self) -> None:
        """The connection has ended."""
        self._undo.close()


class Exported:
    """All that a server has to show.

    Parameters
    ----------
    pool : Pool, optional
    images : mapping of str to path
    patterns : sequence of str
        Only exports that one of them fits are shown at all; none: all are.
    rules : sequence of Rule
        If there are any, a client needs one that fits.
    read_only : bool
    """

    def __init__(
        self,
        pool: Pool | None,
        images: Mapping[str, str | os.PathLike[str]],
        *,
        patterns: Sequence[str] = (),
        rules: Sequence[Rule] = (),
        read_only: bool = False,
    ) -> None:
        self.pool = pool
        self._patterns = tuple(patterns)
        self._rules = tuple(rules)
        self._read_only = read_only
        self._clones: dict[tuple[str, str], tuple[Disk, int]] = {}
        self._clones_lock = threading.Lock()
        self.images: dict[str, Image] = {}
        try:
            for name, path in images.items():
                self.images[name] = _opened(name, os.fspath(path), read_only=read_only)
                self.check_unused(self.images[name])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the images."""
        for image in self.images.values():
            os.close(image.descriptor)
        self.images.clear()

    def check_unused(self, image: Image) -> None:
        """A disk that reads from an image would read what is written to it.

        Raises
        ------
        RefusedError
        """
        if self.pool is None or not image.writable:
            return
        reader = self.pool.reader_of(image.path)
        if reader is not None:
            raise RefusedError(f"{image.path} cannot be written: {reader} reads from it; serve it by --read-only")

    def flush(self) -> None:
        """Everything that was answered survives a power cut."""
        if self.pool is not None and not self.pool.read_only:
            self.pool.flush()
        for image in self.images.values():
            if image.writable:
                try:
                    os.fsync(image.descriptor)
                except OSError as error:
                    raise from_os_error(error, f"flushing {image.path}") from error

    def delete_left_clones(self) -> None:
        """Delete throw-away disks that a crash left."""
        if self.pool is None or self.pool.read_only:
            return
        for disk in self.pool.disks():
            if _is_clone(disk):
                # Another server of this process may use it.
                with contextlib.suppress(BusyError, NotFoundError):
                    disk.delete()

    def seen_by(self, client: Client) -> View:
        """What a client may see."""
        return View(self, client)

    # What views ask

    def find(self, name: str) -> _Thing:
        """What a name means, whoever asks."""
        if name in self.images:
            return self.images[name]
        if self.pool is not None:
            with contextlib.suppress(NotFoundError):
                disk = self.pool.open_disk(name)
                if not _is_clone(disk):
                    return disk
            if cow := _COW.fullmatch(name):
                return _Clone(self._snapshot(self.pool, cow["snapshot"]), cow["tag"] or "")
            return self._snapshot(self.pool, name)
        raise NotFoundError(f"there is no export {name!r} here")

    def _snapshot(self, pool: Pool, name: str) -> Snapshot:
        """`@SNAPSHOT` or `DISK@SNAPSHOT`; both names may have an @ in them."""
        for place in (found.start() for found in re.finditer("@", name)):
            disk, ref = name[:place], name[place + 1 :]
            with contextlib.suppress(NotFoundError):
                if not disk:
                    return pool.snapshot(ref)
                for snapshot in self._candidates(pool, disk, ref):
                    if ref in (snapshot.id, snapshot.name) and disk in self.disk_names(snapshot):
                        return snapshot
        raise NotFoundError(f"there is no export {name!r} here")

    def _candidates(self, pool: Pool, disk: str, ref: str) -> Sequence[Snapshot]:
        try:
            return [pool.snapshot(ref)]
        except UsageError:
            # Several disks have one of that name.
            return pool.snapshots(disk)

    def disk_names(self, snapshot: Snapshot) -> set[str]:
        """The name of a snapshot's disk when it was cut, and now."""
        assert self.pool is not None
        names = {snapshot.disk}
        with contextlib.suppress(NotFoundError):
            names.add(self.pool.open_disk(snapshot.disk_id).name)
        return names

    def default(self) -> str:
        """What is meant by no name."""
        names = [*self.images]
        if self.pool is not None:
            names += [disk.name for disk in self.pool.disks() if not _is_clone(disk)]
        shown = [name for name in names if self.is_shown([name])]
        if len(shown) != 1:
            raise NotFoundError("there is no default export here: choose one by its name")
        return shown[0]

    def is_shown(self, names: Sequence[str]) -> bool:
        """Whether a thing of these names is among what the server shows."""
        return not self._patterns or _fits(names, self._patterns)

    def rules_for(self, client: Client, names: Sequence[str]) -> list[Rule] | None:
        """Those that fit; None when there are none at all."""
        if not self._rules:
            return None
        return [
            rule for rule in self._rules if _fits(client.names or ("",), (rule.client,)) and _fits(names, rule.exports)
        ]

    def is_read_only(self) -> bool:
        """Whether nothing is written here, whoever asks."""
        return self._read_only or (self.pool is not None and self.pool.read_only)

    @contextlib.contextmanager
    def clone(self, wanted: _Clone, holder: str) -> Iterator[Disk]:
        """The throw-away disk of a snapshot and tag, for as long as somebody uses it."""
        assert self.pool is not None
        if self.is_read_only():
            raise RefusedError("a throw-away disk cannot be made of what is open for reading only")
        key = (wanted.snapshot.id, wanted.tag)
        with contextlib.ExitStack() as attached:
            with self._clones_lock:
                disk, users = self._clones.get(key, (None, 0))
                if disk is None:
                    name = _CLONE_NAME.format(id=wanted.snapshot.id, token=secrets.token_hex(8))
                    disk = self.pool.create_disk(name, source=wanted.snapshot)
                attached.enter_context(disk.attached(holder))
                self._clones[key] = (disk, users + 1)
            try:
                yield disk
            finally:
                with self._clones_lock:
                    disk, users = self._clones.pop(key)
                    if users > 1:
                        self._clones[key] = (disk, users - 1)
        if users == 1:
            # What cannot be deleted now is deleted at the next start.
            with contextlib.suppress(Error):
                disk.delete()


class View:
    """What one client may see and enter (`snapcore.server.nbd.handshake.Exports`)."""

    def __init__(self, exported: Exported, client: Client) -> None:
        self._exported = exported
        self._client = client

    def names(self) -> Sequence[tuple[str, str]]:
        """(name, description) of each export that may be used."""
        pool = self._exported.pool
        things: list[_Thing] = [*self._exported.images.values()]
        if pool is not None:
            things += [disk for disk in pool.disks() if not _is_clone(disk)]
            things += pool.snapshots()
        return [(_name(thing), _description(thing)) for thing in things if self._allows(thing)]

    def facts(self, name: str) -> Facts:
        """What an export is."""
        thing, writable = self._find(name)
        flags = _ALWAYS | (_WRITABLE if writable else TransmissionFlag.READ_ONLY)
        if writable and not isinstance(thing, Image):
            # Dropping blocks costs less than writing them, always; a file system may have to write.
            flags |= TransmissionFlag.SEND_FAST_ZERO
        size = thing.snapshot.size_bytes if isinstance(thing, _Clone) else thing.size_bytes
        return Facts(_name(thing), _description(thing), size, flags)

    def contexts(self, name: str, query: str | None) -> Sequence[str]:
        """Meta contexts of an export that a query means."""
        thing, _ = self._find(name)
        if query is None:
            return [BASE_ALLOCATION, *self._changed(thing)]
        if query in ("base:", BASE_ALLOCATION):
            return [BASE_ALLOCATION]
        if query in ("snapcore:", CHANGED_PREFIX):
            return self._changed(thing)
        if query.startswith(CHANGED_PREFIX) and self._base(thing, query) is not None:
            return [query]
        return []

    def _changed(self, thing: _Thing) -> list[str]:
        pool = self._exported.pool
        if isinstance(thing, Image) or pool is None:
            return []
        version = thing.snapshot if isinstance(thing, _Clone) else thing
        return [CHANGED_PREFIX + snapshot.id for snapshot in pool.relatives(version) if snapshot is not thing]

    def _base(self, thing: _Thing, context: str) -> Snapshot | None:
        """The snapshot of a `snapcore:changed:` context."""
        pool = self._exported.pool
        if isinstance(thing, Image) or pool is None:
            return None
        version = thing.snapshot if isinstance(thing, _Clone) else thing
        # Neither one that is not there nor a name that several have is an error: nothing is found.
        with contextlib.suppress(NotFoundError, UsageError):
            base = pool.snapshot(context.removeprefix(CHANGED_PREFIX))
            if pool.related(base, version):
                return base
        return None

    def enter(self, name: str, contexts: Sequence[tuple[int, str]]) -> Entered:
        """Open an export for transmission; `leave` what is returned."""
        thing, writable = self._find(name)
        with contextlib.ExitStack() as undo:
            export = self._open(undo, thing, writable=writable)
            volumes: list[tuple[int, Volume | None]] = []
            for number, context in contexts:
                base = None if context == BASE_ALLOCATION else self._base(thing, context)
                if base is None and context != BASE_ALLOCATION:
                    raise NotFoundError(f"the snapshot of {context} was deleted meanwhile; choose another one")
                volumes.append((number, None if base is None else base.volume))
            return Entered(_name(thing), export, volumes, writable, undo.pop_all())

    def leave(self, entered: object) -> None:
        """Undo `enter`."""
        assert isinstance(entered, Entered)
        entered.leave()

    def _open(self, undo: contextlib.ExitStack, thing: _Thing, *, writable: bool) -> nbd.Export:
        match thing:
            case Image():
                if writable:
                    # A disk may have been made from it since the start.
                    self._exported.check_unused(thing)
                return nbd.Export(None, thing.descriptor, thing.size_bytes, writable=writable)
            case Snapshot():
                return nbd.Export(thing.volume, -1, thing.size_bytes, writable=False)
            case _Clone():
                disk = undo.enter_context(self._exported.clone(thing, self._client.address))
            case Disk():
                disk = thing
                if writable:
                    undo.enter_context(disk.attached(self._client.address))
                    # Who deleted it in the meantime was not refused.
                    assert self._exported.pool is not None
                    self._exported.pool.open_disk(disk.id)
        make_room: Callable[[int, int], bool] | None = disk.make_room if writable else None
        return nbd.Export(disk.volume, -1, disk.size_bytes, writable=writable, make_room=make_room)

    def _find(self, name: str) -> tuple[_Thing, bool]:
        """What a name means to this client, and whether it may write there."""
        thing = self._exported.find(name or self._exported.default())
        if not self._allows(thing):
            # As if it were not there: who may not use it need not know.
            raise NotFoundError(f"there is no export {name!r} here")
        if isinstance(thing, Snapshot) or self._exported.is_read_only():
            return thing, False
        rules = self._exported.rules_for(self._client, self._known_as(thing))
        allowed = rules is None or not all(rule.read_only for rule in rules)
        return thing, allowed and (thing.writable if isinstance(thing, Image) else True)

    def _allows(self, thing: _Thing) -> bool:
        names = self._known_as(thing)
        return self._exported.is_shown(names) and self._exported.rules_for(self._client, names) != []

    def _known_as(self, thing: _Thing) -> list[str]:
        """All names that patterns may fit, whichever of them the client used."""
        match thing:
            case Snapshot():
                refs = {thing.id, thing.name}
                disks = sorted(self._exported.disk_names(thing))
                return [f"@{thing.id}", *(f"{disk}@{ref}" for disk in disks for ref in sorted(refs))]
            case _Clone():
                return [f"{name}?cow" for name in self._known_as(thing.snapshot)]
        return [thing.name]


def _opened(name: str, path: str, *, read_only: bool) -> Image:
    named = formats.of_name(path)
    if named != formats.RAW:
        raise RefusedError(
            f"{path} would be served as its bytes are, and its name says {named}: `snapcore disk import` makes a disk "
            "of it; if it is a raw image, call it otherwise"
        )
    for mode in (os.O_RDONLY,) if read_only else (os.O_RDWR, os.O_RDONLY):
        try:
            descriptor = os.open(path, mode | os.O_CLOEXEC)
        except OSError as error:
            if mode == os.O_RDWR and error.errno in _NOT_FOR_WRITING:
                continue
            raise from_os_error(error, f"opening the image {path}") from error
        try:
            _check_kind(path, descriptor, writable=mode == os.O_RDWR)
        except BaseException:
            os.close(descriptor)
            raise
        return Image(name, path, descriptor, mode == os.O_RDWR)
    raise AssertionError


def _check_kind(path: str, descriptor: int, *, writable: bool) -> None:
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise UsageError(f"{path} is neither a file nor a block device")
    holder = device.holder(descriptor, writing=not writable) if stat.S_ISBLK(mode) else None
    if holder is not None:
        raise BusyError(f"{path} is in use by {holder}; unmount it, or serve it read-only")


def _is_clone(disk: Disk) -> bool:
    if not _CLONE_NAMES.fullmatch(disk.name):
        return False
    try:
        origin = disk.origin
    except KeyError:  # deleted meanwhile
        return True
    return origin is not None and origin[0] == "snapshot"


def _name(thing: _Thing) -> str:
    match thing:
        case Snapshot():
            return f"@{thing.id}"
        case _Clone():
            return f"@{thing.snapshot.id}?cow" + (f"={thing.tag}" if thing.tag else "")
    return thing.name


def _description(thing: _Thing) -> str:
    match thing:
        case Snapshot():
            return f"snapshot {thing.name} of disk {thing.disk}"
        case _Clone():
            return f"a throw-away disk from snapshot {thing.snapshot.name} of disk {thing.snapshot.disk}"
        case Image():
            return f"image {thing.path}"
    return f"disk {thing.name}"


def _fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
