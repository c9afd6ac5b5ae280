"""What is exported is read back by qemu-img, in every format; a failed export leaves nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapcore import (
    CancelledError,
    ExistsError,
    OutOfSpaceError,
    Progress,
    RefusedError,
    Repository,
    StoreError,
    UsageError,
    extents,
)
from snapcore.persist import Buffer, Medium
from snapcore.source import open_image, send_image, write_image
from snapcore.source.vhd_writer import geometry
from snapcore.store import MemoryStore
from tests.support.images import QEMU, as_qemu_reads, assert_good, content, make_raw, qemu_img
from tests.support.tools import needs

MIB = 1 << 20
WAYS = [("raw", None), ("qcow2", None), ("qcow2", "zlib"), ("qcow2", "zstd"), ("vhd", None), ("vmdk", None)]
PIPED = ["raw", "vhd", "vmdk"]


def written(raw: Path, kind: str, packing: str | None = None, name: str = "disk") -> Path:
    target = raw.with_name(f"{name}.{kind}")
    target.unlink(missing_ok=True)
    with open_image(raw, "raw") as source:
        done = write_image(source, target, kind, compression=packing)
    assert done.format == kind and done.file_bytes == target.stat().st_size
    return target


@pytest.mark.parametrize(("kind", "packing"), WAYS)
@pytest.mark.parametrize("size_bytes", [1, 512, 65536, 5 * MIB + 77, 600 * MIB + 512])
def test_qemu_img_finds_an_export_right(kind: str, packing: str | None, size_bytes: int, tmp_path: Path) -> None:
    needs("qemu-img")
    raw = tmp_path / "original"
    make_raw(raw, size_bytes, 30)
    image = written(raw, kind, packing)
    assert_good(image, kind, raw)
    rounded = size_bytes if kind == "raw" else -(-size_bytes // 512) * 512
    with open_image(image) as back:
        assert back.size_bytes == rounded
    if size_bytes < 100 * MIB:
        assert as_qemu_reads(image, kind) == raw.read_bytes().ljust(-(-size_bytes // 512) * 512, b"\0")
    # Holes stay holes.
    assert image.stat().st_blocks * 512 <= raw.stat().st_blocks * 512 + 6 * 65536


@pytest.mark.parametrize("kind", PIPED)
def test_a_pipe_gets_what_a_file_would(kind: str, tmp_path: Path) -> None:
    needs("qemu-img")
    raw = tmp_path / "original"
    make_raw(raw, 9 * MIB + 100, 30)
    ours, theirs = os.pipe()
    got: list[bytes] = []

    def take() -> None:
        with os.fdopen(ours, "rb") as stream:
            got.append(stream.read())

    reader = threading.Thread(target=take)
    reader.start()
    with open_image(raw) as source:
        done = send_image(source, theirs, kind)
    os.close(theirs)
    reader.join()
    assert done.file_bytes == len(got[0])
    image = tmp_path / f"piped.{kind}"
    image.write_bytes(got[0])
    assert_good(image, kind, raw)


def test_qcow2_goes_to_no_pipe_and_a_reader_that_goes_is_an_error(tmp_path: Path) -> None:
    raw = tmp_path / "original"
    make_raw(raw, MIB, 30)
    ours, theirs = os.pipe()
    os.close(ours)
    with open_image(raw) as source:
        with pytest.raises(UsageError, match="cannot be written to a pipe"):
            send_image(source, theirs, "qcow2")
        with pytest.raises(StoreError, match="has gone"):
            send_image(source, theirs, "raw")
    os.close(theirs)


@settings(max_examples=8)
@given(
    size=st.integers(1, 400_000),
    runs=st.lists(st.tuples(st.integers(0, 400_000), st.integers(1, 100_000), st.sampled_from(b"\0ab")), max_size=6),
)
def test_every_format_holds_every_sparse_disk(size: int, runs: list[tuple[int, int, int]]) -> None:
    needs("qemu-img")
    data = bytearray(size)
    for start, length, value in runs:
        stop = min(size, start + length)
        data[start:stop] = bytes([value]) * max(0, stop - start)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "original"
        raw.write_bytes(data)
        for kind, packing in WAYS:
            image = written(raw, kind, packing)
            assert_good(image, kind, raw)
            with open_image(image) as back:
                assert content(back)[:size] == data


class Thin:
    """A disk of which each cluster begins with a byte that is not zero."""

    name = "thin"

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def data_extents(self) -> extents.Extents:
        return extents.from_pairs([(0, self.size_bytes)])

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        filled = np.frombuffer(target, np.uint8)
        filled[:] = 0
        filled[-offset_bytes % 65536 :: 65536] = 7

    def check_unchanged(self) -> None:
        pass


def test_counts_go_on_behind_two_gigabytes_of_the_file(tmp_path: Path) -> None:
    needs("qemu-img")
    source = Thin(2304 * MIB)
    image = tmp_path / "disk.qcow2"
    assert write_image(source, image, "qcow2").file_bytes > 2304 * MIB
    qemu_img("check", "-f", "qcow2", image)
    with open_image(image) as back:
        ours, theirs = memoryview(bytearray(MIB)), memoryview(bytearray(MIB))
        for offset in range(0, source.size_bytes, 16 * MIB):
            back.read_into(ours, offset)
            source.read_into(theirs, offset)
            assert ours == theirs


def test_the_first_sectors_of_the_disk_decide_nothing(tmp_path: Path) -> None:
    """A guest's disk that begins as a qcow2 image with a backing file is exported as the bytes that it is."""
    needs("qemu-img")
    raw = tmp_path / "original"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", str(raw), "1M"], check=True
    )
    image = written(raw, "qcow2")
    with open_image(image) as back:
        assert content(back)[: raw.stat().st_size] == raw.read_bytes()


