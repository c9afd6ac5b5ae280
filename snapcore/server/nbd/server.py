"""The server: listening, a thread a connection, limits, and an end in which nothing is lost."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from snapcore import nbd
from snapcore.errors import UsageError
from snapcore.pool import Pool
from snapcore.server.nbd import listening
from snapcore.server.nbd.exports import Client, Entered, Exported, Rule, View
from snapcore.server.nbd.handshake import Handshake, Negotiated
from snapcore.server.nbd.listening import Listener
from snapcore.server.nbd.stream import Deadline, EndedError, SocketStream, Stream
from snapcore.server.nbd.tls import Tls, TlsServer, TlsStream

_HANDSHAKE_S = 10.0
_MAX_CONNECTIONS = 256
# How long a stopping server waits for clients that do not take their answers.
_GRACE_S = 30.0
_CUT_S = 10.0
_NO_DESCRIPTORS_S = 0.1
# Longer than a disk of a virtual machine ever takes, and than a flush of much on a slow one.
_REQUEST_S = 120.0
# Requests are looked at so often in the time that they have.
_LOOKS = 8
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
_DRAIN_BYTES = 64 << 20


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes
    ----------
    kind : str
        "connected" (an export was entered), "disconnected" (and left), "refused" (it came to no export).
    client : str
    export : str
        In full; empty when there was none.
    writable : bool
    reason : str
        How it ended.
    requests : int
        That were answered.
    """

    kind: str
    client: str
    export: str = ""
    writable: bool = False
    reason: str = ""
    requests: int = 0


