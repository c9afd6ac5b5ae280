"""Domains: a key space each; chunks are shared within one and never across two (docs/FORMAT.md, "Domains and ids")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import blake3

from snapcore.keys import root
from snapcore.keys.sealing import Sealing

ID_BYTES = 32
ZERO_ID = bytes(ID_BYTES)
DOMAIN_ID_BYTES = root.DOMAIN_ID_BYTES


@dataclass(frozen=True, slots=True, repr=False)
class Domain:
    """The keys of a domain.

    Attributes
    ----------
    id : bytes
        16 bytes, all zero for the plain domain.
    chunk_key, node_key, tag_key : bytes
        For ids of chunks and nodes, and for what stands for a disk in names.
    sealing : Sealing or None
        None for the plain domain.
    """

    id: bytes
    chunk_key: bytes
    node_key: bytes
    tag_key: bytes
    sealing: Sealing | None = None

    @property
    def key_id(self) -> str | None:
        """The id in hexadecimal; None for the plain domain."""
        return None if self.sealing is None else self.id.hex()

    @property
    def folder(self) -> str:
        """What stands before the ids of packs and index objects in their names."""
        return "" if self.sealing is None else f"{self.id.hex()}/"

    def chunk_id(self, plain: bytes | bytearray | memoryview) -> bytes:
        """Id of a chunk: keyed BLAKE3 of its plain bytes."""
        return blake3.blake3(plain, key=self.chunk_key).digest()

    def node_id(self, plain: bytes | bytearray | memoryview) -> bytes:
        """Id of a tree node: keyed BLAKE3 of its bytes."""
        return blake3.blake3(plain, key=self.node_key).digest()

    def disk_tag(self, disk: str) -> str:
        """What stands for a disk in object names: 16 hexadecimal digits."""
        return blake3.blake3(b"disk:" + disk.encode(), key=self.tag_key).hexdigest(8)

    def __repr__(self) -> str:
        return f"Domain({self.id.hex()})"


# By their ids.
Domains = Mapping[bytes, Domain]


def of_root(secret: bytes | bytearray) -> Domain:
    """The domain that a root makes."""
    sealing = Sealing(root.derived(secret, "record"), root.derived(secret, "object"))
    return Domain(
        root.domain_id(secret),
        root.derived(secret, "chunk"),
        root.derived(secret, "node"),
        root.derived(secret, "tag"),
        sealing,
    )


def _fixed_key(purpose: str) -> bytes:
    return blake3.blake3(b"", derive_key_context=f"snapcore 2026 plain {purpose}").digest()


PLAIN = Domain(bytes(DOMAIN_ID_BYTES), _fixed_key("chunk"), _fixed_key("node"), _fixed_key("tag"))
