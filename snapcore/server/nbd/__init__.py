"""Disks, snapshots and raw images over NBD (docs/nbd.md)."""

from __future__ import annotations

from snapcore.server.nbd.exports import Rule
from snapcore.server.nbd.server import Event, NbdServer
from snapcore.server.nbd.tls import Tls

__all__ = ["Event", "NbdServer", "Rule", "Tls"]
