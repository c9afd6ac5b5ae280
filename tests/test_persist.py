"""The primitives of persistent writing do what they say on a real file system."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snapcore.persist import Buffer, Medium

medium = Medium()


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    opened = medium.create(str(tmp_path / "file"))
    yield opened
    medium.close(opened)


def test_create_makes_an_empty_file_that_can_be_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "new"
    descriptor = medium.create(str(path), 0o600)
    assert path.read_bytes() == b"" and path.stat().st_mode & 0o777 == 0o600
    assert os.pwrite(descriptor, b"data", 0) == 4 and os.pread(descriptor, 4, 0) == b"data"
    assert not os.get_inheritable(descriptor)
    medium.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_create_refuses_a_name_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        medium.create(str(tmp_path / "taken"))
    assert (tmp_path / "taken").read_bytes() == b"old"


buffers = st.lists(
    st.binary(max_size=50).flatmap(lambda data: st.sampled_from([data, bytearray(data), memoryview(data)])),
    max_size=20,
)


@given(buffers, st.integers(0, 1000))
@example([b""], 0)
@example([b"x"] * 3000, 7)
def test_write_at_writes_the_buffers_one_behind_the_other(
    descriptor: int, parts: list[Buffer], offset_bytes: int
) -> None:
    medium.truncate(descriptor, 0)
    joined = b"".join(parts)
    assert medium.write_at(descriptor, parts, offset_bytes) == len(joined)
    wanted = bytes(offset_bytes) + joined if joined else b""
    assert os.pread(descriptor, len(wanted) + 1, 0) == wanted


@given(buffers, st.integers(1, 60), st.integers(0, 100))
def test_a_short_write_is_gone_on_with_where_it_stopped(
    descriptor: int, parts: list[Buffer], most_bytes: int, offset_bytes: int
) -> None:
    medium.truncate(descriptor, 0)
    real = os.pwritev

    def short(fd: int, views: list[memoryview], offset: int) -> int:
        return real(fd, [memoryview(b"".join(views))[:most_bytes]], offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwritev", short)
        assert medium.write_at(descriptor, parts, offset_bytes) == sum(map(len, parts))
    joined = b"".join(parts)
    assert os.pread(descriptor, 2000, offset_bytes) == joined


def test_a_write_of_nothing_is_an_error_and_no_endless_loop(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(OSError, match="wrote nothing") as caught:
        medium.write_at(descriptor, [b"data"], 0)
    assert caught.value.errno == errno.EIO


@given(st.integers(0, 3 * 4096), st.integers(1, 3 * 4096))
def test_a_punched_range_reads_as_zeros_and_the_rest_stays(
    descriptor: int, offset_bytes: int, length_bytes: int
) -> None:
    data = b"\xaa" * (3 * 4096)
    medium.truncate(descriptor, 0)
    medium.write_at(descriptor, [data], 0)
    if not medium.punch(descriptor, offset_bytes, length_bytes):
        pytest.skip("needs a file system that can punch holes")
    stop = min(offset_bytes + length_bytes, len(data))
    wanted = data[:offset_bytes] + bytes(max(0, stop - offset_bytes)) + data[stop:]
    assert os.pread(descriptor, len(data) + 1, 0) == (wanted if offset_bytes < len(data) else data)


def test_a_punch_that_the_system_refuses_says_so(descriptor: int) -> None:
    # A pipe has no ranges: neither a hole nor an answer "cannot" but an error.
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError, match="seek") as caught:
            medium.punch(writing, 0, 4096)
        assert caught.value.errno == errno.ESPIPE
    finally:
        os.close(reading)
        os.close(writing)


def test_truncate_sets_the_size(descriptor: int) -> None:
    medium.write_at(descriptor, [b"data"], 0)
    for size_bytes in (100, 2, 0):
        medium.truncate(descriptor, size_bytes)
        assert os.fstat(descriptor).st_size == size_bytes


def test_link_refuses_a_name_that_is_taken_and_rename_replaces_it(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    with pytest.raises(FileExistsError):
        medium.link(str(first), str(second))
    assert second.read_bytes() == b"2"
    medium.rename(str(first), str(second))
    assert second.read_bytes() == b"1" and not first.exists()
    medium.link(str(second), str(first))
    assert first.samefile(second)
    medium.unlink(str(second))
    assert first.read_bytes() == b"1" and not second.exists()


def test_a_folder_that_is_there_is_fine_and_a_file_in_its_place_is_not(tmp_path: Path) -> None:
    folder = str(tmp_path / "folder")
    medium.make_folder(folder)
    medium.make_folder(folder)
    assert os.path.isdir(folder)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        medium.make_folder(str(tmp_path / "file"))
    with pytest.raises(FileNotFoundError):
        medium.make_folder(str(tmp_path / "missing" / "folder"))


def test_sync_and_sync_folder_reach_the_system_and_close_what_they_open(
    tmp_path: Path, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.path.realpath(f"/proc/self/fd/{fd}"))
        real(fd)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc/self/fd")
    monkeypatch.setattr(os, "fsync", fsync)
    before = os.listdir("/proc/self/fd")
    medium.sync(descriptor)
    medium.sync_folder(str(tmp_path))
    assert synced == [str((tmp_path / "file").resolve()), str(tmp_path.resolve())]
    assert os.listdir("/proc/self/fd") == before


def test_a_sync_that_fails_is_not_tried_again(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fsync(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        medium.sync(descriptor)
    assert calls == [descriptor]
