"""Very large disks cost what is on them, and memory is bounded whatever is on them.

The work runs in a process of its own, which reports the most memory that it had. The gate takes little data; the
campaigns take a GiB.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.sparse import data_bytes, read_sparse

MIB = 1 << 20
CHUNK_BYTES = 64 << 10
# The largest file that ext4 holds: 16 TiB but for one block.
HUGE_BYTES = (16 << 40) - 4096
MEMORY_LIMIT_BYTES = 256 * MIB

# VmHWM and not getrusage: the latter takes over what the parent had when it forked.
WORK = """
import json, os, resource, sys
from pathlib import Path
import snapcore

def most_bytes():
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

folder, old, new, chunk_bytes, listed = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
repository = snapcore.Repository.create(folder / "repository", chunk_bytes=chunk_bytes)
facts, memory = {}, {}
first = repository.snapshot(old, disk="disk")
memory["full"] = most_bytes()
second = repository.snapshot(new, disk="disk")
memory["incremental"] = most_bytes()
changed = json.loads(listed)
if changed is not None:
    third = repository.snapshot(old, disk="disk", changed=changed)
    assert third.snapshot.root == first.snapshot.root
    facts["listed_read"] = third.read_bytes
    memory["incremental by a list"] = most_bytes()
facts["diff"] = repository.diff(first.snapshot, second.snapshot).tolist()
facts["diff_images"] = snapcore.diff_images(old, new, block_bytes=chunk_bytes).tolist()
memory["diff"] = most_bytes()
repository.restore(second.snapshot, folder / "restored")
memory["restore"] = most_bytes()
facts["in_place"] = repository.restore(first.snapshot, folder / "restored", in_place=True).written_bytes
memory["restore in place"] = most_bytes()
repository.restore(second.snapshot, folder / "restored", in_place=True)
facts["ok"] = repository.verify().ok
memory["verify"] = most_bytes()
facts["unique"] = repository.unique([first.snapshot]).plain_bytes
repository.delete(first.snapshot)
repository.collect()
facts["ok after collect"] = repository.verify().ok
memory["collect"] = most_bytes()
for name, created in (("first", first), ("second", second)):
    facts[name] = [created.snapshot.written_bytes, created.snapshot.changed_bytes, created.read_bytes]
hints = next((Path(os.environ["XDG_CACHE_HOME"]) / "snapcore" / "hints").iterdir())
facts["hints_allocated"] = hints.stat().st_blocks * 512
print(json.dumps({"facts": facts, "memory": memory}))
"""


def _work(
    folder: Path, old: Path, new: Path, chunk_bytes: int, changed: list[tuple[int, int]] | None = None
) -> dict[str, object]:
    """Run all of it; nothing takes more memory than allowed. Returns the facts."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            WORK,
            str(folder),
            str(old),
            str(new),
            str(chunk_bytes),
            json.dumps(changed),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert max(report["memory"].values()) <= MEMORY_LIMIT_BYTES, report["memory"]
    facts: dict[str, object] = report["facts"]
    assert facts["ok"] and facts["ok after collect"]
    return facts


