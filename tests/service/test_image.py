"""Machines are made of images, images of disks and files; all or nothing, and every byte as it was."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapcore import (
    CancelledError,
    ExistsError,
    MemoryStore,
    NotFoundError,
    RefusedError,
    Repository,
    StoreError,
    UsageError,
    open_image,
)
from snapcore.pool import Pool
from snapcore.progress import Progress
from snapcore.repository import Labels, manifest
from snapcore.repository.domain import PLAIN
from snapcore.service import Archives, Regions, group, image
from snapcore.service.files import write_all
from tests.support.pools import MIB, check_space, quick_folder
from tests.support.regions import Watched
from tests.support.small import Bytes
from tests.support.tiers import archived_bytes, disk, local_bytes, scribble

SIZE = 2 * MIB + 512
DATA = random.Random(3).randbytes(MIB) + bytes(SIZE - MIB - 512) + b"end!" * 128
OTHER = random.Random(4).randbytes(70_000)
LABELS = Labels(name="debian", os="Debian 12")


class Places:
    """A repository, and the pool that fetches from it."""

    def __init__(self, folder: Path) -> None:
        self.store = Watched(MemoryStore(), lambda method, name: None)
        self.repository = Repository.create(self.store)
        regions = Regions(open_repository=lambda url: self.repository)
        self.pool = Pool.create(folder / "pool", background=False, regions=regions)


@pytest.fixture
def places() -> Iterator[Places]:
    folder = quick_folder()
    made = Places(folder)
    with made.pool:
        yield made
    shutil.rmtree(folder)


def test_machines_hold_what_the_image_does_and_each_is_its_own(places: Places) -> None:
    made = image.take(places.repository, LABELS, Bytes(DATA), {"xvdc": Bytes(OTHER), "xvdb": MIB})
    machines = image.launch(places.pool, places.repository, made, image.names("web-###", 7))
    assert [machine.name for machine in machines] == [f"web-00{number}" for number in range(1, 8)]
    for machine in machines:
        (xvda, system), (xvdb, empty), (xvdc, data) = machine.disks
        assert (xvda, xvdb, xvdc) == ("/dev/xvda", "/dev/xvdb", "/dev/xvdc")
        assert (system.name, empty.name) == (machine.name, f"{machine.name}-xvdb")
        assert (local_bytes(system), local_bytes(data), local_bytes(empty)) == (DATA, OTHER, bytes(MIB))
    machines[0].disks[0][1].pwrite(b"mine", 0)
    assert local_bytes(machines[1].disks[0][1]) == DATA
    check_space(places.pool)


def test_a_system_disk_has_the_least_size_of_the_image_or_a_larger_one(places: Places) -> None:
    made = image.take(places.repository, LABELS, Bytes(DATA), min_size_bytes=3 * MIB)
    for size_bytes, expected in ((None, 3 * MIB), (5 * MIB, 5 * MIB)):
        (machine,) = image.launch(places.pool, places.repository, made, [f"m{expected}"], size_bytes=size_bytes)
        assert local_bytes(machine.disks[0][1]) == DATA + bytes(expected - SIZE)
    with pytest.raises(UsageError, match="needs a system disk of"):
        image.launch(places.pool, places.repository, made, ["m"], size_bytes=3 * MIB - 1)


def test_a_name_that_is_taken_makes_none(places: Places) -> None:
    made = image.take(places.repository, LABELS, Bytes(DATA), {"xvdb": Bytes(OTHER)})
    places.pool.create_disk("m3-xvdb", MIB)
    with pytest.raises(ExistsError, match="m3-xvdb"):
        image.launch(places.pool, places.repository, made, image.names("m#", 5))
    assert [disk.name for disk in places.pool.disks()] == ["m3-xvdb"]


def test_whole_machines_need_the_repository_no_more_and_fetched_it_once(places: Places) -> None:
    made = image.take(places.repository, LABELS, Bytes(DATA), {"xvdb": Bytes(DATA), "xvdc": Bytes(OTHER)})
    read: list[str] = []
    places.store.hook = lambda method, name: read.append(name) if method == "get_range" else None
    steps: list[Progress] = []
    image.launch(places.pool, places.repository, made, image.names("m#", 20), whole=True, progress=steps.append)
    assert len(read) < 20 and steps

    def gone(method: str, name: str) -> None:
        raise StoreError("the region is gone")

    places.store.hook = gone
    for number in (1, 20):
        assert local_bytes(places.pool.open_disk(f"m{number}")) == DATA
        assert local_bytes(places.pool.open_disk(f"m{number}-xvdc")) == OTHER
    assert all(disk.hydration() is None for disk in places.pool.disks())


def test_a_launch_of_whole_machines_that_is_cancelled_leaves_none(places: Places) -> None:
    made = image.take(places.repository, LABELS, Bytes(DATA))

    def cancel(progress: Progress) -> None:
        raise CancelledError("enough")

    with pytest.raises(CancelledError):
        image.launch(places.pool, places.repository, made, image.names("m#", 5), whole=True, progress=cancel)
    assert places.pool.disks() == []
    image.launch(places.pool, places.repository, made, image.names("m#", 5))
    assert local_bytes(places.pool.open_disk("m5")) == DATA


@pytest.mark.parametrize(
    ("pattern", "count", "first", "expected"),
    [
        ("web", 1, 1, ["web"]),
        ("web-##", 2, 9, ["web-09", "web-10"]),
        ("n#.example", 1, 0, ["n0.example"]),
        ("web", 2, 1, None),
        ("#-#", 2, 1, None),
        ("web-#", 0, 1, None),
        ("web-#", 1, -1, None),
    ],
)
def test_names_are_numbered_where_the_pattern_says(
    pattern: str, count: int, first: int, expected: list[str] | None
) -> None:
    if expected is None:
        with pytest.raises(UsageError):
            image.names(pattern, count, first)
    else:
        assert image.names(pattern, count, first) == expected


def test_an_image_of_disks_of_a_pool_is_of_one_instant_and_of_what_changed(places: Places) -> None:
    pool, repository = places.pool, places.repository
    system, data = disk(pool, "web", 10, 1), disk(pool, "log", 6, 2)
    with Archives(pool) as archives:
        archives.archive(repository, system).result()
        scribble(system, 5, 1)
        made = image.create_from_pool(archives, repository, LABELS, system, {"xvdb": data, "xvdc": MIB})
    cuts = [item for item in pool.snapshots() if item.group is not None]
    assert len(cuts) == 2 and len({item.created_ns for item in cuts}) == 1
    first, second, empty = made.disks
    assert first.snapshot is not None and second.snapshot is not None and empty.snapshot is None
    assert archived_bytes(repository, first.snapshot) == local_bytes(system)
    assert archived_bytes(repository, second.snapshot) == local_bytes(data)
    assert first.snapshot.parent is not None and first.snapshot.changed_bytes < first.snapshot.written_bytes
    with Archives(pool) as archives:
        local = system.snapshot("again")
        again = image.create_from_pool(archives, repository, LABELS, local)
    assert again.snapshots[0].changed_bytes == 0


def test_an_image_that_cannot_be_made_of_files_leaves_no_snapshots(places: Places) -> None:
    kept = places.repository.snapshot(Bytes(OTHER), disk="debian").snapshot
    for data, error in (
        ({"xvda": Bytes(OTHER)}, UsageError),
        ({"sdb": Bytes(OTHER)}, UsageError),
        ({"xvdb": Bytes(OTHER), "/dev/xvdb": MIB}, UsageError),
        ({"xvdb": 0}, UsageError),
    ):
        with pytest.raises(error):
            image.take(places.repository, LABELS, Bytes(DATA), data)

    def fail(method: str, name: str) -> None:
        if method == "put_new" and name.startswith("images/"):
            raise StoreError("the region is gone")

    places.store.hook = fail
    with pytest.raises(StoreError):
        image.take(places.repository, LABELS, Bytes(DATA), {"xvdb": Bytes(OTHER)})
    assert [item.id for item in places.repository.snapshots()] == [kept.id]
    assert places.repository.images() == []


def test_the_next_version_of_an_image_stores_what_changed(places: Places) -> None:
    image.take(places.repository, LABELS, Bytes(DATA))
    changed = DATA[:MIB] + b"new" + DATA[MIB + 3 :]
    made = image.take(places.repository, LABELS, Bytes(changed))
    assert made.snapshots[0].changed_bytes == places.repository.chunk_bytes
    assert archived_bytes(places.repository, made.snapshots[0]) == changed


def test_an_image_goes_with_its_snapshots_but_those_of_others(places: Places) -> None:
    repository = places.repository
    made = image.take(repository, LABELS, Bytes(DATA), {"xvdb": Bytes(OTHER)})
    system = made.snapshots[0]
    other = repository.create_image("other", system)
    assert image.delete(repository, made.id, with_snapshots=True) == (made.id, [made.snapshots[1].id])
    assert image.delete(repository, "other") == (other.id, [])
    assert [item.id for item in repository.snapshots()] == [system.id]


def test_a_group_of_which_an_image_holds_a_member_stays_whole(places: Places) -> None:
    pool, repository = places.pool, places.repository
    disks = [disk(pool, "web", 4, 1), disk(pool, "log", 4, 2)]
    with Archives(pool) as archives:
        done = group.archive(archives, repository, group.cut(pool, archives.journal, disks))
    made = repository.create_image("debian", done.members[1].snapshot)
    with pytest.raises(RefusedError, match="image debian"):
        group.delete(repository, done.id)
    assert repository.groups() == [done] and len(repository.snapshots()) == 2
    repository.delete_image(made)
    group.delete(repository, done.id)
    assert repository.snapshots() == []


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vhd", "vmdk"])
def test_what_is_exported_is_what_was_imported(places: Places, tmp_path: Path, kind: str) -> None:
    made = image.take(places.repository, LABELS, Bytes(DATA), {"xvdb": 5, "xvdc": Bytes(OTHER + bytes(144))})
    wanted = image.targets(made, str(tmp_path / f"out.{kind}"))
    assert [Path(path).name for _, _, path in wanted] == [f"out.{kind}", f"out-xvdc.{kind}"]
    write_all(places.repository, [item[1:] for item in wanted], kind)
    again = []
    for (_, _, path), expected in zip(wanted, (DATA, OTHER), strict=True):
        with open_image(path, kind) as source:
            again.append(image.take(places.repository, Labels(name=f"again{len(again)}"), source))
        assert archived_bytes(places.repository, again[-1].snapshots[0])[: len(expected)] == expected
    assert again[0].snapshots[0].root == made.snapshots[0].root


def test_an_export_writes_all_files_or_none(places: Places, tmp_path: Path) -> None:
    made = image.take(places.repository, LABELS, Bytes(DATA), {"xvdb": Bytes(OTHER)})
    wanted = [item[1:] for item in image.targets(made, str(tmp_path / "out.img"))]
    (tmp_path / "out-xvdb.img").write_bytes(b"somebody's")
    with pytest.raises(ExistsError, match="out-xvdb"):
        write_all(places.repository, wanted)
    (tmp_path / "out-xvdb.img").unlink()
    steps = 0

    def cancel(progress: Progress) -> None:
        nonlocal steps
        steps += progress.done_bytes == 0
        if steps == 2:
            raise CancelledError("enough")

    with pytest.raises(CancelledError):
        write_all(places.repository, wanted, progress=cancel)
    assert steps == 2 and list(tmp_path.glob("out*")) == []


def test_an_image_whose_snapshot_has_no_manifest_any_more_is_exported_and_makes_no_lazy_machines(
    places: Places, tmp_path: Path
) -> None:
    """Its maker died while somebody deleted the snapshot: when the image goes, nothing keeps that for a lazy disk."""
    made = image.take(places.repository, LABELS, Bytes(DATA))
    (held,) = made.snapshots
    manifest.delete(places.store, manifest.name(PLAIN, held.disk, held.sequence, held.id), PLAIN)
    for _ in range(3):
        places.repository.collect()
    write_all(places.repository, [item[1:] for item in image.targets(made, str(tmp_path / "out.img"))])
    assert (tmp_path / "out.img").read_bytes() == DATA
    with pytest.raises(NotFoundError, match="any more"):
        image.launch(places.pool, places.repository, made, ["web"])
    assert places.pool.disks() == []


def test_machines_pin_what_they_are_made_of_and_whole_ones_do_not(places: Places) -> None:
    made = image.take(places.repository, LABELS, Bytes(DATA), {"xvdb": Bytes(OTHER)})
    machines = image.launch(places.pool, places.repository, made, image.names("m#", 3))
    places.repository.delete_image(made)
    for snapshot in made.snapshots:
        assert len(places.repository.pins(snapshot)) == 1
        with pytest.raises(RefusedError, match="is needed by"):
            places.repository.delete(snapshot)
    for _, item in machines[0].disks:
        item.decouple()
    places.pool.close()
    assert places.repository.pins() == []
