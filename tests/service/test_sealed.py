"""Archives, groups and blocks under keys: sealed like any snapshot, and their names with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapcore import NO_KEY, KeyFile, LockedError, MemoryStore, RefusedError, Repository
from snapcore.pool import Pool
from snapcore.repository import Group, Member
from snapcore.service import Archives, Local, Remote, Staging, group, into_disk, into_new_disk, list_changed_blocks
from snapcore.service.blocks import checksum
from tests.support.tiers import CHUNK, archived_bytes, disk, local_bytes, scribble


@pytest.fixture
def holder(tmp_path: Path) -> KeyFile:
    return KeyFile.create(tmp_path / "key")


@pytest.fixture
def store(holder: KeyFile) -> MemoryStore:
    """A repository with one key."""
    made = MemoryStore()
    Repository.create(made).keyring.create("prod", holder)
    return made


def test_archives_go_on_under_the_key_of_the_chain_and_read_only_what_changed(
    pool: Pool, store: MemoryStore, holder: KeyFile
) -> None:
    repository = Repository.open(store, keys=[holder])
    found = disk(pool, "secret-disk")
    with Archives(pool) as archives:
        first = archives.archive(repository, found, key="prod").result()
        scribble(found, 7)
        second = archives.archive(repository, found).result()
    assert first.archived.key == second.archived.key is not None
    assert second.base is not None and second.read_bytes < first.read_bytes
    assert archived_bytes(repository, second.archived) == local_bytes(second.local)
    restored = into_new_disk(pool, "again", repository, first.archived)
    assert local_bytes(restored.disk) == local_bytes(first.local)
    into_disk(pool, restored.disk, repository, second.archived)
    assert local_bytes(restored.disk) == local_bytes(second.local)


def test_an_archive_that_failed_for_want_of_a_key_is_made_with_the_key_that_is_named_then(
    pool: Pool, store: MemoryStore, holder: KeyFile
) -> None:
    repository = Repository.open(store, keys=[holder])
    cut = disk(pool, "data").snapshot()
    with Archives(pool) as archives:
        with pytest.raises(RefusedError):
            archives.archive(repository, cut).result()
        done = archives.archive(repository, cut, key="prod").result()
        assert done.archived.key is not None and archives.unfinished(repository) == []


def test_a_group_is_sealed_with_its_members(pool: Pool, store: MemoryStore, holder: KeyFile) -> None:
    repository = Repository.open(store, keys=[holder])
    found = [disk(pool, name, 4, seed) for seed, name in enumerate(("secret-data", "secret-log"))]
    with Archives(pool) as archives:
        cut = group.cut(pool, archives.journal, found, "secret-group")
        made = group.archive(archives, repository, cut, name="secret-group", key="prod")
    assert repository.groups() == [made] and repository.group("secret-group") == made
    for name, _ in store.list(""):
        assert b"secret" not in store.get(name, 1 << 26)
    others = Repository.open(store)
    assert others.groups() == []
    with pytest.raises(LockedError):
        others.group(made.id)
    with pytest.raises(LockedError):
        group.delete(others, made.id)
    repository.collect()
    assert repository.verify().ok and repository.groups() == [made]
    assert group.delete(repository, made.id)[0] == made.id
    assert repository.groups() == [] and repository.snapshots() == []


def test_snapshots_under_different_keys_make_no_group(pool: Pool, store: MemoryStore, holder: KeyFile) -> None:
    repository = Repository.open(store, keys=[holder])
    with Archives(pool) as archives:
        one = archives.archive(repository, disk(pool, "one", 4), key="prod").result().archived
        two = archives.archive(repository, disk(pool, "two", 4), key=NO_KEY).result().archived
    members = [Member(disk=item.disk, snapshot=item.id) for item in (one, two)]
    with pytest.raises(RefusedError):
        repository.put_group(Group(id="0" * 32, name=None, created=one.created, members=members))
    assert repository.groups() == []


def test_blocks_differ_by_trees_under_one_key_and_by_bytes_under_two(
    pool: Pool, store: MemoryStore, holder: KeyFile
) -> None:
    repository = Repository.open(store, keys=[holder])
    found = disk(pool, "data", 8)
    with Archives(pool) as archives:
        sealed = archives.archive(repository, found, key="prod").result().archived
        found.pwrite(b"x" * CHUNK, 3 * CHUNK)
        later = archives.archive(repository, found).result().archived
        plain = archives.archive(repository, disk(pool, "plain", 8), key=NO_KEY).result().archived
    sides = [Remote(item, repository) for item in (sealed, later, plain)]
    assert [page.blocks for page in list_changed_blocks(sides[0], sides[1])] == [[3]]
    # The same noise under another key.
    assert [page.blocks for page in list_changed_blocks(sides[0], sides[2])] == [[]]
    assert [page.blocks for page in list_changed_blocks(sides[2], Local(found, pool), block_bytes=CHUNK)] == [[3]]


def test_blocks_that_are_put_make_a_snapshot_under_the_key(store: MemoryStore, holder: KeyFile, tmp_path: Path) -> None:
    repository = Repository.open(store, keys=[holder])
    staging = Staging(repository, tmp_path / "blocks")
    session = staging.start("data", 2 * CHUNK, key="prod")
    data = b"y" * CHUNK
    staging.put_block(session.id, 1, data, checksum(data))
    made = staging.complete(session.id, 1)
    assert made.key is not None and archived_bytes(repository, made) == bytes(CHUNK) + data
