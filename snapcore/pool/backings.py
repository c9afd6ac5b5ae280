"""The images that absent blocks of versions are read from: users' raw images, and those of the pool's own that fill up.

An image of the pool's own lies in the pool's folder: its path begins there. Others have absolute ones.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

from snapcore.pool.catalog import Backing
from snapcore.pool.files import Files
from snapcore.pool.hydration import Hydrator
from snapcore.pool.lazy import FOLDER, LazyImage
from snapcore.pool.regions import Regions
from snapcore.presence import Presence
from snapcore.source.interface import Source

NO_BACKING = -1
LOST_BACKING = -2
_log = logging.getLogger("snapcore.pool")


# A descriptor, an image that fills up, and the record of either.
Leaving = tuple[int, LazyImage | None, Backing]


class Opened(NamedTuple):
    """What the kernel is told of an image, in the order in which it is asked for."""

    descriptor: int = NO_BACKING
    size_bytes: int = 0
    mtime_ns: int = 0
    presence: Presence | None = None
    fetch: Callable[[int, int], int] | None = None


class Backings:
    """The open images of a pool.

    Attributes
    ----------
    regions : Regions or None
    """

    def __init__(self, files: Files, regions: Regions | None, decoupled: frozenset[int] = frozenset()) -> None:
        self.regions = regions
        # Those of which the log says, but the catalog does not yet, that they need no region.
        self._decoupled = decoupled
        self._files = files
        self._descriptors: dict[int, int] = {}
        self._lazy: dict[int, LazyImage] = {}
        self._hydrators: dict[int, Hydrator] = {}
        # Closed when nobody can be reading any more, and removed when no log refers to them.
        self._leaving: list[Leaving] = []
        self._taken: list[Leaving] = []

    def open(self, record: Backing) -> Opened:
        """The image of a record; opened when it is needed first."""
        if record.region is not None and record.id not in self._decoupled:
            image = self._lazy.get(record.id)
            if image is None:
                image = self._add(LazyImage(self._files, record, self.regions))
            descriptor = image.descriptor if image.descriptor >= 0 else LOST_BACKING
            return Opened(descriptor, record.size_bytes, 0, image.presence, image.fetch)
        if self._descriptors.get(record.id, LOST_BACKING) == LOST_BACKING:
            self._descriptors[record.id] = self._descriptor(record.path)
        opened = Opened(self._descriptors[record.id], record.size_bytes, record.mtime_ns)
        if not record.is_own:
            return opened
        # Its time was never noted, and all of it is here.
        whole = Presence(record.size_bytes, record.size_bytes)
        whole.add(0, 1)
        return opened._replace(presence=whole)

    def _descriptor(self, path: str) -> int:
        try:
            return os.open(self._files.path(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError):
            # ValueError: no file has such a name.
            return LOST_BACKING

    def make(self, record: Backing, source: Source) -> None:
        """Make the files of a new image, durably."""
        before = self._lazy.pop(record.id, None)
        if before is not None:
            before.close()
        self._add(LazyImage(self._files, record, self.regions)).use(source)

    def _add(self, image: LazyImage) -> LazyImage:
        self._lazy[image.record.id] = image
        self._hydrators[image.record.id] = Hydrator(image)
        return image

    def hydrator(self, number: int) -> Hydrator | None:
        """What fetches the rest of the image of that number if it fills up."""
        return self._hydrators.get(number)

    def lazy(self, number: int) -> LazyImage | None:
        """The image of that number if it fills up."""
        return self._lazy.get(number)

    def lazy_bytes(self) -> int:
        """What the pool's own images take on the host."""
        total = 0
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._files.path(FOLDER)):
                total += entry.stat().st_blocks * 512
        return total

    def forget(self, record: Backing) -> None:
        """No version refers to an image any more."""
        image, hydrator = self._lazy.pop(record.id, None), self._hydrators.pop(record.id, None)
        if image is not None:
            image.stop_soon()
        if hydrator is not None:
            hydrator.stop_soon()
        self._leaving.append((self._descriptors.pop(record.id, LOST_BACKING), image, record))

    def take_leaving(self) -> list[Leaving]:
        """What was forgotten up to now; to be handed to `release`, or to `keep_leaving` when that must wait."""
        leaving = self._taken = self._leaving
        self._leaving = []
        return leaving

    def keep_leaving(self, leaving: list[Leaving]) -> None:
        """A checkpoint failed: another time."""
        self._leaving += leaving
        self._taken = []

    def leaving(self) -> list[Backing]:
        """Records of images that were forgotten and that the last checkpoint knows. Takes no lock."""
        return [record for _, _, record in [*self._leaving, *self._taken]]

    def release(self, leaving: Iterable[Leaving]) -> None:
        """Close images that no reader looks at, and remove those of the pool's own, which no log refers to."""
        for descriptor, image, record in leaving:
            if image is not None:
                image.close()
            if descriptor >= 0:
                os.close(descriptor)
            if record.is_own:
                self._remove(paths_of(record))
        self._taken = []

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            # What cannot be removed now is unknown at the next opening.
            with contextlib.suppress(OSError):
                if os.path.lexists(self._files.path(name)):
                    self._files.medium.unlink(self._files.path(name))

    def remove_unknown(self, records: Iterable[Backing]) -> None:
        """Remove what a crash left of images that no version refers to."""
        known = {name for record in records if record.is_own for name in paths_of(record)}
        with contextlib.suppress(FileNotFoundError):
            names = {os.path.join(FOLDER, name) for name in os.listdir(self._files.path(FOLDER))}
            self._remove(sorted(names - known))

    def keep(self) -> None:
        """Save what came since the last time, where it is time to. What fails costs fetches after a crash."""
        for image in [*self._lazy.values()]:
            try:
                image.keep()
            except OSError as error:
                _log.warning("saving what is here of image %d: %s", image.record.id, error)

    def save(self) -> None:
        """Save all that is here."""
        for image in [*self._lazy.values()]:
            try:
                image.save()
            except OSError as error:
                _log.warning("saving what is here of image %d: %s", image.record.id, error)

    def stop(self) -> None:
        """Who waits for a region does so no longer."""
        for hydrator in [*self._hydrators.values()]:
            hydrator.stop_soon()
        for image in [*self._lazy.values()]:
            image.stop_soon()

    def close(self) -> None:
        """Close all; nobody reads any more."""
        for hydrator in self._hydrators.values():
            hydrator.stop()
        for descriptor, image, _ in self._leaving:
            if image is not None:
                image.close()
            if descriptor >= 0:
                os.close(descriptor)
        for image in self._lazy.values():
            image.close()
        for descriptor in self._descriptors.values():
            if descriptor >= 0:
                os.close(descriptor)
        self._leaving = []
        self._lazy.clear()
        self._hydrators.clear()
        self._descriptors.clear()


def path_of(number: int) -> str:
    """Of the file of an image of the pool's own, in its folder."""
    return f"{FOLDER}/{number}.data"


def paths_of(record: Backing) -> list[str]:
    """Of all files of one."""
    stem = record.path.removesuffix(".data")
    return [record.path, f"{stem}.present", f"{stem}.trace"]
