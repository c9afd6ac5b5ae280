"""A crash at any instant loses nothing that was acknowledged, shows nothing half-made, and stops nobody.

Real work is recorded primitive by primitive (tests/support/recorder.py); each state that a crash could leave is built
and used: it opens, verifies, reads bit for bit, and takes the next snapshot and the next collection.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from snapcore import ExistsError, LockedError, NotFoundError, Repository
from snapcore.repository import collect, pack
from snapcore.store import LocalStore, MemoryStore, Store
from tests.support.disks import changed, disk
from tests.support.holders import Fixed
from tests.support.recorder import Crash, FastMedium, Recorder, crashes
from tests.support.small import Bytes

CHUNK_BYTES = 4096
HOLDER = Fixed("of the crash tests")


@dataclass(frozen=True)
class Taking:
    """A create was called; from here on its snapshot may be there."""

    content: bytes


@dataclass(frozen=True)
class Taken:
    """A create returned."""

    id: str
    content: bytes


@dataclass(frozen=True)
class Deleting:
    """A delete was called."""

    id: str


@dataclass(frozen=True)
class Deleted:
    """A delete returned."""

    id: str


@dataclass
class Work:
    """A repository whose every primitive is recorded, and what was promised about it."""

    root: Path
    recorder: Recorder = field(init=False)
    repository: Repository = field(init=False)
    contents: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Record from here on; what was done before is durable."""
        self.recorder = Recorder(self.root)
        self.repository = unlocked(LocalStore(str(self.root / "repository"), medium=self.recorder))
        for snapshot in self.repository.snapshots():
            self.recorder.note(Taken(snapshot.id, self.contents[snapshot.id]))

    def take(self, content: bytes, name: str = "disk", **options: object) -> str:
        self.recorder.note(Taking(content))
        options.setdefault("key", key_of(self.repository))
        created = self.repository.snapshot(Bytes(content), disk=name, **options)  # type: ignore[arg-type]
        self.contents[created.snapshot.id] = content
        self.recorder.note(Taken(created.snapshot.id, content))
        return created.snapshot.id

    def delete(self, snapshot: str) -> None:
        self.recorder.note(Deleting(snapshot))
        self.repository.delete(snapshot)
        self.recorder.note(Deleted(snapshot))


def make(root: Path, chunk_bytes: int = CHUNK_BYTES, *, keyed: bool = False) -> Work:
    root.mkdir(exist_ok=True)
    repository = Repository.create(root / "repository", chunk_bytes=chunk_bytes)
    if keyed:
        repository.keyring.create("K", HOLDER)
    return Work(root)


def unlocked(store: Store) -> Repository:
    """The repository, with its key when it has one."""
    repository = Repository.open(store)
    if repository.keyring.any():
        repository.unlock(HOLDER)
    return repository


def key_of(repository: Repository) -> str | None:
    """The key that snapshots go under."""
    return "K" if repository.keyring.any() else None


def read(repository: Repository, snapshot: str) -> bytes:
    reader = repository.open_snapshot(snapshot)
    buffer = bytearray(reader.size_bytes)
    assert reader.pread_into(buffer, 0) == len(buffer)
    return bytes(buffer)


def check_promises(repository: Repository, facts: tuple[object, ...]) -> dict[str, bytes]:
    """What was acknowledged is there, whole; what else is listed is whole too. Returns what each snapshot holds."""
    taken = {fact.id: fact.content for fact in facts if isinstance(fact, Taken)}
    under_way = [fact.content for fact in facts if isinstance(fact, Taking)]
    deleting = {fact.id for fact in facts if isinstance(fact, Deleting)}
    deleted = {fact.id for fact in facts if isinstance(fact, Deleted)}
    found = {snapshot.id: read(repository, snapshot.id) for snapshot in repository.snapshots()}
    assert taken.keys() - deleting <= found.keys(), "an acknowledged snapshot is gone"
    assert not deleted & found.keys(), "a deleted snapshot is back"
    for snapshot, content in found.items():
        if snapshot in taken:
            assert content == taken[snapshot], "an acknowledged snapshot holds other bytes"
        else:
            assert content in under_way, "a snapshot that nobody took"
    return found


def work_goes_on(repository: Repository, held: dict[str, bytes], content: bytes) -> None:
    """A create, a delete and a collection do what they do anywhere."""
    created = repository.snapshot(Bytes(content), disk="disk", key=key_of(repository)).snapshot.id
    held = held | {created: content}
    if len(held) > 2:
        oldest = min(held)
        repository.delete(oldest)
        del held[oldest]
    repository.collect()
    assert repository.sessions() == []
    assert repository.verify().ok
    assert {snapshot.id for snapshot in repository.snapshots()} == held.keys()
    for snapshot, expected in held.items():
        assert read(repository, snapshot) == expected


def use(store: Store, crash: Crash, next_content: bytes | None) -> None:
    """What a state must be good for; with `next_content`, work goes on."""
    verified = unlocked(store).verify()
    assert verified.ok, verified
    held = check_promises(unlocked(store), crash.facts)
    if next_content is not None:
        work_goes_on(unlocked(store), held, next_content)


