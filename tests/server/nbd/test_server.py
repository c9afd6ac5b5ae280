"""The server with clients of our own: what names mean, who is in whose way, limits, and the end."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from snapcore.errors import BusyError, NotFoundError, RefusedError, UsageError
from snapcore.pool import Disk, Pool
from snapcore.server import NbdServer
from snapcore.server.nbd import listening
from snapcore.server.nbd.protocol import Option, Reply
from tests.support.nbd import (
    BLOCK_STATUS,
    DISCONNECT,
    EPERM,
    FLUSH,
    FUA,
    GREETING,
    READ,
    SIZE_BYTES,
    WRITE,
    WRITE_ZEROES,
    Peer,
    Serve,
    contexts,
    eventually,
    flags,
    go,
    option,
    refusal,
    shown,
    string,
)
from tests.support.pools import MIB


def sent_before_failing(peer: Peer, parts: list[bytes], *, pause_s: float = 0) -> int:
    """How many parts a client can send before it is cut off, or stuck."""
    ticks = threading.Event()
    for number, part in enumerate(parts):
        try:
            peer.send(part)
        except OSError:
            return number
        ticks.wait(pause_s)
    return len(parts)


# What names mean


def test_a_disk_is_read_and_written(serve: Serve, disk: Disk) -> None:
    with Peer(serve().path) as peer:
        assert peer.enter("web") == SIZE_BYTES
        assert peer.read(MIB - 10, 100) == disk.pread(100, MIB - 10)
        assert peer.write(5, b"written", flags=FUA) == 0
        assert disk.pread(9, 4) == b"\0written\0"
        assert peer.request(WRITE_ZEROES, 6, 3) == 0
        assert peer.read(4, 9) == b"\0w\0\0\0ten\0"


@pytest.mark.parametrize("name", ["@{id}", "@one", "web@one", "web@{id}"])
def test_a_snapshot_is_read_only(serve: Serve, pool: Pool, disk: Disk, name: str) -> None:
    snapshot = pool.snapshot("one")
    with Peer(serve().path) as peer:
        peer.enter(name.format(id=snapshot.id))
        assert peer.read(3 * MIB, 512) == bytes(512)
        assert peer.read(MIB, 512) == disk.pread(512, MIB)
        assert peer.write(0, b"x") == EPERM
        assert peer.request(WRITE_ZEROES, 0, 4096) == EPERM
    assert snapshot.pread(1, 0) == b"\0"


@pytest.mark.parametrize("name", ["", "nothing", "@", "@nothing", "web@", "nothing@one", "web@nothing", "web?cow"])
def test_names_that_mean_nothing_are_unknown(serve: Serve, pool: Pool, disk: Disk, name: str) -> None:
    pool.create_disk("other", MIB)  # so that no name is no default
    with Peer(serve().path) as peer:
        peer.greet()
        assert refusal(peer, name) == Reply.ERR_UNKNOWN


def test_of_snapshots_with_the_same_name_each_is_its_disks(serve: Serve, pool: Pool, disk: Disk) -> None:
    other = pool.create_disk("a@b?cow", MIB)
    other.pwrite(b"other", 0)
    other.snapshot("one")
    server = serve()
    for name, data in (("a@b?cow@one", b"other"), ("web@one", bytes(5)), ("a@b?cow", b"other")):
        with Peer(server.path) as peer:
            peer.enter(name)
            assert peer.read(0, 5) == data
    with Peer(server.path) as peer:
        peer.greet()
        # Which of them is not said.
        assert refusal(peer, "@one") == Reply.ERR_POLICY


def test_the_only_export_is_the_default(serve: Serve, disk: Disk) -> None:
    with Peer(serve().path) as peer:
        assert peer.enter("") == SIZE_BYTES


def test_the_list_has_disks_snapshots_and_images(serve: Serve, pool: Pool, disk: Disk, folder: Path) -> None:
    (folder / "image").write_bytes(bytes(12345))
    with Peer(serve(images={"raw": folder / "image"}).path) as peer:
        peer.greet()
        number = pool.snapshot("one").id
        assert shown(peer) == {
            "raw": f"image {folder}/image",
            "web": "disk web",
            f"@{number}": "snapshot one of disk web",
        }


def test_an_image_is_read_and_written(serve: Serve, folder: Path) -> None:
    image = folder / "image"
    image.write_bytes(b"a" * 12345)
    with Peer(serve(pool=None, images={"raw": image}).path) as peer:
        assert peer.enter("raw") == 12345
        assert peer.write(100, b"written", flags=FUA) == 0
        assert peer.read(98, 11) == b"aawrittenaa"
        assert peer.write(12340, b"behind") != 0
    assert len(image.read_bytes()) == 12345


@pytest.mark.parametrize("how", ["asked for", "no permission to write"])
def test_an_image_is_read_only_where_it_must(
    serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    image = folder / "image"
    image.write_bytes(b"a" * 4096)

    def careful_open(path: str, mode: int) -> int:
        if mode & os.O_RDWR:
            raise PermissionError(errno.EACCES, "not for you", path)
        return opened(path, mode)

    opened = os.open
    if how != "asked for":
        monkeypatch.setattr(os, "open", careful_open)
    server = serve(pool=None, listen=["tcp:127.0.0.1:0"], images={"raw": image}, read_only=how == "asked for")
    monkeypatch.undo()
    with Peer(("127.0.0.1", int(server.server.uris[0].split(":")[2][:-1]))) as peer:
        peer.enter("raw")
        assert peer.write(0, b"x") == EPERM
        assert peer.read(0, 2) == b"aa"


@pytest.mark.parametrize("left", ["disk", "snapshot"])
def test_an_image_that_the_pool_reads_from_is_served_for_reading_only(
    serve: Serve, folder: Path, pool: Pool, left: str
) -> None:
    image = folder / "image"
    image.write_bytes(b"i" * MIB)
    (folder / "link").hardlink_to(image)
    over = pool.create_disk("over", source=image)
    named = "disk 'over'"
    if left == "snapshot":
        over.snapshot("kept")
        over.delete()
        named = "snapshot kept of disk 'over'"
    for path in (image, folder / "link"):
        with pytest.raises(RefusedError, match=f"{named} reads from it"):
            serve(images={"raw": path})
    with pytest.raises(RefusedError, match="the pool "):
        serve(images={"raw": folder / "pool" / "data"})
    with Peer(serve(images={"raw": image}, read_only=True).path) as peer:
        peer.enter("raw")
        assert peer.write(0, b"x") == EPERM


def test_an_image_that_a_disk_was_made_from_meanwhile_is_not_entered_for_writing(
    serve: Serve, folder: Path, pool: Pool
) -> None:
    (folder / "image").write_bytes(b"i" * MIB)
    server = serve(images={"raw": folder / "image"})
    with Peer(server.path) as peer:
        peer.enter("raw")
    pool.create_disk("over", source=folder / "image")
    with Peer(server.path) as peer:
        peer.greet()
        assert refusal(peer, "raw") == Reply.ERR_POLICY


@pytest.mark.parametrize("name", ["web", "@one?cow"])
def test_a_server_for_reading_lets_nobody_write(serve: Serve, disk: Disk, name: str) -> None:
    with Peer(serve(read_only=True).path) as peer:
        if name == "web":
            peer.enter(name)
            assert peer.write(0, b"x") == EPERM
        else:
            peer.greet()
            peer.send(go(name))
            assert peer.answer().reply == Reply.ERR_POLICY


def test_only_what_patterns_fit_is_there(serve: Serve, pool: Pool, disk: Disk) -> None:
    secret = pool.create_disk("secret", MIB)
    secret.snapshot("two")
    with Peer(serve(exports=["web", "web@*"]).path) as peer:
        peer.greet()
        assert set(shown(peer)) == {"web", f"@{pool.snapshot('one').id}"}
        for name in ("secret", secret.id, "@two", f"@{pool.snapshot('two').id}", "secret@two", "@two?cow"):
            assert refusal(peer, name) == Reply.ERR_UNKNOWN
    with Peer(serve(exports=["web"]).path) as peer:
        peer.greet()
        assert refusal(peer, "web@one") == Reply.ERR_UNKNOWN
        assert peer.socket.send(go("", number=Option.INFO))
        assert peer.answer().reply == Reply.INFO


def test_changes_are_offered_for_snapshots_of_the_family_only(serve: Serve, pool: Pool, disk: Disk) -> None:
    stranger = pool.create_disk("stranger", MIB).snapshot("strange")
    clone = disk.clone("clone")
    later = clone.snapshot("later")
    one = pool.snapshot("one")
    with Peer(serve().path) as peer:
        peer.greet()
        peer.send(option(Option.STRUCTURED_REPLY))
        peer.answer()

        def found(*queries: str, number: int = Option.LIST_META_CONTEXT) -> list[str]:
            peer.send(contexts("web", *queries, number=number))
            names = []
            while (answer := peer.answer()).reply == Reply.META_CONTEXT:
                names.append(answer.data[4:].decode())
            assert answer.reply == Reply.ACK
            return names

        both = [f"snapcore:changed:{one.id}", f"snapcore:changed:{later.id}"]
        assert found() == ["base:allocation", *both]
        assert found("snapcore:") == found("snapcore:changed:") == both
        asked = ["snapcore:changed:one", f"snapcore:changed:{stranger.id}", "snapcore:changed:nothing"]
        assert found(*asked, number=Option.SET_META_CONTEXT) == ["snapcore:changed:one"]


def test_extended_headers_carry_reads_writes_and_block_status(serve: Serve, disk: Disk) -> None:
    """By hand: few clients speak them yet."""
    with Peer(serve().path) as peer:
        peer.greet()
        peer.send(option(Option.EXTENDED_HEADERS) + contexts("web", "base:allocation", "snapcore:changed:one"))
        peer.send(go("web"))
        assert [peer.answer().reply for _ in range(6)] == [1, Reply.META_CONTEXT, Reply.META_CONTEXT, 1, Reply.INFO, 1]

        def asked(kind: int, offset: int, length: int, data: bytes = b"", flags: int = 0) -> list[tuple[int, bytes]]:
            """Types and payloads of the chunks that answer a request; the last one says that it is."""
            # A write says that its length is that of what follows.
            peer.send(struct.pack(">IHHQQQ", 0x21E41C71, flags, kind, 77, offset, length) + data)
            found = []
            while True:
                magic, done, what, cookie, place, size = struct.unpack(">IHHQQQ", peer.receive(32))
                assert (magic, cookie, place) == (0x6E8A278C, 77, offset)
                found.append((what, peer.receive(size)))
                if done & 1:
                    return found

        payload_length = 1 << 5
        assert asked(WRITE, 5, 7, b"written", payload_length) == [(0, b"")]
        (piece,) = [data for what, data in asked(READ, 0, 16) if what]
        assert piece == bytes(8) + bytes(5) + b"written" + bytes(4)
        ((error, _),) = asked(READ, SIZE_BYTES, 1)
        assert error & 1 << 15
        status = [data for what, data in asked(BLOCK_STATUS, 0, SIZE_BYTES) if what == 6]
        rows = [struct.unpack(f">II{(len(data) - 8) // 8}Q", data) for data in status]
        half = MIB // 2
        assert rows[0] == (1, 6, 4096, 0, MIB - 4096, 3, MIB, 0, MIB, 3, half, 0, SIZE_BYTES - 3 * MIB - half, 3)
        assert rows[1] == (2, 4, 4096, 1, 3 * MIB - 4096, 0, half, 1, SIZE_BYTES - 3 * MIB - half, 0)


# Throw-away disks


def test_a_throw_away_disk_takes_writes_and_is_gone_with_its_last_connection(
    serve: Serve, pool: Pool, disk: Disk
) -> None:
    server = serve()
    with Peer(server.path) as first, Peer(server.path) as second:
        first.enter("web@one?cow")
        assert first.write(0, b"thrown away") == 0
        second.enter("@one?cow")
        assert second.read(0, 11) == b"thrown away"
        with Peer(server.path) as third:
            third.enter("@one?cow=mine")
            assert third.read(0, 11) == bytes(11)
        first.send(bytes.fromhex("25609513") + DISCONNECT.to_bytes(4) + bytes(20))
        assert first.rest() == b""
        assert second.read(0, 5) == b"throw"
        eventually(lambda: len(pool.disks()) == 2)
        with Peer(server.path) as other:
            other.greet()
            assert set(shown(other)) == {"web", f"@{pool.snapshot('one').id}"}
            (made,) = [one for one in pool.disks() if one.name != "web"]
            assert refusal(other, made.name) == Reply.ERR_UNKNOWN
    eventually(lambda: len(pool.disks()) == 1)
    assert pool.snapshot("one").pread(1, 0) == b"\0"


def test_what_a_crash_left_of_throw_away_disks_is_gone_after_the_next_start(
    serve: Serve, pool: Pool, disk: Disk
) -> None:
    name = "snapcore-cow-1-0123456789abcdef"
    pool.create_disk(name, source=pool.snapshot("one"))
    kept = pool.create_disk("snapcore-cow-2-0123456789abcdef", MIB)  # from nothing, so not one of ours
    serve()
    assert {one.name for one in pool.disks()} == {"web", kept.name}


def test_another_server_leaves_throw_away_disks_alone_that_are_in_use(serve: Serve, pool: Pool, disk: Disk) -> None:
    with Peer(serve().path) as peer:
        peer.enter("@one?cow")
        serve()
        assert peer.write(0, b"still there") == 0
        assert len(pool.disks()) == 2


# Who is in whose way


def test_rollback_and_deletion_are_refused_in_the_name_of_the_client(serve: Serve, pool: Pool, disk: Disk) -> None:
    server = serve()
    with Peer(server.path) as peer:
        peer.enter("web")
        for change in (lambda: disk.rollback("one"), disk.delete, disk.reset):
            with pytest.raises(BusyError, match=f"NBD client process {os.getpid()} "):
                change()
        assert peer.write(0, b"x") == 0
        disk.snapshot("under a writer")
    eventually(lambda: server.server.connections == 0)
    disk.rollback("one")
    assert disk.pread(1, 0) == b"\0"


def test_who_only_reads_is_in_nobodys_way(serve: Serve, disk: Disk) -> None:
    with Peer(serve(read_only=True).path) as peer:
        peer.enter("web")
        disk.rollback("one")
        assert peer.read(3 * MIB, 4) == bytes(4)


def test_a_snapshot_that_is_deleted_under_a_reader_is_an_error_for_that_reader_only(
    serve: Serve, pool: Pool, disk: Disk
) -> None:
    server = serve()
    with Peer(server.path) as peer, Peer(server.path) as other:
        peer.enter("@one")
        other.enter("web")
        pool.delete_snapshot("one")
        peer.send(bytes.fromhex("25609513") + bytes(4) + bytes(8) + bytes(8) + (512).to_bytes(4))
        assert int.from_bytes(peer.receive(16)[4:8]) != 0
        assert other.read(MIB, 5) == disk.pread(5, MIB)


def test_a_client_that_vanishes_in_mid_write_changes_at_most_what_it_wrote_and_frees_the_disk(
    serve: Serve, disk: Disk
) -> None:
    server = serve()
    with Peer(server.path) as peer:
        peer.enter("web")
        assert peer.write(0, b"answered") == 0
        header = bytes.fromhex("25609513") + bytes(2) + WRITE.to_bytes(2) + bytes(8)
        peer.send(header + (4096).to_bytes(8) + MIB.to_bytes(4) + b"x" * (MIB // 2))
    before = disk.pread(MIB, 4096 + MIB // 2)
    eventually(lambda: server.server.connections == 0)
    assert disk.pread(4096, 0) == b"answered" + bytes(4088)
    assert disk.pread(MIB, 4096 + MIB // 2) == before
    disk.delete()


def test_a_full_pool_is_no_space_to_the_client_and_reads_go_on(serve: Serve, pool: Pool, disk: Disk) -> None:
    pool.limit_bytes = 2 * MIB
    with Peer(serve().path) as peer:
        peer.enter("web")
        codes = {peer.write(offset, b"x" * MIB) for offset in range(4 * MIB, 8 * MIB, MIB)}
        assert errno.ENOSPC in codes and codes <= {0, errno.ENOSPC}
        assert peer.read(MIB, 100) == disk.pread(100, MIB)
        pool.delete_snapshot("one")
        assert peer.request(WRITE_ZEROES, 0, SIZE_BYTES) == 0
        assert peer.write(0, b"x" * MIB) == 0


def test_snapshots_are_cut_while_clients_write(serve: Serve, pool: Pool, disk: Disk) -> None:
    server, ended = serve(), threading.Event()
    rounds: list[int] = []

    def write() -> None:
        """Each round writes its number to two places, the second one after the first is answered."""
        with Peer(server.path) as peer:
            peer.enter("web")
            number = 0
            while not ended.is_set():
                number += 1
                assert peer.write(0, number.to_bytes(8)) == 0
                assert peer.write(7 * MIB, number.to_bytes(8)) == 0
                rounds.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(20):
        before = len(rounds)
        snapshot = disk.snapshot()
        first, second = (int.from_bytes(snapshot.pread(8, place)) for place in (0, 7 * MIB))
        assert second <= first <= second + 1 and second >= before
        eventually(lambda: len(rounds) > before + 2)  # noqa: B023
    ended.set()
    writer.join()


def test_ten_clones_of_one_snapshot_are_written_at_once_and_each_is_its_own(
    serve: Serve, pool: Pool, disk: Disk
) -> None:
    one = pool.snapshot("one")
    before = one.pread(SIZE_BYTES, 0)
    path = serve().path
    clones = [pool.create_disk(f"clone {number}", source=one) for number in range(10)]

    def write(clone: Disk) -> None:
        with Peer(path) as peer:
            peer.enter(clone.name)
            for place in range(0, SIZE_BYTES, 256 << 10):
                assert peer.write(place + 100, clone.name.encode() * 500) == 0
            assert peer.request(FLUSH) == 0

    writers = [threading.Thread(target=write, args=(clone,)) for clone in clones]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for clone in clones:
        expected = bytearray(before)
        for place in range(0, SIZE_BYTES, 256 << 10):
            expected[place + 100 : place + 100 + 500 * len(clone.name)] = clone.name.encode() * 500
        assert clone.pread(SIZE_BYTES, 0) == bytes(expected)
    assert one.pread(SIZE_BYTES, 0) == before


# Limits


def test_a_slow_client_is_cut_off_and_others_do_not_wait_for_it(serve: Serve, disk: Disk) -> None:
    server = serve(handshake_timeout_s=0.3)
    with Peer(server.path) as silent, Peer(server.path) as slow, Peer(server.path) as quick:
        assert slow.receive(len(GREETING)) == GREETING
        slow.send(flags())
        assert quick.enter("web") == SIZE_BYTES
        # A byte now and then does not make the time longer.
        data = option(Option.LIST) * 100
        assert sent_before_failing(slow, [data[i : i + 1] for i in range(len(data))], pause_s=0.02) < len(data)
        assert silent.rest() == GREETING
        assert quick.read(0, 1) == b"\0"
    reasons = [event.reason for event in server.events if event.kind == "refused"]
    assert len(reasons) == 2 and "too long" in reasons[0]


def test_a_client_that_does_not_take_its_list_is_cut_off(serve: Serve, disk: Disk) -> None:
    server = serve(handshake_timeout_s=0.3)
    with Peer(server.path) as peer:
        peer.greet()
        assert sent_before_failing(peer, [option(Option.LIST)] * 100_000) < 100_000
    eventually(lambda: server.server.connections == 0)


def test_an_idle_client_is_cut_off_and_its_disk_is_free(serve: Serve, disk: Disk) -> None:
    server = serve(idle_timeout_s=0.1)
    with Peer(server.path) as peer:
        peer.enter("web")
        assert peer.rest() == b""
        assert server.events[-1].reason == "idle"
        disk.delete()


def test_more_connections_than_may_be_are_refused(serve: Serve, disk: Disk) -> None:
    server = serve(max_connections=2)
    with Peer(server.path) as first, Peer(server.path) as second:
        first.greet()
        second.greet()
        with Peer(server.path) as third:
            assert third.rest() == b""
        first.socket.close()
        eventually(lambda: server.server.connections < 2)
        with Peer(server.path) as fourth:
            assert fourth.enter("web") == SIZE_BYTES


def test_a_thousand_connections_are_served_side_by_side(serve: Serve, disk: Disk) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("needs 4,096 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    try:
        server = serve(max_connections=1000)
        peers = [Peer(server.path) for _ in range(1000)]
        try:
            for peer in peers[:500]:
                peer.enter("web")
            assert all(peer.read(MIB, 4) == disk.pread(4, MIB) for peer in peers[:500])
            # The other half only looks on.
            eventually(lambda: server.server.connections == 1000)
            assert peers[499].write(0, b"x") == 0
        finally:
            for peer in peers:
                peer.socket.close()
        eventually(lambda: server.server.connections == 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_client_that_breaks_the_protocol_is_cut_off_alone(serve: Serve, disk: Disk) -> None:
    server = serve()
    with Peer(server.path) as broken, Peer(server.path) as whole:
        broken.enter("web")
        whole.enter("web")
        broken.send(b"GET / HTTP/1.1\r\n\r\n and more than a request")
        assert broken.rest() == b""
        assert whole.read(MIB, 4) == disk.pread(4, MIB)


def header(kind: int, length: int, *, cookie: int = 7) -> bytes:
    """A request from offset 0 on."""
    return struct.pack(">IHHQQI", 0x25609513, 0, kind, cookie, 0, length)


@pytest.mark.parametrize(
    "early",
    [
        header(READ, 512) * 8,
        option(Option.LIST) + option(Option.ABORT),
        flags() + header(READ, 512) * 8,
        flags() + flags() * 8,
        flags() + go("web")[8:] + go("web"),
    ],
    ids=["a request before the flags", "options before the flags", "a request as an option", "flags again", "a tail"],
)
def test_what_comes_before_its_time_ends_that_session_alone(serve: Serve, disk: Disk, early: bytes) -> None:
    server = serve()
    with Peer(server.path) as other, Peer(server.path) as hasty:
        other.enter("web")
        hasty.send(early)
        # The greeting, and no byte of the disk.
        assert hasty.rest() == GREETING
        assert other.read(MIB, 4) == disk.pread(4, MIB)
    eventually(lambda: server.server.connections == 0)
    assert [event.export for event in server.events if event.kind == "connected"] == ["web"]


@pytest.mark.parametrize("late", [option(Option.LIST) * 2, go("web") * 2, flags() + bytes(28)])
def test_what_belongs_to_the_handshake_ends_a_session_that_is_beyond_it(serve: Serve, disk: Disk, late: bytes) -> None:
    server = serve()
    with Peer(server.path) as other, Peer(server.path) as slow:
        other.enter("web")
        slow.enter("web")
        slow.send(late)
        assert slow.rest() == b""
        assert other.read(MIB, 4) == disk.pread(4, MIB)


def test_a_read_that_is_too_long_is_an_error_and_a_write_the_end(serve: Serve, disk: Disk) -> None:
    server = serve()
    with Peer(server.path) as other, Peer(server.path) as greedy:
        other.enter("web")
        greedy.enter("web")
        for length in ((32 << 20) + 1, (1 << 32) - 1):
            assert greedy.request(READ, 0, length) == errno.EINVAL
        assert greedy.read(MIB, 4) == disk.pread(4, MIB)
        greedy.send(header(WRITE, (1 << 32) - 1))
        assert greedy.rest() == b""
        assert other.read(MIB, 4) == disk.pread(4, MIB)
    assert disk.pread(4, 0) == bytes(4)


def test_a_client_that_says_no_more_gets_its_answers_and_frees_its_disk(serve: Serve, disk: Disk) -> None:
    server = serve()
    with Peer(server.path) as peer:
        peer.enter("web")
        peer.send(header(WRITE, 5, cookie=1) + b"first" + header(FLUSH, 0, cookie=2) + header(READ, 5, cookie=3))
        peer.socket.shutdown(socket.SHUT_WR)
        found = {}
        for _ in range(3):
            magic, error, cookie = struct.unpack(">IIQ", peer.receive(16))
            assert (magic, error) == (0x67446698, 0)
            found[cookie] = peer.receive(5) if cookie == 3 else b""
        assert found == {1: b"", 2: b"", 3: b"first"} and peer.rest() == b""
        eventually(lambda: server.server.connections == 0)
    disk.delete()


def test_a_machine_that_is_gone_without_a_word_is_noticed_by_the_system(serve: Serve, disk: Disk) -> None:
    """Half-open connections: the options of the server's own end say that TCP asks now and then."""
    server = serve(listen=["tcp:127.0.0.1:0"])
    port = int(server.server.uris[0].split(":")[2][:-1])
    with Peer(("127.0.0.1", port)) as peer:
        peer.enter("web")
        own = peer.socket.getsockname()
        found = 0
        for name in os.listdir("/proc/self/fd"):
            try:
                end = socket.socket(fileno=os.dup(int(name)))
            except OSError:
                continue
            with end:
                try:
                    is_servers = end.getpeername() == own
                except OSError:
                    continue
                if is_servers:
                    found += 1
                    assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                    assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60
        assert found == 1


