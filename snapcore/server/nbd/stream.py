"""Bytes of a handshake, within a time limit for all of it together."""

from __future__ import annotations

import socket
import time
from typing import Protocol


class EndedError(Exception):
    """A handshake that ends without an export: the client went away, broke the protocol or was too slow."""


class Stream(Protocol):
    """What a handshake reads from and writes to."""

    def receive(self, length_bytes: int) -> bytes:
        """Exactly so many bytes."""

    def send(self, data: bytes) -> None:
        """All of it."""


class Deadline:
    """The moment by which a handshake must have ended."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds that are left.

        Raises
        ------
        EndedError
            None are.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise EndedError("the handshake took too long")
        return left


class SocketStream:
    """A plain socket."""

    def __init__(self, connected: socket.socket, deadline: Deadline) -> None:
        self._socket = connected
        self._deadline = deadline

    def receive(self, length_bytes: int) -> bytes:
        """Exactly so many bytes."""
        data = bytearray()
        while len(data) < length_bytes:
            data += self.receive_some(length_bytes - len(data))
        return bytes(data)

    def receive_some(self, limit_bytes: int) -> bytes:
        """What is there, at least a byte."""
        try:
            self._socket.settimeout(self._deadline.left_s())
            part = self._socket.recv(limit_bytes)
        except TimeoutError:
            raise EndedError("the handshake took too long") from None
        except OSError as error:
            raise EndedError(f"the client went away ({error.strerror or error})") from None
        if not part:
            raise EndedError("the client went away")
        return part

    def send(self, data: bytes) -> None:
        """All of it."""
        try:
            self._socket.settimeout(self._deadline.left_s())
            self._socket.sendall(data)
        except TimeoutError:
            raise EndedError("the handshake took too long") from None
        except OSError as error:
            raise EndedError(f"the client went away ({error.strerror or error})") from None
