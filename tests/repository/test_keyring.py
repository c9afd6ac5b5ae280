"""Keys and their holders: who can open what, what every crash leaves, what hostile key objects can do."""

from __future__ import annotations

import base64
import contextlib
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import (
    DamagedError,
    Error,
    ExistsError,
    KeyFile,
    LockedError,
    MemoryStore,
    NotFoundError,
    Passphrase,
    RefusedError,
    Repository,
    UsageError,
)
from snapcore.keys import Holder
from snapcore.repository import envelope
from snapcore.repository.envelope import Kind
from tests.support import disks, forge
from tests.support.forge import objects_of, store_of
from tests.support.holders import Fixed
from tests.support.small import Bytes

CONTENT = disks.disk(1, 10)


def prepared(*words: str) -> tuple[MemoryStore, str]:
    """A repository with the key K, held by each of these words, and the id of one snapshot under it."""
    store = MemoryStore()
    repository = Repository.create(store, chunk_bytes=4096)
    repository.keyring.create("K", Fixed(words[0]))
    for word in words[1:]:
        repository.keyring.add("K", Fixed(word))
    return store, repository.snapshot(Bytes(CONTENT), disk="d", key="K").snapshot.id


def opens(store: MemoryStore, word: str) -> bool:
    """Whether a word opens the key, and with it the snapshot."""
    try:
        repository = Repository.open(store, keys=[Fixed(word)])
    except LockedError:
        return False
    (snapshot,) = repository.snapshots()
    with repository.open_snapshot(snapshot) as file:
        assert file.read() == CONTENT
    return True


def holder_ids(store: MemoryStore) -> list[str]:
    """Ids of the holders of K."""
    return [holder.id for key in Repository.open(store).keyring.listed() for holder in key.holders]


def holder_of(store: MemoryStore, word: str) -> str:
    """The id of the holder that a word is."""
    for holder_id in holder_ids(store):
        only = {name: data for name, data in objects_of(store).items() if name[:5] != "keys/" or holder_id in name}
        if opens(store_of(only), word):
            return holder_id
    raise AssertionError(word)


def test_each_holder_opens_the_key_and_nobody_else_does() -> None:
    store, _ = prepared("one", "two")
    assert opens(store, "one") and opens(store, "two") and not opens(store, "three")
    with pytest.raises(LockedError, match="K is held by another fixed"):
        Repository.open(store, keys=[Fixed("three")])
    with pytest.raises(LockedError, match="opens no key"):
        Repository.create(MemoryStore()).unlock(Fixed("one"))


def test_one_holder_opens_all_its_keys_at_once() -> None:
    store, _ = prepared("one")
    repository = Repository.open(store)
    repository.keyring.create("L", Fixed("one"))
    repository.keyring.create("M", Fixed("two"))
    opened = Repository.open(store).unlock(Fixed("one"))
    assert [key.name for key in opened] == ["K", "L"] and all(key.unlocked for key in opened)


def test_a_passphrase_and_a_key_file_open_one_key(tmp_path: Path) -> None:
    repository = Repository.create(MemoryStore(), chunk_bytes=4096)
    repository.keyring.create("K", Passphrase("correct horse"))
    repository.keyring.add("K", KeyFile.create(tmp_path / "key"))
    made: list[Holder] = [Passphrase("correct horse"), KeyFile(tmp_path / "key")]
    for holder in made:
        assert [key.name for key in Repository.open(repository._context.store).unlock(holder)] == ["K"]
    for holder in (Passphrase("wrong horse"), KeyFile.create(tmp_path / "other")):
        with pytest.raises(LockedError, match="K is held by another"):
            Repository.open(repository._context.store).unlock(holder)


def test_rotation_puts_a_new_holder_in_the_place_of_the_old_and_writes_no_data() -> None:
    store, _ = prepared("old", "other")
    before = {name: data for name, data in objects_of(store).items() if name[:5] != "keys/"}
    repository = Repository.open(store, keys=[Fixed("other")])
    repository.keyring.rotate("K", holder_of(store, "old"), Fixed("new"))
    assert opens(store, "new") and opens(store, "other") and not opens(store, "old")
    assert {name: data for name, data in objects_of(store).items() if name[:5] != "keys/"} == before


