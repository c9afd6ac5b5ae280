"""The transmission phase against a plain client and an oracle of bytes, over pools and raw files, in all framings."""

from __future__ import annotations

import errno
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapcore.nbd import Connection, Export
from snapcore.persist import Medium
from snapcore.pool import Pool
from tests.support.nbd_client import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISCONNECT,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    PAYLOAD,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
)

SIZE = (1 << 20) + 700
FRAMINGS = [(False, False), (True, False), (True, True)]


@contextmanager
def served(
    export: Export, *, structured: bool = True, extended: bool = False, contexts: object = (), idle_s: float = 0
) -> Iterator[tuple[Client, Connection, list[str]]]:
    """A connection that is answered, and at the end why it ended."""
    ours, theirs = socket.socketpair()
    ended: list[str] = []
    connection = Connection(
        theirs.fileno(),
        export,
        structured=structured,
        extended=extended,
        contexts=contexts,  # type: ignore[arg-type]
        idle_s=idle_s,
    )
    thread = threading.Thread(target=lambda: (ended.append(connection.serve()), theirs.shutdown(socket.SHUT_RDWR)))
    thread.start()
    try:
        yield Client(ours, structured=structured, extended=extended), connection, ended
    finally:
        ours.close()
        thread.join()
        theirs.close()


@contextmanager
def exports(kind: str, *, writable: bool = True) -> Iterator[Export]:
    """An export of zeros: a pool's disk, or a raw file."""
    with tempfile.TemporaryDirectory() as folder:
        if kind == "pool":
            with Pool.create(Path(folder) / "pool", background=False) as pool:
                disk = pool.create_disk("disk", SIZE)
                yield Export(disk._volume, -1, 0, writable=writable)
        else:
            descriptor = os.open(Path(folder) / "raw", os.O_RDWR | os.O_CREAT)
            os.truncate(descriptor, SIZE)
            try:
                yield Export(None, descriptor, SIZE, writable=writable)
            finally:
                os.close(descriptor)


ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 200_000)).map(
    lambda pair: (pair[0], min(pair[1], SIZE - pair[0]))
)
requests = st.lists(
    st.tuples(
        st.sampled_from([READ, READ, WRITE, WRITE, TRIM, WRITE_ZEROES, FLUSH, CACHE]),
        ranges,
        st.sampled_from([0, 0, FUA]),
        st.integers(1, 255),
    ),
    max_size=12,
)


@pytest.mark.parametrize("kind", ["pool", "raw"])
@given(st.sampled_from(FRAMINGS), requests, st.booleans())
def test_what_is_read_is_what_was_written(
    kind: str, framing: tuple[bool, bool], steps: list[tuple[int, tuple[int, int], int, int]], no_hole: bool
) -> None:
    oracle = bytearray(SIZE)
    with (
        exports(kind) as export,
        served(export, structured=framing[0], extended=framing[1]) as (client, connection, ended),
    ):
        for step, (offset, length), flags, fill in steps:
            if step == READ:
                answer = client.call(READ, offset, length, DF if fill % 2 and client.structured else 0)
                assert (answer.error, answer.data) == (0, bytes(oracle[offset : offset + length]))
            elif step == WRITE:
                data = bytes([fill]) * length
                assert client.call(WRITE, offset, length, flags, data).error == 0
                oracle[offset : offset + length] = data
            elif step in (TRIM, WRITE_ZEROES):
                more = NO_HOLE if step == WRITE_ZEROES and no_hole else 0
                assert client.call(step, offset, length, flags | more).error == 0
                oracle[offset : offset + length] = bytes(length)
            else:
                assert client.call(step, offset if step == CACHE else 0, length if step == CACHE else 0).error == 0
        assert client.call(READ, 0, SIZE).data == bytes(oracle)
        assert connection.requests == len(steps) + 1
        client.send(DISCONNECT, 0, 0)
        assert client.socket.recv(1) == b""
    assert ended == ["disconnected"]


