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

import argparse
import faulthandler
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from snapcore.persist import Medium
from tests.support import hostile
from tests.support.mediums import Unsynced

_LIMIT_S = 20
_LIMIT_KIB = 1 << 20


class TooSlowError(BaseException):
    """An iteration took too long."""


class TooBigError(BaseException):
    """An iteration took too much memory."""


def too_slow(*_: object) -> None:
    raise TooSlowError(f"took longer than {_LIMIT_S} s of processor time")


def iteration(pools: tuple[hostile.Pieces, hostile.Pieces], dice: random.Random, folder: Path) -> Counter[str]:
    """Change one and work on it."""
    pieces = dict(dice.choice(pools))
    for _ in range(dice.choice((1, 1, 2, 3))):
        dice.choice(hostile.MUTATIONS)(pieces, dice)
    shutil.rmtree(folder, ignore_errors=True)
    attack = hostile.Attack(hostile.build(pieces, folder), dice, dice.choice((Medium(), Unsynced())))
    attack.run()
    return attack.outcomes


def run(seconds: float, seed: int, only: int | None, folder: Path) -> int:
    """Iterations until the time is over. Returns the number of findings."""
    pools = hostile.small_pool(folder)
    signal.signal(signal.SIGPROF, too_slow)
    total: Counter[str] = Counter()
    findings: Counter[str] = Counter()
    started, peak_kib = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    number = first = only if only is not None else 0
    while time.monotonic() - started < seconds and (only is None or number == only):
        dice = random.Random(f"{seed}:{number}")
        signal.setitimer(signal.ITIMER_PROF, _LIMIT_S)
        try:
            total += iteration(pools, dice, folder / "trial")
            peak_kib, before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, peak_kib
            if peak_kib > before_kib + _LIMIT_KIB:
                raise TooBigError(f"took {peak_kib >> 10} MiB")
        except (Exception, TooSlowError, TooBigError) as error:  # noqa: BLE001 - whatever comes out is the finding
            last = traceback.extract_tb(error.__traceback__)[-1]
            sign = f"{type(error).__name__} in {Path(last.filename).name}:{last.name}"
            findings[sign] += 1
            if findings[sign] == 1 or only is not None:
                print(f"FINDING seed {seed} iteration {number}: {sign}", flush=True)
                traceback.print_exc(limit=-8)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        number += 1
    took_s = time.monotonic() - started
    print(f"{number - first} iterations, {sum(total.values())} operations in {took_s:.0f} s, peak {peak_kib >> 10} MiB")
    for sign, count in sorted(total.items()):
        print(f"  {count:8} {sign}")
    print(f"{sum(findings.values())} findings of {len(findings)} kinds")
    for sign, count in findings.most_common():
        print(f"  {count:8} {sign}")
    return sum(findings.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="run this iteration alone")
    options = parser.parse_args()
    faulthandler.enable()
    memory = "/dev/shm"
    where = memory if os.access(memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="snapcore-fuzz-", dir=where))
    try:
        if run(options.seconds, options.seed, options.only, folder):
            sys.exit(1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
