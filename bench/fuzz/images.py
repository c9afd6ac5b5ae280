"""Fuzzes what reads image formats: changes numbers in headers and tables of small images and reads them.

    python bench/fuzz/images.py --seconds 600 [--seed N] [--only ITERATION]

Relies on qemu-img, which makes the images and reads every tenth of those that are not refused. An iteration is a
finding when anything but snapcore.Error comes out, when qemu-img reads other bytes, or when it takes more than 20
seconds. Each is named by seed and iteration, from which `--only` makes it again. Exit status 1 when there were
findings.
"""

import argparse
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

from snapcore import Error
from tests.support import hostile_images
from tests.support.hostile_images import Victim

_LIMIT_S = 20
_COMPARED = 10


class TooSlowError(BaseException):
    """An iteration took too long."""


def too_slow(_number: int, _frame: object) -> None:
    """What the alarm does."""
    raise TooSlowError


def iteration(victims: list[Victim], dice: random.Random) -> str:
    """Change one image and read it. Returns what came of it."""
    victim = dice.choice(victims)
    changes = hostile_images.random_changes(victim, dice)
    with hostile_images.changed(victim, changes, seal=dice.random() < 0.8):
        found = hostile_images.outcome(victim)
        if isinstance(found, Error):
            return f"{victim.kind}: {type(found).__name__}"
        if dice.randrange(_COMPARED):
            return f"{victim.kind}: read"
        signal.alarm(0)
        theirs = hostile_images.as_qemu_reads_it(victim)
        if theirs is None:
            return f"{victim.kind}: read, and not by qemu-img"
        common = min(len(found), len(theirs))
        if found[:common] != theirs[:common]:
            raise AssertionError(f"{victim.kind} {victim.options}: qemu-img reads other bytes after {changes}")
    return f"{victim.kind}: read, as qemu-img does"


def run(victims: list[Victim], seconds: float, seed: int, only: int | None) -> int:
    """Iterations until the time is over. Returns the number of findings."""
    signal.signal(signal.SIGALRM, too_slow)
    total: Counter[str] = Counter()
    findings = 0
    started = time.monotonic()
    number = only if only is not None else 0
    while time.monotonic() - started < seconds and (only is None or number == only):
        signal.alarm(_LIMIT_S)
        try:
            total[iteration(victims, random.Random(f"{seed}:{number}"))] += 1
        except (Exception, TooSlowError):  # noqa: BLE001 - whatever comes out is the finding
            findings += 1
            print(f"FINDING seed {seed} iteration {number}", flush=True)
            traceback.print_exc(limit=-8)
        finally:
            signal.alarm(0)
        number += 1
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{sum(total.values())} iterations in {time.monotonic() - started:.0f} s, peak {peak_mib} MiB")
    for sign, count in sorted(total.items()):
        print(f"  {count:8} {sign}")
    print(f"{findings} findings")
    return findings


def main() -> None:
    """Make the images and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="run this iteration alone")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="snapcore-fuzz-"))
    try:
        if run(hostile_images.make_victims(folder), options.seconds, options.seed, options.only):
            sys.exit(1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
