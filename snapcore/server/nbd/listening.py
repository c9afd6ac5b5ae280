"""Where a server listens: Unix and TCP sockets of its own, or those that it was started with."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from urllib.parse import quote

from snapcore.errors import BusyError, UsageError, from_os_error
from snapcore.server.nbd.protocol import DEFAULT_PORT

_BACKLOG = 1024
_FIRST_ACTIVATED = 3
_SYNTAX = "listen on unix:PATH or tcp:HOST:PORT (tcp::PORT is every address of this machine)"


class Listener:
    """A listening socket, and the path of its file where that is ours to remove."""

    def __init__(self, listening: socket.socket, path: str | None = None) -> None:
        listening.setblocking(False)
        self.socket = listening
        self._path = path
        self._inode = None if path is None else _inode_of(path)

    def uri(self, *, secure: bool) -> str:
        """What clients are to be given; the name of an export comes behind the slash."""
        scheme = "nbds" if secure else "nbd"
        name = self.socket.getsockname()
        if self.socket.family == socket.AF_UNIX:
            text = os.fsdecode(name)
            return f"{scheme}+unix:///?socket={quote(text)}"
        host = f"[{name[0]}]" if self.socket.family == socket.AF_INET6 else name[0]
        return f"{scheme}://{host}:{name[1]}/"

    def close(self) -> None:
        """Stop listening; a Unix socket's file goes if it is still ours."""
        self.socket.close()
        if self._path is not None and _inode_of(self._path) == self._inode:
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def listen(where: str, *, mode: int) -> list[Listener]:
    """Listen at an address; on all that a host name stands for.

    Parameters
    ----------
    where : str
        unix:PATH or tcp:HOST:PORT.
    mode : int
        Permissions of a Unix socket.

    Raises
    ------
    UsageError, BusyError, StoreError, NotFoundError
    """
    kind, _, rest = where.partition(":")
    if kind == "unix" and rest:
        return [_listen_unix(rest, mode)]
    if kind == "tcp" and rest:
        host, _, port = rest.rpartition(":")
        if port.isascii() and port.isdecimal() and int(port) < 65536:
            return _listen_tcp(host.removeprefix("[").removesuffix("]"), int(port))
    raise UsageError(f"{where!r} is no address; {_SYNTAX}")


def activated(environment: Mapping[str, str]) -> list[Listener]:
    """Sockets that this process was started with (sd_listen_fds); none when it was not."""
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = environment.get("LISTEN_FDS", "")
    found = []
    for descriptor in range(_FIRST_ACTIVATED, _FIRST_ACTIVATED + (int(count) if count.isdecimal() else 0)):
        try:
            given = socket.socket(fileno=descriptor)
        except OSError as error:
            raise UsageError(f"descriptor {descriptor}, which LISTEN_FDS promises, is no socket") from error
        os.set_inheritable(descriptor, False)
        listening = given.type == socket.SOCK_STREAM and given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if not listening:
            raise UsageError(f"descriptor {descriptor}, which LISTEN_FDS promises, is no listening stream socket")
        found.append(Listener(given))
    return found


def _listen_tcp(host: str, port: int) -> list[Listener]:
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
    except OSError as error:
        raise UsageError(f"tcp:{host}:{port}: {error.strerror or error}; {_SYNTAX}") from error
    if port == 0:
        # Each would get a number of its own.
        found = found[:1]
    listeners: list[Listener] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            made = socket.socket(family, socket.SOCK_STREAM)
            try:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                made.bind(address)
                made.listen(_BACKLOG)
            except OSError as error:
                made.close()
                # A machine need not have every family that names are found for.
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and len(found) > 1:
                    continue
                raise
            listeners.append(Listener(made))
    except OSError as error:
        for listener in listeners:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise BusyError(f"tcp:{host}:{port} is in use; stop who listens there, or choose another port") from error
        raise from_os_error(error, f"listening on tcp:{host}:{port}") from error
    if not listeners:
        raise UsageError(f"tcp:{host}:{port}: this machine has no such address")
    return listeners


def _listen_unix(path: str, mode: int) -> Listener:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _only_here(os.path.dirname(path) or "."):
            _remove_stale(path)
            made.bind(path)
            # Nobody gets in before `listen`, so nobody gets in who may not.
            os.chmod(path, mode)
            made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        if "too long" in str(error):
            raise UsageError(f"the path {path} is too long for a socket; choose a shorter one") from error
        raise from_os_error(error, f"listening on unix:{path}") from error
    except BaseException:
        made.close()
        raise
    return Listener(made, path)


@contextlib.contextmanager
def _only_here(folder: str) -> Iterator[None]:
    """One process at a time looks whether a socket in a folder is stale and puts its own in the place."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(path: str) -> None:
    """Remove the socket that a server left behind that was killed."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise BusyError(f"{path} exists and is no socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            # A full queue is somebody's too.
            if error.errno not in (errno.EAGAIN, errno.EINPROGRESS, errno.EACCES):
                raise
    raise BusyError(f"somebody listens on {path} already; stop them, or choose another path")


def _inode_of(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def default_address() -> str:
    """Where a server listens that is told nothing: this machine only."""
    return f"tcp:localhost:{DEFAULT_PORT}"
