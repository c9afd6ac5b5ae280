"""Packed units of image formats: deflate and Zstandard, bounded in what comes out. All of it runs without the GIL."""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Callable
from types import ModuleType

from snapcore.errors import UsageError

# In qcow2 a deflate stream has no header and a window of 4 KiB.
QCOW2_WINDOW = -12
# In VMDK it has zlib's header.
VMDK_WINDOW = 15
_ZSTD_WINDOW_LOG = 23
_ZSTD_LEVEL = 3


class PackingError(Exception):
    """Packed bytes that do not decode to what they should; the reader says where they stand."""


def inflate(packed: bytes, size_bytes: int, window: int) -> bytes:
    """What a deflate stream holds, at most `size_bytes` of it. What stands behind the stream does not count."""
    try:
        return zlib.decompressobj(window).decompress(packed, size_bytes)
    except zlib.error as error:
        raise PackingError(str(error)) from error


def deflate(plain: memoryview, window: int) -> bytes:
    """A deflate stream at zlib's usual level."""
    packer = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, window)
    return packer.compress(plain) + packer.flush()


def zstd_unpack(packed: bytes, size_bytes: int) -> bytes:
    """What one or several Zstandard frames hold, at most `size_bytes` of it."""
    zstd = _zstd()
    options = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
    parts: list[bytes] = []
    missing = size_bytes
    try:
        while missing and packed:
            decoder = zstd.ZstdDecompressor(options=options)
            part = decoder.decompress(packed, missing)
            parts.append(part)
            missing -= len(part)
            if not decoder.eof or (not part and len(decoder.unused_data) == len(packed)):
                break
            packed = decoder.unused_data
    except zstd.ZstdError as error:
        raise PackingError(str(error)) from error
    return b"".join(parts)


def zstd_pack(plain: memoryview) -> bytes:
    """One Zstandard frame, without a checksum."""
    packed: bytes = _zstd().compress(plain, level=_ZSTD_LEVEL)
    return packed


def packer_of(compression: str) -> Callable[[memoryview], bytes]:
    """What packs the clusters of a qcow2 image."""
    if compression == "zlib":
        return functools.partial(deflate, window=QCOW2_WINDOW)
    if compression == "zstd":
        return zstd_pack
    raise UsageError(f"there is no compression {compression!r} of qcow2 images; choose zlib or zstd")


def _zstd() -> ModuleType:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd
