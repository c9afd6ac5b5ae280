"""A pool's snapshot is archived from what changed alone, whatever was deleted, renamed or rolled back before."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapcore import (
    CancelledError,
    DamagedError,
    LocalStore,
    MemoryStore,
    NotFoundError,
    Progress,
    RefusedError,
    Repository,
    StoreError,
    UsageError,
)
from snapcore.extents import Extents
from snapcore.persist import Buffer
from snapcore.pool import Disk, Pool, Snapshot
from snapcore.service import Archives
from tests.support.tiers import CHUNK, PAGE, archived_bytes, disk, local_bytes, scribble


def archived(pool: Pool, repository: Repository, version: Disk) -> str:
    """Archive a disk as it is, check the bytes, and return the archived id."""
    with Archives(pool) as archives:
        done = archives.archive(repository, version).result()
    assert archived_bytes(repository, done.archived) == local_bytes(done.local)
    return done.archived.id


class Gate(MemoryStore):
    """A store whose packs wait for somebody to open it, or fail."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.fails = False
        self.opened.set()

    def put_new(self, name: str, buffers: list[Buffer]) -> int:  # type: ignore[override]
        if name.startswith("packs/"):
            self.reached.set()
            self.opened.wait(30)
            if self.fails:
                raise StoreError(f"{name}: the region is gone")
        return super().put_new(name, buffers)


def test_the_first_archive_reads_what_is_mapped_and_the_next_one_what_changed(
    pool: Pool, repository: Repository
) -> None:
    web = disk(pool, "web")
    with Archives(pool) as archives:
        first = archives.archive(repository, web, name="first").result()
        assert first.archived.label == "first" and first.read_bytes == 20 * CHUNK and first.base is None
        assert first.fallback_reason is None
        web.pwrite(b"new", 3 * CHUNK)
        web.pwrite(b"new", 8 * CHUNK)
        second = archives.archive(repository, web).result()
    assert second.read_bytes == 2 * CHUNK and second.archived.parent == first.archived.id
    assert second.base is not None and second.base.local is first.local
    assert second.archived.changed_bytes == 2 * CHUNK
    assert archived_bytes(repository, second.archived) == local_bytes(web)


def test_writes_after_the_cut_are_not_in_the_archive(pool: Pool) -> None:
    store = Gate()
    repository = Repository.create(store)
    web = disk(pool, "web")
    before = local_bytes(web)
    store.opened.clear()
    with Archives(pool) as archives:
        begun = archives.archive(repository, web)
        assert store.reached.wait(30) and begun.state == "progressing"
        web.pwrite(b"later", 0)
        store.opened.set()
        done = begun.result()
        assert begun.state == "accomplished"
    assert archived_bytes(repository, done.archived) == before != local_bytes(web)


def test_a_discarded_piece_of_a_chunk_leaves_the_rest_of_it(pool: Pool, repository: Repository) -> None:
    web = disk(pool, "web", 100)
    archived(pool, repository, web)
    # Long enough for a look at the map, and on no border of a chunk.
    web.discard(4 * CHUNK + PAGE, 40 * CHUNK)
    archived(pool, repository, web)


def test_a_disk_that_grew_is_archived_to_its_new_end(pool: Pool, repository: Repository) -> None:
    web = disk(pool, "web", 10)
    archived(pool, repository, web)
    web.resize(300 * CHUNK)
    web.pwrite(b"end", 300 * CHUNK - 3)
    archived(pool, repository, web)


def test_a_rolled_back_disk_is_compared_with_what_it_was_rolled_back_to(pool: Pool, repository: Repository) -> None:
    web = disk(pool, "web")
    with Archives(pool) as archives:
        cuts = []
        for seed in range(4):
            cuts.append(archives.archive(repository, web).result())
            scribble(web, seed)
        web.rollback(cuts[1].local)
        web.pwrite(b"x", 0)
        done = archives.archive(repository, web).result()
    assert done.base is not None and done.base.archived.id == cuts[1].archived.id and done.read_bytes == CHUNK
    assert archived_bytes(repository, done.archived) == local_bytes(web)


def test_a_clone_and_a_renamed_disk_are_compared_with_the_disk_that_they_come_from(
    pool: Pool, repository: Repository
) -> None:
    web = disk(pool, "web")
    archived(pool, repository, web)
    pool.rename_disk(web, "shop")
    test = web.clone("test")
    for item in (web, test):
        item.pwrite(item.name.encode(), 2 * CHUNK)
        with Archives(pool) as archives:
            done = archives.archive(repository, item).result()
        assert (done.archived.disk, done.read_bytes) == (item.name, CHUNK)
        assert archived_bytes(repository, done.archived) == local_bytes(item)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
