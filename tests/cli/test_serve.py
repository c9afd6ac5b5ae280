"""`snapcore serve` and `snapcore nbd-mount`, as processes that are told to end."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapcore import Repository
from snapcore.pool import Pool
from tests.support.command import Run
from tests.support.nbd import Peer
from tests.support.nbd_client import READ, Client
from tests.support.pools import MIB, quick_folder
from tests.support.tools import needs


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, with a short path; the pool `pool` in it has a disk."""
    found = quick_folder()
    with Pool.create(found / "pool") as made:
        disk = made.create_disk("web", MIB)
        disk.pwrite(b"before", 0)
        disk.snapshot("one")
    yield found
    shutil.rmtree(found)


@contextlib.contextmanager
def process(*words: str | Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command; it is killed when the test fails."""
    command = [sys.executable, "-P", "-m", "snapcore", *map(str, words)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    with child:
        try:
            yield child
        finally:
            if child.poll() is None:
                child.kill()


def event(child: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of JSON."""
    assert child.stdout is not None
    found: dict[str, Any] = json.loads(child.stdout.readline())
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_tells_what_happens_and_stops_in_order(folder: Path, number: signal.Signals) -> None:
    path = folder / "socket"
    with process("serve", "-p", folder / "pool", "--listen", f"unix:{path}", "--json") as child:
        assert event(child) == {"event": "listening", "uri": f"nbd+unix:///?socket={path}"}
        with Peer(path) as peer:
            peer.enter("web")
            client = f"process {os.getpid()} of user {os.geteuid()}"
            assert event(child) == {"event": "connected", "client": client, "export": "web", "writable": True}
            assert peer.write(0, b"after") == 0
            child.send_signal(number)
            assert event(child) == {"event": "stopping", "connections": 1}
            assert peer.rest() == b""
            ended = event(child)
            assert (ended["event"], ended["requests"], ended["reason"]) == ("disconnected", 1, "stopped")
        assert event(child) == {"event": "stopped"}
        assert child.wait() == 0
    assert not path.exists()
    with Pool.open(folder / "pool", read_only=True) as pool:
        assert pool._engine.checkpointer.superblock.clean
        assert pool.open_disk("web").pread(6, 0) == b"aftere"


def test_serve_speaks_to_people(folder: Path) -> None:
    with process("serve", "-p", folder / "pool", "--listen", "tcp:127.0.0.1:0") as child:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("listening on nbd://127.0.0.1:")
        child.terminate()
        assert child.communicate() == ("stopping\nstopped; everything is on disk\n", "")


def test_serve_shows_images_without_a_pool_and_what_is_allowed_of_one(folder: Path) -> None:
    (folder / "image").write_bytes(b"image" * 1000)
    path, raw = folder / "socket", f"raw={folder / 'image'}"
    with process("serve", "--image", raw, "--listen", f"unix:{path}", "--read-only", "--socket-mode", "660") as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert path.stat().st_mode & 0o777 == 0o660
        with Peer(path) as peer:
            assert peer.enter("") == 5000
            assert peer.read(0, 10) == b"imageimage"
            assert peer.write(0, b"x") == 1
        child.terminate()
        assert child.wait() == 0


def test_serve_takes_the_sockets_of_systemd(folder: Path) -> None:
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
        made.listen()
        # What systemd does: the number of the process is known only inside of it.
        code = (
            f"import os, sys; os.dup2({made.fileno()}, 3); "
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); "
            "os.execv(sys.executable, [sys.executable, '-P', '-m', 'snapcore', *sys.argv[1:]])"
        )
        words = [sys.executable, "-P", "-c", code, "serve", "-p", str(folder / "pool"), "--json"]
        child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, pass_fds=[made.fileno()])
    with child:
        assert event(child) == {"event": "listening", "uri": f"nbd+unix:///?socket={path}"}
        with Peer(path) as peer:
            assert peer.enter("web") == MIB
        child.terminate()
        assert child.wait() == 0
    assert path.is_socket()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a pool"),
        (["-p", "pool", "--listen", "nowhere"], "no address"),
        (["-p", "pool", "--image", "raw"], "= between"),
        (["-p", "pool", "--tls-key", "key"], "--tls-cert"),
        (["-p", "pool", "--tls-cert", "nothing"], "cannot be used"),
        (["-p", "pool", "--socket-mode", "999"], "octal"),
        (["-p", "pool", "--allow", "alice=web", "--listen", "unix:socket"], "TLS"),
    ],
)
def test_serve_says_what_is_wrong_with_its_words(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(folder)
    code, out, err = run("serve", *words)
    assert (code, out) == (2, "")
    assert said in err


def test_serve_fails_where_somebody_listens(run: Run, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "socket"))
        made.listen()
        code, _, err = run("serve", "-p", str(folder / "pool"), "--listen", f"unix:{folder}/socket")
    assert code == 1 and "somebody listens" in err


