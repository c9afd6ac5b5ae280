"""A medium that lies: whatever happens to a repository's bytes is noticed or does not matter, and can be healed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import DamagedError, Error, NotFoundError, ReadError, Repository
from snapcore.repository import damage, index, table
from snapcore.repository.domain import PLAIN, ZERO_ID
from snapcore.repository.manifest import Manifest
from snapcore.repository.record import RecordKind
from snapcore.store import MemoryStore
from tests.support import forge
from tests.support.forge import Objects, objects_of, store_of
from tests.support.small import Bytes, Careless, Small, changed_pages, chunks_in, make_small, read_all, restored

KINDS = {"plain": (4096, 12, "none"), "patched": (8192, 12, "lz4"), "wide": (65536, 4, "zstd")}
FOLDERS = ("config", "index/", "packs/", "snapshots/")


@cache
def small(kind: str) -> Small:
    """One repository of each kind, the same for all tests that only read it."""
    return make_small(*KINDS[kind])


def tall() -> Small:
    """A repository whose trees have two levels, and fingerprints of it on this host."""
    return make_small(8192, 140)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of repository."""
    name: str = request.param
    return name


def flipped(data: bytes, offset: int, pattern: int = 0x10) -> bytes:
    """The data with some bits of one byte turned."""
    return data[:offset] + bytes([data[offset] ^ pattern]) + data[offset + 1 :]


def assert_noticed_or_harmless(made: Small, objects: Objects) -> None:
    """Reading hands out nothing wrong, and verify reports exactly what cannot be read."""
    before = read_all(made, objects)
    store = store_of(objects)
    try:
        repository = Repository.open(store)
    except Error:
        return
    verified = repository.verify()
    # A snapshot whose manifest is gone without a trace is like one that was deleted: nothing can tell.
    if any(not isinstance(error, NotFoundError) for error in before.errors):
        assert not verified.ok
    # With a damaged index object nothing is read at all; the hits are what is lost without it.
    named = {problem.where for problem in verified.problems}
    after = read_all(
        made, {name: data for name, data in objects_of(store).items() if name[:6] != "index/" or name not in named}
    )
    lost = {name: chunks for name, chunks in after.lost.items() if chunks}
    assert {hit.snapshot: chunks_in(hit.ranges, repository.chunk_bytes) for hit in verified.hits} == lost
    for snapshot_id, chunks in after.lost.items():
        if chunks is None and any(snapshot_id in name for name in objects):
            assert any(snapshot_id in problem.where for problem in verified.problems)


def noticed_at_once(objects: Objects) -> bool:
    """Whether opening, listing or reading the index fails: then nothing can be read wrong."""
    store = store_of(objects)
    try:
        Repository.open(store).snapshots()
        index.Index.load(store)
    except Error:
        return True
    return False


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "packs/"])
def test_every_flipped_byte_outside_packs_is_noticed(kind: str, folder: str) -> None:
    made = small(kind)
    for name in forge.names(made.objects, folder):
        data = made.objects[name]
        for offset in range(len(data)):
            objects = made.objects | {name: flipped(data, offset, 1 << offset % 8)}
            assert noticed_at_once(objects), f"{name} at {offset}"


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "packs/"])
def test_a_flipped_byte_outside_packs_hits_what_verify_says(kind: str, folder: str) -> None:
    made = small(kind)
    for name in forge.names(made.objects, folder):
        for offset in range(3, len(made.objects[name]), 97):
            assert_noticed_or_harmless(made, made.objects | {name: flipped(made.objects[name], offset)})


def test_a_flipped_byte_in_a_pack_is_noticed_or_harmless(kind: str) -> None:
    made = small(kind)
    names = forge.names(made.objects, "packs/")
    places = [(name, offset) for name in names for offset in range(len(made.objects[name]))]
    # The campaign takes every byte.
    for name, offset in random.Random(1).sample(places, 120):
        data = flipped(made.objects[name], offset, 1 << offset % 8)
        assert_noticed_or_harmless(made, made.objects | {name: data})


