"""Makes the sealed golden repository of the present format and its key file, and refuses to touch those that exist."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from snapcore import KeyFile, Passphrase, Repository
from snapcore.repository import manifest
from snapcore.store import LocalStore
from tests.support.golden import CHUNK_BYTES, KEY_FILE, PASSPHRASE, generations


def main() -> None:
    """Take all golden snapshots, under one key, into a new folder."""
    here = Path(__file__).parent
    folder = here / "format-1-sealed"
    if folder.exists():
        sys.exit(f"{folder} exists: golden files are never rewritten")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        image = Path(scratch, "golden.img")
        repository = Repository.create(folder, chunk_bytes=CHUNK_BYTES)
        repository.keyring.create("golden", Passphrase(PASSPHRASE))
        repository.keyring.add("golden", KeyFile.create(here / KEY_FILE))
        for item in generations():
            image.write_bytes(item.content)
            os.chdir(scratch)
            repository.snapshot(
                image.name,
                disk=item.disk,
                label=item.label,
                compression=item.compression,
                tags={"kind": "golden"},
                key="golden",
            )
        domain = repository.keyring.find("golden")
        manifest.write_tombstone(LocalStore(str(folder)), manifest.name(domain, "golden", 9, "0123456789abcdef" * 2))
    for name in ("tmp", "sessions"):
        (folder / name).rmdir()


if __name__ == "__main__":
    main()