def test_serve_gives_signals_back(run: Run, folder: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    code, _, _ = run("serve", "-p", str(folder / "nothing"), "--listen", f"unix:{folder}/socket")
    assert code == 1
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_nbd_mount_shows_a_disk_as_a_file_until_it_is_told_to_end(folder: Path) -> None:
    needs("nbdfuse", "fusermount3", root=True)
    if not os.path.exists("/dev/fuse"):
        pytest.skip("needs /dev/fuse")
    (folder / "mounted").mkdir()
    file = folder / "mounted" / "disk"
    with process("nbd-mount", "web", folder / "mounted", "-p", folder / "pool", "--json") as child:
        assert event(child) == {"file": str(file)}
        assert file.stat().st_size == MIB
        with file.open("r+b") as opened:
            assert opened.read(6) == b"before"
            opened.seek(0)
            opened.write(b"after")
        child.terminate()
        out, err = child.communicate(timeout=60)
        assert (child.returncode, out, err) == (0, "", "")
    assert not file.exists()
    with Pool.open(folder / "pool", read_only=True) as pool:
        assert pool.open_disk("web").pread(6, 0) == b"aftere"


def test_nbd_mount_ends_when_it_is_unmounted(folder: Path) -> None:
    needs("nbdfuse", "fusermount3", root=True)
    if not os.path.exists("/dev/fuse"):
        pytest.skip("needs /dev/fuse")
    (folder / "mounted").mkdir()
    with process("nbd-mount", "web@one", folder / "mounted", "-p", folder / "pool", "--read-only") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == f"web@one is {folder}/mounted/disk now\n"
        assert (folder / "mounted" / "disk").read_bytes()[:6] == b"before"
        subprocess.run(["fusermount3", "-u", str(folder / "mounted")], check=True)
        assert child.wait() == 0


def test_nbd_mount_says_what_it_needs(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run("nbd-mount", "web", str(folder / "nothing"), "-p", str(folder / "pool"))
    assert code == 2 and "does not exist" in err
    monkeypatch.setattr(shutil, "which", lambda _: None)
    code, _, err = run("nbd-mount", "web", str(folder), "-p", str(folder / "pool"))
    assert code == 1 and "nbdfuse is not installed" in err


def test_nbd_mount_of_what_is_not_there_fails(run: Run, folder: Path) -> None:
    needs("nbdfuse")
    (folder / "mounted").mkdir()
    code, _, err = run("nbd-mount", "nothing", str(folder / "mounted"), "-p", str(folder / "pool"))
    assert code == 1 and "nothing" in err


def lazy_pool(folder: Path, *words: str) -> tuple[Path, bytes]:
    """A pool with a disk `lazy` from a repository, none of which is here."""
    data = bytes(range(256)) * 4096 * 8
    (folder / "image").write_bytes(data)
    repository = Repository.create(folder / "repo")
    taken = repository.snapshot(folder / "image", disk="d").snapshot
    command = ("disk", "create", "lazy", "--from", f"{folder}/repo:{taken.id}", "-p", folder / "pool", *words)
    with process(*command) as child:
        assert child.wait() == 0
    return folder / "pool", data


@pytest.mark.parametrize(("made", "served", "comes"), [("full", None, True), ("off", None, False), ("off", "9G", True)])
def test_serve_fetches_the_rest_as_it_was_told(folder: Path, made: str, served: str | None, comes: bool) -> None:
    pool, data = lazy_pool(folder, "--hydrate", made)
    words = ["serve", "-p", pool, "--listen", f"unix:{folder}/socket", "--json"]
    with process(*words, *([] if served is None else ["--hydrate", served])) as child:
        assert event(child)["event"] == "listening"
        deadline = time.monotonic() + 30
        image = next((pool / "lazy").glob("*.data"))
        while comes and image.stat().st_blocks * 512 < len(data):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        assert child.wait() == 0
    if not comes:
        assert image.stat().st_blocks == 0


def test_serve_tells_of_a_region_that_fails_and_comes_back(folder: Path) -> None:
    pool, data = lazy_pool(folder, "--hydrate", "off")
    (folder / "repo").rename(folder / "away")
    path = folder / "socket"
    with process("serve", "-p", pool, "--listen", f"unix:{path}", "--json") as child:
        assert event(child)["event"] == "listening"
        with Peer(path) as peer:
            peer.enter("lazy")
            assert event(child)["event"] == "connected"
            client = Client(peer.socket, structured=False, extended=False)
            assert client.wait(client.send(READ, 0, 100)).error == errno.EIO
            told = event(child)
            assert (told["event"], told["region"]) == ("region-failed", f"{folder}/repo") and told["reason"]
            (folder / "away").rename(folder / "repo")
            assert client.wait(client.send(READ, 0, 100)).data == data[:100]
            assert event(child)["event"] == "region-back"
        child.send_signal(signal.SIGTERM)
        assert child.wait() == 0