@pytest.mark.campaign
@pytest.mark.parametrize("pattern", [0x01, 0x80, 0xFF, 0x10])
def test_every_flipped_byte_is_noticed_or_harmless(kind: str, pattern: int) -> None:
    made = small(kind)
    for name, data in made.objects.items():
        for offset in range(len(data)):
            assert_noticed_or_harmless(made, made.objects | {name: flipped(data, offset, pattern)})


def test_a_byte_that_is_not_checksummed_does_not_matter(kind: str) -> None:
    """The envelope of a pack is the only place: verify names it, and all snapshots read well."""
    made = small(kind)
    name = forge.names(made.objects, "packs/")[0]
    objects = made.objects | {name: flipped(made.objects[name], 9)}
    assert not read_all(made, objects).errors
    assert [problem.where for problem in Repository.open(store_of(objects)).verify().problems] == [name]


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_object_that_was_cut_or_has_grown_is_noticed_or_harmless(kind: str, folder: str) -> None:
    made = small(kind)
    for name in forge.names(made.objects, folder):
        data = made.objects[name]
        for length in sorted({0, 64, 96, len(data) // 2, len(data) - 32, len(data) - 1}):
            assert_noticed_or_harmless(made, made.objects | {name: data[:length]})
        assert_noticed_or_harmless(made, made.objects | {name: data + b"\0"})
        assert_noticed_or_harmless(made, made.objects | {name: data + data})


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_object_that_is_gone_is_noticed_or_harmless(kind: str, folder: str) -> None:
    made = small(kind)
    for name in forge.names(made.objects, folder):
        assert_noticed_or_harmless(made, {key: data for key, data in made.objects.items() if key != name})


def test_exchanged_objects_are_noticed_or_harmless() -> None:
    made = small("patched")
    pairs = list(combinations(sorted(made.objects), 2))
    for a, b in random.Random(1).sample(pairs, 100):
        swapped = made.objects | {a: made.objects[b], b: made.objects[a]}
        assert_noticed_or_harmless(made, swapped)


def test_an_older_index_is_noticed_and_rebuilt(kind: str) -> None:
    made = small(kind)
    kept = {name: data for name, data in made.objects.items() if not name.startswith("index/")}
    assert made.older_index
    objects = kept | made.older_index
    assert_noticed_or_harmless(made, objects)
    assert read_all(made, objects).errors
    store = store_of(objects)
    Repository.open(store).rebuild_index()
    assert not read_all(made, objects_of(store)).errors


def test_older_index_objects_beside_the_new_ones_are_harmless(kind: str) -> None:
    made = small(kind)
    assert not read_all(made, made.objects | made.older_index).errors


def test_stray_files_are_named_and_stop_no_reader() -> None:
    made = small("plain")
    for name in ("packs/x", "packs/abcd", "packs/" + "0" * 33, "packs/0123/45"):
        objects = made.objects | {name: b"stray"}
        assert not read_all(made, objects).errors
        store = store_of(objects)
        problems = Repository.open(store).verify().problems
        assert name in [problem.where for problem in problems]
        Repository.open(store).collect()
        assert name in objects_of(store)


# Restoring what is left


def records(objects: Objects) -> Iterator[tuple[str, int, forge.Rec]]:
    """(pack, offset of the payload, record) of every chunk and node."""
    for name in forge.names(objects, "packs/"):
        at = 64
        for record in forge.records_of(objects[name]):
            yield name, at + 64, record
            at += 64 + len(record.payload)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_restore_that_allows_damage_gives_zeros_where_it_says(kind: str, in_place: bool, tmp_path: Path) -> None:
    made = small(kind)
    rng = random.Random(3)
    for number, (name, offset, _) in enumerate(records(made.objects)):
        objects = made.objects | {name: flipped(made.objects[name], offset)}
        repository = Repository.open(store_of(objects))
        lost = read_all(made, objects).lost
        snapshot_id = rng.choice([name for name, chunks in lost.items() if chunks] or list(lost))
        content, target = made.content[snapshot_id], tmp_path / f"{number}"
        if in_place:
            target.write_bytes(rng.choice(list(made.content.values())))
        if lost[snapshot_id] and not in_place:
            with pytest.raises(DamagedError):
                repository.restore(snapshot_id, tmp_path / "refused", medium=Careless())
            assert not (tmp_path / "refused").exists()
        done = repository.restore(snapshot_id, target, in_place=in_place, allow_damaged=True, medium=Careless())
        if in_place:
            # A chunk that stands there already need not be read.
            assert chunks_in(done.missing, repository.chunk_bytes) <= (lost[snapshot_id] or set())
        else:
            assert chunks_in(done.missing, repository.chunk_bytes) == lost[snapshot_id]
        expected = bytearray(content)
        for start, length in done.missing.tolist():
            expected[start : start + length] = bytes(length)
        assert target.read_bytes() == expected
        target.unlink()


# Healing


def is_leaf(record: forge.Rec, chunk_ids: set[bytes]) -> bool:
    """Whether a full node record holds ids of chunks."""
    assert record.codec in (0, 1)
    plain = forge.plain_of(record)
    return any(plain[start : start + 32] in chunk_ids for start in range(0, 4096, 32))


def victim(made: Small, what: str) -> list[tuple[str, int, forge.Rec]]:
    """Records of the newest snapshot of disk two (or bases they need) to damage."""
    found = list(records(made.objects))
    manifest = made.snapshots[made.disks["two"]]
    content = made.newest("two")
    size = manifest.chunk_bytes
    wanted = {PLAIN.chunk_id(content[at : at + size].ljust(size, b"\0")) for at in range(0, len(content), size)}
    chunks = [item for item in found if item[2].kind == RecordKind.CHUNK and item[2].id in wanted]
    nodes = [item for item in found if item[2].kind == RecordKind.NODE]
    full = {item[2].id: item for item in found if item[2].form == 0}
    all_chunks = {item[2].id for item in found if item[2].kind == RecordKind.CHUNK}
    chosen = {
        "chunk": lambda: [item for item in chunks if item[2].form == 0],
        "patch": lambda: [item for item in chunks if item[2].form == 1],
        "base": lambda: [full[forge.plain_of(item[2])[:32]] for item in chunks if item[2].form == 1],
        "node patch": lambda: [item for item in nodes if item[2].form == 1],
        "leaf": lambda: [item for item in nodes if item[2].form == 0 and is_leaf(item[2], all_chunks)],
        "inner node": lambda: [item for item in nodes if item[2].form == 0 and not is_leaf(item[2], all_chunks)],
    }[what]()
    assert chosen
    return chosen


def hide_hints(own_cache: Path) -> None:
    shutil.rmtree(own_cache, ignore_errors=True)


@pytest.mark.parametrize("how", ["trusted", "no hints", "paranoid", "changed"])
@pytest.mark.parametrize("what", ["chunk", "patch", "base", "node patch", "leaf", "inner node"])
def test_the_next_snapshots_of_the_same_content_heal(what: str, how: str, own_cache: Path, tmp_path: Path) -> None:
    made = tall()
    name, offset, _ = victim(made, what)[-1]
    store = store_of(made.objects | {name: flipped(made.objects[name], offset)})
    repository = Repository.open(store)
    assert not repository.verify().ok
    if how == "no hints":
        hide_hints(own_cache)
    for disk in made.disks:
        newest = made.snapshots[made.disks[disk]]
        created = repository.snapshot(
            Bytes(made.newest(disk)),
            disk=disk,
            paranoid=how == "paranoid",
            changed=[] if how == "changed" else None,
        ).snapshot
        assert restored(repository, created.id, tmp_path) == made.newest(disk)
        assert restored(repository, newest.id, tmp_path) == made.newest(disk)
        assert created.root == newest.root
        assert created.written_bytes == newest.written_bytes
    for snapshot_id, snapshot in made.snapshots.items():
        repository.snapshot(Bytes(made.content[snapshot_id]), disk=snapshot.disk)
    verified = repository.verify()
    assert not verified.hits
    for snapshot_id, content in made.content.items():
        assert restored(repository, snapshot_id, tmp_path) == content
    repository.collect()
    for snapshot_id, content in made.content.items():
        assert restored(repository, snapshot_id, tmp_path) == content


@pytest.mark.parametrize("what", ["leaf", "inner node"])
def test_a_snapshot_of_a_disk_that_shrinks_heals_as_well(what: str, tmp_path: Path) -> None:
    made = tall()
    for name, offset, _ in victim(made, what):
        made.objects[name] = flipped(made.objects[name], offset)
    repository = Repository.open(store_of(made.objects))
    repository.verify()
    content = made.newest("two")[: 20 * 8192 + 77]
    created = repository.snapshot(Bytes(content), disk="two").snapshot
    assert restored(repository, created.id, tmp_path) == content


@pytest.mark.parametrize("changed", [False, True])
def test_a_snapshot_over_damage_that_no_verify_has_seen_fails_or_is_right(changed: bool, tmp_path: Path) -> None:
    made = tall()
    for number, (name, offset, _) in enumerate(list(records(made.objects))[::5]):
        repository = Repository.open(store_of(made.objects | {name: flipped(made.objects[name], offset)}))
        page = number % 270
        content = changed_pages(made.newest("two"), random.Random(number), [page])
        try:
            created = repository.snapshot(
                Bytes(content), disk="two", changed=[(page * 4096, 4096)] if changed else None
            ).snapshot
        except Error:
            continue
        assert_right_or_damaged(repository, created, content)


def assert_right_or_damaged(repository: Repository, snapshot: Manifest, content: bytes) -> None:
    reader = repository.open_snapshot(snapshot)
    size = repository.chunk_bytes
    for start in range(0, len(content), size):
        buffer = bytearray(min(size, len(content) - start))
        try:
            reader.pread_into(buffer, start)
        except DamagedError:
            continue
        assert buffer == content[start : start + size]


class FlakyStore(MemoryStore):
    """Fails one read of a pack."""

    def __init__(self, objects: Objects) -> None:
        super().__init__()
        self._objects.update(objects)
        self.fails_at = -1
        self.reads = 0

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        self.reads += 1
        if self.reads - 1 == self.fails_at:
            raise ReadError(name, offset_bytes, length_bytes, 5, "Input/output error")
        return super().get_range(name, offset_bytes, length_bytes)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("changed", [False, True])
def test_a_read_that_fails_once_makes_no_snapshot_wrong(
    marked: bool, changed: bool, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nodes of the parent that come and go, what did not change must never count as zero."""
    # As in a tree of more nodes than are kept.
    monkeypatch.setattr("snapcore.repository.objects.NODES_KEPT", 0)
    made = tall()
    if marked:
        # A damaged chunk elsewhere, so that the parent's tree is walked for what is suspect.
        name, offset, _ = victim(made, "chunk")[0]
        store = store_of(made.objects | {name: flipped(made.objects[name], offset)})
        Repository.open(store).verify()
        made.objects = objects_of(store)
    saved = tmp_path / "saved"
    shutil.copytree(own_cache, saved)
    content = changed_pages(made.newest("two"), random.Random(1), [200, 270])
    attempt = 0
    while True:
        shutil.rmtree(own_cache)
        shutil.copytree(saved, own_cache)
        store = FlakyStore(made.objects)
        store.fails_at = attempt
        repository = Repository.open(store)
        try:
            rows = [(200 * 4096, 4096), (270 * 4096, 4096)] if changed else None
            created = repository.snapshot(Bytes(content), disk="two", changed=rows).snapshot
        except Error:
            pass
        else:
            failed, store.fails_at = store.reads > attempt, -1
            assert restored(repository, created.id, tmp_path) == content
            if not failed:
                break
        attempt += 1
    assert attempt > 2


# The index, made anew


def test_the_index_is_rebuilt_from_packs(kind: str) -> None:
    made = small(kind)
    names = forge.names(made.objects, "index/")
    for gone in ([name] for name in names), [names]:
        for removed in gone:
            objects = {name: data for name, data in made.objects.items() if name not in removed}
            store = store_of(objects)
            Repository.open(store).rebuild_index()
            assert not read_all(made, objects_of(store)).errors
            assert Repository.open(store).verify().ok


def destroyed_directory(data: bytes) -> Iterator[bytes]:
    """The pack with its directory or footer damaged in several ways."""
    start = int.from_bytes(data[-24:-16], "little")
    yield data[:start]
    yield data[:-1]
    yield data[:-32] + bytes(32)
    yield flipped(data, start)
    yield flipped(data, start + 70)
    yield flipped(data, len(data) - 20)
    yield data[:start] + bytes(len(data) - start)


def test_the_index_is_rebuilt_from_records_where_directories_are_lost(kind: str) -> None:
    made = small(kind)
    kept = {name: data for name, data in made.objects.items() if not name.startswith("index/")}
    for name in forge.names(made.objects, "packs/"):
        for data in destroyed_directory(made.objects[name]):
            store = store_of(kept | {name: data})
            Repository.open(store).rebuild_index()
            assert not read_all(made, objects_of(store)).errors
            verified = Repository.open(store).verify()
            assert not verified.hits
            assert any(name in problem.where for problem in verified.problems)


def test_a_damaged_record_in_a_pack_without_directory_costs_that_record_only() -> None:
    made = small("patched")
    kept = {name: data for name, data in made.objects.items() if not name.startswith("index/")}
    for name, offset, record in records(made.objects):
        data = flipped(made.objects[name], offset)
        start = int.from_bytes(data[-24:-16], "little")
        store = store_of(kept | {name: data[:start]})
        Repository.open(store).rebuild_index()
        known = index.Index.load(store)
        assert known.find(record.id) is None
        assert_noticed_or_harmless(made, objects_of(store))


def test_large_index_objects_are_checked_like_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those only parts are read, so their checksum is not: entries lead to records that have their own."""
    made = small("patched")
    monkeypatch.setattr(index, "RESIDENT_ENTRIES", 0)
    assert not read_all(made, made.objects).errors
    for name in forge.names(made.objects, "index/"):
        for offset in range(64, len(made.objects[name]) - 32, 41):
            objects = made.objects | {name: flipped(made.objects[name], offset)}
            read_all(made, objects)
            verified = Repository.open(store_of(objects)).verify()
            assert name in [problem.where for problem in verified.problems]


# Fingerprints on this host


def hint_files(own_cache: Path) -> list[Path]:
    return sorted((own_cache / "snapcore" / "hints").iterdir())


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes, bytes], bytes]:
    """What may happen to a cache file, given another disk's."""
    how = draw(st.sampled_from(["bytes", "truncate", "other", "other's body", "other's header", "noise", "grow"]))
    offsets = draw(
        st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=16)), max_size=6)
    )
    share = draw(st.floats(0, 1))

    def mutate(data: bytes, other: bytes) -> bytes:
        if how == "bytes":
            changed = bytearray(data)
            for place, noise in offsets:
                at = int(place * len(data))
                changed[at : at + len(noise)] = noise[: len(data) - at]
            return bytes(changed)
        return {
            "truncate": data[: int(share * len(data))],
            "other": other,
            "other's body": data[:64] + other[64:],
            "other's header": other[:64] + data[64:],
            "noise": random.Random(share).randbytes(len(data)),
            "grow": data + data,
        }[how]

    return mutate


