"""A machine lives on although its pool is lost: it boots at once from a lazy disk over its archived snapshot."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import xxhash

from snapcore import Repository, open_image
from snapcore.pool import Disk, Pool, Snapshot
from snapcore.service import Archives, Regions
from tests.support.guest import Guest, make_debian, make_guest, make_root
from tests.support.nbd import Serve
from tests.support.pools import MIB
from tests.support.s3 import new_place, s3, s3_server
from tests.support.tools import needs

__all__ = ["s3", "s3_server"]
# What it wrote before the cut is there in the next life; a little work, so that it is cut while it runs.
WORK = """
/bin/busybox cat /etc/original
lives=$(/bin/busybox cat /etc/lives 2>/dev/null)x
echo $lives > /etc/lives
/bin/busybox sync
echo "GUEST: life $lives"
for i in 1 2 3 4 5 6; do
    /bin/busybox dd if=/dev/urandom of=/written bs=64k count=8 2>/dev/null
    /bin/busybox sync
    /bin/busybox sleep 0.2
done
"""


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    needs("qemu-img")
    return make_guest(tmp_path)


def digest(version: Disk | Snapshot) -> str:
    """Of all its bytes."""
    found, at = xxhash.xxh64(), 0
    while at < version.size_bytes:
        data = version.pread(8 * MIB, at)
        found.update(data)
        at += len(data)
    return found.hexdigest()


def outlives(
    serve: Serve, guest: Guest, image: Path, folder: Path, repository: Repository, *, memory_mib: int, busy_bytes: int
) -> tuple[str, float]:
    """The whole story. Returns what the machine printed in its second life, and which part of the disk was fetched."""
    qcow2 = folder / "root.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", "-c", image, qcow2], check=True)
    with Pool.create(folder / "first") as pool:
        with open_image(qcow2) as source:
            disk = pool.import_image("vm", source)
        installed = disk.snapshot("installed")
        served = serve(pool=pool)
        machine = threading.Thread(target=guest.boot, args=(served.path, "vm"), kwargs={"memory_mib": memory_mib})
        machine.start()
        with Archives(pool) as archives:
            while machine.is_alive() and pool.diff(installed, disk)[:, 1].sum() < busy_bytes:
                time.sleep(0.02)
            assert machine.is_alive()
            archived = archives.archive(repository, disk.snapshot("running")).result().archived
        machine.join()
        original = digest(pool.snapshot("running"))
        served.server.stop()
    shutil.rmtree(folder / "first")
    regions = Regions()
    region = regions.find(f"{repository.url}:{archived.id}")
    assert region is not None
    with Pool.create(folder / "second", regions=regions) as pool:
        disk = pool.create_disk("vm", source=region)
        served = serve(pool=pool)
        said = guest.boot(served.path, "vm", memory_mib=memory_mib)
        found = disk.hydration()
        assert found is not None
        served.server.stop()
        other = pool.create_disk("other", source=region)
        other.hydrate(wait=True)
        assert digest(other) == original
        other.decouple()
        pool.checkpoint()
        assert digest(other) == original
    shutil.rmtree(folder / "second")
    print(
        f"{repository.url}: {found.here_bytes / MIB:.1f} of {found.total_bytes / MIB:.0f} MiB ({found.percent:.1f} %) "
        f"were fetched when the machine had started all and ended; {archived.written_bytes / MIB:.1f} MiB are not zero"
    )
    return said, found.percent


@pytest.mark.parametrize("place", ["local", pytest.param("s3", marks=pytest.mark.campaign)])
def test_a_machine_whose_pool_is_lost_boots_at_once_from_its_archived_snapshot(
    serve: Serve, guest: Guest, tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    if place == "s3":
        request.getfixturevalue("s3")
    repository = Repository.create(new_place() if place == "s3" else tmp_path / "repo")
    image = make_root(tmp_path, WORK, 64 * MIB)
    said, percent = outlives(serve, guest, image, tmp_path, repository, memory_mib=256, busy_bytes=MIB)
    assert "as it was installed" in said and "GUEST: life xx" in said
    assert percent < 50


@pytest.mark.campaign
@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_whole_debian_boots_at_once_from_its_archived_snapshot(
    serve: Serve, guest: Guest, tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    if place == "s3":
        request.getfixturevalue("s3")
    repository = Repository.create(new_place() if place == "s3" else tmp_path / "repo")
    image = make_debian(tmp_path, 2048 * MIB)
    said, percent = outlives(serve, guest, image, tmp_path, repository, memory_mib=512, busy_bytes=MIB // 8)
    assert "Kernel panic" not in said
    assert percent < 20
