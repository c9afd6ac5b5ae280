"""TLS: who gets in, as whom, and that bytes come through whole."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapcore.errors import BusyError, UsageError
from snapcore.pool import Disk, Pool
from snapcore.server.nbd import Rule, Tls
from snapcore.server.nbd.protocol import Option, Reply
from snapcore.server.nbd.tls import read_keys
from tests.support.nbd import (
    EPERM,
    SIZE_BYTES,
    Peer,
    Serve,
    Served,
    eventually,
    flags,
    go,
    nbdsh,
    option,
    refusal,
    shown,
)
from tests.support.pools import MIB
from tests.support.tools import needs

CLIENTS = ("alice", "bob", "carol")


def openssl(*words: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def make_authority(folder: Path, name: str) -> None:
    key, made = folder / f"{name}-key.pem", folder / f"{name}.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    use = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    openssl("req", "-x509", *curve, "-keyout", key, "-out", made, "-days", "30", "-subj", f"/CN={name}", *use)


def make_certificate(folder: Path, name: str, authority: str) -> None:
    """Of a server or client, as the folder of libnbd's certificates has it."""
    own = folder / name
    own.mkdir()
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", *curve, "-keyout", own / "client-key.pem", "-out", own / "request", "-subj", f"/CN={name}")
    (own / "extensions").write_text(f"subjectAltName=DNS:{name}\nauthorityKeyIdentifier=keyid\n")
    signer = ["-CA", folder / f"{authority}.pem", "-CAkey", folder / f"{authority}-key.pem", "-CAcreateserial"]
    openssl(
        *("x509", "-req", "-in", own / "request", "-out", own / "client-cert.pem", "-days", "30"),
        *("-extfile", own / "extensions", *signer),
    )
    (own / "ca-cert.pem").write_bytes((folder / "authority.pem").read_bytes())


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("openssl")
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("authority", "elsewhere"):
        make_authority(folder, name)
    for name in ("localhost", *CLIENTS):
        make_certificate(folder, name, "authority")
    make_certificate(folder, "stranger", "elsewhere")
    return folder


@pytest.fixture
def tls(certificates: Path) -> Tls:
    """Clients need certificates."""
    own = certificates / "localhost"
    return Tls(str(own / "client-cert.pem"), str(own / "client-key.pem"), str(certificates / "authority.pem"))


class SecurePeer(Peer):
    """A client that has begun TLS with a certificate, or none."""

    def __init__(self, served: Served, certificates: Path, name: str | None) -> None:
        super().__init__(served.path)
        try:
            self.greet()
            self.send(option(Option.STARTTLS))
            assert self.answer().reply == Reply.ACK
            context = ssl.create_default_context(cafile=str(certificates / "authority.pem"))
            if name is not None:
                own = certificates / name
                context.load_cert_chain(own / "client-cert.pem", own / "client-key.pem")
            self.socket = context.wrap_socket(self.socket, server_hostname="localhost")
        except BaseException:
            self.socket.close()
            raise

    def go(self, name: str) -> int:
        """Enter an export; returns its transmission flags."""
        self.send(go(name))
        first, last = self.answer(), self.answer()
        assert (first.reply, last.reply) == (Reply.INFO, Reply.ACK), (first, last)
        return int.from_bytes(first.data[10:12])


def is_refused(served: Served, certificates: Path, name: str | None) -> bool:
    """Whether a client is told nothing at all. With TLS 1.3 it learns that after its own side is done."""
    try:
        with SecurePeer(served, certificates, name) as peer:
            peer.send(option(Option.LIST))
            peer.answer()
    except (OSError, EOFError):
        return True
    return False


def test_bytes_come_through_whole_both_ways(serve: Serve, certificates: Path, tls: Tls, disk: Disk) -> None:
    with SecurePeer(serve(tls=tls), certificates, "alice") as peer:
        peer.go("web")
        assert peer.read(0, SIZE_BYTES) == disk.pread(SIZE_BYTES, 0)
        data = random.Random(6).randbytes(5 * MIB + 1)
        assert peer.write(1, data) == 0
        assert disk.pread(len(data), 1) == data
        for length in (1, 511, 16384, 16385, 300_001):
            assert peer.read(1, length) == data[:length]


