"""Records every persistent write, and builds what a crash after any of them may leave.

The model is that of docs/FORMAT.md, "Assumptions about the medium". Data belongs to the inode, names to their folder:

| not durable yet | after a crash |
| --- | --- |
| a write | any subset of its 512-byte sectors is there; the file is of any size from the durable to the written one |
| a truncation or a hole | done or not |
| names of a folder | each name as after any of the changes since the folder was synced, whatever the others are |

What `sync` and `sync_folder` made durable is always there. A name in a folder whose own name is lost is lost with it.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from snapcore.persist import Buffer, Medium

SECTOR_BYTES = 512
_FOLDER = -1


@dataclass(frozen=True, slots=True)
class Operation:
    """One primitive that was done, or (`note`) something that a test wants to know of a prefix.

    Attributes
    ----------
    kind : str
        Name of the method of `Medium`, or "note".
    inode : int
        Number of the file; unused for names.
    path, target : str
        Relative to the recorded folder; what is outside of it begins with "..".
    offset_bytes, data, size_bytes
        Of a write; of a hole or truncation.
    fact : object
        Of a note.
    """

    kind: str
    inode: int = 0
    path: str = ""
    target: str = ""
    offset_bytes: int = 0
    data: bytes = b""
    size_bytes: int = 0
    fact: object = None


class Recorder(Medium):
    """Does everything really, and keeps a list of it. Safe from many threads: one primitive at a time.

    Parameters
    ----------
    root : path
        The folder whose names and files matter. What lies in it now is durable.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.path.abspath(root)
        self.operations: list[Operation] = []
        self.before = Image()
        self._lock = threading.RLock()
        self._numbers: dict[tuple[int, int], int] = {}
        self._count = 0
        self._take(self.root)

    def _take(self, folder: str) -> None:
        for entry in os.scandir(folder):
            name = os.path.relpath(entry.path, self.root)
            if entry.is_dir(follow_symlinks=False):
                self.before.names[name] = _FOLDER
                self._take(entry.path)
            else:
                status = os.stat(entry.path)
                number = self._number(status, new=False)
                self.before.names[name] = number
                self.before.contents[number] = Path(entry.path).read_bytes()

    def _number(self, status: os.stat_result, *, new: bool) -> int:
        key = (status.st_dev, status.st_ino)
        # The file system gives the inode of a removed file to the next one, which is another file all the same.
        if new or key not in self._numbers:
            self._numbers[key] = self._count
            self._count += 1
        return self._numbers[key]

    def _inode(self, descriptor: int) -> int:
        return self._number(os.fstat(descriptor), new=False)

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self.root)

    def note(self, fact: object) -> None:
        """Remember that this is so from here on."""
        with self._lock:
            self.operations.append(Operation("note", fact=fact))

    def create(self, path: str, mode: int = 0o666) -> int:
        with self._lock:
            descriptor = super().create(path, mode)
            inode = self._number(os.fstat(descriptor), new=True)
            self.operations.append(Operation("create", inode, self._relative(path)))
            return descriptor

    def write_at(self, descriptor: int, buffers: Sequence[Buffer], offset_bytes: int) -> int:
        with self._lock:
            written = super().write_at(descriptor, buffers, offset_bytes)
            data = b"".join(buffers)
            assert written == len(data)
            self.operations.append(Operation("write_at", self._inode(descriptor), offset_bytes=offset_bytes, data=data))
            return written

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        with self._lock:
            super().truncate(descriptor, size_bytes)
            self.operations.append(Operation("truncate", self._inode(descriptor), size_bytes=size_bytes))

    def punch(self, descriptor: int, offset_bytes: int, length_bytes: int) -> bool:
        with self._lock:
            done = super().punch(descriptor, offset_bytes, length_bytes)
            if done:
                self.operations.append(
                    Operation("punch", self._inode(descriptor), offset_bytes=offset_bytes, size_bytes=length_bytes)
                )
            return done

    def sync(self, descriptor: int) -> None:
        with self._lock:
            super().sync(descriptor)
            self.operations.append(Operation("sync", self._inode(descriptor)))

    def close(self, descriptor: int) -> None:
        with self._lock:
            self.operations.append(Operation("close", self._inode(descriptor)))
            super().close(descriptor)

    def link(self, source: str, target: str) -> None:
        with self._lock:
            super().link(source, target)
            self.operations.append(Operation("link", 0, self._relative(source), self._relative(target)))

    def rename(self, source: str, target: str) -> None:
        with self._lock:
            super().rename(source, target)
            self.operations.append(Operation("rename", 0, self._relative(source), self._relative(target)))

    def unlink(self, path: str) -> None:
        with self._lock:
            super().unlink(path)
            self.operations.append(Operation("unlink", 0, self._relative(path)))

    def make_folder(self, path: str) -> None:
        with self._lock:
            new = not os.path.isdir(path)
            super().make_folder(path)
            if new:
                self.operations.append(Operation("make_folder", 0, self._relative(path)))

    def sync_folder(self, path: str) -> None:
        with self._lock:
            super().sync_folder(path)
            self.operations.append(Operation("sync_folder", 0, self._relative(path)))


