"""Makes generations of a real disk image: an ext4 disk with Debian, changed as a running system changes it.

gen0.img is a Debian with packages and a database file. Each next image is the one before it after package
installs, upgrades and removals, log appends, deletes, random 8-KiB database writes with fsync, and fstrim;
about a tenth of the used 4-KiB blocks differ. Relies on root, a loop device, ext4, debootstrap and the
host's apt. Promises images that pass e2fsck, that finished generations are kept when it is run again, and
that mounts and loops are gone whatever happens: all runs in a mount and process namespace of its own.

Package versions follow the mirror, so two hosts make similar sets, not equal ones.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import click
from debian import AptError, Archive, DebianTree, bootstrap, host_archive, open_tree
from images import BLOCK_BYTES, copy_sparse, data_bytes, differing_blocks
from workload import append_log, delete_documentation, update_database, write_database

# Sizes at --scale 1.
USED_BYTES = 3_100_000_000
DATABASE_BYTES = 420_000_000
JOURNAL_BYTES = 64 << 20
SMALLEST_JOURNAL_BYTES = 4 << 20

# Of the used bytes, the share that each generation changes in all, and the most that it installs, upgrades
# and logs. What is removed or replaced changes its old place too, the journal 2 %; the rest is the database.
CHANGED_SHARES = (0.09, 0.12, 0.08, 0.11)
INSTALLED_SHARE = 0.015
UPGRADED_SHARE = 0.01
LOGGED_SHARE = 0.003

# Installed into gen0 one after the other, each if it still fits.
SYSTEM_BUNDLES = (
    "python3",
    "nginx-light",
    "git",
    "build-essential",
    "default-jdk-headless",
    "postgresql",
    "golang-go",
    "libreoffice-writer",
    "clang",
    "rustc cargo",
    "texlive-latex-recommended",
    "gdb",
    "cmake",
    "vim-nox",
    "samba",
    "php-cli",
    "tmux",
    "rsync",
)

# Installed into the later generations, large ones first; generation g takes from every fourth one.
OPTIONAL_BUNDLES = (
    "emacs-nox",
    "mariadb-server",
    "inkscape",
    "wireshark-common",
    "nodejs",
    "imagemagick",
    "ruby-full",
    "valgrind",
    "maxima",
    "fonts-noto-cjk",
    "mercurial",
    "fonts-noto-core",
    "nmap",
    "erlang-base",
    "subversion",
    "r-base-core",
    "sqlite3",
    "zsh",
    "lua5.4",
    "curl",
    "htop",
    "jq",
    "ncdu",
    "strace",
)
BUNDLE_SETS = 4

_ISOLATED = "SNAPCORE_BENCH_ISOLATED"


@dataclass(frozen=True)
class Settings:
    """What one set of generations is made of; kept beside it, so that it is not continued with another."""

    size_bytes: int
    scale: float

    def scaled(self, amount_bytes: float) -> int:
        """An amount at --scale 1 as it is in this set."""
        return round(amount_bytes * self.scale)


@dataclass(frozen=True)
class Row:
    """What a generation is: its used bytes, and how it differs from the one before it."""

    generation: int
    used_bytes: int
    changed_blocks: int
    changed_percent: float


class Generations:
    """A folder of generations in the making."""

    def __init__(self, folder: Path, settings: Settings, archive: Archive, log: IO[str]) -> None:
        self._folder = folder
        self._settings = settings
        self._archive = archive
        self._log = log
        self._work = folder / "work.img"

    def make(self, generation: int) -> None:
        """Make one generation out of the one before it."""
        if generation == 0:
            self._make_file_system()
            self._install_system()
        else:
            previous = image_path(self._folder, generation - 1)
            copy_sparse(previous, self._work)
            self._change_system(generation, previous)
        subprocess.run(["e2fsck", "-fn", self._work], check=True, stdout=self._log, stderr=self._log)
        image = image_path(self._folder, generation)
        unfinished = image.with_suffix(".part")
        copy_sparse(self._work, unfinished)
        self._work.unlink()
        unfinished.rename(image)

    def _make_file_system(self) -> None:
        self._work.unlink(missing_ok=True)
        self._work.touch()
        os.truncate(self._work, self._settings.size_bytes)
        journal_bytes = max(SMALLEST_JOURNAL_BYTES, self._settings.scaled(JOURNAL_BYTES))
        options = ["-b", str(BLOCK_BYTES), "-E", "lazy_itable_init=0,lazy_journal_init=0"]
        options += ["-J", f"size={journal_bytes >> 20}"]
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", *options, self._work], check=True)

    def _install_system(self) -> None:
        target_bytes = self._settings.scaled(USED_BYTES)
        with mounted(self._work) as root:
            bootstrap(root, self._archive, self._log)
            write_database(root, self._settings.scaled(DATABASE_BYTES))
            with open_tree(root, self._log) as tree:
                tree.use_sources(self._archive.release())
                for bundle in SYSTEM_BUNDLES:
                    if used_bytes(root) + tree.added_bytes(bundle) <= target_bytes:
                        tree.install([bundle])
            append_log(root, 0, round(target_bytes * LOGGED_SHARE))
            trim(root)

    def _change_system(self, generation: int, previous: Path) -> None:
        target_bytes = self._settings.scaled(USED_BYTES)
        with mounted(self._work) as root:
            with open_tree(root, self._log) as tree:
                tree.use_sources(self._archive.release_with_updates())
                change_packages(tree, generation, target_bytes)
            append_log(root, generation, round(target_bytes * LOGGED_SHARE))
            delete_documentation(root, generation)
            trim(root)
            changed_bytes = differing_blocks(previous, self._work) * BLOCK_BYTES
            share = CHANGED_SHARES[(generation - 1) % len(CHANGED_SHARES)]
            update_database(root, generation, round(data_bytes(self._work) * share) - changed_bytes)
            trim(root)


def change_packages(tree: DebianTree, generation: int, system_bytes: int) -> None:
    """Upgrade some packages, install a set of others, and remove what the generation before it installed."""
    if upgraded := fitting(tree.upgradable().items(), system_bytes * UPGRADED_SHARE):
        tree.install(upgraded)
    sizes = ((bundle, tree.added_bytes(bundle)) for bundle in optional_bundles(generation))
    tree.install(fitting(sizes, system_bytes * INSTALLED_SHARE))
    if generation > 1:
        tree.remove([bundle for bundle in optional_bundles(generation - 1) if tree.is_installed(bundle)])


def optional_bundles(generation: int) -> tuple[str, ...]:
    """The bundles that a generation may install."""
    return OPTIONAL_BUNDLES[(generation - 1) % BUNDLE_SETS :: BUNDLE_SETS]


def fitting(sizes: Iterable[tuple[str, int]], budget_bytes: float) -> list[str]:
    """First-fit choice of names whose sizes together stay within a budget."""
    chosen = []
    for name, size_bytes in sizes:
        if size_bytes <= budget_bytes:
            budget_bytes -= size_bytes
            chosen.append(name)
    return chosen


def used_bytes(root: Path) -> int:
    """Bytes in use on a mounted file system."""
    status = os.statvfs(root)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def trim(root: Path) -> None:
    """Give the free blocks of a mounted disk back, which makes them holes of its image."""
    os.sync()
    subprocess.run(["fstrim", root], check=True)


@contextmanager
def mounted(image: Path) -> Iterator[Path]:
    """Mount an image through a loop device, which goes with the mount."""
    root = image.with_suffix(".mount")
    root.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, root], check=True)
    try:
        yield root
    finally:
        subprocess.run(["umount", root], check=True)
        root.rmdir()


def image_path(folder: Path, generation: int) -> Path:
    """Where a generation is."""
    return folder / f"gen{generation}.img"


def describe(folder: Path, generation: int) -> Row:
    """Measure a finished generation."""
    image = image_path(folder, generation)
    used = data_bytes(image)
    changed = differing_blocks(image_path(folder, generation - 1), image) if generation else 0
    return Row(generation, used, changed, 100 * changed * BLOCK_BYTES / used)


def keep_settings(folder: Path, settings: Settings) -> None:
    """Note the settings of a new set, or check that an old one is continued with its own."""
    path = folder / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(asdict(settings)) + "\n")
    elif (kept := Settings(**json.loads(path.read_text()))) != settings:
        raise click.ClickException(f"{folder} holds a set made with {kept}; use these or another folder")


def isolate() -> None:
    """Run this program again in a mount and process namespace of its own, in which nothing outlives this one.

    unshare does not pass on SIGTERM, so the death of this process is what ends it.
    """
    if _ISOLATED not in os.environ:
        die_with_parent = ["setpriv", "--pdeathsig", "KILL"]
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = [*die_with_parent, *unshare, sys.executable, *sys.orig_argv[1:]]
        sys.exit(subprocess.run(command, env=os.environ | {_ISOLATED: "1"}, check=False).returncode)


def parse_bytes(_context: click.Context, _parameter: click.Parameter, text: str) -> int:
    """Read a size such as 8G or 512M."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    try:
        return int(text[:-1]) * units[text[-1:].upper()]
    except (KeyError, ValueError):
        raise click.BadParameter(f"{text!r} is not a number followed by K, M or G") from None


