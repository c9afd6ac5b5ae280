"""Blocks are listed in pages, compared across the tiers, read with a checksum and written with one."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import (
    ChecksumError,
    ConflictError,
    DamagedError,
    ExpiredError,
    MemoryStore,
    NotFoundError,
    Repository,
    UsageError,
)
from snapcore.pool import Pool
from snapcore.service import Archives, Local, Remote, Staging, list_blocks, list_changed_blocks, read_block
from snapcore.service.blocks import checksum
from snapcore.service.tiers import Side
from tests.support.tiers import CHUNK, PAGE, archived_bytes, disk, local_bytes, quick_pool, scribble


def content(side: Side) -> bytes:
    """All bytes of a side."""
    data = bytearray(side.size_bytes)
    side.read_into(memoryview(data), 0)
    return bytes(data)


def differing(a: bytes, b: bytes, block_bytes: int) -> set[int]:
    """Numbers of the blocks that differ; behind its end a disk is zero."""
    length = max(len(a), len(b))
    a, b = a.ljust(length, b"\0"), b.ljust(length, b"\0")
    return {
        at // block_bytes
        for at in range(0, length, block_bytes)
        if a[at : at + block_bytes] != b[at : at + block_bytes]
    }


@given(st.integers(0, 2**32), st.sampled_from([1, 3, 10_000]))
def test_any_two_snapshots_of_any_tier_are_compared_rightly(seed: int, page_blocks: int) -> None:
    dice = random.Random(seed)
    places = [Repository.create(MemoryStore(), chunk_bytes=size) for size in (PAGE, PAGE, 16 << 10)]
    with quick_pool() as pool, Archives(pool) as archives:
        web, stranger = disk(pool, "web", 3, seed), disk(pool, "other", 4, seed + 1)
        sides: list[Side] = []
        for step in range(3):
            for place in dice.sample(places, 2):
                done = archives.archive(place, web).result()
                sides += [Remote(done.archived, place), Local(done.local, pool)]
            scribble(web, seed + step, 2)
            if step == 1:
                web.resize(web.size_bytes + dice.randrange(3 * CHUNK))
        sides += [Local(web, pool), Local(stranger, pool)]
        a, b = dice.sample(sides, 2)
        pages = list(list_changed_blocks(a, b, page_blocks=page_blocks))
        size = pages[0].block_bytes
        found = [block for page in pages for block in page.blocks]
        exact = differing(content(a), content(b), size)
        assert found == sorted({*found}) and exact <= {*found}
        if not (isinstance(a, Local) and isinstance(b, Local)):
            assert {*found} == exact
        # From any page on one can go on.
        cut = dice.randrange(len(pages))
        start = 0 if cut == 0 else pages[cut - 1].next_block
        assert start is not None
        again = [
            block for page in list_changed_blocks(a, b, start=start, page_blocks=page_blocks) for block in page.blocks
        ]
        assert again == [block for block in found if block >= start]
        listed = {block for page in list_blocks(b, page_blocks=page_blocks, block_bytes=size) for block in page.blocks}
        assert differing(b"", content(b), size) <= listed


def test_pages_are_as_long_as_asked_for_and_the_last_one_says_so(pool: Pool) -> None:
    web = Local(disk(pool, "web", 10), pool)
    pages = list(list_blocks(web, block_bytes=CHUNK, page_blocks=2))
    assert [page.blocks for page in pages] == [[0, 2], [4, 6], [8]]
    assert [page.next_block for page in pages] == [4, 8, None]
    assert pages[0].size_bytes == web.size_bytes
    assert [page.blocks for page in list_blocks(web, block_bytes=CHUNK, start=9)] == [[]]
    for wrong in (0, 10_001):
        with pytest.raises(UsageError):
            list(list_blocks(web, page_blocks=wrong))


def test_a_block_comes_with_its_checksum_and_the_last_one_is_shorter(pool: Pool, repository: Repository) -> None:
    web = disk(pool, "web", 10)
    with Archives(pool) as archives:
        done = archives.archive(repository, web).result()
    for side in (Local(web, pool), Remote(done.archived, repository)):
        found = read_block(side, 4, block_bytes=CHUNK)
        assert found.data == local_bytes(web)[4 * CHUNK : 5 * CHUNK]
        assert base64.b64decode(found.checksum) == hashlib.sha256(found.data).digest()
        assert len(read_block(side, 10, block_bytes=CHUNK).data) == 777
        for index in (-1, 11):
            with pytest.raises(UsageError):
                read_block(side, index, block_bytes=CHUNK)
    for wrong in (PAGE, 3 * CHUNK, 8 << 20):
        with pytest.raises(UsageError):
            read_block(Remote(done.archived, repository), 0, block_bytes=wrong)


@pytest.fixture
def staging(repository: Repository, tmp_path: Path) -> Staging:
    """Snapshots of the repository that are written block by block."""
    return Staging(repository, tmp_path / "state")


def linear(blocks: dict[int, bytes]) -> str:
    """Checksum of all blocks together."""
    digests = b"".join(hashlib.sha256(blocks[index]).digest() for index in sorted(blocks))
    return base64.b64encode(hashlib.sha256(digests).digest()).decode()


@pytest.mark.parametrize("block_bytes", [PAGE, CHUNK, 4 * CHUNK])
def test_a_snapshot_is_written_block_by_block_over_its_parent(
    staging: Staging, repository: Repository, block_bytes: int
) -> None:
    dice = random.Random(block_bytes)
    size = 20 * CHUNK + 777
    expected = bytearray(size)
    parent = None
    for _ in range(3):
        size += dice.randrange(3 * CHUNK)
        expected.extend(bytes(size - len(expected)))
        session = staging.start("web", size, parent=parent, block_bytes=block_bytes, label=None, tags={"by": "blocks"})
        last = (size - 1) // block_bytes
        blocks = {}
        for index in {*dice.sample(range(last), min(last, 4)), last}:
            at = index * block_bytes
            length = min(block_bytes, size - at)
            data = bytes(length) if dice.random() < 0.3 else dice.randbytes(length)
            blocks[index] = expected[at : at + length] = data
        for index, data in blocks.items():
            staging.put_block(session.id, index, data, checksum(data))
        made = staging.complete(session.id, len(blocks), linear(blocks))
        assert archived_bytes(repository, made) == bytes(expected)
        assert made.parent == parent and made.tags == {"by": "blocks"}
        parent = made.id
    assert staging.sessions() == []
    assert repository.verify().ok


def test_what_is_wrong_is_told_by_kind_and_leaves_what_is_there(staging: Staging, repository: Repository) -> None:
    with pytest.raises(NotFoundError):
        staging.start("web", CHUNK, parent="abcdef")
    with pytest.raises(UsageError):
        staging.start("web")
    session = staging.start("web", 3 * CHUNK)
    one, two = os.urandom(CHUNK), os.urandom(CHUNK)
    with pytest.raises(ChecksumError):
        staging.put_block(session.id, 0, one, checksum(two))
    with pytest.raises(UsageError, match="base64"):
        staging.put_block(session.id, 0, one, "nonsense")
    with pytest.raises(UsageError, match="bytes"):
        staging.put_block(session.id, 0, one[1:], checksum(one[1:]))
    for index in (-1, 3):
        with pytest.raises(UsageError, match="not inside"):
            staging.put_block(session.id, index, one, checksum(one))
    staging.put_block(session.id, 0, one, checksum(one))
    staging.put_block(session.id, 0, one, checksum(one))
    with pytest.raises(ConflictError):
        staging.put_block(session.id, 0, two, checksum(two))
    with pytest.raises(ChecksumError, match="1 blocks"):
        staging.complete(session.id, 2)
    with pytest.raises(ChecksumError, match="together"):
        staging.complete(session.id, 1, linear({0: two}))
    made = staging.complete(session.id, 1, linear({0: one}))
    assert archived_bytes(repository, made) == one + bytes(2 * CHUNK)
    with pytest.raises(NotFoundError, match="completed"):
        staging.put_block(session.id, 1, two, checksum(two))
    assert staging.complete(session.id, 1) == made, "completing again gives the same"
    for wrong in ("0" * 32, "../../etc"):
        with pytest.raises(NotFoundError):
            staging.put_block(wrong, 0, one, checksum(one))
        with pytest.raises(NotFoundError):
            staging.complete(wrong, 1)


def test_the_parent_must_be_there_in_the_end(staging: Staging, repository: Repository) -> None:
    first = staging.start("web", CHUNK)
    data = os.urandom(CHUNK)
    staging.put_block(first.id, 0, data, checksum(data))
    parent = staging.complete(first.id, 1)
    session = staging.start("web", parent=parent.id)
    repository.delete(parent)
    with pytest.raises(NotFoundError, match=parent.id):
        staging.complete(session.id, 0)


def test_what_nobody_goes_on_with_is_given_up(staging: Staging, tmp_path: Path) -> None:
    sessions = [staging.start("web", CHUNK, timeout_s=60) for _ in range(3)]
    for session in sessions[:2]:
        (log,) = (tmp_path / "state").glob(f"*/{session.id}/log")
        os.utime(log, (0, 0))
    data = os.urandom(CHUNK)
    with pytest.raises(ExpiredError):
        staging.put_block(sessions[0].id, 0, data, checksum(data))
    staging.start("other", CHUNK)
    assert {item.id for item in staging.sessions()} & {item.id for item in sessions} == {sessions[2].id}
    staging.cancel(sessions[2].id)
    with pytest.raises(NotFoundError):
        staging.cancel(sessions[2].id)


def test_another_process_goes_on_and_what_a_power_cut_took_is_named(
    staging: Staging, repository: Repository, tmp_path: Path
) -> None:
    session = staging.start("web", 4 * CHUNK)
    blocks = {index: os.urandom(CHUNK) for index in range(4)}
    staging.put_block(session.id, 0, blocks[0], checksum(blocks[0]))
    other = Staging(repository, tmp_path / "state")
    (log,) = (tmp_path / "state").glob("*/*/log")
    with log.open("ab") as file:
        file.write(b"half a record")
    other.put_block(session.id, 1, blocks[1], checksum(blocks[1]))
    staging.put_block(session.id, 2, blocks[2], checksum(blocks[2]))
    with pytest.raises(ConflictError):
        staging.put_block(session.id, 1, blocks[0], checksum(blocks[0]))
    (data,) = (tmp_path / "state").glob("*/*/data")
    os.truncate(data, 2 * CHUNK + 5)
    with pytest.raises(DamagedError, match="block 2"):
        other.complete(session.id, 3)
    assert repository.snapshots() == []


def test_a_completion_that_a_crash_cut_off_behind_the_commit_makes_no_second_one(
    staging: Staging, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = staging.start("web", CHUNK)
    data = os.urandom(CHUNK)
    staging.put_block(session.id, 0, data, checksum(data))
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "_remove", lambda *_: None)
        made = staging.complete(session.id, 1)
    assert [item.id for item in staging.sessions()] == [session.id]
    assert staging.complete(session.id, 1) == made and len(repository.snapshots()) == 1


def test_many_threads_put_blocks_at_once(staging: Staging, repository: Repository) -> None:
    session = staging.start("web", 32 * PAGE, block_bytes=PAGE)
    blocks = {index: os.urandom(PAGE) for index in range(32)}

    def put(numbers: range) -> None:
        for index in numbers:
            staging.put_block(session.id, index, blocks[index], checksum(blocks[index]))

    threads = [threading.Thread(target=put, args=(range(first, 32, 3),)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = staging.complete(session.id, 32, linear(blocks))
    assert archived_bytes(repository, made) == b"".join(blocks[index] for index in range(32))


def test_a_damaged_session_is_an_error(staging: Staging, tmp_path: Path) -> None:
    session = staging.start("web", CHUNK)
    (log,) = (tmp_path / "state").glob("*/*/log")
    log.write_bytes(b"\xff" * 40)
    with pytest.raises(DamagedError, match="names a block"):
        staging.complete(session.id, 0)
    (path,) = (tmp_path / "state").glob("*/*/session")
    path.write_bytes(b"{}")
    with pytest.raises(DamagedError):
        staging.complete(session.id, 0)
    assert staging.sessions() == []
