"""`kill -9` at any instant of real work: nothing acknowledged is lost, and nobody has to clean up."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from snapcore import Repository
from snapcore.repository import session
from tests.support import worker

_PATIENCE_S = 60.0


@dataclass
class Promised:
    """What killed processes have said."""

    taking: set[str] = field(default_factory=set)
    taken: dict[str, str] = field(default_factory=dict)
    deleting: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    restored: int = 0

    def hear(self, output: str) -> None:
        # A line that the kill cut short was not said.
        for line in output[: output.rfind("\n") + 1].splitlines():
            word, *rest = line.split()
            if word == "taking":
                self.taking.add(rest[0])
            elif word == "taken":
                self.taken[rest[0]] = rest[1]
            elif word == "deleting":
                self.deleting.add(rest[0])
            elif word == "deleted":
                self.deleted.add(rest[0])
            elif word == "restored":
                self.restored += 1


def start(repository: Path, image: Path, target: str, seed: int) -> subprocess.Popen[str]:
    """A worker that has opened the repository."""
    process = subprocess.Popen(
        [sys.executable, worker.__file__, str(repository), str(image), target, str(seed)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> str:
    """Kill it; returns what it has said."""
    assert process.poll() is None, "the worker ended by itself"
    process.kill()
    output, _ = process.communicate()
    return output


def content_hash(repository: Repository, snapshot: str) -> str:
    reader = repository.open_snapshot(snapshot)
    buffer = bytearray(reader.size_bytes)
    reader.pread_into(buffer, 0)
    return hashlib.sha256(buffer).hexdigest()


def check(place: Path, promised: Promised) -> None:
    repository = Repository.open(place)
    verified = repository.verify()
    assert verified.ok, verified
    found = {snapshot.id: content_hash(repository, snapshot.id) for snapshot in repository.snapshots()}
    assert promised.taken.keys() - promised.deleting <= found.keys()
    assert not promised.deleted & found.keys()
    for snapshot, content in found.items():
        assert content == promised.taken[snapshot] if snapshot in promised.taken else content in promised.taking


def rounds(folder: Path, count: int, seed: int) -> tuple[Promised, dict[str, int]]:
    """Kill so many workers; after each, all must be as promised, and whoever comes next needs no help."""
    place, image, target = folder / "repository", folder / "image", folder / "target"
    Repository.create(place, chunk_bytes=4096)
    random_ = random.Random(seed)
    image.write_bytes(random_.randbytes(2 << 20) + bytes(1 << 20))
    promised = Promised()
    died: dict[str, int] = {}
    for number in range(count):
        process = start(place, image, str(target), seed + number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(random_.uniform(0.0, 0.6))
        promised.hear(kill(process))
        left = Repository.open(place).sessions()
        assert all(session.is_gone(found) for found in left)
        at = left[0].work if left else "other"
        died[at] = died.get(at, 0) + 1
        check(place, promised)
        if target.exists():
            hashes = {content for snapshot, content in promised.taken.items()}
            assert hashlib.sha256(target.read_bytes()).hexdigest() in hashes | promised.taking
            target.unlink()
        if number % 3 == 0:
            Repository.open(place).collect()
            assert Repository.open(place).sessions() == []
            assert not os.listdir(place / "tmp")
            check(place, promised)
    return promised, died


def test_whoever_is_killed_loses_nothing(tmp_path: Path) -> None:
    promised, died = rounds(tmp_path, 10, seed=1)
    assert promised.taken
    assert sum(died.values()) == 10


def test_what_a_killed_create_has_stored_is_used_by_the_next(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(random.Random(1).randbytes(16 << 20))
    alone = Repository.create(tmp_path / "alone").snapshot(image, disk="disk").snapshot
    place = tmp_path / "repository"
    repository = Repository.create(place)
    process = start(place, image, "stall", 0)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    # What it has handed over is on its way to the disk on threads of its own.
    deadline = time.monotonic() + _PATIENCE_S
    packs = place / "packs"
    while not (packs.exists() and len(os.listdir(packs)) > 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    kill(process)
    assert repository.snapshots() == []
    again = repository.snapshot(image, disk="disk").snapshot
    assert again.root == alone.root
    assert again.stored_bytes < alone.stored_bytes - (512 << 10)
    assert repository.sessions() == []
    assert repository.collect().removed_packs == 0
    assert repository.verify().ok


def crowd(folder: Path, seconds: float, writers: int, seed: int) -> tuple[Promised, int]:
    """Many writers, two collectors and a deleter at once; now and then one of them is killed, and begins again."""
    place = folder / "repository"
    Repository.create(place, chunk_bytes=4096)
    random_ = random.Random(seed)
    roles = ["collect", "collect", "delete", *["write"] * writers]
    images = [folder / f"image {number}" for number in range(len(roles))]
    common = random_.randbytes(1 << 20)
    for image in images:
        image.write_bytes(common + random_.randbytes(200_000))
    promised = Promised()
    at_work = [start(place, image, role, seed) for image, role in zip(images, roles, strict=True)]
    kills = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(random_.uniform(0.0, 0.5))
        number = random_.randrange(len(roles))
        promised.hear(kill(at_work[number]))
        kills += 1
        at_work[number] = start(place, images[number], roles[number], seed + kills)
    for process in at_work:
        promised.hear(kill(process))
    return promised, kills


def check_crowd(place: Path, promised: Promised) -> None:
    check(place, promised)
    repository = Repository.open(place)
    repository.collect()
    assert repository.sessions() == []
    check(place, promised)
    # Garbage goes in the end: what is left is what snapshots need.
    again = repository.collect()
    assert (again.removed_packs, again.condemned_packs, again.waiting_for) == (0, 0, ())
    for snapshot in repository.snapshots():
        repository.delete(snapshot)
    repository.collect()
    assert {name.partition("/")[0] for name, _ in repository._context.store.list("")} <= {
        *("config", "generations", "index", "snapshots", "summaries"),
    }


def test_writers_collectors_and_a_deleter_that_are_killed_lose_nothing(tmp_path: Path) -> None:
    promised, kills = crowd(tmp_path, 6.0, 3, seed=2)
    assert promised.taken and kills > 3
    check_crowd(tmp_path / "repository", promised)


@pytest.mark.campaign
def test_a_campaign_of_eight_writers_at_once(tmp_path: Path) -> None:
    """`SNAPCORE_CAMPAIGN_SECONDS`, 120 unless told."""
    seconds = float(os.environ.get("SNAPCORE_CAMPAIGN_SECONDS", "120"))
    promised, kills = crowd(tmp_path, seconds, 8, seed=int(time.time()))
    print(f"killed {kills}; taken {len(promised.taken)}, deleted {len(promised.deleted)}")
    check_crowd(tmp_path / "repository", promised)


@pytest.mark.campaign
def test_a_campaign_of_kills(tmp_path: Path) -> None:
    """`SNAPCORE_KILLS` rounds, 200 unless told."""
    promised, died = rounds(tmp_path, int(os.environ.get("SNAPCORE_KILLS", "200")), seed=int(time.time()))
    print(
        f"killed at: {died}; taken {len(promised.taken)}, deleted {len(promised.deleted)}, restored {promised.restored}"
    )
