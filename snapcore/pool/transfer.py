"""Images into a pool, and disks and snapshots out of it: spans of megabytes at a time, on all cores, holes left out."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from snapcore import extents, scan
from snapcore.core import BLOCK_BYTES
from snapcore.errors import Error, RefusedError, UsageError
from snapcore.parallel import SPAN_BYTES, executor_or_own, in_order
from snapcore.progress import Meter, ProgressCallback
from snapcore.source.image import open_image
from snapcore.source.interface import Source
from snapcore.source.target import RawTarget, open_target

PARTIAL = ".snapcore-partial"
_NAME_LETTERS = 128


class Writable(Protocol):
    """A disk that is filled."""

    @property
    def name(self) -> str:
        """What it is called."""

    def pwrite(self, data: memoryview, offset_bytes: int) -> int:
        """Write at any offset."""

    def flush(self) -> None:
        """Make it durable."""

    def attached(self, holder: str) -> contextlib.AbstractContextManager[None]:
        """Say who uses it."""


Made = TypeVar("Made", bound=Writable)


class Place(Protocol[Made]):
    """A pool that disks are made in."""

    def disks(self) -> list[Made]:
        """All of them."""

    def create_disk(self, name: str, size_bytes: int | None = None) -> Made:
        """Make one."""

    def rename_disk(self, disk: Made, name: str) -> None:
        """Give one another name."""

    def delete_disk(self, disk: Made) -> None:
        """Delete one."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export did.

    Attributes
    ----------
    written_bytes : int
        Bytes written to the target, or made holes in it.
    duration_s : float
    """

    written_bytes: int
    duration_s: float


def import_image(
    pool: Place[Made],
    name: str,
    image: str | os.PathLike[str] | Source,
    *,
    size_bytes: int | None = None,
    allow_changing: bool = False,
    progress: ProgressCallback | None = None,
    executor: Executor | None = None,
) -> Made:
    """Copy an image into a new disk; see `Pool.import_image`."""
    if isinstance(image, (str, os.PathLike)):
        with open_image(image, allow_changing=allow_changing) as source:
            return _import(pool, name, source, size_bytes, progress, executor)
    return _import(pool, name, image, size_bytes, progress, executor)


def _import(
    pool: Place[Made],
    name: str,
    source: Source,
    size_bytes: int | None,
    progress: ProgressCallback | None,
    executor: Executor | None,
) -> Made:
    size_bytes = source.size_bytes if size_bytes is None else size_bytes
    if size_bytes < source.size_bytes:
        raise UsageError(f"disk {name!r}: {size_bytes} bytes are less than the {source.size_bytes} of {source.name}")
    unfinished = name[: _NAME_LETTERS - len(PARTIAL)] + PARTIAL
    for left in pool.disks():
        if left.name == unfinished:
            # Of an import that a crash ended; one that is under way is attached to its disk, and is told.
            pool.delete_disk(left)
    disk = pool.create_disk(unfinished, size_bytes)
    try:
        with disk.attached(f"the import of {source.name}"):
            _fill(disk, source, progress, executor)
            source.check_unchanged()
            disk.flush()
            pool.rename_disk(disk, name)
    except BaseException:
        # What went wrong first counts. A disk that cannot be deleted now is by the next import of this name.
        with contextlib.suppress(Error):
            pool.delete_disk(disk)
        raise
    return disk


def _fill(disk: Writable, source: Source, progress: ProgressCallback | None, executor: Executor | None) -> None:
    space = _Space()

    def copy(part: tuple[int, int]) -> tuple[int, int]:
        offset, length = part
        data = space.of_thread("new", length)
        source.read_into(data, offset)
        for start, count in scan.nonzero_extents(data, BLOCK_BYTES).tolist():
            disk.pwrite(data[start : start + count], offset + start)
        return part

    _each_span(copy, source.data_extents(), Meter(progress, "import", source.size_bytes), source.size_bytes, executor)


def export(
    version: Source,
    target: str | os.PathLike[str],
    *,
    folder: str,
    images: Iterable[str] = (),
    in_place: bool = False,
    progress: ProgressCallback | None = None,
    executor: Executor | None = None,
) -> Exported:
    """Copy a version into a file or device; see `Readable.export`.

    Parameters
    ----------
    folder : str
        The pool's, in which nothing may be overwritten.
    images : iterable of str
        That disks of the pool read from, and that may not be overwritten either.
    """
    started = time.monotonic()
    path = os.fspath(target)
    for image in images:
        with contextlib.suppress(OSError):
            if os.path.samefile(path, image):
                raise RefusedError(f"{path} is an image that disks of the pool {folder} read from; take another target")
    with open_target(path, version.size_bytes, in_place=in_place, forbidden_folder=folder) as opened:
        _write_all(version, opened, progress, executor)
    return Exported(opened.written_bytes, time.monotonic() - started)


def _write_all(
    version: Source, target: RawTarget, progress: ProgressCallback | None, executor: Executor | None
) -> None:
    space = _Space()
    # Read from the target first: a fresh one has no data, and what it gets must not be looked at again.
    worth = extents.union(target.data_extents(), version.data_extents())

    def write(part: tuple[int, int]) -> tuple[int, int]:
        offset, length = part
        new = space.of_thread("new", length)
        version.read_into(new, offset)
        if target.fresh:
            target.write_data(new, offset)
        else:
            old = space.of_thread("old", length)
            target.read_into(old, offset)
            target.write_change(old, new, offset)
        return part

    _each_span(write, worth, Meter(progress, "export", version.size_bytes), version.size_bytes, executor)


def _each_span(
    work: Callable[[tuple[int, int]], tuple[int, int]],
    rows: extents.Extents,
    meter: Meter,
    size_bytes: int,
    executor: Executor | None,
) -> None:
    """Work on all that lies in `rows`, in whole blocks up to the end of the disk; what lies between counts as done."""
    rows = extents.aligned(extents.from_pairs(rows), BLOCK_BYTES, size_bytes)
    done = 0
    with executor_or_own(executor) as hands:
        for offset, length in in_order(hands, work, extents.spans(rows, SPAN_BYTES)):
            meter.advance(offset + length - done)
            done = offset + length
    meter.advance(size_bytes - done)


class _Space:
    """Memory of each thread, used again for each span."""

    def __init__(self) -> None:
        self._local = threading.local()

    def of_thread(self, name: str, size_bytes: int) -> memoryview:
        """So many bytes; what is in them is of no meaning."""
        space: memoryview | None = getattr(self._local, name, None)
        if space is None:
            # Begins on a page: then long writes need no copy on their way past the page cache.
            space = memoryview(mmap.mmap(-1, SPAN_BYTES))
            setattr(self._local, name, space)
        return space[:size_bytes]
