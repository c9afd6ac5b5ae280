"""The root of a domain, from which all its keys come (docs/FORMAT.md, "Domains and ids")."""

from __future__ import annotations

import secrets

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

ROOT_BYTES = 32
DOMAIN_ID_BYTES = 16


def new_root() -> bytearray:
    """32 random bytes."""
    return bytearray(secrets.token_bytes(ROOT_BYTES))


def derived(root: bytes | bytearray, purpose: str, length_bytes: int = 32, salt: bytes | None = None) -> bytes:
    """HKDF-SHA256 of key material that is random all through; `purpose` tells the keys of one root apart."""
    return HKDF(SHA256(), length_bytes, salt, b"snapcore 2026 " + purpose.encode()).derive(root)


def domain_id(root: bytes | bytearray) -> bytes:
    """The id of the domain that a root makes: nobody finds another root with the same one."""
    return derived(root, "domain", DOMAIN_ID_BYTES)