@given(mutate=mutations(), pages=st.sets(st.integers(0, 22), max_size=3), edit=st.booleans())
def test_hints_that_were_tampered_with_make_no_snapshot_wrong(
    mutate: Callable[[bytes, bytes], bytes], pages: set[int], edit: bool, own_cache: Path, tmp_path: Path
) -> None:
    shutil.rmtree(own_cache, ignore_errors=True)
    made = make_small(8192, 12)
    store = store_of(made.objects)
    repository = Repository.open(store)
    files = {path: path.read_bytes() for path in hint_files(own_cache)}
    for path, data in files.items():
        path.write_bytes(mutate(data, next(other for name, other in files.items() if name != path)))
    for disk in made.disks:
        content = made.newest(disk)
        # A change, its way back, and another change: a fingerprint left over from any of them would be believed.
        for step, page in ((1, pages), (2, pages), (3, set())):
            data = changed_pages(content, random.Random(step), sorted(page)) if step != 2 else content
            rows = [(at * 4096, 4096) for at in sorted(pages)] if edit and step != 3 else None
            created = repository.snapshot(Bytes(data), disk=disk, changed=rows).snapshot
            assert restored(repository, created.id, tmp_path) == data


def test_a_snapshot_is_right_while_another_one_of_the_disk_edits_the_hints(own_cache: Path, tmp_path: Path) -> None:
    made = make_small(8192, 12)
    repository = Repository.open(store_of(made.objects))
    content = changed_pages(made.newest("two"), random.Random(5), [0, 8])
    began = []

    def other() -> None:
        if not began:
            began.append(True)
            rows = [(0, 4096), (8 * 4096, 4096)]
            inner = repository.snapshot(Bytes(content), disk="two", changed=rows, parent=made.disks["two"])
            began.append(inner.snapshot.id)

    outer = repository.snapshot(Bytes(content, other), disk="two").snapshot
    assert restored(repository, outer.id, tmp_path) == content
    assert restored(repository, began[1], tmp_path) == content
    for data in (made.newest("two"), content):
        created = repository.snapshot(Bytes(data), disk="two").snapshot
        assert restored(repository, created.id, tmp_path) == data


