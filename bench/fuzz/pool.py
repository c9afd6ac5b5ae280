"""Fuzzes what opens a pool: changes its files, with all checksums put right again or not, and works on the result.

    python bench/fuzz/pool.py --seconds 600 [--seed N] [--only ITERATION]

Under AddressSanitizer: build the kernels with SNAPCORE_SANITIZE=address,undefined and run with
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONMALLOC=malloc.

An iteration is a finding when anything but snapcore.Error comes out, when more than 1 GiB of memory was needed, or
when it takes more than 20 seconds of processor time. Each is named by seed and iteration, from which `--only` makes
it again. Exit status 1 when there were findings.
"""

from __future__ import annotations

import faulthandler
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

import frame

from snapcore.persist import Medium
from tests.support import hostile
from tests.support.mediums import Unsynced


def iteration(pools: tuple[hostile.Pieces, hostile.Pieces], dice: random.Random, folder: Path) -> Counter[str]:
    """Change one and work on it."""
    pieces = dict(dice.choice(pools))
    for _ in range(dice.choice((1, 1, 2, 3))):
        dice.choice(hostile.MUTATIONS)(pieces, dice)
    shutil.rmtree(folder, ignore_errors=True)
    attack = hostile.Attack(hostile.build(pieces, folder), dice, dice.choice((Medium(), Unsynced())))
    attack.run()
    return attack.outcomes


def main() -> None:
    options = frame.parser(__doc__).parse_args()
    faulthandler.enable()
    memory = "/dev/shm"
    where = memory if os.access(memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="snapcore-fuzz-", dir=where))
    try:
        pools = hostile.small_pool(folder)
        if frame.run(lambda dice: iteration(pools, dice, folder / "trial"), options):
            sys.exit(1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
