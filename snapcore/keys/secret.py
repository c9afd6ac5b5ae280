"""Secrets in memory: overwritten when they are done with, as far as Python lets one.

What cannot be reached: copies that a library makes for itself, and strings that came from outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def wipe(secret: bytearray) -> None:
    """Overwrite a secret with zeros."""
    secret[:] = bytes(len(secret))


@contextmanager
def wiped(secret: bytearray) -> Iterator[bytearray]:
    """The secret, overwritten at the end of the block."""
    try:
        yield secret
    finally:
        wipe(secret)


class Secret:
    """Bytes that no `repr` shows."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes | bytearray) -> None:
        self._value = bytearray(value)

    def reveal(self) -> bytearray:
        """The bytes themselves, not a copy."""
        return self._value

    def wipe(self) -> None:
        """Overwrite them."""
        wipe(self._value)

    def __repr__(self) -> str:
        return "<secret>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a secret is not pickled")
