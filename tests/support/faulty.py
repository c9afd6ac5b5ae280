"""A store in which chosen calls go wrong, in every way in which a network and a server can do that."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from snapcore.errors import Error, StoreError
from snapcore.persist import Buffer
from snapcore.store import Store

Answer = TypeVar("Answer")

METHODS = ("get", "get_range", "size", "list", "put_new", "delete", "settle")


class Fault(StrEnum):
    """What happens to a call."""

    FAIL = "it fails and nothing was done"
    LOSE = "it is done and its answer is lost"
    TRUNCATE = "a part of what was asked for comes, or goes in, and then it fails"
    LIE = "a part of what was asked for comes, as if it were all"
    TWICE = "it reaches the store twice, and the second answer comes"
    LATE = "it fails, and is done when the next call has been done"
    LAST = "it fails, and is done when all else has been done"
    AFTER_NEXT = "it waits until another call has overtaken it, or for a moment when there is none"


@dataclass(frozen=True)
class Plan:
    """The `number`-th call (from 0 on) of `method` has the fault; `times` such calls in a row do."""

    fault: Fault
    method: str
    number: int = 0
    times: int = 1


class FaultyStore:
    """The store inside, with the faults of a plan.

    Attributes
    ----------
    counts : Counter of method
        Calls so far.
    hit : bool
        Whether the fault has happened.
    """

    def __init__(self, store: Store, plan: Plan | None = None) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._overtaken = threading.Event()
        self._late: list[Callable[[], object]] = []
        self._last: list[Callable[[], object]] = []
        self.plan = plan
        self.counts: Counter[str] = Counter()
        self.hit = False

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def folder(self) -> str | None:
        return self._store.folder

    def _call(self, method: str, call: Callable[[], Answer], part: Callable[[Answer], Answer] | None = None) -> Answer:
        """Carry out a call as planned; `part` makes a part of an answer."""
        fault = self._fault(method)
        try:
            return call() if fault is None else self._wrong(fault, method, call, part)
        finally:
            if fault is not Fault.LATE:
                self._do_late()
            if fault is not Fault.AFTER_NEXT:
                self._overtaken.set()

    def _fault(self, method: str) -> Fault | None:
        with self._lock:
            number = self.counts[method]
            self.counts[method] += 1
            plan = self.plan
            if plan is None or plan.method != method or not plan.number <= number < plan.number + plan.times:
                return None
            self.hit = True
            self._overtaken.clear()
            return plan.fault

    def _do_late(self) -> None:
        with self._lock:
            late, self._late = self._late, []
        for call in late:
            quietly(call)

    def _wrong(
        self, fault: Fault, method: str, call: Callable[[], Answer], part: Callable[[Answer], Answer] | None
    ) -> Answer:
        error = StoreError(f"{method} on {self.url} went wrong: {fault}")
        if fault is Fault.LIE and part is not None:
            return part(call())
        if fault is Fault.TWICE:
            quietly(call)
            return call()
        if fault is Fault.AFTER_NEXT:
            self._overtaken.wait(0.02)
            return call()
        if fault is Fault.LOSE or (fault is Fault.TRUNCATE and part is not None):
            call()
        if fault in (Fault.LATE, Fault.LAST):
            with self._lock:
                (self._late if fault is Fault.LATE else self._last).append(call)
        raise error

    def settle_late(self) -> None:
        """Do what was asked for and not done so far."""
        self._do_late()
        for call in self._last:
            quietly(call)

    def get(self, name: str, limit_bytes: int) -> bytes:
        return self._call("get", lambda: self._store.get(name, limit_bytes), half)

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        return self._call("get_range", lambda: self._store.get_range(name, offset_bytes, length_bytes), half)

    def size(self, name: str) -> int:
        return self._call("size", lambda: self._store.size(name))

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        # The rows before the connection breaks come; that a list ends early without a sign is no fault of a network:
        # pages end with a mark.
        found: list[tuple[str, int]] = []
        error: StoreError | None = None
        try:
            found = self._call("list", lambda: list(self._store.list(prefix, after)))
        except StoreError as fault:
            error = fault
            if self.plan is not None and self.plan.fault is Fault.TRUNCATE:
                # The first pages came.
                rows = list(self._store.list(prefix, after))
                found = rows[: len(rows) // 2]
        yield from found
        if error is not None:
            raise error

    def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
        # A late call has the bytes that it was given.
        data = b"".join(buffers)
        return self._call("put_new", lambda: self._store.put_new(name, [data]))

    def delete(self, name: str) -> None:
        self._call("delete", lambda: self._store.delete(name))

    def settle(self, prefix: str) -> None:
        self._call("settle", lambda: self._store.settle(prefix))

    def sweep(self) -> int:
        return self._store.sweep()


def half(data: bytes) -> bytes:
    """The first half of an answer."""
    return data[: len(data) // 2]


def quietly(call: Callable[[], object]) -> None:
    """Carry out a call whose answer nobody hears."""
    with contextlib.suppress(Error):
        call()