def test_a_snapshot_of_a_repository_is_a_source(tmp_path: Path) -> None:
    raw = tmp_path / "original"
    data = make_raw(raw, 5 * MIB + 77, 30)
    repository = Repository.create(MemoryStore(), chunk_bytes=4096)
    taken = repository.snapshot(raw, disk="d").snapshot
    with repository.open_snapshot(taken) as reader:
        assert content(reader, 100_001) == data
        write_image(reader, tmp_path / "disk.qcow2", "qcow2", compression="zstd")
        with pytest.raises(UsageError, match="are not in it"):
            reader.read_into(memoryview(bytearray(9000)), 5 * MIB)
    with open_image(tmp_path / "disk.qcow2") as back:
        assert content(back)[: len(data)] == data
        again = repository.snapshot(back, disk="d").snapshot
    assert again.changed_bytes == 0 or again.size_bytes != len(data)


def test_the_number_of_threads_does_not_show(tmp_path: Path) -> None:
    raw = tmp_path / "original"
    make_raw(raw, 30 * MIB, 60)
    files = []
    for threads in (1, 7):
        with ThreadPoolExecutor(threads) as executor, open_image(raw) as source:
            target = tmp_path / f"{threads}.qcow2"
            write_image(source, target, "qcow2", compression="zlib", executor=executor)
            files.append(target.read_bytes())
    assert files[0] == files[1]


class Failing(Medium):
    """A medium that is full behind some bytes."""

    def write_at(self, descriptor: int, buffers: list[Buffer], offset_bytes: int) -> int:  # type: ignore[override]
        if offset_bytes > MIB:
            raise OSError(errno.ENOSPC, "full")
        return super().write_at(descriptor, buffers, offset_bytes)


def _cancel(step: Progress) -> None:
    if step.done_bytes > 5 * MIB:
        raise CancelledError("enough")


def _full(raw: Path, target: Path) -> None:
    with open_image(raw) as source:
        write_image(source, target, "qcow2", medium=Failing())


def _cancelled(raw: Path, target: Path) -> None:
    with open_image(raw) as source:
        write_image(source, target, "vhd", progress=_cancel)


def _changed(raw: Path, target: Path) -> None:
    def touch(_: Progress) -> None:
        os.utime(raw)

    with open_image(raw) as source:
        if source._private:  # type: ignore[attr-defined]
            pytest.skip("a reflink clone does not change")
        write_image(source, target, "vmdk", progress=touch)


@pytest.mark.parametrize("work", [_full, _cancelled, _changed])
def test_an_export_that_fails_leaves_nothing(work: Callable[[Path, Path], None], tmp_path: Path) -> None:
    raw = tmp_path / "original"
    make_raw(raw, 20 * MIB, 60)
    kind: type[Exception] = OutOfSpaceError if work is _full else CancelledError
    with pytest.raises(Exception, match=r"full|enough|changed") as caught:
        work(raw, tmp_path / "out")
    assert work is _changed or isinstance(caught.value, kind)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["original"]


def test_what_stands_there_is_not_written_over(tmp_path: Path) -> None:
    raw, target = tmp_path / "original", tmp_path / "out"
    make_raw(raw, MIB, 5)
    target.write_bytes(b"mine")
    partial = tmp_path / "out.snapcore-partial"
    partial.write_bytes(b"somebody works on this")
    with open_image(raw) as source:
        with pytest.raises(ExistsError):
            write_image(source, target, "qcow2")
        assert target.read_bytes() == b"mine" and partial.exists()
        target.unlink()
        with pytest.raises(RefusedError):
            write_image(source, target, "qcow2", forbidden_folder=str(tmp_path))
        # What a crash left is begun anew.
        write_image(source, target, "qcow2")
    assert not partial.exists()


@pytest.mark.parametrize(
    ("size_bytes", "kind"), [(0, "vhd"), (2041 << 30, "vhd"), (0, "vmdk"), (2 << 40, "vmdk"), (3 << 50, "qcow2")]
)
def test_a_size_that_a_format_cannot_hold_is_refused(size_bytes: int, kind: str, tmp_path: Path) -> None:
    class Empty:
        name = "nothing"

        def __init__(self) -> None:
            self.size_bytes = size_bytes

    with pytest.raises(UsageError, match=r"bytes, not \d+"):
        write_image(Empty(), tmp_path / "x", kind)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("x*"))


def test_options_that_say_nothing_are_refused(tmp_path: Path) -> None:
    raw = tmp_path / "original"
    make_raw(raw, MIB, 5)
    with open_image(raw) as source:
        for kind, packing in (("vhdx", None), ("vhd", "zlib"), ("qcow2", "lz4")):
            with pytest.raises(UsageError):
                write_image(source, tmp_path / "x", kind, compression=packing)


@pytest.mark.parametrize(
    ("sectors", "wanted"),
    # As qemu-img computes them for disks of 1 MiB, 1 GiB, 40 GiB and 200 GiB.
    [(2048, (30, 4, 17)), (2 << 20, (2080, 16, 63)), (80 << 20, (20560, 16, 255)), (400 << 20, (65535, 16, 255))],
)
def test_geometry_is_that_of_the_specification(sectors: int, wanted: tuple[int, int, int]) -> None:
    assert geometry(sectors) == wanted


def test_formats_are_those_of_qemu() -> None:
    assert {kind for kind, _ in WAYS} <= set(QEMU)
