"""Copies: what moves, what is stored, under which key, and that an interrupted one goes on."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapcore import CancelledError, Progress, Repository
from snapcore.errors import DamagedError, Error, ExistsError, LockedError, RefusedError, StoreError
from snapcore.keys import KeyFile
from snapcore.repository import NO_KEY, Copied, KeyChoice, Manifest, pack, storer
from snapcore.repository.pack import records
from snapcore.repository.record import Form, RecordKind
from snapcore.store import MemoryStore
from tests.support.disks import changed, disk
from tests.support.forge import objects_of, store_of, with_members
from tests.support.regions import FailingOnce, Watched, region, share
from tests.support.small import Bytes, changed_pages, restored

MIB = 1 << 20
CHUNK = 65536


def noise(seed: int, size_bytes: int) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def take(repository: Repository, data: bytes, disk_name: str = "d", **options: Any) -> Manifest:
    return repository.snapshot(Bytes(data), disk=disk_name, **options).snapshot


def copied(target: Repository, source: Repository, snapshot: Manifest, **options: Any) -> Copied:
    (done,) = target.copy_from(source, [snapshot], **options)
    return done


def store_in(repository: Repository) -> Any:
    return repository._context.store


def fetched(target: Repository, done: Copied, folder: Path) -> bytes:
    return restored(target, done.snapshot.id, folder)


def chunk_records(repository: Repository) -> dict[bytes, bytes]:
    """Id and stored bytes of every chunk record."""
    found = {}
    for name, data in objects_of(store_in(repository)).items():
        if name.startswith(pack.PREFIX):
            for item in records(data, name):
                if item.header is not None and item.header.kind == RecordKind.CHUNK:
                    found[item.header.id] = bytes(data[item.offset_bytes : item.offset_bytes + 64]) + bytes(
                        item.payload
                    )
    return found


@pytest.mark.parametrize("keys", [(), ("k",)])
def test_within_a_key_records_move_as_they_are_and_only_those_that_the_other_side_lacks(
    tmp_path: Path, keys: tuple[str, ...]
) -> None:
    source, target = region(tmp_path, keys), region(tmp_path)
    options = {"key": "k"} if keys else {}
    if keys:
        share("k", source, target, tmp_path)
    data = disk(1, 300)
    later = changed_pages(data, random.Random(1), [5, 80, 299])
    first, second = take(source, data, **options), take(source, later, **options)
    one, two = copied(target, source, first), copied(target, source, second)
    assert fetched(target, one, tmp_path) == data and fetched(target, two, tmp_path) == later
    there, here = chunk_records(target), chunk_records(source)
    assert there and all(here[item] == stored for item, stored in there.items())
    assert (one.snapshot.root, two.snapshot.root) == (first.root, second.root)
    assert (one.snapshot.fallback_reason, two.snapshot.fallback_reason) == (None, None)
    assert two.snapshot.parent == one.snapshot.id
    assert two.moved_bytes < 3 * 8192 + 4096 < one.moved_bytes
    assert target.verify().ok


def test_a_copy_has_a_new_id_and_knows_where_it_comes_from(tmp_path: Path) -> None:
    source, target = region(tmp_path), region(tmp_path)
    snapshot = take(source, disk(1, 30), label="before the upgrade", tags={"team": "one"})
    made = copied(target, source, snapshot).snapshot
    assert made.id != snapshot.id
    assert (made.disk, made.label, made.tags, made.created) == ("d", "before the upgrade", {}, snapshot.created)
    assert made.copied is not None
    assert (made.copied.repository, made.copied.snapshot, made.copied.key) == (source.id, snapshot.id, None)
    assert made.copied.at >= snapshot.created
    assert target.find(made.id) == made


def test_a_copied_patch_whose_base_is_not_there_is_stored_whole(tmp_path: Path) -> None:
    source, target = region(tmp_path), region(tmp_path)
    data = noise(1, 20 * CHUNK)
    take(source, data)
    second = take(source, changed_pages(data, random.Random(1), [3, 40]))
    done = copied(target, source, second)
    assert fetched(target, done, tmp_path) == changed_pages(data, random.Random(1), [3, 40])
    store = objects_of(store_in(target))
    forms = [
        item.header.form
        for name in store
        if name.startswith(pack.PREFIX)
        for item in records(store[name], name)
        if item.header is not None
    ]
    assert set(forms) == {Form.FULL}
    assert done.snapshot.fallback_reason is None


@pytest.mark.parametrize("source_keys", [(), ("one",)])
def test_under_another_key_everything_is_sealed_anew_and_patches_stay_patches(
    tmp_path: Path, source_keys: tuple[str, ...]
) -> None:
    source, target = region(tmp_path, source_keys), region(tmp_path, ("two",))
    options = {"key": "one"} if source_keys else {}
    data = disk(1, 300)
    later = changed_pages(data, random.Random(1), [6, 82, 299])
    first, second = take(source, data, **options), take(source, later, **options)
    one, two = copied(target, source, first, key="two"), copied(target, source, second)
    assert fetched(target, one, tmp_path) == data and fetched(target, two, tmp_path) == later
    assert not set(chunk_records(source)) & set(chunk_records(target))
    assert not set(chunk_records(source).values()) & set(chunk_records(target).values())
    assert two.snapshot.key == one.snapshot.key is not None
    assert two.snapshot.new_bytes <= second.new_bytes < CHUNK
    # What patches rest on is read where the copy goes, and not moved again.
    assert two.moved_bytes < 3 * 8192 + 32768
    whole = b"".join(objects_of(store_in(target)).values())
    assert not any(data[start : start + 16] in whole for start in range(8192, len(data) - 16, 4096) if data[start])
    assert b"d" * 8 not in whole and target.verify().ok


@pytest.mark.parametrize(("here", "there"), [(4096, CHUNK), (CHUNK, 4096), (1 << 20, 16384)])
def test_a_copy_into_other_chunks_is_cut_anew_and_later_ones_hold_what_changed(
    tmp_path: Path, here: int, there: int
) -> None:
    source, target = region(tmp_path, chunk_bytes=here), region(tmp_path, chunk_bytes=there)
    data = disk(1, 700)
    later = changed_pages(data, random.Random(1), [5, 699])
    first, second = take(source, data), take(source, later)
    one, two = copied(target, source, first), copied(target, source, second)
    assert fetched(target, one, tmp_path) == data and fetched(target, two, tmp_path) == later
    assert two.snapshot.chunk_bytes == there and two.snapshot.new_bytes < 64 << 10
    assert one.snapshot.fallback_reason is None and two.snapshot.fallback_reason is None


def test_a_disk_that_grew_or_shrank_is_copied_with_its_size(tmp_path: Path) -> None:
    source, plain, sealed = region(tmp_path), region(tmp_path), region(tmp_path, ("k",))
    contents = [noise(1, 130 * CHUNK), noise(1, 129 * CHUNK + 5), noise(1, 300 * CHUNK)[: 140 * CHUNK], noise(1, 700)]
    for data in contents:
        snapshot = take(source, data)
        for target, options in ((plain, {}), (sealed, {"key": "k"})):
            assert fetched(target, copied(target, source, snapshot, **options), tmp_path) == data
    assert plain.verify().ok and sealed.verify().ok


def test_without_the_source_of_the_last_copy_all_is_read_under_another_key_and_the_reason_is_said(
    tmp_path: Path,
) -> None:
    source, target = region(tmp_path), region(tmp_path, ("k",))
    data = noise(1, 20 * CHUNK)
    first = take(source, data)
    copied(target, source, first, key="k")
    later = changed_pages(data, random.Random(1), [3])
    second = take(source, later)
    source.delete(first)
    done = copied(target, source, second)
    assert first.id in str(done.snapshot.fallback_reason)
    assert fetched(target, done, tmp_path) == later
    assert done.moved_bytes > 0.9 * len(data) and done.snapshot.stored_bytes < CHUNK


def test_a_source_that_is_not_what_it_was_when_it_was_copied_is_no_base(tmp_path: Path) -> None:
    source, target = region(tmp_path), region(tmp_path, ("k",))
    data = noise(1, 20 * CHUNK)
    first = take(source, data)
    copied(target, source, first, key="k")
    later = changed_pages(data, random.Random(1), [3])
    second = take(source, later)
    objects = objects_of(store_in(source))
    (name,) = (name for name in objects if name.endswith(first.id))
    forged = Repository.open(store_of(objects | {name: with_members(objects[name], root=second.root)}))
    done = copied(target, forged, second)
    assert fetched(target, done, tmp_path) == later and first.id in str(done.snapshot.fallback_reason)


def test_within_a_key_the_source_of_the_last_copy_need_not_be_there(tmp_path: Path) -> None:
    source, target = region(tmp_path), region(tmp_path)
    data = noise(1, 20 * CHUNK)
    first = take(source, data)
    copied(target, source, first)
    second = take(source, changed_pages(data, random.Random(1), [3]))
    source.delete(first)
    source.collect()
    done = copied(target, source, second)
    assert done.snapshot.fallback_reason is None and done.moved_bytes < 2 * CHUNK
    assert fetched(target, done, tmp_path) == changed_pages(data, random.Random(1), [3])


def test_an_earlier_snapshot_copied_after_a_later_one_says_what_it_was_compared_with(tmp_path: Path) -> None:
    source, target = region(tmp_path), region(tmp_path)
    data = noise(1, 20 * CHUNK)
    first, second = take(source, data), take(source, changed(data, 2))
    later = copied(target, source, second)
    done = copied(target, source, first)
    assert later.snapshot.id in str(done.snapshot.fallback_reason)
    assert fetched(target, done, tmp_path) == data
    third = copied(target, source, take(source, changed(data, 3)))
    assert third.snapshot.fallback_reason is None


def test_a_chain_is_copied_oldest_first_and_again_only_what_has_no_copy(tmp_path: Path) -> None:
    source, target = region(tmp_path), region(tmp_path)
    contents = [disk(1, 100)]
    for seed in range(3):
        contents.append(changed(contents[-1], seed))
    snapshots = [take(source, data) for data in contents]
    done = list(target.copy_from(source, [snapshots[2]], chain=True))
    assert [item.source.id for item in done] == [item.id for item in snapshots[:3]]
    again = list(target.copy_from(source, [snapshots[3], snapshots[2]], chain=True))
    assert [item.source.id for item in again] == [snapshots[3].id]
    for item, data in zip(done + again, contents, strict=True):
        assert fetched(target, item, tmp_path) == data
    assert list(target.copy_from(source, [snapshots[3]], chain=True)) == []


def test_copies_can_be_deleted_in_any_order_and_collected(tmp_path: Path) -> None:
    source, target = region(tmp_path), region(tmp_path)
    contents = [disk(1, 200)]
    for seed in range(3):
        contents.append(changed(contents[-1], seed))
    done = [copied(target, source, take(source, data)) for data in contents]
    for gone in (0, 2):
        target.delete(done[gone].snapshot)
        target.collect()
    for kept in (1, 3):
        assert fetched(target, done[kept], tmp_path) == contents[kept]
    assert target.verify().ok


# What spec/reference-cloud-snapshots.md 9.2 has in its rows of copies: from, to, where; True for allowed.
CELLS = [
    ("plain", "plain", "another", True),
    ("plain", "plain", "the same", False),
    ("plain", "new key", "another", True),
    ("plain", "new key", "the same", True),
    ("key", "plain", "another", False),
    ("key", "plain", "the same", False),
    ("key", "same key", "another", True),
    ("key", "same key", "the same", False),
    ("key", "new key", "another", True),
    ("key", "new key", "the same", True),
]


@pytest.mark.parametrize(("kind", "to", "where", "allowed"), CELLS)
def test_the_table_of_copies(tmp_path: Path, kind: str, to: str, where: str, allowed: bool) -> None:
    source = region(tmp_path, ("one", "two"))
    snapshot = take(source, disk(1, 40), key="one" if kind == "key" else NO_KEY)
    target = source if where == "the same" else region(tmp_path, ("two",))
    if target is not source:
        share("one", source, target, tmp_path)
    key: str | KeyChoice = {"plain": NO_KEY, "same key": "one", "new key": "two"}[to]  # type: ignore[assignment]
    before = objects_of(store_in(target))
    if not allowed:
        with pytest.raises(RefusedError):
            target.copy_from(source, [snapshot], key=key)
        assert objects_of(store_in(target)) == before
        return
    done = copied(target, source, snapshot, key=key)
    assert fetched(target, done, tmp_path) == disk(1, 40)
    names = {item.id: item.name for item in target.keyring.listed()}
    assert names.get(str(done.snapshot.key)) == {"plain": None, "same key": "one", "new key": "two"}[to]
    assert {name for name in objects_of(store_in(target)) if name.startswith("keys/")} == {
        name for name in before if name.startswith("keys/")
    }


# The rows of disks and their snapshots: what the chain, or the snapshot that a disk was made from, is under.
DISK_CELLS = [
    ("chain", "plain", "plain", True),
    ("chain", "key", "plain", False),
    ("chain", "key", "same key", True),
    ("chain", "key", "new key", False),
    ("made from", "plain", "plain", True),
    ("made from", "plain", "new key", True),
    ("made from", "key", "plain", False),
    ("made from", "key", "same key", True),
    ("made from", "key", "new key", True),
]


@pytest.mark.parametrize(("how", "kind", "to", "allowed"), DISK_CELLS)
def test_the_table_of_disks(tmp_path: Path, how: str, kind: str, to: str, allowed: bool) -> None:
    repository = region(tmp_path, ("one", "two"))
    data = disk(1, 40)
    first = take(repository, data, key="one" if kind == "key" else NO_KEY)
    key = {"plain": NO_KEY, "same key": "one", "new key": "two"}[to]
    options: dict[str, Any] = {"disk_name": "d"} if how == "chain" else {"disk_name": "e", "parent": first}

    def next_one() -> Manifest:
        return take(repository, changed(data, 1), key=key, **options)

    if not allowed:
        with pytest.raises(RefusedError):
            next_one()
    else:
        assert restored(repository, next_one().id, tmp_path) == changed(data, 1)


def test_without_a_key_asked_for_the_chain_over_there_decides(tmp_path: Path) -> None:
    source, target = region(tmp_path), region(tmp_path, ("k",))
    first, second = take(source, disk(1, 40)), take(source, disk(2, 40))
    with pytest.raises(RefusedError, match="--key NAME, or --no-key"):
        target.copy_from(source, [first])
    sealed = copied(target, source, first, key="k")
    assert copied(target, source, second).snapshot.key == sealed.snapshot.key
    with pytest.raises(RefusedError, match="stays so"):
        target.copy_from(source, [second], key=NO_KEY)


def test_what_is_under_a_key_that_the_other_side_has_not_is_refused_and_shared_on_demand_only(tmp_path: Path) -> None:
    source, target = region(tmp_path, ("k",)), region(tmp_path)
    snapshot = take(source, disk(1, 40), key="k")
    with pytest.raises(LockedError, match="snapcore key share"):
        target.copy_from(source, [snapshot])
    share("k", source, target, tmp_path)
    assert copied(target, source, snapshot).snapshot.key == snapshot.key


def test_a_key_that_is_open_where_the_snapshot_is_need_not_be_opened_over_there(tmp_path: Path) -> None:
    source, target = region(tmp_path, ("k",)), region(tmp_path)
    share("k", source, target, tmp_path)
    snapshot = take(source, disk(1, 40), key="k")
    locked = Repository.open(store_in(target))
    made = copied(locked, source, snapshot)
    assert fetched(target, made, tmp_path) == disk(1, 40)
    with pytest.raises(RefusedError):
        locked.copy_from(source, [snapshot], key=NO_KEY)


def test_a_locked_source_a_locked_key_and_a_disabled_one_are_errors_before_any_work(tmp_path: Path) -> None:
    source, target = region(tmp_path, ("k",)), region(tmp_path, ("other",))
    snapshot = take(source, disk(1, 40), key="k")
    before = objects_of(store_in(target))
    with pytest.raises(LockedError):
        target.copy_from(Repository.open(store_in(source)), [snapshot.id])
    with pytest.raises(LockedError):
        Repository.open(store_in(target)).copy_from(source, [snapshot], key="other")
    target.keyring.disable("other")
    with pytest.raises(LockedError, match="disabled"):
        target.copy_from(source, [snapshot], key="other")
    target.keyring.enable("other")
    source.keyring.disable("k")
    with pytest.raises(LockedError, match="disabled"):
        target.copy_from(source, [snapshot], key="other")
    assert objects_of(store_in(target)) == before


def test_worked_example_six_a_disk_made_from_a_snapshot_of_ten_with_four_written(tmp_path: Path) -> None:
    source = region(tmp_path, ("k",))
    ten = noise(1, 10 * MIB)
    fourteen = ten + noise(2, 4 * MIB)
    base = take(source, ten, "d", key="k")
    made = take(source, fourteen, "e", parent=base, key="k")
    assert made.changed_bytes == 4 * MIB
    same, other = region(tmp_path), region(tmp_path, ("l",))
    share("k", source, same, tmp_path)
    copied(same, source, base)
    done = copied(same, source, made)
    assert done.snapshot.changed_bytes == 4 * MIB and done.snapshot.fallback_reason is None
    assert 4 * MIB <= done.snapshot.stored_bytes < 4.1 * MIB and done.moved_bytes < 4.1 * MIB
    full = copied(other, source, made, key="l")
    assert full.snapshot.changed_bytes == 14 * MIB and 14 * MIB <= full.snapshot.stored_bytes < 14.1 * MIB
    for target, item in ((same, done), (other, full)):
        assert fetched(target, item, tmp_path) == fourteen


@pytest.fixture
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of a quarter of a MiB, so that small disks have many."""
    monkeypatch.setattr(pack, "PACK_BYTES", 1 << 18)


