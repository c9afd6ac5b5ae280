"""Makes the golden repository with pins out of that of format 1, and refuses to touch one that exists."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from snapcore import Repository
from snapcore.repository import envelope, pins
from snapcore.repository.domain import PLAIN
from snapcore.store import LocalStore

WHO = "the pool /srv/pool on host"
PIN, MARK = "ab" * 16, "cd" * 16


def main() -> None:
    """A pin on the third snapshot, and the mark of a deletion that was interrupted on the second."""
    here = Path(__file__).parent
    folder = here / f"format-{envelope.FORMAT_VERSION}-pinned"
    if folder.exists():
        sys.exit(f"{folder} exists: golden files are never rewritten")
    shutil.copytree(here / f"format-{envelope.FORMAT_VERSION}", folder)
    repository = Repository.open(folder)
    repository.pin("third", WHO, pin_id=PIN)
    mark = pins.Pin(
        id=MARK,
        snapshot=repository.find("second").id,
        who="a deletion",
        created="2026-11-24T00:00:00+00:00",
        deletes=True,
    )
    pins._write(LocalStore(str(folder)), mark, PLAIN)
    shutil.rmtree(folder / "tmp")


if __name__ == "__main__":
    main()