# The end


def test_stop_ends_all_connections_and_what_was_answered_is_durable(folder: Path, pool: Pool, disk: Disk) -> None:
    path = folder / "socket"
    server = NbdServer(pool, listen=[f"unix:{path}"])
    server.start()
    with Peer(path) as inside, Peer(path) as outside:
        inside.enter("web")
        outside.greet()
        assert inside.write(0, b"kept") == 0
        server.stop()
        assert (inside.rest(), outside.rest()) == (b"", b"")
        assert server.connections == 0 and not path.exists()
        with pytest.raises(FileNotFoundError):
            Peer(path)
    assert pool._engine.core.pending_bytes == 0
    disk.rollback("one")


def test_stop_cuts_off_who_does_not_take_answers(folder: Path, pool: Pool, disk: Disk) -> None:
    path = folder / "socket"
    server = NbdServer(pool, listen=[f"unix:{path}"])
    server.start()
    with Peer(path) as peer:
        peer.enter("web")
        request = bytes.fromhex("25609513") + bytes(20) + MIB.to_bytes(4)
        peer.socket.settimeout(0.2)
        assert sent_before_failing(peer, [request] * 100_000) < 100_000
        server.stop(grace_s=0.1)
        assert server.connections == 0


def test_a_pool_can_be_closed_and_opened_after_stop(folder: Path, pool: Pool, disk: Disk) -> None:
    with NbdServer(pool, listen=[f"unix:{folder}/socket"]), Peer(folder / "socket") as peer:
        peer.enter("web")
        assert peer.write(0, b"kept") == 0
    pool.close()
    with Pool.open(folder / "pool") as again:
        assert again.open_disk("web").pread(4, 0) == b"kept"


