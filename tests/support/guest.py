"""A machine without hardware: a Debian kernel under QEMU's emulator, a root that is a few files, and an initrd for it.

The kernel is unpacked, not installed: `.ci/run` puts Debian's linux-image-cloud package below
/usr/local/share/snapcore-guest (or where SNAPCORE_GUEST says).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.tools import needs

# In the order in which they are loaded; ext4 and what it needs is in the kernel.
_MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")
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

    def boot(self, socket: Path, export: str, *, memory_mib: int = 256) -> str:
        """Run a machine on an export until it powers itself off; returns what it printed."""
        command = self.command(socket, export, memory_mib=memory_mib)
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


def make_guest(folder: Path) -> Guest:
    """The initrd for the kernel that is there. Skips the test without tools or kernel."""
    needs("qemu-system-x86_64", "busybox", "mke2fs")
    place = Path(os.environ.get("SNAPCORE_GUEST", "/usr/local/share/snapcore-guest"))
    kernels = sorted(place.glob("boot/vmlinuz-*"))
    if not kernels:
        if os.environ.get("SNAPCORE_REQUIRE_TOOLS"):
            pytest.fail(f"needs a kernel below {place}, and SNAPCORE_REQUIRE_TOOLS is set")
        pytest.skip(f"needs a kernel below {place}")
    files = {"init": _FIRST_INIT.format(modules=" ".join(_MODULES)).encode(), "bin/busybox": _busybox()}
    for module in place.glob("lib/modules/*/kernel/drivers/**/virtio*.ko"):
        if module.stem in _MODULES:
            files[module.name] = module.read_bytes()
    initrd = folder / "initrd"
    initrd.write_bytes(cpio(["bin", "dev", "root"], files))
    return Guest(kernels[-1], initrd)


def make_root(folder: Path, work: str, size_bytes: int) -> Path:
    """An ext4 image of a root whose init does some work in busybox's shell, and powers off."""
    root = folder / "root"
    for name in ("bin", "sbin", "dev", "proc", "etc"):
        (root / name).mkdir(parents=True)
    for name, content in (("bin/busybox", _busybox()), ("sbin/init", _INIT.format(work=work).encode())):
        (root / name).write_bytes(content)
        (root / name).chmod(0o755)
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


def _busybox() -> bytes:
    found = shutil.which("busybox")
    assert found is not None
    return Path(found).read_bytes()
