"""A store with a limit never has more calls under way than that, and lets go of its room after errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

from snapcore.errors import NotFoundError, UsageError
from snapcore.persist import Buffer
from snapcore.store import LimitStore, MemoryStore

Answer = TypeVar("Answer")


class Crowded(MemoryStore):
    """Counts the calls under way; each waits until `full` of them are, so the limit is reached and seen."""

    def __init__(self, full: int) -> None:
        super().__init__()
        self._full = threading.Barrier(full)
        self._counting = threading.Lock()
        self._under_way = 0
        self.most = 0

    def _inside(self, call: Callable[[], Answer]) -> Answer:
        with self._counting:
            self._under_way += 1
            self.most = max(self.most, self._under_way)
        self._full.wait(60)
        try:
            return call()
        finally:
            with self._counting:
                self._under_way -= 1
            # Nobody comes in for one who has not left the count yet.
            self._full.wait(60)

    def get(self, name: str, limit_bytes: int) -> bytes:
        return self._inside(lambda: super(Crowded, self).get(name, limit_bytes))

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        return self._inside(lambda: super(Crowded, self).get_range(name, offset_bytes, length_bytes))

    def size(self, name: str) -> int:
        return self._inside(lambda: super(Crowded, self).size(name))

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        return iter(self._inside(lambda: list(super(Crowded, self).list(prefix, after))))

    def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
        return self._inside(lambda: super(Crowded, self).put_new(name, buffers))

    def delete(self, name: str) -> None:
        self._inside(lambda: super(Crowded, self).delete(name))

    def settle(self, prefix: str) -> None:
        self._inside(lambda: super(Crowded, self).settle(prefix))

    def sweep(self) -> int:
        return self._inside(super().sweep)


CALLS: dict[str, Callable[[LimitStore, int], object]] = {
    "get": lambda store, number: store.get("a", 10),
    "get_range": lambda store, number: store.get_range("a", 0, 1),
    "size": lambda store, number: store.size("a"),
    "list": lambda store, number: list(store.list("")),
    "put_new": lambda store, number: store.put_new(f"p{number}", [b"data"]),
    "delete": lambda store, number: store.delete(f"d{number}"),
    "settle": lambda store, number: store.settle(""),
    "sweep": lambda store, number: store.sweep(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("limit", [1, 3])
def test_as_many_calls_as_allowed_are_under_way_and_never_more(call: str, limit: int) -> None:
    store = Crowded(limit)
    MemoryStore.put_new(store, "a", [b"data"])
    for number in range(12):
        MemoryStore.put_new(store, f"d{number}", [b"data"])
    limited = LimitStore(store, limit)
    with ThreadPoolExecutor(12) as hands:
        list(hands.map(CALLS[call], [limited] * 12, range(12)))
    assert store.most == limit


def test_room_is_free_again_after_an_error() -> None:
    limited = LimitStore(MemoryStore(), 1)
    for _ in range(3):
        for call in ("get", "get_range", "size", "delete"):
            with pytest.raises(NotFoundError):
                CALLS[call](limited, 0)
        with pytest.raises(UsageError):
            list(limited.list("../"))
        with pytest.raises(UsageError):
            limited.put_new("../a", [b"data"])
    assert limited.put_new("a", [b"data"]) == 4


def test_a_listing_that_is_not_read_to_its_end_holds_no_room() -> None:
    limited = LimitStore(MemoryStore(), 1)
    for name in "abc":
        limited.put_new(name, [b"data"])
    rows = limited.list("")
    assert next(rows) == ("a", 4)
    # With the only room held by the listing this would wait forever.
    assert limited.size("c") == 4
    assert list(rows) == [("b", 4), ("c", 4)]


@pytest.mark.parametrize("calls", [0, -1])
def test_a_limit_that_lets_nothing_through_is_refused(calls: int) -> None:
    with pytest.raises(UsageError, match=f"not {calls}"):
        LimitStore(MemoryStore(), calls)
