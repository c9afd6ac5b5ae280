"""A Debian tree on a mounted disk: bootstrapped, and changed by its own package manager.

Relies on root, debootstrap, and an apt on the host that reaches a Debian mirror; mirror, proxy settings
and certificates of the host's apt are taken over into the tree, credentials are not. Promises that the tree
starts no services, that downloads and apt's own caches stay off the disk, and that what apt and dpkg print
goes to the given log.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

SUITE = "bookworm"

_APT_SETTINGS = """\
Acquire::GzipIndexes "true";
APT::Install-Recommends "false";
"""
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}
_HOST_CERTIFICATES = Path("/usr/local/share/ca-certificates")


class AptError(RuntimeError):
    """The host's apt configuration cannot serve a Debian tree."""


@dataclass(frozen=True)
class Archive:
    """Where the host gets Debian from, and how.

    Parameters
    ----------
    mirror : URI of the main archive.
    security : URI of the security archive, None if the host does not use one.
    acquire_settings : lines for apt.conf that make downloads work, such as proxies.
    """

    mirror: str
    security: str | None
    acquire_settings: str

    def release(self) -> str:
        """Lines for sources.list: the release as it was published."""
        return f"deb {self.mirror} {SUITE} main\n"

    def release_with_updates(self) -> str:
        """Lines for sources.list: the release and all updates to it."""
        lines = f"{self.release()}deb {self.mirror} {SUITE}-updates main\n"
        return lines + f"deb {self.security} {SUITE}-security main\n" if self.security else lines


def host_archive() -> Archive:
    """The Debian archive that the host's apt uses."""
    columns = "$(ORIGIN) $(REPO_URI) $(CODENAME)"
    listed = _output(["apt-get", "indextargets", "--format", columns, "Created-By: Packages"])
    targets = [line.split() for line in listed.splitlines()]
    uris = {codename: uri for origin, uri, codename in targets if origin == "Debian"}
    mirror = next((uri for codename, uri in uris.items() if "-" not in codename), None)
    security = next((uri for codename, uri in uris.items() if codename.endswith("-security")), None)
    if mirror is None:
        raise AptError("apt on this host knows no Debian mirror; configure one and run apt-get update")
    settings = [line for line in _output(["apt-config", "dump"]).splitlines() if _is_download_setting(line)]
    return Archive(mirror, security, "\n".join(settings) + "\n")


def _is_download_setting(line: str) -> bool:
    return line.startswith("Acquire") and not line.startswith("Acquire::IndexTargets")


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def bootstrap(root: Path, archive: Archive, log: IO[str]) -> None:
    """Make a minimal Debian in an empty folder, ready for `DebianTree`."""
    options = ["--variant=minbase", "--include=ca-certificates"]
    command = ["debootstrap", *options, SUITE, str(root), archive.mirror]
    subprocess.run(command, check=True, stdout=log, stderr=log)
    (root / "etc/apt/apt.conf.d/90host").write_text(archive.acquire_settings + _APT_SETTINGS)
    for index in (root / "var/lib/apt/lists").glob("*_*"):
        index.unlink()
    (root / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n")
    no_services = root / "usr/sbin/policy-rc.d"
    no_services.write_text("#!/bin/sh\nexit 101\n")
    no_services.chmod(0o755)
    for certificate in _HOST_CERTIFICATES.glob("**/*.crt"):
        shutil.copy(certificate, root / "usr/local/share/ca-certificates")


class DebianTree:
    """The package manager of a Debian tree; make one with `open_tree`.

    A bundle is a string of package names separated by spaces.
    """

    def __init__(self, root: Path, log: IO[str]) -> None:
        self.root = root
        self._log = log

    def use_sources(self, lines: str) -> None:
        """Take packages from these sources from now on."""
        (self.root / "etc/apt/sources.list").write_text(lines)
        self._run("update-ca-certificates")
        self._run("apt-get", "update")

    def added_bytes(self, bundle: str) -> int:
        """Bytes that installing a bundle with all it needs would add, as its packages declare them."""
        unpacked = self._simulated("install", *bundle.split())
        return sum(self._installed_bytes(unpacked).values())

    def install(self, bundles: Sequence[str]) -> None:
        """Install or upgrade packages and what they need."""
        self._run("apt-get", "--yes", "install", *" ".join(bundles).split())

    def remove(self, bundles: Sequence[str]) -> None:
        """Remove packages with their configuration, and what only they needed."""
        self._run("apt-get", "--yes", "autoremove", "--purge", *" ".join(bundles).split())

    def is_installed(self, bundle: str) -> bool:
        """Whether any package of a bundle is there."""
        installed = set(self._read("dpkg-query", "--show", "--showformat", "${Package}\n").split())
        return not installed.isdisjoint(bundle.split())

    def upgradable(self) -> dict[str, int]:
        """Bundles for which the sources have a newer version, with their installed bytes.

        A bundle is what was built from one source, as such packages often demand each other's exact version.
        """
        bundles: dict[str, list[str]] = {}
        if names := self._simulated("upgrade"):
            columns = "${source:Package} ${Package}\n"
            listed = self._read("dpkg-query", "--show", "--showformat", columns, *names)
            for source, name in map(str.split, listed.splitlines()):
                bundles.setdefault(source, []).append(name)
        sizes = self._installed_bytes(names)
        return {" ".join(bundle): sum(sizes[name] for name in bundle) for bundle in bundles.values()}

    def _simulated(self, *action: str) -> list[str]:
        """Names of the packages that an apt-get action would unpack."""
        simulation = self._read("apt-get", "--simulate", *action)
        return [line.split()[1] for line in simulation.splitlines() if line.startswith("Inst ")]

    def _installed_bytes(self, names: Sequence[str]) -> dict[str, int]:
        """Installed size that each package declares; the format says it in KiB."""
        if not names:
            return {}
        sizes: dict[str, int] = {}
        for line in self._read("apt-cache", "show", "--no-all-versions", *names).splitlines():
            field, _, value = line.partition(": ")
            if field == "Package":
                name = value
            elif field == "Installed-Size":
                sizes[name] = int(value) * 1024
        return sizes

    def _run(self, *command: str) -> None:
        self._spawn(command, stdout=self._log)

    def _read(self, *command: str) -> str:
        return self._spawn(command, stdout=subprocess.PIPE).stdout

    def _spawn(self, command: Sequence[str], stdout: IO[str] | int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["chroot", str(self.root), *command],
            check=True,
            env=_environment(),
            stdout=stdout,
            stderr=self._log,
            text=True,
        )


def _environment() -> dict[str, str]:
    """The tree's environment: a plain one, with the host's proxies."""
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    return _ENVIRONMENT | proxies


@contextmanager
def open_tree(root: Path, log: IO[str]) -> Iterator[DebianTree]:
    """Open a bootstrapped tree for its package manager, with /proc and a cache of apt's in memory."""
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    with _mounted("proc", root / "proc"), _mounted("tmpfs", root / "var/cache/apt"):
        (root / "var/cache/apt/archives/partial").mkdir(parents=True)
        yield DebianTree(root, log)


@contextmanager
def _mounted(file_system: str, folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", file_system, file_system, folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
