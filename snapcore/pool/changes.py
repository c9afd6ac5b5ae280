"""Changes of versions: each looks at the catalog and refuses, or says which event does it.

What is returned is what `Engine.change` asks for: the event, the disks whose writers must wait, and the result. Nothing
is changed here: the event is logged and applied by the engine (`versions`).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from typing import TypeVar

from snapcore.errors import ExistsError, RefusedError, UsageError, from_os_error
from snapcore.pool import events
from snapcore.pool.backings import path_of
from snapcore.pool.catalog import Backing, Catalog, Region, Version

MAX_SIZE_BYTES = 1 << 47
_NAME = re.compile(r"[^\W\d_][^\x00-\x1f/]{0,127}")

Result = TypeVar("Result")
Prepared = tuple[events.Event, list[int], Result]
# Name, size, and a snapshot, an image that fills up, or nothing.
Wanted = tuple[str, int | None, Version | Backing | None]


def check_new_name(catalog: Catalog, folder: str, name: str) -> None:
    """Refuse what is no name for a disk, or another disk's."""
    if not _is_name(name):
        raise UsageError(f"{name!r} is no name for a disk: a letter first, at most 128 characters, no slash")
    if any(record.name == name for record in catalog.disks.values()):
        raise ExistsError(f"there is a disk {name!r} in {folder} already; choose another name")


def check_name_of_snapshot(name: str | None) -> None:
    """Refuse what is no name for a snapshot; it may have none."""
    if name is not None and not _is_name(name):
        raise UsageError(f"{name!r} is no name for a snapshot: a letter first, at most 128 characters, no slash")


def _is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and _is_text(name)


def _is_text(name: str) -> bool:
    """Whether it can be stored: names of files that are no UTF-8 hold what is no character."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _checked_size(name: str, size_bytes: int | None, least: int, source: str | None) -> int:
    if size_bytes is None:
        if source is None:
            raise UsageError(f"disk {name!r} needs a size")
        return least
    if not 0 < size_bytes <= MAX_SIZE_BYTES:
        raise UsageError(f"disk {name!r}: a size is 1 to {MAX_SIZE_BYTES} bytes, not {size_bytes}")
    if size_bytes < least:
        raise UsageError(f"disk {name!r}: {size_bytes} bytes are less than the {least} of {source}")
    return size_bytes


def make_disk(catalog: Catalog, name: str, size_bytes: int | None) -> Prepared[int]:
    """An empty disk; the result is its number, here and below."""
    return _new_disk(catalog, name, _checked_size(name, size_bytes, 0, None), 0, None)


def make_disk_from(
    catalog: Catalog, name: str, size_bytes: int | None, snapshot: Version, source: str
) -> Prepared[int]:
    """A disk with what a snapshot holds; `source` is how the user called that."""
    size = _checked_size(name, size_bytes, snapshot.size_bytes, source)
    return _new_disk(catalog, name, size, snapshot.id, None)


def make_disk_over(catalog: Catalog, name: str, size_bytes: int | None, image: str, source: str) -> Prepared[int]:
    """A disk that reads from an image what it has not got itself."""
    backing = _backing(image, catalog.next_id + 2)
    return _new_disk(catalog, name, _checked_size(name, size_bytes, backing.size_bytes, source), 0, backing)


def make_lazy_disk(catalog: Catalog, name: str, size_bytes: int | None, image: Backing, source: str) -> Prepared[int]:
    """A disk over an image that fills up; `image` is what `lazy_image` said."""
    return _new_disk(catalog, name, _checked_size(name, size_bytes, image.size_bytes, source), 0, image)


def lazy_image(catalog: Catalog, region: Region, size_bytes: int, used: int) -> Backing:
    """The image of a snapshot in a region: the one that there is, or a new one behind the `used` next numbers."""
    for record in catalog.backings.values():
        there = record.region
        if there is not None and (there.repository, there.snapshot) == (region.repository, region.snapshot):
            return record
    number = catalog.next_id + used
    return Backing(number, path_of(number), size_bytes, 0, region)


def _new_disk(catalog: Catalog, name: str, size_bytes: int, parent: int, backing: Backing | None) -> Prepared[int]:
    number = catalog.next_id
    return _making(number, name, size_bytes, parent, backing), [], number


def _making(number: int, name: str, size_bytes: int, parent: int, backing: Backing | None) -> events.MakeDisk:
    return events.MakeDisk(number, number + 1, name, size_bytes, time.time_ns(), parent, backing)


def make_disks(catalog: Catalog, wanted: Sequence[Wanted]) -> Prepared[list[int]]:
    """Several disks in one event; the result is their numbers, two after each other for each disk."""
    made = []
    for place, (name, size_bytes, source) in enumerate(wanted):
        called = None if source is None else f"what disk {name!r} is made from"
        size = _checked_size(name, size_bytes, 0 if source is None else source.size_bytes, called)
        parent = source.id if isinstance(source, Version) else 0
        backing = source if isinstance(source, Backing) else None
        made.append(_making(catalog.next_id + 2 * place, name, size, parent, backing))
    return events.MakeDisks(made), [], [item.disk for item in made]


def _backing(path: str, number: int) -> Backing:
    """The record of an image as it is now."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise from_os_error(error, f"opening the image {path}") from error
    found = Backing(number, os.path.abspath(path), status.st_size, status.st_mtime_ns)
    if not _is_text(found.path):
        raise UsageError(f"{found.path!r} cannot be under a disk: its name is no UTF-8; rename or import it")
    if not os.path.isfile(path) or not found.size_bytes:
        raise UsageError(f"{path} cannot be under a disk: it is no regular file, or an empty one; import it instead")
    return found


