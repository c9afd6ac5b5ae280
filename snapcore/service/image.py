"""Images of machines: made of a pool's disks and of image files, exported, and launched (docs/DESIGN.md, "Images").

An image itself is the repository's (`Repository.create_image`); here is what needs a pool or image files beside it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from snapcore.errors import Error, NotFoundError, RefusedError, UsageError
from snapcore.pool import Disk, NewDisk, Pool, Region
from snapcore.pool import Snapshot as LocalSnapshot
from snapcore.progress import ProgressCallback
from snapcore.repository import Image, ImageDisk, KeyChoice, Labels, Manifest, Repository
from snapcore.repository.images import SYSTEM, full_device
from snapcore.service.archives import Archives
from snapcore.source import Source

Thing = TypeVar("Thing")
_NUMBER = re.compile(r"#+")


def create_from_pool(
    archives: Archives,
    repository: Repository,
    labels: Labels,
    system: Disk | LocalSnapshot,
    data: Mapping[str, Disk | LocalSnapshot | int] | None = None,
    *,
    key: str | KeyChoice | None = None,
    min_size_bytes: int | None = None,
    checksums: bool = False,
    progress: ProgressCallback | None = None,
) -> Image:
    """Make an image of disks or snapshots of a pool, which are archived first where they are not yet.

    Parameters
    ----------
    archives : Archives
    repository : Repository
    labels : Labels
    system : Disk or Snapshot
        Of disks snapshots are cut, all at one instant.
    data : mapping of str to Disk, Snapshot or int, optional
        As for `Repository.create_image`.
    key : str or NO_KEY, optional
        As for `Archives.archive`.
    min_size_bytes, checksums
        As for `Repository.create_image`.
    progress : callable, optional
        Called from other threads; raising there cancels.
    """
    labels.check()
    wanted: dict[str, Disk | LocalSnapshot | int] = {SYSTEM: system, **_by_device(data or {})}
    live = {device: item for device, item in wanted.items() if isinstance(item, Disk)}
    if live:
        wanted.update(zip(live, archives.pool.snapshot_group([*live.values()]), strict=True))
    begun = [
        (device, archives.archive(repository, item, key=key, progress=progress))
        for device, item in wanted.items()
        if isinstance(item, LocalSnapshot)
    ]
    found: dict[str, Manifest | int] = {device: item for device, item in wanted.items() if isinstance(item, int)}
    found |= {device: item.result().archived for device, item in begun}
    return _create(repository, labels, found, min_size_bytes, checksums, progress)


def _create(
    repository: Repository,
    labels: Labels,
    found: dict[str, Manifest | int],
    min_size_bytes: int | None,
    checksums: bool,
    progress: ProgressCallback | None,
) -> Image:
    rest = dict(found)
    system = rest.pop(SYSTEM)
    assert isinstance(system, Manifest)
    return repository.create_image(
        labels.name,
        system,
        rest,
        architecture=labels.architecture,
        boot=labels.boot,
        os=labels.os,
        min_size_bytes=min_size_bytes,
        tags=labels.tags,
        checksums=checksums,
        progress=progress,
    )


def take(
    repository: Repository,
    labels: Labels,
    system: Source,
    data: Mapping[str, Source | int] | None = None,
    *,
    key: str | KeyChoice | None = None,
    min_size_bytes: int | None = None,
    checksums: bool = False,
    progress: ProgressCallback | None = None,
) -> Image:
    """Make an image of open image files: snapshots of them, then the image.

    The chain of the system disk is called as the image, those of others have the device behind that: what a later
    version of an image has in common with an earlier one is stored once. When it fails, what it took is deleted.

    Parameters
    ----------
    system : Source
        As `open_image` opens them.
    data : mapping of str to Source or int, optional
        By device; an int is the size of an empty disk.
    key : str or NO_KEY, optional
        As for `Repository.snapshot`.
    """
    labels.check()
    found: dict[str, Manifest | int] = {}
    try:
        for device, source in {SYSTEM: system, **_by_device(data or {})}.items():
            if isinstance(source, int):
                found[device] = source
                continue
            chain = _named(labels.name, device)
            found[device] = repository.snapshot(source, disk=chain, key=key, progress=progress).snapshot
        return _create(repository, labels, found, min_size_bytes, checksums, progress)
    except BaseException:
        for taken in found.values():
            # What went wrong first counts.
            with contextlib.suppress(Error):
                if isinstance(taken, Manifest):
                    repository.delete(taken)
        raise


def _by_device(data: Mapping[str, Thing]) -> dict[str, Thing]:
    found: dict[str, Thing] = {}
    for device, source in data.items():
        if full_device(device) in (SYSTEM, *found):
            raise UsageError(f"{full_device(device)} is one disk: two were given for it")
        found[full_device(device)] = source
    return found


def _named(name: str, device: str) -> str:
    """What a disk of a machine is called: as the machine, and behind it the device unless it is the system's."""
    return name if device == SYSTEM else f"{name}-{os.path.basename(device)}"


