"""A file below that fails or stalls: an error for what asked for that place, and for nobody else."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapcore.pool import Pool
from tests.support.nbd import READ, TRIM, WRITE, Peer, Serve, eventually
from tests.support.pools import MIB
from tests.support.tools import needs

IMAGE_BYTES = 4 * MIB
# Reads and writes from here on wait while the gate is there, and fail while the fuse is blown.
STALLS_AT = 2 * MIB
SCRIPT = """
stall() {{
    if [ "$1" -ge {at} ]; then
        while [ -e {folder}/gate ]; do sleep 0.02; done
        if [ -e {folder}/blown ]; then
            [ "$2" != write ] || cat > {folder}/lost
            echo EIO blown >&2
            exit 1
        fi
    fi
}}
case "$1" in
thread_model) echo parallel ;;
get_size) echo {size} ;;
can_write | can_flush | can_multi_conn) exit 0 ;;
can_trim | can_zero | can_extents) exit 3 ;;
flush) exit 0 ;;
pread) stall "$4" read; dd if={folder}/content iflag=skip_bytes,count_bytes skip="$4" count="$3" status=none ;;
pwrite) stall "$4" write; dd of={folder}/content oflag=seek_bytes seek="$4" conv=notrunc status=none ;;
*) exit 2 ;;
esac
"""


@contextmanager
def fuse_file(folder: Path, server: list[str]) -> Iterator[Path]:
    """A raw file behind which an NBD server stands."""
    mount = folder / "fuse"
    mount.mkdir()
    file = mount / "image"
    socket = folder / "below"
    below = subprocess.Popen(["nbdkit", "-f", "-U", str(socket), *server])
    fuse = None
    try:
        eventually(socket.exists)
        fuse = subprocess.Popen(["nbdfuse", "-C", "4", str(file), f"nbd+unix:///?socket={socket}"])
        eventually(file.exists)
        yield file
    finally:
        for name in ("gate", "blown"):
            (folder / name).unlink(missing_ok=True)
        if fuse is not None:
            # A server has the file open still: it does not end by itself.
            subprocess.run(["fusermount3", "-u", "-z", str(mount)], check=False)
            fuse.kill()
            fuse.wait(60)
        below.terminate()
        below.wait(60)


@pytest.fixture
def below(folder: Path) -> Iterator[Path]:
    """The second half of the file stalls and fails on request."""
    needs("nbdkit", "nbdfuse", "fusermount3", root=True)
    if not os.path.exists("/dev/fuse"):
        pytest.skip("needs /dev/fuse")
    (folder / "content").write_bytes(b"c" * IMAGE_BYTES)
    script = folder / "script"
    script.write_text("#!/bin/sh\n" + SCRIPT.format(at=STALLS_AT, folder=folder, size=IMAGE_BYTES))
    script.chmod(0o755)
    with fuse_file(folder, ["sh", str(script)]) as file:
        yield file


def test_what_fails_below_is_an_error_for_that_request(below: Path, serve: Serve, folder: Path) -> None:
    with Peer(serve(pool=None, images={"raw": below}).path) as peer:
        peer.enter("raw")
        (folder / "blown").touch()
        assert peer.request(READ, STALLS_AT, 4096) == errno.EIO
        assert peer.write(STALLS_AT, b"x" * 4096) == errno.EIO
        assert peer.read(0, 4096) == b"c" * 4096
        (folder / "blown").unlink()
        assert peer.read(STALLS_AT, 4096) == b"c" * 4096


def test_nbdkits_error_filter_is_an_error_for_half_of_the_requests_and_never_wrong_data(
    serve: Serve, folder: Path
) -> None:
    needs("nbdkit", "nbdfuse", "fusermount3", root=True)
    (folder / "content").write_bytes(b"c" * IMAGE_BYTES)
    failing = ["--filter=error", "file", str(folder / "content"), "error-pread=EIO", "error-pread-rate=50%"]
    with fuse_file(folder, failing) as file:
        server = serve(pool=None, images={"raw": file})
        with Peer(server.path) as peer:
            peer.enter("raw")
            outcomes = set()
            for number in range(100):
                code = peer.request(READ, number * 8192, 512)
                if code == 0:
                    assert peer.receive(512) == b"c" * 512
                outcomes.add(code)
        assert outcomes == {0, errno.EIO}
        server.server.stop()


def test_nbdkits_delay_filter_holds_up_only_what_asks_there(serve: Serve, folder: Path) -> None:
    needs("nbdkit", "nbdfuse", "fusermount3", root=True)
    (folder / "content").write_bytes(b"c" * IMAGE_BYTES)
    slow = ["--filter=delay", "file", str(folder / "content"), "delay-read=1500ms"]
    with fuse_file(folder, slow) as file:
        (folder / "quick").write_bytes(b"q" * 4096)
        server = serve(pool=None, images={"raw": file, "quick": folder / "quick"}, request_timeout_s=0.2)
        with Peer(server.path) as peer, Peer(server.path) as other:
            peer.enter("raw")
            other.enter("quick")
            assert peer.request(READ, 0, 4096) == errno.EIO
            assert other.read(0, 4) == b"qqqq"
        server.server.stop()


def test_what_stalls_below_gets_an_error_in_time_and_holds_up_nobody(below: Path, serve: Serve, folder: Path) -> None:
    server = serve(pool=None, images={"raw": below}, request_timeout_s=0.4)
    (folder / "gate").touch()
    with Peer(server.path) as peer:
        peer.enter("raw")
        stalled = time.monotonic()
        assert peer.request(READ, STALLS_AT, 4096) == errno.EIO
        assert time.monotonic() - stalled >= 0.4
        # The same connection goes on, though a worker still waits.
        assert peer.read(0, 4096) == b"c" * 4096
        (folder / "gate").unlink()
        eventually(lambda: peer.write(4096, b"w" * 4096) == 0)
        assert peer.read(4096, 4096) == b"w" * 4096
        eventually(lambda: peer.request(READ, STALLS_AT, 1) == 0 and peer.receive(1) == b"c")


def test_what_a_write_that_was_given_up_may_change_is_refused_until_it_has_ended(
    below: Path, serve: Serve, folder: Path
) -> None:
    server = serve(pool=None, images={"raw": below}, request_timeout_s=0.2)
    (folder / "gate").touch()
    with Peer(server.path) as peer, Peer(server.path) as other:
        peer.enter("raw")
        other.enter("raw")
        assert peer.write(STALLS_AT, b"late" * 1024) == errno.EIO
        # Else the late one would come over what is acknowledged here.
        assert other.write(STALLS_AT + 100, b"new" * 1024) == errno.EIO
        assert peer.request(TRIM, STALLS_AT, 4096) == errno.EIO
        assert peer.request(READ, STALLS_AT, 4096) == errno.EIO
        # (Another write to that file would wait for the late one in the kernel, which has one lock for a file.)
        assert other.read(0, 9) == b"ccccccccc"
        (folder / "gate").unlink()
        eventually(lambda: other.write(STALLS_AT, b"new!" * 1024) == 0)
        assert peer.read(STALLS_AT, 4096) == b"new!" * 1024


def test_a_client_of_a_stalled_file_hears_the_end_of_its_session(below: Path, serve: Serve, folder: Path) -> None:
    server = serve(pool=None, images={"raw": below}, request_timeout_s=0.2)
    (folder / "gate").touch()
    with Peer(server.path) as peer:
        peer.enter("raw")
        assert peer.request(WRITE, STALLS_AT, 4096, data=b"x" * 4096) == errno.EIO
        peer.send(bytes.fromhex("25609513") + (2).to_bytes(4) + bytes(20))
        assert peer.rest() == b""
        assert server.server.connections == 1
        (folder / "gate").unlink()
        eventually(lambda: server.server.connections == 0)


def test_a_disk_over_a_stalled_image_answers_for_what_it_has_itself(
    below: Path, serve: Serve, folder: Path, pool: Pool
) -> None:
    disk = pool.create_disk("over", source=below)
    disk.pwrite(b"own" * 4096, STALLS_AT)
    server = serve(request_timeout_s=0.4)
    with Peer(server.path) as peer:
        peer.enter("over")
        (folder / "gate").touch()
        assert peer.request(READ, STALLS_AT + 8 * 4096, 4096) == errno.EIO
        assert peer.write(STALLS_AT + 16 * 4096, b"part of a block") == errno.EIO
        assert peer.write(STALLS_AT + 32 * 4096, b"b" * 4096) == 0
        assert peer.read(STALLS_AT, 3) == b"own"
        (folder / "gate").unlink()
        eventually(lambda: peer.write(STALLS_AT + 16 * 4096, b"again") == 0)
        # Over what was given up, and came late.
        assert peer.read(STALLS_AT + 16 * 4096, 16) == b"againof a blockc"
