"""What the fuzz targets share: iterations that are named by seed and number, limits, and the report.

An iteration is a finding when anything but what it counts itself comes out of it, or when it takes too much time or
memory. `--only` makes one again.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

_LIMIT_S = 20
_LIMIT_KIB = 1 << 20

# Does one iteration with these dice, and counts what came out.
Iteration = Callable[[random.Random], Counter[str]]


class TooSlowError(BaseException):
    """An iteration took too long."""


class TooBigError(BaseException):
    """An iteration took too much memory."""


def _too_slow(*_: object) -> None:
    raise TooSlowError(f"took longer than {_LIMIT_S} s of processor time or {_LIMIT_S * 10} s")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all targets have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seconds", type=float, default=60.0)
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--only", type=int, help="run this iteration alone")
    return made


def run(iteration: Iteration, options: argparse.Namespace) -> int:
    """Iterations until the time is over, and a report. Returns the number of findings."""
    seed, only = options.seed, options.only
    signal.signal(signal.SIGALRM, _too_slow)
    signal.signal(signal.SIGPROF, _too_slow)
    total: Counter[str] = Counter()
    findings: Counter[str] = Counter()
    started, peak_kib = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    number = first = only if only is not None else 0
    while time.monotonic() - started < options.seconds and (only is None or number == only):
        dice = random.Random(f"{seed}:{number}")
        signal.setitimer(signal.ITIMER_PROF, _LIMIT_S)
        signal.alarm(_LIMIT_S * 10)
        try:
            total += iteration(dice)
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
            signal.alarm(0)
        number += 1
    took_s = time.monotonic() - started
    print(f"{number - first} iterations, {sum(total.values())} operations in {took_s:.0f} s, peak {peak_kib >> 10} MiB")
    for sign, count in sorted(total.items()):
        print(f"  {count:8} {sign}")
    print(f"{sum(findings.values())} findings of {len(findings)} kinds")
    for sign, count in findings.most_common():
        print(f"  {count:8} {sign}")
    return sum(findings.values())
