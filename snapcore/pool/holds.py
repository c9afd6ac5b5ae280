"""What a pool wants of regions beside bytes: pins on the snapshots that its lazy disks need, and who is to be hydrated.

A file `regions` in the pool's folder (docs/FORMAT.md, "What a pool wants of regions") is replaced whole at each change.

| order | a crash between leaves |
| --- | --- |
| noted here, durably; pinned; the disk's event | a pin that is noted and not needed: the next opening takes it back |
| no version refers to the image; a checkpoint; unpinned; the note goes | the same |

So a pin is there while anything that a recovery could bring back needs it, and every pin is noted while it may
be there.
A file that is lost or damaged costs pins that nobody takes back; those that are needed are made again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator

import msgspec

from snapcore.errors import Error, StoreError, from_os_error
from snapcore.persist import Medium, replace
from snapcore.pool.catalog import Region
from snapcore.pool.regions import Regions

NAME = "regions"
VERSION = 1
_LIMIT_BYTES = 64 << 20
# A pool that is closed waits so long for regions to let go of; what is left is done after the next opening.
_PATIENCE_S = 5.0
_log = logging.getLogger("snapcore.pool")

Key = tuple[str, str]


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """The rest of a snapshot shall be fetched in the background: so many bytes a second, or (0) as fast as it goes."""

    repository: str
    snapshot: str
    rate_bytes_s: float = 0.0


class _Content(msgspec.Struct, kw_only=True):
    version: int = VERSION
    pinned: list[Region] = msgspec.field(default_factory=list)
    hydrate: list[Wish] = msgspec.field(default_factory=list)


def key_of(region: Region) -> Key:
    """What tells snapshots apart, wherever their repository is."""
    return region.repository, region.snapshot


class Holds:
    """The pins and wishes of a pool that is open for writing. Safe from many threads.

    Parameters
    ----------
    folder, pool_id : str
    medium : Medium
    regions : Regions or None
        Without, notes are kept as they are.
    needed : callable
        The regions that images of the pool have, those included which only the last checkpoint knows. It must wait
        for no lock.
    """

    def __init__(
        self,
        folder: str,
        pool_id: str,
        medium: Medium,
        regions: Regions | None,
        needed: Callable[[], list[Region]],
    ) -> None:
        self._path = os.path.join(folder, NAME)
        self._pool_id = pool_id
        self._who = f"the pool {folder} on {os.uname().nodename}".encode("unicode_escape").decode()[:1000]
        self._medium = medium
        self._regions = regions
        self._needed = needed
        # One at a time asks a region for the same snapshot; others do not wait for that.
        self._asking: defaultdict[Key, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()
        self._closed = False
        self._again = False
        self._worker: threading.Thread | None = None
        self._content = self._load()
        self.settle()

    @contextlib.contextmanager
    def pinned(self, region: Region) -> Iterator[None]:
        """While an image over a region is made: the snapshot is pinned, and stays so if the image is there then."""
        assert self._regions is not None
        try:
            with self._asking_for(region):
                self._note(region)
                self._regions.pin(region, self._pool_id, self._who)
                yield
        finally:
            # Where nothing came of it, it is not needed.
            self.settle()

    def settle(self) -> None:
        """Take pins back that nothing needs, and make those that are missing, in the background."""
        with self._lock:
            if self._regions is None or self._closed or not self._to_do():
                return
            self._again = True
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="snapcore-pins", daemon=True)
                self._worker.start()

    def wait(self) -> None:
        """Wait a little for what is to be done."""
        worker = self._worker
        if worker is not None:
            worker.join(_PATIENCE_S)

    def close(self) -> None:
        """From now on write nothing."""
        with self._lock:
            self._closed = True

    def wish(self, region: Region, rate_bytes_s: float | None) -> None:
        """Remember how the rest of a snapshot shall be fetched; None: not at all."""
        with self._lock:
            key = key_of(region)
            others = [wish for wish in self._content.hydrate if (wish.repository, wish.snapshot) != key]
            if rate_bytes_s is not None:
                others.append(Wish(repository=key[0], snapshot=key[1], rate_bytes_s=rate_bytes_s))
            self._write(msgspec.structs.replace(self._content, hydrate=others))

    def wishes(self) -> dict[Key, float]:
        """Rates by snapshot."""
        with self._lock:
            return {(wish.repository, wish.snapshot): wish.rate_bytes_s for wish in self._content.hydrate}

    @contextlib.contextmanager
    def _asking_for(self, region: Region) -> Iterator[None]:
        with self._lock:
            asking = self._asking[key_of(region)]
        with asking:
            yield

    def _to_do(self) -> list[Region]:
        """Regions whose pins are not as they should be."""
        needed = {key_of(region): region for region in self._needed()}
        noted = {key_of(region): region for region in self._content.pinned}
        return [(needed | noted)[key] for key in sorted({*needed} ^ {*noted})]

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._again or self._closed:
                    self._worker = None
                    return
                self._again = False
                todo = self._to_do()
            for region in todo:
                try:
                    self._settle_one(region)
                except (Error, OSError) as error:
                    _log.warning("pins on snapshot %s in %s: %s", region.snapshot, region.url, error)

    def _settle_one(self, region: Region) -> None:
        assert self._regions is not None
        key = key_of(region)
        with self._asking_for(region):
            if any(key_of(other) == key for other in self._needed()):
                self._note(region)
                self._regions.pin(region, self._pool_id, self._who)
                return
            self._regions.unpin(region, self._pool_id)
            with self._lock:
                pinned = [other for other in self._content.pinned if key_of(other) != key]
                hydrate = [wish for wish in self._content.hydrate if (wish.repository, wish.snapshot) != key]
                if not self._closed:
                    self._write(msgspec.structs.replace(self._content, pinned=pinned, hydrate=hydrate))

    def _note(self, region: Region) -> None:
        with self._lock:
            if self._closed:
                raise StoreError("the pool was closed")
            if all(key_of(other) != key_of(region) for other in self._content.pinned):
                self._write(msgspec.structs.replace(self._content, pinned=[*self._content.pinned, region]))

    def _load(self) -> _Content:
        try:
            with open(self._path, "rb") as file:
                found = msgspec.json.decode(file.read(_LIMIT_BYTES), type=_Content)
        except FileNotFoundError:
            return _Content()
        except (OSError, msgspec.DecodeError) as error:
            _log.warning("%s cannot be read (%s): pins that nobody needs may be left", self._path, error)
            return _Content()
        return found if found.version == VERSION else _Content()

    def _write(self, content: _Content) -> None:
        try:
            replace(self._medium, self._path, msgspec.json.encode(content))
        except OSError as error:
            raise from_os_error(error, f"writing {self._path}") from error
        self._content = content
