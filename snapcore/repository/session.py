"""Sessions: who works on a repository now, and how far the collections were when they began.

A writer registers with the generation that it has seen, and looks again afterwards; a collection goes on only when all
writers of older generations have ended (docs/DESIGN.md, "Collection"). A session can be ended by others: a tombstone
takes the name of the manifest that its writer would commit, so that a writer which is not dead after all is refused at
its commit and never leaves a snapshot with missing blocks. How sure one is that it is dead is therefore a
question of courtesy and not of safety: sessions of processes that are gone from this very host are ended without
asking, others when they have lasted longer than patience allows. Sessions of collectors are for people to see.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from datetime import UTC, datetime
from functools import cache

import blake3
import msgspec

from snapcore.errors import DamagedError, Error, ExistsError, FencedError, NotFoundError, ReadError
from snapcore.repository import envelope, manifest
from snapcore.repository.domain import PLAIN, Domain
from snapcore.repository.envelope import Kind
from snapcore.store.interface import Store

PREFIX = "sessions/"
# Of images, which are made by sessions too.
IMAGES = "images/"
CREATE, COLLECT = "create", "collect"
_POLL_S = 0.5
_IMAGE = re.compile(r"images/[0-9a-f]{32}")

# Sessions that this process has registered and not left.
_own: set[str] = set()


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of work under way.

    Attributes
    ----------
    id : str
        32 hexadecimal digits.
    work : str
        "create" or "collect".
    manifest : str or None
        Name, of a manifest or an image, under which a writer will commit.
    host, kernel, process, started : str, str, int, int
        Where it runs: host name, boot and process-id space, process id and the process's start in clock ticks.
    since : str
        UTC, RFC 3339, for people.
    machine : str
        The host's own id, which outlives a reboot; empty where there is none.
    domain : str
        Whose packs it works on: the id in hexadecimal, empty for the plain domain.
    generation : int
        The generation of that domain that it has seen.
    """

    id: str
    work: str
    manifest: str | None
    host: str
    kernel: str
    process: int
    started: int
    since: str
    machine: str = ""
    domain: str = ""
    generation: int = 0

    @property
    def name(self) -> str:
        """Name of the session's object."""
        return PREFIX + self.id

    def describe(self) -> str:
        """For messages: what, who, since when."""
        host = self.host or (
            "this host" if self.machine == _told(_machine(), True) != "" else "a host that it does not tell"
        )
        return f"{self.work} {self.id} of process {self.process} on {host} since {self.since}"


def register(
    store: Store, work: str, manifest_name: str | None = None, *, domain: Domain = PLAIN, generation: int = 0
) -> Session:
    """Write a session of this process (step "register"); of a sealed domain, it tells its host to the host only."""
    hidden = domain.sealing is not None
    session = Session(
        id=secrets.token_hex(16),
        work=work,
        manifest=manifest_name,
        host="" if hidden else os.uname().nodename,
        kernel=_told(_kernel(), hidden),
        process=os.getpid(),
        started=_started(os.getpid()) or 0,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=_told(_machine(), hidden),
        domain=domain.key_id or "",
        generation=generation,
    )
    body = msgspec.json.encode(session)
    _own.add(session.id)
    try:
        store.put_new(session.name, [envelope.sealed(Kind.SESSION, bytes.fromhex(session.id), body)])
    except BaseException:
        # It may be there all the same: the next one ends it.
        abandon(session)
        raise
    return session


def sessions(store: Store) -> list[Session]:
    """All sessions that are registered."""
    found = []
    for name in ids(store):
        try:
            session = _read(store, name)
        except DamagedError as error:
            raise DamagedError(
                f"{error}: whose session it is cannot be told. When nobody works on the repository, "
                f"`snapcore repo sessions {store.url} --end {name}` removes it"
            ) from error
        if session is not None:
            found.append(session)
    return found


def ids(store: Store) -> list[str]:
    """What the names of all sessions say, damaged ones included."""
    return [name.removeprefix(PREFIX) for name, _ in store.list(PREFIX)]


def _read(store: Store, session_id: str) -> Session | None:
    """A session; None for one that has gone meanwhile."""
    name = PREFIX + session_id
    where = f"{store.url}/{name}"
    try:
        data = store.get(name, envelope.OBJECT_LIMIT_BYTES)
    except NotFoundError:
        return None
    try:
        kind, _, body = envelope.opened(data, where, bytes.fromhex(session_id))
    except ValueError as error:
        raise DamagedError(f"{where} is no name of a session") from error
    envelope.expect(kind, Kind.SESSION, where)
    session = envelope.from_json(body, Session, where)
    if session.name != name or not (session.manifest is None or _may_commit(session.manifest)):
        raise DamagedError(f"{where} has members that contradict its name or name no snapshot")
    return session


