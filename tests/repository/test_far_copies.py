"""Copies to and from stores behind a network: what goes wrong there, and a process that is killed, costs time only."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest

from snapcore import Repository
from snapcore.errors import Error
from snapcore.keys import KeyFile
from snapcore.store import MemoryStore, Store
from tests.support.faulty import Fault, FaultyStore, Plan
from tests.support.forge import objects_of, store_of
from tests.support.regions import region
from tests.support.s3 import new_place

MIB = 1 << 20
_PATIENCE_S = 60


def content(repository: Repository, snapshot_id: str) -> bytes:
    with repository.open_snapshot(snapshot_id) as reader:
        return reader.read(reader.size_bytes)


@pytest.mark.parametrize("key", [None, "k"])
def test_buckets_copy_to_each_other(s3: str, tmp_path: Path, key: str | None) -> None:
    source, target = Repository.create(new_place()), Repository.create(new_place())
    if key is not None:
        target.keyring.create(key, KeyFile.create(tmp_path / "k"))
    image = tmp_path / "image"
    wanted = []
    for seed in range(2):
        data = bytearray(random.Random(1).randbytes(3 * MIB))
        data[seed * MIB : seed * MIB + 5000] = random.Random(seed).randbytes(5000)
        image.write_bytes(data)
        source.snapshot(image, disk="disk")
        wanted.append(bytes(data))
    done = list(target.copy_from(source, [source.snapshots("disk")[-1]], key=key, chain=True))
    assert [content(target, copied.snapshot.id) for copied in done] == wanted
    assert done[1].moved_bytes < MIB
    assert target.verify().ok


FAULTS = {
    "get": (Fault.FAIL, Fault.TRUNCATE, Fault.LIE),
    "get_range": (Fault.FAIL, Fault.TRUNCATE, Fault.LIE, Fault.AFTER_NEXT),
    "list": (Fault.FAIL, Fault.TRUNCATE),
    "put_new": (Fault.FAIL, Fault.LOSE, Fault.TWICE, Fault.LATE, Fault.LAST),
    "delete": (Fault.LOSE, Fault.TWICE, Fault.LATE),
}


@pytest.mark.parametrize("kind", ["same", "sealed"])
@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("method", FAULTS)
def test_whatever_a_store_does_a_copy_is_right_or_not_there(tmp_path: Path, kind: str, side: str, method: str) -> None:
    image = tmp_path / "image"
    data = random.Random(1).randbytes(40 * 4096)
    image.write_bytes(data)
    clean = region(tmp_path, chunk_bytes=4096)
    clean.snapshot(image, disk="disk")
    empty = region(tmp_path, ("k",) if kind == "sealed" else (), chunk_bytes=4096)
    holders = [KeyFile(tmp_path / f"k-{empty.id}")] if kind == "sealed" else []
    key = "k" if kind == "sealed" else None
    first, second = objects_of(_store(clean)), objects_of(_store(empty))
    for fault in FAULTS[method]:
        for number in count():
            inner = {"source": store_of(first), "target": store_of(second)}
            faulty = FaultyStore(inner[side])
            stores: dict[str, Store] = {**inner, side: faulty}
            source, target = Repository.open(stores["source"]), Repository.open(stores["target"], keys=holders)
            faulty.plan = Plan(fault, method, faulty.counts[method] + number)
            done = True
            try:
                list(target.copy_from(source, source.snapshots(), key=key))
            except Error:
                done = False
            faulty.settle_late()
            if not faulty.hit:
                break
            there = Repository.open(inner["target"], keys=holders)
            found = there.snapshots()
            assert len(found) == 1 or not done
            again = Repository.open(inner["source"])
            found += [each.snapshot for each in there.copy_from(again, again.snapshots(), key=key)]
            assert all(content(there, snapshot.id) == data for snapshot in found)
            there.collect()
            assert there.verify().ok
            assert all(content(there, snapshot.id) == data for snapshot in found)


def _store(repository: Repository) -> MemoryStore:
    store = repository._context.store
    assert isinstance(store, MemoryStore)
    return store


@pytest.mark.parametrize("key", [None, "k"])
def test_a_copy_that_was_killed_goes_on_and_moves_only_the_rest(tmp_path: Path, key: str | None) -> None:
    image = tmp_path / "image"
    data = random.Random(1).randbytes(64 * MIB)
    image.write_bytes(data)
    source, target = Repository.create(tmp_path / "source"), Repository.create(tmp_path / "target")
    words: list[str] = []
    if key is not None:
        target.keyring.create(key, KeyFile.create(tmp_path / "k"))
        words = ["--key", key, "--key-file", str(tmp_path / "k")]
    snapshot = source.snapshot(image, disk="disk").snapshot
    command = [sys.executable, "-P", "-m", "snapcore", "copy", snapshot.id, "--limit-rate", "24M", *words]
    process = subprocess.Popen([*command, "--from", str(tmp_path / "source"), "--to", str(tmp_path / "target")])
    packs = tmp_path / "target" / "packs"
    deadline = time.monotonic() + _PATIENCE_S
    while (stored := _bytes_in(packs)) < 30 * MIB and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None
    process.kill()
    process.wait()
    assert target.snapshots() == []
    (done,) = target.copy_from(source, [snapshot], key=key)
    assert done.moved_bytes <= len(data) * 1.02 - stored + (4 * MIB if key else 0)
    assert content(target, done.snapshot.id) == data
    assert target.verify().ok
    assert target.sessions() == []


def _bytes_in(folder: Path) -> int:
    return sum(os.stat(path).st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
