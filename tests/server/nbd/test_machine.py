"""A machine lives on a clone: what it writes is in the clone alone, and a rollback brings back what it destroyed."""

from __future__ import annotations

import hashlib
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapcore import MemoryStore, Repository, open_image
from snapcore.pool import Pool, Snapshot
from snapcore.repository import Labels
from snapcore.service import Regions, image
from tests.support.file_systems import check_file_system, file_in, recovered
from tests.support.guest import NETWORK, NETWORK_MODULES, Guest, make_debian, make_guest, make_root
from tests.support.nbd import Serve
from tests.support.pools import MIB, check_space
from tests.support.tools import needs

ROOT_BYTES = 32 * MIB
# Each start is counted; the second one destroys the disk under itself.
WORK = """
/bin/busybox cat /etc/original
starts=$(/bin/busybox cat /etc/starts 2>/dev/null)x
echo $starts > /etc/starts
echo "GUEST: start $starts"
if [ "$starts" = xx ]; then
    echo "GUEST: destroys its root"
    /bin/busybox dd if=/dev/zero of=/dev/vda bs=1M count=32 oflag=direct 2>/dev/null
    /bin/busybox poweroff -f
fi
/bin/busybox dd if=/dev/urandom of=/written bs=64k count=16 2>/dev/null
"""


# The kernel's own client: a file system is made, filled, trimmed and left; another connection finds what it holds.
KERNEL_CLIENT = """
bb=/bin/busybox
$bb mount -t sysfs none /sys
$bb ip link set lo up
$bb ip link set eth0 up
$bb ip addr add 10.0.2.15/24 dev eth0
join() {{ /bin/nbd-client -name data -connections 4 10.0.2.2 {port} /dev/nbd0 || echo GUEST: nbd-client failed; }}
leave() {{ /bin/nbd-client -d /dev/nbd0; while [ -e /sys/block/nbd0/pid ]; do $bb sleep 0.1; done; }}
join
/bin/mke2fs -q -F -t ext4 /dev/nbd0 || echo GUEST: mke2fs failed
$bb mount -t ext4 /dev/nbd0 /mnt
$bb dd if=/dev/urandom of=/mnt/kept bs=64k count=128 2>/dev/null
$bb dd if=/dev/urandom of=/mnt/gone bs=64k count=128 2>/dev/null
for n in 1 2 3 4 5 6 7 8; do $bb dd if=/dev/urandom of=/mnt/synced$n bs=4k count=$n conv=fsync 2>/dev/null; done
$bb sync
echo "GUEST: written"
$bb rm /mnt/gone
$bb sync
$bb fstrim /mnt
(cd /mnt && $bb sha256sum kept synced*) > /etc/written
$bb umount /mnt
leave
join
$bb mount -t ext4 /dev/nbd0 /mnt
(cd /mnt && $bb sha256sum kept synced*) > /etc/read
echo "over and over" > /mnt/again
$bb umount /mnt
leave
$bb cmp /etc/written /etc/read && echo "GUEST: reads what it wrote"
"""


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return make_guest(tmp_path)


@pytest.fixture
def installed(guest: Guest, pool: Pool, tmp_path: Path) -> Snapshot:
    """The root as an image, taken over."""
    return pool.import_image("golden", make_root(tmp_path, WORK, ROOT_BYTES)).snapshot("installed")


def test_a_machine_boots_from_a_clone_writes_destroys_its_root_and_is_rolled_back(
    serve: Serve, pool: Pool, guest: Guest, installed: Snapshot, tmp_path: Path
) -> None:
    original = installed.pread(ROOT_BYTES, 0)
    clone = pool.create_disk("vm", source=installed)
    served = serve()
    said = guest.boot(served.path, "vm")
    assert "as it was installed" in said
    assert file_in(clone, "/etc/starts", tmp_path) == b"x\n"
    # What it wrote is what differs from where the clone came from.
    changed = int(pool.diff(installed, clone)[:, 1].sum())
    assert MIB <= changed < 8 * MIB
    assert installed.pread(ROOT_BYTES, 0) == original == pool.open_disk("golden").pread(ROOT_BYTES, 0)
    good = clone.snapshot("good")
    check_file_system(good, tmp_path)
    assert "destroys its root" in guest.boot(served.path, "vm")
    assert "no root" in guest.boot(served.path, "vm")
    served.server.stop()
    clone.rollback(good)
    again = serve()
    # The second start once more: it comes as far as before.
    assert "destroys its root" in guest.boot(again.path, "vm")
    again.server.stop()
    assert installed.pread(ROOT_BYTES, 0) == original
    check_space(pool)


