"""Commands around the cut of a group: freeze before, thaw behind, each with a time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from snapcore.repository import HookRun

TIMEOUT_S = 60.0


@dataclass(slots=True)
class Hooks:
    """Commands for the shell, and what came of them.

    Attributes
    ----------
    freeze, thaw : str or None
    timeout_s : float
        Of each; one that takes longer is killed, with all that it started.
    froze, thawed : HookRun or None
        What came of them.
    """

    freeze: str | None = None
    thaw: str | None = None
    timeout_s: float = TIMEOUT_S
    froze: HookRun | None = field(default=None, init=False)
    thawed: HookRun | None = field(default=None, init=False)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Freeze, do what stands inside, thaw: whatever became of the first two."""
        try:
            if self.freeze is not None:
                self.froze = run(self.freeze, self.timeout_s)
            yield
        finally:
            if self.thaw is not None:
                self.thawed = run(self.thaw, self.timeout_s)


def run(command: str, timeout_s: float) -> HookRun:
    """Run a command by the shell, in a process group of its own; what it prints goes to standard error."""
    started = time.monotonic()
    code: int | None = None
    timed_out = False
    try:
        with subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=2, start_new_session=True
        ) as process:
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                if code is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        code = None
    return HookRun(exit_code=code, timed_out=timed_out, duration_s=round(time.monotonic() - started, 6))