def replay(work: Work, folder: Path, samples: int, next_content: bytes) -> int:
    """Use every state that a crash could leave, in a folder. Returns how many."""
    count = 0
    for crash in crashes(work.recorder, samples):
        crash.build(folder)
        with told(work, crash):
            use(store_in(folder), crash, next_content)
            assert not any((folder / "repository" / "tmp").iterdir())
        shutil.rmtree(folder)
        count += 1
    return count


def replay_fast(work: Work, folder: Path, samples: int, next_content: bytes) -> int:
    """As `replay`, but parts of what was not durable are looked at in memory, and work goes on in a quarter of them."""
    count = 0
    for crash in crashes(work.recorder, samples, unread="repository/tmp"):
        with told(work, crash):
            if crash.how == "some":
                store = MemoryStore()
                for name, data in crash.files.items():
                    if not name.startswith("repository/tmp/"):
                        store.put_new(name.removeprefix("repository/"), [data])
                use(store, crash, next_content if count % 4 == 0 else None)
            else:
                crash.build(folder)
                use(store_in(folder), crash, next_content)
                assert not any((folder / "repository" / "tmp").iterdir())
                shutil.rmtree(folder)
        count += 1
    return count


@contextmanager
def told(work: Work, crash: Crash) -> Iterator[None]:
    """Says which crash it was when something fails."""
    try:
        yield
    except Exception as error:
        last = work.recorder.operations[crash.done - 1] if crash.done else None
        after = f"{last.kind} {last.path} {last.target}" if last else "nothing"
        error.add_note(f"crash after {crash.done} operations, the last: {after}; of what was not durable: {crash.how}")
        raise


def store_in(folder: Path) -> LocalStore:
    return LocalStore(str(folder / "repository"), medium=FastMedium())


def opened(folder: Path) -> Repository:
    return Repository.open(store_in(folder))


def first(work: Work) -> None:
    work.take(disk(1, 12))


def incremental(work: Work) -> None:
    content = disk(1, 12)
    work.take(content)
    work.start()
    work.take(changed(content, 2))


def known_changes(work: Work) -> None:
    """A list of changes edits this host's fingerprints in place."""
    content = disk(1, 12)
    work.take(content)
    work.start()
    work.take(content[:4096] + b"new!" + content[4100:], changed=[(4096, 4)])


def grown(work: Work) -> None:
    """The tree gets another level."""
    content = disk(1, 8) + bytes(100 * 4096)
    work.take(content)
    work.start()
    work.take(content + bytes(20 * 4096) + disk(2, 8))


def two_disks(work: Work) -> None:
    work.take(disk(1, 12))
    work.take(disk(2, 12), "other")


def delete(work: Work) -> None:
    content = disk(1, 12)
    ids = []
    for number in range(3):
        ids.append(work.take(content))
        content = changed(content, number)
    work.start()
    work.delete(ids[1])
    work.delete(ids[2])


def collect_dead(work: Work) -> None:
    """Whole packs are dead."""
    gone = work.take(disk(1, 12))
    work.take(disk(2, 12), "other")
    work.delete(gone)
    work.start()
    work.repository.collect()


def collect_rewritten(work: Work) -> None:
    """Packs are mostly dead, and what lives in them is moved."""
    content = disk(1, 24)
    gone = work.take(content)
    work.take(content[: 6 * 4096] + disk(5, 18))
    work.delete(gone)
    work.start()
    work.repository.collect()


def rebuild(work: Work) -> None:
    content = disk(1, 12)
    work.take(content)
    work.take(changed(content, 3))
    work.start()
    work.repository.rebuild_index()


def everything(work: Work) -> None:
    """One thing after the other, all of it recorded."""
    content = disk(1, 12)
    ids = []
    for number in range(3):
        ids.append(work.take(content))
        content = changed(content, number)
    work.delete(ids[0])
    work.repository.collect()
    work.take(content)
    work.delete(ids[2])
    work.repository.collect()
    work.repository.rebuild_index()
    work.take(changed(content, 9), "other")


WORKS = [first, incremental, known_changes, grown, two_disks, delete, collect_dead, collect_rewritten, rebuild]


