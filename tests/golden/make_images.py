"""Makes the golden repository with an image, of the present format, and refuses to touch one that exists."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from snapcore import Repository
from snapcore.repository import images
from snapcore.repository.manifest import write_tombstone
from snapcore.store import LocalStore
from tests.support.golden import CHUNK_BYTES, IMAGE, generations


def main() -> None:
    """Take all golden snapshots into a new folder, and make an image of two of them."""
    folder = Path(__file__).parent / "format-1-images"
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
        repository.create_image(
            IMAGE,
            "third",
            {"xvdb": "second", "xvdz": 1 << 20},
            architecture="aarch64",
            boot="uefi",
            os="Golden 1",
            min_size_bytes=1 << 24,
            tags={"kind": "golden"},
            checksums=True,
        )
        write_tombstone(LocalStore(str(folder)), f"{images.PREFIX}{'0123456789abcdef' * 2}")
    for name in ("tmp", "sessions"):
        (folder / name).rmdir()


if __name__ == "__main__":
    main()
