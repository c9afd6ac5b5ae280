"""A machine without hardware: a Debian kernel under QEMU's emulator, a root that is a few files, and an initrd for it.

The kernel is unpacked, not installed: `.ci/run` puts Debian's linux-image-cloud package below
/usr/local/share/snapcore-guest (or where SNAPCORE_GUEST says).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.tools import needs

# In the order in which they are loaded; ext4 and what it needs is in the kernel.
_MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")
# A network card, and the kernel's NBD client.
NETWORK_MODULES = ("failover", "net_failover", "virtio_net", "nbd")
# QEMU's own network: the host's loopback is 10.0.2.2 in there.
NETWORK = ("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=")
_FIRST_INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
for module in {modules}; do /bin/busybox insmod /$module.ko; done
/bin/busybox mount -t ext4 /dev/vda /root || {{ echo GUEST: no root; /bin/busybox poweroff -f; }}
exec /bin/busybox switch_root /root /sbin/init
"""
_INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t devtmpfs none /dev
echo "GUEST: up"
{work}
/bin/busybox sync
/bin/busybox mount -o remount,ro /dev/vda /
/bin/busybox poweroff -f
"""


@dataclass(frozen=True)
class Guest:
    """What a machine is started with.

    Attributes
    ----------
    kernel, initrd : Path
    """

    kernel: Path
    initrd: Path

    def boot(self, socket: Path, export: str, *, memory_mib: int = 256, devices: Sequence[str] = ()) -> str:
        """Run a machine on an export until it powers itself off; returns what it printed."""
        command = [*self.command(socket, export, memory_mib=memory_mib), *devices]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        return done.stdout

    def command(self, socket: Path, export: str, *, memory_mib: int) -> list[str]:
        """The machine's command."""
        drive = f"driver=nbd,node-name=disk,server.type=unix,server.path={socket},export={export},discard=unmap"
        return [
            *("qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-m", str(memory_mib), "-nodefaults"),
            *("-display", "none", "-no-reboot", "-serial", "stdio", "-blockdev", drive),
            *("-device", "virtio-blk-pci,drive=disk", "-kernel", str(self.kernel), "-initrd", str(self.initrd)),
            *("-append", "console=ttyS0 quiet panic=-1 mitigations=off"),
        ]


def make_guest(folder: Path, *modules: str) -> Guest:
    """The initrd, with further modules, for the kernel that is there. Skips the test without tools or kernel."""
    needs("qemu-system-x86_64", "busybox", "mke2fs")
    place = Path(os.environ.get("SNAPCORE_GUEST", "/usr/local/share/snapcore-guest"))
    kernels = sorted(place.glob("boot/vmlinuz-*"))
    if not kernels:
        if os.environ.get("SNAPCORE_REQUIRE_TOOLS"):
            pytest.fail(f"needs a kernel below {place}, and SNAPCORE_REQUIRE_TOOLS is set")
        pytest.skip(f"needs a kernel below {place}")
    names = (*_MODULES, *modules)
    files = {"init": _FIRST_INIT.format(modules=" ".join(names)).encode(), "bin/busybox": _busybox()}
    found = {module.stem: module for module in place.glob(f"lib/modules/{kernels[-1].name[8:]}/kernel/**/*.ko")}
    files |= {f"{name}.ko": found[name].read_bytes() for name in names}
    initrd = folder / "initrd"
    initrd.write_bytes(cpio(["bin", "dev", "root"], files))
    return Guest(kernels[-1], initrd)


def make_root(folder: Path, work: str, size_bytes: int, *programs: str) -> Path:
    """An ext4 image of a root whose init does some work with busybox and programs of the host, and powers off."""
    root = folder / "root"
    for name in ("bin", "sbin", "dev", "proc", "sys", "etc", "mnt"):
        (root / name).mkdir(parents=True)
    own = {"/bin/busybox": _busybox(), "/sbin/init": _INIT.format(work=work).encode()}
    for path, content in (own | _with_libraries(programs)).items():
        target = root / path[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(0o755)
    (root / "etc" / "original").write_text("as it was installed\n")
    image = folder / "root.img"
    with image.open("xb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(root), str(image)], check=True)
    return image


_UNIT = """[Unit]
Description=writes and powers off
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo systemd was here >> /etc/written; sync; systemctl --no-block poweroff'
StandardOutput=journal+console
[Install]
WantedBy=multi-user.target
"""


def make_debian(folder: Path, size_bytes: int) -> Path:
    """An ext4 image of a small Debian whose systemd starts all, writes a file and powers off. Takes a minute or two."""
    needs("debootstrap", "mke2fs", root=True)
    root = folder / "debian"
    packages = "--include=systemd-sysv,udev,kmod"
    subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", root], check=True, capture_output=True)
    units = root / "etc/systemd/system"
    (units / "written.service").write_text(_UNIT)
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "multi-user.target.wants/written.service").symlink_to("/etc/systemd/system/written.service")
    (root / "etc/original").write_text("as it was installed\n")
    shutil.rmtree(root / "var/cache/apt")
    image = folder / "debian.img"
    with image.open("xb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(root), str(image)], check=True)
    return image


def cpio(folders: list[str], files: dict[str, bytes]) -> bytes:
    """An archive as kernels take it for an initrd (the format "newc" of cpio(5))."""
    out = bytearray()
    entries = [*((name, 0o40755, b"") for name in folders), *((name, 0o100755, data) for name, data in files.items())]
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


def _with_libraries(programs: Iterable[str]) -> dict[str, bytes]:
    """Programs of the host, in /bin, and the libraries that they are linked with, where they are on the host."""
    files = {}
    for name in programs:
        program = shutil.which(name)
        assert program is not None
        files[f"/bin/{name}"] = Path(program).read_bytes()
        linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        for path in re.findall(r"(/\S+) \(0x", linked):
            files[path] = Path(path).read_bytes()
    return files


def _busybox() -> bytes:
    found = shutil.which("busybox")
    assert found is not None
    return Path(found).read_bytes()
