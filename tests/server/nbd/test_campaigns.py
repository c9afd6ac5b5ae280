"""Long runs: fio verifies what it writes, and a machine works, while snapshots, clones and deletions go on beside them.

`-m campaign` runs each for SNAPCORE_CAMPAIGN_SECONDS (240).
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from snapcore.errors import BusyError, NotFoundError
from snapcore.pool import Disk, Pool, Snapshot, check
from tests.support import fio
from tests.support.file_systems import check_file_system, recovered
from tests.support.guest import make_guest, make_root
from tests.support.nbd import FLUSH, Peer, Serve, Served, eventually
from tests.support.pools import MIB, check_space

SECONDS = float(os.environ.get("SNAPCORE_CAMPAIGN_SECONDS", "240"))
BLOCK_BYTES = 4096
MOST_KEPT = 12

# fio

FIO_BYTES = 32 * MIB
WITNESS_PLACES = (FIO_BYTES, FIO_BYTES + MIB - 8)


@dataclass
class Witness:
    """Writes numbers to two places, the second when the first is answered: what a cut must hold can be told."""

    begun: int = 0
    answered: int = 0
    slowest_s: float = 0

    def write(self, served: Served, ended: threading.Event) -> None:
        """Until the end."""
        with Peer(served.path, timeout_s=120) as peer:
            peer.enter("web")
            while not ended.is_set():
                self.begun += 1
                started = time.monotonic()
                for place in WITNESS_PLACES:
                    assert peer.write(place, self.begun.to_bytes(8)) == 0
                self.slowest_s = max(self.slowest_s, time.monotonic() - started)
                self.answered = self.begun
                if self.begun % 100 == 0:
                    assert peer.request(FLUSH) == 0


@dataclass
class Cuts:
    """Snapshots that were cut, what they held, and how many were made of each thing."""

    pool: Pool
    disk: Disk
    served: Served
    witness: Witness
    launched_ns: int
    digests: dict[str, bytes] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    cut: int = 0
    cloned: int = 0
    deleted: int = 0
    sectors: int = 0

    def take(self) -> None:
        """A snapshot, which holds what was answered before, and nothing from after it."""
        before = self.witness.answered
        snapshot = self.disk.snapshot()
        age_ns, after = time.monotonic_ns() - self.launched_ns, self.witness.begun
        data = snapshot.pread(self.disk.size_bytes, 0)
        first, second = (int.from_bytes(data[place : place + 8]) for place in WITNESS_PLACES)
        assert before <= second <= first <= second + 1 and first <= after
        self.sectors = max(self.sectors, fio.check_sectors(data[:FIO_BYTES], age_ns))
        with self.lock:
            self.digests[snapshot.id] = hashlib.sha256(data).digest()
        self.cut += 1

    def any(self) -> str | None:
        """One of them."""
        with self.lock:
            return random.choice([*self.digests]) if self.digests else None

    def check(self, name: str) -> None:
        """One holds what it held, unless somebody deletes it meanwhile."""
        with self.lock:
            expected = self.digests.get(name)
        if expected is not None:
            with suppress(NotFoundError):
                assert hashlib.sha256(self.pool.snapshot(name).pread(self.disk.size_bytes, 0)).digest() == expected

    def clone(self) -> None:
        """A clone of one, which fio writes in its turn, with a snapshot below and above it."""
        name = self.any()
        if name is None:
            return
        try:
            clone = self.pool.create_disk(f"clone-{self.cloned}", source=self.pool.snapshot(name))
        except NotFoundError:
            return
        fio.verify(self.served, clone.name, "--loops=1", "--fsync=64")
        upper = clone.snapshot()
        held = hashlib.sha256(upper.pread(self.disk.size_bytes, 0)).digest()
        fio.verify(self.served, clone.name, "--loops=1", "--randrepeat=0")
        fio.verify(self.served, f"@{upper.id}?cow", "--loops=1", "--randrepeat=0")
        assert hashlib.sha256(upper.pread(self.disk.size_bytes, 0)).digest() == held
        self.check(name)
        eventually(lambda: gone(clone))
        upper.delete()
        self.cloned += 1

    def delete(self) -> None:
        """One of them, when there are many."""
        with self.lock:
            if len(self.digests) <= MOST_KEPT:
                return
            name = random.choice([*self.digests])
            del self.digests[name]
        self.pool.delete_snapshot(name)
        self.deleted += 1


def gone(disk: Disk) -> bool:
    """Deletes it, once the server has seen its last client leave."""
    try:
        disk.delete()
    except BusyError:
        return False
    return True


def every(seconds: float, do: Callable[[], None], ended: threading.Event) -> None:
    """Until the end; what fails ends the rest as well."""
    try:
        while not ended.wait(seconds):
            do()
    except BaseException:
        ended.set()
        raise


@pytest.mark.campaign
def test_fio_verifies_for_minutes_while_snapshots_clones_and_deletions_go_on(
    serve: Serve, folder: Path, tmp_path: Path
) -> None:
    with Pool.create(tmp_path / "pool") as pool:
        disk = pool.create_disk("web", FIO_BYTES + MIB)
        served = serve(pool=pool, listen=[f"unix:{folder}/socket"])
        served = Served(served.server, folder / "socket", served.events)
        ended, witness = threading.Event(), Witness()
        cuts = Cuts(pool, disk, served, witness, time.monotonic_ns())
        with ThreadPoolExecutor(4) as others:
            running = [
                others.submit(witness.write, served, ended),
                others.submit(every, 0.3, cuts.take, ended),
                others.submit(every, 0.5, cuts.clone, ended),
                others.submit(every, 0.2, cuts.delete, ended),
            ]
            try:
                fio.verify(
                    *(served, "web", "--size=8m", "--offset_increment=8m", "--fsync=64"),
                    *("--time_based", f"--runtime={SECONDS:.0f}"),
                    timeout_s=2 * SECONDS + 300,
                )
            finally:
                ended.set()
        for one in running:
            one.result()
        last = disk.snapshot("last").pread(disk.size_bytes, 0)
        assert disk.pread(disk.size_bytes, 0) == last
        fio.check_sectors(last[:FIO_BYTES], time.monotonic_ns() - cuts.launched_ns)
        served.server.stop()
        check_differences(pool, sorted(cuts.digests, key=int))
        check_space(pool)
    assert check(tmp_path / "pool").problems == []
    with Pool.open(tmp_path / "pool") as pool:
        for name, expected in cuts.digests.items():
            assert hashlib.sha256(pool.snapshot(name).pread(len(last), 0)).digest() == expected
        assert pool.snapshot("last").pread(len(last), 0) == last
    print(
        f"{SECONDS:.0f} s: {cuts.cut} snapshots with up to {cuts.sectors} sectors of fio, {cuts.cloned} clones written "
        f"by fio, {cuts.deleted} snapshots deleted, {witness.answered} pairs of a witness, "
        f"the slowest in {witness.slowest_s:.2f} s"
    )


def check_differences(pool: Pool, names: list[str]) -> None:
    """Between neighbours nothing differs but where the map says so."""
    before = None
    for name in names:
        snapshot = pool.snapshot(name)
        now = np.frombuffer(snapshot.pread(snapshot.size_bytes, 0), dtype=np.uint8).reshape(-1, BLOCK_BYTES)
        if before is not None:
            told = np.zeros(len(now), dtype=bool)
            for offset, length in pool.diff(before[0], snapshot) // BLOCK_BYTES:
                told[offset : offset + length] = True
            differs = (before[1] != now).any(axis=1)
            assert differs.any() and not (differs & ~told).any()
        before = snapshot, now


# A machine

# Each file is named by its content when it is whole and synced; then the machine says how many there have been.
MACHINE_WORK = """
bb=/bin/busybox
cd /work
n=0
end=$(( $($bb cut -d. -f1 /proc/uptime) + {seconds} ))
while [ $($bb cut -d. -f1 /proc/uptime) -lt $end ]; do
    n=$((n+1))
    $bb dd if=/dev/urandom of=new bs=$((n % 13 * 3001 + 100)) count=$((n % 7 + 1)) conv=fsync 2>/dev/null
    sum=$($bb sha256sum new)
    $bb mkdir -p d$((n % 10))
    $bb mv new d$((n % 10))/$n-${{sum%% *}}
    $bb dd if=/dev/zero of=scratch$((n % 3)) bs=64k count=$((n % 20)) 2>/dev/null
    [ $n -gt 150 ] && $bb rm -f d$(((n - 150) % 10))/$((n-150))-*
    $bb sync
    echo "SYNCED $n"
