"""The bars of the NBD server, by fio: `python bench/nbd.py [FOLDER] [--only NAME,…] [--rounds N] [--seconds S]`.

Beside it, on the same machine in the same run and taking turns: qemu-nbd and nbdkit's file plugin on a raw file of the
same size. All files are in the page cache: what is compared is servers, not disks. Ratios are medians of those within a
round. CPU is that of the server's process, all its threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
BLOCK = 4096
SIZE_BYTES = 512 * MIB
QCOW2_DEPTH = 100
DEPTHS = (100, 1000)

# name -> what fio is told.
WORKLOADS: dict[str, tuple[str, ...]] = {
    "random read 4 KiB, QD1": ("--rw=randread", "--bs=4k", "--iodepth=1"),
    "random read 4 KiB, QD16": ("--rw=randread", "--bs=4k", "--iodepth=16"),
    "sequential read 1 MiB": ("--rw=read", "--bs=1m", "--iodepth=1"),
    "sequential write 1 MiB": ("--rw=write", "--bs=1m", "--iodepth=1"),
    "random write 4 KiB, QD16": ("--rw=randwrite", "--bs=4k", "--iodepth=16"),
}
FSYNC_EACH = ("--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1")
QUEUE_32 = ("--rw=randread", "--bs=4k", "--iodepth=32")

_NUMBERS = itertools.count()
# A server in a process of its own, which is told on its standard input what to do.
SERVER = """
import sys
from snapcore import NbdServer, Pool
with Pool.open(sys.argv[1]) as pool, NbdServer(pool, listen=["unix:" + sys.argv[2]]):
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "snapshot\\n":
            pool.open_disk("disk").snapshot()
        elif line == "forget\\n":
            for snapshot in pool.snapshots():
                snapshot.delete()
            pool.checkpoint()
        print("done", flush=True)
