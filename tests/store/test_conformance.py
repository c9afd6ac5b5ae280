"""Every store, bare and in its decorators, keeps the contracts of a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from snapcore.store import CacheStore, LimitStore, LocalStore, MemoryStore, RetryStore, Store
from tests.store.conformance import StoreConformance
from tests.support.counting import CountingStore
from tests.support.faulty import FaultyStore
from tests.support.mediums import Unsynced
from tests.support.s3 import bare_store, whole_store

REPOSITORY = "0" * 32

_DECORATORS: dict[str, Callable[[Store], Store]] = {
    "bare": lambda store: store,
    "retry": lambda store: RetryStore(store, budget_s=0.0, first_wait_s=0.0),
    "limit": lambda store: LimitStore(store, 1),
    "cache": lambda store: CacheStore(store, REPOSITORY),
    "retry of limit": lambda store: RetryStore(LimitStore(store, 2), budget_s=0.0, first_wait_s=0.0),
    "counting": CountingStore,
    "faulty": FaultyStore,
}


@pytest.fixture(params=_DECORATORS)
def decorate(request: pytest.FixtureRequest) -> Callable[[Store], Store]:
    return _DECORATORS[request.param]


class TestLocalStore(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path, decorate: Callable[[Store], Store]) -> Store:
        return decorate(LocalStore(str(tmp_path / "folder" / "store"), Unsynced()))


class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def store(self, decorate: Callable[[Store], Store]) -> Store:
        return decorate(MemoryStore())


class TestS3Store(StoreConformance):
    @pytest.fixture(params=["bare", "as users get it"])
    def store(self, s3: str, request: pytest.FixtureRequest) -> Store:
        return bare_store() if request.param == "bare" else CacheStore(whole_store(), REPOSITORY)
