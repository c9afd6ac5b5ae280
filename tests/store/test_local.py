"""What only a store in a folder promises: no remains, no leaked descriptors, names that are durable."""

from __future__ import annotations

import errno
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapcore.errors import DamagedError, Error, ExistsError, NotFoundError, OutOfSpaceError, ReadError, StoreError
from snapcore.store import LimitStore, LocalStore, MemoryStore, RetryStore
from snapcore.store import local as local_module
from tests.support.mediums import Failing, Unsynced

WRITING = ["create", "write_at", "sync", "link"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> LocalStore:
    return LocalStore(str(folder), Unsynced())


def files_below(folder: Path) -> list[str]:
    """All files, temporary ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def open_descriptors() -> int:
    """How many descriptors this process holds, once nobody is left who still lets go of one."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc/self/fd")
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.EIO, StoreError),
        (errno.ENOSPC, OutOfSpaceError),
        (errno.EDQUOT, OutOfSpaceError),
        (errno.EROFS, StoreError),
    ],
)
@pytest.mark.parametrize("primitive", WRITING)
def test_a_creation_that_fails_leaves_no_file_and_no_descriptor(
    folder: Path, primitive: str, code: int, error: type[Error]
) -> None:
    medium = Failing()
    store = LocalStore(str(folder), medium)
    store.put_new("packs/first", [b"first"])
    before = open_descriptors()
    medium.primitive, medium.code = primitive, code
    with pytest.raises(error, match="packs/other"):
        store.put_new("packs/other", [b"data", b"more"])
    assert open_descriptors() <= before
    assert files_below(folder) == ["packs/first"]
    medium.primitive = ""
    store.put_new("packs/other", [b"data"])
    assert store.get("packs/other", 4) == b"data"


def test_a_creation_whose_last_sync_fails_is_an_error_and_the_object_whole(folder: Path) -> None:
    medium = Failing()
    store = LocalStore(str(folder), medium)
    store.put_new("packs/first", [b"first"])
    medium.primitive = "sync_folder"
    with pytest.raises(StoreError, match="packs/other"):
        store.put_new("packs/other", [b"data"])
    assert files_below(folder) == ["packs/first", "packs/other"]
    assert store.get("packs/other", 4) == b"data"


def test_the_loser_of_a_race_leaves_no_file(folder: Path, store: LocalStore) -> None:
    store.put_new("a", [b"first"])
    with pytest.raises(ExistsError):
        store.put_new("a", [b"other"])
    assert files_below(folder) == ["a"]


def test_an_object_is_synced_before_it_has_a_name_and_its_folders_after(folder: Path) -> None:
    medium = Failing()
    LocalStore(str(folder), medium).put_new("snapshots/tag/a", [b"data"])
    path = str(folder / "snapshots" / "tag" / "a")
    order = [call for call, _ in medium.calls if call in {"write_at", "sync", "link"}]
    assert order == ["write_at", "sync", "link"]
    link = medium.calls.index(("link", path))
    assert ("sync_folder", str(folder / "snapshots" / "tag")) in medium.calls[link:]
    for inner in (folder, folder / "snapshots", folder / "snapshots" / "tag"):
        made = medium.calls.index(("make_folder", str(inner)))
        assert ("sync_folder", str(inner.parent)) in medium.calls[made:link]


def test_a_folder_that_somebody_else_made_is_made_durable_before_an_object_in_it_counts(folder: Path) -> None:
    (folder / "packs").mkdir(parents=True)
    medium = Failing()
    store = LocalStore(str(folder), medium)
    store.put_new("packs/a", [b"data"])
    assert ("sync_folder", str(folder)) in medium.calls
    medium.calls.clear()
    store.put_new("packs/b", [b"data"])
    assert [path for call, path in medium.calls if call == "sync_folder"] == [str(folder / "packs")]


def test_a_removal_is_durable(folder: Path) -> None:
    medium = Failing()
    store = LocalStore(str(folder), medium)
    store.put_new("packs/a", [b"data"])
    medium.calls.clear()
    store.delete("packs/a")
    assert medium.calls == [("unlink", str(folder / "packs" / "a")), ("sync_folder", str(folder / "packs"))]


def test_settling_syncs_every_folder_that_holds_names_with_the_prefix(folder: Path) -> None:
    medium = Failing()
    store = LocalStore(str(folder), medium)
    for name in ("snapshots/t1/a", "snapshots/t2/b", "packs/c"):
        store.put_new(name, [b"data"])
    medium.calls.clear()
    store.settle("snapshots/")
    wanted = {str(folder / part) for part in ("snapshots", "snapshots/t1", "snapshots/t2")}
    assert {os.path.normpath(path) for call, path in medium.calls if call == "sync_folder"} >= wanted


