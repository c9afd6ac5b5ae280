"""Writing qcow2, version 3, in one pass: clusters of 64 KiB, each table behind its data, the header last.

| in the file | when |
| --- | --- |
| cluster 0, left open | first |
| clusters, plain ones on their border, packed ones side by side | as they come |
| a second-level table | when its 512 MiB of the disk are through |
| a block of counts | when the 2 GiB of the file that it counts are through |
| directory, the last blocks of counts, their table | at the end |
| header, into cluster 0 | at the very end |

A packed cluster counts in each cluster of the file that it touches; everything else once.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

from snapcore.errors import UsageError
from snapcore.source import packing, qcow2
from snapcore.source.sink import Sink
from snapcore.source.writer import Piece

_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_TABLE_ENTRIES = _CLUSTER // 8
_COUNTS = _CLUSTER // 2
_COUNT_ORDER = 4
_HEADER_BYTES = 112
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQIIB7xII")
_OFFSET_BITS = 62 - (_CLUSTER_BITS - 8)
_SECTOR = 512
# One that packs to more is kept as it is: reading it is then free.
_WORTH_BYTES = _CLUSTER - 4096
# As in QEMU: a directory of 32 MiB.
_SIZE_LIMIT_BYTES = (32 << 20) // 8 * _TABLE_ENTRIES * _CLUSTER


class Qcow2Writer:
    """See `snapcore.source.writer.Writer`.

    Parameters
    ----------
    size_bytes : int
        Of the disk, whole sectors.
    compression : str, optional
        "zlib" or "zstd".
    """

    unit_bytes = _CLUSTER

    def __init__(self, size_bytes: int, compression: str | None) -> None:
        if size_bytes > _SIZE_LIMIT_BYTES:
            raise UsageError(f"a qcow2 image has up to {_SIZE_LIMIT_BYTES} bytes, not {size_bytes}; write raw")
        self.pack: Callable[[memoryview], bytes] | None = None
        if compression is not None:
            self.pack = _filled_up(packing.packer_of(compression))
        self._zstd = compression == "zstd"
        self.size_bytes = size_bytes
        self._directory = np.zeros(-(-size_bytes // (_TABLE_ENTRIES * _CLUSTER)), dtype=">u8")
        self._table = np.zeros(_TABLE_ENTRIES, dtype=">u8")
        self._number = 0
        # Counts of the clusters of the file from `_counted` on, and where the blocks before that are.
        self._counts = np.zeros(2 * _COUNTS, dtype=">u2")
        self._counted = 0
        self._blocks: list[int] = []

    def begin(self, sink: Sink) -> None:
        """See `Writer.begin`."""
        self._count(0, 1)
        sink.append_zeros(_CLUSTER)

    def put(self, sink: Sink, piece: Piece) -> None:
        """See `Writer.put`."""
        first = piece.offset_bytes // _CLUSTER
        number, slot = divmod(first, _TABLE_ENTRIES)
        if number != self._number:
            self._end_table(sink)
            self._number = number
        if self.pack is None:
            self._put_plain(sink, slot, piece.data)
        else:
            self._put_packed(sink, slot, piece)

    def _put_plain(self, sink: Sink, slot: int, data: memoryview) -> None:
        """Clusters as they are, on their border."""
        count = -(-len(data) // _CLUSTER)
        place = self._append_clusters(sink, data)
        numbers = np.arange(count, dtype=np.uint64) * np.uint64(_CLUSTER)
        self._table[slot : slot + count] = numbers + np.uint64(place | qcow2.COPIED)

    def _put_packed(self, sink: Sink, slot: int, piece: Piece) -> None:
        plain = []
        for number, packed in enumerate(piece.packed):
            if len(packed) > _WORTH_BYTES:
                # Behind the others of the piece: each change from packed to plain costs the rest of a cluster.
                plain.append(number)
                continue
            place, stop = sink.position, sink.position + len(packed)
            sink.append(packed)
            self._count(place // _CLUSTER, (stop - 1) // _CLUSTER - place // _CLUSTER + 1)
            sectors = (stop - 1) // _SECTOR - place // _SECTOR
            self._table[slot + number] = qcow2.COMPRESSED | sectors << _OFFSET_BITS | place
            self._end_counts(sink)
        for number in plain:
            self._put_plain(sink, slot + number, piece.data[number * _CLUSTER : (number + 1) * _CLUSTER])

    def _append_clusters(self, sink: Sink, data: memoryview | bytes) -> int:
        """Append whole clusters, the last one filled up with zeros; returns where."""
        self._align(sink)
        place = sink.position
        sink.append(data)
        if len(data) % _CLUSTER:
            sink.append(bytes(-len(data) % _CLUSTER))
        self._count(place // _CLUSTER, (sink.position - place) // _CLUSTER)
        self._end_counts(sink)
        return place

    @staticmethod
    def _align(sink: Sink) -> None:
        if sink.position % _CLUSTER:
            sink.append(bytes(-sink.position % _CLUSTER))

    def _count(self, first: int, count: int) -> None:
        at = first - self._counted
        self._counts[at : at + count] += 1

    def _end_counts(self, sink: Sink) -> None:
        """Write a block of counts when all clusters that it counts are given out."""
        if sink.position // _CLUSTER - self._counted >= _COUNTS:
            block = self._counts[:_COUNTS].tobytes()
            self._counts[:_COUNTS] = self._counts[_COUNTS:]
            self._counts[_COUNTS:] = 0
            self._counted += _COUNTS
            self._blocks.append(self._append_clusters(sink, block))

    def _end_table(self, sink: Sink) -> None:
        if self._table.any():
            self._directory[self._number] = self._append_clusters(sink, self._table.tobytes()) | qcow2.COPIED
            self._table[:] = 0

    def end(self, sink: Sink) -> None:
        """See `Writer.end`."""
        self._end_table(sink)
        directory = self._append_clusters(sink, self._directory.tobytes()) if len(self._directory) else 0
        blocks_at = sink.position // _CLUSTER
        left, table = self._left(blocks_at)
        self._count(blocks_at, left + table)
        self._blocks += [(blocks_at + number) * _CLUSTER for number in range(left)]
        for number in range(left):
            sink.append(self._counts[number * _COUNTS : (number + 1) * _COUNTS].tobytes())
        table_at = sink.position
        sink.append(np.array(self._blocks, dtype=">u8").tobytes().ljust(table * _CLUSTER, b"\0"))
        sink.rewrite(self._header(directory, table_at, table), 0)

    def _left(self, stop: int) -> tuple[int, int]:
        """How many blocks of counts are to come behind cluster `stop`, and clusters of their table behind them."""
        left = table = 1
        while True:
            blocks = -(-(stop + left + table - self._counted) // _COUNTS)
            clusters = -(-(len(self._blocks) + blocks) * 8 // _CLUSTER)
            if (blocks, clusters) == (left, table):
                return left, table
            left, table = max(left, blocks), max(table, clusters)

    def _header(self, directory: int, table_at: int, table: int) -> bytes:
        features = qcow2.INCOMPATIBLE_COMPRESSION if self._zstd else 0
        # No backing file; no encryption; no internal snapshots; an extension that ends the extensions.
        disk = (qcow2.MAGIC, 3, 0, 0, _CLUSTER_BITS, self.size_bytes, 0, len(self._directory), directory)
        rest = (table_at, table, 0, 0, features, 0, 0, _COUNT_ORDER, _HEADER_BYTES, self._zstd, 0, 0)
        return _HEADER.pack(*disk, *rest)


def _filled_up(pack: Callable[[memoryview], bytes]) -> Callable[[memoryview], bytes]:
    """Packs what ends the disk as a whole cluster."""

    def packed(data: memoryview) -> bytes:
        if len(data) < _CLUSTER:
            data = memoryview(bytes(data).ljust(_CLUSTER, b"\0"))
        return pack(data)

    return packed