def test_a_zero_root_needs_no_records() -> None:
    store = MemoryStore()
    repository = Repository.create(store, chunk_bytes=4096)
    created = repository.snapshot(Bytes(bytes(9000)), disk="zero").snapshot
    assert bytes.fromhex(created.root) == ZERO_ID
    for name in forge.names(store._objects, "packs/") + forge.names(store._objects, "index/"):
        store.delete(name)
    assert repository.open_snapshot(created).read() == bytes(9000)
    assert np.asarray(repository.verify().hits).size == 0


def test_a_damaged_page_of_the_index_costs_the_chunks_in_it_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "RESIDENT_ENTRIES", 0)
    store = MemoryStore()
    repository = Repository.create(store, chunk_bytes=4096)
    data = random.Random(1).randbytes(1000 * 4096)
    repository.snapshot(Bytes(data), disk="disk")
    known = index.Index.load(store)
    (contents,) = known.tables()
    ids = contents.ids()[contents.entries["kind"] == RecordKind.CHUNK]
    objects = repository._context.objects()
    page = objects.index._parts[0]._page  # type: ignore[union-attr]

    def damaged(number: int) -> table.Entries:
        if number == 5:
            raise DamagedError("a page")
        return page(number)

    monkeypatch.setattr(objects.index._parts[0], "_page", damaged)
    lost = [number for number, plain in objects.chunks(ids) if isinstance(plain, DamagedError)]
    assert 0 < len(lost) <= index.FENCE_ENTRIES + 1


def test_any_number_of_records_can_be_marked() -> None:
    store = MemoryStore()
    marked = [damage.Bad(pack="ab" * 16, offset=number << 20, id="cd" * 32) for number in range(130_000)]
    for found in (marked, marked[:1], []):
        damage.replace(store, found)
        assert sorted(damage.load(store), key=lambda bad: bad.offset) == found


def test_marks_that_somebody_else_removes_meanwhile_are_gone_all_the_same() -> None:
    class Raced(MemoryStore):
        """Somebody else deletes what is to be deleted first."""

        def delete(self, name: str) -> None:
            super().delete(name)
            super().delete(name)

    store = Raced()
    bad = damage.Bad(pack="ab" * 16, offset=1, id="cd" * 32)
    damage.replace(store, [bad])
    damage.replace(store, [])
    assert damage.load(store) == []