@pytest.mark.parametrize("tier", ["local", "archived", "both"])
def test_whatever_is_deleted_the_others_and_the_next_one_are_right(
    pool: Pool, repository: Repository, order: tuple[int, ...], tier: str
) -> None:
    web = disk(pool, "web")
    contents = []
    with Archives(pool) as archives:
        cuts = []
        for seed in range(3):
            cuts.append(archives.archive(repository, web).result())
            contents.append(local_bytes(web))
            scribble(web, seed)
        gone: set[int] = set()
        for number in order:
            if tier in ("local", "both"):
                archives.delete_snapshots([cuts[number].local])
            if tier in ("archived", "both"):
                repository.delete(cuts[number].archived)
                repository.collect()
            gone.add(number)
            scribble(web, 10 + number)
            done = archives.archive(repository, web).result()
            assert archived_bytes(repository, done.archived) == local_bytes(web)
            assert done.base is not None
            for other in {0, 1, 2} - gone:
                assert local_bytes(cuts[other].local) == contents[other]
                assert archived_bytes(repository, cuts[other].archived) == contents[other]
    assert repository.verify().ok


def test_without_a_twin_everything_is_read_and_the_reason_is_given(pool: Pool, repository: Repository) -> None:
    web = disk(pool, "web")
    with Archives(pool) as archives:
        first = archives.archive(repository, web).result()
        pool.delete_snapshot(first.local)
        scribble(web, 1)
        done = archives.archive(repository, web).result()
    assert done.base is None and done.fallback_reason is not None and "common origin" in done.fallback_reason
    assert archived_bytes(repository, done.archived) == local_bytes(web)


def test_a_lost_journal_costs_a_look_at_the_chain_only(pool: Pool, repository: Repository) -> None:
    web = disk(pool, "web")
    archived(pool, repository, web)
    os.unlink(os.path.join(pool.path, "archives"))
    web.pwrite(b"new", 0)
    with Archives(pool) as archives:
        done = archives.archive(repository, web).result()
    assert done.base is not None and done.read_bytes == CHUNK


def test_a_damaged_journal_is_an_error_that_says_what_to_do(pool: Pool) -> None:
    Path(pool.path, "archives").write_bytes(b"{")
    with pytest.raises(DamagedError, match="Remove it"):
        Archives(pool)


def test_copies_of_a_pool_that_went_on_apart_are_not_taken_for_each_other(folder: Path, repository: Repository) -> None:
    with Pool.create(folder / "one", background=False) as one:
        disk(one, "web")
    shutil.copytree(folder / "one", folder / "two")
    for name in ("one", "two"):
        with Pool.open(folder / name, background=False) as pool:
            web = pool.open_disk("web")
            # The same number of a snapshot in both, with other bytes.
            web.pwrite(name.encode() * 1000, 0)
            archived(pool, repository, web)
            web.pwrite(b"more", 9 * CHUNK)
            archived(pool, repository, web)
    with Pool.open(folder / "one", background=False) as pool:
        shutil.copyfile(folder / "two" / "archives", folder / "one" / "archives")
        archived(pool, repository, pool.open_disk("web"))


