"""`kill -9` at any instant of eight writing threads: nothing that was flushed or acknowledged is lost.

What reached the operating system survives a kill, so this asks about order in memory and between threads, which a
recorded run of one thread cannot; the crashes of power are in test_crash.py.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from snapcore.pool import Disk, Pool, Snapshot
from tests.support import pool_worker
from tests.support.pool_worker import BLOCK_BYTES, DISK_BLOCKS, OWN_BLOCKS, THREADS, disk_of, sector_count
from tests.support.pools import quick_folder
from tests.support.promises import exact

_SECTORS = 8


@dataclass
class Promised:
    """What killed processes have said.

    Attributes
    ----------
    durable : dict of (thread, block) to int
        The count that a block holds at least.
    latest : dict of (thread, block) to int
        The last count that was tried to be written.
    cutting, cut : dict of name to dict of (thread, block) to int
        What was durable when a cut began, and had been tried when it had returned.
    """

    durable: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    latest: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    snapshots: dict[str, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    cutting: dict[str, dict[tuple[int, int], int]] = field(default_factory=dict)
    cut: dict[str, dict[tuple[int, int], int]] = field(default_factory=dict)
    deleting: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    clones: set[str] = field(default_factory=set)
    cloning: set[str] = field(default_factory=set)
    dropping: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    said: int = 0
    flushes: int = 0

    def hear(self, output: str) -> None:
        """Take in what a process said; a line that the kill cut short was not said."""
        tried: dict[tuple[int, int], int] = {}
        for line in output[: output.rfind("\n") + 1].splitlines():
            self.said += 1
            word, *rest = line.split()
            if word == "writing":
                thread, block, count = map(int, rest)
                self.latest[thread, block] = tried[thread, block] = count
            elif word == "written":
                self.flushes += 1
                thread = int(rest[0])
                for key in [key for key in tried if key[0] == thread]:
                    self.durable[key] = tried.pop(key)
            elif word == "cut":
                self.names.add(rest[0])
                self.cut[rest[0]] = dict(self.latest)
                self.snapshots.update(dict(part.split(":") for part in rest[1:]))
            elif word == "cloned":
                self.clones.add(rest[0])
            elif word == "cutting":
                self.cutting[rest[0]] = dict(self.durable)
            elif word in ("deleting", "deleted", "cloning", "dropping", "dropped"):
                getattr(self, word).add(rest[0])


def counts(version: Disk | Snapshot, disk: str, highest: dict[tuple[int, int], int]) -> dict[tuple[int, int], int]:
    """The lowest count in each block, all sectors of which must be what the block's own thread wrote."""
    data = version.pread(version.size_bytes, 0)
    assert len(data) == DISK_BLOCKS * BLOCK_BYTES
    found = {}
    for thread in (thread for thread in range(THREADS) if disk_of(thread) == disk):
        for block in range(OWN_BLOCKS):
            at = (thread % 2 * OWN_BLOCKS + block) * BLOCK_BYTES
            sectors = [data[at + 512 * i : at + 512 * (i + 1)] for i in range(_SECTORS)]
            said = [sector_count(sector, thread, block, number) for number, sector in enumerate(sectors)]
            assert max(said) <= highest.get((thread, block), 0), "a block holds what nobody wrote"
            found[thread, block] = min(said)
    return found


def check(place: Path, promised: Promised, remembered: dict[str, bytes]) -> None:
    """All that was promised is there, and the space is exact."""
    pool = Pool.open(place, background=False)
    exact(pool)
    disks = {disk.name: disk for disk in pool.disks()}
    for thread in range(0, THREADS, 2):
        found = counts(disks.pop(disk_of(thread)), disk_of(thread), promised.latest)
        for key, count in found.items():
            assert count >= promised.durable[key], f"flushed block {key} has {count}, not {promised.durable[key]}"
            # What is there now is there for good: recovery has written it down.
            promised.durable[key] = count
    assert disks.keys() <= promised.cloning - promised.dropped
    assert promised.clones - promised.dropping <= disks.keys()
    promised.dropping &= promised.dropped
    promised.clones &= disks.keys()
    snapshots = {snapshot.id: snapshot for snapshot in pool.snapshots()}
    assert promised.snapshots.keys() - promised.deleting <= snapshots.keys()
    assert not promised.deleted & snapshots.keys()
    promised.deleting &= promised.deleted
    for number, snapshot in snapshots.items():
        assert snapshot.name in promised.cutting
        latest = promised.cut.get(snapshot.name, promised.latest)
        for key, count in counts(snapshot, snapshot.disk, latest).items():
            assert count >= promised.cutting[snapshot.name].get(key, 0), "a snapshot lacks what was flushed before it"
        content = snapshot.pread(snapshot.size_bytes, 0)
        assert remembered.setdefault(number, content) == content, "a snapshot has changed"
        promised.snapshots[number] = snapshot.disk
    promised.snapshots = {number: disk for number, disk in promised.snapshots.items() if number in snapshots}
    pool.close()
    pool = Pool.open(place, background=False)
    exact(pool)
    pool.close()


@contextlib.contextmanager
def worker(place: Path, output: Path, seed: int, start: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has opened the pool; it is killed in the end."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, pool_worker.__file__, str(place), str(seed), str(start)], stdout=file
        )
        try:
            while not output.read_bytes().startswith(b"ready\n"):
                assert process.poll() is None, "the worker ended by itself"
                time.sleep(0.005)
            yield process
        finally:
            process.kill()
            process.wait()


def rounds(folder: Path, number: int, seed: int) -> Promised:
    """Kill so many workers; after each, all must be as promised."""
    place, output = folder / "pool", folder / "output"
    pool_worker.create(place)
    dice = random.Random(seed)
    promised = Promised()
    remembered: dict[str, bytes] = {}
    for round_ in range(number):
        highest = max(promised.latest.values(), default=0)
        with worker(place, output, seed + round_, highest + 1) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(dice.uniform(0.0, 0.4))
            assert process.poll() is None, "the worker ended by itself"
        promised.hear(output.read_text())
        check(place, promised, remembered)
    return promised


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory: a kill is no power cut, and the rounds are short."""
    made = quick_folder()
    yield made
    shutil.rmtree(made)


def test_whoever_is_killed_loses_nothing(folder: Path) -> None:
    promised = rounds(folder, 4, seed=1)
    assert promised.flushes and promised.said


@pytest.mark.campaign
def test_a_campaign_of_kills(folder: Path) -> None:
    """`SNAPCORE_KILLS` rounds, 300 unless told."""
    promised = rounds(folder, int(os.environ.get("SNAPCORE_KILLS", "300")), seed=int(time.time()))
    print(
        f"{promised.said} lines heard, {promised.flushes} flushes, {len(promised.names)} cuts, "
        f"{len(promised.deleted)} deletions, {len(promised.dropped)} dropped clones"
    )