class FastMedium(Medium):
    """Makes nothing durable: for working on crashed states, of which there are thousands."""

    def sync(self, descriptor: int) -> None:
        del descriptor

    def sync_folder(self, path: str) -> None:
        assert os.path.isdir(path)


@dataclass(slots=True)
class Image:
    """Names and contents of a folder.

    Attributes
    ----------
    names : dict of relative path to inode number, or -1 for a folder
    contents : dict of inode number to bytes
    """

    names: dict[str, int] = field(default_factory=dict)
    contents: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Crash:
    """A state of the folder that a crash may leave.

    Attributes
    ----------
    done : int
        Operations that had returned.
    how : str
        "all", "none" or "some" of what was not durable is there.
    facts : tuple
        What had been noted.
    folders : tuple of str
    files : dict of relative path to bytes
    """

    done: int
    how: str
    facts: tuple[object, ...]
    folders: tuple[str, ...]
    files: dict[str, bytes]

    def build(self, folder: str | os.PathLike[str]) -> None:
        """Make the state in a folder that is empty or not there."""
        os.makedirs(folder, exist_ok=True)
        for name in self.folders:
            os.mkdir(os.path.join(folder, name))
        for name, data in self.files.items():
            with open(os.path.join(folder, name), "xb") as file:
                file.write(data)


