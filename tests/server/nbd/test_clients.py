"""Real clients: libnbd's tools, QEMU's, fio, and a file system over a loop device."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from snapcore.pool import Disk, Pool
from snapcore.server import NbdServer
from tests.support import fio
from tests.support.loop import loop_device, mounted
from tests.support.nbd import SIZE_BYTES, Serve, Served, eventually, nbdsh
from tests.support.pools import MIB, check_space
from tests.support.tools import needs

# QEMU opens an export without its image format being guessed.
RAW = ["-f", "raw"]


def run(*words: str | Path, stdin: str = "") -> str:
    """A program that must succeed; returns what it printed."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, input=stdin, timeout=300
    )
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def qemu_uri(served: Served, name: str) -> str:
    """As QEMU takes it where a name has signs that URIs do not."""
    return f"nbd:unix:{served.path}:exportname={name}"


@pytest.fixture(params=["web", "raw"])
def target(request: pytest.FixtureRequest, serve: Serve, disk: Disk, folder: Path) -> tuple[Served, str]:
    """A disk of the pool, and a raw image: clients cannot tell one from the other."""
    disk.export(folder / "image")
    return serve(images={"raw": folder / "image"}), request.param


# libnbd


def test_nbdinfo_shows_what_can_be_done(serve: Serve, pool: Pool, disk: Disk) -> None:
    needs("nbdinfo")
    served = serve()
    (live,) = json.loads(run("nbdinfo", "--json", served.uri("web")))["exports"]
    assert live["export-size"] == SIZE_BYTES
    assert live["contexts"] == ["base:allocation", f"snapcore:changed:{pool.snapshot('one').id}"]
    able = ("can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero")
    assert all(live[name] for name in able) and not live["is_read_only"]
    assert (live["block_size_minimum"], live["block_size_maximum"]) == (1, 32 << 20)
    (fixed,) = json.loads(run("nbdinfo", "--json", served.uri("web@one")))["exports"]
    assert fixed["is_read_only"] and fixed["can_multi_conn"]
    assert not fixed["can_trim"] and not fixed["can_zero"]
    names = [
        export["export-name"] for export in json.loads(run("nbdinfo", "--list", "--json", served.uri()))["exports"]
    ]
    assert names == ["web", f"@{pool.snapshot('one').id}"]