done
"""


@contextmanager
def synced_by(machine: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Numbers that a machine says, while it says them."""
    said = [0]
    assert machine.stdout is not None
    lines = machine.stdout

    def listen() -> None:
        for line in lines:
            said.extend(map(int, re.findall(r"SYNCED (\d+)", line)))

    listener = threading.Thread(target=listen)
    listener.start()
    yield said
    listener.join()


def check_files(snapshot: Snapshot, at_least: int, folder: Path) -> int:
    """What was synced before the cut is there, and every file with a name of its content has it; returns how many."""
    numbers = set()
    with recovered(snapshot, folder) as image:
        target = folder / f"files-{snapshot.id}"
        target.mkdir()
        subprocess.run(["debugfs", "-R", f"rdump /work {target}", image], capture_output=True, check=True)
    for file in target.glob("work/d*/*-*"):
        number, _, expected = file.name.partition("-")
        assert hashlib.sha256(file.read_bytes()).hexdigest() == expected, file
        numbers.add(int(number))
    assert set(range(max(1, at_least - 148), at_least + 1)) <= numbers
    subprocess.run(["rm", "-r", target], check=True)
    return len(numbers)


@pytest.mark.campaign
def test_a_snapshot_every_second_of_a_machine_that_works_has_a_clean_file_system_and_all_that_was_synced(
    serve: Serve, pool: Pool, tmp_path: Path
) -> None:
    guest = make_guest(tmp_path)
    work = "/bin/busybox mkdir /work\n" + MACHINE_WORK.format(seconds=int(SECONDS))
    disk = pool.import_image("machine", make_root(tmp_path, work, 96 * MIB))
    served = serve()
    cuts: list[tuple[Snapshot, int]] = []
    command = guest.command(served.path, "machine", memory_mib=256)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as machine, synced_by(machine) as synced:
        due = time.monotonic()
        while machine.poll() is None:
            before = synced[-1]
            cuts.append((disk.snapshot(), before))
            due += 1
            time.sleep(max(0.0, due - time.monotonic()))
    assert machine.returncode == 0
    served.server.stop()
    assert len(cuts) >= SECONDS and synced[-1] > 0
    files = 0
    for snapshot, before in cuts:
        check_file_system(snapshot, tmp_path)
        if before:
            files += check_files(snapshot, before, tmp_path)
    check_space(pool)
    print(f"{len(cuts)} snapshots, one a second, all clean; {synced[-1]} files synced, {files} compared in snapshots")