def clone(catalog: Catalog, disk: int, name: str, size_bytes: int | None) -> Prepared[int]:
    """A disk with what another one holds now."""
    record = catalog.disks[disk]
    size = _checked_size(name, size_bytes, catalog.versions[record.head].size_bytes, record.name)
    number = catalog.next_id
    return events.Clone(disk, number + 1, number, number + 2, name, time.time_ns(), size), [disk], number


def cut(catalog: Catalog, disks: Sequence[int], name: str | None) -> Prepared[list[int]]:
    """Snapshots of disks at one instant; the result is their numbers."""
    for disk in disks:
        _check_free_name(catalog, disk, name)
    first = catalog.next_id + 1
    versions = [first + i for i in range(len(disks))]
    cuts = [(disk, version, name or "") for disk, version in zip(disks, versions, strict=True)]
    group = catalog.next_id if len(disks) > 1 else 0
    return events.Cut(cuts, time.time_ns(), group, (name or "") if group else ""), [*disks], versions


def _check_free_name(catalog: Catalog, disk: int, name: str | None) -> None:
    for record in catalog.of_kind("snapshot") if name is not None else ():
        if record.disk == disk and record.name == name:
            raise ExistsError(f"disk {record.disk_name!r} has a snapshot {name!r} already; choose another name")


def roll_back(catalog: Catalog, disk: int, snapshot: Version) -> Prepared[None]:
    """A disk holds what its snapshot does."""
    if snapshot.disk != disk:
        raise RefusedError(
            f"snapshot {snapshot.name or snapshot.id} is of disk {snapshot.disk_name!r}, "
            f"not of {catalog.disks[disk].name!r}; make a new disk from it instead"
        )
    event = events.Rehead(disk, catalog.next_id, snapshot.id, snapshot.size_bytes, snapshot.backing)
    return event, [disk], None


def roll_back_to(catalog: Catalog, disk: int, image: Backing) -> Prepared[None]:
    """A disk holds what an image that fills up will."""
    return events.Rehead(disk, catalog.next_id, 0, image.size_bytes, image.id, image), [disk], None


def reset(catalog: Catalog, disk: int) -> Prepared[None]:
    """A disk holds what it was made from."""
    record = catalog.disks[disk]
    size = catalog.versions[record.head].size_bytes
    parent = backing = 0
    if record.origin_kind == "disk":
        raise RefusedError(
            f"disk {record.name!r} is a clone of a live disk, of which no snapshot was kept; "
            "clone from a snapshot to be able to reset"
        )
    if record.origin_kind == "snapshot":
        origin = catalog.versions.get(record.origin)
        if origin is None or origin.kind != "snapshot":
            raise RefusedError(f"the snapshot {record.origin} that disk {record.name!r} came from was deleted")
        parent, backing = origin.id, origin.backing
    elif record.origin_kind == "image":
        backing = record.origin
    return events.Rehead(disk, catalog.next_id, parent, size, backing), [disk], None


def resize(catalog: Catalog, disk: int, size_bytes: int) -> Prepared[None]:
    """A disk is longer."""
    record = catalog.disks[disk]
    least = catalog.versions[record.head].size_bytes
    size = _checked_size(record.name, size_bytes, least, "itself: disks only grow")
    return events.Resize(disk, size), [disk], None


def delete(catalog: Catalog, snapshots: Iterable[int]) -> Prepared[list[int]]:
    """Snapshots go; the result is their numbers, in order."""
    versions = sorted(snapshots)
    beside = catalog.part(versions)[1]
    heads = {catalog.versions[version].disk for version in beside if catalog.versions[version].kind == "head"}
    return events.Delete(versions), sorted(heads), versions