def test_sweep_removes_what_crashes_left_and_tells_how_much(folder: Path, store: LocalStore) -> None:
    store.put_new("packs/a", [b"data"])
    (folder / "tmp" / "0123").write_bytes(bytes(1000))
    (folder / "tmp" / "4567").write_bytes(bytes(23))
    assert [name for name, _ in store.list("")] == ["packs/a"]
    assert store.sweep() == 1023
    assert files_below(folder) == ["packs/a"]
    assert store.sweep() == 0


def test_an_object_whose_writer_died_before_it_tidied_up_survives_a_sweep(folder: Path, store: LocalStore) -> None:
    store.put_new("packs/a", [b"data"])
    os.link(folder / "packs" / "a", folder / "tmp" / "0123")
    assert store.sweep() == 0
    assert files_below(folder) == ["packs/a"] and store.get("packs/a", 4) == b"data"


def test_reading_many_objects_keeps_a_bounded_number_of_descriptors(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_module, "_OPEN_FILES", 8)
    names = [f"packs/{number}" for number in range(50)]
    for name in names:
        store.put_new(name, [name.encode()])
    before = open_descriptors()
    for name in [*names, *reversed(names)]:
        assert store.get_range(name, 0, 5) == b"packs"
        assert store.get(name, 100) == name.encode()
    assert open_descriptors() <= before + 8


def test_descriptors_close_with_their_objects_with_errors_and_with_the_store(folder: Path) -> None:
    before = open_descriptors()
    store = LocalStore(str(folder), Unsynced())
    for number in range(20):
        store.put_new(f"a{number}", [b"data"])
        store.get_range(f"a{number}", 0, 1)
        with pytest.raises(NotFoundError):
            store.get_range(f"b{number}", 0, 1)
        with pytest.raises(DamagedError):
            store.get_range(f"a{number}", 0, 5)
    for number in range(19):
        store.delete(f"a{number}")
    assert open_descriptors() <= before + 1
    del store
    assert open_descriptors() <= before


def test_a_reader_of_an_object_that_is_pushed_out_of_the_cache_is_not_disturbed(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_module, "_OPEN_FILES", 1)
    for number in range(4):
        store.put_new(f"a{number}", [bytes([number]) * 4096])
    start = threading.Barrier(8)

    def read(hand: int) -> None:
        start.wait(60)
        for turn in range(200):
            number = (hand + turn) % 4
            assert store.get_range(f"a{number}", turn, 100) == bytes([number]) * 100

    before = open_descriptors()
    with ThreadPoolExecutor(8) as hands:
        list(hands.map(read, range(8)))
    assert open_descriptors() <= before + 1


def test_a_file_that_was_cut_while_it_is_open_is_damage_and_no_short_answer(folder: Path, store: LocalStore) -> None:
    store.put_new("a", [b"0123456789"])
    assert store.get_range("a", 0, 10) == b"0123456789"
    os.truncate(folder / "a", 4)
    with pytest.raises(DamagedError, match="ends before byte 10"):
        store.get_range("a", 0, 10)
    assert store.get_range("a", 0, 4) == b"0123"


def test_a_medium_that_cannot_be_read_is_a_read_error_with_its_place(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_new("a", [b"0123456789"])

    def broken(*_: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(ReadError, match="3 bytes at offset 5") as caught:
        store.get_range("a", 5, 3)
    assert (caught.value.path, caught.value.errno) == (str(folder / "a"), errno.EIO)


def test_a_short_read_is_gone_on_with(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_new("a", [b"0123456789"])
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: real(fd, min(count, 3), offset))
    assert store.get("a", 10) == b"0123456789"
    assert store.get_range("a", 1, 8) == b"12345678"


def test_files_with_other_names_and_links_are_no_objects(folder: Path, store: LocalStore) -> None:
    store.put_new("packs/a", [b"data"])
    (folder / "packs" / "README.txt").touch()
    (folder / "packs" / "link").symlink_to("a")
    (folder / "lost+found").mkdir()
    assert list(store.list("")) == [("packs/a", 4)]


def test_the_folder_is_made_with_all_that_lead_to_it(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "x" / "y" / "z"))
    assert list(store.list("")) == []
    store.put_new("a", [b"data"])
    assert (tmp_path / "x" / "y" / "z" / "a").read_bytes() == b"data"


def test_folders_that_are_no_part_of_a_name_are_not_entered(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root of an ext4 file system has lost+found, which is for root alone."""
    store.put_new("packs/a", [b"data"])
    (folder / "lost+found").mkdir()
    scandir = os.scandir

    def guarded(path: str) -> object:
        if "lost+found" in path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    store.settle("")
    assert list(store.list("")) == [("packs/a", 4)]


def test_a_store_around_a_store_tells_its_folder(store: LocalStore, folder: Path) -> None:
    assert LimitStore(RetryStore(store), 2).folder == store.folder == str(folder)
    assert RetryStore(LimitStore(MemoryStore(), 2)).folder is None
