"""The scan kernels do what their plain twins do, on every kind of buffer, and touch mapped files safely."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import tempfile
import textwrap
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snapcore import scan
from tests import reference
from tests.support.buffers import buffer_of, makes, mostly_zero, pairs

LONGEST_BYTES = 20_000
PAGE_BYTES = mmap.PAGESIZE

block_sizes = st.integers(9, 16).map(lambda power: 1 << power)
offsets = st.integers(0, 1 << 50)


@given(mostly_zero(LONGEST_BYTES), makes(), block_sizes, offsets)
@example(b"", "bytes", 512, 0)
@example(bytes(512), "mapping", 512, 7)
@example(b"\1", "unaligned slice", 65536, 0)
def test_zero_kernels_find_what_their_twins_find(data: bytes, make: str, block_bytes: int, offset: int) -> None:
    with buffer_of(make, data) as buffer:
        mask = scan.zero_mask(buffer, block_bytes)
        zero = scan.zero_extents(buffer, block_bytes, offset)
        nonzero = scan.nonzero_extents(buffer, block_bytes, offset)
    assert mask.dtype == np.uint8 and zero.dtype == nonzero.dtype == np.int64
    assert zero.shape[1:] == nonzero.shape[1:] == (2,)
    assert mask.tolist() == reference.zero_mask(data, block_bytes)
    assert zero.tolist() == reference.zero_extents(data, block_bytes, offset)
    assert nonzero.tolist() == reference.nonzero_extents(data, block_bytes, offset)


@given(pairs(LONGEST_BYTES), makes(), makes(), block_sizes, offsets)
@example((b"", b""), "array", "bytes", 512, 0)
def test_differing_kernels_find_what_their_twins_find(
    pair: tuple[bytes, bytes], make_a: str, make_b: str, block_bytes: int, offset: int
) -> None:
    a, b = pair
    with buffer_of(make_a, a) as buffer_a, buffer_of(make_b, b) as buffer_b:
        mask = scan.differing_mask(buffer_a, buffer_b, block_bytes)
        rows = scan.differing_extents(buffer_a, buffer_b, block_bytes, offset)
    assert mask.dtype == np.uint8 and rows.dtype == np.int64
    assert mask.tolist() == reference.differing_mask(a, b, block_bytes)
    assert rows.tolist() == reference.differing_extents(a, b, block_bytes, offset)


@given(st.integers(0, 300), st.integers(0, 299), st.integers(1, 255))
def test_one_byte_anywhere_keeps_a_block_from_being_zero(size_bytes: int, at: int, value: int) -> None:
    data = bytearray(size_bytes)
    if at < size_bytes:
        data[at] = value
    assert scan.zero_mask(data, 512).tolist() == [int(at >= size_bytes)] * bool(size_bytes)


@given(mostly_zero(LONGEST_BYTES), block_sizes)
def test_zero_and_other_extents_cover_a_buffer_exactly_once(data: bytes, block_bytes: int) -> None:
    rows = scan.zero_extents(data, block_bytes).tolist() + scan.nonzero_extents(data, block_bytes).tolist()
    at = 0
    for start, length in sorted(rows):
        assert start == at and length > 0
        at += length
    assert at == len(data)


Kernel = Callable[[object, int], object]
_KERNELS: dict[str, Kernel] = {
    "zero_mask": lambda data, block: scan.zero_mask(data, block),  # type: ignore[arg-type]
    "zero_extents": lambda data, block: scan.zero_extents(data, block),  # type: ignore[arg-type]
    "nonzero_extents": lambda data, block: scan.nonzero_extents(data, block),  # type: ignore[arg-type]
    "differing_mask": lambda data, block: scan.differing_mask(data, data, block),  # type: ignore[arg-type]
    "differing_extents": lambda data, block: scan.differing_extents(data, data, block),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", _KERNELS)
@pytest.mark.parametrize("block_bytes", [-512, -1, 0, 1, 256, 511, 513, 768, 4097])
def test_a_block_size_that_is_no_power_of_two_from_512_on_is_refused(name: str, block_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"power of two from 512 on, not {block_bytes}"):
        _KERNELS[name](bytes(4096), block_bytes)


@pytest.mark.parametrize("name", _KERNELS)
def test_the_largest_block_size_takes_a_buffer_as_one_block(name: str) -> None:
    assert len(_KERNELS[name](b"\1" * 1000, 1 << 62)) == (name in {"zero_mask", "differing_mask", "nonzero_extents"})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", _KERNELS)
@pytest.mark.parametrize(
    ("buffer", "error"),
    [
        (None, TypeError),
        ("text", TypeError),
        (memoryview(bytes(4096))[::2], BufferError),
        (np.zeros((8, 512), dtype=np.uint8), ValueError),
        (np.zeros(512, dtype=np.int64), ValueError),
    ],
)
def test_what_is_no_contiguous_run_of_bytes_is_refused(name: str, buffer: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        _KERNELS[name](buffer, 512)


@pytest.mark.parametrize("name", ["zero_extents", "nonzero_extents", "differing_extents"])
def test_extents_that_would_end_beyond_64_bits_are_refused(name: str) -> None:
    buffers = [bytes(1000)] * (2 if name == "differing_extents" else 1)
    last = 2**63 - 1 - 1000
    assert all(offset + length == 2**63 - 1 for offset, length in getattr(scan, name)(*buffers, 512, last).tolist())
    with pytest.raises(ValueError, match="end beyond"):
        getattr(scan, name)(*buffers, 512, last + 1)


def test_buffers_of_different_length_are_refused() -> None:
    for kernel in (scan.differing_mask, scan.differing_extents):
        with pytest.raises(ValueError, match="differ in length: 1024 and 1023 bytes"):
            kernel(bytes(1024), bytes(1023), 512)


@contextmanager
def _sparse_file(data: bytes, kept: set[int]) -> Iterator[int]:
    """A file with these bytes. Pages of zeros are holes but for those that are kept."""
    with tempfile.TemporaryFile() as file:
        file.truncate(len(data))
        for number, page in enumerate(reference.blocks(data, PAGE_BYTES)):
            if any(page) or number in kept:
                os.pwrite(file.fileno(), page, number * PAGE_BYTES)
        yield file.fileno()


def _holed(data: bytes, holes: set[int]) -> bytes:
    """The bytes with pages of zeros put in."""
    return b"".join(
        bytes(len(page)) if number in holes else page for number, page in enumerate(reference.blocks(data, PAGE_BYTES))
    )


_pages = st.sets(st.integers(0, 16))


@given(
    pairs(16 * PAGE_BYTES + 100),
    st.tuples(_pages, _pages),
    st.tuples(_pages, _pages),
    block_sizes,
    st.integers(0, 20),
    st.integers(0, 17 * PAGE_BYTES),
    st.integers(1, 4),
)
def test_files_differ_where_their_bytes_do(
    pair: tuple[bytes, bytes],
    holes: tuple[set[int], set[int]],
    kept: tuple[set[int], set[int]],
    block_bytes: int,
    first: int,
    longest_bytes: int,
    window_blocks: int,
) -> None:
    a, b = (_holed(data, which) for data, which in zip(pair, holes, strict=True))
    offset = min(first, len(a) // block_bytes) * block_bytes
    size_bytes = min(longest_bytes, len(a) - offset)
    space = bytearray(2 * window_blocks * block_bytes + 100)
    with _sparse_file(a, kept[0]) as file_a, _sparse_file(b, kept[1]) as file_b:
        rows, data_bytes = scan.differing_in_files(file_a, file_b, offset, size_bytes, block_bytes, space)
    found = [list(row) for row in zip(rows[::2], rows[1::2], strict=True)]
    assert found == reference.differing_in_files(a, b, offset, size_bytes, block_bytes)
    assert sum(rows[1::2]) <= data_bytes <= size_bytes


def test_what_is_a_hole_in_both_files_is_not_read() -> None:
    with tempfile.TemporaryFile() as a, tempfile.TemporaryFile() as b:
        for file, place in ((a, 1 << 30), (b, 1 << 31)):
            file.truncate(1 << 32)
            os.pwrite(file.fileno(), b"x", place)
        rows, data_bytes = scan.differing_in_files(a.fileno(), b.fileno(), 0, 1 << 32, PAGE_BYTES, bytearray(1 << 20))
    assert rows.tolist() == [1 << 30, PAGE_BYTES, 1 << 31, PAGE_BYTES]
    assert data_bytes == 2 * PAGE_BYTES


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_that_ends_early_is_named_with_its_end(which: int) -> None:
    with tempfile.TemporaryFile() as long, tempfile.TemporaryFile() as short:
        long.write(b"x" * 8 * PAGE_BYTES)
        short.write(b"x" * (5 * PAGE_BYTES + 7))
        long.flush()
        short.flush()
        files = (long.fileno(), short.fileno()) if which else (short.fileno(), long.fileno())
        with pytest.raises(scan.FileFailure) as failed:
            scan.differing_in_files(*files, PAGE_BYTES, 7 * PAGE_BYTES, PAGE_BYTES, bytearray(4 * PAGE_BYTES))
    assert (failed.value.which, failed.value.offset, failed.value.code) == (which, 5 * PAGE_BYTES + 7, 0)


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_that_cannot_be_read_is_named_with_the_place_and_the_reason(which: int) -> None:
    with tempfile.TemporaryFile() as good, tempfile.TemporaryFile() as other:
        good.write(b"x" * PAGE_BYTES)
        good.flush()
        unreadable = os.open(f"/dev/fd/{other.fileno()}", os.O_WRONLY)
        os.ftruncate(unreadable, PAGE_BYTES)
        os.pwrite(unreadable, b"x" * PAGE_BYTES, 0)
        files = (good.fileno(), unreadable) if which else (unreadable, good.fileno())
        with pytest.raises(scan.FileFailure) as failed:
            scan.differing_in_files(*files, 0, PAGE_BYTES, PAGE_BYTES, bytearray(2 * PAGE_BYTES))
        os.close(unreadable)
        with pytest.raises(scan.FileFailure) as closed:
            scan.differing_in_files(good.fileno(), unreadable, 0, PAGE_BYTES, PAGE_BYTES, bytearray(2 * PAGE_BYTES))
    assert (failed.value.which, failed.value.offset, failed.value.code) == (which, 0, errno.EBADF)
    assert (closed.value.which, closed.value.offset, closed.value.code) == (1, 0, errno.EBADF)


def test_files_are_compared_in_whole_blocks_with_space_for_them() -> None:
    with tempfile.TemporaryFile() as file:
        one = file.fileno()
        assert scan.differing_in_files(one, one, 0, 0, 512, bytearray(1024)) == (array("q"), 0)
        for offset, size_bytes in [(-512, 512), (100, 512), (0, -1), (2**63 - 512, 512), (512, 2**63 - 1)]:
            with pytest.raises(ValueError, match="no blocks of 512"):
                scan.differing_in_files(one, one, offset, size_bytes, 512, bytearray(1024))
        with pytest.raises(ValueError, match="too small for two blocks"):
            scan.differing_in_files(one, one, 0, 512, 512, bytearray(1023))
        with pytest.raises(ValueError, match="power of two"):
            scan.differing_in_files(one, one, 0, 512, 1000, bytearray(4096))
        with pytest.raises((BufferError, ValueError)):
            scan.differing_in_files(one, one, 0, 512, 512, bytes(4096))


def _mapped(path: Path, size_bytes: int) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), size_bytes, access=mmap.ACCESS_READ)


@pytest.fixture
def mapped_file(tmp_path: Path) -> Path:
    path = tmp_path / "mapped"
    path.write_bytes(b"snapcore" * (16 * PAGE_BYTES // 8))
    if not scan.populate(_mapped(path, PAGE_BYTES), 0, PAGE_BYTES):
        pytest.skip("needs MADV_POPULATE_READ (Linux 5.14)")
    return path


@given(st.integers(0, 16 * PAGE_BYTES), st.integers(0, 16 * PAGE_BYTES))
def test_any_range_of_a_mapped_file_can_be_populated(mapped_file: Path, start: int, stop: int) -> None:
    start, stop = sorted((start, stop))
    with _mapped(mapped_file, 16 * PAGE_BYTES) as mapped:
        assert scan.populate(mapped, start, stop - start) is True
        assert mapped[start:stop] == (b"snapcore" * (2 * PAGE_BYTES))[start:stop]


def test_pages_beyond_the_end_of_a_truncated_file_are_an_error_and_no_signal(mapped_file: Path) -> None:
    script = f"""
        import errno, mmap, os, sys
        from snapcore import scan

        path, page = sys.argv[1], {PAGE_BYTES}
        with open(path, "r+b") as file:
            mapped = mmap.mmap(file.fileno(), 16 * page, access=mmap.ACCESS_READ)
            assert scan.populate(mapped, 0, 16 * page)
            os.truncate(path, 4 * page)
            assert scan.populate(mapped, 0, 4 * page)
            for start, length in ((0, 16 * page), (3 * page, page + 1), (4 * page, 1), (15 * page, page)):
                try:
                    scan.populate(mapped, start, length)
                except OSError as error:
                    assert error.errno == errno.EFAULT and error.strerror, error
                else:
                    raise SystemExit(f"bytes {{start}} to {{start + length}} were populated")
        print("survived")
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script), str(mapped_file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "survived\n", "")


