"""Many writers, a copy and a collector on one bucket; killed, and what is beneath them too: what was promised is there.

    eval "$(bench/ceph.sh up /tmp/ceph)"
    pytest -m campaign tests/repository/test_far_writers.py
    bench/ceph.sh down /tmp/ceph

Without SNAPCORE_TEST_S3 it runs on moto, and nothing beneath is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from snapcore import Repository
from snapcore.keys import KeyFile
from tests.support import writer
from tests.support.s3 import new_place

WRITERS = 8
SECONDS = float(os.environ.get("SNAPCORE_CAMPAIGN_SECONDS", "60"))


class Worker:
    """A process, and all lines it said."""

    def __init__(self, *words: str) -> None:
        self._words = words
        self.lines: list[list[str]] = []
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, writer.__file__, *self._words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._listener = threading.Thread(target=self._listen, args=(self._process,))
        self._listener.start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            # What the kill cut short was not said.
            if line.endswith("\n"):
                self.lines.append(line.split())

    def kill(self) -> None:
        """kill -9; AssertionError when it had ended by itself."""
        if self._process.stderr is None or self._process.stderr.closed:
            return
        ended = self._process.poll()
        self._process.kill()
        self._process.wait()
        self._listener.join()
        said = self._process.stderr.read()
        self._process.stderr.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
        assert ended is None, said

    def again(self) -> None:
        """kill -9 and a new one in its place."""
        self.kill()
        self._start()


def key_file(folder: Path, repository: Repository) -> str:
    """Gives the repository a key `k`; the file that opens it."""
    path = str(folder / f"key-{repository.id}")
    repository.keyring.create("k", KeyFile.create(path))
    return path


@pytest.mark.campaign
@pytest.mark.parametrize(("sealed", "copies_sealed"), [(False, False), (False, True), (True, True)])
def test_all_that_many_writers_were_promised_restores_whatever_was_killed(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed: bool, copies_sealed: bool
) -> None:
    place, target = new_place(), new_place()
    made = [Repository.create(place), Repository.create(target)]
    wanted = (sealed, copies_sealed)
    keys = [key_file(tmp_path, each) for each, has_key in zip(made, wanted, strict=True) if has_key]
    monkeypatch.setenv("SNAPCORE_TEST_KEYS", ":".join(keys))
    random_ = random.Random(11)
    workers = []
    for number in range(WRITERS):
        image = tmp_path / f"{number}.img"
        image.write_bytes(random_.randbytes(2 << 20))
        workers.append(Worker(place, f"disk-{number}", str(image), str(number)))
    collectors = [Worker(place, "collect"), Worker(target, "collect")]
    copier = Worker(place, "copy", target)
    everybody = [*workers, *collectors, copier]
    kill_storage = os.environ.get("SNAPCORE_TEST_KILL_OSD")
    end = time.monotonic() + SECONDS
    storage_at = time.monotonic() + SECONDS / 2
    try:
        while time.monotonic() < end:
            time.sleep(random_.uniform(0.5, 2))
            random_.choice([*everybody, copier]).again()
            if kill_storage and time.monotonic() > storage_at:
                subprocess.run(shlex.split(kill_storage), check=True, timeout=60)
                storage_at = end
    finally:
        for worker in everybody:
            with contextlib.suppress(AssertionError):
                worker.kill()
    lines = [line for worker in everybody for line in worker.lines]
    print(Counter(line[0] for line in lines), [" ".join(line) for line in lines if line[0] == "fault"][:5])
    gone = {line[1] for line in lines if line[0] == "deleting"}
    digests = {line[1]: line[2] for line in lines if line[0] == "taken"}
    taken = {name: digest for name, digest in digests.items() if name not in gone}
    # Of a snapshot whose writer was killed before it said so, nothing is known.
    copied = {line[1]: digests.get(line[2]) for line in lines if line[0] == "copied"}
    assert len(taken) >= WRITERS
    assert copied
    repository, copies = writer.opened(place), writer.opened(target)

    def check() -> None:
        for where, promised in ((repository, taken), (copies, copied)):
            assert promised.keys() <= {item.id for item in where.snapshots()}
            for snapshot_id, digest in promised.items():
                with where.open_snapshot(snapshot_id) as reader:
                    found = hashlib.sha256(reader.read(reader.size_bytes)).hexdigest()
                assert digest in (found, None)
            assert where.verify().ok

    check()
    # Whoever was at work is dead now, on this host: nobody has to help.
    assert repository.collect().waiting_for == ()
    assert copies.collect().waiting_for == ()
    check()
