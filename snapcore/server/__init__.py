"""Servers for what a pool holds."""

from __future__ import annotations

from snapcore.server.nbd import NbdServer

__all__ = ["NbdServer"]
