"""Bytes under a name: a local folder, memory or S3, with retry, limit and cache as decorators of the same interface."""

from snapcore.store.cache import CacheStore
from snapcore.store.interface import Store
from snapcore.store.limit import LimitStore
from snapcore.store.local import LocalStore
from snapcore.store.memory import MemoryStore
from snapcore.store.open import open_store, with_cache
from snapcore.store.retry import RetryStore

__all__ = ["CacheStore", "LimitStore", "LocalStore", "MemoryStore", "RetryStore", "Store", "open_store", "with_cache"]
