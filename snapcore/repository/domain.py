"""A domain: the key space within which chunks are shared. It turns bytes into ids (docs/FORMAT.md, "Domains and ids").

Only the plain domain exists; its keys are fixed, so that plain repositories share ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import blake3

from snapcore.repository.envelope import PLAIN_DOMAIN

ID_BYTES = 32
ZERO_ID = bytes(ID_BYTES)


@dataclass(frozen=True, slots=True)
class Domain:
    """Keys for ids; `id` is 16 bytes, all zero for the plain domain."""

    id: bytes
    chunk_key: bytes
    node_key: bytes
    tag_key: bytes

    def chunk_id(self, plain: bytes | bytearray | memoryview) -> bytes:
        """Id of a chunk: keyed BLAKE3 of its plain bytes."""
        return blake3.blake3(plain, key=self.chunk_key).digest()

    def node_id(self, plain: bytes | bytearray | memoryview) -> bytes:
        """Id of a tree node: keyed BLAKE3 of its bytes."""
        return blake3.blake3(plain, key=self.node_key).digest()

    def disk_tag(self, disk: str) -> str:
        """What stands for a disk in object names: 16 hexadecimal digits."""
        return blake3.blake3(b"disk:" + disk.encode(), key=self.tag_key).hexdigest(8)


def _fixed_key(purpose: str) -> bytes:
    return blake3.blake3(b"", derive_key_context=f"snapcore 2026 plain {purpose}").digest()


PLAIN = Domain(PLAIN_DOMAIN, _fixed_key("chunk"), _fixed_key("node"), _fixed_key("tag"))