def test_a_list_of_changes_that_is_untrue_is_found_and_everything_is_read(
    pool: Pool, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = disk(pool, "web", 10)
    archived(pool, repository, web)
    scribble(web, 1)
    diff_parts = Pool.diff_parts
    monkeypatch.setattr(Pool, "diff_parts", lambda *words: [part[:0] for part in diff_parts(*words)])
    with Archives(pool) as archives:
        done = archives.archive(repository, web).result()
    assert done.fallback_reason is not None and "everything was read" in done.fallback_reason
    assert archived_bytes(repository, done.archived) == local_bytes(web)


def test_patches_come_from_the_map_and_what_they_rest_on_is_not_read(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    repository = Repository.create(store)
    web = pool.create_disk("web", 300 * CHUNK)
    web.pwrite(os.urandom(300 * CHUNK), 0)
    archived(pool, repository, web)
    asked: list[int] = []
    get_range = store.get_range

    def counted(name: str, offset_bytes: int, length_bytes: int) -> bytes:
        if name.startswith("packs/"):
            asked.append(length_bytes)
        return get_range(name, offset_bytes, length_bytes)

    for turn in range(3):
        for chunk in range(turn, 300, 3):
            web.pwrite(os.urandom(PAGE), chunk * CHUNK + (chunk + turn) % 16 * PAGE)
        web.pwrite(os.urandom(3 * CHUNK), turn * 40 * CHUNK + 5000)
        monkeypatch.setattr(store, "get_range", counted)
        with Archives(pool) as archives:
            done = archives.archive(repository, web).result()
        monkeypatch.undo()
        assert done.fallback_reason is None
        # Of a piece (at most 64 chunks) one chunk is compared, through a patch two; the rest is nodes and patches.
        assert sum(length > CHUNK // 2 for length in asked) <= 2 * 3, asked
        asked.clear()
        assert done.archived.stored_bytes < 1.3 * (100 * PAGE + 4 * CHUNK)
        assert archived_bytes(repository, done.archived) == local_bytes(done.local)
    assert not repository.verify().problems


def test_a_map_that_is_untrue_within_a_chunk_is_found_and_everything_is_read(
    pool: Pool, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = disk(pool, "web")
    archived(pool, repository, web)
    for chunk in range(0, 40, 2):
        web.pwrite(b"told", chunk * CHUNK)
        web.pwrite(b"not told", chunk * CHUNK + 5 * PAGE)
    diff_parts = pool.diff_parts

    def untrue(one: Snapshot, other: Snapshot) -> Iterator[Extents]:
        for rows in diff_parts(one, other):
            yield rows[rows[:, 0] % CHUNK == 0]

    monkeypatch.setattr(pool, "diff_parts", untrue)
    with Archives(pool) as archives:
        done = archives.archive(repository, web).result()
    assert done.fallback_reason is not None and "leaves out bytes" in done.fallback_reason
    assert archived_bytes(repository, done.archived) == local_bytes(done.local)


def test_archives_of_a_disk_run_in_order_and_ten_may_be_wanted(pool: Pool) -> None:
    store = Gate()
    repository = Repository.create(store)
    web, other = disk(pool, "web"), disk(pool, "other", seed=2)
    store.opened.clear()
    with Archives(pool) as archives:
        begun = []
        for seed in range(10):
            begun.append(archives.archive(repository, web))
            scribble(web, seed)
        with pytest.raises(RefusedError, match="10 archives"):
            archives.archive(repository, web)
        begun.append(archives.archive(repository, other))
        assert {item.state for item in begun} == {"progressing"}
        store.opened.set()
        done = [item.result() for item in begun]
    assert all(later.archived.parent == earlier.archived.id for earlier, later in itertools.pairwise(done[:10]))
    for item in done:
        assert archived_bytes(repository, item.archived) == local_bytes(item.local)


def test_a_cancelled_archive_leaves_nothing_and_is_not_wanted(pool: Pool) -> None:
    store = Gate()
    repository = Repository.create(store)
    web = disk(pool, "web")
    store.opened.clear()
    with Archives(pool) as archives:
        begun = [archives.archive(repository, web) for _ in range(2)]
        assert store.reached.wait(30)
        begun[1].stop()
        opener = threading.Timer(0.2, store.opened.set)
        opener.start()
        # The first one has read all there is, and its last bytes are on their way.
        for item in begun:
            archives.cancel(item)
        opener.join()
        with pytest.raises(CancelledError):
            begun[1].result()
        wanted = archives.journal.wanted()
    assert wanted == [] and repository.snapshots() == []
    assert len(pool.snapshots()) == 2


@pytest.mark.parametrize("by", ["archives", "pool"])
def test_deleting_a_progressing_snapshot_cancels_it(pool: Pool, by: str) -> None:
    store = Gate()
    repository = Repository.create(store)
    web = disk(pool, "web", 400)
    with Archives(pool) as archives:
        reached, go = threading.Event(), threading.Event()

        def wait(step: Progress) -> None:
            if step.done_bytes:
                reached.set()
                go.wait(30)

        begun = archives.archive(repository, web, progress=wait)
        assert reached.wait(30)
        if by == "archives":
            begun.stop()
            go.set()
            archives.delete_snapshots([begun.snapshot])
        else:
            pool.delete_snapshot(begun.snapshot)
            go.set()
        assert begun.ended() is not None
        assert archives.journal.wanted() == []
    assert repository.snapshots() == [] and pool.snapshots() == []


def test_what_failed_says_why_and_is_finished_later(pool: Pool) -> None:
    store = Gate()
    repository = Repository.create(store)
    web = disk(pool, "web")
    store.fails = True
    with Archives(pool) as archives:
        begun = archives.archive(repository, web, name="one", tags={"a": "b"})
        with pytest.raises(StoreError, match="region is gone"):
            begun.result()
    assert begun.state == "failed" and repository.snapshots() == []
    scribble(web, 1)
    store.fails = False
    with Archives(pool) as archives:
        assert "region is gone" in str(archives.journal.wanted()[0].error)
        (again,) = archives.finish(repository)
        done = again.result()
        assert archives.journal.wanted() == [] and archives.finish(repository) == []
    assert (done.archived.label, done.archived.tags) == ("one", {"a": "b"})
    assert archived_bytes(repository, done.archived) == local_bytes(begun.snapshot)


def test_an_archive_that_a_crash_cut_off_behind_the_commit_is_not_stored_twice(
    pool: Pool, repository: Repository
) -> None:
    web = disk(pool, "web")
    with Archives(pool) as archives:
        begun = archives.archive(repository, web)
        first = begun.result()
        # As if the journal had not come to it.
        archives.journal.want(begun.wanted)
        (again,) = archives.finish(repository)
        assert again.result().archived == first.archived
        assert archives.archive(repository, first.local).result().archived == first.archived
    assert len(repository.snapshots()) == 1


def test_a_wanted_snapshot_that_was_deleted_meanwhile_is_forgotten(pool: Pool) -> None:
    store = Gate()
    repository = Repository.create(store)
    store.fails = True
    with Archives(pool) as archives:
        begun = archives.archive(repository, disk(pool, "web"))
        assert begun.ended() is not None
        pool.delete_snapshot(begun.snapshot)
        assert archives.finish(repository) == [] and archives.journal.wanted() == []


def test_keeping_few_local_snapshots_keeps_the_base_of_every_repository(pool: Pool, repository: Repository) -> None:
    web, other = disk(pool, "web"), Repository.create(MemoryStore())
    with Archives(pool) as archives:
        manual = web.snapshot("manual")
        for seed in range(5):
            archives.archive(repository, web).result()
            scribble(web, seed)
        elsewhere = archives.archive(other, pool.snapshots()[2]).result()
        gone = archives.keep_local(repository, web.id, 2)
        assert [item.id for item in pool.snapshots()] == [
            manual.id,
            elsewhere.local.id,
            *[item.id for item in pool.snapshots()][-2:],
        ]
        assert len(gone) == 2 and len(pool.snapshots()) == 4
        web.pwrite(b"x", 0)
        for place in (repository, other):
            done = archives.archive(place, web).result()
            assert done.base is not None and archived_bytes(place, done.archived) == local_bytes(web)
        assert archives.keep_local(repository, web.id, 1)
        with pytest.raises(UsageError):
            archives.keep_local(repository, web.id, 0)
    assert len(repository.snapshots()) == 6


def test_a_rate_is_kept(pool: Pool, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", _noting(waited, threading.Event.wait))
    web = disk(pool, "web", 400)
    with Archives(pool) as archives:
        archives.archive(repository, web, rate_bytes_s=200 * CHUNK * 10).result()
    # 200 chunks at 2,000 a second, of which the last span need not be waited for.
    assert 0 < max(waited) < 1


def _noting(waited: list[float], wait: object) -> object:
    def noting(self: threading.Event, timeout: float | None = None) -> bool:
        if timeout is not None:
            waited.append(timeout)
        return bool(wait(self, timeout))  # type: ignore[operator]

    return noting


def test_stored_bytes_of_random_writes_are_about_what_changed(pool: Pool, folder: Path) -> None:
    repository = Repository.create(LocalStore(str(folder / "repo")))
    web = disk(pool, "web", 4000)
    archived(pool, repository, web)
    for number in range(300):
        web.pwrite(os.urandom(PAGE), (number * 7919 % 60000) * PAGE)
    with Archives(pool) as archives:
        done = archives.archive(repository, web).result()
    assert done.archived.stored_bytes <= 1.3 * 300 * PAGE


def test_deleting_a_snapshot_that_nobody_has_is_an_error(pool: Pool) -> None:
    with Archives(pool) as archives, pytest.raises(NotFoundError):
        archives.delete_snapshots([pool.snapshot("7")])
