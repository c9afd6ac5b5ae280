"""The client's side of NBD, byte by byte: what is sent, and what comes back."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from snapcore.server import NbdServer
from snapcore.server.nbd.protocol import NBD_MAGIC, OPTION_MAGIC, REPLY_MAGIC, HandshakeFlag, Option, Reply
from tests.support.tools import needs

# Of the disk that tests serve.
SIZE_BYTES = 8 << 20
EPERM = 1
Serve = Callable[..., "Served"]

GREETING = struct.pack(">QQH", NBD_MAGIC, OPTION_MAGIC, 3)
BOTH = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = (1 << bit for bit in range(5))


def flags(value: int = BOTH) -> bytes:
    """What a client says first."""
    return struct.pack(">I", value)


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """An option, whose length may be a lie."""
    return struct.pack(">QII", OPTION_MAGIC, number, len(data) if length is None else length) + data


def string(text: str | bytes) -> bytes:
    """A length and that many bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(raw)) + raw


def go(name: str | bytes, *infos: int, number: int = Option.GO) -> bytes:
    """The way into an export."""
    return option(number, string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos))


def contexts(name: str, *queries: str, number: int = Option.SET_META_CONTEXT) -> bytes:
    """Meta contexts of an export."""
    data = string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))
    return option(number, data)


@dataclass(frozen=True)
class Answer:
    """A reply to an option."""

    option: int
    reply: int
    data: bytes = b""


def answers(data: bytes) -> list[Answer]:
    """Replies, of which nothing may be left over."""
    found = []
    while data:
        magic, number, reply, length = struct.unpack_from(">QIII", data)
        assert magic == REPLY_MAGIC and len(data) >= 20 + length
        found.append(Answer(number, reply, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


class Peer:
    """A client on a socket."""

    def __init__(self, address: Path | tuple[str, int], *, timeout_s: float = 30) -> None:
        self.socket = socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET)
        self.socket.settimeout(timeout_s)
        try:
            self.socket.connect(str(address) if isinstance(address, Path) else address)
        except OSError:
            self.socket.close()
            raise

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """All of it."""
        self.socket.sendall(data)

    def receive(self, length: int) -> bytes:
        """Exactly so many bytes; EOFError when the server ends before."""
        data = bytearray()
        while len(data) < length:
            part = self.socket.recv(length - len(data))
            if not part:
                raise EOFError(f"{len(data)} of {length} bytes came")
            data += part
        return bytes(data)

    def rest(self) -> bytes:
        """All until the server ends the connection."""
        data = bytearray()
        try:
            while part := self.socket.recv(1 << 16):
                data += part
        except ConnectionResetError:
            pass
        return bytes(data)

    def answer(self) -> Answer:
        """The next reply to an option."""
        magic, number, reply, length = struct.unpack(">QIII", self.receive(20))
        assert magic == REPLY_MAGIC
        return Answer(number, reply, self.receive(length))

    def greet(self) -> None:
        """The first step, as any client does it."""
        assert self.receive(len(GREETING)) == GREETING
        self.send(flags())

    def enter(self, name: str) -> int:
        """Greet and go; returns the size of the export."""
        self.greet()
        self.send(go(name))
        first, last = self.answer(), self.answer()
        assert (first.reply, last.reply) == (Reply.INFO, Reply.ACK), (first, last)
        (size,) = struct.unpack(">Q", first.data[2:10])
        return int(size)

    def request(self, kind: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b"") -> int:
        """A request and its simple reply without data; returns the error."""
        self.send(struct.pack(">IHHQQI", 0x25609513, flags, kind, 7, offset, length) + data)
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert (magic, cookie) == (0x67446698, 7)
        return int(error)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the export, by a simple reply."""
        assert self.request(READ, offset, length) == 0
        return self.receive(length)

    def write(self, offset: int, data: bytes, *, flags: int = 0) -> int:
        """Returns the error."""
        return self.request(WRITE, offset, len(data), flags=flags, data=data)


class Served:
    """A running server on a Unix socket, and what it told."""

    def __init__(self, server: NbdServer, path: Path, events: list[Any]) -> None:
        self.server = server
        self.path = path
        self.events = events

    def uri(self, name: str = "") -> str:
        """Of an export."""
        return f"nbd+unix:///{quote(name, safe='')}?socket={self.path}"


def shown(peer: Peer) -> dict[str, str]:
    """What a list shows: names and descriptions."""
    peer.send(option(Option.LIST))
    found = {}
    while (answer := peer.answer()).reply == Reply.SERVER:
        length = int.from_bytes(answer.data[:4])
        found[answer.data[4 : 4 + length].decode()] = answer.data[4 + length :].decode()
    assert answer.reply == Reply.ACK
    return found


def eventually(true: Callable[[], bool]) -> None:
    """Waits for what another thread will do; fails when it does not."""
    ticks = threading.Event()
    for _ in range(3000):
        if true():
            return
        ticks.wait(0.01)
    raise AssertionError("it did not happen")


def refusal(peer: Peer, name: str) -> int:
    """What `go` to a name gets."""
    peer.send(go(name))
    return peer.answer().reply


def nbdsh(*words: str) -> None:
    """Python with libnbd: that of the system, to which the module belongs."""
    needs("nbdsh")
    program = shutil.which("nbdsh")
    assert program is not None
    path = os.pathsep.join((os.path.dirname(program), os.environ.get("PATH", os.defpath)))
    call = functools.partial(subprocess.run, capture_output=True, text=True, env=os.environ | {"PATH": path})
    if call([program, "-c", "pass"]).returncode != 0:
        needs("nbdsh with python3-libnbd")
    done = call([program, *words], timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
