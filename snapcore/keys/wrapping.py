"""A root under a wrapping key (docs/FORMAT.md, "Keys"). A wrapping key is made for one wrap and wraps once."""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snapcore.keys.root import ROOT_BYTES

_NONCE_BYTES = 12
_TAG_BYTES = 16
WRAPPED_BYTES = _NONCE_BYTES + ROOT_BYTES + _TAG_BYTES
_CONTEXT = b"snapcore 2026 root\0"


def wrap(wrapping_key: bytearray, root: bytearray, bound: bytes) -> bytes:
    """The root, sealed, with `bound` as associated data."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(wrapping_key).encrypt(nonce, root, _CONTEXT + bound)


def unwrap(wrapping_key: bytearray, wrapped: bytes, bound: bytes) -> bytearray | None:
    """The root; None when the key is another one, or anything was changed."""
    if len(wrapped) != WRAPPED_BYTES:
        return None
    root = bytearray(ROOT_BYTES)
    try:
        AESGCM(wrapping_key).decrypt_into(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], _CONTEXT + bound, root)
    except InvalidTag:
        return None
    return root
