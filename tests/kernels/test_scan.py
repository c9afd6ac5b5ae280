"""The scan kernels do what their plain twins do, on every kind of buffer, and touch mapped files safely."""

from __future__ import annotations

import mmap
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