class NbdServer:
    """Disks and snapshots of a pool, and raw images, over NBD. A context manager.

    Parameters
    ----------
    pool : Pool, optional
        Opened by the caller, and closed by the caller after `stop`.
    listen : sequence of str
        Addresses: unix:PATH or tcp:HOST:PORT; port 0 is any.
    listeners : iterable of Listener
        Sockets that are there already (`snapcore.server.nbd.listening.activated`).
    exports : sequence of str
        Patterns of what is shown; none: all.
    rules : sequence of Rule
        Who may use what; none: everybody all.
    images : mapping of str to path
        Raw images and devices under names.
    tls : Tls, optional
    read_only : bool
    max_connections : int
        More are refused.
    handshake_timeout_s : float
        A client that has not chosen an export by then is cut off.
    idle_timeout_s : float
        So is one that asks for nothing for so long; 0: never.
    request_timeout_s : float
        A request that waits for its medium for so long without getting on is answered with an I/O error; 0: never.
    socket_mode : int
        Permissions of Unix sockets.
    on_event : callable, optional
        Gets an `Event`, from the thread of the connection.
    """

    def __init__(
        self,
        pool: Pool | None = None,
        *,
        listen: Sequence[str] = (),
        listeners: Iterable[Listener] = (),
        exports: Sequence[str] = (),
        rules: Sequence[Rule] = (),
        images: Mapping[str, str | os.PathLike[str]] | None = None,
        tls: Tls | None = None,
        read_only: bool = False,
        max_connections: int = _MAX_CONNECTIONS,
        handshake_timeout_s: float = _HANDSHAKE_S,
        idle_timeout_s: float = 0,
        request_timeout_s: float = _REQUEST_S,
        socket_mode: int = 0o600,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        if max_connections < 1 or handshake_timeout_s <= 0 or idle_timeout_s < 0 or request_timeout_s < 0:
            raise UsageError("a server has at least one connection, and time limits are positive")
        self._listen = tuple(listen)
        self._listeners = [*listeners]
        if not self._listen and not self._listeners:
            raise UsageError("a server needs an address to listen on")
        if rules and tls is None:
            raise UsageError("rules for clients need TLS: without it nobody proves who they are")
        self._tls = None if tls is None else TlsServer(tls)
        self._exported = Exported(pool, images or {}, patterns=exports, rules=rules, read_only=read_only)
        self._max_connections = max_connections
        self._handshake_s = handshake_timeout_s
        self._idle_s = idle_timeout_s
        self._request_s = request_timeout_s
        self._tick_s = request_timeout_s / _LOOKS if request_timeout_s else None
        self._socket_mode = socket_mode
        self._on_event = on_event
        self._lock = threading.Lock()
        self._sessions: set[_Session] = set()
        self._stopping = threading.Event()
        self._stopped = False
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._acceptor: threading.Thread | None = None

    def __enter__(self) -> NbdServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def uris(self) -> list[str]:
        """Where it listens, as NBD URIs; the name of an export comes behind the last slash of the path."""
        return [listener.uri(secure=self._tls is not None) for listener in self._listeners]

    @property
    def connections(self) -> int:
        """How many there are."""
        with self._lock:
            return len(self._sessions)

    def start(self) -> None:
        """Listen. Throw-away disks that a crash left are deleted.

        Raises
        ------
        BusyError, UsageError, StoreError, NotFoundError
        """
        if self._acceptor is not None or self._stopped:
            raise UsageError("a server is started once")
        try:
            self._exported.delete_left_clones()
            for where in self._listen:
                self._listeners += listening.listen(where, mode=self._socket_mode)
        except BaseException:
            self._close_all()
            raise
        self._wake = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept_all, name="snapcore-nbd", daemon=True)
        self._acceptor.start()

    def stop(self, *, grace_s: float = _GRACE_S) -> None:
        """Stop: take no more requests, answer those under way, make all durable.

        Parameters
        ----------
        grace_s : float
            Clients that do not take their answers for so long are cut off.
        """
        if self._stopped:
            return
        self._stopped = True
        self._stopping.set()
        if self._acceptor is not None and self._wake is not None:
            self._wake[1].send(b"x")
            self._acceptor.join()
            for wake in self._wake:
                wake.close()
        for listener in self._listeners:
            listener.close()
        with self._lock:
            sessions = [*self._sessions]
        for session in sessions:
            session.stop()
        end = time.monotonic() + grace_s
        for session in sessions:
            while session.is_alive() and (left_s := end - time.monotonic()) > 0:
                session.join(min(left_s, self._tick_s or left_s))
                self._expire()
        for session in sessions:
            session.cut()
        end = time.monotonic() + _CUT_S
        for session in sessions:
            session.join(end - time.monotonic())
        try:
            self._exported.flush()
        finally:
            if not self.connections:
                # Else the medium of an image hangs, and a thread in it.
                self._exported.close()

    def _close_all(self) -> None:
        self._stopped = True
        for listener in self._listeners:
            listener.close()
        self._exported.close()

    def _accept_all(self) -> None:
        assert self._wake is not None
        looked = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake[0], selectors.EVENT_READ)
            for listener in self._listeners:
                selector.register(listener.socket, selectors.EVENT_READ)
            while not self._stopping.is_set():
                for key, _ in selector.select(self._tick_s):
                    if key.fileobj is not self._wake[0]:
                        assert isinstance(key.fileobj, socket.socket)
                        self._accept(key.fileobj)
                if self._tick_s is not None and time.monotonic() - looked >= self._tick_s:
                    looked = time.monotonic()
                    self._expire()

    def _expire(self) -> None:
        """Answer what takes too long."""
        if self._tick_s is None:
            return
        with self._lock:
            sessions = [*self._sessions]
        for session in sessions:
            session.expire(self._request_s)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connected, _ = listener.accept()
        except (BlockingIOError, ConnectionError, InterruptedError):
            return
        except OSError:
            # No descriptors or no memory: the client stays in the queue until there are.
            self._stopping.wait(_NO_DESCRIPTORS_S)
            return
        connected.setblocking(True)
        session = _Session(connected, self._run)
        with self._lock:
            refused = len(self._sessions) >= self._max_connections
            if not refused:
                self._sessions.add(session)
        try:
            if refused:
                self._tell(Event("refused", session.address, reason="there are as many connections as may be"))
                connected.close()
            else:
                session.start()
        except RuntimeError:
            # No thread could be made.
            with self._lock:
                self._sessions.discard(session)
            connected.close()

    def _tell(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)

    def _run(self, session: _Session) -> None:
        """The thread of a connection."""
        try:
            try:
                self._talk(session)
            except EndedError as error:
                self._tell(Event("refused", session.address, reason=str(error)))
            finally:
                session.close()
        finally:
            with self._lock:
                self._sessions.discard(session)

    def _talk(self, session: _Session) -> None:
        stream = SocketStream(session.socket, Deadline(self._handshake_s))
        secured: TlsStream | None = None

        def start_tls() -> Stream:
            nonlocal secured
            assert self._tls is not None
            secured = self._tls.begin(session.socket, stream)
            return secured

        def see() -> View:
            names = () if secured is None else secured.names
            return self._exported.seen_by(Client(f"the NBD client {session.address}", names))

        handshake = Handshake(
            stream,
            see,
            start_tls=None if self._tls is None else start_tls,
            tls_required=self._tls is not None and self._tls.required,
            stopping=self._stopping.is_set,
        )
        negotiated = handshake.run()
        if negotiated is None:
            return
        entered = negotiated.entered
        try:
            self._tell(Event("connected", session.address, entered.name, entered.writable))
            reason, requests = self._transmit(session, negotiated, secured)
        finally:
            # Before the client hears that this is the end: then nobody is in its way any more.
            entered.leave()
        self._tell(Event("disconnected", session.address, entered.name, entered.writable, reason, requests))

    def _transmit(
        self, session: _Session, negotiated: Negotiated[Entered], secured: TlsStream | None
    ) -> tuple[str, int]:
        session.socket.settimeout(None)
        with contextlib.ExitStack() as ends:
            plain = session.socket
            if secured is not None:
                plain, inner = socket.socketpair()
                carrier = secured.carry(inner)
                ends.callback(carrier.join)
                ends.callback(plain.close)
            connection = nbd.Connection(
                plain.fileno(),
                negotiated.entered.export,
                structured=negotiated.structured,
                extended=negotiated.extended,
                contexts=negotiated.entered.contexts,
                idle_s=self._idle_s,
            )
            ends.enter_context(session.transmitting(connection))
            reason = connection.serve()
            return reason, connection.requests