def test_many_threads_populate_and_scan_one_mapping(mapped_file: Path) -> None:
    with _mapped(mapped_file, 16 * PAGE_BYTES) as mapped, memoryview(mapped) as whole:

        def work(number: int) -> list[int]:
            start = number % 16 * PAGE_BYTES
            assert scan.populate(whole, start, PAGE_BYTES)
            with whole[start : start + PAGE_BYTES] as part:
                return scan.zero_mask(part, 512).tolist()

        with ThreadPoolExecutor(8) as hands:
            assert list(hands.map(work, range(256))) == [[0] * (PAGE_BYTES // 512)] * 256


@pytest.mark.parametrize(
    ("offset", "size_bytes"),
    [(-1, 1), (0, -1), (0, 4097), (4096, 1), (4097, 0), (1 << 62, 1 << 62), (0, 2**63 - 1), (2**63 - 1, 2**63 - 1)],
)
def test_a_range_outside_of_the_mapping_is_refused(offset: int, size_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"{size_bytes} bytes from offset {offset} on are not within"):
        scan.populate(bytes(4096), offset, size_bytes)


def test_an_empty_range_needs_no_populating() -> None:
    assert scan.populate(b"", 0, 0) is True
    assert scan.populate(bytes(10), 10, 0) is True


@given(st.binary(max_size=300), st.binary(max_size=300), st.booleans())
def test_same_bytes_is_what_its_twin_says(a: bytes, b: bytes, equal: bool) -> None:
    b = a if equal else b
    assert scan.same_bytes(a, memoryview(bytearray(b))) == reference.same_bytes(a, b)