@pytest.fixture(autouse=True)
def no_waiting_for_the_medium(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder says what is durable; nothing here has to survive a crash of this machine."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of a few chunks, so that every step has several."""
    monkeypatch.setattr(pack, "PACK_BYTES", 16 << 10)
    monkeypatch.setattr(collect, "_SMALL_BYTES", 4 << 10)


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("do", WORKS, ids=lambda do: do.__name__)
def test_a_crash_loses_nothing_and_stops_nobody(do: Callable[[Work], None], tmp_path: Path) -> None:
    work = make(tmp_path / "real")
    do(work)
    assert replay_fast(work, tmp_path / "crashed", 20, disk(8, 12)) > 5


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("do", [incremental, collect_rewritten, rebuild], ids=lambda do: do.__name__)
def test_a_crash_loses_nothing_under_a_key_either(do: Callable[[Work], None], tmp_path: Path) -> None:
    work = make(tmp_path / "real", keyed=True)
    do(work)
    assert replay_fast(work, tmp_path / "crashed", 10, disk(8, 12)) > 5


def test_a_crash_while_a_key_is_made_or_rotated_leaves_it_open_to_somebody(tmp_path: Path) -> None:
    """On a real folder, every state of the medium; step by step: test_keyring.py."""
    work = make(tmp_path / "real", keyed=True)
    taken = work.take(disk(1, 3))
    work.start()
    (old,) = [holder.id for key in work.repository.keyring.listed() for holder in key.holders]
    work.repository.keyring.create("L", HOLDER)
    work.recorder.note("made")
    work.repository.keyring.rotate("K", old, Fixed("new"))
    work.recorder.note("rotated")
    for number, crash in enumerate(crashes(work.recorder, samples=10)):
        folder = tmp_path / str(number)
        crash.build(folder)
        repository = Repository.open(store_in(folder))
        holders = [Fixed("new")] if "rotated" in crash.facts else [HOLDER, Fixed("new")]
        for holder in holders:
            with contextlib.suppress(LockedError):
                repository.unlock(holder)
        assert read(repository, taken) == disk(1, 3)
        if "made" in crash.facts:
            assert "L" in {key.name for key in repository.unlock(HOLDER)}
        shutil.rmtree(folder)


@pytest.mark.usefixtures("small_packs")
def test_patches_and_their_bases_survive_a_crash(tmp_path: Path) -> None:
    work = make(tmp_path / "real", chunk_bytes=16 << 10)
    content = disk(1, 24)
    work.take(content)
    work.start()
    work.take(changed(content, 2))
    assert replay_fast(work, tmp_path / "crashed", 20, changed(content, 3)) > 20


def test_a_crash_while_a_repository_is_made_leaves_one_or_none(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    recorder = Recorder(real)
    Repository.create(LocalStore(str(real / "repository"), medium=recorder))
    recorder.note("made")
    for number, crash in enumerate(crashes(recorder, samples=20)):
        folder = tmp_path / str(number)
        crash.build(folder)
        try:
            repository = opened(folder)
        except NotFoundError:
            assert "made" not in crash.facts
            repository = Repository.create(folder / "repository")
        assert repository.snapshots() == []
        assert repository.verify().ok


def test_a_crash_while_damage_is_marked_leaves_a_repository_that_heals(tmp_path: Path) -> None:
    work = make(tmp_path / "real")
    content = disk(1, 12)
    snapshot = work.take(content)
    largest = max((work.root / "repository" / "packs").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[200] ^= 1
    largest.write_bytes(data)
    opened(work.root).verify()
    work.start()
    assert not work.repository.verify().ok
    assert any(operation.kind == "unlink" for operation in work.recorder.operations)
    for number, crash in enumerate(crashes(work.recorder, samples=20)):
        folder = tmp_path / str(number)
        crash.build(folder)
        repository = opened(folder)
        assert [hit.snapshot for hit in repository.verify().hits] == [snapshot]
        healed = repository.snapshot(Bytes(content), disk="disk").snapshot.id
        assert read(repository, healed) == content
        assert read(repository, snapshot) == content
        repository.collect()
        assert repository.verify().hits == []


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in_place"])
def test_a_restore_after_a_crash_of_one_ends_right(in_place: bool, tmp_path: Path) -> None:
    work = make(tmp_path / "real")
    content = disk(1, 20)
    snapshot = work.take(content)
    place = tmp_path / "targets"
    place.mkdir()
    if in_place:
        (place / "target").write_bytes(changed(content, 4, pages=12)[:-6000])
    recorder = Recorder(place)
    work.repository.restore(snapshot, place / "target", in_place=in_place, medium=recorder)
    recorder.note("restored")
    count = 0
    for crash in crashes(recorder, samples=20):
        folder = tmp_path / "crashed"
        crash.build(folder)
        target = folder / "target"
        if "restored" in crash.facts or (target.exists() and not in_place):
            assert target.read_bytes() == content, crash
        if in_place or not target.exists():
            work.repository.restore(snapshot, target, in_place=in_place, medium=FastMedium())
        else:
            with pytest.raises(ExistsError):
                work.repository.restore(snapshot, target)
        assert target.read_bytes() == content
        shutil.rmtree(folder)
        count += 1
    assert count > 40


@pytest.mark.campaign
@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("do", [*WORKS, everything], ids=lambda do: do.__name__)
def test_a_crash_campaign(do: Callable[[Work], None], tmp_path: Path) -> None:
    """Work goes on in every state that `SNAPCORE_CRASH_SAMPLES` samples a prefix find, 200 unless told."""
    samples = int(os.environ.get("SNAPCORE_CRASH_SAMPLES", "200"))
    for chunk_bytes in (4096, 16 << 10):
        root = tmp_path / str(chunk_bytes)
        work = make(root, chunk_bytes)
        do(work)
        count = replay(work, tmp_path / "crashed", samples, disk(8, 12))
        print(f"{do.__name__}, chunks of {chunk_bytes}: {len(work.recorder.operations)} operations, {count} states")
