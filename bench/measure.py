"""What a command costs, and the same start for every command that is measured.

Relies on wait4, which counts a process with all children it waited for. Promises that output is kept for the
caller and shown when a command fails. The peak RSS cannot come out below that of this process, which Linux
carries over into what it starts: keep large libraries out of programs that measure.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from images import data_bytes, data_extents

_READ_BYTES = 1 << 20
_SHOWN_ERROR_LINES = 12


class CommandError(RuntimeError):
    """A measured command did not succeed."""


@dataclass(frozen=True)
class Command:
    """A program with its arguments, what it needs in the environment, and the folder it starts in."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True)
class Cost:
    """What commands needed: wall time, user and system CPU time, and the largest resident set of any."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_rss_bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.wall_s + other.wall_s,
            self.cpu_s + other.cpu_s,
            max(self.peak_rss_bytes, other.peak_rss_bytes),
        )


def run(commands: Iterable[Command]) -> tuple[Cost, str]:
    """Run commands one after the other; return what they cost together and the last one's standard output."""
    total, output = Cost(), ""
    for command in commands:
        cost, output = _run_one(command)
        total += cost
    return total, output


def _run_one(command: Command) -> tuple[Cost, str]:
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start_s = time.perf_counter()
        process = subprocess.Popen(
            command.arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=dict(os.environ) | dict(command.environment),
            cwd=command.folder,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start_s
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            shown = "\n".join(_text(errors).splitlines()[-_SHOWN_ERROR_LINES:])
            raise CommandError(f"{' '.join(command.arguments)} ended with {process.returncode}:\n{shown}")
        return Cost(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024), _text(output)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def warm(path: Path) -> None:
    """Read a whole file once, holes too, so that it is in the page cache."""
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def warm_data(path: Path) -> None:
    """Read what a file has apart from holes, so that it is in the page cache."""
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        for start, end in data_extents(path):
            for offset in range(start, end, _READ_BYTES):
                os.preadv(file.fileno(), [buffer[: end - offset]], offset)


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and the folders in it."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def tree_bytes(folder: Path) -> int:
    """Apparent bytes of all files below a folder; holes do not count."""
    return sum(data_bytes(path) for path in files_below(folder))
