"""The disk of `snapcore demo`: a real ext4 image of files of this machine, changed as an operating system changes it.

Everything is done without root, by mke2fs and debugfs. Where they are missing, real files in a row stand
in for the file system, and blocks are overwritten in place.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from snapcore.errors import StoreError
from snapcore.source import open_source

_FOLDERS = ("/usr/bin", "/usr/lib", "/usr/sbin", "/usr/share", "/bin", "/lib", "/etc", "/System/Library", "/opt")
_FILES_BYTES = 320 << 20
_LARGEST_FILE_BYTES = 24 << 20
_IMAGE_BYTES = 640 << 20
_DATABASE_BYTES = 48 << 20
_DATABASE_WRITES = 400
_RECORD_BYTES = 8192
_BLOCK_BYTES = 4096


def program(name: str) -> str | None:
    """Path of a program, also where Debian keeps those for administrators."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


class DemoDisk:
    """An image in a scratch folder.

    Attributes
    ----------
    path : str
    what : str
        What it is, for people.
    """

    def __init__(self, folder: str, image: str | None) -> None:
        self.path = os.path.join(folder, "disk.img")
        self._folder = Path(folder)
        self._random = random.Random(20)
        self._ext4 = False
        if image is not None:
            copy_sparse(image, self.path)
            self.what = f"a copy of {image}"
        elif program("mke2fs") and program("debugfs"):
            self._make_ext4()
        else:
            self._join_files()

    def _make_ext4(self) -> None:
        tree = self._folder / "tree"
        (tree / "files").mkdir(parents=True)
        (tree / "new").mkdir()
        count = 0
        for number, source in enumerate(_real_files(_FILES_BYTES)):
            shutil.copyfile(source, tree / "files" / f"{number}-{source.name}")
            count += 1
        (tree / "database").write_bytes(self._random.randbytes(_DATABASE_BYTES))
        (tree / "log").write_bytes(self._log_lines(0))
        with open(self.path, "wb") as file:
            file.truncate(_IMAGE_BYTES)
        self._run("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(_BLOCK_BYTES), "-d", str(tree), self.path)
        shutil.rmtree(tree)
        self._ext4 = True
        self.what = f"an ext4 file system with {count} files of this machine"

    def _join_files(self) -> None:
        with open(self.path, "wb") as image:
            for source in _real_files(_FILES_BYTES):
                with open(source, "rb") as file:
                    shutil.copyfileobj(file, image)
            image.truncate(_IMAGE_BYTES)
        self.what = "files of this machine in a row (mke2fs and debugfs of e2fsprogs are missing: no file system)"

    def change(self, generation: int) -> str:
        """Change the disk. Returns what was done."""
        if self._ext4:
            return self._change_ext4(generation)
        writes = self._overwrite(self._data_blocks(), _DATABASE_WRITES)
        return f"{writes} writes of 8 KiB where there is data"

    def _change_ext4(self, generation: int) -> str:
        """Install files, delete others, append to a log, write into a database."""
        new = list(_real_files(12 << 20, skip=generation * 4000))
        log = self._folder / "log"
        log.write_bytes(self._log_lines(generation))
        names = [line.split("/")[5] for line in self._debugfs("ls -p /files").splitlines() if line.startswith("/")]
        names = [name for name in names if name not in (".", "..")]
        gone = self._random.sample(names, min(20, len(names)))
        commands = [f'rm "/files/{name}"' for name in gone]
        commands += [f'write "{path}" "/new/{generation}-{number}"' for number, path in enumerate(new)]
        commands += ['rm "/log"', f'write "{log}" "/log"']
        script = self._folder / "commands"
        script.write_text("\n".join(commands) + "\n")
        self._run("debugfs", "-w", "-f", str(script), self.path)
        blocks = [int(number) for number in self._debugfs("blocks /database").split()]
        writes = self._overwrite([number * _BLOCK_BYTES for number in blocks[:-1]], _DATABASE_WRITES)
        return f"{len(new)} files installed, {len(gone)} deleted, a log grown, {writes} database writes of 8 KiB"

    def check(self) -> str | None:
        """The file system's own opinion of the image, where there is one."""
        if not self._ext4 or program("e2fsck") is None:
            return None
        self._run("e2fsck", "-fn", self.path)
        return "e2fsck finds the file system clean"

    def _log_lines(self, generation: int) -> bytes:
        count = 40_000 * (generation + 1)
        return "".join(f"2026-01-01T00:00:{n % 60:02} service[{n % 977}]: request {n}\n" for n in range(count)).encode()

    def _data_blocks(self) -> list[int]:
        with open_source(self.path, allow_changing=True) as source:
            rows = source.data_extents()
        starts = [offset for offset, length in rows.tolist() for offset in range(offset, offset + length, 1 << 20)]
        return [offset // _BLOCK_BYTES * _BLOCK_BYTES for offset in starts]

    def _overwrite(self, offsets: list[int], count: int) -> int:
        size_bytes = os.path.getsize(self.path)
        chosen = [offset for offset in offsets if offset + _RECORD_BYTES <= size_bytes]
        chosen = self._random.sample(chosen, min(count, len(chosen)))
        with open(self.path, "r+b") as file:
            for offset in chosen:
                file.seek(offset)
                file.write(self._random.randbytes(_RECORD_BYTES))
            file.flush()
            os.fsync(file.fileno())
        return len(chosen)

    def _debugfs(self, request: str) -> str:
        return self._run("debugfs", "-R", request, self.path)

    def _run(self, name: str, *arguments: str) -> str:
        found = program(name) or name
        done = subprocess.run([found, *arguments], capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            raise StoreError(f"{name} failed with {done.returncode}: {done.stderr.strip()}")
        return done.stdout


def copy_sparse(source: str, target: str) -> None:
    """`cp --sparse=always`, then sync the copy: what a user would do without a snapshot engine."""
    options = ["--sparse=always", "--reflink=never"] if os.uname().sysname == "Linux" else []
    done = subprocess.run(["cp", *options, source, target], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StoreError(f"cp failed: {done.stderr.strip()}")
    descriptor = os.open(target, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _real_files(total_bytes: int, skip: int = 0) -> Iterator[Path]:
    """Readable regular files of this machine, some total of bytes."""
    for folder in _FOLDERS:
        for where, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                path = Path(where) / name
                if path.is_symlink() or not path.is_file() or not os.access(path, os.R_OK) or '"' in str(path):
                    continue
                size_bytes = path.stat().st_size
                if not 0 < size_bytes <= _LARGEST_FILE_BYTES:
                    continue
                if skip:
                    skip -= 1
                    continue
                yield path
                total_bytes -= size_bytes
                if total_bytes <= 0:
                    return
