"""The versions of an open pool: applies events to the catalog and to the trees, and sweeps ghosts.

The caller holds the pool's lock of versions and the gates of the heads concerned. `apply` does not fail once the event
is in the log: what can fail is done before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapcore import space
from snapcore.core import Core
from snapcore.pool import events
from snapcore.pool.backings import Backings, Opened
from snapcore.pool.catalog import Catalog, DiskRecord, Group, Region, Version
from snapcore.volume import Volume


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What a sweep will do: versions that leave, new roots of the ghosts that stay, what becomes free."""

    leaving: list[int]
    roots: dict[int, int]
    blocks: npt.NDArray[np.uint64]
    pages: npt.NDArray[np.uint64]


class Versions:
    """Catalog and volumes of a pool.

    Attributes
    ----------
    catalog : Catalog
    core : Core
    backings : Backings
    volumes : dict of version to Volume
        Of all heads.
    """

    def __init__(self, catalog: Catalog, core: Core, backings: Backings, *, writable: bool = True) -> None:
        self.catalog = catalog
        self.core = core
        self.backings = backings
        self.volumes: dict[int, Volume] = {}
        self._writable = writable
        for record in catalog.of_kind("head"):
            self._open_head(record)

    def close(self) -> None:
        """Close images that disks read from."""
        self.backings.close()

    def regions_needed(self) -> list[Region]:
        """Those of images that versions refer to, or did in a state that a recovery may still find. Takes no lock.

        Records move from the catalog to the images that leave, and are looked for in that order.
        """
        records = [*self.catalog.backings.values(), *self.backings.leaving()]
        return [record.region for record in records if record.region is not None]

    def root(self, version: int) -> int:
        """Of the tree of a version, as it is now."""
        volume = self.volumes.get(version)
        return volume.root if volume is not None else self.catalog.versions[version].root

    def heads_beside(self, versions: Iterable[int]) -> list[Volume]:
        """Volumes of heads among these versions."""
        return [self.volumes[version] for version in versions if version in self.volumes]

    def volume_of(self, disk: int) -> Volume:
        """Of a live disk."""
        return self.volumes[self.catalog.disks[disk].head]

    def open_volume(self, version: int) -> Volume:
        """A volume that reads a snapshot."""
        record = self.catalog.versions[version]
        return self._volume(record, root=self.root(version), parent=0, writable=False)

    def _backing(self, number: int) -> Opened:
        return self.backings.open(self.catalog.backings[number]) if number else Opened()

    def _open_head(self, record: Version) -> None:
        parent = self.root(record.parent) if record.parent else 0
        self.volumes[record.id] = self._volume(record, root=record.root, parent=parent, writable=self._writable)

    def _volume(self, record: Version, *, root: int, parent: int, writable: bool) -> Volume:
        image = self._backing(record.backing)
        return Volume(
            self.core,
            root=root,
            parent=parent,
            size_bytes=record.size_bytes,
            version=record.id,
            writable=writable,
            watched=record.kind == "head" and self._is_ghost(record.parent),
            backing=image.descriptor,
            backing_bytes=image.size_bytes,
            backing_mtime_ns=image.mtime_ns,
            presence=image.presence,
            fetch=image.fetch,
        )

    def _is_ghost(self, version: int) -> bool:
        return bool(version) and self.catalog.versions[version].kind == "ghost"

    def _settle(self, version: int, *, root: int | None = None) -> None:
        """Tell the volume of a head what its record says."""
        record = self.catalog.versions[version]
        volume = self.volumes[version]
        volume.change(
            root=volume.root if root is None else root,
            parent=self.root(record.parent) if record.parent else 0,
            size_bytes=record.size_bytes,
            version=version,
            watched=self._is_ghost(record.parent),
        )

    def _settle_children(self, version: int) -> None:
        for child in self.catalog.children.get(version, ()):
            if child in self.volumes:
                self._settle(child)

    def apply(self, event: events.Event) -> None:
        """Do what an event says. In recovery the event may be damaged: KeyError when it names what is not there."""
        match event:
            case events.MakeDisk():
                self._make_disk(event)
            case events.MakeDisks():
                for disk in event.disks:
                    self._make_disk(disk)
            case events.Cut():
                self._cut(event)
            case events.Clone():
                self._clone(event)
            case events.Rehead():
                self._rehead(event)
            case events.Resize():
                version = self.catalog.disks[event.disk].head
                self.catalog.versions[version].size_bytes = event.size_bytes
                self._settle(version)
            case events.Rename():
                self.catalog.disks[event.disk].name = event.name
            case events.Delete():
                for version in event.versions:
                    self._become_ghost(version)
            case events.DeleteDisk():
                self._delete_disk(event)
            case events.Decouple():
                self.catalog.backings[event.backing].region = None
            case events.Sweep():
                self.sweep(self.plan_sweep(event.version))

    def _make_disk(self, event: events.MakeDisk) -> None:
        catalog = self.catalog
        backing, origin_kind, origin = 0, "", 0
        if event.parent:
            backing, origin_kind, origin = catalog.versions[event.parent].backing, "snapshot", event.parent
        elif event.backing:
            backing, origin_kind, origin = event.backing.id, "image", event.backing.id
            catalog.backings[backing] = event.backing
        record = Version(
            id=event.version,
            parent=event.parent,
            kind="head",
            root=self.root(event.parent) if event.parent else 0,
            size_bytes=event.size_bytes,
            disk=event.disk,
            backing=backing,
            created_ns=event.created_ns,
        )
        catalog.add(record)
        catalog.disks[event.disk] = DiskRecord(
            event.disk, event.name, event.version, event.created_ns, origin_kind, origin
        )
        catalog.use_ids(event.disk, event.version, backing)
        self._open_head(record)

    def _cut(self, event: events.Cut) -> None:
        if event.group:
            self.catalog.groups[event.group] = Group(event.group, event.group_name, event.created_ns)
            self.catalog.use_ids(event.group)
        for disk, version, name in event.cuts:
            self._insert(disk, version, "snapshot", name, event.created_ns, event.group)

    def _insert(self, disk: int, version: int, kind: str, name: str, created_ns: int, group: int) -> None:
        """Put a version with what a head holds between the head and its parent."""
        head = self.catalog.versions[self.catalog.disks[disk].head]
        root = self.volumes[head.id].root
        # The head gets another parent; what it took away from the one that it has must not be forgotten.
        self._note_stirred(head.id)
        self.catalog.add(
            Version(
                id=version,
                parent=head.parent,
                kind="snapshot" if kind == "snapshot" else "ghost",
                root=root,
                size_bytes=head.size_bytes,
                disk=disk,
                disk_name=self.catalog.disks[disk].name,
                name=name,
                created_ns=created_ns,
                backing=head.backing,
                group=group,
            )
        )
        self.catalog.move(head.id, version)
        self.catalog.use_ids(version)
        self._settle(head.id)

    def _clone(self, event: events.Clone) -> None:
        self._insert(event.source, event.ghost, "ghost", "", event.created_ns, 0)
        between = self.catalog.versions[event.ghost]
        record = Version(
            id=event.version,
            parent=event.ghost,
            kind="head",
            root=between.root,
            size_bytes=event.size_bytes,
            disk=event.disk,
            backing=between.backing,
            created_ns=event.created_ns,
        )
        self.catalog.add(record)
        self.catalog.disks[event.disk] = DiskRecord(
            event.disk, event.name, event.version, event.created_ns, "disk", event.source
        )
        self.catalog.use_ids(event.disk, event.version)
        self._open_head(record)

    def _rehead(self, event: events.Rehead) -> None:
        catalog = self.catalog
        disk = catalog.disks[event.disk]
        root = self.root(event.parent) if event.parent else 0
        old = catalog.versions[disk.head]
        if event.image is not None:
            catalog.backings[event.image.id] = event.image
            catalog.use_ids(event.image.id)
        volume = self.volumes.pop(old.id)
        old.root, old.kind, old.stirred, old.disk_name = volume.root, "ghost", True, disk.name
        catalog.add(
            Version(
                id=event.version,
                parent=event.parent,
                kind="head",
                root=root,
                size_bytes=event.size_bytes,
                disk=event.disk,
                backing=event.backing,
                created_ns=old.created_ns,
            )
        )
        disk.head = event.version
        catalog.use_ids(event.version)
        self.volumes[event.version] = volume
        volume.change_backing(*self._backing(event.backing))
        self._settle(event.version, root=root)

    def _become_ghost(self, version: int) -> None:
        record = self.catalog.versions[version]
        record.kind, record.stirred = "ghost", True
        self._settle_children(version)

    def _delete_disk(self, event: events.DeleteDisk) -> None:
        disk = self.catalog.disks.pop(event.disk)
        volume = self.volumes.pop(disk.head)
        record = self.catalog.versions[disk.head]
        record.root, record.kind, record.stirred, record.disk_name = volume.root, "ghost", True, disk.name
        volume.detach()

    def plan_sweep(self, version: int) -> SweepPlan:
        """Find what the part of ghosts around a version holds that nobody needs. All that can fail is done here."""
        catalog, pages = self.catalog, self.core.page_file
        inside, beside = catalog.part([version])
        needed = [self.root(other) for other in beside]
        blocks, before = self._only_in(inside, needed)
        leaving = self._leaving(inside)
        gone = set(leaving)
        roots: dict[int, int] = {}
        try:
            for other in inside:
                if other not in gone:
                    roots[other] = pages.prune(self.root(other), needed)
            after = self._pages_of(roots.values(), needed)
        except BaseException:
            self._give_up(roots, needed, before)
            raise
        return SweepPlan(leaving, roots, blocks, np.setdiff1d(before, after))

    def _give_up(self, roots: dict[int, int], needed: Sequence[int], before: npt.NDArray[np.uint64]) -> None:
        """Free pages that were made for a sweep that does not happen."""
        self.core.page_file.free_pages(np.setdiff1d(self._pages_of(roots.values(), needed), before))

    def drop_plan(self, plan: SweepPlan, version: int) -> None:
        """A planned sweep does not happen."""
        inside, beside = self.catalog.part([version])
        needed = [self.root(other) for other in beside]
        _, before = self._only_in(inside, needed)
        self._give_up(plan.roots, needed, before)

    def _only_in(
        self, inside: Sequence[int], needed: Sequence[int]
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Blocks and pages that a part of ghosts holds and none of the needed trees, each once.

        The ghosts that hold a block hang together, so it is told at the one whose parent does not hold it.
        """
        part = set(inside)
        blocks, pages = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.uint64)]
        for version in inside:
            parent = self.catalog.versions[version].parent
            above = [self.root(parent)] if parent in part else []
            more_blocks, more_pages = self.core.page_file.exclusive(self.root(version), [*needed, *above])
            blocks.append(more_blocks)
            pages.append(more_pages)
        return np.concatenate(blocks), np.concatenate(pages)

    def _pages_of(self, roots: Iterable[int], needed: Sequence[int]) -> npt.NDArray[np.uint64]:
        """Pages of these trees that none of the needed ones holds; some perhaps several times."""
        pages = [self.core.page_file.exclusive(root, needed)[1] for root in roots]
        return np.concatenate([np.empty(0, dtype=np.uint64), *pages])

    def _leaving(self, inside: Sequence[int]) -> list[int]:
        """Ghosts that have, or come to have, at most one child; in the order in which they can go."""
        children = {version: set(self.catalog.children[version]) for version in inside}
        parents = {version: self.catalog.versions[version].parent for version in inside}
        leaving: dict[int, None] = {}
        again = True
        while again:
            again = False
            for version in inside:
                if version in leaving or len(children[version]) > 1:
                    continue
                leaving[version] = None
                again = True
                parent = parents[version]
                for child in children[version]:
                    if child in parents:
                        parents[child] = parent
                if parent in children:
                    children[parent].discard(version)
                    children[parent].update(children[version])
        return [*leaving]

    def sweep(self, plan: SweepPlan) -> None:
        """Do what was planned."""
        catalog = self.catalog
        space.free_blocks(self.core, plan.blocks)
        self.core.page_file.free_pages(plan.pages)
        touched: set[int] = set()
        for version, root in plan.roots.items():
            catalog.versions[version].root = root
            catalog.versions[version].stirred = False
            touched.update(catalog.children[version])
        for version in plan.leaving:
            touched.update(catalog.children[version])
            catalog.remove(version)
        for version in touched:
            if version in self.volumes:
                self._settle(version)
        self._forget_images()

    def _forget_images(self) -> None:
        """Let go of images that no version refers to."""
        held = {record.backing for record in self.catalog.versions.values()}
        held |= {disk.origin for disk in self.catalog.disks.values() if disk.origin_kind == "image"}
        for number in [number for number in self.catalog.backings if number not in held]:
            self.backings.forget(self.catalog.backings.pop(number))

    def stirred(self) -> list[int]:
        """Ghosts that may hold what nobody needs."""
        for version in self.volumes:
            self._note_stirred(version)
        return [record.id for record in self.catalog.of_kind("ghost") if record.stirred]

    def _note_stirred(self, head: int) -> None:
        """Mark the ghost above a head that took a block away from it."""
        parent = self.catalog.versions[head].parent
        if parent and self.volumes[head].take_stirred():
            self.catalog.versions[parent].stirred = True

    def unique_blocks(self, versions: Iterable[int]) -> int:
        """How many blocks would be free if these versions were deleted."""
        inside, beside = self.catalog.part(versions)
        blocks, _ = self._only_in(inside, [self.root(other) for other in beside])
        return len(blocks)