def secure_uri(served: Served, certificates: Path, name: str) -> str:
    """Of a server on TCP, for libnbd."""
    port = served.server.uris[0].rstrip("/").rpartition(":")[2]
    return f"nbds://localhost:{port}/{name}?tls-certificates={certificates / 'alice'}"


FULL_DUPLEX = """
data = bytearray(1 << 17)
cookies = []
for i in range(200):
    cookies.append(h.aio_pread(nbd.Buffer(1 << 17), 0))
    cookies.append(h.aio_pwrite(nbd.Buffer.from_bytearray(data), 4 << 20))
while cookies:
    h.poll(-1)
    cookies = [cookie for cookie in cookies if not h.aio_command_completed(cookie)]
"""


def test_both_directions_are_carried_at_once(serve: Serve, certificates: Path, tls: Tls, disk: Disk) -> None:
    """More is asked and written than fits on the way: a server that did one after the other would be stuck."""
    uri = secure_uri(serve(tls=tls, listen=["tcp:localhost:0"]), certificates, "web")
    nbdsh("-c", f"import nbd\nh.set_uri_allow_local_file(True)\nh.connect_uri({uri!r})\n{FULL_DUPLEX}")


def test_nothing_is_told_without_tls(serve: Serve, tls: Tls, disk: Disk) -> None:
    with Peer(serve(tls=tls).path) as peer:
        peer.greet()
        peer.send(option(Option.LIST))
        assert peer.answer().reply == Reply.ERR_TLS_REQD
        assert refusal(peer, "web") == Reply.ERR_TLS_REQD


def test_where_tls_is_a_choice_both_get_in(serve: Serve, certificates: Path, tls: Tls, disk: Disk) -> None:
    served = serve(tls=Tls(tls.certificate, tls.key, required=False))
    with Peer(served.path) as peer, SecurePeer(served, certificates, None) as secure:
        assert peer.enter("web") == SIZE_BYTES
        secure.go("web")


@pytest.mark.parametrize("name", ["stranger", None])
def test_who_has_no_certificate_of_the_authority_is_told_nothing(
    serve: Serve, certificates: Path, tls: Tls, disk: Disk, name: str | None
) -> None:
    served = serve(tls=tls)
    assert is_refused(served, certificates, name)
    assert not is_refused(served, certificates, "alice")
    assert "TLS failed" in next(event.reason for event in served.events if event.kind == "refused")


def test_each_client_sees_and_writes_what_rules_say(
    serve: Serve, certificates: Path, tls: Tls, pool: Pool, disk: Disk
) -> None:
    pool.create_disk("other", MIB)
    rules = [Rule("alice"), Rule("bob", ("web*",), read_only=True), Rule("bob", ("other",))]
    served = serve(tls=tls, rules=rules)
    snapshot = f"@{pool.snapshot('one').id}"
    with SecurePeer(served, certificates, "alice") as alice, SecurePeer(served, certificates, "bob") as bob:
        assert set(shown(alice)) == set(shown(bob)) == {"web", "other", snapshot}
        alice.go("web")
        assert alice.write(0, b"x") == 0
        bob.go("web")
        assert bob.write(0, b"y") == EPERM
        assert bob.read(0, 1) == b"x"
    with SecurePeer(served, certificates, "bob") as bob:
        bob.go("other")
        assert bob.write(0, b"y") == 0
    with SecurePeer(served, certificates, "carol") as carol:
        assert shown(carol) == {}
        assert refusal(carol, "web") == refusal(carol, "nothing") == Reply.ERR_UNKNOWN


def test_a_disk_is_in_use_until_its_secure_client_goes(serve: Serve, certificates: Path, tls: Tls, disk: Disk) -> None:
    served = serve(tls=tls)
    with SecurePeer(served, certificates, "alice") as peer:
        peer.go("web")
        peer.write(0, b"x")
        with pytest.raises(BusyError):
            disk.rollback("one")
        # Gone in the middle of a record.
        peer.socket.send(b"x" * 100)
    eventually(lambda: served.server.connections == 0)
    disk.rollback("one")


