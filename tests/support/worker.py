"""A process to be killed: works on a repository without end and says on its output what it was promised.

`worker.py REPOSITORY IMAGE TARGET SEED`: changes the image, takes snapshots, deletes, collects, restores, at random.
`worker.py REPOSITORY IMAGE stall SEED`: takes a snapshot and stops in the middle for good.
`worker.py REPOSITORY IMAGE write|delete|collect SEED`: does only that; a writer has a disk of the image's name.

Lines: `ready`, `collected PACKS`, `taking HASH`, `taken ID HASH`, `deleting ID`, `deleted ID`, `restored ID`, `half`; a
hash is that of the disk. What a line says was true before it was written.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
from pathlib import Path

from snapcore import Progress, Repository
from snapcore.repository import collect, pack


def say(*words: str) -> None:
    print(*words, flush=True)


def grow(image: Path, random_: random.Random) -> str:
    """Change the image and make it longer, up to a limit; returns the hash of its content."""
    with open(image, "r+b") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes < 8 << 20:
            os.ftruncate(file.fileno(), size_bytes + random_.randrange(100_000))
        for _ in range(20):
            file.seek(random_.randrange(max(size_bytes, 1)))
            file.write(random_.randbytes(random_.choice((40, 4096, 30000))))
    return hashlib.sha256(image.read_bytes()).hexdigest()


def work(repository: Repository, image: Path, target: Path, random_: random.Random) -> None:
    while True:
        held = repository.snapshots()
        what = random_.choice(("take", "take", "take", "delete", "collect", "restore"))
        if what == "take" or len(held) < 2:
            content = grow(image, random_)
            say("taking", content)
            created = repository.snapshot(image, disk="disk", allow_changing=True)
            say("taken", created.snapshot.id, content)
        elif what == "delete" or len(held) > 6:
            chosen = random_.choice(held).id
            say("deleting", chosen)
            repository.delete(chosen)
            say("deleted", chosen)
        elif what == "collect":
            repository.collect()
        else:
            chosen = random_.choice(held).id
            repository.restore(chosen, target)
            say("restored", chosen)
            target.unlink()


def write(repository: Repository, image: Path, random_: random.Random) -> None:
    while True:
        content = grow(image, random_)
        say("taking", content)
        created = repository.snapshot(image, disk=image.name, allow_changing=True)
        say("taken", created.snapshot.id, content)


def delete(repository: Repository, random_: random.Random) -> None:
    while True:
        held = repository.snapshots()
        if len(held) > 12:
            chosen = random_.choice(held).id
            say("deleting", chosen)
            repository.delete(chosen)
            say("deleted", chosen)


def stall(repository: Repository, image: Path) -> None:
    def progress(step: Progress) -> None:
        if step.percent >= 50:
            say("half")
            while True:
                signal.pause()

    repository.snapshot(image, disk="disk", allow_changing=True, progress=progress)


def main() -> None:
    place, image, target, seed = sys.argv[1:]
    pack.PACK_BYTES = 256 << 10
    collect._SMALL_BYTES = 64 << 10
    repository = Repository.open(place)
    say("ready")
    if target == "stall":
        stall(repository, Path(image))
    elif target == "write":
        write(repository, Path(image), random.Random(int(seed)))
    elif target == "delete":
        delete(repository, random.Random(int(seed)))
    elif target == "collect":
        while True:
            say("collected", str(repository.collect().removed_packs))
    else:
        work(repository, Path(image), Path(target), random.Random(int(seed)))


if __name__ == "__main__":
    main()
