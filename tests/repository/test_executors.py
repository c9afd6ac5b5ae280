"""Work on packs spreads over threads, processes and other hosts, and parts of it over nights."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapcore import Repository, UsageError
from snapcore.repository import collect, damage, pack
from snapcore.repository.share import Part, Sample
from snapcore.store import MemoryStore
from tests.support.disks import changed, disk
from tests.support.small import Bytes

PARTS = 5


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """Some packs, with patches in them."""
    monkeypatch.setattr(pack, "PACK_BYTES", 16 << 10)
    monkeypatch.setattr(collect, "_SMALL_BYTES", 0)
    monkeypatch.setattr(collect, "_CHEAP_BYTES", 0)
    made = Repository.create(tmp_path / "repository", chunk_bytes=16 << 10)
    content = disk(1, 60)
    for number in range(4):
        made.snapshot(Bytes(content), disk="disk")
        content = changed(content, number, pages=6)
    return made


@contextmanager
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@contextmanager
def cluster() -> Iterator[Executor]:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None, worker_dashboard_address=None
        ) as local,
        distributed.Client(local) as client,
        client.get_executor(pure=False) as executor,
    ):
        yield executor


def damage_a_pack(repository: Repository) -> tuple[Path, bytes]:
    path = max((Path(repository.url) / "packs").iterdir(), key=lambda path: (path.stat().st_size, path.name))
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    return path, bytes.fromhex(path.name)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("workers", [processes, cluster])
def test_processes_and_hosts_find_what_threads_find(workers: object, repository: Repository) -> None:
    by_threads = repository.verify()
    # Packs that no index object names are read by workers too.
    for path in (Path(repository.url) / "index").iterdir():
        path.unlink()
    with workers() as executor:  # type: ignore[operator]
        assert repository.collect(executor=executor).removed_packs == 0
    assert repository.verify().ok
    damage_a_pack(repository)
    damaged = repository.verify()
    with workers() as executor:  # type: ignore[operator]
        found = repository.verify(executor=executor, in_flight=3)
        assert (found.problems, found.marked) == (damaged.problems, damaged.marked)
        assert [hit.ranges.tolist() for hit in found.hits] == [hit.ranges.tolist() for hit in damaged.hits]
        assert (found.packs, found.stored_bytes) == (by_threads.packs, by_threads.stored_bytes)


def test_a_store_in_memory_cannot_go_to_another_process() -> None:
    repository = Repository.create(MemoryStore(), chunk_bytes=4096)
    repository.snapshot(Bytes(disk(1, 8)), disk="disk")
    with processes() as executor, pytest.raises(UsageError, match="with threads"):
        repository.verify(executor=executor)


def test_the_parts_together_read_every_pack_once_and_each_finds_its_own_damage(repository: Repository) -> None:
    _, pack_id = damage_a_pack(repository)
    whole = repository.verify()
    parts = [repository.verify(share=Part(number + 1, PARTS)) for number in range(PARTS)]
    assert sum(part.packs for part in parts) == whole.packs and whole.packs > PARTS
    for number, part in enumerate(parts):
        assert (part.problems != []) == Part(number + 1, PARTS).holds(pack_id)
        # What another part has found stays marked, and what it hits is told every time.
        assert [hit.snapshot for hit in part.hits] == [hit.snapshot for hit in whole.hits]
    assert len(damage.load(repository._context.store)) == whole.marked


def test_a_part_that_reads_well_again_takes_its_own_marks_away_only(repository: Repository) -> None:
    path, pack_id = damage_a_pack(repository)
    assert repository.verify().marked
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    other = next(number for number in range(1, PARTS + 1) if not Part(number, PARTS).holds(pack_id))
    assert not repository.verify(share=Part(other, PARTS)).ok
    own = next(number for number in range(1, PARTS + 1) if Part(number, PARTS).holds(pack_id))
    assert repository.verify(share=Part(own, PARTS)).ok
    assert repository.verify().ok


def test_a_sample_reads_about_its_share_and_another_one_each_time() -> None:
    packs = [number.to_bytes(16, "little") for number in range(10_000)]
    chosen = [{item for item in packs if sample.holds(item)} for sample in (Sample(0.01), Sample(0.01))]
    assert all(40 < len(some) < 200 for some in chosen)
    assert chosen[0] != chosen[1]
    assert all(Sample(1.0).holds(item) for item in packs[:100])


@pytest.mark.parametrize("wrong", [lambda: Part(0, 3), lambda: Part(4, 3), lambda: Sample(0.0), lambda: Sample(1.5)])
def test_a_share_that_is_none_is_refused(wrong: object) -> None:
    with pytest.raises(UsageError):
        wrong()  # type: ignore[operator]
