"""Under which key a snapshot goes: the disk's first one decides, and nothing that is encrypted ever becomes plain.

The cells of the table of what may become what (from → to: plain, the same key, another key) that need no copy; "–" of
the table cannot be asked for.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from snapcore import NO_KEY, LockedError, MemoryStore, NotFoundError, RefusedError, Repository, UsageError
from snapcore.repository import KeyChoice
from snapcore.repository.manifest import Manifest
from tests.support import disks
from tests.support.forge import objects_of, store_of
from tests.support.holders import Fixed
from tests.support.small import Bytes

CONTENT = disks.disk(1, 40)
NEXT = disks.changed(CONTENT, 1)


@pytest.fixture
def repository() -> Repository:
    """Keys K and L, both unlocked; a plain disk, and one under K."""
    made = Repository.create(MemoryStore(), chunk_bytes=16 << 10)
    made.keyring.create("K", Fixed("k"))
    made.keyring.create("L", Fixed("l"))
    made.snapshot(Bytes(CONTENT), disk="plain", key=NO_KEY)
    made.snapshot(Bytes(CONTENT), disk="sealed", key="K")
    return made


def key_id(repository: Repository, name: str) -> str | None:
    """The id of a key."""
    return repository.keyring.find(name).key_id


def take(
    repository: Repository, disk: str, key: str | KeyChoice | None = None, parent: Manifest | None = None
) -> Manifest:
    """The next snapshot of a disk."""
    return repository.snapshot(Bytes(NEXT), disk=disk, key=key, parent=parent).snapshot


def newest(repository: Repository, disk: str) -> Manifest:
    """The last snapshot of a disk."""
    return repository.snapshots(disk)[-1]


# unencrypted disk → its snapshot: plain yes


@pytest.mark.parametrize("key", [None, NO_KEY])
def test_a_plain_disk_has_plain_snapshots(repository: Repository, key: KeyChoice | None) -> None:
    made = take(repository, "plain", key)
    assert made.key is None and made.parent is not None and made.fallback_reason is None
    assert made.changed_bytes < made.written_bytes


# encrypted disk → its snapshot: plain no; the same key yes, always; another key no


@pytest.mark.parametrize("key", [None, "K"])
def test_an_encrypted_disk_has_encrypted_snapshots_always(repository: Repository, key: str | None) -> None:
    made = take(repository, "sealed", key)
    assert made.key == key_id(repository, "K") and made.changed_bytes < made.written_bytes


def test_an_encrypted_disk_has_no_plain_snapshot(repository: Repository) -> None:
    with pytest.raises(RefusedError, match="under the key K; what is encrypted stays so"):
        take(repository, "sealed", NO_KEY)


@pytest.mark.parametrize("disk", ["sealed", "plain"])
def test_another_key_than_the_chains_needs_a_copy(repository: Repository, disk: str) -> None:
    with pytest.raises(RefusedError, match=r"snapcore copy … --key L"):
        take(repository, disk, "L")


# unencrypted snapshot → disk: plain yes, under a new key yes


@pytest.mark.parametrize("key", [None, NO_KEY])
def test_a_disk_made_of_a_plain_snapshot_may_be_plain(repository: Repository, key: KeyChoice | None) -> None:
    made = take(repository, "clone", key, newest(repository, "plain"))
    assert made.key is None and made.changed_bytes < made.written_bytes


def test_a_disk_made_of_a_plain_snapshot_may_be_encrypted_and_is_full_then(repository: Repository) -> None:
    made = take(repository, "clone", "K", newest(repository, "plain"))
    assert made.key == key_id(repository, "K")
    assert made.changed_bytes == made.written_bytes
    assert made.fallback_reason is not None and "is plain and this chain under the key K" in made.fallback_reason


# encrypted snapshot → disk, and clone of an encrypted disk: plain no, the same key yes, a new key yes


def test_a_disk_made_of_an_encrypted_snapshot_is_under_its_key(repository: Repository) -> None:
    for key in (None, "K"):
        made = take(repository, f"clone {key}", key, newest(repository, "sealed"))
        assert made.key == key_id(repository, "K") and made.changed_bytes < made.written_bytes


def test_a_disk_made_of_an_encrypted_snapshot_is_never_plain(repository: Repository) -> None:
    with pytest.raises(RefusedError, match="what is encrypted stays so"):
        take(repository, "clone", NO_KEY, newest(repository, "sealed"))
    with pytest.raises(RefusedError, match="what is encrypted stays so"):
        take(repository, "plain", None, newest(repository, "sealed"))


def test_a_disk_made_of_an_encrypted_snapshot_may_be_under_another_key_and_is_full_then(repository: Repository) -> None:
    made = take(repository, "clone", "L", newest(repository, "sealed"))
    assert made.key == key_id(repository, "L") and made.changed_bytes == made.written_bytes
    assert made.fallback_reason is not None and "under the key K and this chain under the key L" in made.fallback_reason


# rollback of an encrypted snapshot onto an unencrypted disk is refused; outside a pool a disk is a file of the user's


def test_a_list_of_changes_against_a_parent_under_another_key_is_not_used(repository: Repository) -> None:
    """It says what differs from the parent; the snapshot is compared with something else."""
    parent = newest(repository, "plain")
    first = repository.snapshot(Bytes(CONTENT), disk="clone", key="K", parent=parent, changed=[(0, 1)])
    assert first.read_bytes == len(CONTENT) and first.snapshot.fallback_reason
    second = repository.snapshot(Bytes(NEXT), disk="clone", parent=parent, changed=[(0, 1)])
    assert second.read_bytes == len(CONTENT)
    with repository.open_snapshot(second.snapshot) as file:
        assert file.read() == NEXT


def test_worked_example_6_with_keys(repository: Repository) -> None:
    """A disk made of a snapshot, then 4 of 14 written: 4 are stored under the same key, 14 under another one."""
    mib = 64 << 10
    base = disks.disk(7, 16 * 10)[: 10 * mib]
    zeros = {chunk for chunk in range(0, len(base), 16 << 10) if not any(base[chunk : chunk + (16 << 10)])}
    assert not zeros
    made = repository.snapshot(Bytes(base), disk="origin", key="K").snapshot
    clone = base + disks.disk(8, 16 * 4)[: 4 * mib]
    same = repository.snapshot(Bytes(clone), disk="same", parent=made).snapshot
    other = repository.snapshot(Bytes(clone), disk="other", parent=made, key="L").snapshot
    assert (same.changed_bytes, other.changed_bytes) == (4 * mib, 14 * mib)
    assert 4 * mib <= same.new_bytes < 4.2 * mib and 14 * mib <= other.new_bytes < 14.2 * mib


def test_the_first_snapshot_in_a_repository_with_keys_must_say(repository: Repository) -> None:
    with pytest.raises(RefusedError, match="--key NAME, or --no-key"):
        take(repository, "new")
    assert take(repository, "new", NO_KEY).key is None
    assert take(repository, "new").key is None


def test_a_disk_whose_chain_may_be_locked_must_say(repository: Repository) -> None:
    locked = Repository.open(repository._context.store)
    with pytest.raises(RefusedError, match="give that key's holder"):
        take(locked, "sealed")
    with pytest.raises(LockedError, match="not unlocked"):
        take(locked, "sealed", "K")
    with pytest.raises(NotFoundError, match="no key 'M'"):
        take(locked, "sealed", "M")
    locked.unlock(Fixed("l"))
    with pytest.raises(RefusedError, match="give that key's holder"):
        take(locked, "sealed")
    assert take(locked, "sealed", "L").key == key_id(repository, "L")


def test_a_repository_without_keys_needs_no_word() -> None:
    made = Repository.create(MemoryStore(), chunk_bytes=16 << 10)
    assert take(made, "d").key is None and take(made, "d", NO_KEY).key is None
    with pytest.raises(NotFoundError, match="no key 'K'"):
        take(made, "e", "K")


def test_a_disk_with_chains_under_two_keys_must_say_which_goes_on(repository: Repository) -> None:
    only_l = Repository.open(repository._context.store, keys=[Fixed("l")])
    take(only_l, "sealed", "L")
    with pytest.raises(UsageError, match="chains under the keys"):
        take(repository, "sealed")
    for name in ("K", "L"):
        made = take(repository, "sealed", name)
        assert made.key == key_id(repository, name) and made.parent is not None


def test_a_plain_chain_that_appears_beside_an_encrypted_one_is_not_followed(repository: Repository) -> None:
    """It may be what the other one was copied from, or somebody's fake."""
    other = Repository.create(MemoryStore(), chunk_bytes=16 << 10)
    take(other, "sealed")
    store = store_of(objects_of(other._context.store) | objects_of(repository._context.store))
    both = Repository.open(store, keys=[Fixed("k"), Fixed("l")])
    assert {item.key for item in both.snapshots("sealed")} == {None, key_id(repository, "K")}
    assert take(both, "sealed").key == key_id(repository, "K")
    with pytest.raises(RefusedError, match="what is encrypted stays so"):
        take(both, "sealed", NO_KEY)


def test_two_snapshots_under_different_keys_are_not_compared(repository: Repository) -> None:
    with pytest.raises(RefusedError, match="under different keys"):
        repository.diff(newest(repository, "plain"), newest(repository, "sealed"))
    made = take(repository, "sealed")
    assert len(repository.diff(repository.snapshots("sealed")[0], made))


def test_a_restored_file_is_plain_for_it_is_the_users(repository: Repository, tmp_path: Path) -> None:
    repository.restore(newest(repository, "sealed"), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == CONTENT
