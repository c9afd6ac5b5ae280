"""A store that tries again: for stores behind a network. Wraps any store and keeps its contract.

Only errors of the store itself are tried again (StoreError and ReadError), with random waits that grow, within one
time budget for the whole call (of a list: for each page, which goes on where the one before ended). NotFoundError,
ExistsError, OutOfSpaceError, DamagedError and StoreRefusedError are answers and not faults. A creation whose answer was
lost may have succeeded: when the name is taken after a failed try, the object is compared with what was to be written.
So may a removal: a name that is gone after a failed try is what was asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from snapcore.errors import ExistsError, NotFoundError, ReadError, StoreError, StoreRefusedError
from snapcore.persist import Buffer
from snapcore.store.interface import Store

_PAGE = 1000

Answer = TypeVar("Answer")


def _is_fault(error: BaseException) -> bool:
    return isinstance(error, (StoreError, ReadError)) and not isinstance(error, StoreRefusedError)


class RetryStore:
    """The store inside, asked again until it answers; no try begins when `budget_s` seconds are over."""

    def __init__(self, store: Store, budget_s: float = 60.0, first_wait_s: float = 0.1) -> None:
        # Imported where it is used: it costs 20 ms, and a command on a local folder never retries.
        import tenacity

        self._store = store
        self._limits = budget_s, first_wait_s
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_fault),
            stop=tenacity.stop_before_delay(budget_s),
            wait=tenacity.wait_random_exponential(multiplier=first_wait_s, max=10.0),
            reraise=True,
        )

    def __reduce__(self) -> tuple[type[RetryStore], tuple[Store, float, float]]:
        """For another process, which tries again by itself."""
        return RetryStore, (self._store, *self._limits)

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def folder(self) -> str | None:
        return self._store.folder

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        return self._retrying.copy()(question)

    def get(self, name: str, limit_bytes: int) -> bytes:
        return self._ask(lambda: self._store.get(name, limit_bytes))

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        return self._ask(lambda: self._store.get_range(name, offset_bytes, length_bytes))

    def size(self, name: str) -> int:
        return self._ask(lambda: self._store.size(name))

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        rows: Iterator[tuple[str, int]] | None = None

        def page() -> list[tuple[str, int]]:
            nonlocal rows
            try:
                rows = self._store.list(prefix, after) if rows is None else rows
                return list(itertools.islice(rows, _PAGE))
            except BaseException:
                # A generator that raised is at its end.
                rows = None
                raise

        while found := self._ask(page):
            after = found[-1][0]
            yield from found

    def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
        failed_before = False

        def create() -> int:
            nonlocal failed_before
            try:
                return self._store.put_new(name, buffers)
            except ExistsError:
                wanted = b"".join(buffers)
                if failed_before and self._holds(name, wanted):
                    return len(wanted)
                raise
            except StoreError:
                failed_before = True
                raise

        return self._ask(create)

    def _holds(self, name: str, wanted: bytes) -> bool:
        try:
            return self._store.size(name) == len(wanted) and self._store.get(name, len(wanted)) == wanted
        except NotFoundError:
            return False

    def delete(self, name: str) -> None:
        failed_before = False

        def remove() -> None:
            nonlocal failed_before
            try:
                self._store.delete(name)
            except NotFoundError:
                if not failed_before:
                    raise
            except StoreError:
                failed_before = True
                raise

        self._ask(remove)

    def settle(self, prefix: str) -> None:
        self._ask(lambda: self._store.settle(prefix))

    def sweep(self) -> int:
        return self._ask(self._store.sweep)
