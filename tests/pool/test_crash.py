"""A crash at any instant loses nothing that was acknowledged, leaves no half of anything, and costs no space.

Real work is recorded primitive by primitive; each state that a crash could leave is built, opened, compared with what
was promised (tests/support/promises.py), and worked on.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapcore import DamagedError, Error, NotFoundError
from tests.support.pools import quick_folder
from tests.support.promises import BLOCK_BYTES, Work, exact, open_again, promised, works_on
from tests.support.recorder import Crash, Recorder, crashes

SUPERBLOCK_COPIES = (0, 4096)
# How often a crash of the recovery, damage of a copy of the superblock, and work after it are tried.
_FURTHER = 40


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory: a crash is a question of order here, not of time."""
    folder = quick_folder()
    yield folder
    shutil.rmtree(folder)


@contextmanager
def built(crash: Crash, place: Path) -> Iterator[Path]:
    """What a crash left."""
    crash.build(place)
    try:
        yield place / "pool"
    finally:
        shutil.rmtree(place)


def opens(crash: Crash, place: Path, facts: tuple[object, ...]) -> bool:
    """The pool is there with all that was promised, to the block; False when there was no pool yet."""
    with built(crash, place) as folder:
        try:
            pool = open_again(folder)
        except NotFoundError:
            assert not any(getattr(getattr(fact, "step", None), "name", "") == "create" for fact in facts)
            return False
        exact(pool)
        promised(pool, facts)
        pool._engine.abandon()
    return True


def recovers_from_a_second_crash(crash: Crash, place: Path, samples: int) -> int:
    """A crash at any instant of the recovery is harmless. Returns how many were tried."""
    count = 0
    with built(crash, place):
        recorder = Recorder(place)
        open_again(place / "pool", recorder)._engine.abandon()
        for again in crashes(recorder, samples, seed=crash.done):
            opens(again, place.with_name("again"), crash.facts)
            count += 1
    return count


def outlives_a_damaged_superblock(crash: Crash, place: Path, facts: tuple[object, ...]) -> None:
    """Each copy alone, with the log, gives all that was promised."""
    whole = crash.files["pool/superblock"]
    for offset in SUPERBLOCK_COPIES:
        damaged = whole[:offset] + os.urandom(512) + whole[offset + 512 :]
        files = {**crash.files, "pool/superblock": damaged}
        opens(Crash(crash.done, crash.how, (), crash.folders, files), place, facts)


def replay(
    recorder: Recorder, place: Path, samples: int, *, further: int = _FURTHER, seed: int = 0, first: int = 0
) -> set[bytes]:
    """Check every crash behind the `first` operations; returns a digest of each distinct one."""
    dice = random.Random(seed)
    seen = set()
    for crash in crashes(recorder, samples, seed=seed, since=first):
        files = b"".join(name.encode() + data for name, data in sorted(crash.files.items()))
        seen.add(hashlib.blake2b(files, digest_size=16).digest())
        try:
            if not opens(crash, place / "crashed", crash.facts):
                continue
            if dice.randrange(further) == 0:
                recovers_from_a_second_crash(crash, place / "crashed", 2)
            if dice.randrange(further) == 0:
                outlives_a_damaged_superblock(crash, place / "crashed", crash.facts)
            if dice.randrange(further) == 0:
                with built(crash, place / "crashed") as folder:
                    works_on(folder, dice)
        except BaseException as error:
            steps = [getattr(fact, "name", "done") for fact in crash.facts]
            error.add_note(f"crash after operation {crash.done} ({crash.how}), seed {seed}; steps {steps}")
            raise
    return seen


def data(number: int, blocks: int = 1) -> bytes:
    """Bytes of which every sector is its own."""
    return random.Random(number).randbytes(blocks * BLOCK_BYTES)


def started(place: Path) -> Work:
    """A pool at rest with a disk of six blocks that has a snapshot, and blocks of its own, shared, and absent."""
    work = Work(place / "work")
    work.create()
    work.make("disk", 6 * BLOCK_BYTES - 100)
    work.write("disk", data(1, 3), 0)
    work.cut("disk", name="base")
    work.write("disk", data(2), 0)
    work.record_from_here()
    return work


