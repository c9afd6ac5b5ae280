"""The parameters of a repository, written once at init."""

from __future__ import annotations

import secrets

import msgspec

from snapcore.errors import DamagedError, ExistsError, NotFoundError, UsageError
from snapcore.repository import codec, envelope
from snapcore.repository.envelope import Kind
from snapcore.store.interface import Store

NAME = "config"
CHUNK_BYTES = 64 << 10
CHUNK_LIMITS_BYTES = (4 << 10, 4 << 20)


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What all writers and readers of a repository agree on.

    Attributes
    ----------
    id : str
        The repository's own, 32 hexadecimal digits.
    chunk_bytes : int
        Length of a chunk: a power of two from 4 KiB to 4 MiB.
    compression : str
        "lz4", "zstd" or "none": what writers use unless told otherwise.
    """

    id: str
    chunk_bytes: int
    compression: str


def check_chunk_bytes(chunk_bytes: int) -> int:
    """The chunk size, when it is one."""
    low, high = CHUNK_LIMITS_BYTES
    if not low <= chunk_bytes <= high or chunk_bytes & (chunk_bytes - 1):
        raise UsageError(f"the chunk size must be a power of two from {low} to {high} bytes, not {chunk_bytes}")
    return chunk_bytes


def create(store: Store, chunk_bytes: int, compression: str) -> Config:
    """Write the config of a new repository; ExistsError where one is or where other objects lie."""
    check_chunk_bytes(chunk_bytes)
    codec.check_compression(compression)
    object_id = secrets.token_bytes(16)
    config = Config(id=object_id.hex(), chunk_bytes=chunk_bytes, compression=compression)
    if next(iter(store.list("")), None) is not None:
        raise ExistsError(f"{store.url} is not empty; a new repository needs a place of its own")
    store.put_new(NAME, [envelope.sealed(Kind.CONFIG, object_id, msgspec.json.encode(config))])
    return config


def load(store: Store) -> Config:
    """The config of the repository in a store; NotFoundError where there is none."""
    where = f"{store.url}/{NAME}"
    try:
        data = store.get(NAME, envelope.OBJECT_LIMIT_BYTES)
    except NotFoundError as error:
        raise NotFoundError(f"{store.url} holds no repository; `snapcore repo init` makes one") from error
    kind, object_id, body = envelope.opened(data, where)
    envelope.expect(kind, Kind.CONFIG, where)
    config = envelope.from_json(body, Config, where)
    if config.id != object_id.hex():
        raise DamagedError(f"{where} names the repository {config.id} and {object_id.hex()}")
    check_chunk_bytes(config.chunk_bytes)
    codec.check_compression(config.compression)
    return config