"""


@dataclass
class Served:
    """A server that runs."""

    name: str
    process: subprocess.Popen[str]
    uri: str

    def cpu_s(self) -> float:
        """CPU time of it so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def tell(self, word: str) -> None:
        """Only to one of ours."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(word, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"


@contextmanager
def running(name: str, words: list[str], socket: Path, export: str = "") -> Iterator[Served]:
    """A server until the end of the block."""
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        while not socket.exists():
            if process.poll() is not None:
                raise RuntimeError(f"{words[0]} ended with {process.returncode}")
            time.sleep(0.01)
        if name.startswith("snapcore"):
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield Served(name, process, f"nbd+unix:///{export}?socket={socket}")
    finally:
        if name.startswith("snapcore"):
            assert process.stdin is not None
            process.stdin.close()
        else:
            process.terminate()
        process.wait(60)


class Place:
    """Where files and servers are."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack

    def _socket(self) -> Path:
        # A server may leave its own behind.
        return self.folder / f"s{next(_NUMBERS)}"

    def snapcore(self, depth: int = 0) -> Served:
        """A pool's disk that is full, with so many snapshots before its head."""
        path = self.folder / f"pool-{depth}"
        if not path.exists():
            make_pool(path, depth)
        socket = self._socket()
        words = [sys.executable, "-c", SERVER, str(path), str(socket)]
        return self._stack.enter_context(running(f"snapcore, depth {depth}", words, socket, "disk"))

    def qemu(self, kind: str = "raw") -> Served:
        """qemu-nbd on a raw file, or on the last of a chain of qcow2 files."""
        file = self.raw() if kind == "raw" else self._qcow2()
        socket = self._socket()
        words = ["qemu-nbd", "-f", kind, "-t", "-e", "8", "-k", str(socket), str(file)]
        return self._stack.enter_context(running(f"qemu-nbd, {kind}", words, socket))

    def nbdkit(self) -> Served:
        """nbdkit's file plugin."""
        socket = self._socket()
        words = ["nbdkit", "-f", "-U", str(socket), "file", str(self.raw())]
        return self._stack.enter_context(running("nbdkit, file", words, socket))

    def raw(self) -> Path:
        """A raw file that is full."""
        path = self.folder / "raw"
        if not path.exists():
            with path.open("wb") as file:
                for _ in range(SIZE_BYTES // MIB):
                    file.write(os.urandom(MIB))
                os.fsync(file.fileno())
        return path

    def _qcow2(self) -> Path:
        dice = random.Random(1)
        last = self.folder / "chain-0"
        if not last.exists():
            convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(self.raw()), str(last)]
            subprocess.run(convert, check=True)
        for number in range(1, QCOW2_DEPTH + 1):
            path = self.folder / f"chain-{number}"
            create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(last), "-F", "qcow2", str(path)]
            subprocess.run(create, check=True)
            places = [block * BLOCK for block in dice.sample(range(SIZE_BYTES // BLOCK), 16)]
            commands = [word for at in places for word in ("-c", f"write -q {at} 4096")]
            subprocess.run(["qemu-io", "-f", "qcow2", *commands, str(path)], check=True, stdout=subprocess.DEVNULL)
            last = path
        return last


def make_pool(path: Path, depth: int) -> None:
    """A pool with a disk that is full; sixteen blocks change between two snapshots."""
    from snapcore import Pool

    dice = random.Random(1)
    with Pool.create(path) as pool:
        disk = pool.create_disk("disk", SIZE_BYTES)
        for offset in range(0, SIZE_BYTES, MIB):
            disk.pwrite(os.urandom(MIB), offset)
        for _ in range(depth):
            disk.snapshot()
            for block in dice.sample(range(SIZE_BYTES // BLOCK), 16):
                disk.pwrite(os.urandom(BLOCK), block * BLOCK)
        if depth:
            disk.snapshot()


def fio(served: Served, options: tuple[str, ...], *, seconds: float = 0) -> dict[str, Any]:
    """A job of fio; by time, or once through all blocks. Returns the job as fio reports it."""
    with tempfile.NamedTemporaryFile("r") as report:
        words = ["fio", "--name=job", "--ioengine=nbd", f"--uri={served.uri}", f"--size={SIZE_BYTES}"]
        words += ["--output-format=json", f"--output={report.name}", "--randrepeat=0", *options]
        words += ["--time_based", f"--runtime={seconds}"] if seconds else []
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        (job,) = json.loads(report.read())["jobs"]
        assert job["error"] == 0, job
        return dict(job)


def rate(served: Served, options: tuple[str, ...], *, seconds: float = 0) -> float:
    """Requests a second."""
    job = fio(served, options, seconds=seconds)
    return float(job["read"]["iops"] or job["write"]["iops"])


def show(name: str, got: str, bar: str = "") -> None:
    """A line of the report."""
    print(f"{name:<58} {got:<44} {bar}", flush=True)


def taking_turns(measures: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each of them once a round, in an order that changes."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    names = list(measures)
    for number in range(rounds):
        for name in names if number % 2 else reversed(names):
            found[name].append(measures[name]())
    return found


def ratio(found: dict[str, list[float]], one: str, other: str) -> float:
    """Median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(found[one], found[other], strict=True))


class Bench:
    """The sections of the report."""

    def __init__(self, place: Place, rounds: int, seconds: float) -> None:
        self._place = place
        self._rounds = rounds
        self._seconds = seconds

    def peers(self) -> None:
        """A pool's disk at depth 0 against a raw file under qemu-nbd and nbdkit."""
        servers = [self._place.snapcore(), self._place.qemu(), self._place.nbdkit()]
        for name, options in WORKLOADS.items():
            found = self._turns(servers, options)
            for peer in servers[1:]:
                got = ratio(found, servers[0].name, peer.name)
                show(f"{name}: against {peer.name}", f"{got:.2f}{self._rates(found)}", "1.0")

    def depths(self) -> None:
        """Deep chains against none, and qemu-nbd on a chain of qcow2 files."""
        flat = self._place.snapcore()
        servers = [flat, *(self._place.snapcore(depth) for depth in DEPTHS), self._place.qemu("qcow2")]
        for name, options in WORKLOADS.items():
            found = self._turns(servers, options)
            for peer in servers[1:]:
                got = ratio(found, peer.name, flat.name)
                bar = "0.9" if peer.name.startswith("snapcore") else f"(depth {QCOW2_DEPTH})"
                show(f"{name}: {peer.name} against depth 0", f"{got:.2f}{self._rates(found)}", bar)

    def first_writes(self) -> None:
        """Each block once: right after a snapshot, and without one."""
        served = self._place.snapcore()
        options = ("--rw=randwrite", "--bs=4k", "--iodepth=16", "--io_size=128m")

        def after_snapshot() -> float:
            served.tell("snapshot")
            return rate(served, options)

        def without() -> float:
            served.tell("forget")
            return rate(served, options)

        found = taking_turns({"after": after_snapshot, "without": without}, self._rounds)
        show("first write after a snapshot against one without", f"{ratio(found, 'after', 'without'):.2f}", "0.8")
        served.tell("forget")

    def syncs(self) -> None:
        """Write and fsync, one after the other."""
        servers = [self._place.snapcore(), self._place.qemu(), self._place.nbdkit()]
        found = self._turns(servers, FSYNC_EACH)
        for peer, bar in zip(servers[1:], ("0.8", ""), strict=True):
            got = ratio(found, servers[0].name, peer.name)
            show(f"write + fsync each: against {peer.name}", f"{got:.2f}{self._rates(found)}", bar)

    def cpu(self) -> None:
        """CPU of the server for a random read of 4 KiB at depth 32."""
        servers = [self._place.snapcore(), self._place.snapcore(DEPTHS[-1]), self._place.qemu(), self._place.nbdkit()]

        def used_us(served: Served) -> float:
            before = served.cpu_s()
            requests = fio(served, QUEUE_32, seconds=self._seconds)["read"]["total_ios"]
            return (served.cpu_s() - before) / requests * 1e6

        measures = {served.name: lambda served=served: used_us(served) for served in servers}
        for name, values in taking_turns(measures, self._rounds).items():  # type: ignore[arg-type]
            bar = "8" if name.startswith("snapcore") else ""
            show(f"CPU of a 4-KiB read at depth 32: {name}", f"{statistics.median(values):.1f} us", bar)

    def _turns(self, servers: list[Served], options: tuple[str, ...]) -> dict[str, list[float]]:
        measures = {
            served.name: lambda served=served: rate(served, options, seconds=self._seconds) for served in servers
        }
        return taking_turns(measures, self._rounds)  # type: ignore[arg-type]

    @staticmethod
    def _rates(found: dict[str, list[float]]) -> str:
        return " (" + " / ".join(f"{statistics.median(values):,.0f}" for values in found.values()) + "/s)"


SECTIONS = ("peers", "depths", "first_writes", "syncs", "cpu")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default=tempfile.gettempdir(), type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="nbd-", dir=arguments.folder))
    try:
        for name in arguments.only.split(","):
            with ExitStack() as stack:
                getattr(Bench(Place(folder, stack), arguments.rounds, arguments.seconds), name)()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