def in_order(work: Work) -> None:
    """All kinds of steps, in an order in which each finds something to do."""
    work.create()
    work.make("disk", 6 * BLOCK_BYTES - 100)
    work.write("disk", data(1, 3), 100)
    work.write("disk", data(2), 0)
    work.flush("disk")
    work.write("disk", data(3, 2), 50)
    (base,) = work.cut("disk", name="base")
    work.write("disk", data(4, 2), BLOCK_BYTES)
    work.write("disk", data(5), BLOCK_BYTES + 512)
    work.flush("disk")
    work.discard("disk", 10, 2 * BLOCK_BYTES)
    work.clone("disk", "clone")
    work.write("clone", data(6), 2 * BLOCK_BYTES, fua=True)
    work.write("disk", data(7, 2), 0)
    pair = work.cut("disk", "clone", name="pair")
    work.checkpoint()
    work.write("clone", data(8), 4 * BLOCK_BYTES)
    work.rollback("disk", base)
    work.write("disk", data(9), 0)
    work.resize("disk", 9 * BLOCK_BYTES)
    work.write("disk", data(10, 3), 6 * BLOCK_BYTES)
    work.delete(base)
    work.make("other", 6 * BLOCK_BYTES, pair[1])
    work.write("other", data(11), BLOCK_BYTES)
    work.delete(*pair)
    work.delete_disk("clone")
    work.write("other", data(12), BLOCK_BYTES)
    work.close()
    work.reopen()
    work.write("other", data(13), 2 * BLOCK_BYTES)
    work.delete_disk("disk")
    work.checkpoint()
    work.flush("other")


def test_every_step_of_a_pool_may_be_the_last(place: Path) -> None:
    work = Work(place / "work")
    in_order(work)
    assert len(replay(work.recorder, place, 20, further=200)) > 500


def test_a_log_that_goes_round_its_ring_loses_nothing(place: Path) -> None:
    work = started(place)
    core = work.pool._engine.core
    dice = random.Random(7)
    kept: list[str] = []

    def go_on() -> None:
        work.write("disk", dice.randbytes(700), dice.randrange(5 * BLOCK_BYTES))
        kept.extend(work.cut("disk"))
        if len(kept) > 2:
            work.delete(kept.pop(0))

    # Up to 8 of the 128 sectors before the end of the ring.
    while core.log_next % 128 < 120:
        go_on()
    work.record_from_here(closed=False)
    core = work.pool._engine.core
    first, before = core.log_next, work.pool._engine.checkpoints
    while core.log_next // 128 == first // 128 or core.log_next % 128 < 6:
        go_on()
    assert work.pool._engine.checkpoints == before
    work.checkpoint()
    go_on()
    replay(work.recorder, place, 3, further=100)


def test_a_block_that_was_freed_and_used_again_within_one_log_is_kept(place: Path) -> None:
    work = started(place)
    work.make("long", 120 * BLOCK_BYTES)
    places: list[int] = []
    while len({*places}) == len(places):
        work.write("long", data(len(places), 120), 0)
        work.flush("long")
        places += work.state.disks["long"].places
        work.discard("long", 0, 120 * BLOCK_BYTES)
        work.reclaim()
    assert work.pool._engine.checkpoints == 0
    work.pool._engine.abandon()
    assert replay(work.recorder, place, 1, further=20, first=len(work.recorder.operations) - 40)


def test_a_full_log_makes_room_for_itself(place: Path) -> None:
    work = started(place)
    before = work.pool._engine.checkpoints
    for number in range(120):
        work.write("disk", data(number), BLOCK_BYTES)
        work.flush("disk")
        work.discard("disk", BLOCK_BYTES, BLOCK_BYTES)
        work.flush("disk")
    assert work.pool._engine.checkpoints > before
    # Around the last checkpoint, which began because the log was full.
    copies = [n for n, done in enumerate(work.recorder.operations) if done.offset_bytes == SUPERBLOCK_COPIES[1]]
    assert replay(work.recorder, place, 2, further=100, first=copies[-1] - 60)


Small = Callable[[Work], None]


def _first(work: Work) -> str | None:
    return min(work.snapshots, key=int, default=None)


def _rollback(work: Work) -> None:
    own = work.kept_by("disk")
    if own:
        work.rollback("disk", own[0])


def _delete(work: Work) -> None:
    first = _first(work)
    if first is not None:
        work.delete(first)


def _clone(work: Work) -> None:
    if "clone" in work.contents:
        work.delete_disk("clone")
    else:
        work.clone("disk", "clone")


def _reopen(work: Work) -> None:
    work.close()
    work.reopen()


def _resize(work: Work) -> None:
    size = len(work.contents["disk"])
    work.resize("disk", size + 3000)


SMALL: dict[str, Small] = {
    "in place": lambda work: work.write("disk", data(20 + len(work.recorder.operations)), 0),
    "redirected": lambda work: work.write("disk", data(20 + len(work.recorder.operations)), BLOCK_BYTES + 600),
    "discard": lambda work: work.discard("disk", 200, 2 * BLOCK_BYTES),
    "flush": lambda work: work.flush("disk"),
    "cut": lambda work: (work.cut("disk"), None)[1],
    "rollback": _rollback,
    "delete": _delete,
    "clone or delete it": _clone,
    "resize": _resize,
    "checkpoint": lambda work: work.checkpoint(),
    "reclaim": lambda work: work.reclaim(),
    "reopen": _reopen,
}


