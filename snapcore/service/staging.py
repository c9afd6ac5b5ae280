"""Snapshots that are written block by block: start, put blocks in any order, complete (docs/DESIGN.md, "Two tiers").

Where it stands until then, one folder for each in the user's state folder:

| file | holds |
| --- | --- |
| `session` | what was said at the start, JSON |
| `data` | the blocks where they belong, sparse |
| `log` | a record of 40 bytes for each block: its number (8, little-endian) and the SHA-256 of its bytes (32) |

A lock on the log makes one of all who work on it. A block counts when its record is whole; it is read back and compared
with its record when the snapshot is made. The log's time stamp says when somebody last went on.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np
import platformdirs

from snapcore import extents
from snapcore.errors import (
    ChecksumError,
    ConflictError,
    DamagedError,
    ExpiredError,
    NotFoundError,
    UsageError,
    from_os_error,
)
from snapcore.extents import Extents
from snapcore.progress import ProgressCallback
from snapcore.repository import KeyChoice, Manifest, Repository, SnapshotReader
from snapcore.service.base import key_choice, key_word
from snapcore.service.blocks import BLOCK_LIMIT_BYTES

TIMEOUT_S = 3600
_TIMEOUT_LIMIT_S = 72 * 3600
_SIZE_LIMIT_BYTES = 1 << 47
_RECORD = struct.Struct("<Q32s")
_ID = re.compile(r"[0-9a-f]{32}")
_SESSION_LIMIT_BYTES = 1 << 20


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """What was said at the start.

    Attributes
    ----------
    id : str
    repository : str
        Id of the repository that the snapshot will be in.
    disk : str
    size_bytes, block_bytes : int
    parent : str or None
    timeout_s : int
        Given up when nobody went on for so long.
    label, tags
        Of the snapshot.
    key : str or None
        Of the key that was asked for, the name or id; empty: a plain chain was asked for.
    """

    id: str
    repository: str
    disk: str
    size_bytes: int
    block_bytes: int
    parent: str | None
    timeout_s: int
    label: str | None = None
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    key: str | None = None


class Staging:
    """Snapshots of a repository that are being written block by block.

    Parameters
    ----------
    repository : Repository
    folder : path, optional
        Where blocks wait; default: the user's state folder. All processes that go on with one need the same.
    """

    def __init__(self, repository: Repository, folder: str | os.PathLike[str] | None = None) -> None:
        self._repository = repository
        default = os.path.join(platformdirs.user_state_dir("snapcore"), "blocks")
        self._folder = os.path.join(os.fspath(folder) if folder is not None else default, repository.id)
        # What was read of the logs already: others only write behind it.
        self._read: dict[str, _Digests] = {}

    def start(
        self,
        disk: str,
        size_bytes: int | None = None,
        *,
        parent: str | None = None,
        block_bytes: int | None = None,
        timeout_s: int = TIMEOUT_S,
        label: str | None = None,
        tags: dict[str, str] | None = None,
        key: str | KeyChoice | None = None,
    ) -> Session:
        """Begin a snapshot. What is not put is as in the parent, or zero.

        Parameters
        ----------
        disk : str
            Name of the chain.
        size_bytes : int, optional
            Of the disk; default: the parent's, and never less.
        parent : str, optional
            A snapshot of the repository.
        block_bytes : int, optional
            A power of two from 4 KiB to 4 MiB; default: the repository's chunks.
        timeout_s : int
            It is given up when nobody goes on for so long: up to 72 hours.
        label, tags
            Of the snapshot.
        key : str or NO_KEY, optional
            As for `Repository.snapshot`. Until it is completed, what was put lies here in the clear.

        Raises
        ------
        NotFoundError
            There is no such parent.
        UsageError, StoreError, OutOfSpaceError
        """
        self.sweep()
        old = None if parent is None else self._repository.find(parent)
        size = size_bytes if size_bytes is not None else (0 if old is None else old.size_bytes)
        block = self._repository.chunk_bytes if block_bytes is None else block_bytes
        if not 0 < size <= _SIZE_LIMIT_BYTES or (old is not None and size < old.size_bytes):
            raise UsageError(f"a disk has 1 to {_SIZE_LIMIT_BYTES} bytes, and no fewer than its parent's, not {size}")
        if block & (block - 1) or not 4096 <= block <= BLOCK_LIMIT_BYTES:
            raise UsageError(f"a block has a power of two of bytes from 4096 to {BLOCK_LIMIT_BYTES}, not {block}")
        if not 1 <= timeout_s <= _TIMEOUT_LIMIT_S:
            raise UsageError(f"a time-out has 1 to {_TIMEOUT_LIMIT_S} seconds, not {timeout_s}")
        session = Session(
            id=secrets.token_hex(16),
            repository=self._repository.id,
            disk=disk,
            size_bytes=size,
            block_bytes=block,
            parent=None if old is None else old.id,
            timeout_s=timeout_s,
            label=label,
            tags=tags or {},
            key=key_word(key),
        )
        self._make(session)
        return session

    def put_block(self, session_id: str, index: int, data: bytes | memoryview, checksum: str) -> None:
        """Hand in a block, in any order, from any process; the same one again is fine.

        Parameters
        ----------
        session_id : str
        index : int
        data : bytes-like
            As long as a block; the last one of the disk as long as the rest.
        checksum : str
            SHA-256 of the data, base64.

        Raises
        ------
        ChecksumError
            The data has another one; nothing was taken.
        ConflictError
            Another content was put there before.
        ExpiredError, NotFoundError, UsageError, OutOfSpaceError, StoreError
        """
        digest = hashlib.sha256(data).digest()
        if digest != _digest(checksum):
            raise ChecksumError(f"block {index} of {session_id} does not have the SHA-256 {checksum}; send it again")
        with self._opened(session_id) as work:
            work.put(index, data, digest)

    def complete(
        self, session_id: str, blocks: int, checksum: str | None = None, progress: ProgressCallback | None = None
    ) -> Manifest:
        """Make the snapshot, when all is as it should be; doing it again gives the same one.

        Parameters
        ----------
        session_id : str
        blocks : int
            How many different blocks were put.
        checksum : str, optional
            SHA-256, base64, of the blocks' digests (32 bytes each) one behind the other by number.
        progress : callable, optional

        Raises
        ------
        ChecksumError
            Another number of blocks was put, or others; it can be gone on with.
        NotFoundError
            There is no such session, or the parent is not there any more.
        DamagedError
            A block that was put was lost; the message names it.
        ExpiredError, BusyError, StoreError, OutOfSpaceError
        """
        if not os.path.exists(self._path(session_id, "session")):
            return self._made_before(session_id)
        with self._opened(session_id) as work:
            found = work.linear()
            if len(work.digests) != blocks:
                raise ChecksumError(
                    f"{len(work.digests)} blocks of {session_id} were put, not {blocks}; put what is missing"
                )
            if checksum is not None and found != _digest(checksum):
                raise ChecksumError(f"the blocks of {session_id} together do not have the SHA-256 {checksum}")
            made = self._made(work.session) or self._store(work, progress)
            self._remove(session_id)
            return made

    def cancel(self, session_id: str) -> None:
        """Give it up."""
        with self._opened(session_id):
            self._remove(session_id)

    def sessions(self) -> list[Session]:
        """All that were begun and not ended."""
        found = []
        for name in self._names():
            with contextlib.suppress(NotFoundError, DamagedError):
                found.append(self._session(name))
        return found

    def sweep(self) -> None:
        """Remove what nobody went on with in time."""
        for name in self._names():
            with contextlib.suppress(ExpiredError, NotFoundError, DamagedError):
                with self._opened(name):
                    pass

    def _store(self, work: _Work, progress: ProgressCallback | None) -> Manifest:
        session = work.session
        parent = None if session.parent is None else self._repository.find(session.parent)
        reader = None if parent is None else self._repository.open_snapshot(parent)
        source = _Staged(work, reader)
        done = self._repository.snapshot(
            source,
            disk=session.disk,
            parent=parent,
            changed=None if parent is None else source.changed(),
            label=session.label,
            tags=session.tags,
            key=key_choice(session.key),
            origin=_origin(session.id),
            progress=progress,
        )
        return done.snapshot

    def _made(self, session: Session) -> Manifest | None:
        """The snapshot, when a crash came between its commit and the end of the session."""
        found = [item for item in self._repository.snapshots(session.disk) if item.origin == _origin(session.id)]
        return found[0] if found else None

    def _made_before(self, session_id: str) -> Manifest:
        for item in self._repository.snapshots():
            if item.origin == _origin(session_id):
                return item
        raise NotFoundError(f"{session_id} is no snapshot that is being written here: it was given up, or never begun")

    def _names(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self._folder) if _ID.fullmatch(name))
        except FileNotFoundError:
            return []

    def _path(self, session_id: str, name: str = "") -> str:
        if not _ID.fullmatch(session_id):
            raise NotFoundError(f"{session_id!r} is no id of a snapshot that is being written")
        return os.path.join(self._folder, session_id, name)

    def _make(self, session: Session) -> None:
        folder = self._path(session.id)
        try:
            os.makedirs(folder, mode=0o700)
            for name, content in (("data", b""), ("log", b""), ("session.new", msgspec.json.encode(session))):
                with open(os.path.join(folder, name), "xb") as file:
                    file.write(content)
            # There is a session when it has this name.
            os.rename(os.path.join(folder, "session.new"), os.path.join(folder, "session"))
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise from_os_error(error, f"beginning a snapshot in {folder}") from error

    def _session(self, session_id: str) -> Session:
        path = self._path(session_id, "session")
        try:
            with open(path, "rb") as file:
                found = msgspec.json.decode(file.read(_SESSION_LIMIT_BYTES), type=Session)
        except OSError as error:
            raise NotFoundError(
                f"{session_id} is no snapshot that is being written here: it was completed, given up, or never begun"
            ) from error
        except msgspec.DecodeError as error:
            raise DamagedError(f"{path} is damaged: {error}; remove its folder and begin anew") from error
        if found.id != session_id or found.repository != self._repository.id:
            raise DamagedError(f"{path} has members that contradict its name; remove its folder and begin anew")
        return found

    @contextlib.contextmanager
    def _opened(self, session_id: str) -> Iterator[_Work]:
        """A session for oneself alone; ExpiredError, and it is gone, when nobody went on in time."""
        session = self._session(session_id)
        with contextlib.ExitStack() as stack:
            try:
                log = os.open(self._path(session_id, "log"), os.O_RDWR | os.O_CLOEXEC)
                stack.callback(os.close, log)
                fcntl.flock(log, fcntl.LOCK_EX)
                data = os.open(self._path(session_id, "data"), os.O_RDWR | os.O_CLOEXEC)
                stack.callback(os.close, data)
                idle_s = time.time() - os.fstat(log).st_mtime
                work = _Work(session, log, data, self._read.setdefault(session_id, _Digests()))
            except FileNotFoundError as error:
                raise NotFoundError(f"{session_id} was completed or given up meanwhile") from error
            except OSError as error:
                raise from_os_error(error, f"opening {self._path(session_id)}") from error
            if idle_s > session.timeout_s:
                self._remove(session_id)
                raise ExpiredError(
                    f"{session_id} was given up: nobody went on with it for {session.timeout_s} seconds; begin anew"
                )
            try:
                yield work
            except OSError as error:
                raise from_os_error(error, f"working on {self._path(session_id)}") from error

    def _remove(self, session_id: str) -> None:
        self._read.pop(session_id, None)
        shutil.rmtree(self._path(session_id), ignore_errors=True)


@dataclass(slots=True)
class _Digests:
    """What a log says up to some byte."""

    log_bytes: int = 0
    found: dict[int, bytes] = field(default_factory=dict)


class _Work:
    """An open session whose lock is held."""

    def __init__(self, session: Session, log: int, data: int, known: _Digests) -> None:
        self.session = session
        self.digests = known.found
        self._log = log
        self._data = data
        self._known = known
        end = os.fstat(log).st_size // _RECORD.size * _RECORD.size
        blocks = -(-session.size_bytes // session.block_bytes)
        for index, digest in _RECORD.iter_unpack(_read_all(log, end - known.log_bytes, known.log_bytes)):
            if index >= blocks:
                raise DamagedError(
                    f"the log of {session.id} names a block {index} of {blocks}; give it up and begin anew"
                )
            known.found[index] = digest
        known.log_bytes = end

    def put(self, index: int, data: bytes | memoryview, digest: bytes) -> None:
        """Write a block, then its record."""
        session = self.session
        offset = index * session.block_bytes
        if index < 0 or offset >= session.size_bytes:
            raise UsageError(f"block {index} is not inside of a disk of {session.size_bytes} bytes")
        if len(data) != self.length(index):
            raise UsageError(f"block {index} has {self.length(index)} bytes, not {len(data)}")
        known = self.digests.get(index)
        if known == digest:
            os.utime(self._log)
            return
        if known is not None:
            raise ConflictError(
                f"block {index} of {session.id} was put before, with other bytes; begin anew to change it"
            )
        _write_all(self._data, data, offset)
        # Over the piece of a record that a crash left.
        _write_all(self._log, _RECORD.pack(index, digest), self._known.log_bytes)
        self._known.log_bytes += _RECORD.size
        self.digests[index] = digest

    def length(self, index: int) -> int:
        """Of a block."""
        return min(self.session.block_bytes, self.session.size_bytes - index * self.session.block_bytes)

    def linear(self) -> bytes:
        """SHA-256 of the digests in the order of the blocks."""
        return hashlib.sha256(b"".join(self.digests[index] for index in sorted(self.digests))).digest()

    def read(self, index: int) -> bytes:
        """A block, compared with its record."""
        data = _read_all(self._data, self.length(index), index * self.session.block_bytes)
        if hashlib.sha256(data).digest() != self.digests[index]:
            raise DamagedError(f"block {index} of {self.session.id} was lost; give it up and begin anew")
        return data


class _Staged:
    """A session's blocks over its parent, as a `Source`."""

    def __init__(self, work: _Work, parent: SnapshotReader | None) -> None:
        self._work = work
        self._parent = parent

    @property
    def name(self) -> str:
        return f"blocks of {self._work.session.disk}"

    @property
    def size_bytes(self) -> int:
        return self._work.session.size_bytes

    def changed(self) -> Extents:
        """Where blocks were put."""
        numbers = np.array(sorted(self._work.digests), dtype=np.int64)
        return extents.from_blocks(numbers, self._work.session.block_bytes, self.size_bytes)

    def data_extents(self) -> Extents:
        # With a parent only what changed is asked for, and what is compared beside it.
        return self.changed() if self._parent is None else extents.from_pairs([(0, self.size_bytes)])

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        block = self._work.session.block_bytes
        end = offset_bytes + len(target)
        for index in range(offset_bytes // block, -(-end // block)):
            low, high = max(offset_bytes, index * block), min(end, (index + 1) * block)
            part = target[low - offset_bytes : high - offset_bytes]
            if index in self._work.digests:
                part[:] = self._work.read(index)[low - index * block : high - index * block]
                continue
            done = 0 if self._parent is None else self._parent.pread_into(part, low)
            part[done:] = bytes(len(part) - done)

    def check_unchanged(self) -> None:
        pass


def _origin(session_id: str) -> str:
    return f"blocks:{session_id}"


def _digest(checksum: str) -> bytes:
    try:
        found = base64.b64decode(checksum, validate=True)
    except ValueError as error:
        raise UsageError(f"a checksum is SHA-256 in base64, not {checksum!r}") from error
    if len(found) != hashlib.sha256().digest_size:
        raise UsageError(f"a checksum is SHA-256 in base64, not {checksum!r}")
    return found


def _read_all(descriptor: int, length_bytes: int, offset_bytes: int) -> bytes:
    """So many bytes; fewer at the file's end."""
    parts = []
    while length_bytes:
        part = os.pread(descriptor, length_bytes, offset_bytes)
        if not part:
            break
        parts.append(part)
        length_bytes -= len(part)
        offset_bytes += len(part)
    return b"".join(parts)


def _write_all(descriptor: int, data: bytes | memoryview, offset_bytes: int) -> None:
    view = memoryview(data).cast("B")
    while len(view):
        written = os.pwrite(descriptor, view, offset_bytes)
        view, offset_bytes = view[written:], offset_bytes + written
