"""Makes the golden pools with lazy disks: `python tests/golden/make_lazy_pool.py FOLDER`. Those here stay as they are.

`closed` and `crashed` as in make_pool.py; what is not here is in no region any more, so `contents.json` says what a
range of each version holds that was fetched.
"""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
from pathlib import Path

import xxhash

from snapcore.pool import Pool
from tests.golden.make_pool import nobody
from tests.support import golden_pool
from tests.support.lazy_regions import Regions


def main() -> None:
    """Make both."""
    target = Path(sys.argv[1])
    target.mkdir()
    for name in ("closed", "crashed"):
        with tempfile.TemporaryDirectory() as folder:
            regions = Regions()
            pool = Pool.create(Path(folder) / "pool", log_bytes=65536, background=False, regions=regions)
            golden_pool.fill_lazy(pool, regions)
            pool.flush()
            held = {label: xxhash.xxh64_hexdigest(data) for label, data in golden_pool.lazy_contents(pool).items()}
            pool._engine.versions.backings.save()
            if name == "closed":
                pool.close()
            else:
                pool._engine.abandon()
            with tarfile.open(target / f"{name}.tar.xz", "x:xz") as archive:
                archive.add(Path(folder) / "pool", "pool", filter=nobody)
    (target / "contents.json").write_text(json.dumps(held, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