def _huge(path: Path, total_bytes: int, seed: int) -> None:
    """A disk of 16 TiB with data in 16 places: at both ends, and about the borders of the tree's nodes."""
    chooser = random.Random(seed)
    piece = total_bytes // 16
    with path.open("wb") as file:
        try:
            file.truncate(HUGE_BYTES)
        except OSError as error:
            pytest.skip(f"the file system of {path} holds no file of {HUGE_BYTES} bytes: {error}")
        borders = [128**level * CHUNK_BYTES * slot for level in (1, 2, 3) for slot in (1, 2, 5, 127)]
        offsets = [0, HUGE_BYTES - piece, *(border - piece // 2 for border in borders), 3 << 40, 11 << 40]
        for offset in offsets:
            for start in range(0, piece, MIB):
                os.pwrite(file.fileno(), chooser.randbytes(min(MIB, piece - start)), max(0, offset + start))


def _check_huge(folder: Path, total_bytes: int) -> None:
    old, new = folder / "old", folder / "new"
    _huge(old, total_bytes, 1)
    _huge(new, total_bytes, 1)
    places = [0, HUGE_BYTES - 1, 3 << 40, 9 << 40]
    with new.open("r+b") as file:
        for offset in places:
            os.pwrite(file.fileno(), b"\xff", offset)
    changed = [[offset // CHUNK_BYTES * CHUNK_BYTES, CHUNK_BYTES] for offset in places]
    changed[1][1] = HUGE_BYTES - changed[1][0]
    changed.sort()

    facts = _work(folder, old, new, CHUNK_BYTES, [(0, HUGE_BYTES)])

    assert facts["diff"] == facts["diff_images"] == changed
    written, changed_bytes, read = facts["first"]  # type: ignore[misc]
    data = data_bytes(old)
    assert data <= written <= data + 32 * CHUNK_BYTES
    assert changed_bytes == written
    assert data <= read <= data + 32 * CHUNK_BYTES
    assert facts["second"][:2] == [written + CHUNK_BYTES, 4 * CHUNK_BYTES]  # type: ignore[index]
    assert facts["in_place"] == 4 * 4096
    assert data_bytes(folder / "restored") <= data_bytes(new)
    assert read_sparse(folder / "restored") == read_sparse(new)
    # 8 bytes a chunk that is not zero, in blocks; not the 2 GiB that 8 bytes for each chunk of the disk would be.
    assert facts["hints_allocated"] <= data // CHUNK_BYTES * 8 + 64 * 4096  # type: ignore[operator]


def _random_image(path: Path, size_bytes: int, seed: int) -> None:
    chooser = random.Random(seed)
    with path.open("wb") as file:
        for _ in range(size_bytes // (4 * MIB)):
            file.write(chooser.randbytes(4 * MIB))


def _check_full(folder: Path, size_bytes: int, chunk_bytes: int) -> None:
    old, new = folder / "old", folder / "new"
    _random_image(old, size_bytes, 1)
    _random_image(new, size_bytes, 1)
    with new.open("r+b") as file:
        for offset in range(0, size_bytes, MIB):
            os.pwrite(file.fileno(), b"\xff" * 100, offset + 4096 * (offset // MIB % 16))
    facts = _work(folder, old, new, chunk_bytes)
    assert facts["diff"] == facts["diff_images"]
    assert facts["in_place"] == size_bytes // MIB * 4096
    assert facts["first"] == [size_bytes, size_bytes, size_bytes]
    assert read_sparse(folder / "restored") == read_sparse(new)


def test_a_disk_of_16_tib_costs_what_is_on_it(tmp_path: Path) -> None:
    _check_huge(tmp_path, 64 * MIB)


@pytest.mark.campaign
def test_a_disk_of_16_tib_with_a_gib_of_data_costs_what_is_on_it(tmp_path: Path) -> None:
    _check_huge(tmp_path, 1024 * MIB)


@pytest.mark.parametrize("chunk_bytes", [64 << 10, 4 << 20], ids=["64 KiB", "4 MiB"])
def test_memory_is_bounded_on_a_disk_full_of_data(chunk_bytes: int, tmp_path: Path) -> None:
    """Were all of it kept anywhere, it would be too much."""
    _check_full(tmp_path, 256 * MIB, chunk_bytes)


@pytest.mark.campaign
@pytest.mark.parametrize("chunk_bytes", [4 << 10, 64 << 10, 4 << 20], ids=["4 KiB", "64 KiB", "4 MiB"])
def test_memory_is_bounded_on_a_gib_full_of_data(chunk_bytes: int, tmp_path: Path) -> None:
    _check_full(tmp_path, 1024 * MIB, chunk_bytes)
