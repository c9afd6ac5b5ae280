"""Makes the golden pools of the current format: `python tests/golden/make_pool.py FOLDER`. Those here stay as they are.

Each is an archive of a pool's folder: `closed` after a clean end, `crashed` with commits in its log. `contents.json`
says what every version holds (XXH64 of its bytes).
"""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
from pathlib import Path

import xxhash

from snapcore.pool import Pool
from tests.support import golden_pool


def main() -> None:
    """Make both."""
    target = Path(sys.argv[1])
    target.mkdir()
    for name in ("closed", "crashed"):
        with tempfile.TemporaryDirectory() as folder:
            pool = Pool.create(Path(folder) / "pool", log_bytes=65536, background=False)
            golden_pool.fill(pool)
            pool.flush()
            held = {label: xxhash.xxh64_hexdigest(data) for label, data in golden_pool.contents(pool).items()}
            if name == "closed":
                pool.close()
            else:
                pool._engine.abandon()
            with tarfile.open(target / f"{name}.tar.xz", "x:xz") as archive:
                archive.add(Path(folder) / "pool", "pool", filter=nobody)
    (target / "contents.json").write_text(json.dumps(held, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out whose files they were, and when."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = 0
    return entry


if __name__ == "__main__":
    main()