class _File:
    """Content of an inode: durable, and what was done since."""

    def __init__(self, durable: bytes = b"") -> None:
        self.durable = durable
        self.pending: list[Operation] = []

    def live(self) -> bytes:
        """With everything done."""
        data = bytearray(self.durable)
        for operation in self.pending:
            _apply(data, operation)
        return bytes(data)

    def torn(self, random_: random.Random) -> bytes:
        """With a part of it done."""
        data = bytearray(self.durable)
        live = bytearray(self.durable)
        for operation in self.pending:
            _apply(live, operation)
            if operation.kind == "write_at":
                share = random_.choice((0.0, 0.1, 0.5, 0.9, 1.0))
                size_bytes = len(data)
                stop = operation.offset_bytes + len(operation.data)
                # Sectors of the file. What a write leaves of the first and the last is what was there just before it.
                for at in range(operation.offset_bytes // SECTOR_BYTES * SECTOR_BYTES, stop, SECTOR_BYTES):
                    if random_.random() < share:
                        _put(data, at, bytes(live[at : at + SECTOR_BYTES]))
                end = max(size_bytes, operation.offset_bytes + len(operation.data))
                # The size may come without the data, or not all of the data's size.
                size_bytes = random_.choice((len(data), end, random_.randint(size_bytes, end)))
                _resize(data, size_bytes)
            elif random_.random() < 0.5:
                _apply(data, operation)
        return bytes(data)


def _apply(data: bytearray, operation: Operation) -> None:
    if operation.kind == "write_at":
        _put(data, operation.offset_bytes, operation.data)
    elif operation.kind == "truncate":
        _resize(data, operation.size_bytes)
    else:
        end = min(operation.offset_bytes + operation.size_bytes, len(data))
        _put(data, operation.offset_bytes, bytes(max(0, end - operation.offset_bytes)))


def _put(data: bytearray, offset_bytes: int, part: bytes) -> None:
    _resize(data, max(len(data), offset_bytes + len(part)))
    data[offset_bytes : offset_bytes + len(part)] = part


def _resize(data: bytearray, size_bytes: int) -> None:
    if size_bytes < len(data):
        del data[size_bytes:]
    else:
        data.extend(bytes(size_bytes - len(data)))


class _Model:
    """The folder while operations are done to it."""

    def __init__(self, before: Image) -> None:
        self.files = {number: _File(data) for number, data in before.contents.items()}
        self.live: dict[str, int] = dict(before.names)
        self.durable: dict[str, int] = dict(before.names)
        # What each name was since its folder was synced, oldest first; None while it was not there.
        self.history: dict[str, list[int | None]] = {}

    def do(self, operation: Operation) -> None:
        kind = operation.kind
        if kind == "create":
            self.files[operation.inode] = _File()
            self._name(operation.path, operation.inode)
        elif kind in ("write_at", "truncate", "punch"):
            self.files[operation.inode].pending.append(operation)
        elif kind == "sync":
            file = self.files[operation.inode]
            file.durable, file.pending = file.live(), []
        elif kind == "link":
            self._name(operation.target, self.live[operation.path])
        elif kind == "rename":
            self._name(operation.target, self.live[operation.path])
            self._name(operation.path, None)
        elif kind == "unlink":
            self._name(operation.path, None)
        elif kind == "make_folder":
            self._name(operation.path, _FOLDER)
        elif kind == "sync_folder":
            for name in [name for name in self.history if _folder_of(name) == operation.path]:
                del self.history[name]
                if name in self.live:
                    self.durable[name] = self.live[name]
                else:
                    self.durable.pop(name, None)

    def _name(self, name: str, entry: int | None) -> None:
        assert not name.startswith(".."), f"{name} lies outside of the recorded folder"
        self.history.setdefault(name, [self.durable.get(name)]).append(entry)
        if entry is None:
            self.live.pop(name)
        else:
            self.live[name] = entry

    def everything(self) -> tuple[tuple[str, ...], dict[str, bytes]]:
        contents = {number: file.live() for number, file in self.files.items()}
        return _state(self.live, contents)

    def nothing(self) -> tuple[tuple[str, ...], dict[str, bytes]]:
        contents = {number: file.durable for number, file in self.files.items()}
        return _state(self.durable, contents)

    def something(self, random_: random.Random) -> tuple[tuple[str, ...], dict[str, bytes]]:
        names = dict(self.durable)
        for name, entries in self.history.items():
            entry = random_.choice(entries)
            if entry is None:
                names.pop(name, None)
            else:
                names[name] = entry
        contents = {number: file.torn(random_) if file.pending else file.durable for number, file in self.files.items()}
        return _state(names, contents)


def _folder_of(name: str) -> str:
    return os.path.dirname(name) or "."


def _state(names: dict[str, int], contents: dict[int, bytes]) -> tuple[tuple[str, ...], dict[str, bytes]]:
    folders = {"."}
    files = {}
    for name, entry in sorted(names.items()):
        if _folder_of(name) in folders:
            if entry == _FOLDER:
                folders.add(name)
            else:
                files[name] = contents[entry]
    return tuple(sorted(folders - {"."})), files


def crashes(
    recorder: Recorder, samples: int, *, unread: str | None = None, seed: int = 0, since: int = 0
) -> Iterator[Crash]:
    """Every prefix of what was recorded, each with all, none and `samples` random parts of what was not durable.

    States that are equal in files and facts come once; what a file in the folder `unread` holds makes none.
    What was noted before the first operation holds for all. With `since`, only prefixes at least that long.
    """
    random_ = random.Random(seed)
    model = _Model(recorder.before)
    facts: tuple[object, ...] = ()
    seen: set[int] = set()
    kinds = [operation.kind for operation in recorder.operations]
    first = next((number for number, kind in enumerate(kinds) if kind != "note"), len(kinds))
    for done in range(len(kinds) + 1):
        if done:
            operation = recorder.operations[done - 1]
            if operation.kind == "note":
                facts = (*facts, operation.fact)
            elif operation.kind == "close":
                continue
            else:
                model.do(operation)
        if done < max(first, since):
            continue
        states = [("all", model.everything()), ("none", model.nothing())]
        states += [("some", model.something(random_)) for _ in range(samples)]
        for how, (folders, files) in states:
            read = [name if _folder_of(name) == unread else (name, data) for name, data in files.items()]
            key = hash((len(facts), folders, tuple(read)))
            if key not in seen:
                seen.add(key)
                yield Crash(done, how, facts, folders, files)
