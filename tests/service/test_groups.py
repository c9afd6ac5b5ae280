"""A group is cut at one instant, is in the repository whole or not at all, and freeze and thaw are told of."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapcore import BusyError, MemoryStore, NotFoundError, RefusedError, Repository, StoreError
from snapcore.persist import Buffer
from snapcore.pool import Pool
from snapcore.service import Archives, Hooks, group, into_disk, into_new_disk
from tests.support.tiers import archived_bytes, disk, local_bytes, scribble

NAMES = ("data", "log", "root")


class Failing(MemoryStore):
    """Fails at a put of a kind, from the n-th on."""

    def __init__(self) -> None:
        super().__init__()
        self.prefix = "none"
        self.left = 0

    def put_new(self, name: str, buffers: list[Buffer]) -> int:  # type: ignore[override]
        if name.startswith(self.prefix):
            if not self.left:
                raise StoreError(f"{name}: the region is gone")
            self.left -= 1
        return super().put_new(name, buffers)


def disks(pool: Pool) -> list:
    """Three of them."""
    return [disk(pool, name, 10, seed) for seed, name in enumerate(NAMES)]


def test_a_group_is_archived_with_all_its_members(pool: Pool, repository: Repository) -> None:
    found = disks(pool)
    hooks = Hooks("exit 0", "exit 3")
    with Archives(pool) as archives:
        made = group.cut(pool, archives.journal, found, "nightly", hooks)
        for seed, item in enumerate(found):
            scribble(item, seed)
        done = group.archive(archives, repository, made, name="nightly", tags={"a": "b"}, hooks=hooks)
    assert repository.groups() == [done] and repository.group("nightly") == done
    assert [item.disk for item in done.members] == list(NAMES) and done.consistency == "application"
    assert done.freeze is not None and done.freeze.exit_code == 0
    assert done.thaw is not None and done.thaw.exit_code == 3
    for member, cut in zip(done.members, made, strict=True):
        stored = repository.find(member.snapshot)
        assert (stored.group, stored.label, stored.tags) == (done.id, "nightly", {"a": "b"})
        assert archived_bytes(repository, stored) == local_bytes(cut)
    repository.collect()
    assert repository.verify().ok


@pytest.mark.parametrize(("prefix", "left"), [("snapshots/", 0), ("snapshots/", 2), ("packs/", 0), ("groups/", 0)])
def test_one_member_fails_and_all_fail_and_a_later_try_makes_it_whole(pool: Pool, prefix: str, left: int) -> None:
    store = Failing()
    repository = Repository.create(store)
    found = disks(pool)
    store.prefix, store.left = prefix, left
    with Archives(pool) as archives:
        made = group.cut(pool, archives.journal, found, "nightly")
        with pytest.raises(StoreError, match="region is gone"):
            group.archive(archives, repository, made, name="nightly")
        assert repository.groups() == [] and repository.snapshots() == []
        assert len(pool.snapshots()) == 3
    store.prefix = "none"
    with Archives(pool) as archives:
        (done,) = group.finish(archives, repository)
        assert archives.journal.wanted() == []
    assert repository.groups() == [done]
    for member, cut in zip(done.members, made, strict=True):
        assert archived_bytes(repository, member.snapshot) == local_bytes(cut)


def test_a_crash_leaves_members_that_the_next_try_uses(pool: Pool, repository: Repository) -> None:
    found = disks(pool)
    with Archives(pool) as archives:
        made = group.cut(pool, archives.journal, found)
        done = group.archive(archives, repository, made)
        # As if the crash had come before the group's object, and before one of the members.
        repository.delete_group(done)
        repository.delete(done.members[1].snapshot)
        archives.journal.want(_wanted_again(done.id, repository, [item.id for item in made]))
        (again,) = group.finish(archives, repository)
    assert again.id == done.id and again.members[0] == done.members[0] and again.members[2] == done.members[2]
    assert len(repository.snapshots()) == 3
    assert archived_bytes(repository, again.members[1].snapshot) == local_bytes(made[1])


def _wanted_again(group_id: str, repository: Repository, snapshots: list[str]):
    from snapcore.service.journal import Wanted

    return Wanted(id=group_id, repository=repository.id, url=repository.url, snapshots=snapshots, group=True)


def test_a_group_that_lost_a_local_member_before_it_was_whole_is_given_up(pool: Pool) -> None:
    store = Failing()
    repository = Repository.create(store)
    found = disks(pool)
    with Archives(pool) as archives:
        made = group.cut(pool, archives.journal, found)
        done = group.archive(archives, repository, made)
        repository.delete_group(done)
        archives.journal.want(_wanted_again(done.id, repository, [item.id for item in made]))
        archives.delete_snapshots([made[0]])
        assert group.finish(archives, repository) == []
        assert archives.journal.wanted() == []
    assert repository.snapshots() == []


def test_what_is_left_of_a_group_without_its_pool_can_be_deleted(pool: Pool, repository: Repository) -> None:
    found = disks(pool)
    with Archives(pool) as archives:
        done = group.archive(archives, repository, group.cut(pool, archives.journal, found))
        single = archives.archive(repository, found[0]).result()
    repository.delete_group(done)
    group_id, gone = group.delete(repository, done.id)
    assert group_id == done.id and {*gone} == {item.snapshot for item in done.members}
    assert [item.id for item in repository.snapshots()] == [single.archived.id]
    with pytest.raises(NotFoundError):
        group.delete(repository, done.id)


def test_thaw_runs_whatever_became_of_freeze_and_cut(pool: Pool, tmp_path: Path) -> None:
    found = disks(pool)
    with Archives(pool) as archives:
        hooks = Hooks(f"touch {tmp_path}/frozen; exit 7", f"test -e {tmp_path}/frozen")
        made = group.cut(pool, archives.journal, found, "taken", hooks)
        assert (hooks.froze and hooks.froze.exit_code, hooks.thawed and hooks.thawed.exit_code) == (7, 0)
        known = archives.journal.hooks(str(made[0].group))
        assert (known.freeze, known.thaw) == (hooks.froze, hooks.thawed)

        hooks = Hooks("true", f"touch {tmp_path}/thawed")
        with pytest.raises(Exception, match="has a snapshot 'taken' already"):
            group.cut(pool, archives.journal, found, "taken", hooks)
        assert (tmp_path / "thawed").exists() and hooks.thawed is not None and hooks.thawed.ok


def test_a_freeze_that_hangs_is_killed_with_what_it_started_and_the_group_says_so(
    pool: Pool, repository: Repository, tmp_path: Path
) -> None:
    found = disks(pool)
    hooks = Hooks(f"(sleep 1; touch {tmp_path}/late) & wait", "true", timeout_s=0.2)
    with Archives(pool) as archives:
        made = group.cut(pool, archives.journal, found, None, hooks)
        done = group.archive(archives, repository, made, hooks=hooks)
    assert done.freeze is not None and done.freeze.timed_out and done.freeze.exit_code is None
    assert done.consistency == "crash" and done.thaw is not None and done.thaw.ok
    assert not (tmp_path / "late").exists()


def test_a_group_is_rolled_back_whole_or_in_part_and_not_while_somebody_is_attached(pool: Pool) -> None:
    found = disks(pool)
    with Archives(pool) as archives:
        made = group.cut(pool, archives.journal, found, "nightly")
    before = [local_bytes(item) for item in made]
    for seed, item in enumerate(found):
        scribble(item, seed)
    after = [local_bytes(item) for item in found]
    with found[2].attached("a guest"), pytest.raises(BusyError, match="a guest"):
        group.rollback(pool, "nightly")
    assert [local_bytes(item) for item in found] == after
    group.rollback(pool, "nightly", ["log"])
    assert [local_bytes(item) for item in found] == [after[0], before[1], after[2]]
    assert len(group.rollback(pool, str(made[0].group))) == 3
    assert [local_bytes(item) for item in found] == before
    with pytest.raises(RefusedError):
        group.rollback(pool, "nightly", ["unknown"])
    with pytest.raises(NotFoundError):
        group.rollback(pool, "weekly")


def test_members_are_restored_into_their_disks_and_into_new_ones(pool: Pool, repository: Repository) -> None:
    found = disks(pool)
    with Archives(pool) as archives:
        made = group.cut(pool, archives.journal, found)
        done = group.archive(archives, repository, made)
    for member, item, cut in zip(done.members, found, made, strict=True):
        scribble(item, 5)
        stored = repository.find(member.snapshot)
        into_disk(pool, item, repository, stored)
        assert local_bytes(item) == local_bytes(cut)
        assert local_bytes(into_new_disk(pool, f"{item.name}-new", repository, stored).disk) == local_bytes(cut)
