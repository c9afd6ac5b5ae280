"""Pools that were written by the first version of the format open for ever, with what they held."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import xxhash

from snapcore import StoreError
from snapcore.pool import Pool, check
from tests.support import golden_pool

GOLDEN = Path(__file__).parent.parent / "golden" / "pool-1"
LAZY = GOLDEN.with_name("pool-1-lazy")


@pytest.mark.parametrize("name", ["closed", "crashed"])
def test_a_pool_of_format_1_opens_with_what_it_held(name: str, tmp_path: Path) -> None:
    with tarfile.open(GOLDEN / f"{name}.tar.xz") as archive:
        # The first releases of Python 3.11 have no filters; the archive is our own.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    expected = json.loads((GOLDEN / "contents.json").read_text(encoding="utf-8"))
    with Pool.open(tmp_path / "pool", read_only=True) as pool:
        assert {label: xxhash.xxh64_hexdigest(data) for label, data in golden_pool.contents(pool).items()} == expected
    assert check(tmp_path / "pool").problems == []
    with Pool.open(tmp_path / "pool", background=False) as pool:
        assert {label: xxhash.xxh64_hexdigest(data) for label, data in golden_pool.contents(pool).items()} == expected
        pool.open_disk("clone").pwrite(b"goes on", 0)
    assert check(tmp_path / "pool").problems == []


@pytest.mark.parametrize("name", ["closed", "crashed"])
def test_a_pool_of_format_1_with_lazy_disks_opens_with_what_it_held(name: str, tmp_path: Path) -> None:
    with tarfile.open(LAZY / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    expected = json.loads((LAZY / "contents.json").read_text(encoding="utf-8"))
    for read_only in (True, False):
        with Pool.open(tmp_path / "pool", read_only=read_only, background=False) as pool:
            held = {label: xxhash.xxh64_hexdigest(data) for label, data in golden_pool.lazy_contents(pool).items()}
            assert held == expected
            with pytest.raises(StoreError):
                pool.open_disk("one").pread(1, 2 << 20)
    assert check(tmp_path / "pool").problems == []
