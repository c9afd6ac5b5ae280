"""Makes the golden repository of the present format, and refuses to touch one that exists."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from snapcore import Repository
from snapcore.repository import manifest
from snapcore.repository.domain import PLAIN
from snapcore.repository.envelope import FORMAT_VERSION
from snapcore.store import LocalStore
from tests.support.golden import CHUNK_BYTES, generations


def main() -> None:
    """Take all golden snapshots into a new folder."""
    folder = Path(__file__).parent / f"format-{FORMAT_VERSION}"
    if folder.exists():
        sys.exit(f"{folder} exists: golden files are never rewritten")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        image = Path(scratch, "golden.img")
        repository = Repository.create(folder, chunk_bytes=CHUNK_BYTES)
        for item in generations():
            image.write_bytes(item.content)
            os.chdir(scratch)
            repository.snapshot(
                image.name, disk=item.disk, label=item.label, compression=item.compression, tags={"kind": "golden"}
            )
        manifest.write_tombstone(LocalStore(str(folder)), manifest.name(PLAIN, "golden", 9, "0123456789abcdef" * 2))
    for name in ("tmp", "sessions"):
        (folder / name).rmdir()


if __name__ == "__main__":
    main()
