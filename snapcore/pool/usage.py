"""What disks, snapshots and the pool take, from the maps."""

from __future__ import annotations

from dataclasses import dataclass

from snapcore.core import BLOCK_BYTES
from snapcore.pages import SLOT_BYTES
from snapcore.pool.engine import Engine


@dataclass(frozen=True, slots=True)
class VersionUsage:
    """What one version takes.

    Attributes
    ----------
    id, name, kind : str
        Kind is "disk" or "snapshot".
    size_bytes, mapped_bytes : int
        Length, and what of it has blocks.
    unique_bytes : int
        Free if this one alone were deleted.
    """

    id: str
    name: str
    kind: str
    disk: str
    size_bytes: int
    mapped_bytes: int
    unique_bytes: int


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """What a pool takes.

    Attributes
    ----------
    versions : list of VersionUsage
        Disks, then snapshots, oldest first.
    allocated_bytes : int
        Blocks that some version holds.
    held_bytes : int
        Freed, and not punched out yet.
    free_bytes : int or None
        Up to the limit; None without one.
    limit_bytes : int
        0 is none.
    data_bytes : int
        Length of the data file, holes included.
    map_bytes : int
        Of the pages that are in use.
    log_bytes, log_used_bytes : int
    lazy_bytes : int
        Of images that fill up from a region, on the host; the limit does not count them.
    """

    versions: list[VersionUsage]
    allocated_bytes: int
    held_bytes: int
    free_bytes: int | None
    limit_bytes: int
    data_bytes: int
    map_bytes: int
    log_bytes: int
    log_used_bytes: int
    lazy_bytes: int


def measure(engine: Engine) -> PoolUsage:
    """Walk all versions; the caller holds them still."""
    catalog, core = engine.catalog, engine.core
    pages = core.page_file
    mapped: dict[int, int] = {}
    found: list[VersionUsage] = []
    # Each version's blocks from its parent's and from what differs; parents come first.
    ahead = [record.id for record in catalog.versions.values() if not record.parent]
    while ahead:
        version = ahead.pop()
        ahead.extend(catalog.children[version])
        parent = catalog.versions[version].parent
        mine, others, _ = pages.tally(engine.versions.root(version), engine.versions.root(parent) if parent else 0)
        mapped[version] = mapped.get(parent, 0) + mine - others
    for record in [*catalog.of_kind("head"), *catalog.of_kind("snapshot")]:
        is_disk = record.kind == "head"
        disk_name = catalog.disks[record.disk].name if is_disk else record.disk_name
        found.append(
            VersionUsage(
                id=str(record.disk if is_disk else record.id),
                name=disk_name if is_disk else record.name or str(record.id),
                kind="disk" if is_disk else "snapshot",
                disk=disk_name,
                size_bytes=record.size_bytes,
                mapped_bytes=mapped[record.id] * BLOCK_BYTES,
                unique_bytes=engine.versions.unique_blocks([record.id]) * BLOCK_BYTES,
            )
        )
    allocated, held = core.used_blocks * BLOCK_BYTES, core.held_blocks * BLOCK_BYTES
    sectors = engine.checkpointer.superblock.log_sectors
    return PoolUsage(
        versions=found,
        allocated_bytes=allocated,
        held_bytes=held,
        free_bytes=max(0, engine.limit_bytes - allocated - held) if engine.limit_bytes else None,
        limit_bytes=engine.limit_bytes,
        data_bytes=core.end_blocks * BLOCK_BYTES,
        map_bytes=(pages.slots - pages.free_slots) * SLOT_BYTES,
        log_bytes=sectors * 512,
        log_used_bytes=(sectors - core.log_free_sectors) * 512,
        lazy_bytes=engine.versions.backings.lazy_bytes(),
    )
