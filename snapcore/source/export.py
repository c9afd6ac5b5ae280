"""Any source into a file or a pipe, in any format that is written: one pass, no second copy of the disk.

Spans are read, looked through for zeros and packed on all cores; one thread hands them to the format's writer in order.
A fixed number of spans is in flight. A new file has its name only when all of it is durable; a failed export leaves
none.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from concurrent.futures import Executor
from dataclasses import dataclass
from queue import Empty, LifoQueue

from snapcore import extents, scan
from snapcore.errors import UsageError
from snapcore.parallel import SPAN_BYTES, executor_or_own, in_order
from snapcore.persist import Medium
from snapcore.progress import Meter, ProgressCallback
from snapcore.source import formats
from snapcore.source.interface import Source
from snapcore.source.qcow2_writer import Qcow2Writer
from snapcore.source.raw_writer import RawWriter
from snapcore.source.sink import FileSink, PipeSink, Sink
from snapcore.source.target import open_target
from snapcore.source.vhd_writer import VhdWriter
from snapcore.source.vmdk_writer import VmdkWriter
from snapcore.source.writer import Piece, Writer

_SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class Written:
    """What an export did.

    Attributes
    ----------
    format : str
    file_bytes : int
        Length of the file, or of what went through the pipe.
    duration_s : float
    """

    format: str
    file_bytes: int
    duration_s: float


def write_image(
    source: Source,
    target: str | os.PathLike[str],
    format: str = "raw",
    *,
    compression: str | None = None,
    forbidden_folder: str | None = None,
    progress: ProgressCallback | None = None,
    executor: Executor | None = None,
    medium: Medium | None = None,
) -> Written:
    """Write a disk into a new image file. Durable on return; zeros take no space.

    Parameters
    ----------
    source : Source
        An open image, a disk or snapshot of a pool, an opened snapshot of a repository.
    target : path
        The name must be free.
    format : str
        "raw", "qcow2" (version 3), "vhd" (fixed) or "vmdk" (stream-optimised).
    compression : str, optional
        "zlib" or "zstd", of qcow2. The others have no choice.
    forbidden_folder : str, optional
        A repository or pool on this host, into which nothing may be written.
    progress : callable, optional
        Gets a `Progress` for each span; raising there cancels, and nothing is left.
    executor : concurrent.futures.Executor, optional
        Threads to read and pack on; default: one a core.

    Raises
    ------
    ExistsError, UsageError, RefusedError, BusyError, OutOfSpaceError, StoreError
        And what reading the source raises.
    """
    started = time.monotonic()
    path = os.fspath(target)
    writer = _writer(format, source.size_bytes, compression, os.path.basename(path))
    medium = medium or Medium()
    with open_target(path, 0, in_place=False, forbidden_folder=forbidden_folder, medium=medium) as opened:
        sink = FileSink(opened)
        try:
            _copy(source, writer, sink, progress, executor)
        except BaseException:
            # A half of it is of no use to the next one. It is locked still, so it is ours.
            with contextlib.suppress(OSError):
                medium.unlink(opened.path)
            raise
    return Written(format, sink.position, time.monotonic() - started)


def send_image(
    source: Source,
    descriptor: int,
    format: str = "raw",
    *,
    name: str = "the pipe",
    progress: ProgressCallback | None = None,
    executor: Executor | None = None,
) -> Written:
    """Write a disk into a pipe, a socket or any descriptor, from front to back; see `write_image`.

    Parameters
    ----------
    descriptor : int
        Stays open.
    format : str
        "raw", "vhd" or "vmdk". A qcow2 image begins with the place of what is only known at its end.
    name : str
        Of the descriptor, for messages.
    """
    if format == "qcow2":
        raise UsageError(
            "qcow2 cannot be written to a pipe: its header is known last; write a file, or raw, vhd or vmdk"
        )
    started = time.monotonic()
    sink = PipeSink(descriptor, name)
    _copy(source, _writer(format, source.size_bytes, None, "disk.vmdk"), sink, progress, executor)
    return Written(format, sink.position, time.monotonic() - started)


def _writer(kind: str, size_bytes: int, compression: str | None, name: str) -> Writer:
    formats.check_written(kind)
    if compression is not None and kind != "qcow2":
        raise UsageError(
            f"the compression of {kind} cannot be chosen; {' and '.join(formats.COMPRESSIONS)} are for qcow2"
        )
    if kind == "raw":
        return RawWriter(size_bytes)
    size_bytes = -(-size_bytes // _SECTOR_BYTES) * _SECTOR_BYTES
    if kind == "vhd":
        return VhdWriter(size_bytes)
    if kind == "vmdk":
        return VmdkWriter(size_bytes, name)
    return Qcow2Writer(size_bytes, compression)


def _copy(
    source: Source,
    writer: Writer,
    sink: Sink,
    progress: ProgressCallback | None,
    executor: Executor | None,
) -> None:
    spaces = _Spaces()
    unit, pack = writer.unit_bytes, writer.pack

    def prepare(span: tuple[int, int]) -> tuple[memoryview, list[Piece], int]:
        offset, length = span
        space = spaces.take()
        # The last sector may go on behind the end of the source.
        whole = min(-(-length // _SECTOR_BYTES) * _SECTOR_BYTES, writer.size_bytes - offset)
        source.read_into(space[:length], offset)
        space[length:whole] = bytes(whole - length)
        pieces = []
        for start, count in scan.nonzero_extents(space[:whole], unit).tolist():
            data = space[start : start + count]
            packed = [] if pack is None else [pack(data[at : at + unit]) for at in range(0, count, unit)]
            pieces.append(Piece(offset + start, data, packed))
        return space, pieces, offset + length

    size_bytes = source.size_bytes
    rows = extents.aligned(extents.from_pairs(source.data_extents()), max(unit, _SECTOR_BYTES), size_bytes)
    meter = Meter(progress, "export", size_bytes)
    done = 0
    writer.begin(sink)
    with executor_or_own(executor) as hands:
        for space, pieces, stop in in_order(hands, prepare, extents.spans(rows, SPAN_BYTES)):
            for piece in pieces:
                writer.put(sink, piece)
            spaces.give(space)
            meter.advance(stop - done)
            done = stop
    meter.advance(size_bytes - done)
    source.check_unchanged()
    writer.end(sink)
    sink.finish()


class _Spaces:
    """Memory for spans, used again: as many as are in flight."""

    def __init__(self) -> None:
        self._free: LifoQueue[memoryview] = LifoQueue()

    def take(self) -> memoryview:
        """Memory for a span."""
        try:
            return self._free.get_nowait()
        except Empty:
            # Begins on a page: then long writes need no copy on their way past the page cache (persist.py).
            return memoryview(mmap.mmap(-1, SPAN_BYTES))

    def give(self, space: memoryview) -> None:
        """It is not needed any more."""
        self._free.put(space)
