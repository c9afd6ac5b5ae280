"""A disk of a pool as a file that a loop device can lie over: a FUSE file system of one file, served by this process.

Tests need the order in which a file system writes and asks for flushes, as a virtual machine would give it; nothing
less tells whether a snapshot that is cut meanwhile is one that a file system can be recovered from. Spoken is the
kernel's protocol itself (7.31), of which one file needs little.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from snapcore.errors import Error, OutOfSpaceError

FILE_NAME = "disk"
_ROOT, _FILE = 1, 2
_MAX_WRITE = 1 << 20
_REQUEST = struct.Struct("<IIQQIIIHH")
_REPLY = struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
_FOREVER_S = 1 << 30
_PUNCH_HOLE, _ZERO_RANGE = 2, 16
_INITIAL_FLAGS = 1 << 5 | 1 << 22  # big writes, a number of pages of our own


class Writable(Protocol):
    """What the file shows."""

    @property
    def size_bytes(self) -> int:
        """Length."""

    def pread(self, length_bytes: int, offset_bytes: int) -> bytes:
        """Read."""

    def pwrite(self, data: memoryview, offset_bytes: int) -> int:
        """Write."""

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        """Clear."""

    def flush(self) -> None:
        """Make durable."""


@contextmanager
def file_of(disk: Writable, folder: Path) -> Iterator[Path]:
    """The disk as a file in `folder`, which is made; needs root. This process must not open the file itself."""
    folder.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    channel = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={channel},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"snapcore", os.fsencode(folder), b"fuse", 0, options) != 0:
        code = ctypes.get_errno()
        os.close(channel)
        raise OSError(code, os.strerror(code), str(folder))
    servers = [threading.Thread(target=_serve, args=(channel, disk), daemon=True) for _ in range(2)]
    for server in servers:
        server.start()
    try:
        yield folder / FILE_NAME
    finally:
        unmounted = libc.umount2(os.fsencode(folder), 0) == 0 or libc.umount2(os.fsencode(folder), 2) == 0
        if unmounted:
            for server in servers:
                server.join(30)
        os.close(channel)


def _serve(channel: int, disk: Writable) -> None:
    space = bytearray(_MAX_WRITE + 4096)
    while True:
        try:
            count = os.readv(channel, [space])
        except OSError as error:
            if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                continue
            return
        _, opcode, unique, node, *_ = _REQUEST.unpack_from(space)
        answer = _ANSWERS.get(opcode, _unknown)
        try:
            body = answer(disk, node, memoryview(space)[_REQUEST.size : count])
            code = 0
        except OSError as error:
            body, code = b"", -(error.errno or errno.EIO)
        except OutOfSpaceError:
            body, code = b"", -errno.ENOSPC
        except Error:
            body, code = b"", -errno.EIO
        if body is not None:
            try:
                os.write(channel, _REPLY.pack(_REPLY.size + len(body), code, unique) + body)
            except OSError as error:
                if error.errno != errno.ENOENT:  # else the request was given up
                    return


def _attributes(disk: Writable, node: int) -> bytes:
    is_root = node == _ROOT
    size = 0 if is_root else disk.size_bytes
    mode = stat.S_IFDIR | 0o700 if is_root else stat.S_IFREG | 0o600
    times = (0, 0, 0, 0, 0, 0)
    return _ATTRIBUTES.pack(node, size, -(-size // 512), *times, mode, 1, 0, 0, 0, 4096, 0)


def _unknown(disk: Writable, node: int, body: memoryview) -> bytes | None:
    raise OSError(errno.ENOSYS, "not spoken here")


def _nothing(disk: Writable, node: int, body: memoryview) -> bytes | None:
    return b""


def _no_reply(disk: Writable, node: int, body: memoryview) -> bytes | None:
    return None


def _init(disk: Writable, node: int, body: memoryview) -> bytes | None:
    pages = _MAX_WRITE // 4096
    return struct.pack("<IIIIHHIIHHI28x", 7, 31, _MAX_WRITE, _INITIAL_FLAGS, 16, 12, _MAX_WRITE, 1, pages, 0, 0)


def _lookup(disk: Writable, node: int, body: memoryview) -> bytes | None:
    if bytes(body).rstrip(b"\0") != FILE_NAME.encode():
        raise OSError(errno.ENOENT, "no such file")
    return struct.pack("<QQQQII", _FILE, 0, _FOREVER_S, _FOREVER_S, 0, 0) + _attributes(disk, _FILE)


def _getattr(disk: Writable, node: int, body: memoryview) -> bytes | None:
    return struct.pack("<QII", _FOREVER_S, 0, 0) + _attributes(disk, node)


def _open(disk: Writable, node: int, body: memoryview) -> bytes | None:
    return bytes(16)


def _read(disk: Writable, node: int, body: memoryview) -> bytes | None:
    _, offset, size = struct.unpack_from("<QQI", body)
    return disk.pread(size, offset)


def _write(disk: Writable, node: int, body: memoryview) -> bytes | None:
    _, offset, size = struct.unpack_from("<QQI", body)
    disk.pwrite(body[40 : 40 + size], offset)
    return struct.pack("<II", size, 0)


def _fsync(disk: Writable, node: int, body: memoryview) -> bytes | None:
    disk.flush()
    return b""


def _fallocate(disk: Writable, node: int, body: memoryview) -> bytes | None:
    _, offset, length, mode = struct.unpack_from("<QQQI", body)
    if mode & (_PUNCH_HOLE | _ZERO_RANGE):
        disk.write_zeroes(offset, length)
    return b""


def _statfs(disk: Writable, node: int, body: memoryview) -> bytes | None:
    return struct.pack("<QQQQQIIII24x", 0, 0, 0, 1, 0, 4096, 255, 4096, 0)


_ANSWERS = {
    1: _lookup,
    2: _no_reply,  # forget
    3: _getattr,
    4: _getattr,  # setattr: times only, which stay as they are
    14: _open,
    15: _read,
    16: _write,
    17: _statfs,
    18: _nothing,  # release
    20: _fsync,
    26: _init,
    36: _no_reply,  # interrupt: every request is answered soon
    38: _no_reply,  # destroy
    42: _no_reply,  # forget many
    43: _fallocate,
}
