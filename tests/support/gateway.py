"""An HTTP server that answers as S3 gateways do that something is wrong with. In memory, in this process."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Gateway(BaseHTTPRequestHandler):
    """Keeps what is put, without a look at If-None-Match. Subclasses answer otherwise."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    requests: list[tuple[str, str, dict[str, str]]]

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send an answer."""
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("length", str(len(body))))
        self.send_header("Last-Modified", "Tue, 24 Nov 2026 00:00:00 GMT")
        self.send_header("ETag", '"e"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        """Send an error as S3 does."""
        self.answer(status, f"<Error><Code>{code}</Code><Message>the message</Message></Error>".encode())

    def respond(self, method: str, path: str, body: bytes) -> None:
        """Do what is asked for."""
        if method == "PUT":
            self.objects[path] = body
            self.answer(200)
        elif method == "DELETE":
            self.objects.pop(path, None)
            self.answer(204)
        elif path in self.objects:
            self.answer(200, self.objects[path])
        else:
            self.refuse(404, "NoSuchKey")

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.urlsplit(self.path).path
        self.requests.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        self.respond(self.command, path, body)

    do_GET = do_PUT = do_DELETE = do_HEAD = do_POST = _handle  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


class Quiet(ThreadingHTTPServer):
    """Says nothing about clients that go away."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing."""


@contextmanager
def serving(kind: type[Gateway], certificate: Path | None = None) -> Iterator[tuple[str, type[Gateway]]]:
    """A server of this kind: its address, and the class that holds what it has and was asked."""

    class Own(kind):  # type: ignore[misc, valid-type]
        objects: dict[str, bytes] = {}  # noqa: RUF012
        requests: list[tuple[str, str, dict[str, str]]] = []  # noqa: RUF012

    server = Quiet(("127.0.0.1", 0), Own)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        # The handshake is done by the thread of the connection, and may fail there.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"{'http' if certificate is None else 'https'}://127.0.0.1:{server.server_port}", Own
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def self_signed(folder: Path) -> Path:
    """A certificate for 127.0.0.1 and its key, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "snapcore test")])
    today = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return path
