"""A disk whose units lie anywhere in a file: what all image formats have in common.

A format cuts its disk into units of one size and turns a page of its tables into `Units`: of what kind each is, and
where it lies. It checks all places of a page when it loads it, so what is read later lies within the file. This module
looks units up, joins neighbours that continue each other into one read, and unpacks packed ones on the thread that
reads. It keeps pages in memory up to a bound.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from snapcore import extents
from snapcore.errors import SourceChangedError
from snapcore.extents import Extents
from snapcore.source.container import Container
from snapcore.source.interface import Source

ZERO = 0
DATA = 1
PACKED = 2
BELOW = 3

_PAGES_BYTES = 32 << 20
# More rows than that are joined over ever larger gaps: "data may be there" stays true, and memory bounded.
_ROWS_LIMIT = 1 << 20
_ZEROS = memoryview(bytes(1 << 20))


class Units(NamedTuple):
    """Units that follow each other.

    Attributes
    ----------
    kinds : uint8 array
        ZERO, DATA (bytes of the file), PACKED (the format unpacks them) or BELOW (what the file below has there).
    places : int64 array
        Offset in the file of DATA; what the format needs to find PACKED again.
    """

    kinds: npt.NDArray[np.uint8]
    places: npt.NDArray[np.int64]


class MappedImage(ABC):
    """An open image of some format as a `Source`.

    Parameters
    ----------
    container : Container
    size_bytes : int
        Of the disk.
    unit_bytes : int
    units_per_page : int
        Of the tables that `load` turns into units.
    units_per_pack : int
        That are packed together.
    below : Source, optional
        What BELOW defers to; zeros without one, and behind its end.
    """

    def __init__(
        self,
        container: Container,
        size_bytes: int,
        unit_bytes: int,
        units_per_page: int,
        below: Source | None = None,
        units_per_pack: int = 1,
    ) -> None:
        self.container = container
        self._size_bytes = size_bytes
        self._unit_bytes = unit_bytes
        self._units_per_page = units_per_page
        self._units_per_pack = units_per_pack
        self._below = below
        self._pages: OrderedDict[int, Units | None] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    @abstractmethod
    def load(self, page: int) -> Units | None:
        """Units of a page of the tables, all of them checked; None where there is no page: all BELOW.

        Raises
        ------
        ImageError
            A place lies outside the file, or an entry makes no sense.
        """

    def present(self) -> Iterable[int]:
        """Pages of which `load` may give some, ascending."""
        return range(self._page_count())

    def unpack(self, place: int, unit: int) -> bytes:
        """The bytes of units that are packed together, from `unit` on: as many as that part of the disk has."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Path of the image."""
        return self.container.name

    @property
    def size_bytes(self) -> int:
        """Length of the disk."""
        return self._size_bytes

    def check_unchanged(self) -> None:
        """SourceChangedError when this file or one below it is not what it was; see `Source.check_unchanged`."""
        self.container.file.check_unchanged()
        if self._below is not None:
            self._below.check_unchanged()

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        """Fill `target` from the disk; see `Source.read_into`."""
        if offset_bytes < 0 or offset_bytes > self._size_bytes - len(target):
            raise SourceChangedError(
                f"the disk in {self.name} has {self._size_bytes} bytes; {len(target)} at {offset_bytes} are not in it"
            )
        page_bytes = self._unit_bytes * self._units_per_page
        done = 0
        while done < len(target):
            page, skip = divmod(offset_bytes + done, page_bytes)
            count = min(page_bytes - skip, len(target) - done)
            part = target[done : done + count]
            units = self._page(page)
            if units is None:
                self._read_below(part, offset_bytes + done)
            else:
                self._read_units(part, units, page * self._units_per_page, skip)
            done += count

    def _read_units(self, target: memoryview, units: Units, base: int, skip: int) -> None:
        """Fill `target` from `skip` bytes into a page whose first unit is `base`."""
        size = self._unit_bytes
        first, last = skip // size, (skip + len(target) - 1) // size
        kinds, places = units.kinds[first : last + 1], units.places[first : last + 1]
        packs = (first + np.arange(len(kinds))) // self._units_per_pack
        for kind, place, start, count in _runs(kinds, places, packs, size):
            begin = max((first + start) * size, skip)
            stop = min((first + start + count) * size, skip + len(target))
            part = target[begin - skip : stop - skip]
            within = begin - (first + start) * size
            if kind == DATA:
                self.container.read_up_to_end(part, place + within)
            elif kind == PACKED:
                unit = first + start
                skipped = unit % self._units_per_pack
                plain = self.unpack(place, base + unit - skipped)
                part[:] = plain[skipped * size + within : skipped * size + within + len(part)]
            elif kind == BELOW:
                self._read_below(part, base * size + begin)
            else:
                _clear(part)

    def _read_below(self, target: memoryview, offset_bytes: int) -> None:
        there = 0
        if self._below is not None:
            there = max(0, min(len(target), self._below.size_bytes - offset_bytes))
            if there:
                self._below.read_into(target[:there], offset_bytes)
        _clear(target[there:])

    def data_extents(self) -> Extents:
        """Where data may be; see `Source.data_extents`. Holes of the file are none."""
        filled = self.container.data_extents()
        rows = _Rows(self._unit_bytes)
        for page in self.present():
            units = self._page(page)
            if units is not None:
                rows.add(page * self._units_per_page, self._worth(units, filled))
        own = extents.clipped(rows.extents(), 0, self._size_bytes)
        if self._below is None:
            return own
        below = extents.clipped(extents.from_pairs(self._below.data_extents()), 0, self._size_bytes)
        return extents.union(own, below)

    def _worth(self, units: Units, filled: Extents) -> npt.NDArray[np.bool]:
        """Which units may have other bytes than zeros of their own."""
        if len(filled) == 0:
            return np.zeros(len(units.kinds), dtype=np.bool)
        # The first extent of the file that ends behind the beginning of the unit begins before its end.
        found = np.searchsorted(filled[:, 0] + filled[:, 1], units.places, side="right")
        begins = filled[np.minimum(found, len(filled) - 1), 0]
        inside = (found < len(filled)) & (begins < units.places + self._unit_bytes)
        worth: npt.NDArray[np.bool] = (units.kinds == PACKED) | ((units.kinds == DATA) & inside)
        return worth

    def _page_count(self) -> int:
        return -(-self._size_bytes // (self._unit_bytes * self._units_per_page))

    def _page(self, page: int) -> Units | None:
        with self._lock:
            if page in self._pages:
                self._pages.move_to_end(page)
                return self._pages[page]
        loaded = self.load(page)
        with self._lock:
            if page not in self._pages:
                self._pages[page] = loaded
                self._kept_bytes += _weight(loaded)
            while self._kept_bytes > _PAGES_BYTES and len(self._pages) > 1:
                _, gone = self._pages.popitem(last=False)
                self._kept_bytes -= _weight(gone)
        return loaded


class _Rows:
    """Extents of units that are added in ascending order, a bounded number of them."""

    def __init__(self, unit_bytes: int) -> None:
        self._unit_bytes = unit_bytes
        self._parts: list[Extents] = []
        self._count = 0
        self._gap_bytes = unit_bytes

    def add(self, first: int, worth: npt.NDArray[np.bool]) -> None:
        """Of the units from `first` on, those that are worth it."""
        edges = np.flatnonzero(np.diff(worth.astype(np.int8), prepend=0, append=0))
        if len(edges) == 0:
            return
        starts, stops = edges[::2], edges[1::2]
        rows = np.stack(((first + starts) * self._unit_bytes, (stops - starts) * self._unit_bytes), axis=1)
        self._parts.append(rows.astype(np.int64))
        self._count += len(rows)
        while self._count > _ROWS_LIMIT:
            self._gap_bytes *= 4
            self._parts = [_joined(self.extents(), self._gap_bytes)]
            self._count = len(self._parts[0])

    def extents(self) -> Extents:
        """All of them, merged."""
        return extents.merged(np.concatenate(self._parts)) if self._parts else extents.empty()


def _joined(rows: Extents, gap_bytes: int) -> Extents:
    """Sorted extents, with those in one that are no more than a gap apart."""
    wide = rows.copy()
    wide[:, 1] += gap_bytes
    joined = extents.merged(wide)
    joined[:, 1] -= gap_bytes
    return joined


def _runs(
    kinds: npt.NDArray[np.uint8], places: npt.NDArray[np.int64], packs: npt.NDArray[np.int64], unit_bytes: int
) -> Iterator[tuple[int, int, int, int]]:
    """(kind, place, first, count) of units that can be read in one: of one kind, DATA that continues, one pack."""
    goes_on = kinds[1:] == kinds[:-1]
    goes_on &= (kinds[1:] != DATA) | (places[1:] == places[:-1] + unit_bytes)
    goes_on &= (kinds[1:] != PACKED) | (packs[1:] == packs[:-1])
    starts = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    counts = np.diff(starts, append=len(kinds))
    yield from zip(kinds[starts].tolist(), places[starts].tolist(), starts.tolist(), counts.tolist(), strict=True)


def _clear(target: memoryview) -> None:
    for start in range(0, len(target), len(_ZEROS)):
        part = target[start : start + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]


def _weight(units: Units | None) -> int:
    # A page that is not there costs its entry in the dict.
    return 100 if units is None else 100 + units.kinds.nbytes + units.places.nbytes
