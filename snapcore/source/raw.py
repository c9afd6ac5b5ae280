"""Raw image files and block devices as sources.

Bytes are read with preadv into memory of our own and never through a mapping: a file that is truncated under a
mapping kills the process, populated or not, and pread is the faster one besides (compare of two cached images, two
threads, 1-MiB windows, 2-core EPYC: 12.5 GB/s of each against 7.6 mapped and populated; bench/choices.py).

On a file system with reflinks the snapshot is read from a private clone, so the file may be written meanwhile.
Elsewhere a change is noticed by size, modification and status-change time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from snapcore import extents
from snapcore.errors import BusyError, NotFoundError, ReadError, SourceChangedError, UsageError, from_os_error
from snapcore.extents import Extents
from snapcore.source import device

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_FICLONE = 0x40049409
# The kernel stamps files with a clock that ticks every 1 to 10 ms: a change within the tick of the last one
# leaves the same stamp, so a file is only trusted once its stamp is older than that.
_STAMP_TICK_S = 0.02


class RawSource:
    """An open raw image or block device.

    Parameters
    ----------
    path : str
    descriptor : int
        Open for reading; owned from now on.
    private : bool
        Nobody else can write to what the descriptor reads.
    """

    def __init__(self, path: str, descriptor: int, *, private: bool = False) -> None:
        self._path = path
        self._descriptor = descriptor
        self._private = private
        self._device = stat.S_ISBLK(os.fstat(descriptor).st_mode)
        self._size_bytes = device.size_bytes(descriptor)
        self._stamp = self._current_stamp()

    @property
    def name(self) -> str:
        """Path of the image."""
        return self._path

    @property
    def size_bytes(self) -> int:
        """Length of the image or device."""
        return self._size_bytes

    def data_extents(self) -> Extents:
        """What is no hole, by SEEK_DATA and SEEK_HOLE; all of it where the file system does not say."""
        if self._device or self._size_bytes == 0:
            return extents.from_pairs([(0, self._size_bytes)])
        return file_data_extents(self._path, self._descriptor, self._size_bytes)

    def read_into(self, target: memoryview, offset_bytes: int) -> None:
        """Fill `target` from the image; see `Source.read_into`."""
        done = read_file(self._path, self._descriptor, target, offset_bytes)
        if done < len(target):
            raise self._truncated(offset_bytes + done)

    def read_blocks(
        self, target: memoryview, offset_bytes: int, length_bytes: int, block_bytes: int, seed: int
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool]]:
        """Digest each block of a range while it is read; see `BlockSource.read_blocks`."""
        # It imports numpy, and who only compares images needs none (cli/__init__.py).
        from snapcore import digest

        done, code, prints, zero = digest.read_blocks(
            self._descriptor, offset_bytes, length_bytes, block_bytes, seed, target
        )
        if code:
            raise ReadError(self._path, offset_bytes + done, length_bytes - done, code, os.strerror(code))
        if done < length_bytes:
            raise self._truncated(offset_bytes + done)
        return prints, zero

    def _truncated(self, end_bytes: int) -> SourceChangedError:
        return SourceChangedError(
            f"{self._path} ends at byte {end_bytes} and had {self._size_bytes} bytes when it was "
            "opened: it was truncated meanwhile; take the snapshot again when nobody writes to it"
        )

    def check_unchanged(self) -> None:
        """SourceChangedError when size or times are not what they were; a private clone never changes."""
        if self._private:
            return
        now = self._current_stamp()
        if now != self._stamp:
            what = "size" if now[0] != self._stamp[0] else "content"
            raise SourceChangedError(
                f"the {what} of {self._path} changed while it was read, so no instant of it was captured; "
                "stop its writer, put it on a file system with reflinks (xfs, btrfs), or accept a mixture with "
                "--allow-changing"
            )

    def wait_for_old_stamp(self) -> None:
        """Return when the clock that stamps files has ticked since the stamp of this one."""
        if abs(time.time_ns() - max(self._stamp[1:])) < _STAMP_TICK_S * 1e9:
            time.sleep(_STAMP_TICK_S)

    def _current_stamp(self) -> tuple[int, int, int]:
        status = os.fstat(self._descriptor)
        if self._device:
            return (device.size_bytes(self._descriptor), 0, 0)
        return (status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def close(self) -> None:
        """Let go of the image."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_file(path: str, descriptor: int, target: memoryview, offset_bytes: int) -> int:
    """Fill `target` from a file or device. Returns how many bytes there were, fewer only at its end; ReadError."""
    done = 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done:]], offset_bytes + done)
        except OSError as error:
            code = error.errno or errno.EIO
            reason = error.strerror or str(error)
            raise ReadError(path, offset_bytes + done, len(target) - done, code, reason) from error
        if count == 0:
            break
        done += count
    return done


def file_data_extents(path: str, descriptor: int, size_bytes: int) -> Extents:
    """What of an open file is no hole; `path` is for messages."""
    rows = []
    at = 0
    while at < size_bytes:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            at = min(os.lseek(descriptor, start, os.SEEK_HOLE), size_bytes)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return extents.from_pairs([(0, size_bytes)])
            raise from_os_error(error, f"looking for data in {path} from offset {at} on") from error
        rows.append((start, at - start))
    return extents.from_pairs([row for row in rows if row[1] > 0])


@contextmanager
def open_source(path: str, *, allow_changing: bool = False) -> Iterator[RawSource]:
    """Open a raw image or block device as it is at this instant.

    Parameters
    ----------
    path : str
    allow_changing : bool
        Do not mind a file that is written meanwhile, or a device that is mounted for writing.

    Raises
    ------
    NotFoundError, BusyError, UsageError, StoreError
    """
    try:
        # Without O_NONBLOCK a named pipe would wait for its writer; images and devices do not mind.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no image {path}") from error
    except OSError as error:
        raise from_os_error(error, f"opening {path}") from error
    source = None
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise UsageError(f"{path} is neither a file nor a block device")
        private = False
        if stat.S_ISREG(mode):
            clone = _clone(path, descriptor)
            if clone is not None:
                os.close(descriptor)
                descriptor, private = clone, True
        elif not allow_changing and (holder := device.holder(descriptor, writing=True)):
            raise BusyError(
                f"{path} is in use for writing by {holder}: unmount it, or accept a mixture with --allow-changing"
            )
        source = _Changing(path, descriptor) if allow_changing else RawSource(path, descriptor, private=private)
        descriptor = -1
        if stat.S_ISREG(mode) and not private and not allow_changing:
            # After the stamp was taken: what is written in its tick is there before the first read, and what is
            # written later has another one.
            source.wait_for_old_stamp()
        yield source
    finally:
        if source is not None:
            source.close()
        if descriptor >= 0:
            os.close(descriptor)


class _Changing(RawSource):
    """A source whose user accepts that it is written meanwhile."""

    def check_unchanged(self) -> None:
        return


def _clone(path: str, descriptor: int) -> int | None:
    """A nameless reflink clone beside the file, or None where the file system or the folder has none for us."""
    if sys.platform != "linux":
        return None
    import fcntl

    folder = os.path.dirname(os.path.realpath(path))
    clone = -1
    try:
        clone = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.ioctl(clone, _FICLONE, descriptor)
    except OSError:
        if clone >= 0:
            with contextlib.suppress(OSError):
                os.close(clone)
        return None
    return clone
