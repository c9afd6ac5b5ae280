"""What a store is: bytes under names. Small capabilities with contracts; a conformance suite holds every store to them.

A name is one or more parts of the characters a–z, 0–9, "-", joined by "/". Objects are whole and immutable:
they appear at once, never change, and go at once. Every method may be called from many threads.

Errors: NotFoundError for a name that is not there; ExistsError for one that is; OutOfSpaceError; StoreRefusedError for
what the store will never do; StoreError (or one below it) for anything else, which may go well another time. No method
hands out a part of an object as if it were the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from snapcore.persist import Buffer


class Reader(Protocol):
    """Objects can be read."""

    def get(self, name: str, limit_bytes: int) -> bytes:
        """The whole object; DamagedError when it is larger than the limit."""

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        """Exactly that range of an object; DamagedError when the object ends before it does."""

    def size(self, name: str) -> int:
        """Length of an object in bytes."""


class Lister(Protocol):
    """Names can be listed."""

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        """(name, size in bytes) of every object whose name begins with `prefix` and is greater than `after`, sorted.

        `prefix` is empty or ends with "/". What is put or deleted meanwhile may or may not be listed.
        """


class Writer(Protocol):
    """Objects can be created."""

    def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
        """Create an object from the buffers joined; atomic, and durable on return. Returns its size.

        ExistsError when the name is taken, by whomever: of several that create one name, one wins. After any
        error but ExistsError the object is not there, or (when the store failed in mid-call) whole.
        """


class Deleter(Protocol):
    """Objects can be removed."""

    def delete(self, name: str) -> None:
        """Remove an object; durable on return. NotFoundError when there is none."""


class Settler(Protocol):
    """What others created or removed can be made durable."""

    def settle(self, prefix: str) -> None:
        """All that could be seen under `prefix` before the call, and what was seen to be gone, is durable on return.

        Whoever creates sees an object the instant before it is durable, and a process may die in that instant: who
        makes an object that relies on one of another process settles that first.
        """


class Sweeper(Protocol):
    """What interrupted creations left behind can be removed."""

    def sweep(self) -> int:
        """Remove what is no object and never will be, also while others create. Returns the bytes freed."""


class Store(Reader, Lister, Writer, Deleter, Settler, Sweeper, Protocol):
    """All of it, and a word for people about where it is."""

    @property
    def url(self) -> str:
        """Where this store is, for messages."""

    @property
    def folder(self) -> str | None:
        """The folder on this host that it keeps its objects in, which nothing else may write to; None without one."""
