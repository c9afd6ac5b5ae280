"""A snapshot as a file to read anywhere in: what instant access, exports and mounts build on."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict

import numpy as np
from typing_extensions import Buffer as BufferLike

from snapcore import extents
from snapcore.errors import DamagedError, UsageError
from snapcore.extents import Extents
from snapcore.persist import Buffer
from snapcore.repository import tree
from snapcore.repository.domain import ZERO_ID
from snapcore.repository.manifest import Manifest
from snapcore.repository.objects import NODES_KEPT, Objects
from snapcore.repository.table import ids_of
from snapcore.repository.tree import FANOUT, Node

_CHUNKS_KEPT_BYTES = 16 << 20


class SnapshotReader(io.RawIOBase):
    """Random access to the bytes of a snapshot. Every chunk is checked against its id; safe from many threads.

    It is a `Source` too: for exports, and for pools that import it.

    `read`, `seek`, `tell` and `readinto` work as with any raw file; `pread_into` needs no position. Memory: 16 MiB of
    chunks.
    """

    def __init__(self, objects: Objects, snapshot: Manifest) -> None:
        super().__init__()
        self.snapshot = snapshot
        self._objects = objects
        self._position = 0
        self._kept: OrderedDict[bytes, Buffer] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Length of the disk."""
        return self.snapshot.size_bytes

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return f"snapshot {self.snapshot.id}"

    def data_extents(self) -> Extents:
        """Chunks that are not zero; see `Source.data_extents`."""
        found = [extents.empty()]
        for first, leaf in tree.leaves_many(self.snapshot.tree, self._objects.nodes, stop=self.snapshot.chunks):
            chunks = first + np.flatnonzero(leaf.any(axis=1))
            found.append(extents.from_blocks(chunks, self._objects.chunk_bytes, self.size_bytes))
        return extents.merged(np.concatenate(found))

    def load_map(self) -> None:
        """Fetch the map from the top down, as much of it as is kept: reads that follow fetch only chunks."""
        tree.loaded(self.snapshot.tree, self._objects.nodes, NODES_KEPT)

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        """Fill `target`, neighbours in a pack in one go; see `Source.read_into`. DamagedError as for `pread_into`."""
        size = self._objects.chunk_bytes
        first, stop = offset_bytes // size, -(-(offset_bytes + len(target)) // size)
        if stop * size > self.snapshot.chunks * size:
            raise UsageError(f"{self.name} has {self.size_bytes} bytes; {len(target)} at {offset_bytes} are not in it")
        ids = self._ids(first, stop)
        filled = np.flatnonzero(ids.any(axis=1))
        target[:] = bytes(len(target))
        for number, plain in self._objects.chunks(ids_of(ids[filled].tobytes())):
            if isinstance(plain, DamagedError):
                raise plain
            at = (first + int(filled[number])) * size - offset_bytes
            begin, end = max(at, 0), min(at + size, len(target))
            target[begin:end] = memoryview(plain)[begin - at : end - at]

    def _ids(self, first: int, stop: int) -> Node:
        """The ids of chunks that follow each other."""
        found = np.zeros((stop - first, len(ZERO_ID)), dtype=np.uint8)
        for base, leaf in tree.leaves_many(self.snapshot.tree, self._objects.nodes, first, stop):
            begin, end = max(base, first), min(base + FANOUT, stop)
            found[begin - first : end - first] = leaf[begin - base : end - base]
        return found

    def check_unchanged(self) -> None:
        """A snapshot never changes; see `Source.check_unchanged`."""

    def pread_into(self, buffer: BufferLike, offset_bytes: int) -> int:
        """Fill `buffer` from the disk.

        Parameters
        ----------
        buffer : writable bytes-like object
        offset_bytes : int

        Returns
        -------
        int
            Bytes read: less than the buffer only at the disk's end.

        Raises
        ------
        DamagedError
            A chunk there cannot be read; nothing wrong is handed out.
        """
        if offset_bytes < 0:
            raise UsageError(f"offset {offset_bytes} is negative")
        target = memoryview(buffer).cast("B")
        length = max(0, min(len(target), self.size_bytes - offset_bytes))
        size = self._objects.chunk_bytes
        done = 0
        while done < length:
            number, skip = divmod(offset_bytes + done, size)
            count = min(size - skip, length - done)
            plain = self._chunk(number)
            target[done : done + count] = bytes(count) if plain is None else plain[skip : skip + count]
            done += count
        return length

    def _chunk(self, number: int) -> Buffer | None:
        """A chunk's bytes; None for zeros."""
        object_id = self._id(number)
        if object_id == ZERO_ID:
            return None
        with self._lock:
            found = self._kept.get(object_id)
            if found is not None:
                self._kept.move_to_end(object_id)
                return found
        found = self._objects.chunk(object_id)
        with self._lock:
            self._kept[object_id] = found
            while len(self._kept) * self._objects.chunk_bytes > _CHUNKS_KEPT_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return found

    def _id(self, number: int) -> bytes:
        found = tree.leaf(self.snapshot.tree, self._objects.node, number)
        return ZERO_ID if found is None else found[number % FANOUT].tobytes()

    def readinto(self, buffer: BufferLike) -> int:
        count = self.pread_into(buffer, self._position)
        self._position += count
        return count

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}.get(whence)
        if start is None or start + offset < 0:
            raise UsageError(f"cannot seek to {offset} from {whence}")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position
