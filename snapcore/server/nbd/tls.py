"""TLS of a server: certificates or shared keys, and the threads that carry the bytes of a connection.

The transmission phase sees plain bytes on a socket pair. OpenSSL is used on memory and under a lock: its state is for
one thread at a time, and while a thread waits for a socket it holds nothing that the other one needs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from dataclasses import dataclass
from typing import Any

from snapcore.errors import UsageError
from snapcore.server.nbd.stream import EndedError, SocketStream

_PIECE_BYTES = 256 << 10
_PSK_CIPHERS = "ECDHE-PSK:DHE-PSK:PSK"


@dataclass(frozen=True)
class Tls:
    """How a server proves who it is, and clients who they are.

    Attributes
    ----------
    certificate, key : str, optional
        PEM files; the certificate with those between it and the authority.
    authority : str, optional
        PEM file: clients must have a certificate that one of these has signed.
    psk_file : str, optional
        Lines IDENTITY:HEX; takes the place of certificates. From Python 3.13 on.
    required : bool
        Nothing is told to clients that do not begin TLS.
    """

    certificate: str | None = None
    key: str | None = None
    authority: str | None = None
    psk_file: str | None = None
    required: bool = True


class TlsServer:
    """TLS that is ready for connections.

    Raises
    ------
    UsageError
        A file cannot be read or used.
    """

    def __init__(self, config: Tls) -> None:
        self.required = config.required
        self._identities = threading.local()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        if config.psk_file is not None:
            if config.certificate or config.key or config.authority:
                raise UsageError("TLS goes either with certificates or with a PSK file")
            self._use_keys(config.psk_file)
        elif config.certificate is not None:
            self._use_certificates(config.certificate, config.key, config.authority)
        else:
            raise UsageError("TLS needs a certificate or a PSK file")

    def _use_certificates(self, certificate: str, key: str | None, authority: str | None) -> None:
        try:
            self._context.load_cert_chain(certificate, key)
            if authority is not None:
                self._context.load_verify_locations(authority)
                self._context.verify_mode = ssl.CERT_REQUIRED
        except OSError as error:
            files = ", ".join(name for name in (certificate, key, authority) if name is not None)
            raise UsageError(f"the certificates of {files} cannot be used: {error.strerror or error}") from error

    def _use_keys(self, path: str) -> None:
        if not hasattr(self._context, "set_psk_server_callback"):
            raise UsageError("TLS with shared keys needs Python 3.13 or newer; use certificates")
        keys = read_keys(path)

        def key_of(identity: str | None) -> bytes:
            # An unknown name gets a key that nobody knows, and so the answer that a wrong key gets.
            self._identities.name = identity
            return keys.get(identity or "", os.urandom(32))

        # The callback of TLS 1.2; Python has none for what 1.3 calls by the same name.
        self._context.maximum_version = ssl.TLSVersion.TLSv1_2
        self._context.set_ciphers(_PSK_CIPHERS)
        context: Any = self._context
        context.set_psk_server_callback(key_of, "snapcore")

    def begin(self, connected: socket.socket, stream: SocketStream) -> TlsStream:
        """Do the handshake of TLS on a plain connection.

        Raises
        ------
        EndedError
            It failed: there is no way back to plain bytes.
        """
        self._identities.name = None
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        secured = self._context.wrap_bio(incoming, outgoing, server_side=True)
        while True:
            try:
                secured.do_handshake()
            except ssl.SSLWantReadError:
                stream.send(outgoing.read())
                incoming.write(stream.receive_some(_PIECE_BYTES))
            except ssl.SSLError as error:
                with contextlib.suppress(EndedError):
                    stream.send(outgoing.read())  # it says why
                raise EndedError(f"TLS failed: {error.reason or error}") from None
            else:
                break
        stream.send(outgoing.read())
        identity = self._identities.name
        names = (identity,) if identity is not None else _names_of(secured.getpeercert())
        return TlsStream(connected, stream, secured, incoming, outgoing, names)


class TlsStream:
    """A connection under TLS.

    Attributes
    ----------
    names : tuple of str
        That the client has proven to have.
    """

    def __init__(
        self,
        connected: socket.socket,
        stream: SocketStream,
        secured: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        names: tuple[str, ...],
    ) -> None:
        self.names = names
        self._socket = connected
        self._stream = stream
        self._secured = secured
        self._incoming = incoming
        self._outgoing = outgoing
        self._state = threading.Lock()
        self._sending = threading.Lock()

    # The handshake of NBD, in one thread

    def receive(self, length_bytes: int) -> bytes:
        """Exactly so many bytes."""
        data = bytearray()
        while len(data) < length_bytes:
            try:
                part = self._secured.read(length_bytes - len(data))
            except ssl.SSLWantReadError:
                if self._outgoing.pending:
                    self._stream.send(self._outgoing.read())
                self._incoming.write(self._stream.receive_some(_PIECE_BYTES))
                continue
            except ssl.SSLError as error:
                raise EndedError(f"TLS failed: {error.reason or error}") from None
            if not part:
                raise EndedError("the client went away")
            data += part
        return bytes(data)

    def send(self, data: bytes) -> None:
        """All of it."""
        for start in range(0, len(data), _PIECE_BYTES):
            try:
                self._secured.write(data[start : start + _PIECE_BYTES])
            except ssl.SSLError as error:
                raise EndedError(f"TLS failed: {error.reason or error}") from None
            self._stream.send(self._outgoing.read())

    # Transmission, in two threads

    def carry(self, inner: socket.socket) -> Carrier:
        """Carry bytes between the client and a plain socket until either ends."""
        self._socket.settimeout(None)
        return Carrier(self, inner)

    def carry_in(self, inner: socket.socket) -> None:
        """From the client, until it ends."""
        try:
            while True:
                with self._state:
                    plain, ended = self._decrypted()
                    answers = bool(self._outgoing.pending)
                if answers:
                    self._send_pending(b"")
                if plain:
                    inner.sendall(plain)
                if ended:
                    break
                if not plain:
                    data = self._socket.recv(_PIECE_BYTES)
                    with self._state:
                        if data:
                            self._incoming.write(data)
                        else:
                            self._incoming.write_eof()
        except OSError:
            pass
        with contextlib.suppress(OSError):
            inner.shutdown(socket.SHUT_WR)

    def carry_out(self, inner: socket.socket) -> None:
        """To the client, until there is no more; then say that this is the end."""
        try:
            while data := inner.recv(_PIECE_BYTES):
                self._send_pending(data)
            with self._sending:
                with self._state:
                    with contextlib.suppress(ssl.SSLError):
                        self._secured.unwrap()
                    data = self._outgoing.read()
                self._socket.sendall(data)
        except OSError:
            pass
        # Either end is the end of both: the client hears no more, and what it still sends is not read.
        for end in (self._socket, inner):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _decrypted(self) -> tuple[bytes, bool]:
        """What there is, and whether no more can come."""
        data = bytearray()
        while len(data) < _PIECE_BYTES:
            try:
                part = self._secured.read(_PIECE_BYTES - len(data))
            except ssl.SSLWantReadError:
                break
            except ssl.SSLError:
                return bytes(data), True
            if not part:
                return bytes(data), True
            data += part
        return bytes(data), False

    def _send_pending(self, data: bytes) -> None:
        # Records leave in the order in which they were made: whoever makes some sends them before others are made.
        with self._sending:
            with self._state:
                if data:
                    self._secured.write(data)
                records = self._outgoing.read()
            self._socket.sendall(records)


class Carrier:
    """The pair of threads of a connection."""

    def __init__(self, stream: TlsStream, inner: socket.socket) -> None:
        self._inner = inner
        self._threads = [
            threading.Thread(target=work, args=(inner,), name=name, daemon=True)
            for work, name in ((stream.carry_in, "snapcore-tls-in"), (stream.carry_out, "snapcore-tls-out"))
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """The other end of the plain socket was closed: wait until all is with the client."""
        for thread in reversed(self._threads):
            thread.join()
        self._inner.close()


def read_keys(path: str) -> dict[str, bytes]:
    """Identities and their keys: lines IDENTITY:HEX, as GnuTLS's psktool writes them."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the PSK file {path} cannot be read: {error}") from error
    keys = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        identity, _, key = line.rpartition(":")
        try:
            keys[identity] = bytes.fromhex(key)
        except ValueError:
            identity = ""
        if not identity or len(keys[identity]) < 16:
            raise UsageError(f"line {number} of {path} is not IDENTITY:HEX with a key of 16 bytes at least")
    return keys


def _names_of(certificate: Any) -> tuple[str, ...]:
    """Common name and DNS names."""
    if not certificate:
        return ()
    found = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    found += [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    return tuple(dict.fromkeys(found))
