"""A repository under random work is compared, after every step, with an oracle that keeps whole disks as dicts.

The oracle knows the disks, the snapshots' contents and what the format says about their trees; it knows nothing of
packs, patches, hints, spans or collections. Four variants: small chunks, chunks large enough to be patched, bounds
on memory so low that every limit is met (many packs, paged index, many spans in flight), and a local folder.

`HYPOTHESIS_PROFILE=long` makes a campaign of it.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from snapcore import CancelledError, Image, Manifest, Progress, RefusedError, Repository, SourceChangedError
from snapcore.persist import Medium
from snapcore.repository import collect, create, index, manifest, pack, reading, restore, storer
from snapcore.repository.domain import PLAIN
from snapcore.repository.record import Form, RecordKind
from snapcore.source import raw
from snapcore.store import LocalStore, MemoryStore, Store
from tests.support.sparse import FANOUT, PAGE_BYTES, SparseDisk, extents_of, read_sparse

Thing = TypeVar("Thing")

MOST_DISKS = 4
COMPRESSIONS = [None, "lz4", "zstd", "none"]
# Spread, for small numbers are drawn most often and would all stand for the same place.
number = st.integers(0, 1 << 20).map(lambda drawn: drawn * 2654435761 % (1 << 32))


@dataclass(frozen=True)
class Variant:
    """What kind of repository is put to the test."""

    name: str
    chunk_bytes: int
    local: bool = False
    tight: bool = False


VARIANTS = [
    Variant("small-chunks", 4 << 10),
    Variant("patches", 64 << 10),
    Variant("tight", 16 << 10, tight=True),
    Variant("local-folder", 8 << 10, local=True),
]


@dataclass
class Taken:
    """A snapshot as it was returned, and the disk as it was then."""

    manifest: Manifest
    disk: SparseDisk


@dataclass
class Live:
    """A disk that is written to: the oracle's idea of it, and the image file."""

    name: str
    disk: SparseDisk
    path: Path


