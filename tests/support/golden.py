"""The content of the golden repositories: the same bytes on every machine and in every version."""

from __future__ import annotations

import random
from dataclasses import dataclass

IMAGE = "golden image"
CHUNK_BYTES = 16 << 10
# Of the sealed one, which a key file beside it opens too.
PASSPHRASE = "four golden words alone"
KEY_FILE = "format-1-sealed.key"


@dataclass(frozen=True)
class Generation:
    """One golden snapshot: its label, disk, compression and content."""

    label: str
    disk: str
    compression: str
    content: bytes


def generations() -> list[Generation]:
    """All golden snapshots in the order in which they are taken."""
    source = random.Random(20261122)
    first = bytearray(40 * CHUNK_BYTES + 777)
    for chunk in (0, 1, 2, 7, 39):
        first[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES] = source.randbytes(CHUNK_BYTES)
    first[3 * CHUNK_BYTES : 5 * CHUNK_BYTES] = (b"well compressible text %d\n" * 2000)[: 2 * CHUNK_BYTES]
    second = bytearray(first)
    second[CHUNK_BYTES + 4096 : CHUNK_BYTES + 8192] = source.randbytes(4096)
    second[7 * CHUNK_BYTES : 8 * CHUNK_BYTES] = bytes(CHUNK_BYTES)
    third = second + bytes(200 * CHUNK_BYTES) + b"the end of a grown disk"
    third[CHUNK_BYTES + 100 : CHUNK_BYTES + 105] = b"patch"
    return [
        Generation("first", "golden", "lz4", bytes(first)),
        Generation("second", "golden", "lz4", bytes(second)),
        Generation("third", "golden", "zstd", bytes(third)),
        Generation("other", "other disk", "none", bytes(first[: 3 * CHUNK_BYTES])),
        Generation("empty", "empty disk", "lz4", b""),
    ]
