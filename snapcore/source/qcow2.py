"""Reading qcow2, versions 2 and 3, as QEMU's docs/interop/qcow2.txt describes it.

| of a cluster the entry says | the reader takes it for |
| --- | --- |
| bit 62 | PACKED: offset and number of 512-byte sectors |
| bit 0, version 3 | ZERO |
| offset 0 | BELOW: of the backing file |
| an offset | DATA |

With extended entries the unit is a subcluster (a 32nd of a cluster), and a bitmap says which are data, zero or below.
Refcounts are not looked at: they say what is free, not what is read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from snapcore.errors import UnsupportedFormatError
from snapcore.source import packing
from snapcore.source.container import TABLE_LIMIT_BYTES, Container
from snapcore.source.interface import Source
from snapcore.source.mapped import BELOW, DATA, PACKED, ZERO, MappedImage, Units

MAGIC = b"QFI\xfb"
COPIED = 1 << 63
COMPRESSED = 1 << 62
INCOMPATIBLE_COMPRESSION = 1 << 3

_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_FEATURES = struct.Struct(">QQQII")
_DIRTY, _CORRUPT, _EXTERNAL_DATA, _EXTENDED_L2 = 1 << 0, 1 << 1, 1 << 2, 1 << 4
_KNOWN_FEATURES = _DIRTY | _CORRUPT | _EXTERNAL_DATA | INCOMPATIBLE_COMPRESSION | _EXTENDED_L2
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_SECTOR_BYTES = 512
_SUBCLUSTERS = 32
_EXTENSION_END = 0
_EXTENSION_BACKING_FORMAT = 0xE279_2ACA
_BACKING_NAME_LIMIT = 1023
# Entries of a second-level table that are turned into units at a time.
_PAGE_ENTRIES = 8192


class Backing(NamedTuple):
    """The file below, as the header names it.

    Attributes
    ----------
    path : str
    format : str
        In QEMU's words; empty where the header does not say.
    """

    path: str
    format: str


class Header(NamedTuple):
    """What is read of a header."""

    version: int
    size_bytes: int
    cluster_bits: int
    directory_offset: int
    directory_entries: int
    extended: bool
    zstd: bool
    backing: Backing | None

    @property
    def entry_bytes(self) -> int:
        """Of a second-level entry."""
        return 16 if self.extended else 8

    @property
    def table_entries(self) -> int:
        """In a second-level table, which is a cluster."""
        return (1 << self.cluster_bits) // self.entry_bytes


def read_header(container: Container) -> Header:
    """The header, checked; ImageError, UnsupportedFormatError."""
    magic, version, name_offset, name_bytes, cluster_bits, size, crypt, entries, directory, *_ = _HEADER.unpack(
        container.read(0, _HEADER.size, "the header")
    )
    if magic != MAGIC:
        raise container.error(0, "there is no QFI header")
    if version not in (2, 3):
        raise _unsupported(container, f"is qcow version {version}, and only versions 2 and 3 are read")
    if not 9 <= cluster_bits <= 21:
        raise container.error(20, f"stands a cluster size of 2 to the power of {cluster_bits}")
    if crypt:
        raise _unsupported(container, "is encrypted")
    if size > (1 << 63) - (1 << 21):
        raise container.error(24, f"stands a disk of {size} bytes")
    features, length, compression = 0, _HEADER.size, 0
    if version == 3:
        features, length, compression = _read_features(container, cluster_bits)
    extended = bool(features & _EXTENDED_L2)
    if extended and cluster_bits < 14:
        raise container.error(20, f"extended entries need clusters of 16 KiB, not of {1 << cluster_bits} bytes")
    backing = None
    if name_offset:
        backing = _read_backing(container, name_offset, name_bytes, length, 1 << cluster_bits)
    header = Header(version, size, cluster_bits, directory, entries, extended, compression == 1, backing)
    needed = -(-size // (header.table_entries << cluster_bits))
    if entries < needed or needed * 8 > TABLE_LIMIT_BYTES:
        raise container.error(36, f"a directory of {entries} entries does not fit a disk of {size} bytes")
    if directory % (1 << cluster_bits):
        raise container.error(40, f"the directory at {directory} does not begin with a cluster")
    return header._replace(directory_entries=needed)


def _read_features(container: Container, cluster_bits: int) -> tuple[int, int, int]:
    """(incompatible features, header length, compression type) of version 3."""
    features, _, _, order, length = container.fields(_FEATURES, _HEADER.size, "the header")
    if features & ~_KNOWN_FEATURES:
        raise _unsupported(container, f"needs the features {features & ~_KNOWN_FEATURES:#x}, which are unknown")
    if features & _CORRUPT:
        raise _unsupported(container, "is marked corrupt; let `qemu-img check -r all` repair it")
    if features & _EXTERNAL_DATA:
        raise _unsupported(container, "keeps its data in another file; `qemu-img convert` makes one file of both")
    if order > 6:
        raise container.error(96, f"stands a width of counts of 2 to the power of {order}")
    if length < _HEADER.size + _FEATURES.size or length % 8 or length > 1 << cluster_bits:
        raise container.error(100, f"stands a header of {length} bytes")
    compression = container.read(104, 1, "the header")[0] if length > 104 else 0
    if compression > 1:
        raise _unsupported(container, f"has the compression type {compression}, which is unknown")
    if bool(compression) != bool(features & INCOMPATIBLE_COMPRESSION):
        raise container.error(
            104, f"compression type {compression} and the features {features:#x} contradict each other"
        )
    return features, length, compression


def _read_backing(container: Container, offset: int, length: int, at: int, cluster_bytes: int) -> Backing:
    if not 0 < length <= _BACKING_NAME_LIMIT or offset + length > cluster_bytes:
        raise container.error(8, f"stands a backing file's name of {length} bytes at {offset}")
    name = container.read(offset, length, "the backing file's name")
    if b"\0" in name:
        raise container.error(offset, "the backing file's name has a zero byte in it")
    return Backing(name.decode("utf-8", "surrogateescape"), _read_backing_format(container, at, offset, cluster_bytes))


def _read_backing_format(container: Container, at: int, end: int, cluster_bytes: int) -> str:
    """Of the header's extensions, which stand between the header and the name."""
    while at + 8 <= min(end, cluster_bytes):
        kind, length = struct.unpack(">II", container.read(at, 8, "a header extension"))
        if kind == _EXTENSION_END:
            break
        if length > cluster_bytes - at - 8:
            raise container.error(at, f"a header extension of {length} bytes reaches behind the first cluster")
        if kind == _EXTENSION_BACKING_FORMAT:
            return container.read(at + 8, length, "the backing file's format").decode("ascii", "replace")
        at += 8 + -(-length // 8) * 8
    return ""


def _unsupported(container: Container, what: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(f"{container.name} {what}")


class Qcow2Image(MappedImage):
    """An open qcow2 image.

    Parameters
    ----------
    container : Container
    header : Header
        Of that file.
    below : Source, optional
        The backing file.
    """

    def __init__(self, container: Container, header: Header, below: Source | None = None) -> None:
        self._header = header
        self._cluster_bytes = 1 << header.cluster_bits
        self._entries = min(header.table_entries, _PAGE_ENTRIES)
        self._pages_per_table = header.table_entries // self._entries
        self._parts = _SUBCLUSTERS if header.extended else 1
        unit_bytes = self._cluster_bytes // self._parts
        super().__init__(container, header.size_bytes, unit_bytes, self._entries * self._parts, below, self._parts)
        self._directory = self._read_directory()
        # Of a packed entry: how many bits the offset has.
        self._offset_bits = 62 - (header.cluster_bits - 8)
        self._unpack: Callable[[bytes, int], bytes] = packing.zstd_unpack if header.zstd else _inflate

    def _read_directory(self) -> npt.NDArray[np.int64]:
        header, container = self._header, self.container
        found = container.array(header.directory_offset, header.directory_entries, ">u8", "the directory")
        places = found & _OFFSET
        bad = (found & ~(_OFFSET | -COPIED) != 0) | (places % self._cluster_bytes != 0)
        bad |= places > container.size_bytes - self._cluster_bytes
        if bad.any():
            slot = int(bad.argmax())
            raise container.error(
                header.directory_offset + slot * 8, f"entry {slot} of the directory is {int(found[slot]):#x}"
            )
        used = np.sort(places[places != 0])
        if len(used) > 1 and (used[1:] == used[:-1]).any():
            # Work would not be bounded by the size of the file.
            raise container.error(header.directory_offset, "two entries of the directory name one table")
        return places

    def present(self) -> Iterable[int]:
        """Pages of the tables that are there."""
        for number in np.flatnonzero(self._directory).tolist():
            first = number * self._pages_per_table
            yield from range(first, min(first + self._pages_per_table, self._page_count()))

    def load(self, page: int) -> Units | None:
        """See `MappedImage.load`."""
        number, part = divmod(page, self._pages_per_table)
        table = int(self._directory[number])
        if table == 0:
            return None
        words = self._entries * self._header.entry_bytes // 8
        at = table + part * words * 8
        found = self.container.array(at, words, ">u8", "a table of clusters")
        # Behind the end of the disk nothing is read, and nothing need be right.
        clusters = -(-self._size_bytes // self._cluster_bytes) - page * self._entries
        if self._header.extended:
            entries, bitmaps = found[: 2 * clusters : 2], found[1 : 2 * clusters : 2]
            return self._extended(at, entries, bitmaps)
        return self._plain(at, found[:clusters])

    def _plain(self, at: int, entries: npt.NDArray[np.int64]) -> Units:
        packed = entries & COMPRESSED != 0
        zero = (entries & 1 != 0) & ~packed
        places = np.where(packed, entries & (COMPRESSED - 1), entries & _OFFSET)
        reserved = 0x3F00_0000_0000_01FE | (1 if self._header.version == 2 else 0)
        bad = ~packed & ((entries & reserved != 0) | (places % self._cluster_bytes != 0))
        data = ~packed & ~zero & (places != 0)
        self._check(at, entries, bad | self._outside(packed, data, places))
        kinds = np.full(len(entries), BELOW, dtype=np.uint8)
        kinds[data], kinds[zero], kinds[packed] = DATA, ZERO, PACKED
        return Units(kinds, places)

    def _extended(self, at: int, entries: npt.NDArray[np.int64], bitmaps: npt.NDArray[np.int64]) -> Units:
        packed = entries & COMPRESSED != 0
        places = np.where(packed, entries & (COMPRESSED - 1), entries & _OFFSET)
        low, high = bitmaps & 0xFFFF_FFFF, (bitmaps >> 32) & 0xFFFF_FFFF
        has_data = ~packed & (low != 0)
        bad = ~packed & ((entries & 0x3F00_0000_0000_01FF != 0) | (places % self._cluster_bytes != 0))
        bad |= ~packed & ((low & high != 0) | ((places == 0) & (low != 0)))
        self._check(at, entries, bad | self._outside(packed, has_data, places), step=16)
        numbers = np.arange(_SUBCLUSTERS, dtype=np.int64)
        kinds = np.full((len(entries), _SUBCLUSTERS), BELOW, dtype=np.uint8)
        kinds[(high[:, None] >> numbers) & 1 != 0] = ZERO
        kinds[(low[:, None] >> numbers) & 1 != 0] = DATA
        kinds[packed] = PACKED
        spread = places[:, None] + np.where(packed[:, None], 0, numbers * self._unit_bytes)
        return Units(kinds.reshape(-1), spread.reshape(-1))

    def _outside(
        self, packed: npt.NDArray[np.bool], data: npt.NDArray[np.bool], places: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool]:
        """Which clusters begin behind the end of the file."""
        begins = np.where(packed, places & ((1 << self._offset_bits) - 1), places)
        outside: npt.NDArray[np.bool] = (packed | data) & (begins >= self.container.size_bytes)
        return outside

    def _check(self, at: int, entries: npt.NDArray[np.int64], bad: npt.NDArray[np.bool], step: int = 8) -> None:
        if bad.any():
            slot = int(bad.argmax())
            raise self.container.error(
                at + slot * step,
                f"a cluster's entry is {int(entries[slot]) & (1 << 64) - 1:#x}, which no cluster in "
                f"{self.container.size_bytes} bytes has",
            )

    def unpack(self, place: int, unit: int) -> bytes:
        """See `MappedImage.unpack`."""
        sectors = (place >> self._offset_bits) + 1
        offset = place & ((1 << self._offset_bits) - 1)
        # The last sector may be cut by the end of the file.
        length = min(sectors * _SECTOR_BYTES - offset % _SECTOR_BYTES, self.container.size_bytes - offset)
        packed = self.container.read(offset, length, "a packed cluster")
        try:
            plain = self._unpack(packed, self._cluster_bytes)
        except packing.PackingError as error:
            raise self.container.error(offset, f"a packed cluster does not unpack: {error}") from error
        if len(plain) < self._cluster_bytes:
            raise self.container.error(offset, f"a packed cluster has {len(plain)} bytes, not {self._cluster_bytes}")
        return plain


def _inflate(packed: bytes, size_bytes: int) -> bytes:
    return packing.inflate(packed, size_bytes, packing.QCOW2_WINDOW)
