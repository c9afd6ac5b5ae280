"""A process that works on a repository until it is killed; says what it was promised.

`writer.py PLACE DISK IMAGE SEED`: changes its image and takes snapshots, again and again; from time to time deletes one
of its own. `writer.py PLACE collect`: collects, again and again. `writer.py PLACE copy TARGET`: copies the newest
snapshot of each disk, again and again.

SNAPCORE_TEST_KEYS names key files, joined by ":", that open all keys there are; snapshots and copies are under the key
`k` where the repository has one.

Lines: `taken ID HASH`, `deleting ID`, `collected`, `copied ID SOURCE`, `busy`, `fault MESSAGE`. What a line says was
true before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import sys
import time
from pathlib import Path

from snapcore import Repository
from snapcore.errors import BusyError, FencedError, LockedError, NotFoundError, StoreError
from snapcore.keys import KeyFile


def say(*words: str) -> None:
    """A line that is out before the next thing is done."""
    print(*words, flush=True)


def opened(place: str) -> Repository:
    """A repository with all keys unlocked."""
    repository = Repository.open(place)
    for name in filter(None, os.environ.get("SNAPCORE_TEST_KEYS", "").split(":")):
        with contextlib.suppress(LockedError):
            repository.unlock(KeyFile(name))
    return repository


def key_of(repository: Repository) -> str | None:
    """The key that new snapshots are under."""
    return "k" if repository.keyring.any() else None


def copy(repository: Repository, target: Repository) -> None:
    """Copies of the newest snapshots."""
    newest = {snapshot.disk: snapshot for snapshot in repository.snapshots()}
    for snapshot in newest.values():
        if any(made.copied and made.copied.snapshot == snapshot.id for made in target.snapshots(snapshot.disk)):
            continue
        for done in target.copy_from(repository, [snapshot], key=key_of(target)):
            say("copied", done.snapshot.id, done.source.id)


def write(repository: Repository, disk: str, image: Path, random_: random.Random) -> None:
    """One snapshot, and perhaps a deletion."""
    content = bytearray(image.read_bytes())
    for _ in range(10):
        at = random_.randrange(len(content) - 4096)
        content[at : at + 4096] = random_.randbytes(4096)
    image.write_bytes(content)
    taken = repository.snapshot(image, disk=disk, key=key_of(repository), allow_changing=True).snapshot.id
    say("taken", taken, hashlib.sha256(content).hexdigest())
    own = repository.snapshots(disk)
    if len(own) > 4:
        gone = random_.choice(own[:-1]).id
        say("deleting", gone)
        repository.delete(gone)


def main() -> None:
    """Work until killed."""
    place, what, *rest = sys.argv[1:]
    repository = opened(place)
    target = opened(rest[0]) if what == "copy" else None
    random_ = random.Random(int(rest[1]) if len(rest) > 1 else 0)
    while True:
        try:
            if what == "collect":
                repository.collect()
                say("collected")
                time.sleep(0.5)
            elif target is not None:
                copy(repository, target)
                time.sleep(0.2)
            else:
                write(repository, what, Path(rest[0]), random_)
        except NotFoundError:
            # Of a copy: what was to be copied, or what it was compared with, was deleted.
            if target is None:
                raise
            say("busy")
        except (BusyError, FencedError):
            say("busy")
            time.sleep(random_.random())
        except StoreError as error:
            say("fault", str(error).replace("\n", " "))


if __name__ == "__main__":
    main()
