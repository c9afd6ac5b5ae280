"""A store that tries again gives the answers of a store that never failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore.errors import (
    DamagedError,
    Error,
    ExistsError,
    NotFoundError,
    OutOfSpaceError,
    ReadError,
    StoreError,
    StoreRefusedError,
    UsageError,
)
from snapcore.persist import Buffer
from snapcore.store import MemoryStore, RetryStore

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Fault:
    """What happens to one call: the error comes instead of it, or after it was carried out (its answer is lost)."""

    error: Error
    carried_out: bool = False


class Flaky(MemoryStore):
    """Faults for the first calls, one each (None lets a call through); all further calls go through."""

    def __init__(self, faults: Sequence[Fault | None] = ()) -> None:
        super().__init__()
        self.faults = list(faults)
        self.calls = 0

    def _through(self, call: Callable[[], Answer]) -> Answer:
        self.calls += 1
        fault = self.faults.pop(0) if self.faults else None
        if fault is None:
            return call()
        if fault.carried_out:
            call()
        raise fault.error

    def get(self, name: str, limit_bytes: int) -> bytes:
        return self._through(lambda: super(Flaky, self).get(name, limit_bytes))

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        return self._through(lambda: super(Flaky, self).get_range(name, offset_bytes, length_bytes))

    def size(self, name: str) -> int:
        return self._through(lambda: super(Flaky, self).size(name))

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        # The first rows come, then the connection breaks.
        rows = list(super().list(prefix, after))
        fault = self.faults.pop(0) if self.faults else None
        self.calls += 1
        yield from rows[: len(rows) // 2] if fault else rows
        if fault:
            raise fault.error

    def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
        return self._through(lambda: super(Flaky, self).put_new(name, buffers))

    def delete(self, name: str) -> None:
        self._through(lambda: super(Flaky, self).delete(name))

    def settle(self, prefix: str) -> None:
        self._through(lambda: super(Flaky, self).settle(prefix))

    def sweep(self) -> int:
        return self._through(super().sweep)


def retrying(store: Flaky) -> RetryStore:
    """Tries again for a minute, without waiting in between."""
    return RetryStore(store, budget_s=60.0, first_wait_s=0.0)


def failed(count: int = 1) -> list[Fault]:
    """Faults in which nothing was carried out."""
    return [Fault(StoreError("the connection broke"))] * count


LOST = Fault(StoreError("the answer was lost"), carried_out=True)


def filled(store: Flaky) -> Flaky:
    """The store with four objects, put there without faults."""
    faults, store.faults = store.faults, []
    for name in "abcd":
        store.put_new(name, [name.encode() * 10])
    store.faults, store.calls = faults, 0
    return store


QUESTIONS: dict[str, Callable[[RetryStore], object]] = {
    "get": lambda store: store.get("b", 100),
    "get_range": lambda store: store.get_range("b", 2, 3),
    "size": lambda store: store.size("b"),
    "list": lambda store: list(store.list("")),
    "put_new": lambda store: store.put_new("new", [b"data"]),
    "delete": lambda store: store.delete("b"),
    "settle": lambda store: store.settle(""),
    "sweep": lambda store: store.sweep(),
}


@pytest.mark.parametrize("question", QUESTIONS)
@given(faults=st.lists(st.sampled_from([StoreError("broken"), ReadError("disk", 0, 1, 5, "broken")]), max_size=5))
def test_an_answer_after_faults_is_the_answer_without_faults(question: str, faults: list[Error]) -> None:
    ask = QUESTIONS[question]
    smooth, rough = filled(Flaky()), filled(Flaky([Fault(error) for error in faults]))
    assert ask(retrying(rough)) == ask(retrying(smooth))
    assert rough.calls == len(faults) + 1
    assert list(rough.list("")) == list(smooth.list(""))


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(
    "answer",
    [
        NotFoundError("gone"),
        ExistsError("taken"),
        OutOfSpaceError("full"),
        DamagedError("bad"),
        UsageError("wrong"),
        StoreRefusedError("never"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_answers_that_are_no_faults_come_at_once(question: str, answer: Error) -> None:
    store = filled(Flaky([Fault(answer)]))
    with pytest.raises(type(answer)) as caught:
        QUESTIONS[question](retrying(store))
    assert caught.value is answer and store.calls == 1


@pytest.mark.parametrize("question", QUESTIONS)
def test_when_the_budget_is_over_the_stores_own_error_comes(question: str) -> None:
    store = filled(Flaky(failed(1000)))
    with pytest.raises(StoreError, match="the connection broke"):
        QUESTIONS[question](RetryStore(store, budget_s=0.0, first_wait_s=0.0))
    assert store.calls == 1


@given(st.lists(st.sampled_from([*failed(), LOST]), max_size=5))
def test_a_creation_succeeds_whichever_answers_are_lost(faults: list[Fault]) -> None:
    store = Flaky(faults)
    assert retrying(store).put_new("a", [b"da", bytearray(b"ta")]) == 4
    store.faults = []
    assert store.get("a", 100) == b"data"


@given(st.lists(st.sampled_from([*failed(), LOST]), max_size=5))
def test_a_removal_succeeds_whichever_answers_are_lost(faults: list[Fault]) -> None:
    store = filled(Flaky())
    store.faults = list(faults)
    retrying(store).delete("b")
    assert [name for name, _ in MemoryStore.list(store, "")] == ["a", "c", "d"]


@pytest.mark.parametrize("theirs", [b"other", b"longer than ours", b"", b"dat"])
def test_a_name_that_another_took_after_a_fault_is_taken(theirs: bytes) -> None:
    store = Flaky()
    store.put_new("a", [theirs])
    store.faults = failed(2)
    with pytest.raises(ExistsError):
        retrying(store).put_new("a", [b"data!"])
    assert store.get("a", 100) == theirs


def test_a_name_that_was_taken_before_is_taken_even_by_the_same_bytes() -> None:
    store = Flaky()
    store.put_new("a", [b"data"])
    with pytest.raises(ExistsError):
        retrying(store).put_new("a", [b"data"])


def test_an_object_that_is_removed_while_a_lost_answer_is_looked_into_counts_as_taken_by_another() -> None:
    store = Flaky([*failed(), Fault(ExistsError("taken"))])
    with pytest.raises(ExistsError):
        retrying(store).put_new("a", [b"data"])


def test_a_fault_while_a_lost_answer_is_looked_into_is_a_fault_like_any_other() -> None:
    store = Flaky([LOST, None, *failed(), None, *failed()])
    assert retrying(store).put_new("a", [b"data"]) == 4


def test_removing_what_never_was_is_not_found_without_a_fault_before() -> None:
    with pytest.raises(NotFoundError):
        retrying(Flaky()).delete("a")


def test_one_call_that_failed_does_not_count_against_the_next() -> None:
    store = Flaky(failed())
    again = retrying(store)
    assert again.put_new("a", [b"data"]) == 4
    with pytest.raises(ExistsError):
        again.put_new("a", [b"data"])


class Torn(MemoryStore):
    """Every listing breaks after its first rows, until there are no more than those; tells where each began."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self.begun: list[str] = []

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        self.begun.append(after)
        for number, row in enumerate(super().list(prefix, after)):
            if number == self._rows:
                raise StoreError("the connection broke")
            yield row


def test_a_listing_goes_on_behind_the_page_that_came() -> None:
    store = Torn(1200)
    for number in range(2500):
        store.put_new(f"p/{number:04}", [b""])
    rows = list(RetryStore(store, budget_s=60.0, first_wait_s=0.0).list("p/"))
    assert rows == [(f"p/{number:04}", 0) for number in range(2500)]
    assert store.begun == ["", "p/0999", "p/1999"]