class _Session:
    """A connection and its thread."""

    def __init__(self, connected: socket.socket, run: Callable[[_Session], None]) -> None:
        self.socket = connected
        self.address = _prepared(connected)
        self._lock = threading.Lock()
        self._connection: nbd.Connection | None = None
        self._stopping = False
        self._closed = False
        self._thread = threading.Thread(target=run, args=(self,), name="snapcore-nbd-client", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @contextlib.contextmanager
    def transmitting(self, connection: nbd.Connection) -> Iterator[None]:
        """While `stop` means this connection."""
        with self._lock:
            self._connection = connection
            if self._stopping:
                connection.stop()
        try:
            yield
        finally:
            with self._lock:
                self._connection = None

    def expire(self, limit_s: float) -> None:
        """Answer requests that take longer."""
        with self._lock:
            if self._connection is not None:
                self._connection.expire(limit_s)

    def stop(self) -> None:
        """Let it end: what is under way is answered."""
        with self._lock:
            self._stopping = True
            if self._connection is not None:
                self._connection.stop()
            elif not self._closed:
                with contextlib.suppress(OSError):
                    self.socket.shutdown(socket.SHUT_RD)

    def cut(self) -> None:
        """End it, whatever is under way."""
        with self._lock:
            if not self._closed:
                with contextlib.suppress(OSError):
                    self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let the client have what was sent, and close."""
        with self._lock:
            self._closed = True
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
                # What lies there unread would make the system throw away what is still on the way to the client.
                self.socket.setblocking(False)
                left = _DRAIN_BYTES
                while left > 0 and (part := self.socket.recv(1 << 16)):
                    left -= len(part)
            self.socket.close()

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait for its end."""
        if self._thread.is_alive():
            self._thread.join(max(0.0, timeout_s))


def _prepared(connected: socket.socket) -> str:
    """Set a socket's options; says who is at the other end."""
    with contextlib.suppress(OSError):
        if connected.family == socket.AF_UNIX:
            return _unix_peer(connected)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A client whose machine is gone is noticed some time, and lets go of its disk then.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        host, port = connected.getpeername()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return "that is gone"


def _unix_peer(connected: socket.socket) -> str:
    if hasattr(socket, "SO_PEERCRED"):
        layout = struct.Struct("3i")
        process, user, _ = layout.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size))
        return f"process {process} of user {user}"
    return "on a Unix socket"
