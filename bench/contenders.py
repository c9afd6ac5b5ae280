"""The programs that are measured side by side: their repositories and their commands for the same work.

Each contender works in a folder of its own, with its repository in `repository` and its caches in `home`.
Relies on the programs being installed; all are told to make what they write durable, where they can be told.
Nothing here is timed: commands are returned to whoever measures them.
"""

import json
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from images import compare_command
from measure import Command, run

_PASSPHRASE = "bench"


class Contender(ABC):
    """One program with its settings; an empty list of commands means that it cannot do that work.

    Parameters
    ----------
    name : what it is called in the table.
    program : name or path of its executable.
    """

    def __init__(self, name: str, program: str) -> None:
        self.name = name
        self.program = program
        self.folder = Path()
        self.images: Sequence[Path] = ()

    @property
    def repository(self) -> Path:
        """Folder that holds what the contender stores."""
        return self.folder / "repository"

    def start(self, folder: Path, images: Sequence[Path]) -> None:
        """Begin anew in an empty folder, for these generations of an image."""
        self.folder = folder
        self.images = images
        (folder / "home").mkdir(parents=True)
        run(self.initialise())

    def initialise(self) -> list[Command]:
        """Make an empty repository."""
        self.repository.mkdir()
        return []

    @abstractmethod
    def snapshot(self, generation: int) -> list[Command]:
        """Store a generation; generation 0 is a full snapshot, each later one comes after the one before."""

    def note_snapshot(self, output: str) -> None:  # noqa: B027
        """Learn from what the snapshot's command printed."""

    @abstractmethod
    def restore(self, generation: int, folder: Path) -> list[Command]:
        """Write a stored generation into an empty folder, under the image's own name."""

    @abstractmethod
    def verify(self) -> list[Command]:
        """Read all that is stored and check it."""

    def _command(self, *arguments: str | Path, folder: Path | None = None, **environment: str) -> Command:
        home = str(self.folder / "home")
        homes = {"XDG_CACHE_HOME": home, "BORG_BASE_DIR": home}
        return Command((self.program, *map(str, arguments)), homes | environment, folder or self.folder)


class Snapcore(Contender):
    """snapcore with a local repository."""

    NAME = "snapcore"

    def __init__(self, program: str) -> None:
        super().__init__(self.NAME, program)
        self._ids: list[str] = []

    def initialise(self) -> list[Command]:
        self._ids = []
        return [self._command("repo", "init", self.repository)]

    def snapshot(self, generation: int) -> list[Command]:
        image = self.images[generation]
        options = ("-r", self.repository, "--disk", "disk", "--json")
        return [self._command("snapshot", "create", image, *options)]

    def note_snapshot(self, output: str) -> None:
        self._ids.append(json.loads(output)["id"])

    def restore(self, generation: int, folder: Path) -> list[Command]:
        target = folder / self.images[generation].name
        return [self._command("restore", self._ids[generation], target, "-r", self.repository)]

    def verify(self) -> list[Command]:
        return [self._command("verify", "-r", self.repository, "--json")]


class Borg(Contender):
    """borg 1 with LZ4 and chunks of a fixed size."""

    def __init__(self, name: str, chunk_bytes: int, encryption: str = "none") -> None:
        super().__init__(name, "borg")
        self._chunk_bytes = chunk_bytes
        self._encryption = encryption

    def initialise(self) -> list[Command]:
        return [self._borg("init", "--encryption", self._encryption, str(self.repository))]

    def snapshot(self, generation: int) -> list[Command]:
        image = self.images[generation]
        options = ("--compression", "lz4", "--chunker-params", f"fixed,{self._chunk_bytes}")
        return [self._borg("create", *options, self._archive(image), image.name, folder=image.parent)]

    def restore(self, generation: int, folder: Path) -> list[Command]:
        return [self._borg("extract", "--sparse", self._archive(self.images[generation]), folder=folder)]

    def verify(self) -> list[Command]:
        return [self._borg("check", "--verify-data", str(self.repository))]

    def _archive(self, image: Path) -> str:
        return f"{self.repository}::{image.stem}"

    def _borg(self, *arguments: str, folder: Path | None = None) -> Command:
        return self._command(
            *arguments,
            folder=folder,
            BORG_PASSPHRASE=_PASSPHRASE,
            BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK="yes",
        )