def test_the_last_holder_is_not_removed() -> None:
    store, _ = prepared("one", "two")
    keyring = Repository.open(store).keyring
    assert keyring.remove("K", holder_of(store, "one")[:8]) == holder_ids(store)[0] or opens(store, "two")
    for _ in range(2):
        with pytest.raises(RefusedError, match="last holder"):
            keyring.remove("K", holder_ids(store)[0])
    assert opens(store, "two") and not opens(store, "one")
    assert len(forge.names(objects_of(store), "keys/")) == 1
    with pytest.raises(NotFoundError, match="0 holders"):
        keyring.remove("K", "f" * 32)
    with pytest.raises(NotFoundError, match="1 holders"):
        keyring.remove("K", "")


def test_a_holder_that_cannot_be_read_does_not_count_as_one_that_stays() -> None:
    store, _ = prepared("one", "two")
    gone = holder_of(store, "two")
    name = next(item for item in forge.names(objects_of(store), "keys/") if item.endswith(gone))
    store._objects[name] = store._objects[name][:-1] + b"?"
    keyring = Repository.open(store).keyring
    assert {holder.kind for key in keyring.listed() for holder in key.holders} == {"fixed", "unreadable"}
    with pytest.raises(RefusedError, match="last holder"):
        keyring.remove("K", holder_of(store, "one"))
    keyring.remove("K", gone)
    assert opens(store, "one")


class StoppedError(Exception):
    """The process ends here."""