@given(st.sampled_from(FRAMINGS), st.lists(ranges, min_size=1, max_size=100))
def test_many_requests_at_once_are_all_answered(framing: tuple[bool, bool], wanted: list[tuple[int, int]]) -> None:
    with exports("pool") as export, served(export, structured=framing[0], extended=framing[1]) as (client, _, _):
        content = os.urandom(SIZE)
        assert client.call(WRITE, 0, SIZE, 0, content).error == 0
        sender = threading.Thread(target=lambda: cookies.extend(client.send(READ, *place) for place in wanted))
        cookies: list[int] = []
        sender.start()
        sender.join()
        for cookie, (offset, length) in zip(cookies, wanted, strict=True):
            assert client.wait(cookie).data == content[offset : offset + length]


@pytest.mark.parametrize("framing", FRAMINGS)
def test_what_cannot_be_is_refused_and_the_connection_goes_on(framing: tuple[bool, bool]) -> None:
    with exports("pool") as export, served(export, structured=framing[0], extended=framing[1]) as (client, _, _):
        for step, offset, length, flags, error in [
            (READ, SIZE - 1, 2, 0, errno.EINVAL),
            (READ, 1 << 63, 1, 0, errno.EINVAL),
            (READ, 0, 0, 0, errno.EINVAL),
            (TRIM, SIZE, 1, 0, errno.EINVAL),
            (WRITE_ZEROES, SIZE, 1, 0, errno.ENOSPC),
            (WRITE_ZEROES, 0, 4096, FAST_ZERO | NO_HOLE, errno.EOPNOTSUPP),
            (BLOCK_STATUS, 0, 4096, 0, errno.EINVAL),
            (99, 0, 4096, 0, errno.EINVAL),
        ]:
            assert client.call(step, offset, length, flags).error == error
        assert client.call(WRITE, SIZE - 1, 2, 0, b"ab").error == errno.ENOSPC
        assert client.call(READ, SIZE - 1, 1).data == b"\0"


@pytest.mark.parametrize("kind", ["pool", "raw"])
@pytest.mark.parametrize("framing", FRAMINGS)
def test_flags_that_mean_nothing_with_a_command_are_refused_and_nothing_is_done(
    kind: str, framing: tuple[bool, bool]
) -> None:
    structured, extended = framing
    known = {
        READ: FUA | (DF if structured else 0),
        WRITE: FUA | (PAYLOAD if extended else 0),
        FLUSH: FUA,
        TRIM: FUA,
        CACHE: FUA,
        WRITE_ZEROES: FUA | NO_HOLE | (FAST_ZERO if kind == "pool" else 0),
    }
    with exports(kind) as export, served(export, structured=structured, extended=extended) as (client, _, _):
        assert client.call(WRITE, 0, 4096, 0, b"k" * 4096).error == 0
        for step, allowed in known.items():
            for bit in (1 << number for number in range(16)):
                if bit & allowed or (extended and bit == PAYLOAD):
                    continue
                data = b"x" * 100 if step == WRITE else b""
                assert client.call(step, 0, 100, bit, data).error == errno.EINVAL, (step, bit)
        assert client.call(READ, 0, 4096).data == b"k" * 4096


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("kind", ["pool", "raw"])
def test_long_reads_and_writes_come_through_in_parts(kind: str, framing: tuple[bool, bool]) -> None:
    size = 5 * (1 << 20) + 777
    content = os.urandom(size)
    with tempfile.TemporaryDirectory() as folder, Pool.create(Path(folder) / "pool", background=False) as pool:
        descriptor = os.open(Path(folder) / "raw", os.O_RDWR | os.O_CREAT)
        os.truncate(descriptor, size)
        volume = pool.create_disk("disk", size)._volume if kind == "pool" else None
        export = Export(volume, descriptor, size, writable=True)
        with served(export, structured=framing[0], extended=framing[1]) as (client, _, _):
            assert client.call(WRITE, 0, size, 0, content).error == 0
            assert client.call(READ, 0, size).data == content
            assert client.call(READ, 1, size - 1, DF if client.structured else 0).data == content[1:]
        os.close(descriptor)


