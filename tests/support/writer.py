"""A process that works on a repository until it is killed; says what it was promised.

`writer.py PLACE DISK IMAGE SEED`: changes its image and takes snapshots, again and again; from time to time deletes one
of its own. `writer.py PLACE collect`: collects, again and again.

Lines: `taken ID HASH`, `deleting ID`, `collected`, `busy`, `fault MESSAGE`. What a line says was true before.
"""

from __future__ import annotations

import hashlib
import random
import sys
import time
from pathlib import Path

from snapcore import Repository
from snapcore.errors import BusyError, FencedError, StoreError


def say(*words: str) -> None:
    """A line that is out before the next thing is done."""
    print(*words, flush=True)


def write(repository: Repository, disk: str, image: Path, random_: random.Random) -> None:
    """One snapshot, and perhaps a deletion."""
    content = bytearray(image.read_bytes())
    for _ in range(10):
        at = random_.randrange(len(content) - 4096)
        content[at : at + 4096] = random_.randbytes(4096)
    image.write_bytes(content)
    taken = repository.snapshot(image, disk=disk, allow_changing=True).snapshot.id
    say("taken", taken, hashlib.sha256(content).hexdigest())
    own = repository.snapshots(disk)
    if len(own) > 4:
        gone = random_.choice(own[:-1]).id
        say("deleting", gone)
        repository.delete(gone)


def main() -> None:
    """Work until killed."""
    place, what, *rest = sys.argv[1:]
    repository = Repository.open(place)
    random_ = random.Random(int(rest[1]) if rest else 0)
    while True:
        try:
            if what == "collect":
                repository.collect()
                say("collected")
                time.sleep(0.5)
            else:
                write(repository, what, Path(rest[0]), random_)
        except (BusyError, FencedError):
            say("busy")
            time.sleep(random_.random())
        except StoreError as error:
            say("fault", str(error).replace("\n", " "))


if __name__ == "__main__":
    main()