class Counting:
    """A store that stops before its n-th change, or calls something there."""

    def __init__(self, store: MemoryStore, number: int, then: Callable[[], None]) -> None:
        self._store = store
        self._left = number
        self._then = then

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in ("put_new", "delete", "list", "get", "size"):
            return found

        def call(*arguments: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                self._then()
            result = found(*arguments)
            return iter(list(result)) if name == "list" else result

        return call


def stop() -> None:
    raise StoppedError


WORK: dict[str, Callable[[Repository, str], object]] = {
    "create": lambda repository, _: repository.keyring.create("L", Fixed("new")),
    "add": lambda repository, _: repository.keyring.add("K", Fixed("new")),
    "remove": lambda repository, old: repository.keyring.remove("K", old),
    "rotate": lambda repository, old: repository.keyring.rotate("K", old, Fixed("new")),
    "disable": lambda repository, _: repository.keyring.disable("K"),
    "enable": lambda repository, _: repository.keyring.enable("K"),
}


@pytest.mark.parametrize("what", WORK)
def test_a_crash_at_any_step_leaves_the_key_open_to_somebody_and_the_work_can_be_done_again(what: str) -> None:
    number = 0
    while True:
        number += 1
        store, _ = prepared("old", "stays")
        old = holder_of(store, "old")
        if what == "enable":
            Repository.open(store).keyring.disable("K")
        holders: list[Holder] = [] if what == "enable" else [Fixed("stays")]
        repository = Repository.open(store, keys=holders)
        crashing: Any = Counting(store, number, stop)
        repository.keyring._store = crashing
        try:
            WORK[what](repository, old)
        except StoppedError:
            stopped = True
        else:
            stopped = False
        if what in ("disable", "enable"):
            Repository.open(store).keyring.enable("K")
        assert opens(store, "stays")
        if stopped:
            again = Repository.open(store, keys=[Fixed("stays")])
            try:
                WORK[what](again, old)
            except (ExistsError, NotFoundError):
                # It was done but for its last words.
                if what not in ("create", "remove", "rotate"):
                    raise
        if what == "enable":
            assert opens(store, "stays")
        if what in ("remove", "rotate"):
            assert not opens(store, "old") and opens(store, "stays")
        if what in ("add", "create", "rotate"):
            assert Repository.open(store).unlock(Fixed("new"))
        if not stopped:
            break
    assert number > 2


def test_two_removals_at_once_never_remove_the_last_holder() -> None:
    number = 0
    while True:
        number += 1
        store, _ = prepared("one", "two")
        one, two = holder_of(store, "one"), holder_of(store, "two")
        ran = []

        def other(store: MemoryStore = store, two: str = two, ran: list[int] = ran) -> None:
            ran.append(1)
            try:
                Repository.open(store).keyring.remove("K", two)
            except (RefusedError, NotFoundError):
                return

        keyring = Repository.open(store).keyring
        counting: Any = Counting(store, number, other)
        keyring._store = counting
        with contextlib.suppress(RefusedError, NotFoundError):
            keyring.remove("K", one)
        assert opens(store, "one") or opens(store, "two")
        if not ran:
            break
    assert number > 4


@pytest.mark.parametrize("at", range(1, 12))
def test_two_removals_step_by_step_never_remove_the_last_holder(at: int) -> None:
    """The other one stops at each of its steps while this one runs through."""
    import threading

    store, _ = prepared("one", "two")
    one, two = holder_of(store, "one"), holder_of(store, "two")
    go, there = threading.Event(), threading.Event()

    def wait() -> None:
        there.set()
        go.wait(30)

    keyring = Repository.open(store).keyring
    counting: Any = Counting(store, at, wait)
    keyring._store = counting

    def first() -> None:
        try:
            keyring.remove("K", one)
        except (RefusedError, NotFoundError):
            pass
        finally:
            there.set()

    thread = threading.Thread(target=first)
    thread.start()
    there.wait(30)
    with contextlib.suppress(RefusedError, NotFoundError):
        Repository.open(store).keyring.remove("K", two)
    go.set()
    thread.join()
    assert opens(store, "one") or opens(store, "two")


def test_all_work_with_a_disabled_key_is_refused_before_it_starts(tmp_path: Path) -> None:
    store, snapshot_id = prepared("one")
    repository = Repository.open(store, keys=[Fixed("one")])
    repository.keyring.disable("K")
    before = objects_of(store)
    work: list[Callable[[], object]] = [
        lambda: repository.snapshot(Bytes(b"new"), disk="d"),
        lambda: repository.snapshot(Bytes(b"new"), disk="other", key="K"),
        lambda: repository.restore(snapshot_id, tmp_path / "out"),
        lambda: repository.open_snapshot(snapshot_id),
        lambda: repository.delete(snapshot_id),
        repository.collect,
        repository.verify,
        lambda: Repository.open(store, keys=[Fixed("one")]),
    ]
    for call in work:
        with pytest.raises(LockedError, match=r"disabled.*key enable K"):
            call()
    assert objects_of(store) == before and not (tmp_path / "out").exists()
    repository.keyring.enable("K")
    assert opens(store, "one") and repository.verify().ok


def test_names_of_keys_are_unique_and_plain_words() -> None:
    store, _ = prepared("one")
    keyring = Repository.open(store, keys=[Fixed("one")]).keyring
    with pytest.raises(ExistsError, match="has a key K"):
        keyring.create("K", Fixed("two"))
    for name in ("", "7", "a b", "a/b", "x" * 65, "é", "-a"):
        with pytest.raises(UsageError, match="name of a key"):
            keyring.create(name, Fixed("two"))
    with pytest.raises(NotFoundError, match="no key 'L'"):
        keyring.find("L")
    assert keyring.find(keyring.listed()[0].id) is keyring.find("K")


def test_of_two_keys_of_one_name_that_which_opens_counts() -> None:
    """Somebody who can write may put a key of that name there; it opens to nobody else."""
    store, _ = prepared("one")
    other, _ = prepared("stranger")
    store._objects.update({name: data for name, data in objects_of(other).items() if name[:5] == "keys/"})
    repository = Repository.open(store, keys=[Fixed("one")])
    assert repository.snapshot(Bytes(CONTENT), disk="d", key="K").snapshot.parent is not None
    with pytest.raises(UsageError, match="stands for 2 keys"):
        Repository.open(store).keyring.find("K")


def test_a_key_that_was_forgotten_opens_nothing_until_it_is_unlocked_again() -> None:
    store, snapshot_id = prepared("one")
    repository = Repository.open(store, keys=[Fixed("one")])
    (root,) = repository.keyring._roots.values()
    held = root.reveal()
    repository.keyring.lock()
    assert held == bytes(32)
    assert repository.snapshots() == []
    with pytest.raises(LockedError):
        repository.find(snapshot_id)
    with pytest.raises(LockedError):
        repository.keyring.add("K", Fixed("two"))
    repository.unlock(Fixed("one"))
    assert repository.find(snapshot_id)


def wrap_objects() -> dict[str, bytes]:
    """The objects of a repository whose key K "one" holds."""
    return objects_of(prepared("one")[0])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    members=st.dictionaries(
        st.sampled_from(["domain", "holder", "name", "kind", "parameters", "created", "wrapped"]),
        JSON | st.just(base64.b64encode(bytes(60)).decode()),
        min_size=1,
        max_size=3,
    )
)
def test_a_key_object_with_other_members_opens_nothing(members: dict[str, Any]) -> None:
    objects = wrap_objects()
    (name,) = forge.names(objects, "keys/")
    changed = forge.with_members(objects[name], **members)
    if json.loads(forge.body_of(changed)) == json.loads(forge.body_of(objects[name])):
        return
    repository = Repository.open(store_of(objects | {name: changed}))
    repository.keyring.listed()
    with pytest.raises((LockedError, DamagedError)):
        repository.unlock(Fixed("one"))
    with pytest.raises(Error):
        repository.keyring.find("K")


