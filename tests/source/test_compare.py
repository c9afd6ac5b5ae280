"""Differences of two images against a byte oracle, and results that do not depend on who does the work."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import NotFoundError, Progress, ReadError, Repository, SourceChangedError, UsageError, diff_images, scan
from snapcore.source import compare, raw
from snapcore.store import MemoryStore
from tests.support.sparse import extents_of

MIB = 1 << 20
BLOCKS = [512 << power for power in range(8)]

edits = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.integers(1, 40_000), st.sampled_from(["a", "b", "zeros", "hole"])),
    max_size=6,
)


def _write(path: Path, size: int, work: list[tuple[int, int, str]]) -> bytes:
    """Make an image with holes. Returns its bytes."""
    content = bytearray(size)
    with path.open("wb") as file:
        file.truncate(size)
        for at, length, what in work:
            start = at % (size + 1)
            stop = min(start + length, size)
            if what == "hole":
                # Cut and grow again: a hole up to the end.
                file.truncate(start)
                file.truncate(size)
                content[start:] = bytes(size - start)
            else:
                data = (b"\0" if what == "zeros" else what.encode()) * (stop - start)
                os.pwrite(file.fileno(), data, start)
                content[start:stop] = data
    return bytes(content)


def _differing(a: bytes, b: bytes, block_bytes: int) -> list[list[int]]:
    """By comparing every block; a block that only one of the two reaches into differs."""
    common, whole = min(len(a), len(b)), max(len(a), len(b))
    numbers = [
        number
        for number in range(-(-whole // block_bytes))
        if ((number + 1) * block_bytes > common and whole > common)
        or a[number * block_bytes : (number + 1) * block_bytes] != b[number * block_bytes : (number + 1) * block_bytes]
    ]
    return extents_of(numbers, block_bytes, whole)


@given(
    size_a=st.integers(0, 200_000),
    size_b=st.one_of(st.none(), st.integers(0, 200_000)),
    shared=edits,
    own_a=edits,
    own_b=edits,
    block_bytes=st.sampled_from(BLOCKS),
    small=st.booleans(),
)
def test_the_difference_of_two_images_is_that_of_their_bytes(
    size_a: int,
    size_b: int | None,
    shared: list[tuple[int, int, str]],
    own_a: list[tuple[int, int, str]],
    own_b: list[tuple[int, int, str]],
    block_bytes: int,
    small: bool,
    tmp_path: Path,
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    content_a = _write(a, size_a, shared + own_a)
    content_b = _write(b, size_a if size_b is None else size_b, shared + own_b)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(raw, "_STAMP_TICK_S", 0.0)
        if small:
            # Many spans and windows within small images.
            patched.setattr(compare, "SPAN_BYTES", 64 << 10)
            patched.setattr(compare, "_WINDOW_BYTES", 8 << 10)
        found = diff_images(str(a), str(b), block_bytes=block_bytes).tolist()
        assert found == _differing(content_a, content_b, block_bytes)
        assert diff_images(str(b), str(a), block_bytes=block_bytes).tolist() == found
        assert diff_images(str(a), str(a), block_bytes=block_bytes).tolist() == []


def _large_pair(folder: Path) -> tuple[Path, Path, bytes, bytes]:
    """Two images of 21 MiB and of 20 and a bit: several spans, differences at their borders."""
    chooser = random.Random(1)
    content = bytearray(chooser.randbytes(21 * MIB))
    content[6 * MIB : 11 * MIB] = bytes(5 * MIB)
    content[13 * MIB : 16 * MIB] = content[MIB : 4 * MIB]
    other = bytearray(content[: 20 * MIB + 777])
    for at in [0, 4 * MIB - 1, 4 * MIB, 8 * MIB - 512, 12 * MIB, *(chooser.randrange(20 * MIB) for _ in range(300))]:
        other[at] ^= 1
    (folder / "a").write_bytes(content)
    (folder / "b").write_bytes(other)
    return folder / "a", folder / "b", bytes(content), bytes(other)


class _Own(Executor):
    """A caller's own executor: works on the spot, and counts."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.tasks = 0

    def submit(self, function, /, *arguments, **names):  # type: ignore[no-untyped-def]
        self.tasks += 1
        return self.pool.submit(function, *arguments, **names)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        raise AssertionError("the caller's executor is the caller's to shut down")


@contextmanager
def _executors() -> Iterator[list[Executor | None]]:
    own = _Own()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(2) as two, ThreadPoolExecutor(5) as five, own.pool:
        yield [None, one, two, five, own]
        assert own.tasks > 0


