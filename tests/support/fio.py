"""fio over NBD, and what it leaves: every sector says where it belongs, when it was made, and its sum."""

from __future__ import annotations

import struct
import subprocess

import pytest
import xxhash

from tests.support.nbd import Served
from tests.support.tools import needs

SECTOR_BYTES = 512
# fio's `struct verify_header` and, behind it, that of xxhash.
_HEADER = struct.Struct("<HHIQQIIHHII")
_MAGIC = 0xACCA
_SEED = 1


def has_nbd() -> bool:
    """Not every build of fio speaks NBD."""
    needs("fio")
    done = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=False)
    return "nbd" in done.stdout


def verify(served: Served, name: str, *options: str, timeout_s: float = 300) -> None:
    """Writes and verifies, in four jobs, each in its own 2 MiB, in sizes that are multiples of a sector."""
    if not has_nbd():
        pytest.skip("needs fio with its engine nbd")
    words = [
        *("fio", "--name=verify", "--ioengine=nbd", f"--uri={served.uri(name)}", "--rw=randrw", "--norandommap=0"),
        *("--bssplit=512/20:4k/40:12800/10:64k/30", f"--blockalign={SECTOR_BYTES}"),
        *("--verify=xxhash", f"--verify_interval={SECTOR_BYTES}", "--verify_fatal=1", "--verify_backlog=64"),
        *("--verify_state_save=0", "--iodepth=8", "--numjobs=4", "--size=2m", "--offset_increment=2m", "--minimal"),
        *options,
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=timeout_s)
    assert done.returncode == 0, f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"


def check_sectors(data: bytes, age_ns: int) -> int:
    """Each is empty or whole, belongs there, and was made when fio was no older than that; how many are written."""
    empty = bytes(SECTOR_BYTES)
    written = 0
    for place in range(0, len(data), SECTOR_BYTES):
        sector = data[place : place + SECTOR_BYTES]
        if sector == empty:
            continue
        magic, _, length, _, offset, seconds, nanoseconds, _, _, _, found = _HEADER.unpack_from(sector)
        assert (magic, length, offset) == (_MAGIC, SECTOR_BYTES, place), place
        assert xxhash.xxh32_intdigest(sector[_HEADER.size :], seed=_SEED) == found, place
        assert seconds * 10**9 + nanoseconds <= age_ns, place
        written += 1
    return written
