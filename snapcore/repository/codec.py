"""Compression of payloads. LZ4 by default, Zstandard where asked; kept only where it pays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import lz4.block

from snapcore import lz, scan
from snapcore.errors import DamagedError, UsageError
from snapcore.persist import Buffer

if TYPE_CHECKING:
    from types import ModuleType

COMPRESSIONS = ("lz4", "zstd", "none")
# Below a gain of 1/32 the reader's time is worth more than the space.
_GAIN_DIVISOR = 32
# For chunks that are too long for the kernel, which packs as small as this (bench/choices.py).
_LZ4_ACCELERATION = 2
# A frame says how much memory its decoding takes: up to 128 MiB unless limited. 8 MiB hold any chunk and any patch.
_ZSTD_WINDOW_LOG = 23
_NOT_THE_SAME = "a chunk was not the same after compression; check this machine's memory"


class Codec(IntEnum):
    """How a payload is stored."""

    RAW = 0
    LZ4 = 1
    ZSTD = 2


def encode(plain: Buffer, compression: str) -> tuple[Codec, Buffer]:
    """Compress, and decode again what will be stored: what is written is read once before it counts.

    Raises
    ------
    DamagedError
        The compressed form does not decode to the plain bytes: memory or processor fail.
    """
    return encode_many([plain], compression)[0]


def encode_many(plains: Sequence[Buffer], compression: str) -> list[tuple[Codec, Buffer]]:
    """`encode` for each; LZ4 on all of them without a word to the interpreter in between."""
    if compression == "lz4" and all(len(plain) <= lz.BLOCK_LIMIT_BYTES for plain in plains):
        return _lz4_encode_many(plains)
    return [_encode(plain, compression) for plain in plains]


def _lz4_encode_many(plains: Sequence[Buffer]) -> list[tuple[Codec, Buffer]]:
    try:
        packed = lz.pack_blocks([*plains], _GAIN_DIVISOR)
    except ArithmeticError as error:
        raise DamagedError(_NOT_THE_SAME) from error
    return [
        (Codec.RAW, bytes(plain)) if payload is None else (Codec.LZ4, payload)
        for plain, payload in zip(plains, packed, strict=True)
    ]


def _encode(plain: Buffer, compression: str) -> tuple[Codec, Buffer]:
    # What is stored as it is must be a copy: the caller may use its memory again before the record is written.
    if compression == "none" or len(plain) == 0:
        return Codec.RAW, bytes(plain)
    codec, encoder = _ENCODERS[compression]
    packed = encoder(plain)
    if len(packed) > len(plain) - len(plain) // _GAIN_DIVISOR:
        return Codec.RAW, bytes(plain)
    if not scan.same_bytes(decode(codec, packed, len(plain)), plain):
        raise DamagedError(_NOT_THE_SAME)
    return codec, packed


def decode(codec: int, payload: Buffer, plain_bytes: int) -> Buffer:
    """The plain bytes, exactly `plain_bytes` of them; DamagedError otherwise. Allocates no more than that."""
    if codec == Codec.RAW:
        plain: Buffer = payload
    elif codec == Codec.LZ4:
        try:
            plain = lz4.block.decompress(payload, uncompressed_size=plain_bytes)
        except (lz4.block.LZ4BlockError, ValueError, OverflowError) as error:
            raise DamagedError(f"an LZ4 payload does not decode: {error}") from error
    elif codec == Codec.ZSTD:
        plain = _zstd_decode(payload, plain_bytes)
    else:
        raise DamagedError(f"a payload has the unknown codec {codec}")
    if len(plain) != plain_bytes:
        raise DamagedError(f"a payload decodes to {len(plain)} bytes where {plain_bytes} belong")
    return plain


def check_compression(name: str) -> str:
    """The name of a compression, when it is one."""
    if name not in COMPRESSIONS:
        raise UsageError(f"there is no compression {name!r}; choose one of {', '.join(COMPRESSIONS)}")
    return name


def _zstd() -> ModuleType:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def _lz4_encode(plain: Buffer) -> bytes:
    packed: bytes = lz4.block.compress(plain, store_size=False, mode="fast", acceleration=_LZ4_ACCELERATION)
    return packed


def _zstd_encode(plain: Buffer) -> bytes:
    packed: bytes = _zstd().compress(plain, level=1)
    return packed


def _zstd_decode(payload: Buffer, plain_bytes: int) -> bytes:
    zstd = _zstd()
    try:
        decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG})
        plain: bytes = decoder.decompress(payload, max_length=plain_bytes + 1)
    except zstd.ZstdError as error:
        raise DamagedError(f"a Zstandard payload does not decode: {error}") from error
    return plain


_ENCODERS: dict[str, tuple[Codec, Callable[[Buffer], bytes]]] = {
    "lz4": (Codec.LZ4, _lz4_encode),
    "zstd": (Codec.ZSTD, _zstd_encode),
}