class Restic(Contender):
    """restic, which always encrypts, with its own compression and content-defined chunks."""

    def __init__(self) -> None:
        super().__init__("restic", "restic")

    def initialise(self) -> list[Command]:
        return [self._restic("init")]

    def snapshot(self, generation: int) -> list[Command]:
        image = self.images[generation]
        return [self._restic("backup", "--tag", image.stem, image.name, folder=image.parent)]

    def restore(self, generation: int, folder: Path) -> list[Command]:
        tag = self.images[generation].stem
        return [self._restic("restore", "latest", "--tag", tag, "--target", str(folder))]

    def verify(self) -> list[Command]:
        return [self._restic("check", "--read-data")]

    def _restic(self, *arguments: str, folder: Path | None = None) -> Command:
        return self._command(
            *arguments, folder=folder, RESTIC_PASSWORD=_PASSPHRASE, RESTIC_REPOSITORY=str(self.repository)
        )


class QemuImg(Contender):
    """A chain of uncompressed qcow2 files; it has no checksums to verify.

    An increment is an empty overlay on the new image, rebased onto the layer before it: qemu-img compares
    both and writes the clusters that differ.
    """

    def __init__(self) -> None:
        super().__init__("qemu-img", "qemu-img")

    def snapshot(self, generation: int) -> list[Command]:
        image, layer = self.images[generation], self._layer(generation)
        if generation == 0:
            durable = ("-t", "writeback")
            return [self._command("convert", *durable, "-f", "raw", "-O", "qcow2", image, layer)]
        below = self._layer(generation - 1)
        return [
            self._command("create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", layer),
            self._command("rebase", "-f", "qcow2", "-b", below, "-F", "qcow2", layer),
        ]

    def restore(self, generation: int, folder: Path) -> list[Command]:
        target = folder / self.images[generation].name
        durable = ("-t", "writeback")
        return [self._command("convert", *durable, "-f", "qcow2", "-O", "raw", self._layer(generation), target)]

    def verify(self) -> list[Command]:
        return []

    def _layer(self, generation: int) -> Path:
        return self.repository / f"{self.images[generation].stem}.qcow2"


class Copy(Contender):
    """cp --sparse=always and an fsync of the copy: the yardstick for restores."""

    def __init__(self) -> None:
        super().__init__("cp", "cp")

    def snapshot(self, generation: int) -> list[Command]:
        return self._copy(self.images[0], self.repository) if generation == 0 else []

    def restore(self, generation: int, folder: Path) -> list[Command]:
        return self._copy(self.images[generation], folder)

    def verify(self) -> list[Command]:
        return []

    def _copy(self, image: Path, folder: Path) -> list[Command]:
        copy = self._command("--sparse=always", "--reflink=never", image, folder)
        return [copy, Command(("sync", str(folder / image.name)))]


class Compare(Contender):
    """The two-thread compare of two images, which stores nothing: the yardstick for increments."""

    def __init__(self) -> None:
        super().__init__("compare", "cc")

    def snapshot(self, generation: int) -> list[Command]:
        if generation == 0:
            return []
        return [Command(tuple(compare_command(self.images[generation - 1], self.images[generation])))]

    def restore(self, generation: int, folder: Path) -> list[Command]:
        return []

    def verify(self) -> list[Command]:
        return []


def find_snapcore(executable: str | None) -> str:
    """The snapcore executable: the given one, or the one on PATH, or the one beside this interpreter."""
    beside = Path(sys.executable).with_name("snapcore")
    found = shutil.which(executable or "snapcore") or executable or beside
    return str(Path(found).absolute())


def all_contenders(snapcore: str | None) -> list[Contender]:
    """Every contender there is, with the given snapcore executable or the one that `find_snapcore` finds."""
    return [
        Snapcore(find_snapcore(snapcore)),
        Borg("borg-4m", 4 << 20),
        Borg("borg-64k", 64 << 10),
        Borg("borg-64k-encrypted", 64 << 10, "repokey-blake2"),
        Restic(),
        QemuImg(),
        Copy(),
        Compare(),
    ]


def missing_programs(contenders: Sequence[Contender]) -> list[str]:
    """Programs of these contenders that are not installed."""
    return sorted({each.program for each in contenders if shutil.which(each.program) is None})
