"""Fingerprints of the chunks of a disk's last snapshot, kept on this host to skip what has not changed.

A hint costs time when it is lost or wrong and never data: it is used only when the file belongs to this
repository, disk and parent snapshot, and a chunk is skipped only when the XXH64 of its bytes, under a
secret seed, equals the one recorded. Zero stands for "zero chunk or unknown" and never matches.

File, in the cache folder (`$XDG_CACHE_HOME/snapcore/hints/REPOSITORY-TAG`), little-endian: magic
`SNAPHINT`, version (4), chunk size (4), repository id (16), snapshot id (16), seed (8), 8 zero bytes;
then one 8-byte fingerprint a chunk, with holes where nothing is. A new file replaces the old by rename. When only
changes are known it is edited in place under a lock, unbound from its snapshot first, durably, so that a crash leaves a
file that belongs to none, and bound to the new one when all of it is durable.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import secrets
import struct
import tempfile
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import platformdirs

from snapcore.persist import Medium
from snapcore.repository.tree import Places

_MAGIC = b"SNAPHINT"
_VERSION = 1
_HEADER = struct.Struct("<8sII16s16sQQ")
_UNBOUND = bytes(16)
_CLEARED_AT_ONCE = 1 << 17
# Fingerprints with no more than so many between them are read and written together: 4 KiB.
_GAP = 512

Fingerprints = npt.NDArray[np.uint64]


def _near(places: Places) -> Iterator[tuple[int, int]]:
    """Which of some ascending places lie close to each other: from the first of the pair up to the second."""
    borders = np.flatnonzero(np.diff(places) > _GAP) + 1
    return itertools.pairwise([0, *borders.tolist(), len(places)])


class Hints:
    """The fingerprints of one disk of one repository.

    Attributes
    ----------
    snapshot : str or None
        Id of the snapshot that the file speaks of; None where there is no file that can be used.
    seed : int
        Of the fingerprints: that of the file, or a new one.
    """

    def __init__(self, repository_id: str, disk_tag: str, chunk_bytes: int) -> None:
        folder = platformdirs.user_cache_path("snapcore") / "hints"
        self._path = str(folder / f"{repository_id}-{disk_tag}")
        self._repository = bytes.fromhex(repository_id)
        self._chunk_bytes = chunk_bytes
        self._old = -1
        self._new = -1
        self._new_path: str | None = None
        self.snapshot: str | None = None
        self.seed = secrets.randbits(64)
        with contextlib.suppress(OSError):
            self._old = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            # Who edits in place holds it alone: fingerprints of a snapshot to come are none of this one's.
            fcntl.flock(self._old, fcntl.LOCK_SH | fcntl.LOCK_NB)
            self._load()

    def _load(self) -> None:
        data = os.pread(self._old, _HEADER.size, 0)
        if len(data) < _HEADER.size:
            return
        magic, version, chunk_bytes, repository, snapshot, seed, _ = _HEADER.unpack(data)
        if (magic, version, chunk_bytes, repository) != (
            _MAGIC,
            _VERSION,
            self._chunk_bytes,
            self._repository,
        ):
            return
        if snapshot != _UNBOUND:
            self.snapshot = snapshot.hex()
            self.seed = seed

    def read(self, places: Places) -> Fingerprints:
        """Fingerprints of the chunks at ascending places; zero where none is known."""
        return np.concatenate([self._read_near(self._old, places[low:high]) for low, high in _near(places)])

    @staticmethod
    def _read_near(descriptor: int, places: Places) -> Fingerprints:
        first, count = int(places[0]), int(places[-1] - places[0]) + 1
        found = np.zeros(count, dtype=np.uint64)
        with contextlib.suppress(OSError):
            data = os.pread(descriptor, count * 8, _HEADER.size + first * 8)
            whole = len(data) // 8
            found[:whole] = np.frombuffer(data, dtype="<u8", count=whole)
        return found[places - first]

    def begin_new(self) -> None:
        """Write all fingerprints anew."""
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            self._new, self._new_path = tempfile.mkstemp(dir=os.path.dirname(self._path))

    def begin_edit(self) -> None:
        """Change single fingerprints; until `finish` the file belongs to no snapshot."""
        try:
            fcntl.flock(self._old, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.pread(self._old, _HEADER.size, 0) != self._header(bytes.fromhex(self.snapshot or "")):
                # Another process edited it between the two locks: it speaks of that one's snapshot.
                return
            Medium().write_at(self._old, [self._header(_UNBOUND)], 0)
            os.fsync(self._old)
            self._new = os.dup(self._old)
        except OSError:
            self._new = -1

    def write(self, places: Places, fingerprints: Fingerprints) -> None:
        """Fingerprints of the chunks at ascending places; a cache that cannot be written is given up."""
        for low, high in _near(places):
            self._write_near(places[low:high], fingerprints[low:high])

    def _write_near(self, places: Places, fingerprints: Fingerprints) -> None:
        if self._new < 0:
            return
        first, count = int(places[0]), int(places[-1] - places[0]) + 1
        if count > len(places):
            # What lies between them stays: one write of all takes a tenth of the time of one for each.
            between = self._read_near(self._new, np.arange(first, first + count))
            between[places - first] = fingerprints
            fingerprints = between
        try:
            # All of it: what a short write left out would be old fingerprints under a new snapshot's name.
            data = fingerprints.astype("<u8", copy=False).tobytes()
            Medium().write_at(self._new, [data], _HEADER.size + first * 8)
        except OSError:
            self._give_up()

    def clear(self, first: int, stop: int) -> None:
        """The chunks from `first` up to `stop` are zero now."""
        if self._new < 0 or self._new_path is not None:
            return
        try:
            end = min(stop, (os.fstat(self._new).st_size - _HEADER.size) // 8)
            # A hole, for the file of a sparse disk shall stay as sparse as the disk.
            if end <= first or Medium().punch(self._new, _HEADER.size + first * 8, (end - first) * 8):
                return
        except OSError:
            self._give_up()
            return
        for start in range(first, end, _CLEARED_AT_ONCE):
            stop = min(start + _CLEARED_AT_ONCE, end)
            self.write(np.arange(start, stop), np.zeros(stop - start, dtype=np.uint64))

    def finish(self, snapshot: str, chunks: int) -> None:
        """Bind what was written to a snapshot of so many chunks that is committed."""
        if self._new < 0:
            return
        try:
            os.ftruncate(self._new, _HEADER.size + chunks * 8)
            # An old fingerprint under the new snapshot's name would hide a chunk that goes back to its old content.
            os.fsync(self._new)
            Medium().write_at(self._new, [self._header(bytes.fromhex(snapshot))], 0)
            if self._new_path is not None:
                os.replace(self._new_path, self._path)
                self._new_path = None
        except OSError:
            self._give_up()

    def close(self) -> None:
        """Let go of the files; what was begun and not finished is gone."""
        self._give_up()
        if self._old >= 0:
            os.close(self._old)
            self._old = -1

    def _header(self, snapshot: bytes) -> bytes:
        return _HEADER.pack(_MAGIC, _VERSION, self._chunk_bytes, self._repository, snapshot, self.seed, 0)

    def _give_up(self) -> None:
        if self._new >= 0:
            os.close(self._new)
            self._new = -1
        if self._new_path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._new_path)
            self._new_path = None


class NoHints(Hints):
    """Knows nothing and keeps nothing: for chunks whose bytes nobody looks at."""

    def __init__(self) -> None:
        self._old = self._new = -1
        self._new_path = None
        self.snapshot = None
        self.seed = 0

    def begin_new(self) -> None:
        return

    def begin_edit(self) -> None:
        return
