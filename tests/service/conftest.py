"""What tests of the service share: a pool and a repository that cost no disk time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapcore import MemoryStore, Repository
from snapcore.pool import Pool
from tests.support.pools import quick_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    """For pools."""
    made = quick_folder()
    yield made
    shutil.rmtree(made)


@pytest.fixture
def pool(folder: Path) -> Iterator[Pool]:
    """An empty pool."""
    with Pool.create(folder / "pool", background=False) as made:
        yield made


@pytest.fixture
def repository() -> Repository:
    """An empty repository."""
    return Repository.create(MemoryStore())