def delete(repository: Repository, ref: str, *, with_snapshots: bool = False) -> tuple[str, list[str]]:
    """Delete an image. Returns its id and those of the snapshots that went with it.

    Parameters
    ----------
    with_snapshots : bool
        Delete its snapshots too, but those that other images hold.
    """
    if not with_snapshots:
        return repository.delete_image(ref), []
    image = repository.image(ref)
    repository.delete_image(image)
    kept = {item.id for other in repository.images() for item in other.snapshots}
    gone = []
    for item in image.snapshots:
        if item.id not in kept and item.id not in gone:
            # Another image may have come to hold it, or somebody deleted it.
            with contextlib.suppress(RefusedError, NotFoundError):
                gone.append(repository.delete(item))
    return image.id, gone


def targets(image: Image, target: str) -> list[tuple[ImageDisk, Manifest, str]]:
    """What is exported: the system disk to `target`, and beside it each data disk, with its device in the name."""
    stem, ending = os.path.splitext(target)
    return [
        (
            disk,
            disk.snapshot,
            target if disk.device == SYSTEM else f"{stem}-{os.path.basename(disk.device)}{ending}",
        )
        for disk in image.disks
        if disk.snapshot is not None
    ]


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine's disks.

    Attributes
    ----------
    name : str
    disks : list of (str, Disk)
        By device, the system disk first.
    """

    name: str
    disks: list[tuple[str, Disk]]


def names(pattern: str, count: int, first: int = 1) -> list[str]:
    """Names of machines: a run of # in the pattern is a number of at least so many digits."""
    runs = _NUMBER.findall(pattern)
    if len(runs) > 1 or (count > 1 and not runs):
        raise UsageError(f"the name of several machines has one run of #, which is their number, not {pattern!r}")
    if count < 1 or first < 0:
        raise UsageError("at least one machine is made, and none has a number below 0")
    if not runs:
        return [pattern]
    return [pattern.replace(runs[0], str(number).zfill(len(runs[0]))) for number in range(first, first + count)]


def launch(
    pool: Pool,
    repository: Repository,
    image: Image,
    machines: Sequence[str],
    *,
    size_bytes: int | None = None,
    whole: bool = False,
    progress: ProgressCallback | None = None,
) -> list[Machine]:
    """Make the disks of machines, all or none. They can be used at once: what they read is fetched.

    Parameters
    ----------
    pool : Pool
        Opened with regions.
    repository : Repository
        That the image is in.
    machines : sequence of str
        Their names: the system disks are called so, others have the device behind that.
    size_bytes : int, optional
        Of the system disks; default: the image's minimum.
    whole : bool
        Return when all is here, once for all machines, and the repository is not needed any more.
    progress : callable, optional
        Of that fetching; raising there cancels, and no disk is left.

    Raises
    ------
    ExistsError
        There is a disk of one of the names.
    UsageError
        The size is below the image's minimum, or so many disks are not made at once.
    """
    least = image.disks[0].min_size_bytes
    if size_bytes is not None and size_bytes < least:
        raise UsageError(f"the image {image.name} needs a system disk of {least} bytes, more than {size_bytes}")
    wanted = [
        NewDisk(
            _named(machine, disk.device),
            size_bytes if size_bytes is not None and disk.device == SYSTEM else disk.min_size_bytes,
            None if disk.snapshot is None else _region(repository, disk.snapshot),
        )
        for machine in machines
        for disk in image.disks
    ]
    made = pool.create_disks(wanted)
    count = len(image.disks)
    if whole:
        try:
            # All machines share what is fetched for the first.
            for disk in made[:count]:
                disk.decouple(progress)
        except BaseException:
            for disk in made:
                with contextlib.suppress(Error):
                    pool.delete_disk(disk)
            raise
    devices = [disk.device for disk in image.disks]
    return [
        Machine(name, list(zip(devices, made[at * count : (at + 1) * count], strict=True)))
        for at, name in enumerate(machines)
    ]


def _region(repository: Repository, snapshot: Manifest) -> Region:
    return Region(repository.url, repository.id, snapshot.id, repository.chunk_bytes)