@given(body=st.binary(max_size=100), name=st.text("0123456789abcdef/-xd", max_size=70))
def test_what_does_not_belong_under_keys_harms_nobody(body: bytes, name: str) -> None:
    objects = wrap_objects()
    (right,) = forge.names(objects, "keys/")
    domain = right.split("/")[1]
    strange = {
        f"keys/{name}x": body,
        f"keys/{domain}/{'0' * 32}": body,
        f"keys/{domain}/{'1' * 32}": envelope.sealed(Kind.KEY, b"\x11" * 16, body),
        f"keys/{'2' * 32}/{'2' * 32}": envelope.sealed(Kind.KEY, b"\x22" * 16, body),
    }
    store = store_of(objects | {key: value for key, value in strange.items() if key != right})
    assert opens(store, "one")


def test_a_wrap_of_hostile_cost_is_refused_and_the_others_are_tried(tmp_path: Path) -> None:
    repository = Repository.create(MemoryStore(), chunk_bytes=4096)
    repository.keyring.create("K", Passphrase("horse"))
    objects = objects_of(repository._context.store)
    (name,) = forge.names(objects, "keys/")
    parameters = json.loads(forge.body_of(objects[name]))["parameters"] | {"memory_kib": 1 << 30}
    hostile = forge.with_members(objects[name], parameters=parameters)
    with pytest.raises(LockedError, match="parameters ask for 1073741824 KiB"):
        Repository.open(store_of(objects | {name: hostile})).unlock(Passphrase("horse"))
    other = name[:-32] + "0" * 32
    beside = forge.with_members(forge.with_header(hostile, id=bytes(16)), holder="0" * 32)
    assert Repository.open(store_of(objects | {other: beside})).unlock(Passphrase("horse"))


def test_too_many_key_objects_are_refused() -> None:
    objects = wrap_objects()
    (name,) = forge.names(objects, "keys/")
    many = {f"{name[:-32]}{number:032x}": b"" for number in range(300)}
    with pytest.raises(DamagedError, match="remove what does not belong there"):
        Repository.open(store_of(objects | many)).unlock(Fixed("one"))


def test_no_message_traceback_or_repr_holds_a_secret(tmp_path: Path) -> None:
    words = ["battery-staple", "other-staple"]
    repository = Repository.create(tmp_path / "repo", chunk_bytes=4096)
    repository.keyring.create("K", Passphrase(words[0]))
    file = KeyFile.create(tmp_path / "key")
    repository.keyring.add("K", file)
    root = bytes(next(iter(repository.keyring._roots.values())).reveal())
    domain = repository.keyring.find("K")
    key = (tmp_path / "key").read_text().split("\n")[2]
    shown = [repr(item) for item in (repository, repository.keyring, repository.keyring.listed(), domain, file)]
    shown += [repr(vars(repository.keyring)), repr(repository._of(domain)), repr(repository._of(domain).objects())]
    for call in (
        lambda: Repository.open(tmp_path / "repo", keys=[Passphrase(words[1])]),
        lambda: repository.keyring.create("K", Passphrase(words[1])),
        lambda: Passphrase(words[0] + "\udcff"),
        lambda: Passphrase(words[0] * 1000),
        lambda: repository.keyring.remove("K", "x"),
    ):
        with pytest.raises(Error) as raised:
            call()
        shown += traceback.format_exception(raised.value)
    text = "".join(shown)
    hidden = [root, domain.chunk_key, domain.node_key, domain.tag_key, bytes.fromhex(key)]
    for secret in hidden:
        assert secret.hex() not in text and repr(secret)[2:-1] not in text
    assert "opens no key" in text and key not in text and "staple" not in text