def test_stop_ends_secure_connections(serve: Serve, certificates: Path, tls: Tls, disk: Disk) -> None:
    served = serve(tls=tls)
    with SecurePeer(served, certificates, "alice") as inside, SecurePeer(served, certificates, "alice") as outside:
        inside.go("web")
        assert inside.write(0, b"kept") == 0
        served.server.stop()
        for peer in (inside, outside):
            with contextlib.suppress(ssl.SSLError):
                assert peer.rest() == b""
    assert served.server.connections == 0
    assert disk.pread(4, 0) == b"kept"


@pytest.fixture
def begun(serve: Serve, tls: Tls, disk: Disk) -> Iterator[tuple[Peer, Served]]:
    """A client that was told to begin TLS."""
    served = serve(tls=tls, handshake_timeout_s=0.3)
    with Peer(served.path) as peer:
        peer.greet()
        peer.send(option(Option.STARTTLS))
        assert peer.answer().reply == Reply.ACK
        yield peer, served


def test_a_client_that_says_something_else_than_tls_is_cut_off(begun: tuple[Peer, Served]) -> None:
    peer, served = begun
    peer.send(option(Option.LIST) + go("web"))
    # An alert of TLS at most; no reply to an option.
    assert len(peer.rest()) < 20
    eventually(lambda: served.server.connections == 0)


def test_a_client_that_says_nothing_is_cut_off(begun: tuple[Peer, Served]) -> None:
    peer, served = begun
    assert peer.rest() == b""
    assert "too long" in served.events[-1].reason


def test_what_was_sent_in_the_open_together_with_starttls_is_no_option(serve: Serve, tls: Tls, disk: Disk) -> None:
    """Somebody in the middle could have put it there."""
    with Peer(serve(tls=tls).path) as peer:
        peer.receive(18)
        peer.send(flags() + option(Option.STARTTLS) + option(Option.LIST))
        assert peer.answer().reply == Reply.ACK
        assert len(peer.rest()) < 20


def test_libnbd_copies_both_ways_under_tls(
    serve: Serve, certificates: Path, tls: Tls, folder: Path, disk: Disk
) -> None:
    needs("nbdcopy", "nbdinfo")
    served = serve(tls=tls, listen=["tcp:localhost:0"])
    place = secure_uri(served, certificates, "web")
    for words in (
        ["nbdinfo", place],
        ["nbdcopy", place, str(folder / "out")],
        ["nbdcopy", str(folder / "out"), place],
    ):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (folder / "out").read_bytes() == disk.pread(SIZE_BYTES, 0)
    refused = subprocess.run(
        ["nbdinfo", served.server.uris[0].replace("nbds:", "nbd:") + "web"], capture_output=True, check=False
    )
    assert refused.returncode != 0