# Listening


def test_a_socket_left_behind_is_replaced_and_one_in_use_is_not(serve: Serve, folder: Path, disk: Disk) -> None:
    path = folder / "socket"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    assert path.is_socket()
    first = serve(listen=[f"unix:{path}"])
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(BusyError, match="listens"):
        serve(listen=[f"unix:{path}"])
    with Peer(path) as peer:
        peer.greet()
    first.server.stop()
    path.write_text("something of somebody's")
    with pytest.raises(BusyError):
        serve(listen=[f"unix:{path}"])
    assert path.read_text() == "something of somebody's"


def test_a_socket_that_another_one_has_taken_the_place_of_is_left_to_it(serve: Serve, folder: Path, disk: Disk) -> None:
    path = folder / "socket"
    first = serve(listen=[f"unix:{path}"])
    path.unlink()
    serve(listen=[f"unix:{path}"])
    first.server.stop()
    with Peer(path) as peer:
        assert peer.enter("web") == SIZE_BYTES


def test_tcp_is_listened_to_and_clients_are_told_apart_by_their_ports(serve: Serve, disk: Disk) -> None:
    server = serve(listen=["tcp:127.0.0.1:0"])
    (uri,) = server.server.uris
    port = int(uri.removeprefix("nbd://127.0.0.1:").removesuffix("/"))
    with Peer(("127.0.0.1", port)) as peer:
        assert peer.enter("web") == SIZE_BYTES
        own = peer.socket.getsockname()[1]
        with pytest.raises(BusyError, match=f"NBD client 127.0.0.1:{own}"):
            disk.delete()
    with pytest.raises(BusyError, match="in use"):
        serve(listen=[f"tcp:127.0.0.1:{port}"])