def test_the_kernels_own_client_has_a_file_system_on_a_disk(serve: Serve, pool: Pool, tmp_path: Path) -> None:
    needs("nbd-client", "e2fsck", "debugfs")
    guest = make_guest(tmp_path, *NETWORK_MODULES)
    served = serve(listen=[f"unix:{tmp_path}/socket", "tcp:127.0.0.1:0"])
    port = served.server.uris[1].rstrip("/").rpartition(":")[2]
    work = KERNEL_CLIENT.format(port=port)
    machine = pool.import_image("machine", make_root(tmp_path, work, 2 * ROOT_BYTES, "nbd-client", "mke2fs"))
    data = pool.create_disk("data", 64 * MIB)
    said = guest.boot(tmp_path / "socket", "machine", devices=NETWORK)
    assert "reads what it wrote" in said and "failed" not in said, said
    clients = [event.client for event in served.events if event.kind == "connected" and event.export == "data"]
    assert len(clients) == 8
    served.server.stop()
    check_file_system(data.snapshot("end"), tmp_path)
    sums = dict(reversed(line.split()) for line in file_in(machine, "/etc/written", tmp_path).decode().splitlines())
    assert len(sums) == 9
    with recovered(data, tmp_path) as image:
        for name, found in sums.items():
            words = ["debugfs", "-R", f"cat /{name}", image]
            content = subprocess.run(words, capture_output=True, check=True).stdout
            assert hashlib.sha256(content).hexdigest() == found, name
    # What was deleted was trimmed.
    assert data.extents().allocated[:, 1].sum() < 16 * MIB
    check_space(pool)


@pytest.mark.parametrize(
    ("count", "booting"), [(20, 2), pytest.param(200, 10, marks=pytest.mark.campaign)], ids=["some", "many"]
)
def test_machines_of_one_image_boot_at_once_and_fetch_what_they_read(
    serve: Serve, guest: Guest, folder: Path, tmp_path: Path, count: int, booting: int
) -> None:
    repository = Repository.create(MemoryStore())
    root = make_root(tmp_path, WORK, 8 * ROOT_BYTES)
    with open_image(root) as source:
        made = image.take(repository, Labels(name="golden"), source, {"xvdb": MIB})
    regions = Regions(open_repository=lambda url: repository)
    with Pool.create(folder / "machines", regions=regions) as pool:
        names = image.names("vm-###", count)
        image.launch(pool, repository, made, names)
        served = serve(pool=pool)
        with ThreadPoolExecutor(2) as machines:
            said = [*machines.map(lambda name: guest.boot(served.path, name), names[-booting:])]
        assert all("as it was installed" in text for text in said)
        served.server.stop()
        first, last = pool.open_disk(names[0]), pool.open_disk(names[-1])
        found = last.hydration()
        assert found is not None and found.here_bytes < ROOT_BYTES
        # Nobody booted the first one: it is as the image is.
        assert first.pread(8 * ROOT_BYTES, 0) == root.read_bytes()
        cuts = [pool.open_disk(name).snapshot("end") for name in names[-booting:]]
        for cut in cuts:
            check_file_system(cut, tmp_path)
        assert len({hash(cut.pread(8 * ROOT_BYTES, 0)) for cut in cuts}) == booting
        check_space(pool)


@pytest.mark.campaign
def test_ten_clones_of_one_snapshot_are_written_at_once_and_each_is_its_own(
    serve: Serve, pool: Pool, guest: Guest, installed: Snapshot, tmp_path: Path
) -> None:
    original = installed.pread(ROOT_BYTES, 0)
    served = serve()
    clones = [pool.create_disk(f"vm{number}", source=installed) for number in range(10)]
    ended = threading.Event()
    cuts: list[Snapshot] = []

    def cut() -> None:
        while not ended.wait(1):
            cuts.extend(clone.snapshot() for clone in clones[:3])

    cutter = threading.Thread(target=cut)
    cutter.start()
    with ThreadPoolExecutor(4) as machines:
        said = [*machines.map(lambda clone: guest.boot(served.path, clone.name), clones)]
    ended.set()
    cutter.join()
    starts = [file_in(clone, "/etc/starts", tmp_path) for clone in clones]
    assert [text for text, found in zip(said, starts, strict=True) if found != b"x\n"] == []
    assert installed.pread(ROOT_BYTES, 0) == original
    contents = {clone.pread(ROOT_BYTES, 0) for clone in clones}
    assert len(contents) == 10
    for snapshot in [*cuts[-6:], *(clone.snapshot("end") for clone in clones)]:
        check_file_system(snapshot, tmp_path)
    served.server.stop()
    check_space(pool)


@pytest.mark.campaign
def test_a_whole_debian_boots_from_a_clone_and_again_after_it_was_destroyed(
    serve: Serve, guest: Guest, tmp_path: Path
) -> None:
    with Pool.create(tmp_path / "pool") as pool:
        installed = pool.import_image("golden", make_debian(tmp_path, 1024 * MIB)).snapshot("installed")
        clone = pool.create_disk("vm", source=installed)
        served = serve(pool=pool)
        guest.boot(served.path, "vm", memory_mib=512)
        assert file_in(clone, "/etc/written", tmp_path) == b"systemd was here\n"
        assert 0 < pool.diff(installed, clone)[:, 1].sum() < 128 * MIB
        good = clone.snapshot("good")
        check_file_system(good, tmp_path)
        served.server.stop()
        clone.discard(0, 512 * MIB)
        clone.rollback(good)
        again = serve(pool=pool)
        guest.boot(again.path, "vm", memory_mib=512)
        assert file_in(clone, "/etc/written", tmp_path) == b"systemd was here\n" * 2
        again.server.stop()
        check_space(pool)
