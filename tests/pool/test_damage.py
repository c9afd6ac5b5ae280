"""Damaged and forged pools: the right content or a typed error, never wrong bytes, never the end of the process.

Each byte of a small pool's metadata is flipped, files are cut, emptied, removed and swapped; then structures with right
checksums and values that no pool has (tests/support/hostile.py) are worked on as users do.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import DamagedError, Error
from snapcore.pool import Disk, Pool, Snapshot
from tests.support import hostile
from tests.support.hostile import NAMES, Pieces, read_everything
from tests.support.mediums import Unsynced
from tests.support.pools import quick_folder

METADATA = ("superblock", "map", "log")
_MEMORY_KIB = 512 << 10


@dataclass(frozen=True)
class Pools:
    """A pool that was closed and one that crashed with commits in its log, and what they hold."""

    folder: Path
    closed: Pieces
    crashed: Pieces
    contents: dict[str, hostile.Contents]

    def pieces(self, state: str) -> Pieces:
        return dict(self.closed if state == "closed" else self.crashed)


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    folder = quick_folder()
    closed, crashed = hostile.small_pool(folder)
    contents = {}
    for state, pieces in (("closed", closed), ("crashed", crashed)):
        contents[state] = read_everything(hostile.build(pieces, folder / state))
        assert len(contents[state]) > 3
    yield Pools(folder, closed, crashed, contents)
    shutil.rmtree(folder)


def right_or_error(folder: Path, expected: hostile.Contents) -> str:
    """Open and read all, without writing: each version as it was, or an error. Says what came of it."""
    try:
        pool = Pool.open(folder, medium=Unsynced(), background=False, read_only=True)
    except Error as error:
        return type(error).__name__
    outcome = "right"
    try:
        versions: dict[str, Disk | Snapshot] = {f"disk {disk.name}": disk for disk in pool.disks()}
        versions |= {f"snapshot {snapshot.id}": snapshot for snapshot in pool.snapshots()}
        assert versions.keys() == expected.keys()
        for name, version in versions.items():
            try:
                assert version.pread(1 << 20, 0) == expected[name], f"wrong bytes of {name}"
            except Error:
                outcome = "a version cannot be read"
    finally:
        pool._engine.abandon()
    return outcome


def works_or_error(folder: Path, expected: hostile.Contents) -> None:
    """Open to write, delete what there is, write; whatever is not an error is right."""
    try:
        pool = Pool.open(folder, medium=Unsynced(), background=False)
    except Error:
        return
    try:
        for snapshot in pool.snapshots()[::2]:
            snapshot.delete()
            del expected[f"snapshot {snapshot.id}"]
        for disk in pool.disks():
            disk.pwrite(b"new", 10)
            before = expected[f"disk {disk.name}"]
            expected[f"disk {disk.name}"] = before[:10] + b"new" + before[13:]
        pool.close()
    except Error:
        pool._engine.abandon()
        # What was under way when it failed may be there or not.
        for name in [name for name in expected if name.startswith("disk")]:
            del expected[name]
        try:
            pool = Pool.open(folder, medium=Unsynced(), background=False)
        except Error:
            return
        for snapshot in pool.snapshots():
            try:
                assert snapshot.pread(1 << 20, 0) == expected.get(f"snapshot {snapshot.id}", snapshot.pread(1 << 20, 0))
            except Error:
                continue
        pool._engine.abandon()
        return
    right_or_error(folder, expected)


def flipped(pools: Pools, state: str, name: str, first: int, stride: int, *, work_every: int) -> dict[str, int]:
    """Flip each byte in turn; how often what came of it."""
    pieces, expected = pools.pieces(state), pools.contents[state]
    whole = pieces[name]
    outcomes: dict[str, int] = {}
    folder = hostile.build(pieces, pools.folder / "flipped")
    dice = random.Random(first)
    path = folder / name
    with path.open("r+b", buffering=0) as file:
        for number, at in enumerate(range(first, len(whole), stride)):
            wrong = bytes([whole[at] ^ dice.choice((1, 2, 4, 8, 16, 32, 64, 128, 255))])
            os.pwrite(file.fileno(), wrong, at)
            outcome = right_or_error(folder, expected)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            os.pwrite(file.fileno(), whole[at : at + 1], at)
            if number % work_every == 0:
                pieces[name] = whole[:at] + wrong + whole[at + 1 :]
                works_or_error(hostile.build(pieces, pools.folder / "worked"), dict(expected))
    return outcomes


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("state", ["closed", "crashed"])
def test_a_flipped_byte_is_harmless_or_found(pools: Pools, state: str, name: str) -> None:
    outcomes = flipped(pools, state, name, 3, 37, work_every=20)
    # Both copies of the superblock, and what of a log lies behind its end, are no loss.
    assert outcomes["right"]
    if name == "map" or (name == "log" and state == "crashed"):
        assert outcomes["DamagedError"]
    if name == "superblock":
        assert {*outcomes} == {"right"}


@pytest.mark.campaign
@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("state", ["closed", "crashed"])
def test_each_byte_flipped_is_harmless_or_found(pools: Pools, state: str, name: str) -> None:
    print(state, name, flipped(pools, state, name, 0, 1, work_every=10))


@pytest.mark.parametrize("state", ["closed", "crashed"])
@pytest.mark.parametrize("name", [*METADATA, "data"])
def test_a_file_that_is_short_empty_or_gone_gives_the_right_bytes_or_an_error(
    pools: Pools, state: str, name: str
) -> None:
    whole = pools.pieces(state)[name]
    lengths = sorted(
        {0, 1, 511, 512, 4096, 4608, len(whole) // 2, len(whole) - 1, *range(0, len(whole), len(whole) // 15)}
    )
    outcomes = set()
    for length in [length for length in lengths if length < len(whole)]:
        pieces = {**pools.pieces(state), name: whole[:length]}
        outcomes.add(right_or_error(hostile.build(pieces, pools.folder / "short"), pools.contents[state]))
        works_or_error(hostile.build(pieces, pools.folder / "short"), dict(pools.contents[state]))
    folder = hostile.build(pools.pieces(state), pools.folder / "gone")
    (folder / name).unlink()
    with pytest.raises(Error, match=f"pool|{name}"):
        Pool.open(folder, background=False)
    shutil.rmtree(folder)
    if name in ("map", "data"):
        assert "right" not in outcomes


def test_a_lock_file_says_nothing_and_must_be_there(pools: Pools) -> None:
    folder = hostile.build(pools.closed, pools.folder / "locked")
    (folder / "lock").write_bytes(b"anything")
    assert right_or_error(folder, pools.contents["closed"]) == "right"
    (folder / "lock").unlink()
    with pytest.raises(Error, match="No such file"):
        Pool.open(folder, background=False)


@pytest.mark.parametrize("state", ["closed", "crashed"])
@pytest.mark.parametrize("name", METADATA)
def test_a_file_of_another_pool_is_noticed_or_not_needed(pools: Pools, state: str, name: str) -> None:
    other = pools.folder / f"other-{state}-{name}"
    other.mkdir()
    strangers = hostile.small_pool(other)
    for stranger in strangers:
        pieces = {**pools.pieces(state), name: stranger[name]}
        outcome = right_or_error(hostile.build(pieces, pools.folder / "swapped"), pools.contents[state])
        # A pool that was closed needs no log.
        assert outcome == ("right" if (name, state) == ("log", "closed") else "DamagedError")
        works_or_error(hostile.build(pieces, pools.folder / "swapped"), dict(pools.contents[state]))


def test_an_older_map_under_a_newer_superblock_is_noticed(pools: Pools) -> None:
    folder = hostile.build(pools.closed, pools.folder / "older")
    with Pool.open(folder, medium=Unsynced(), background=False) as pool:
        pool.open_disk("first").pwrite(b"newer" * 5000, 0)
    pieces = {**hostile.pieces_of(folder), "map": pools.closed["map"]}
    with pytest.raises(DamagedError):
        read_everything(hostile.build(pieces, folder))


@given(seed=st.integers(0, 1 << 64), state=st.sampled_from(["closed", "crashed"]))
def test_a_forged_pool_does_no_harm(pools: Pools, seed: int, state: str) -> None:
    pieces, dice = pools.pieces(state), random.Random(seed)
    for _ in range(dice.choice((1, 1, 2, 3))):
        dice.choice(hostile.MUTATIONS)(pieces, dice)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    folder = pools.folder / "forged"
    shutil.rmtree(folder, ignore_errors=True)
    attack = hostile.Attack(hostile.build(pieces, folder), dice, Unsynced())
    attack.run()
    assert attack.outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before_kib + _MEMORY_KIB


def forged_log(pools: Pools, payloads: list[bytes]) -> Path:
    """The closed pool with these commits in its log."""
    pieces = dict(pools.closed)
    hostile.with_log(pieces, payloads)
    shutil.rmtree(pools.folder / "logged", ignore_errors=True)
    return hostile.build(pieces, pools.folder / "logged")


def test_a_forged_log_that_fits_is_done(pools: Pools) -> None:
    folder = forged_log(pools, [hostile.event_record({"type": "rename", "disk": 1, "name": "renamed"})])
    with Pool.open(folder, medium=Unsynced(), background=False) as pool:
        assert "renamed" in [disk.name for disk in pool.disks()]


HOSTILE_RECORDS = {
    "a version that is not there": hostile.map_record(999, 0, 1, 0),
    "a block that another version has": hostile.map_record(2, 9, 1, 3),
    "a block far beyond the data": hostile.map_record(2, 9, 1, (1 << 40) - 2),
    "a run that ends beyond the data": hostile.map_record(2, 9, 100, 500),
    "positions beyond the disk": hostile.map_record(2, 1 << 39, 5, 0),
    "a record of no kind": (7).to_bytes(4, "little") + bytes(20),
    "half a record": hostile.map_record(2, 9, 1, 0)[:17],
    "an event of no kind": hostile.event_record({"type": "x"}),
    "an event that is none": hostile.event_record([1, 2, 3]),
    "a disk whose number is taken": hostile.event_record(
        {"type": "disk", "disk": 1, "version": 2, "name": "x", "size_bytes": 4096, "created_ns": 0}
    ),
    "a disk from nothing": hostile.event_record(
        {"type": "disk", "disk": 900, "version": 901, "name": "x", "size_bytes": 4096, "created_ns": 0, "parent": 850}
    ),
    "a cut that is its own parent": hostile.event_record({"type": "cut", "cuts": [[1, 2, "x"]], "created_ns": 0}),
    "a number beyond all": hostile.event_record(
        {"type": "cut", "cuts": [[1, (1 << 64) - 1, "x"]], "created_ns": 0}
    ),
    "two cuts of one number": hostile.event_record(
        {"type": "cut", "cuts": [[1, 900, "x"], [1, 900, "y"]], "created_ns": 0}
    ),
    "a clone of one number": hostile.event_record(
        {"type": "clone", "source": 1, "ghost": 900, "disk": 900, "version": 900, "name": "x", "created_ns": 0,
         "size_bytes": 4096}
    ),
    "a head under a head": hostile.event_record(
        {"type": "rehead", "disk": 1, "version": 900, "parent": 2, "size_bytes": 4096, "backing": 0}
    ),
    "an image that is not there": hostile.event_record(
        {"type": "rehead", "disk": 1, "version": 900, "parent": 0, "size_bytes": 4096, "backing": 77}
    ),
    "a size of less than nothing": hostile.event_record({"type": "resize", "disk": 1, "size_bytes": -1}),
    "a size beyond all": hostile.event_record({"type": "resize", "disk": 1, "size_bytes": 1 << 60}),
    "the deletion of a head": hostile.event_record({"type": "delete", "versions": [2]}),
    "the sweep of a head": hostile.event_record({"type": "sweep", "version": 2}),
    "a name that is taken": hostile.event_record({"type": "rename", "disk": 1, "name": "second"}),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE_RECORDS)
def test_a_record_that_fits_nothing_is_damage_and_changes_nothing(pools: Pools, what: str) -> None:
    folder = forged_log(pools, [HOSTILE_RECORDS[what]])
    before = hostile.pieces_of(folder)
    with pytest.raises(DamagedError):
        Pool.open(folder, medium=Unsynced(), background=False)
    assert hostile.pieces_of(folder) == before


def test_a_tree_whose_pages_hold_one_another_many_times_takes_no_time_and_no_memory(pools: Pools) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(12):
        pieces, dice = dict(pools.closed), random.Random(seed)
        hostile.shared_pages(pieces, dice)
        shutil.rmtree(pools.folder / "endless", ignore_errors=True)
        hostile.Attack(hostile.build(pieces, pools.folder / "endless"), dice, Unsynced()).run()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before_kib + _MEMORY_KIB


def test_what_a_catalog_says_of_images_opens_nothing_that_waits(pools: Pools) -> None:
    fifo = pools.folder / "fifo"
    os.mkfifo(fifo)
    for path in (str(fifo), "/nowhere/\0", "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace")):
        pieces = dict(pools.closed)
        catalog = hostile.catalog_of(pieces)
        assert catalog is not None and catalog["backings"]
        catalog["backings"][0]["path"] = path
        hostile.with_catalog(pieces, msgspec.msgpack.encode(catalog))
        pool = Pool.open(hostile.build(pieces, pools.folder / "images"), medium=Unsynced(), background=False)
        with pytest.raises(Error):
            pool.open_disk("over").pread(4096, 0)
        pool.close()


assert {*METADATA} < {*NAMES}
