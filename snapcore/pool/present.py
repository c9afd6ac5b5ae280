"""The file that says which chunks of an image are here (docs/FORMAT.md, "Images that fill up")."""

from __future__ import annotations

import struct

from snapcore.digest import xxh64_blocks
from snapcore.pool.catalog import Region
from snapcore.presence import Presence

_MAGIC = b"SNAPHERE"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQ64s64s")
_CHECKSUM_BYTES = 8


def encode(presence: bytes, region: Region, size_bytes: int) -> bytes:
    """The file for what `Presence.to_bytes` gave."""
    body = _header(region, size_bytes) + presence
    return body + _checksum(body)


def load(path: str, region: Region, size_bytes: int) -> Presence | None:
    """What a file says of the image of a snapshot; None where it says nothing that can be believed."""
    found = Presence(size_bytes, region.chunk_bytes)
    header, length = _header(region, size_bytes), (found.chunks + 63) // 64 * 8
    try:
        with open(path, "rb") as file:
            data = file.read(len(header) + length + _CHECKSUM_BYTES + 1)
    except OSError:
        return None
    body, words = data[:-_CHECKSUM_BYTES], data[len(header) : -_CHECKSUM_BYTES]
    if len(words) != length or not data.startswith(header) or _checksum(body) != data[-_CHECKSUM_BYTES:]:
        return None
    try:
        found.load(words)
    except ValueError:
        return None
    return found


def _header(region: Region, size_bytes: int) -> bytes:
    ids = [text.encode()[:64].ljust(64, b"\0") for text in (region.repository, region.snapshot)]
    return _HEADER.pack(_MAGIC, _VERSION, 0, region.chunk_bytes, size_bytes, *ids)


def _checksum(body: bytes) -> bytes:
    return int(xxh64_blocks(body, len(body), 0)[0]).to_bytes(_CHECKSUM_BYTES, "little")