def is_image(object_name: str) -> bool:
    """Whether an object of this name is an image or a tombstone."""
    return _IMAGE.fullmatch(object_name) is not None


def _may_commit(object_name: str) -> bool:
    return manifest.is_name(object_name) or is_image(object_name)


def withdraw(store: Store, session: Session) -> None:
    """Remove the own session; one that others have ended already is fine."""
    abandon(session)
    with contextlib.suppress(NotFoundError):
        store.delete(session.name)


def abandon(session: Session) -> None:
    """Leave the own session behind as that of a dead process: the next writer takes up what it stored."""
    _own.discard(session.id)


def end(store: Store, session: Session) -> None:
    """End a session of somebody else: fence its commit, then remove it."""
    if session.manifest is not None:
        # A name that exists already holds a commit that has happened, or an earlier tombstone: fenced either way.
        with contextlib.suppress(ExistsError):
            manifest.write_tombstone(store, session.manifest)
    withdraw(store, session)


def end_by_id(store: Store, session_id: str) -> None:
    """End a session; one that cannot be read is removed, and no commit of its writer is refused."""
    try:
        session = _read(store, session_id)
    except (DamagedError, ReadError):
        store.delete(PREFIX + session_id)
        return
    if session is not None:
        end(store, session)


def check(store: Store, own: Session) -> None:
    """FencedError when somebody else has ended the own session."""
    try:
        store.size(own.name)
    except NotFoundError as error:
        raise FencedError(
            f"the session {own.id} ({own.work}) was ended by somebody else before it was done; nothing reachable was "
            "removed, run it again"
        ) from error


def was_ended(store: Store, own: Session) -> bool:
    """Whether somebody else has ended the own session, as far as the store tells."""
    try:
        check(store, own)
    except FencedError:
        return True
    except Error:
        return False
    return False


def end_dead(store: Store, found: list[Session]) -> list[Session]:
    """End the sessions of processes that are gone from this host. Returns those that are left."""
    left = []
    for session in found:
        if is_gone(session):
            end(store, session)
        else:
            left.append(session)
    return left


def wait_for_older(store: Store, domain: Domain, generation: int, wait_s: float, patience_s: float) -> list[Session]:
    """Step "wait" of a collector: the writers of older generations that are still at work after `wait_s`.

    Those whose processes are gone, and those that began more than `patience_s` ago, are fenced.
    """
    deadline = time.monotonic() + wait_s
    while True:
        older = [
            item
            for item in sessions(store)
            if item.work == CREATE and item.domain == (domain.key_id or "") and item.generation < generation
        ]
        left = []
        for session in end_dead(store, older):
            if _age_s(session) > patience_s:
                end(store, session)
            else:
                left.append(session)
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))


def _age_s(session: Session) -> float:
    """How long ago a session began, by this host's clock; for ever, when that cannot be told."""
    try:
        began = datetime.fromisoformat(session.since)
        return (datetime.now(UTC) - began).total_seconds()
    except (ValueError, TypeError):
        return float("inf")


def is_gone(session: Session) -> bool:
    """Whether the session's process ran on this host and exists no more.

    Of an earlier boot of this very machine none does. Within this boot it is told only for the own process space.
    """
    hidden = not session.host
    kernel = _told(_kernel(), hidden)
    if (session.host != os.uname().nodename and not hidden) or not session.kernel or not kernel:
        return False
    if session.kernel != kernel:
        rebooted = session.kernel.split()[0] != kernel.split()[0]
        # Machines that were cloned share name and id. To end a writer wrongly costs it its commit and no more.
        same_machine = session.machine != "" and session.machine == _told(_machine(), hidden)
        return rebooted and same_machine
    if session.process == os.getpid():
        return session.id not in _own
    started = _started(session.process)
    if started is None or not session.started:
        # What /proc hides may live all the same.
        return not _exists(session.process)
    return started != session.started


@cache
def _kernel() -> str:
    """The boot of this host and the process-id space; empty where neither can be told."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


@cache
def _machine() -> str:
    """The id of this host, as machine-id(5) has it; empty where there is none."""
    try:
        with open("/etc/machine-id", encoding="ascii") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _told(words: str, hidden: bool) -> str:
    """What a session says of its host; of a hidden one, what only a host that knows the words can compare.

    The first word is a random number of 122 bits or more, so nobody finds the words by trying.
    """
    if not hidden:
        return words
    told = (f"{words.split()[0]} {word}".encode() for word in words.split())
    return " ".join(blake3.blake3(word, derive_key_context="snapcore 2026 session").hexdigest(16) for word in told)


def _started(process: int) -> int | None:
    """Start of a process in clock ticks since boot, -1 for one that has ended; None where it cannot be seen."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            # Field 22 of proc(5); the name in field 2 may hold spaces and parentheses.
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] == "Z" else int(fields[19])


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # Somebody else's.
        return True
    return True