def short_sequences(place: Path, length: int, samples: int, *, share: float = 1.0) -> set[bytes]:
    """All sequences of so many small steps, or a share of them; the distinct crashes."""
    dice = random.Random(length)
    seen = set()
    for number, names in enumerate(itertools.product(SMALL, repeat=length)):
        if dice.random() >= share:
            continue
        folder = place / str(number)
        work = started(folder)
        for name in names:
            SMALL[name](work)
        work.pool._engine.abandon()
        seen |= replay(work.recorder, folder, samples, further=150, seed=number)
        shutil.rmtree(folder)
    return seen


def test_every_pair_of_steps_may_be_the_last(place: Path) -> None:
    assert len(short_sequences(place, 2, 1)) > 500


def test_sequences_of_three_steps_may_be_the_last(place: Path) -> None:
    assert short_sequences(place, 3, 1, share=0.01)


def random_run(place: Path, seed: int, steps: int, samples: int) -> set[bytes]:
    """Random steps, every crash of them."""
    dice = random.Random(seed)
    work = Work(place / "work")
    work.create()
    work.make("disk", dice.randrange(1, 10 * BLOCK_BYTES))
    for _ in range(dice.randrange(30)):
        work.random_step(dice)
    work.record_from_here()
    for _ in range(steps):
        work.random_step(dice)
    work.pool._engine.abandon()
    return replay(work.recorder, place, samples, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_random_work_may_end_anywhere(place: Path, seed: int) -> None:
    assert random_run(place, seed, 20, 5)


def test_one_copy_of_the_superblock_is_enough_at_any_instant_even_of_a_recovery_between_the_two(place: Path) -> None:
    work = started(place)
    work.write("disk", data(1, 2), BLOCK_BYTES)
    work.cut("disk")
    work.checkpoint()
    work.write("disk", data(2, 2), BLOCK_BYTES)
    work.checkpoint()
    between = 0
    for crash in crashes(work.recorder, 0):
        outlives_a_damaged_superblock(crash, place / "crashed", crash.facts)
        copies = [crash.files["pool/superblock"][at : at + 512] for at in SUPERBLOCK_COPIES]
        if copies[0] != copies[1]:
            between += 1
            with built(crash, place / "crashed"):
                recorder = Recorder(place / "crashed")
                open_again(place / "crashed/pool", recorder)._engine.abandon()
                for again in crashes(recorder, 2):
                    outlives_a_damaged_superblock(again, place / "again", crash.facts)
    assert between > 2


@pytest.mark.parametrize("name", ["data", "log", "map", "superblock"])
def test_a_pool_that_did_not_sync_a_file_would_be_found_out(place: Path, name: str) -> None:
    work = started(place)
    for number in range(3):
        work.write("disk", data(number, 2), BLOCK_BYTES)
        work.flush("disk")
        work.discard("disk", BLOCK_BYTES, BLOCK_BYTES)
        work.flush("disk")
        work.checkpoint()
    recorder = work.recorder
    inode = recorder.before.names[f"pool/{name}"]
    recorder.operations = [done for done in recorder.operations if (done.kind, done.inode) != ("sync", inode)]
    with pytest.raises((AssertionError, Error)):
        replay(recorder, place, 20)


def test_a_damaged_sector_of_the_log_is_no_end_of_it(place: Path) -> None:
    work = started(place)
    for number in range(4):
        work.write("disk", data(number), BLOCK_BYTES)
        work.cut("disk")
    work.pool._engine.abandon()
    log = work.place / "log"
    whole = log.read_bytes()
    used = [at for at in range(0, len(whole), 512) if any(whole[at : at + 512])]
    for at in used[-4:]:
        log.write_bytes(whole[: at + 100] + bytes([whole[at + 100] ^ 4]) + whole[at + 101 :])
        with pytest.raises(DamagedError, match="log"):
            open_again(work.place)
    log.write_bytes(whole)
    pool = open_again(work.place)
    assert len(pool.snapshots()) == 5
    pool.close()


@pytest.mark.campaign
def test_a_campaign_of_crashes(place: Path) -> None:
    """`SNAPCORE_CRASH_SECONDS` seconds (600 unless told) of random runs with 20 samples at each point."""
    limit_s = float(os.environ.get("SNAPCORE_CRASH_SECONDS", "600"))
    seed = int(os.environ.get("SNAPCORE_CRASH_SEED", str(int(time.time()))))
    started_s, runs = time.monotonic(), 0
    seen: set[bytes] = set()
    while time.monotonic() - started_s < limit_s:
        folder = place / str(runs)
        seen |= random_run(folder, seed + runs, 25, 20)
        shutil.rmtree(folder)
        runs += 1
    print(f"{runs} runs from seed {seed}, {len(seen)} distinct crashes")


@pytest.mark.campaign
def test_every_sequence_of_three_steps_may_be_the_last(place: Path) -> None:
    print(f"{len(short_sequences(place, 3, 3))} distinct crashes")