def print_table(rows: list[Row]) -> None:
    """Print the rows for people."""
    click.echo(f"{'image':<10}{'used MB':>10}{'changed 4-KiB blocks':>23}{'of the used':>13}")
    for row in rows:
        share = f"{row.changed_percent:.1f} %" if row.generation else "-"
        used_mb = row.used_bytes / 1e6
        click.echo(f"gen{row.generation:<7}{used_mb:>10,.0f}{row.changed_blocks:>23,}{share:>13}")


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--size", "size_bytes", default="8G", show_default=True, callback=parse_bytes, help="Disk size.")
@click.option("--scale", default=1.0, show_default=True, help="Used bytes: 1 is 3.1 GB, 0.1 is the least.")
@click.option("--count", default=5, show_default=True, help="Number of generations.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(folder: Path, size_bytes: int, scale: float, count: int, as_json: bool) -> None:
    """Make generations of a Debian disk image in DIR: gen0.img, gen1.img, …"""
    if os.geteuid() != 0:
        raise click.ClickException("this mounts disk images and runs debootstrap: run it as root")
    isolate()
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(size_bytes, scale)
    keep_settings(folder, settings)
    log_path = folder / "generations.log"
    try:
        with log_path.open("a") as log:
            generations = Generations(folder, settings, host_archive(), log)
            for generation in range(count):
                if not image_path(folder, generation).exists():
                    click.echo(f"making gen{generation} …", err=True)
                    generations.make(generation)
    except AptError as error:
        raise click.ClickException(str(error)) from error
    except subprocess.CalledProcessError as error:
        raise click.ClickException(f"{error} Its output is in {log_path}.") from error
    rows = [describe(folder, generation) for generation in range(count)]
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