def test_qemu_reads_under_tls(serve: Serve, certificates: Path, tls: Tls, folder: Path, disk: Disk) -> None:
    needs("qemu-img")
    served = serve(tls=tls, listen=["tcp:localhost:0"])
    port = served.server.uris[0].rstrip("/").rpartition(":")[2]
    secret = f"tls-creds-x509,id=tls,endpoint=client,dir={certificates / 'alice'}"
    source = f"driver=nbd,host=localhost,port={port},export=web,tls-creds=tls"
    words = ["qemu-img", "convert", "--object", secret, "--image-opts", source, "-O", "raw", str(folder / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "out").read_bytes() == disk.pread(SIZE_BYTES, 0)


# What is asked for wrongly


def test_files_that_cannot_be_used_are_refused(serve: Serve, certificates: Path, folder: Path) -> None:
    own, other = certificates / "localhost", certificates / "alice"
    (folder / "junk").write_text("no certificate")
    for wrong in (
        Tls(),
        Tls(str(folder / "nothing")),
        Tls(str(folder / "junk")),
        Tls(str(own / "client-cert.pem"), str(other / "client-key.pem")),
        Tls(str(own / "client-cert.pem"), str(own / "client-key.pem"), str(folder / "junk")),
        Tls(str(own / "client-cert.pem"), psk_file=str(folder / "junk")),
    ):
        with pytest.raises(UsageError):
            serve(tls=wrong)


def test_rules_without_tls_are_refused(serve: Serve) -> None:
    with pytest.raises(UsageError, match="TLS"):
        serve(rules=[Rule("alice")])


def test_shared_keys_are_read_from_lines(folder: Path) -> None:
    path = folder / "keys"
    path.write_text(f"# comment\n\nalice:{'ab' * 32}\na:b:{'cd' * 16}\n")
    assert read_keys(str(path)) == {"alice": b"\xab" * 32, "a:b": b"\xcd" * 16}
    for wrong in ("alice", "alice:xyz", "alice:abcd", f":{'ab' * 32}"):
        path.write_text(wrong)
        with pytest.raises(UsageError, match="line 1"):
            read_keys(str(path))
    with pytest.raises(UsageError):
        read_keys(str(folder / "nothing"))


def test_shared_keys_let_in_who_has_one(serve: Serve, folder: Path, disk: Disk, pool: Pool) -> None:
    (folder / "keys").write_text(f"alice:{'ab' * 32}\nbob:{'cd' * 32}\n")
    tls = Tls(psk_file=str(folder / "keys"))
    if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
        with pytest.raises(UsageError, match="Python"):
            serve(tls=tls)
        return
    needs("nbdinfo", "nbdcopy")
    served = serve(tls=tls, rules=[Rule("alice")])

    def uri(name: str, key: str) -> str:
        own = folder / f"own-{name}"
        own.write_text(f"{name}:{key}\n")
        return f"nbds+unix://{name}@/web?socket={served.path}&tls-psk-file={own}"

    def succeeds(*words: str) -> bool:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0

    alice = uri("alice", "ab" * 32)
    assert succeeds("nbdcopy", alice, str(folder / "out"))
    assert (folder / "out").read_bytes() == disk.pread(SIZE_BYTES, 0)
    (folder / "in").write_bytes(random.Random(3).randbytes(SIZE_BYTES))
    assert succeeds("nbdcopy", str(folder / "in"), alice)
    assert disk.pread(SIZE_BYTES, 0) == (folder / "in").read_bytes()
    assert not succeeds("nbdinfo", "--size", uri("alice", "ac" * 32))
    assert not succeeds("nbdinfo", "--size", uri("bob", "cd" * 32))
    assert not succeeds("nbdinfo", "--size", uri("nobody", "ab" * 32))


def test_qemu_comes_in_with_a_shared_key(serve: Serve, folder: Path, disk: Disk) -> None:
    if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
        pytest.skip("needs Python 3.13")
    needs("qemu-img")
    (folder / "keys").write_text(f"qemu:{'ab' * 32}\n")
    served = serve(tls=Tls(psk_file=str(folder / "keys")), listen=["tcp:localhost:0"])
    port = served.server.uris[0].rstrip("/").rpartition(":")[2]
    source = f"driver=nbd,host=localhost,port={port},export=web,tls-creds=tls"

    def convert(key: str) -> subprocess.CompletedProcess[str]:
        (folder / "own").mkdir(exist_ok=True)
        (folder / "own" / "keys.psk").write_text(f"qemu:{key}\n")
        secret = f"tls-creds-psk,id=tls,endpoint=client,username=qemu,dir={folder / 'own'}"
        words = ["qemu-img", "convert", "--object", secret, "--image-opts", source, "-O", "raw", str(folder / "out")]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    assert convert("ac" * 32).returncode != 0
    done = convert("ab" * 32)
    assert done.returncode == 0, done.stderr
    assert (folder / "out").read_bytes() == disk.pread(SIZE_BYTES, 0)


def test_a_socket_pair_is_not_left_open(serve: Serve, certificates: Path, tls: Tls, disk: Disk) -> None:
    def open_sockets() -> int:
        return sum(1 for thread in threading.enumerate() if thread.name.startswith("snapcore-tls"))

    served = serve(tls=tls)
    for _ in range(3):
        with SecurePeer(served, certificates, "alice") as peer:
            peer.go("web")
            peer.socket.shutdown(socket.SHUT_RDWR)
    eventually(lambda: served.server.connections == 0 and open_sockets() == 0)