def test_a_read_only_export_is_not_written() -> None:
    with exports("raw", writable=False) as export, served(export) as (client, _, _):
        assert client.call(WRITE, 0, 3, 0, b"abc").error == errno.EPERM
        assert client.call(TRIM, 0, 4096).error == errno.EPERM
        assert client.call(WRITE_ZEROES, 0, 4096).error == errno.EPERM
        assert client.call(READ, 0, 3).data == bytes(3)


@settings(max_examples=20)
@given(
    st.sampled_from(FRAMINGS[1:]),
    st.lists(st.integers(0, SIZE // 4096 - 1), min_size=1, max_size=20, unique=True),
    ranges,
)
def test_block_status_tells_what_is_where_and_what_changed(
    framing: tuple[bool, bool], written: list[int], part: tuple[int, int]
) -> None:
    with tempfile.TemporaryDirectory() as folder, Pool.create(Path(folder) / "pool", background=False) as pool:
        disk = pool.create_disk("disk", SIZE)
        half = len(written) // 2
        for block in written[:half]:
            disk.pwrite(b"a" * 4096, block * 4096)
        before = disk.snapshot()
        for block in written[half:]:
            disk.pwrite(b"b" * 4096, block * 4096)
        export = Export(disk._volume, -1, 0, writable=True)
        contexts = [(5, None), (6, before._volume)]
        offset, length = part
        with served(export, structured=True, extended=framing[1], contexts=contexts) as (client, _, _):
            answer = client.call(BLOCK_STATUS, offset, length)
            one = client.call(BLOCK_STATUS, offset, length, REQ_ONE)
        mapped, changed = set(written), set(written[half:])
        for context, inside, yes, no in ((5, mapped, 0, 3), (6, changed, 1, 0)):
            at = offset
            for size, flags in answer.status[context]:
                for block in range(at // 4096, (at + size - 1) // 4096 + 1):
                    assert flags == (yes if block in inside else no)
                at += size
            assert at == offset + length
            assert one.status[context] == answer.status[context][:1]


@pytest.mark.parametrize("slice_pages", [1, 3])
def test_block_status_of_much_walks_the_map_in_slices(slice_pages: int) -> None:
    """The lock of the pool is not held over them; what a client gets in one answer may end earlier."""
    blocks = 128 * 40
    with tempfile.TemporaryDirectory() as folder, Pool.create(Path(folder) / "pool", background=False) as pool:
        disk = pool.create_disk("disk", blocks * 4096)
        before = disk.snapshot()
        disk.pwrite(b"x" * (blocks - 200) * 4096, 100 * 4096)
        pool._engine.core.page_file.slice_pages = slice_pages
        contexts = [(1, None), (2, before._volume)]
        with served(Export(disk._volume, -1, 0, writable=True), contexts=contexts) as (client, _, _):
            for context, none, some in ((1, 3, 0), (2, 0, 1)):
                at, found = 0, []
                while at < blocks * 4096:
                    for length, flags in client.call(BLOCK_STATUS, at, blocks * 4096 - at).status[context]:
                        at += length
                        if found and found[-1][1] == flags:
                            found[-1] = (at, flags)
                        else:
                            found.append((at, flags))
                assert found == [(100 * 4096, none), ((blocks - 100) * 4096, some), (blocks * 4096, none)]


def test_block_status_of_a_disk_over_an_image_tells_the_holes_of_the_image() -> None:
    with tempfile.TemporaryDirectory() as folder, Pool.create(Path(folder) / "pool", background=False) as pool:
        image = Path(folder) / "image"
        with image.open("wb") as file:
            file.write(b"i" * 65536)
            file.truncate(1 << 20)
        disk = pool.create_disk("over", source=image, size_bytes=2 << 20)
        disk.pwrite(b"x" * 4096, 524288)
        with served(Export(disk._volume, -1, 0, writable=True), contexts=[(1, None)]) as (client, _, _):
            found = client.call(BLOCK_STATUS, 0, 2 << 20).status[1]
            assert found == [(65536, 0), (524288 - 65536, 3), (4096, 0), ((2 << 20) - 524288 - 4096, 3)]


@given(st.binary(min_size=1, max_size=200), st.sampled_from(FRAMINGS))
def test_noise_ends_the_connection_and_nothing_else(noise: bytes, framing: tuple[bool, bool]) -> None:
    with exports("raw") as export:
        with served(export, structured=framing[0], extended=framing[1]) as (client, _, ended):
            client.socket.sendall(noise)
            client.socket.shutdown(socket.SHUT_WR)
            while client.socket.recv(1 << 16):
                pass
        assert ended[0] in ("vanished", "it sent a request without the magic number")
        with served(export) as (client, _, _):
            assert client.call(READ, 0, 5).data == bytes(5)


def test_a_write_that_is_too_long_ends_the_connection() -> None:
    with exports("raw") as export, served(export) as (client, _, ended):
        client.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 0, (32 << 20) + 1))
        assert client.socket.recv(1) == b""
        assert ended == ["it sent a write of more than 32 MiB"]


def test_a_client_that_says_nothing_is_cut_off() -> None:
    with exports("raw") as export, served(export, idle_s=0.05) as (client, _, ended):
        client.socket.sendall(b"\x25\x60")
        assert client.socket.recv(1) == b""
        assert ended == ["idle"]


def test_a_connection_that_is_stopped_answers_what_it_has() -> None:
    with exports("raw") as export, served(export) as (client, connection, ended):
        assert client.call(READ, 0, 1).error == 0
        cookie = client.send(FLUSH, 0, 0)
        assert client.wait(cookie).error == 0
        connection.stop()
        assert client.socket.recv(1) == b""
        assert ended == ["stopped"]


def test_a_disk_that_is_gone_gives_errors() -> None:
    with tempfile.TemporaryDirectory() as folder, Pool.create(Path(folder) / "pool", background=False) as pool:
        disk = pool.create_disk("disk", SIZE)
        with served(Export(disk._volume, -1, 0, writable=True)) as (client, _, _):
            pool.delete_disk(disk)
            assert client.call(READ, 0, 1).error == errno.ESHUTDOWN
            assert client.call(WRITE, 0, 1, 0, b"x").error == errno.ESHUTDOWN


def test_contexts_are_of_the_pool_that_is_exported() -> None:
    ours, _theirs = socket.socketpair()
    with exports("pool") as one, exports("pool") as two, ours, _theirs:
        with pytest.raises(ValueError, match="of the export's pool"):
            Connection(ours.fileno(), one, structured=True, extended=False, contexts=[(1, two.volume)])
        with pytest.raises(ValueError, match="at most 16"):
            Connection(ours.fileno(), one, structured=True, extended=False, contexts=[(1, None)] * 17)


class SlowSync(Medium):
    """A medium whose syncs wait for leave."""

    def __init__(self) -> None:
        self.leave = threading.Event()
        self.leave.set()

    def sync(self, descriptor: int) -> None:
        self.leave.wait()
        super().sync(descriptor)


def test_who_waits_for_an_answer_is_not_idle() -> None:
    medium = SlowSync()
    with tempfile.TemporaryDirectory() as folder:
        with Pool.create(Path(folder) / "pool", medium=medium, background=False) as pool:
            disk = pool.create_disk("disk", SIZE)
            with served(Export(disk._volume, -1, 0, writable=True), idle_s=0.02) as (client, _, ended):
                medium.leave.clear()
                assert client.call(WRITE, 0, 3, 0, b"abc").error == 0
                cookie = client.send(FLUSH, 0, 0)
                threading.Timer(0.1, medium.leave.set).start()
                assert client.wait(cookie).error == 0
                assert client.socket.recv(1) == b""
                assert ended == ["idle"]
