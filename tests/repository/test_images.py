"""An image keeps what it is made of: whatever is deleted, collected, fenced or forged beside it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapcore import (
    BusyError,
    DamagedError,
    FencedError,
    Image,
    LockedError,
    Manifest,
    MemoryStore,
    NotFoundError,
    RefusedError,
    Repository,
    StoreError,
    UsageError,
)
from snapcore.errors import Error
from snapcore.repository import Group, Member, manifest, session
from snapcore.repository.domain import PLAIN
from tests.support import forge
from tests.support.counting import CountingStore
from tests.support.holders import Fixed
from tests.support.regions import FailingOnce, Watched
from tests.support.small import Bytes

CHUNK = 4096
ANY_ID = "ab" * 16


def content(seed: int, chunks: int = 6) -> bytes:
    """Of a disk: noise, with a hole in it."""
    return random.Random(seed).randbytes(chunks * CHUNK) + bytes(3 * CHUNK) + b"end"


def taken(repository: Repository, disk: str, seed: int, key: Any = None) -> Manifest:
    """A snapshot of a disk of that content."""
    return repository.snapshot(Bytes(content(seed)), disk=disk, key=key).snapshot


def held(repository: Repository, image: Image, device: str = "/dev/xvda") -> bytes:
    """What is in a disk of an image."""
    snapshot = image.disk(device).snapshot
    assert snapshot is not None
    return repository.open_snapshot(snapshot).read()


@pytest.fixture
def repository() -> Repository:
    return Repository.create(MemoryStore(), chunk_bytes=CHUNK)


def test_an_image_says_what_it_was_made_of_and_is_found_by_name_and_id(repository: Repository) -> None:
    system, data = taken(repository, "web", 1), taken(repository, "data", 2)
    made = repository.create_image(
        "debian 12",
        system,
        {"xvdc": 1 << 20, "/dev/xvdb": data},
        architecture="aarch64",
        boot="uefi",
        os="Debian 12",
        min_size_bytes=1 << 30,
        tags={"stage": "tested"},
        checksums=True,
    )
    assert [(disk.device, disk.min_size_bytes, disk.snapshot) for disk in made.disks] == [
        ("/dev/xvda", 1 << 30, system),
        ("/dev/xvdb", data.size_bytes, data),
        ("/dev/xvdc", 1 << 20, None),
    ]
    sums = [hashlib.sha256(content(seed)).hexdigest() for seed in (1, 2)]
    assert [disk.sha256 for disk in made.disks] == [*sums, None]
    assert (made.architecture, made.boot, made.os, made.tags) == ("aarch64", "uefi", "Debian 12", {"stage": "tested"})
    assert repository.images() == [made]
    assert repository.image("debian 12") == repository.image(made.id[:7]) == repository.image(made) == made
    repository.create_image("debian 12", system)
    with pytest.raises(UsageError, match="stands for 2 images"):
        repository.image("debian 12")
    with pytest.raises(NotFoundError, match="no image"):
        repository.image("debian 13")
    with pytest.raises(NotFoundError, match="/dev/xvda, /dev/xvdb"):
        made.disk("xvdz")


def test_a_snapshot_that_an_image_holds_cannot_be_deleted_until_the_image_is(repository: Repository) -> None:
    system, data = taken(repository, "web", 1), taken(repository, "data", 2)
    made = repository.create_image("debian", system, {"xvdb": data})
    for snapshot in (system, data):
        with pytest.raises(RefusedError, match=rf"{snapshot.id} .*image debian.*image delete {made.id}"):
            repository.delete(snapshot)
    assert repository.unique([system, data]).stored_bytes == 0
    assert repository.delete_image("debian") == made.id
    assert repository.images() == [] and repository.unique([system, data]).stored_bytes > 0
    for snapshot in (system, data):
        repository.delete(snapshot)
    repository.collect()
    assert repository.usage().stored_bytes == 0
    with pytest.raises(NotFoundError):
        repository.delete_image("debian")


@pytest.mark.parametrize("number", [0, 1, 2, 16, 17])
def test_an_image_has_up_to_sixteen_data_snapshots(repository: Repository, number: int) -> None:
    system = taken(repository, "web", 1)
    data: dict[str, Manifest | str | int] = {f"xvd{chr(ord('b') + at)}": system for at in range(number)}
    data |= {"xvdy": 1 << 20, "xvdz": 1}
    if number == 17:
        with pytest.raises(UsageError, match="up to 16"):
            repository.create_image("debian", system, data)
    else:
        assert len(repository.create_image("debian", system, data).snapshots) == 1 + number


WRONG: dict[str, dict[str, Any]] = {
    "the system disk twice": {"data": {"xvda": "system"}},
    "a device twice": {"data": {"xvdb": "system", "/dev/xvdb": 5}},
    "no device": {"data": {"sdb": "system"}},
    "a device too many": {"data": {"xvdaa": "system"}},
    "an empty disk of nothing": {"data": {"xvdb": 0}},
    "smaller than the snapshot": {"min_size_bytes": 5},
    "no name": {"name": ""},
    "a short name": {"name": "d"},
    "a name that begins with a digit": {"name": "12 debian"},
    "a name like an id": {"name": "abcdef"},
    "a name of two lines": {"name": "debian\n12"},
    "no architecture": {"architecture": "x86 64"},
    "no way to boot": {"boot": "network"},
    "a long os": {"os": "x" * 129},
    "a tag of two lines": {"tags": {"a": "b\nc"}},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_an_image_is_refused(repository: Repository, what: str) -> None:
    words: dict[str, Any] = {"name": "debian", "data": {}, **WRONG[what]}
    system = taken(repository, "web", 1)
    words["data"] = {device: system if one == "system" else one for device, one in words["data"].items()}
    with pytest.raises((UsageError, RefusedError)):
        repository.create_image(words.pop("name"), system, words.pop("data"), **words)
    assert repository.images() == [] and repository.sessions() == []


def test_a_member_of_a_group_that_is_not_complete_is_refused(repository: Repository) -> None:
    member = repository.snapshot(Bytes(content(1)), disk="web", group=ANY_ID).snapshot
    with pytest.raises(RefusedError, match="not complete"):
        repository.create_image("debian", member)
    assert repository.images() == [] and repository.sessions() == []
    repository.put_group(Group(id=ANY_ID, name=None, created="", members=[Member(disk="web", snapshot=member.id)]))
    assert repository.create_image("debian", member).snapshots == [member]


def test_an_image_is_under_the_key_of_its_snapshots_and_under_one(tmp_path: Path) -> None:
    store = MemoryStore()
    repository = Repository.create(store, chunk_bytes=CHUNK)
    for name in ("one", "two"):
        repository.keyring.create(name, Fixed(name))
    sealed, other = taken(repository, "web", 1, "one"), taken(repository, "data", 2, "two")
    with pytest.raises(RefusedError, match="different keys"):
        repository.create_image("debian", sealed, {"xvdb": other})
    made = repository.create_image("debian", sealed, os="a secret")
    assert made.key == sealed.key
    for data in forge.objects_of(store).values():
        assert b"a secret" not in data and b"debian" not in data
    stranger = Repository.open(store)
    assert stranger.images() == []
    with pytest.raises(LockedError, match="one"):
        stranger.image(made.id)
    stranger.collect()
    assert stranger.verify().ok
    again = Repository.open(store, keys=[Fixed("one")])
    assert held(again, again.image("debian")) == content(1)
    again.keyring.disable("one")
    with pytest.raises(LockedError, match="disabled"):
        again.create_image("another", sealed)


def test_what_an_image_holds_outlives_the_manifest_that_went_at_the_same_time(repository: Repository) -> None:
    """Whoever deletes looks for images first; one may come between that look and the deletion."""
    system = taken(repository, "web", 1)
    made = repository.create_image("debian", system)
    store = repository._context.store
    manifest.delete(store, manifest.name(PLAIN, system.disk, system.sequence, system.id), PLAIN)
    taken(repository, "web", 3)
    for _ in range(4):
        repository.collect()
    assert system.id not in {item.id for item in repository.snapshots()}
    assert repository.verify().ok and held(repository, made) == content(1)
    assert repository.find(system.id) == system
    with pytest.raises(NotFoundError):
        repository.delete(system)
    # Nothing begins from it.
    with pytest.raises(Error):
        repository.snapshot(Bytes(content(4)), disk="another", parent=system)
    with pytest.raises(NotFoundError, match="any more"):
        repository.create_image("another", system)
    repository.delete_image(made)
    for _ in range(4):
        repository.collect()
    with pytest.raises(NotFoundError):
        repository.find(system.id)
    assert repository.verify().ok


def steps_of(work: Callable[[Repository], object]) -> int:
    """How many calls of the store it takes."""
    calls = 0

    def count(method: str, name: str) -> None:
        nonlocal calls
        calls += 1

    watched = Watched(MemoryStore(), lambda method, name: None)
    repository = Repository.create(watched, chunk_bytes=CHUNK)
    taken(repository, "web", 1)
    watched.hook = count
    work(repository)
    return calls


def create(repository: Repository) -> Image:
    """An image of the snapshot that is there."""
    return repository.create_image("debian", repository.snapshots()[0])


class _Interference:
    """At the n-th call, another one deletes the snapshot and collects until nothing is left to do."""

    def __init__(self, store: MemoryStore, system: Manifest, at: int, *, looks: bool) -> None:
        self._store = store
        self._system = system
        self._left = at
        self._looks = looks
        # Of every second one, a collector with no patience.
        self._patience_s = 0.0 if at % 2 else float("inf")

    def __call__(self, method: str, name: str) -> None:
        self._left -= 1
        if self._left != -1:
            return
        other, system = Repository.open(self._store), self._system
        try:
            if self._looks:
                other.delete(system)
            else:
                manifest.delete(self._store, manifest.name(PLAIN, "web", system.sequence, system.id), PLAIN)
        except (RefusedError, NotFoundError):
            return
        for _ in range(4):
            other.collect(patience_s=self._patience_s)


@pytest.mark.parametrize("deleter", ["looks", "does not look"])
def test_whatever_happens_between_two_steps_of_the_making_the_image_is_whole_or_not_there(deleter: str) -> None:
    outcomes = set()
    for at in range(steps_of(create)):
        store = MemoryStore()
        watched = Watched(store, lambda method, name: None)
        maker = Repository.create(watched, chunk_bytes=CHUNK)
        system = taken(maker, "web", 1)
        watched.hook = _Interference(store, system, at, looks=deleter == "looks")
        try:
            made: Image | None = create(maker)
        except (BusyError, NotFoundError, FencedError, IndexError):
            made = None
        watched.hook = lambda method, name: None
        for _ in range(4):
            maker.collect()
        assert maker.images() == ([] if made is None else [made])
        assert maker.verify().ok and maker.sessions() == []
        if made is not None:
            assert held(maker, made) == content(1)
        outcomes.add(made is not None)
    assert outcomes == {True, False}


def test_a_store_that_fails_at_any_call_leaves_the_image_or_nothing() -> None:
    for at in range(steps_of(create)):
        store = MemoryStore()
        maker = Repository.create(Watched(store, lambda method, name: None), chunk_bytes=CHUNK)
        taken(maker, "web", 1)
        hook = FailingOnce(at)
        Watched.__init__(maker._context.store, store, hook)
        try:
            made = [create(maker)]
        except StoreError:
            made = []
        after = Repository.open(store)
        # What has no name yet may have come to have one; what has is whole.
        assert made in ([], after.images()) or hook.failed
        for image in after.images():
            assert held(after, image) == content(1)
        again = create(after)
        after.collect()
        assert after.verify().ok and held(after, again) == content(1)


def test_a_writer_that_was_taken_for_dead_makes_it_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    watched = Watched(store, lambda method, name: None)
    repository = Repository.create(watched, chunk_bytes=CHUNK)
    system = taken(repository, "web", 1)
    ended = []

    def end(method: str, name: str) -> None:
        if method == "put_new" and name.startswith("images/") and not ended:
            ended.append(name)
            for item in session.sessions(store):
                session.end(store, item)

    watched.hook = end
    made = repository.create_image("debian", system)
    assert ended == [f"images/{item.removeprefix('images/')}" for item in ended] and made.id not in ended[0]
    # The tombstone stays, and is no image.
    assert len(list(store.list("images/"))) == 2 and repository.images() == [made]
    assert repository.verify().ok
    repository.collect()


def test_who_deletes_and_who_makes_an_image_at_once_do_not_both_go_on() -> None:
    """Each puts something first and looks then."""
    store = MemoryStore()
    watched = Watched(store, lambda method, name: None)
    deleter, maker = Repository.create(watched, chunk_bytes=CHUNK), Repository.open(store)
    outcomes = []
    while len(outcomes) < 60:
        system = taken(maker, "web", 1)
        left = len(outcomes)
        made: list[Image] = []

        def interfere(method: str, name: str) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                with contextlib.suppress(BusyError, NotFoundError):
                    made.append(maker.create_image("debian", system))  # noqa: B023 - called in this turn only

        watched.hook = interfere
        try:
            deleter.delete(system)
            outcomes.append("deleted")
        except RefusedError:
            outcomes.append("refused")
        watched.hook = lambda method, name: None
        there = {item.id for item in maker.snapshots()}
        assert all(item.id in there for image in maker.images() for item in image.snapshots)
        for image in maker.images():
            maker.delete_image(image)
        for item in maker.snapshots():
            maker.delete(item)
        assert maker.pins() == []
        if left >= 0:
            break
    assert {*outcomes} == {"deleted", "refused"}


@pytest.fixture(scope="module")
def forged() -> tuple[forge.Objects, str, dict[str, Any]]:
    store = MemoryStore()
    repository = Repository.create(store, chunk_bytes=CHUNK)
    made = repository.create_image("debian", taken(repository, "web", 1), {"xvdb": taken(repository, "data", 2)})
    objects = forge.objects_of(store)
    name = f"images/{made.id}"
    return objects, name, json.loads(forge.body_of(objects[name]))


def lost(objects: forge.Objects, name: str) -> None:
    """It is named as damaged, and stops what would need it to be right; it can be removed."""
    repository = Repository.open(forge.store_of(objects))
    for work in (repository.images, repository.collect, lambda: repository.delete(repository.snapshots()[0])):
        with pytest.raises(DamagedError, match=name):
            work()
    with pytest.raises(DamagedError, match="image is lost"):
        repository.image(name[7:])
    found = repository.verify()
    assert not found.ok and any(problem.where == name for problem in found.problems)
    repository.delete_image(name[7:])
    assert repository.verify().ok and repository.collect() is not None


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no system disk": lambda body: body["disks"].pop(0),
    "two system disks": lambda body: body["disks"].append(body["disks"][0]),
    "another order": lambda body: body["disks"].reverse(),
    "an empty system disk": lambda body: body["disks"][0].update(snapshot=None),
    "a device of another kind": lambda body: body["disks"][1].update(device="/dev/../etc/passwd"),
    "a smaller disk": lambda body: body["disks"][0].update(min_size_bytes=1),
    "a disk beyond all bounds": lambda body: body["disks"][0].update(min_size_bytes=1 << 61),
    "another id": lambda body: body.update(id="00" * 16),
    "another key": lambda body: body.update(key="00" * 16),
    "a root of another length": lambda body: body["disks"][0]["snapshot"].update(root="00"),
    "a tree of another height": lambda body: body["disks"][0]["snapshot"].update(levels=9),
    "a size below zero": lambda body: body["disks"][0]["snapshot"].update(size_bytes=-5),
    "chunks of no size": lambda body: body["disks"][0]["snapshot"].update(chunk_bytes=0),
    "a snapshot of another key": lambda body: body["disks"][0]["snapshot"].update(key="00" * 16),
    "a sequence that is none": lambda body: body["disks"][0]["snapshot"].update(sequence=-1),
    "an id that is none": lambda body: body["disks"][0]["snapshot"].update(id="../config"),
    "a checksum that is none": lambda body: body["disks"][0].update(sha256="x"),
    "a name of control characters": lambda body: body.update(name="debian\x1b[2J"),
    "no text": lambda body: body.update(name=5),
    "no boot": lambda body: body.update(boot="floppy"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_image_is_damaged_and_never_believed(
    forged: tuple[forge.Objects, str, dict[str, Any]], what: str
) -> None:
    objects, name, body = forged
    body = json.loads(json.dumps(body))
    FORGED[what](body)
    lost({**objects, name: forge.with_body(objects[name], json.dumps(body).encode())}, name)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_bit_of_an_image_flips_unnoticed(
    forged: tuple[forge.Objects, str, dict[str, Any]], data: st.DataObject
) -> None:
    objects, name, _ = forged
    at = data.draw(st.integers(0, len(objects[name]) * 8 - 1))
    flipped = bytearray(objects[name])
    flipped[at // 8] ^= 1 << at % 8
    repository = Repository.open(forge.store_of({**objects, name: bytes(flipped)}))
    with pytest.raises(Error):
        repository.images()
    with pytest.raises(Error):
        repository.collect()


def test_a_name_that_is_none_stops_a_list(forged: tuple[forge.Objects, str, dict[str, Any]]) -> None:
    objects, name, _ = forged
    with pytest.raises(DamagedError, match="no name of an image"):
        Repository.open(forge.store_of({**objects, "images/readme": b""})).images()
    with pytest.raises(DamagedError, match="moved or exchanged"):
        Repository.open(forge.store_of({**objects, f"images/{ANY_ID}": objects[name]})).images()


def test_making_one_costs_the_same_however_much_it_holds(repository: Repository) -> None:
    counts = []
    for chunks in (1, 300):
        store = CountingStore(MemoryStore())
        made = Repository.create(store, chunk_bytes=CHUNK)
        system = made.snapshot(Bytes(content(1, chunks)), disk="web").snapshot
        store.reset()
        made.create_image("debian", system)
        counts.append(len(store.calls))
    assert counts[0] == counts[1]


def test_a_parent_that_only_a_cache_remembers_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its packs may be collected: what begins from it would lose them."""
    from snapcore.repository import repository as module
    from snapcore.store import CacheStore

    store = MemoryStore()
    monkeypatch.setattr(module, "with_cache", lambda store, id: CacheStore(store, id, str(tmp_path), 1 << 20))
    repository = Repository.create(store, chunk_bytes=CHUNK)
    parent = taken(repository, "web", 1)
    monkeypatch.setattr(repository, "find", lambda snapshot: parent)
    Repository.open(store).delete(parent)
    for _ in range(3):
        Repository.open(store).collect()
    with pytest.raises(Error):
        repository.snapshot(Bytes(content(1)), disk="another", parent=parent)
    with pytest.raises(NotFoundError, match="any more"):
        repository.create_image("debian", parent)
    assert Repository.open(store).verify().ok