def test_nbdinfo_maps_what_is_allocated_and_what_has_changed(serve: Serve, disk: Disk) -> None:
    needs("nbdinfo")
    served = serve()

    def mapped(name: str, context: str) -> list[tuple[int, int, int]]:
        rows = json.loads(run("nbdinfo", "--json", f"--map={context}", served.uri(name)))
        return [(row["offset"] // MIB, row["length"] * 2 // MIB, row["type"]) for row in rows]

    hole, data = 3, 0
    allocated = [(0, 2, hole), (1, 2, data), (2, 2, hole), (3, 1, data), (3, 9, hole)]
    assert mapped("web", "base:allocation") == allocated
    assert mapped("web@one", "base:allocation") == [(0, 2, hole), (1, 2, data), (2, 12, hole)]
    assert mapped("web", "snapcore:changed:one") == [(0, 6, 0), (3, 1, 1), (3, 9, 0)]
    assert mapped("web@one", "snapcore:changed:one") == [(0, 16, 0)]


def test_nbdcopy_copies_both_ways(target: tuple[Served, str], folder: Path, disk: Disk) -> None:
    needs("nbdcopy")
    served, name = target
    run("nbdcopy", served.uri(name), folder / "out")
    data = (folder / "out").read_bytes()
    assert data == disk.pread(SIZE_BYTES, 0)
    changed = random.Random(3).randbytes(5 * MIB) + bytes(2 * MIB) + data[7 * MIB :]
    (folder / "in").write_bytes(changed)
    run("nbdcopy", "--flush", folder / "in", served.uri(name))
    run("nbdcopy", "--connections=4", served.uri(name), folder / "again")
    assert (folder / "again").read_bytes() == changed


NBDSH = """
h.set_strict_mode(0)
size = h.get_size()
def fails(code, call, *arguments, **named):
    try:
        call(*arguments, **named)
    except nbd.Error as error:
        assert error.errnum == code, (call, error.errnum, code)
    else:
        raise AssertionError(f"{call} {arguments} went well")

# Reads and writes, of any length at any place
h.pwrite(b"one", 4095)
assert h.pread(5, 4094) == b"\\0one\\0"
h.pwrite(b"two", 100, nbd.CMD_FLAG_FUA)
h.flush()
found = []
h.pread_structured(8192, 0, lambda data, offset, status, error: found.append((bytes(data), offset, status)))
assert b"".join(data for data, _, _ in sorted(found, key=lambda row: row[1])) == h.pread(8192, 0)
found.clear()
h.pread_structured(65536, 0, lambda *row: found.append(row[1]), nbd.CMD_FLAG_DF)
assert found == [0]

# Zeros, holes and hints
for flags in (0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA) + ((nbd.CMD_FLAG_FAST_ZERO,) if h.can_fast_zero() else ()):
    h.pwrite(b"x" * 20000, 0)
    h.zero(10000, 5000, flags)
    assert h.pread(20000, 0) == b"x" * 5000 + bytes(10000) + b"x" * 5000, flags
for flags in (0, nbd.CMD_FLAG_FUA):
    h.trim(20000, 0, flags)
assert h.pread(4096, 4096) == bytes(4096)
h.cache(65536, 0)

# Block status
h.pwrite(b"data" * 1024, 8192)
seen = []
h.block_status(size, 0, lambda context, offset, entries, error: seen.append((context, offset, entries)))
(context, offset, entries), = seen
assert (context, offset) == ("base:allocation", 0) and entries[0:4] == [8192, 3, 4096, 0], entries[:8]
assert all(length > 0 for length in entries[::2]) and sum(entries[::2]) <= size
seen.clear()
h.block_status(size, 0, lambda context, offset, entries, error: seen.append(entries), nbd.CMD_FLAG_REQ_ONE)
assert seen == [[8192, 3]], seen

# What cannot be
fails(errno.ENOSPC, h.pwrite, b"x" * 4096, size - 100)
fails(errno.ENOSPC, h.zero, 4096, size)
fails(errno.EINVAL, h.pread, 4096, size - 100)
fails(errno.EINVAL, h.pread, 1, 1 << 62)
fails(errno.EINVAL, h.trim, 4096, size - 100)
fails(errno.EINVAL, h.block_status, 4096, size, lambda *row: 0)
assert h.pread(4, 8192) == b"data"

# Many at once, answered in any order
cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([i]) * 4096), i * 4096) for i in range(200)]
while cookies:
    h.poll(-1)
    cookies = [cookie for cookie in cookies if not h.aio_command_completed(cookie)]
assert all(h.pread(1, i * 4096) == bytes([i]) for i in range(200))
"""


def test_nbdsh_uses_every_command_and_flag(target: tuple[Served, str]) -> None:
    served, name = target
    code = f"import errno, nbd\nh.add_meta_context('base:allocation')\nh.connect_uri({served.uri(name)!r})\n{NBDSH}"
    nbdsh("-c", code)


READ_ONLY = """
h.set_strict_mode(0)
before = h.pread(8192, 1 << 20)
for call in (lambda: h.pwrite(b"x", 1 << 20), lambda: h.zero(10, 0), lambda: h.trim(10, 0)):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == errno.EPERM, error
    else:
        raise AssertionError("it went well")
h.flush()
assert h.pread(8192, 1 << 20) == before != bytes(8192)
"""


def test_nbdsh_cannot_change_a_snapshot(serve: Serve, disk: Disk) -> None:
    nbdsh("-u", serve().uri("web@one"), "-c", f"import errno, nbd\n{READ_ONLY}")


def test_what_is_flushed_on_one_connection_was_written_on_another(serve: Serve, disk: Disk) -> None:
    uri = serve().uri("web")
    code = (
        f"import nbd\nother = nbd.NBD()\nother.connect_uri({uri!r})\nh.connect_uri({uri!r})\n"
        "assert h.can_multi_conn()\nother.pwrite(b'other', 0)\nh.flush()\nassert h.pread(5, 0) == b'other'\n"
    )
    nbdsh("-c", code)


# QEMU


def test_qemu_img_converts_compares_and_maps(target: tuple[Served, str], folder: Path, disk: Disk) -> None:
    needs("qemu-img")
    served, name = target
    uri = served.uri(name)
    run("qemu-img", "convert", *RAW, "-O", "qcow2", uri, folder / "out.qcow2")
    assert "identical" in run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", folder / "out.qcow2", uri)
    rows = json.loads(run("qemu-img", "map", *RAW, "--output=json", uri))
    data = [(row["start"], row["length"]) for row in rows if row["data"]]
    assert data == [(MIB, MIB), (3 * MIB, MIB // 2)]
    changed = random.Random(4).randbytes(3 * MIB) + bytes(5 * MIB)
    (folder / "in").write_bytes(changed)
    run("qemu-img", "convert", "-n", *RAW, "-O", "raw", folder / "in", uri)
    run("qemu-img", "convert", *RAW, "-O", "raw", uri, folder / "again")
    assert (folder / "again").read_bytes() == changed


def test_qemu_nbd_as_a_peer_gives_and_takes(target: tuple[Served, str], folder: Path, disk: Disk) -> None:
    """A mirror from our server to QEMU's, and back."""
    needs("qemu-nbd", "nbdcopy", "qemu-img")
    served, name = target
    run("qemu-img", "create", "-q", "-f", "qcow2", folder / "peer.qcow2", str(SIZE_BYTES))
    socket = folder / "peer"
    peer = subprocess.Popen(["qemu-nbd", "-f", "qcow2", "-t", "-e", "8", "-k", str(socket), str(folder / "peer.qcow2")])
    try:
        eventually(socket.exists)
        theirs = f"nbd+unix:///?socket={socket}"
        run("nbdcopy", "--flush", served.uri(name), theirs)
        assert "identical" in run("qemu-img", "compare", *RAW, "-F", "raw", served.uri(name), theirs)
        run("qemu-io", *RAW, "-c", "write -P 5 1M 300k", "-c", "write -z 3M 64k", theirs)
        run("nbdcopy", "--flush", "--allocated", theirs, served.uri(name))
        assert "identical" in run("qemu-img", "compare", *RAW, "-F", "raw", served.uri(name), theirs)
    finally:
        peer.terminate()
        peer.wait(60)


def test_qemu_reads_changed_blocks_as_a_dirty_bitmap(serve: Serve, disk: Disk) -> None:
    needs("qemu-img")
    served = serve()
    options = f"driver=nbd,server.type=unix,server.path={served.path},export=web,x-dirty-bitmap=snapcore:changed:one"
    rows = json.loads(run("qemu-img", "map", "--image-opts", "--output=json", options))
    # What is changed is shown as what is not data there.
    assert [(row["start"], row["length"]) for row in rows if not row["data"]] == [(3 * MIB, MIB // 2)]


def test_qemu_img_bench_runs_through(target: tuple[Served, str]) -> None:
    needs("qemu-img")
    served, name = target
    for options in ([], ["-w", "--flush-interval=50"], ["-w", "--pattern=7", "-s", "65536"]):
        run("qemu-img", "bench", *RAW, "-c", "400", "-d", "16", *options, served.uri(name))


def test_qemu_io_verifies_what_it_wrote(target: tuple[Served, str]) -> None:
    needs("qemu-io")
    served, name = target
    commands = [
        "write -P 1 0 1M",
        "write -f -P 2 512k 64k",
        "aio_write -P 3 2M 1M",
        "aio_flush",
        "read -P 2 512k 64k",
        "write -z 100k 100k",
        "write -z -u 300k 100k",
        "discard 400k 64k",
        "read -P 0 100k 100k",
        "read -P 0 300k 164k",
        "read -P 1 0 100k",
        "read -P 3 2M 1M",
        "flush",
    ]
    words = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", *RAW, *words, served.uri(name))
    assert "failed" not in said, said


def test_a_throw_away_disk_is_qemus_to_write(serve: Serve, pool: Pool, disk: Disk) -> None:
    needs("qemu-io")
    before = pool.snapshot("one").pread(SIZE_BYTES, 0)
    run("qemu-io", *RAW, "-c", "write -P 9 0 1M", "-c", "read -P 9 0 1M", qemu_uri(serve(), "web@one?cow"))
    assert pool.snapshot("one").pread(SIZE_BYTES, 0) == before
    assert disk.pread(4, 0) == bytes(4)


# fio


def test_fio_verifies_what_it_wrote(target: tuple[Served, str]) -> None:
    served, name = target
    fio.verify(served, name, "--loops=2")


# A file system


def test_a_file_system_lives_on_a_disk_by_nbdfuse(tmp_path: Path) -> None:
    needs("nbdfuse", "fusermount3", "mkfs.ext4", "e2fsck", "losetup", "mount", "fstrim", root=True)
    if not os.path.exists("/dev/fuse"):
        pytest.skip("needs /dev/fuse")
    with Pool.create(tmp_path / "pool") as pool:
        disk = pool.create_disk("web", 64 * MIB)
        socket = tmp_path / "socket"
        (tmp_path / "fuse").mkdir()
        file = tmp_path / "fuse" / "disk"
        with NbdServer(pool, listen=[f"unix:{socket}"]):
            child = subprocess.Popen(["nbdfuse", str(file), f"nbd+unix:///web?socket={socket}"])
            try:
                while not file.exists():
                    assert child.poll() is None
                    time.sleep(0.01)
                run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", file)
                data = random.Random(5).randbytes(20 * MIB)
                with loop_device(file) as device:
                    with mounted(device, tmp_path / "mounted", "rw,discard") as root:
                        (root / "kept").write_bytes(data[: 3 * MIB])
                        (root / "gone").write_bytes(data)
                        run("sync", "-f", root)
                        disk.snapshot("full")
                        full = pool.usage().allocated_bytes
                        (root / "gone").unlink()
                        run("sync", "-f", root)
                        run("fstrim", root)
                        pool.delete_snapshot("full")
                        assert pool.usage().allocated_bytes < full - 15 * MIB
                        disk.snapshot("live")
                    run("e2fsck", "-fn", device)
                    with mounted(device, tmp_path / "mounted") as root:
                        assert (root / "kept").read_bytes() == data[: 3 * MIB]
            finally:
                run("fusermount3", "-u", tmp_path / "fuse")
                assert child.wait(60) == 0
        pool.snapshot("live").export(tmp_path / "exported")
        # Cut while it was mounted: the journal has something to do again, and then all is well.
        subprocess.run(["e2fsck", "-fy", str(tmp_path / "exported")], capture_output=True, check=False)
        run("e2fsck", "-fn", tmp_path / "exported")
        check_space(pool)