@pytest.mark.parametrize(
    "where", ["", "unix:", "tcp:", "tcp:localhost", "tcp:localhost:http", "tcp:localhost:99999", "udp:localhost:1"]
)
def test_addresses_that_are_none_are_refused(serve: Serve, where: str) -> None:
    with pytest.raises(UsageError):
        serve(listen=[where])


def test_a_path_that_is_too_long_or_nowhere_is_refused(serve: Serve, folder: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        serve(listen=[f"unix:{folder}/{'x' * 200}"])
    with pytest.raises(NotFoundError):
        serve(listen=[f"unix:{folder}/nothing/socket"])


def test_sockets_of_systemd_are_used(folder: Path, pool: Pool) -> None:
    """In a process of its own, whose third descriptor is a listening socket."""
    code = f"""
import os, socket, sys
made = socket.socket(socket.AF_UNIX)
made.bind({str(folder / "socket")!r})
made.listen()
if made.fileno() != 3:
    os.dup2(made.fileno(), 3)
from snapcore.server.nbd import NbdServer, listening
assert listening.activated({{"LISTEN_PID": "1", "LISTEN_FDS": "1"}}) == []
found = listening.activated({{"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}})
with NbdServer(images={{"raw": {str(folder / "image")!r}}}, listeners=found) as server:
    print(*server.uris, flush=True)
    sys.stdin.read()
"""
    (folder / "image").write_bytes(bytes(5000))
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == f"nbd+unix:///?socket={str(folder).replace('/', '/')}/socket\n"
        with Peer(folder / "socket") as peer:
            assert peer.enter("raw") == 5000
    assert child.returncode == 0
    # It is systemd's, not ours to remove.
    assert (folder / "socket").is_socket()


def test_a_descriptor_that_is_no_socket_is_refused() -> None:
    code = """
import os
from snapcore.errors import UsageError
from snapcore.server.nbd import listening
os.dup2(1, 3)
try:
    listening.activated({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"})
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "no socket" in done.stdout


def test_nothing_is_left_open_when_a_start_fails(folder: Path, pool: Pool, disk: Disk) -> None:
    (folder / "image").write_bytes(bytes(4096))
    server = NbdServer(pool, listen=[f"unix:{folder}/one", "unix:"], images={"raw": folder / "image"})
    with pytest.raises(UsageError):
        server.start()
    assert not (folder / "one").exists()
    server.stop()
    assert listening.activated({}) == []
    with pytest.raises(NotFoundError):
        NbdServer(pool, listen=[f"unix:{folder}/one"], images={"raw": folder / "nothing"})


def test_names_of_any_letters_are_exports(serve: Serve, pool: Pool) -> None:
    name = "größe €"
    pool.create_disk(name, MIB)
    pool.create_disk("other", MIB)
    with Peer(serve().path) as peer:
        peer.greet()
        assert name in shown(peer)
        peer.send(option(Option.GO, string(name) + bytes(2)))
        assert peer.answer().reply == Reply.INFO


def test_a_pool_that_is_open_for_reading_is_served_for_reading(folder: Path, pool: Pool, disk: Disk) -> None:
    data = disk.pread(100, MIB)
    pool.close()
    with Pool.open(folder / "pool", read_only=True) as again:
        with NbdServer(again, listen=[f"unix:{folder}/socket"]), Peer(folder / "socket") as peer:
            peer.enter("web")
            assert peer.read(MIB, 100) == data
            assert peer.write(0, b"x") == EPERM
            assert peer.request(FLUSH) == 0
