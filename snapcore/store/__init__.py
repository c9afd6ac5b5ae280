"""Bytes under a name: a local folder or memory, with retry and limit as decorators of the same interface."""

from snapcore.store.interface import Store
from snapcore.store.limit import LimitStore
from snapcore.store.local import LocalStore
from snapcore.store.memory import MemoryStore
from snapcore.store.retry import RetryStore

__all__ = ["LimitStore", "LocalStore", "MemoryStore", "RetryStore", "Store"]
