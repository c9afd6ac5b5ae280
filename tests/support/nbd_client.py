"""A plain client of the transmission phase: it builds requests and reads answers byte by byte, as the protocol says."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field

READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD = 1, 2, 4, 8, 16, 32


@dataclass
class Answer:
    """All that came for one request.

    Attributes
    ----------
    error : int
        0 when it was done.
    data : bytes
        Of a read.
    status : dict of context to list of (length, flags)
    """

    error: int = 0
    data: bytes = b""
    status: dict[int, list[tuple[int, int]]] = field(default_factory=dict)


class Client:
    """One end of a connection."""

    def __init__(self, connected: socket.socket, *, structured: bool, extended: bool) -> None:
        self.socket = connected
        self.structured = structured or extended
        self.extended = extended
        self._cookie = 0
        self._reads: dict[int, tuple[int, int]] = {}
        self._done: dict[int, Answer] = {}

    def send(self, kind: int, offset: int, length: int, flags: int = 0, data: bytes = b"") -> int:
        """Send a request; returns its cookie."""
        self._cookie += 1
        if self.extended:
            flags |= PAYLOAD if kind == WRITE else 0
            head = struct.pack(">IHHQQQ", 0x21E41C71, flags, kind, self._cookie, offset, length)
        else:
            head = struct.pack(">IHHQQI", 0x25609513, flags, kind, self._cookie, offset, length)
        if kind == READ:
            self._reads[self._cookie] = (offset, length)
        self.socket.sendall(head + data)
        return self._cookie

    def wait(self, cookie: int) -> Answer:
        """The answer of a request; others that come before are kept."""
        partial: dict[int, Answer] = {}
        while cookie not in self._done:
            self._receive(partial)
        return self._done.pop(cookie)

    def call(self, kind: int, offset: int, length: int, flags: int = 0, data: bytes = b"") -> Answer:
        """Send and wait."""
        return self.wait(self.send(kind, offset, length, flags, data))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise ConnectionError("the server is gone")
            data += part
        return data

    def _receive(self, partial: dict[int, Answer]) -> None:
        magic = int.from_bytes(self._exactly(4), "big")
        if magic == 0x67446698:
            assert not self.extended
            error, cookie = struct.unpack(">IQ", self._exactly(12))
            is_read = cookie in self._reads
            assert not (is_read and self.structured)
            _, length = self._reads.pop(cookie, (0, 0))
            self._done[cookie] = Answer(error, self._exactly(length) if is_read and not error else b"")
            return
        if self.extended:
            assert magic == 0x6E8A278C
            flags, kind, cookie, _, length = struct.unpack(">HHQQQ", self._exactly(28))
        else:
            assert magic == 0x668E33EF
            flags, kind, cookie, length = struct.unpack(">HHQI", self._exactly(16))
        body = self._exactly(length)
        answer = partial.setdefault(cookie, Answer())
        if kind & 0x8000:
            error, text_length = struct.unpack_from(">IH", body)
            assert len(body) == 6 + text_length
            assert error
            answer.error = error
        elif kind == 1:
            self._place(answer, cookie, body)
        elif kind == 5:
            numbers = struct.unpack(f">{len(body) // 4}I", body)
            answer.status[numbers[0]] = [*zip(numbers[1::2], numbers[2::2], strict=True)]
        elif kind == 6:
            context, count = struct.unpack_from(">II", body)
            numbers = struct.unpack(f">{2 * count}Q", body[8:])
            answer.status[context] = [*zip(numbers[::2], numbers[1::2], strict=True)]
        else:
            assert (kind, body) == (0, b"")
        if flags & 1:
            _, length = self._reads.pop(cookie, (0, 0))
            assert answer.error or len(answer.data) == length
            self._done[cookie] = partial.pop(cookie)

    def _place(self, answer: Answer, cookie: int, body: bytes) -> None:
        """A part of a read: each byte comes once, and the parts of this server in order."""
        offset, length = self._reads[cookie]
        assert int.from_bytes(body[:8], "big") == offset + len(answer.data)
        assert 8 < len(body) <= 8 + length - len(answer.data)
        answer.data += body[8:]