def stop_after(steps: int) -> Callable[[Progress], None]:
    left = [steps]

    def progress(step: Progress) -> None:
        assert step.stage == "copy"
        left[0] -= 1
        if left[0] < 0:
            raise CancelledError("enough")

    return progress


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("keys", [(), ("k",)])
def test_an_interrupted_copy_leaves_nothing_visible_and_goes_on_where_it_was(
    tmp_path: Path, keys: tuple[str, ...]
) -> None:
    source, target = region(tmp_path), region(tmp_path, keys)
    options = {"key": "k"} if keys else {}
    data = noise(1, 24 * MIB)
    snapshot = take(source, data)
    with pytest.raises(CancelledError):
        copied(target, source, snapshot, progress=stop_after(4), **options)
    assert target.snapshots() == [] and target.sessions() == []
    there = sum(map(len, chunk_records(target).values()))
    assert there > 8 * MIB
    done = copied(target, source, snapshot, **options)
    assert done.moved_bytes <= len(data) * 1.01 - there + (4 * MIB if keys else 0)
    assert done.snapshot.stored_bytes <= len(data) * 1.01 - there
    assert fetched(target, done, tmp_path) == data and target.verify().ok


@pytest.mark.parametrize("kind", ["same", "sealed", "other chunks"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_whichever_call_fails_there_is_an_error_and_no_copy_or_the_right_one(
    tmp_path: Path, kind: str, side: str
) -> None:
    data = disk(1, 40)
    clean = region(tmp_path, chunk_bytes=16384)
    first, second = take(clean, data), take(clean, changed(data, 1))
    empty = region(tmp_path, ("k",) if kind == "sealed" else (), chunk_bytes=4096 if kind == "other chunks" else 16384)
    copied(empty, clean, first, **({"key": "k"} if kind == "sealed" else {}))
    holders = [KeyFile(str(tmp_path / f"k-{empty.id}"))] if kind == "sealed" else []
    here, there = objects_of(store_in(clean)), objects_of(store_in(empty))
    number = 0
    while True:
        hook = FailingOnce(number)
        quiet = lambda method, name: None  # noqa: E731
        stores = {
            "source": Watched(store_of(here), quiet),
            "target": Watched(store_of(there), quiet),
        }
        source = Repository.open(stores["source"])
        target = Repository.open(stores["target"], keys=holders)
        stores[side].hook = hook
        try:
            done = copied(target, source, second)
        except StoreError:
            done = None
        stores[side].hook = quiet
        known = target.snapshots()
        # The answer to the commit may be lost; then the copy is there.
        assert len(known) in ((1, 2) if done is None else (2,))
        for item in known[1:]:
            assert restored(target, item.id, tmp_path) == changed(data, 1)
        if done is None:
            again = copied(target, source, second)
            assert fetched(target, again, tmp_path) == changed(data, 1)
        if not hook.failed:
            break
        number += 1
    assert number > 5


@pytest.mark.parametrize("kind", ["same", "sealed", "other chunks"])
def test_a_damaged_source_is_an_error_and_not_a_copy(tmp_path: Path, kind: str) -> None:
    source = region(tmp_path, chunk_bytes=16384)
    snapshot = take(source, noise(1, 20 * 16384))
    target = region(tmp_path, ("k",) if kind == "sealed" else (), chunk_bytes=4096 if kind == "other chunks" else 16384)
    objects = objects_of(store_in(source))
    name = max((name for name in objects if name.startswith(pack.PREFIX)), key=lambda name: len(objects[name]))
    data = bytearray(objects[name])
    data[len(data) // 2] ^= 1
    bad = Repository.open(store_of(objects | {name: bytes(data)}))
    with pytest.raises(DamagedError):
        copied(target, bad, snapshot, **({"key": "k"} if kind == "sealed" else {}))
    assert target.snapshots() == []


@pytest.mark.parametrize("keys", [(), ("k",)])
def test_a_copy_heals_what_is_damaged_over_there(tmp_path: Path, keys: tuple[str, ...]) -> None:
    source, target = region(tmp_path), region(tmp_path, keys)
    data = noise(1, 20 * CHUNK)
    first = take(source, data)
    done = copied(target, source, first, **({"key": "k"} if keys else {}))
    objects = objects_of(store_in(target))
    name = max((name for name in objects if name.startswith(pack.PREFIX)), key=lambda name: len(objects[name]))
    broken = bytearray(objects[name])
    broken[len(broken) // 2] ^= 1
    holders = [KeyFile(str(tmp_path / f"k-{target.id}"))] if keys else []
    bad = Repository.open(store_of(objects | {name: bytes(broken)}), keys=holders)
    assert not bad.verify().ok
    healing = copied(bad, source, first)
    assert healing.moved_bytes >= CHUNK
    assert fetched(bad, healing, tmp_path) == data and restored(bad, done.snapshot.id, tmp_path) == data


def test_what_a_memo_says_wrongly_is_not_believed(tmp_path: Path, own_cache: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pack, "PACK_BYTES", 1 << 18)
    source, target = region(tmp_path), region(tmp_path, ("k",))
    data = noise(1, 12 * MIB)
    snapshot = take(source, data)
    with pytest.raises(CancelledError):
        copied(target, source, snapshot, key="k", progress=stop_after(2))
    (memo,) = (own_cache / "snapcore" / "copies").iterdir()
    found = bytearray(memo.read_bytes())
    assert found and not any(data[start : start + 16] in found for start in range(0, len(data), CHUNK))
    # Both chunks are over there: only the checksum says that they stand in each other's place.
    found[12:44], found[44:76] = found[44:76], found[12:44]
    memo.write_bytes(found + b"torn")
    assert fetched(target, copied(target, source, snapshot, key="k"), tmp_path) == data
    assert not memo.exists()


def test_a_taken_name_over_there_ends_the_copy_as_it_ends_any_writer(tmp_path: Path) -> None:
    source = region(tmp_path)
    snapshot = take(source, disk(1, 40))
    ended = []

    def hook(method: str, name: str) -> None:
        if method == "put_new" and name.startswith("index/") and not ended:
            ended.append(target.end_session(target.sessions()[0].id))

    target = region(tmp_path, store=Watched(MemoryStore(), hook))
    try:
        done = copied(target, source, snapshot)
    except Error as error:
        assert "ended by somebody else" in str(error)  # noqa: PT017
        assert target.snapshots() == []
    else:
        assert fetched(target, done, tmp_path) == disk(1, 40)
    assert ended


def test_no_holder_of_a_key_is_made_or_replaced_by_a_copy(tmp_path: Path) -> None:
    source, target = region(tmp_path, ("k",)), region(tmp_path)
    written: list[str] = []
    snapshot = take(source, disk(1, 40), key="k")
    share("k", source, target, tmp_path)
    with pytest.raises(ExistsError):
        region(tmp_path, ("k",)).keyring.share("k", target.keyring, KeyFile.create(str(tmp_path / "another")))
    store = Watched(store_in(target), lambda method, name: written.append(name) if method == "put_new" else None)
    copied(Repository.open(store), source, snapshot)
    assert written and not any(name.startswith("keys/") for name in written)


def test_packs_of_a_copy_are_whole_ones(tmp_path: Path) -> None:
    source, target = region(tmp_path), region(tmp_path)
    done = copied(target, source, take(source, noise(1, 40 * MIB)))
    made = [name for name in objects_of(store_in(target)) if name != "config"]
    assert len(made) + 1 <= done.snapshot.stored_bytes / (12 * MIB) + 4
    assert storer.pack.PACK_BYTES == 16 * MIB
