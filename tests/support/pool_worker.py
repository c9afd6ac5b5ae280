"""A process to be killed: works on a pool from many threads without end, and says what it was promised.

`pool_worker.py POOL SEED`: eight threads write, each its own disk's half, with flushes, while a ninth cuts, clones and
deletes, and checkpoints come from the pool's own thread and on request.

A disk has 64 blocks; thread *t* has 32 of them. A block's content follows from its number and a count that only grows
(`block_bytes`). Lines on standard output, each whole and each true before it is written:

| line | says |
| --- | --- |
| `ready` | the pool is open |
| `writing THREAD BLOCK COUNT` | from here on the block may hold this |
| `written THREAD UPTO` | all that this thread said before its line number UPTO is durable |
| `cutting NAME`, `cut NAME ID ID` | a group snapshot begins; is durable |
| `deleting ID`, `deleted ID` | the same of a deletion |
| `cloning NAME`, `cloned NAME`, `dropping NAME`, `dropped NAME` | the same of a clone |
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
from pathlib import Path

from snapcore.pool import Pool

THREADS = 8
DISK_BLOCKS = 64
OWN_BLOCKS = 32
BLOCK_BYTES = 4096
_MARK_BYTES = 16
_LOG_BYTES = 65536


def disk_of(thread: int) -> str:
    """Two threads share a disk."""
    return f"disk{thread // 2}"


def block_bytes(thread: int, block: int, count: int) -> bytes:
    """What a thread writes into one of its blocks: its name, then bytes that follow from it; each sector its own."""
    if count == 0:
        return bytes(BLOCK_BYTES)
    sectors = []
    for sector in range(8):
        mark = f"{thread}.{block}.{count}.{sector}".encode().ljust(_MARK_BYTES, b" ")
        sectors.append(mark + hashlib.shake_128(mark).digest(512 - _MARK_BYTES))
    return b"".join(sectors)


def sector_count(data: bytes, thread: int, block: int, sector: int) -> int:
    """The count that a sector of a block says; fails when it is no such sector."""
    if not any(data):
        return 0
    mark = data[:_MARK_BYTES]
    said = [int(part) for part in mark.decode().split(".")]
    assert (said[0], said[1], said[3]) == (thread, block, sector), (said, thread, block, sector)
    assert data[_MARK_BYTES:] == hashlib.shake_128(mark).digest(512 - _MARK_BYTES)
    return said[2]


def say(*words: object) -> None:
    # One write is whole in a pipe or a file, whatever thread it comes from.
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def create(place: Path) -> None:
    """The pool that a worker expects."""
    with Pool.create(place, log_bytes=_LOG_BYTES, background=False) as pool:
        for thread in range(0, THREADS, 2):
            pool.create_disk(disk_of(thread), DISK_BLOCKS * BLOCK_BYTES)


def write(pool: Pool, thread: int, seed: int, start: int) -> None:
    dice = random.Random(f"{seed}:{thread}")
    disk = pool.open_disk(disk_of(thread))
    first = thread % 2 * OWN_BLOCKS
    count = start
    while True:
        for _ in range(dice.randrange(1, 12)):
            block, length = dice.randrange(OWN_BLOCKS), dice.choice((1, 1, 1, 3))
            length = min(length, OWN_BLOCKS - block)
            count += 1
            pieces = b""
            for number in range(block, block + length):
                say("writing", thread, number, count)
                pieces += block_bytes(thread, number, count)
            disk.pwrite(pieces, (first + block) * BLOCK_BYTES)
        disk.flush()
        say("written", thread, count)


def manage(pool: Pool, seed: int) -> None:
    dice = random.Random(seed)
    number = 0
    while True:
        number += 1
        what = dice.choice(("cut", "cut", "delete", "delete", "clone", "drop", "checkpoint"))
        kept = pool.snapshots()
        clones = [disk for disk in pool.disks() if disk.name.startswith("clone")]
        if what == "cut" and len(kept) < 12:
            names = sorted({disk_of(thread) for thread in dice.sample(range(THREADS), 3)})
            name = f"s{seed}.{number}"
            say("cutting", name)
            made = pool.snapshot_group(names, name)
            say("cut", name, *(f"{snapshot.id}:{snapshot.disk}" for snapshot in made))
        elif what == "delete" and kept:
            chosen = [snapshot.id for snapshot in dice.sample(kept, dice.randrange(1, min(3, len(kept)) + 1))]
            for snapshot in chosen:
                say("deleting", snapshot)
            pool.delete_snapshots(chosen)
            for snapshot in chosen:
                say("deleted", snapshot)
        elif what == "clone" and len(clones) < 3:
            name = f"clone{seed}.{number}"
            say("cloning", name)
            pool.open_disk(disk_of(dice.randrange(THREADS))).clone(name)
            say("cloned", name)
        elif what == "drop" and clones:
            name = dice.choice(clones).name
            say("dropping", name)
            pool.delete_disk(name)
            say("dropped", name)
        elif what == "checkpoint":
            pool.checkpoint()


def main() -> None:
    place, seed, start = sys.argv[1:]
    pool = Pool.open(place)
    say("ready")
    threads = [
        threading.Thread(target=write, args=(pool, thread, int(seed), int(start)), daemon=True)
        for thread in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    manage(pool, int(seed))


if __name__ == "__main__":
    main()
