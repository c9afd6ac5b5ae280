"""The journal of archives: what is wanted, and which local snapshot stands for which archived one.

A file `archives` in the pool's folder (docs/FORMAT.md, "The journal of archives"), replaced whole at each change and
durable then. Whoever has the pool open for writing writes it, from any of its threads. What it says about twins is a
hint that whoever uses it compares with the archived snapshot's `origin`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable

import msgspec

from snapcore.errors import DamagedError, UnsupportedFormatError, from_os_error
from snapcore.persist import Medium
from snapcore.repository import HookRun

NAME = "archives"
VERSION = 1
_LIMIT_BYTES = 64 << 20


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """An archive under way, of one snapshot or of a group.

    Attributes
    ----------
    id : str
        32 hexadecimal digits; of a group its id in the repository.
    repository, url : str
        Id of the repository, and where it was.
    snapshots : list of str
        Ids of local snapshots.
    disk, name, tags
        What they are stored as; `disk` None: as their own disks are called.
    key : str or None
        Of the key that was asked for, the name or id; empty: a plain chain was asked for.
    group : bool
    freeze, thaw : HookRun or None
    error : str or None
        Why the last try failed.
    """

    id: str
    repository: str
    url: str
    snapshots: list[str]
    disk: str | None = None
    name: str | None = None
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    key: str | None = None
    group: bool = False
    freeze: HookRun | None = None
    thaw: HookRun | None = None
    error: str | None = None


class CutHooks(msgspec.Struct, frozen=True, kw_only=True):
    """What came of the commands around the cut of a local group."""

    freeze: HookRun | None = None
    thaw: HookRun | None = None


class _Content(msgspec.Struct, kw_only=True):
    version: int = VERSION
    archived: dict[str, dict[str, str]] = msgspec.field(default_factory=dict)
    wanted: list[Wanted] = msgspec.field(default_factory=list)
    groups: dict[str, CutHooks] = msgspec.field(default_factory=dict)


class Journal:
    """The journal of a pool. Safe from many threads.

    Parameters
    ----------
    folder : str
        The pool's.
    medium : Medium, optional
        Does the persistent operations.
    """

    def __init__(self, folder: str, medium: Medium | None = None) -> None:
        self._path = os.path.join(folder, NAME)
        self._folder = folder
        self._medium = medium or Medium()
        self._lock = threading.Lock()
        self._content = self._load()

    def wanted(self, repository: str | None = None) -> list[Wanted]:
        """Archives under way, oldest first: all, or those for one repository."""
        with self._lock:
            return [item for item in self._content.wanted if repository in (None, item.repository)]

    def twins(self, repository: str) -> dict[str, str]:
        """By local snapshot's id the id of what should be its archived twin."""
        with self._lock:
            return dict(self._content.archived.get(repository, {}))

    def repositories(self) -> list[str]:
        """Ids of repositories that something was archived in."""
        with self._lock:
            return list(self._content.archived)

    def hooks(self, group: str) -> CutHooks:
        """What came of the commands around the cut of a local group."""
        with self._lock:
            return self._content.groups.get(group, CutHooks())

    def want(self, item: Wanted) -> None:
        """Note an archive as wanted, or again with what has changed about it."""
        with self._lock:
            others = [other for other in self._content.wanted if other.id != item.id]
            self._write(msgspec.structs.replace(self._content, wanted=[*others, item]))

    def drop(self, wanted_id: str) -> None:
        """An archive is not wanted any more."""
        with self._lock:
            others = [other for other in self._content.wanted if other.id != wanted_id]
            if len(others) < len(self._content.wanted):
                self._write(msgspec.structs.replace(self._content, wanted=others))

    def done(self, item: Wanted, twins: dict[str, str], alive: Iterable[str]) -> None:
        """An archive is complete. `alive` are the ids of local snapshots; what was said about others is forgotten."""
        there = {*alive}
        with self._lock:
            archived = {place: dict(known) for place, known in self._content.archived.items()}
            archived.setdefault(item.repository, {}).update(twins)
            kept = {
                place: {local: twin for local, twin in known.items() if local in there}
                for place, known in archived.items()
            }
            others = [other for other in self._content.wanted if other.id != item.id]
            self._write(msgspec.structs.replace(self._content, archived=kept, wanted=others))

    def cut(self, group: str, hooks: CutHooks, alive: Iterable[str]) -> None:
        """Note the commands around the cut of a local group; `alive` are the ids of local groups."""
        there = {*alive, group}
        with self._lock:
            kept = {known: found for known, found in self._content.groups.items() if known in there}
            self._write(msgspec.structs.replace(self._content, groups=kept | {group: hooks}))

    def _load(self) -> _Content:
        try:
            with open(self._path, "rb") as file:
                data = file.read(_LIMIT_BYTES + 1)
        except FileNotFoundError:
            return _Content()
        except OSError as error:
            raise from_os_error(error, f"reading {self._path}") from error
        try:
            found = msgspec.json.decode(data, type=_Content)
        except msgspec.DecodeError as error:
            raise DamagedError(
                f"{self._path} is no journal of archives: {error}. Remove it: what is archived already is found "
                "again, what is not has to be asked for again"
            ) from error
        if found.version != VERSION:
            raise UnsupportedFormatError(
                f"{self._path} is of version {found.version} and not {VERSION}; update snapcore"
            )
        return found

    def _write(self, content: _Content) -> None:
        new = self._path + ".new"
        try:
            with contextlib.suppress(FileNotFoundError):
                self._medium.unlink(new)
            descriptor = self._medium.create(new)
            try:
                self._medium.write_at(descriptor, [msgspec.json.encode(content)], 0)
                self._medium.sync(descriptor)
            finally:
                self._medium.close(descriptor)
            self._medium.rename(new, self._path)
            self._medium.sync_folder(self._folder)
        except OSError as error:
            raise from_os_error(error, f"writing {self._path}") from error
        self._content = content
