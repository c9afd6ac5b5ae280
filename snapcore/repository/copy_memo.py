"""Which ids chunks got in another domain: kept on this host while a copy is under way, so that an interrupted one need
not read again what it has stored.

File, in the cache folder (`$XDG_CACHE_HOME/snapcore/copies/NAME`): entries of first chunk (8), number of chunks *n*
(4), little-endian, 32 *n* bytes of ids, and 32 bytes of BLAKE3 over all that and the old ids, keyed with the tag key of
the domain that the copy goes to. An entry counts when that is right for the old ids that are asked about; so a file
that was torn or changed costs time and never data. The chunks must be looked for all the same: a collection may have
removed them. The file goes when the copy is done.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
import threading
from typing import Protocol

import blake3
import numpy as np
import platformdirs

from snapcore.repository.domain import ID_BYTES, Domain
from snapcore.repository.tree import Node

_HEAD = struct.Struct("<QI")
_MAC_BYTES = 32
_COUNT_LIMIT = 1 << 16


class Memo(Protocol):
    """Remembers what ids chunks got."""

    def find(self, first: int, old: Node) -> Node | None:
        """The new ids of the chunks of these old ids in the span from chunk `first` on; None when not known."""

    def note(self, first: int, old: Node, new: Node) -> None:
        """Remember them."""


class FileMemo:
    """A memo in a file; safe from many threads. One that cannot be written is given up.

    Parameters
    ----------
    domain : Domain
        That the copy goes to.
    what : str
        Says which copy it is.
    """

    def __init__(self, domain: Domain, what: str) -> None:
        self._key = domain.tag_key
        name = blake3.blake3(b"copy:" + what.encode(), key=self._key).hexdigest(16)
        folder = platformdirs.user_cache_path("snapcore") / "copies"
        self._path = str(folder / name)
        self._lock = threading.Lock()
        self._places: dict[tuple[int, int], int] = {}
        self._file = -1
        with contextlib.suppress(OSError):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._load()

    def _load(self) -> None:
        end = os.fstat(self._file).st_size
        at = 0
        while True:
            head = os.pread(self._file, _HEAD.size, at)
            if len(head) < _HEAD.size:
                break
            first, count = _HEAD.unpack(head)
            length = _HEAD.size + count * ID_BYTES + _MAC_BYTES
            if not 0 < count <= _COUNT_LIMIT or at + length > end:
                break
            self._places[first, count] = at
            at += length
        # What follows a torn entry would be read as a part of it.
        os.ftruncate(self._file, at)

    def find(self, first: int, old: Node) -> Node | None:
        """See `Memo`; None for an entry that was torn or changed."""
        at = self._places.get((first, len(old)))
        if at is None:
            return None
        try:
            data = os.pread(self._file, _HEAD.size + len(old) * ID_BYTES + _MAC_BYTES, at)
        except OSError:
            return None
        entry, mac = data[:-_MAC_BYTES], data[-_MAC_BYTES:]
        if not secrets.compare_digest(mac, self._sum(entry, old)):
            return None
        return np.frombuffer(entry, dtype=np.uint8, offset=_HEAD.size).reshape(-1, ID_BYTES)

    def note(self, first: int, old: Node, new: Node) -> None:
        """See `Memo`; found by the next one that opens the file."""
        entry = _HEAD.pack(first, len(new)) + new.tobytes()
        with self._lock:
            if self._file < 0:
                return
            data = entry + self._sum(entry, old)
            try:
                whole = os.write(self._file, data) == len(data)
            except OSError:
                whole = False
            if not whole:
                self.close()

    def _sum(self, entry: bytes, old: Node) -> bytes:
        return blake3.blake3(b"copied ids" + entry, key=self._key).update(old.tobytes()).digest()

    def close(self) -> None:
        """Let go of the file; it stays for the next attempt."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """The copy is done: the file goes."""
        self.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)
