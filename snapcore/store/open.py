"""The store of a place: a path, `s3://BUCKET/PREFIX`, or `memory:`.

Secrets never stand in a place, which is shown and logged: they come from the environment.
"""

from __future__ import annotations

import os
import re

from snapcore.errors import UsageError
from snapcore.store.cache import CacheStore, cache_limit_bytes
from snapcore.store.interface import Store
from snapcore.store.limit import LimitStore
from snapcore.store.local import LocalStore
from snapcore.store.memory import MemoryStore
from snapcore.store.retry import RetryStore

_S3 = "s3://"
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}")
_PART = re.compile(r"(?!\.\.?$)[A-Za-z0-9._=+-]+")
# Requests under way at once: enough to hide 30 ms each way, few enough for a small gateway.
_CALLS = 16
# For which a call begins new tries.
_BUDGET_S = 120.0


def open_store(place: str | os.PathLike[str] | Store) -> Store:
    """The store of a place.

    Parameters
    ----------
    place : path, str or Store
        A folder, which need not be there yet; `s3://BUCKET` or `s3://BUCKET/PREFIX`, with tries, limits and
        time budget of their own; `memory:`, a new and empty one. A Store is given back as it is.

    Raises
    ------
    UsageError
        It is none of these, or a library for it is missing.
    """
    if not isinstance(place, (str, os.PathLike)):
        return place
    path = os.fspath(place)
    if path.startswith(_S3):
        return RetryStore(LimitStore(_s3_store(path), _CALLS), _BUDGET_S)
    if path == "memory:":
        return MemoryStore()
    if "://" in path:
        scheme = path.partition("://")[0]
        raise UsageError(f"{scheme}://…: a repository is in a folder, in s3://BUCKET/PREFIX, or a Store object")
    return LocalStore(path)


def with_cache(store: Store, repository_id: str) -> Store:
    """The store with this host's read cache in front of it, where it is far away: S3."""
    if not store.url.startswith(_S3) or cache_limit_bytes() == 0:
        return store
    return CacheStore(store, repository_id)


def _s3_store(place: str) -> Store:
    bucket, _, prefix = place.removeprefix(_S3).partition("/")
    parts = prefix.rstrip("/").split("/") if prefix.rstrip("/") else []
    if not _BUCKET.fullmatch(bucket) or not all(map(_PART.fullmatch, parts)):
        # Not shown: it may hold what somebody took for the place of a password.
        raise UsageError(
            "a place in S3 is s3://BUCKET/PREFIX, of letters, digits and ._=+- between single slashes; endpoint and "
            "credentials come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …)"
        )
    try:
        from snapcore.store.s3 import S3Store
    except ModuleNotFoundError as error:
        raise UsageError(f"{_S3}{bucket} needs the library {error.name}: pip install 'snapcore[s3]'") from error
    return S3Store(bucket, "/".join(parts))
