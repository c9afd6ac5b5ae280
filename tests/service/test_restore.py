"""A restore into a disk of a pool writes what differs, looks only where it may, and has the disk for itself."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import BusyError, CancelledError, ExistsError, MemoryStore, RefusedError, Repository
from snapcore.pool import Pool
from snapcore.service import Archives, into_disk, into_new_disk
from tests.support.tiers import CHUNK, PAGE, archived_bytes, disk, local_bytes, quick_pool, scribble


def test_only_what_differs_is_looked_at_and_written_when_a_twin_is_there(pool: Pool, repository: Repository) -> None:
    web = disk(pool, "web", 400)
    with Archives(pool) as archives:
        first = archives.archive(repository, web).result()
        web.pwrite(bytes(PAGE), 2 * CHUNK)
        web.pwrite(b"second", 300 * CHUNK)
        archives.archive(repository, web).result()
    web.pwrite(b"third", 100 * CHUNK)
    done = into_disk(pool, web, repository, first.archived)
    assert local_bytes(web) == archived_bytes(repository, first.archived)
    assert done.written_bytes == 3 * PAGE and done.looked_at_bytes is not None and done.looked_at_bytes <= 3 * CHUNK


def test_without_a_twin_the_bytes_are_compared(pool: Pool, repository: Repository) -> None:
    web = disk(pool, "web")
    with Archives(pool) as archives:
        first = archives.archive(repository, web).result()
    pool.delete_snapshot(first.local)
    before = archived_bytes(repository, first.archived)
    web.pwrite(b"x", 5)
    done = into_disk(pool, web, repository, first.archived)
    assert (done.written_bytes, done.looked_at_bytes) == (PAGE, None) and local_bytes(web) == before


def test_a_disk_grows_to_the_snapshot_and_never_shrinks(pool: Pool, repository: Repository) -> None:
    web, small = disk(pool, "web", 20), disk(pool, "small", 3, 7)
    with Archives(pool) as archives:
        done = archives.archive(repository, web).result()
        tiny = archives.archive(repository, small).result()
    into_disk(pool, small, repository, done.archived)
    assert local_bytes(small) == local_bytes(web)
    with pytest.raises(RefusedError, match="does not become shorter"):
        into_disk(pool, web, repository, tiny.archived)


def test_a_disk_that_somebody_uses_is_refused_and_nobody_comes_in_meanwhile(pool: Pool, repository: Repository) -> None:
    web = disk(pool, "web")
    with Archives(pool) as archives:
        done = archives.archive(repository, web).result()
    scribble(web, 1)
    with web.attached("a guest"), pytest.raises(BusyError, match="a guest"):
        into_disk(pool, web, repository, done.archived)

    def intrude(_: object) -> None:
        with pytest.raises(BusyError, match="the restore of"), web.attached("a guest"):
            pass
        with pytest.raises(BusyError, match="the restore of"):
            pool.delete_disk(web)

    into_disk(pool, web, repository, done.archived, intrude)
    with web.attached("a guest"):
        assert local_bytes(web) == local_bytes(done.local)


def test_a_new_disk_is_whole_or_not_there(pool: Pool, repository: Repository) -> None:
    web = disk(pool, "web")
    with Archives(pool) as archives:
        done = archives.archive(repository, web).result()
    made = into_new_disk(pool, "copy", repository, done.archived).disk
    assert local_bytes(made) == local_bytes(web) and made.name == "copy"
    with pytest.raises(ExistsError):
        into_new_disk(pool, "copy", repository, done.archived)

    def cancel(_: object) -> None:
        raise CancelledError("enough")

    with pytest.raises(CancelledError):
        into_new_disk(pool, "other", repository, done.archived, cancel)
    # As a crash would leave it.
    pool.create_disk("other.snapcore-restore", 4096)
    assert local_bytes(into_new_disk(pool, "other", repository, done.archived).disk) == local_bytes(web)
    assert {item.name for item in pool.disks()} == {"web", "copy", "other"}


@given(st.integers(0, 2**32), st.sampled_from([PAGE, CHUNK]))
def test_any_disk_becomes_any_snapshot_of_its_family(seed: int, chunk_bytes: int) -> None:
    dice = random.Random(seed)
    repository = Repository.create(MemoryStore(), chunk_bytes=chunk_bytes)
    with quick_pool() as pool, Archives(pool) as archives:
        web = disk(pool, "web", 6, seed)
        done = []
        for step in range(3):
            done.append(archives.archive(repository, web).result())
            scribble(web, seed + step, 2)
            if dice.random() < 0.3:
                web.rollback(dice.choice(pool.snapshots("web")))
        expected = [archived_bytes(repository, item.archived) for item in done]
        if dice.random() < 0.5:
            archives.delete_snapshots([dice.choice(pool.snapshots())])
        target = web.clone("clone") if dice.random() < 0.5 else web
        for number in dice.sample(range(3), 3):
            into_disk(pool, target, repository, done[number].archived)
            assert local_bytes(target) == expected[number]
            scribble(target, seed + number, 1)