@pytest.mark.parametrize("block_bytes", [512, 4096, 4 * MIB])
def test_the_difference_does_not_depend_on_the_executor(block_bytes: int, tmp_path: Path) -> None:
    a, b, content_a, content_b = _large_pair(tmp_path)
    expected = _differing(content_a, content_b, block_bytes)
    with _executors() as executors:
        for executor in executors:
            assert diff_images(str(a), str(b), block_bytes=block_bytes, executor=executor).tolist() == expected


def _stored(repository: Repository) -> list[list[tuple[int, int, str, int]]]:
    """What lies in each pack, and where: packs in any order, for their names are random."""
    packs: dict[bytes, list[tuple[int, int, str, int]]] = {}
    for contents in repository._context.index().tables():
        for object_id, entry in zip(contents.ids(), contents.entries, strict=True):
            row = (int(entry["offset"]), int(entry["stored"]), object_id.tobytes().hex(), int(entry["form"]))
            packs.setdefault(contents.packs[entry["pack"]], []).append(row)
    return sorted(sorted(rows) for rows in packs.values())


def test_what_a_snapshot_stores_does_not_depend_on_the_executor(tmp_path: Path) -> None:
    a, b, _, _ = _large_pair(tmp_path)
    results = []
    with _executors() as executors:
        for number, executor in enumerate(executors):
            repository = Repository.create(MemoryStore())
            disk = f"disk-{number}"
            first = repository.snapshot(a, disk=disk, executor=executor).snapshot
            second = repository.snapshot(b, disk=disk, executor=executor).snapshot
            restored = tmp_path / f"restored-{number}"
            repository.restore(second, restored, executor=executor)
            assert restored.read_bytes() == b.read_bytes()
            restored.unlink()
            repository.restore(first, b.with_name("in-place"), executor=executor)
            repository.restore(second, b.with_name("in-place"), in_place=True, executor=executor)
            assert b.with_name("in-place").read_bytes() == b.read_bytes()
            b.with_name("in-place").unlink()
            assert repository.verify(executor=executor).ok
            sizes = [
                (item.root, item.levels, item.written_bytes, item.changed_bytes, item.new_bytes, item.stored_bytes)
                for item in (first, second)
            ]
            results.append((sizes, _stored(repository)))
    assert all(result == results[0] for result in results)


def test_what_cannot_be_compared_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    a = str(tmp_path / "a")
    for block_bytes in (0, 256, 4095, 5000, 8 * MIB):
        with pytest.raises(UsageError, match=str(block_bytes)):
            diff_images(a, a, block_bytes=block_bytes)
    with pytest.raises(NotFoundError, match="missing"):
        diff_images(a, str(tmp_path / "missing"))


@pytest.mark.parametrize("which", ["a", "b"])
def test_an_image_that_is_written_meanwhile_is_an_error(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "_clone", lambda path, descriptor: None)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * 10_000)

    def write(progress: Progress) -> None:
        del progress
        with (tmp_path / which).open("r+b") as file:
            file.write(b"new")

    with pytest.raises(SourceChangedError, match=str(tmp_path / which)):
        diff_images(str(tmp_path / "a"), str(tmp_path / "b"), progress=write)


@pytest.mark.parametrize("which", ["a", "b"])
def test_an_image_that_is_truncated_meanwhile_is_an_error_that_says_where(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "_clone", lambda path, descriptor: None)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * 10_000)
    with pytest.raises(SourceChangedError, match=f"{which} ends at byte 5000 and had 10000 bytes"):
        diff_images(
            str(tmp_path / "a"), str(tmp_path / "b"), progress=lambda progress: os.truncate(tmp_path / which, 5000)
        )


def test_a_medium_that_fails_is_an_error_that_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * 10_000)

    def fail(*arguments: object) -> None:
        raise scan.FileFailure(1, 8192, errno.EIO)

    monkeypatch.setattr(scan, "differing_in_files", fail)
    with pytest.raises(ReadError, match="cannot read 1808 bytes at offset 8192") as failed:
        diff_images(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (failed.value.path, failed.value.errno) == (str(tmp_path / "b"), errno.EIO)


def test_progress_ends_at_the_whole_and_holes_are_no_work(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)
            os.pwrite(file.fileno(), name.encode() * 4096, 1 << 39)
    seen: list[Progress] = []
    found = diff_images(str(tmp_path / "a"), str(tmp_path / "b"), progress=seen.append)
    assert found.tolist() == [[1 << 39, 4096]]
    assert (seen[0].done_bytes, seen[-1].done_bytes, seen[-1].total_bytes) == (0, 4096, 4096)
