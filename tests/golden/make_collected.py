"""Makes the golden repository in which a collection waits for a writer, and refuses to touch one that exists.

It has all kinds of objects that collections know: generations, deleted manifests, a summary, index objects that say
what their writer had seen, and the session of a writer on a host that nobody can ask.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from snapcore import Repository
from snapcore.repository import generations as generations_
from snapcore.repository import manifest, session, summaries
from snapcore.repository.domain import PLAIN
from snapcore.store import LocalStore
from tests.support.golden import CHUNK_BYTES, generations


def main() -> None:
    """Take all golden snapshots and some that are deleted, and collect while somebody is registered."""
    folder = Path(__file__).parent / "format-1-collected"
    if folder.exists():
        sys.exit(f"{folder} exists: golden files are never rewritten")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        os.chdir(scratch)
        image = Path(scratch, "golden.img")
        repository = Repository.create(folder, chunk_bytes=CHUNK_BYTES)
        store = LocalStore(str(folder))
        image.write_bytes(b"garbage that is gone" * CHUNK_BYTES)
        repository.delete(repository.snapshot(image.name, disk="gone").snapshot)
        for item in generations():
            image.write_bytes(item.content)
            repository.snapshot(
                image.name, disk=item.disk, label=item.label, compression=item.compression, tags={"kind": "golden"}
            )
        repository.collect()
        image.write_bytes(b"garbage that is condemned" * CHUNK_BYTES)
        passing = repository.snapshot(image.name, disk="passing").snapshot
        os.uname = lambda: type("Name", (), {"nodename": "elsewhere"})()  # type: ignore[assignment,misc,return-value]
        session._machine = lambda: "0123456789abcdef" * 2  # type: ignore[assignment]
        session._kernel = lambda: "another-boot pid:[1]"  # type: ignore[assignment]
        name = manifest.name(PLAIN, "never", 1, "0123456789abcdef" * 2)
        session.register(store, session.CREATE, name, generation=generations_.latest_number(store, PLAIN))
        repository.delete(passing)
        summaries.LOOSE = 0
        summaries.refresh(store)
        repository.collect()
        image.write_bytes(b"deleted since" * CHUNK_BYTES)
        repository.delete(repository.snapshot(image.name, disk="passing").snapshot)
    (folder / "tmp").rmdir()
    print(sorted(name for name, _ in store.list("")))


if __name__ == "__main__":
    main()