class RepositoryMachine(RuleBasedStateMachine):
    """The rules are what users do; each compares what it gets with the oracle."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.chunk_bytes = variant.chunk_bytes
        self.folder = Path(tempfile.mkdtemp(prefix="snapcore-model-"))
        self.patched = pytest.MonkeyPatch()
        # Nobody writes to the images while a snapshot is taken here.
        self.patched.setattr(raw, "_STAMP_TICK_S", 0.0)
        if variant.tight:
            self._tighten()
        self.store: Store = LocalStore(str(self.folder / "repository")) if variant.local else MemoryStore()
        self.repository = Repository.create(self.store, chunk_bytes=self.chunk_bytes)
        self.lives: list[Live] = []
        self.taken: list[Taken] = []
        self.images: list[tuple[Image, list[Taken]]] = []
        self.restored: list[Path] = []
        self.made = 0
        self.medium = Medium()

    def _tighten(self) -> None:
        for module in (create, reading, restore):
            self.patched.setattr(module, "SPAN_BYTES", 2 * self.chunk_bytes)
        self.patched.setattr(pack, "PACK_BYTES", 8 * self.chunk_bytes)
        self.patched.setattr(collect, "_SMALL_BYTES", 2 * self.chunk_bytes)
        self.patched.setattr(collect, "_INDEX_OBJECTS", 2)
        self.patched.setattr(storer, "_INDEX_ENTRIES", 16)
        self.patched.setattr(index, "RESIDENT_ENTRIES", 24)
        self.patched.setattr(index, "_PAGES_KEPT", 2)

    def teardown(self) -> None:
        self.patched.undo()
        shutil.rmtree(self.folder)

    # Disks

    @initialize(size=number)
    def begin(self, size: int) -> None:
        self.new_disk(size)

    @precondition(lambda self: len(self.lives) < MOST_DISKS)
    @rule(size=number)
    def new_disk(self, size: int) -> None:
        name = f"disk-{len(self.lives)}"
        live = Live(name, SparseDisk(self._size(size)), self.folder / name)
        with live.path.open("xb") as file:
            file.truncate(live.disk.size_bytes)
        self.lives.append(live)

    @rule(which=number, at=number, length=number, seed=number, aligned=st.booleans())
    def write(self, which: int, at: int, length: int, seed: int, aligned: bool) -> None:
        self._write(_one_of(self.lives, which), at, _noise(length % (5 * PAGE_BYTES), seed), aligned)

    @rule(which=number, at=number, pages=st.integers(1, 40), sign=st.sampled_from(b"\0ab"))
    def write_the_same_over_and_over(self, which: int, at: int, pages: int, sign: int) -> None:
        """Zeros as data, and content that many places and disks have in common."""
        self._write(_one_of(self.lives, which), at, bytes([sign]) * (pages * PAGE_BYTES), True)

    @rule(which=number, other=number, at=number, start=number, length=number)
    def write_a_copy_of_another_disks_bytes(self, which: int, other: int, at: int, start: int, length: int) -> None:
        giver = _one_of(self.lives, other).disk
        data = giver.read(self._place(giver, start), length % (6 * self.chunk_bytes))
        self._write(_one_of(self.lives, which), at, data, bool(length % 4))

    @rule(which=number, at=number, length=number)
    def punch_a_hole(self, which: int, at: int, length: int) -> None:
        live = _one_of(self.lives, which)
        start = self._place(live.disk, at)
        count = min(length % (3 * self.chunk_bytes), live.disk.size_bytes - start)
        if count > 0:
            with live.path.open("r+b") as file:
                self.medium.punch(file.fileno(), start, count)
            live.disk.clear(start, count)

    @rule(which=number, size=number)
    def grow_or_shrink(self, which: int, size: int) -> None:
        live = _one_of(self.lives, which)
        live.disk.resize(self._size(size))
        os.truncate(live.path, live.disk.size_bytes)

    # Snapshots

    @rule(which=number, compression=st.sampled_from(COMPRESSIONS), paranoid=st.booleans())
    def take_a_snapshot(self, which: int, compression: str | None, paranoid: bool) -> None:
        live = _one_of(self.lives, which)
        self._keep(live, self._newest(live), compression=compression, paranoid=paranoid)

    @rule(which=number, seeds=st.lists(number, min_size=1, max_size=6), compression=st.sampled_from(COMPRESSIONS))
    def take_a_snapshot_after_a_days_work(self, which: int, seeds: list[int], compression: str | None) -> None:
        """Few pages change, near each other: what is changed again and again is what patches are made of."""
        live = _one_of(self.lives, which)
        for seed in seeds:
            self._write(live, seed % 11, _noise(1 + seed % (2 * PAGE_BYTES), seed), bool(seed % 3))
        self._keep(live, self._newest(live), compression=compression)

    @rule(which=number)
    def take_a_snapshot_on_a_host_that_lost_its_hints(self, which: int) -> None:
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
        live = _one_of(self.lives, which)
        self._keep(live, self._newest(live))

    @precondition(lambda self: self.taken)
    @rule(which=number, parent=number)
    def take_a_snapshot_against_any_parent(self, which: int, parent: int) -> None:
        self._keep(_one_of(self.lives, which), _one_of(self.taken, parent), name_parent=True)

    @rule(which=number, wide=st.lists(st.tuples(number, number), max_size=3), lost=st.booleans())
    def take_a_snapshot_with_a_true_list_of_changes(self, which: int, wide: list[tuple[int, int]], lost: bool) -> None:
        """Exact to the page, and with more than has changed, in any order, beyond the end too."""
        live = _one_of(self.lives, which)
        newest = self._newest(live)
        if newest is None:
            return
        if lost:
            shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
        numbers = newest.disk.differing_chunks(live.disk, PAGE_BYTES)
        exact = [(page * PAGE_BYTES, PAGE_BYTES) for page in numbers]
        more = [(self._place(live.disk, at), length % (4 * self.chunk_bytes)) for at, length in wide]
        self._keep(live, newest, changed=exact[::-1] + more)

    @rule(which=number, seed=number)
    def a_list_that_lies_is_refused(self, which: int, seed: int) -> None:
        """Up to 16 chunks of data and 16 of the rest are always read. Of a larger disk only a sample is, so there the
        lie covers every chunk that holds data, and every sample meets it."""
        live = _one_of(self.lives, which)
        newest = self._newest(live)
        if newest is None or live.disk.size_bytes == 0:
            return
        chunks = -(-live.disk.size_bytes // self.chunk_bytes)
        old = set(newest.disk.chunks(self.chunk_bytes))
        if chunks <= 16:
            chosen = [seed % chunks]
        else:
            live.disk.resize(0)
            os.truncate(live.path, 0)
            live.disk.resize(chunks * self.chunk_bytes)
            os.truncate(live.path, live.disk.size_bytes)
            chosen = sorted(place for place in old | {seed % chunks} if place < chunks)
        for place in chosen:
            start = place * self.chunk_bytes
            data = _noise(min(PAGE_BYTES, live.disk.size_bytes - start), seed + 1)
            if newest.disk.read(start, len(data)) == data:
                data = bytes(sign ^ 1 for sign in data)
            live.disk.write(start, data)
            with live.path.open("r+b") as file:
                os.pwrite(file.fileno(), data, start)
        if newest.disk.size_bytes != live.disk.size_bytes:
            # What lies behind the end of the shorter one is known to differ: the lie has to lie before it.
            common = min(newest.disk.size_bytes, live.disk.size_bytes) // self.chunk_bytes
            if not any(place < common for place in chosen) or chunks <= 16:
                return
            if not all(place < common for place in chosen):
                return
        with pytest.raises(SourceChangedError):
            self.repository.snapshot(live.path, disk=live.name, changed=[])

    @rule(which=number, step=st.integers(0, 3))
    def a_cancelled_snapshot_is_not_there(self, which: int, step: int) -> None:
        live = _one_of(self.lives, which)
        calls = 0

        def stop(progress: Progress) -> None:
            nonlocal calls
            calls += 1
            if calls > step:
                raise CancelledError("enough")

        try:
            created = self.repository.snapshot(live.path, disk=live.name, progress=stop)
        except CancelledError:
            return
        assert calls <= step
        self._note(live, self._newest(live), created.snapshot)

    @precondition(lambda self: self.taken)
    @rule(which=number, behind=st.booleans())
    def delete_any_snapshot(self, which: int, behind: bool) -> None:
        """One that an image holds goes only behind the back of who looks for images."""
        gone = _one_of(self.taken, which)
        if gone not in self._held():
            assert self.repository.delete(gone.manifest.id) == gone.manifest.id
        elif behind:
            found = gone.manifest
            manifest.delete(self.store, manifest.name(PLAIN, found.disk, found.sequence, found.id), PLAIN)
        else:
            with pytest.raises(RefusedError, match="in use by the image"):
                self.repository.delete(gone.manifest)
            return
        self.taken.remove(gone)

    # Images

    @precondition(lambda self: self.taken and len(self.images) < 3)
    @rule(chosen=st.lists(number, min_size=1, max_size=3))
    def make_an_image(self, chosen: list[int]) -> None:
        held = [_one_of(self.taken, which) for which in chosen]
        system, *data = [item.manifest for item in held]
        made = self.repository.create_image("debian", system, dict(zip(("xvdb", "xvdc"), data, strict=False)))
        self.images.append((made, held))

    @precondition(lambda self: self.images)
    @rule(which=number)
    def delete_an_image(self, which: int) -> None:
        gone = _one_of(self.images, which)
        self.images.remove(gone)
        self.repository.delete_image(gone[0])

    @precondition(lambda self: self.images)
    @rule(which=number)
    def read_an_image(self, which: int) -> None:
        found, held = _one_of(self.images, which)
        for disk, expected in zip(found.disks, held, strict=True):
            assert disk.snapshot == expected.manifest
            path = self.folder / "of-an-image"
            self.repository.restore(disk.snapshot, path)
            assert read_sparse(path) == expected.disk
            path.unlink()

    @invariant()
    def the_images_are_those_that_were_made_and_not_deleted(self) -> None:
        listed = {item.id: item for item in self.repository.images()}
        assert listed == {item.id: item for item, _ in self.images}

    def _held(self) -> list[Taken]:
        return [item for _, held in self.images for item in held]

    @rule(sparing=st.booleans())
    def collect(self, sparing: bool) -> None:
        """A small repository ends exact; a collection that may move nothing for free still ends with little waste."""
        with pytest.MonkeyPatch.context() as patched:
            if sparing:
                patched.setattr(collect, "_CHEAP_BYTES", 0)
            self.repository.collect()
        chunks, nodes = self._reached()
        stored = self._stored()
        packs = {bytes.fromhex(name.removeprefix("packs/")) for name, _ in self.store.list("packs/")}
        assert {pack_id for _, pack_id, _ in stored.values()} == packs
        if not sparing:
            assert {object_id for object_id, (kind, _, _) in stored.items() if kind == RecordKind.CHUNK} == chunks
            assert {object_id for object_id, (kind, _, _) in stored.items() if kind == RecordKind.NODE} == nodes
            return
        assert stored.keys() >= chunks | nodes
        live = sum(stored[object_id][2] for object_id in chunks | nodes)
        assert sum(size for _, _, size in stored.values()) - live <= live / 20

    @rule()
    def rebuild_the_index(self) -> None:
        self.repository.rebuild_index()

    @rule()
    def reopen(self) -> None:
        self.repository = Repository.open(self.store)

    # What users see

    @precondition(lambda self: self.taken)
    @rule(which=number)
    def restore_to_a_new_file(self, which: int) -> None:
        wanted = _one_of(self.taken, which)
        self.made += 1
        path = self.folder / f"restored-{self.made}"
        self.repository.restore(wanted.manifest, path)
        assert read_sparse(path) == wanted.disk
        self.restored.append(path)
        while len(self.restored) > 3:
            self.restored.pop(0).unlink()

    @precondition(lambda self: self.taken and self.restored)
    @rule(which=number, onto=number)
    def restore_in_place_onto_an_older_file(self, which: int, onto: int) -> None:
        wanted = _one_of(self.taken, which)
        path = _one_of(self.restored, onto)
        self.repository.restore(wanted.manifest, path, in_place=True)
        assert read_sparse(path) == wanted.disk
        assert self.repository.restore(wanted.manifest, path, in_place=True).written_bytes == 0

    @precondition(lambda self: self.taken)
    @rule(which=number, onto=number)
    def roll_a_disk_back(self, which: int, onto: int) -> None:
        live = _one_of(self.lives, onto)
        wanted = _one_of(self.taken, which)
        self.repository.restore(wanted.manifest, live.path, in_place=True)
        live.disk = wanted.disk.copy()
        assert read_sparse(live.path) == live.disk

    @precondition(lambda self: self.taken)
    @rule(a=number, b=number)
    def the_diff_of_any_two_is_the_oracles(self, a: int, b: int) -> None:
        old, new = _one_of(self.taken, a), _one_of(self.taken, b)
        whole = max(old.disk.size_bytes, new.disk.size_bytes)
        numbers = old.disk.differing_chunks(new.disk, self.chunk_bytes)
        found = self.repository.diff(old.manifest, new.manifest)
        assert found.tolist() == extents_of(numbers, self.chunk_bytes, whole)

    @precondition(lambda self: self.taken)
    @rule(mask=number)
    def unique_is_what_deletion_would_free(self, mask: int) -> None:
        chosen = [item for place, item in enumerate(self.taken) if mask >> place & 1]
        others = [item for place, item in enumerate(self.taken) if not mask >> place & 1] + self._held()
        found = self.repository.unique([item.manifest for item in chosen])
        if self.chunk_bytes == PAGE_BYTES:
            # A chunk of one page is never a patch: bytes of contents that no other snapshot has.
            mine = {plain for item in chosen for plain in item.disk.chunks(PAGE_BYTES).values()}
            theirs = {plain for item in others for plain in item.disk.chunks(PAGE_BYTES).values()}
            assert found.plain_bytes == PAGE_BYTES * len(mine - theirs)
        stored = self._stored()
        gone = set.union(*self._reached()) - set.union(*self._reached(others))
        assert found.stored_bytes == sum(stored[object_id][2] for object_id in gone)

    @precondition(lambda self: self.taken)
    @rule(which=number, places=st.lists(st.tuples(number, number), min_size=1, max_size=4))
    def a_reader_reads_anywhere(self, which: int, places: list[tuple[int, int]]) -> None:
        wanted = _one_of(self.taken, which)
        reader = self.repository.open_snapshot(wanted.manifest)
        for at, length in places:
            offset, count = self._place(wanted.disk, at), length % (3 * self.chunk_bytes)
            buffer = bytearray(count)
            found = reader.pread_into(buffer, offset)
            assert bytes(buffer[:found]) == wanted.disk.read(offset, count)

    @rule()
    def verify_finds_nothing_wrong(self) -> None:
        found = self.repository.verify()
        assert found.ok, (found.problems, found.hits)
        assert found.snapshots == len(self.taken)

    @invariant()
    def the_snapshots_are_those_that_were_taken_and_not_deleted(self) -> None:
        listed = {item.id: item for item in self.repository.snapshots()}
        assert listed == {item.manifest.id: item.manifest for item in self.taken}

    @invariant()
    def nobody_is_registered(self) -> None:
        assert self.repository.sessions() == []

    # Helpers

    def _size(self, drawn: int) -> int:
        """Sizes about the borders of the tree's levels, whole pages or not; a 65th of them zero."""
        levels = [3, 16, FANOUT, 2 * FANOUT, FANOUT**2]
        chunks = levels[drawn % 5] - 2 + drawn // 5 % 5
        return max(0, chunks * self.chunk_bytes + [0, 0, 1, -513, PAGE_BYTES][drawn // 25 % 5]) * bool(drawn % 65)

    def _place(self, disk: SparseDisk, drawn: int) -> int:
        """An offset within a disk: near its start, its end, or the borders of its nodes."""
        if disk.size_bytes == 0:
            return 0
        near = [0, disk.size_bytes, FANOUT * self.chunk_bytes, drawn * PAGE_BYTES, 8 * self.chunk_bytes]
        offset = near[drawn % 5] + (drawn // 5 % (8 * self.chunk_bytes)) - 4 * self.chunk_bytes
        return offset % disk.size_bytes

    def _write(self, live: Live, at: int, data: bytes, aligned: bool) -> None:
        start = self._place(live.disk, at)
        if aligned:
            start -= start % PAGE_BYTES
        data = data[: live.disk.size_bytes - start]
        live.disk.write(start, data)
        with live.path.open("r+b") as file:
            os.pwrite(file.fileno(), data, start)

    def _newest(self, live: Live) -> Taken | None:
        chain = [item for item in self.taken if item.manifest.disk == live.name]
        return max(chain, key=lambda item: (item.manifest.sequence, item.manifest.id), default=None)

    def _keep(
        self,
        live: Live,
        parent: Taken | None,
        *,
        compression: str | None = None,
        paranoid: bool = False,
        name_parent: bool = False,
        changed: list[tuple[int, int]] | None = None,
    ) -> None:
        """Take a snapshot and check what is said about it."""
        created = self.repository.snapshot(
            live.path,
            disk=live.name,
            parent=parent.manifest if parent is not None and name_parent else None,
            changed=changed,
            paranoid=paranoid,
            compression=compression,
        )
        self._note(live, parent, created.snapshot)

    def _note(self, live: Live, parent: Taken | None, found: Manifest) -> None:
        old = parent.disk if parent else SparseDisk(0)
        root, levels, _ = live.disk.tree(self.chunk_bytes)
        assert (found.root, found.levels) == (root.hex(), levels)
        assert found.size_bytes == live.disk.size_bytes
        assert found.parent == (parent.manifest.id if parent else None)
        assert found.written_bytes == self.chunk_bytes * len(live.disk.chunks(self.chunk_bytes))
        assert found.changed_bytes == self.chunk_bytes * len(old.differing_chunks(live.disk, self.chunk_bytes))
        self.taken.append(Taken(found, live.disk.copy()))

    def _rows(self) -> list[tuple[bytes, int, bytes, int, bytes | None]]:
        """(id, kind, pack, stored bytes, base) of every entry of the index."""
        rows = []
        for contents in self.repository._context.index().tables():
            for object_id, entry in zip(contents.ids(), contents.entries, strict=True):
                patch = entry["form"] == Form.PATCH
                base = contents.bases[entry["base"]].tobytes() if patch else None
                where = contents.packs[entry["pack"]]
                rows.append((object_id.tobytes(), int(entry["kind"]), where, int(entry["stored"]), base))
        return rows

    def _stored(self) -> dict[bytes, tuple[int, bytes, int]]:
        """(kind, pack, stored bytes) of every object; each is stored once."""
        rows = self._rows()
        stored = {object_id: (kind, where, size) for object_id, kind, where, size, _ in rows}
        assert len(stored) == len(rows)
        return stored

    def _reached(self, items: list[Taken] | None = None) -> tuple[set[bytes], set[bytes]]:
        """Ids of the chunks and of the nodes that snapshots need, with the bases of patches."""
        chunks: set[bytes] = set()
        nodes: set[bytes] = set()
        for item in [*self.taken, *self._held()] if items is None else items:
            chunks.update(item.disk.chunk_ids(self.chunk_bytes).values())
            nodes |= item.disk.tree(self.chunk_bytes)[2]
        bases = {object_id: base for object_id, _, _, _, base in self._rows() if base is not None}
        chunks |= {bases[object_id] for object_id in chunks if object_id in bases}
        nodes |= {bases[object_id] for object_id in nodes if object_id in bases}
        return chunks, nodes


def _one_of(things: list[Thing], drawn: int) -> Thing:
    return things[drawn % len(things)]


def _noise(length_bytes: int, seed: int) -> bytes:
    """Bytes that compress or not, the same for the same seed."""
    source = random.Random(seed)
    return (
        source.randbytes(length_bytes) if seed % 2 else (source.randbytes(16) * (length_bytes // 16 + 1))[:length_bytes]
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_repository_under_random_work_does_what_the_oracle_says(variant: Variant) -> None:
    machine: Callable[[], RepositoryMachine] = lambda: RepositoryMachine(variant)  # noqa: E731
    run_state_machine_as_test(machine, settings=settings(settings(), stateful_step_count=30))
