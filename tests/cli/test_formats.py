"""Images of other formats on the command line: import, export, restore, snapshots of them, standard output."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapcore import RefusedError, Repository
from snapcore.pool import Pool
from snapcore.source import open_image
from tests.support.command import Run, asked
from tests.support.images import assert_good, content, make_raw, qemu_img
from tests.support.pools import quick_folder
from tests.support.tools import needs

MIB = 1 << 20
SIZE = 6 * MIB + 512


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: each command opens and closes the pool, which syncs."""
    made = quick_folder()
    yield made
    shutil.rmtree(made)


@pytest.fixture
def raw(run: Run, tmp_path: Path) -> Path:
    """A disk as raw image, as qcow2 image, and as qcow2 image under another name; a pool and a repository."""
    needs("qemu-img")
    path = tmp_path / "disk.raw"
    make_raw(path, SIZE, 20)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", path, tmp_path / "disk.qcow2")
    shutil.copy(tmp_path / "disk.qcow2", tmp_path / "disk.img")
    assert run("pool", "init", "p")[0] == run("repo", "init", "r")[0] == 0
    return path


def disk_content(name: str) -> bytes:
    with Pool.open("p", read_only=True) as opened:
        disk = opened.open_disk(name)
        return disk.pread(disk.size_bytes, 0)


def test_a_disk_goes_in_and_out_in_every_format(run: Run, raw: Path) -> None:
    assert asked(run, "disk", "import", "disk.qcow2", "--name", "web", "-p", "p")["size_bytes"] == SIZE
    assert disk_content("web") == raw.read_bytes()
    for words in (["qcow2"], ["qcow2", "--packing", "zstd"], ["vhd"], ["vmdk"]):
        kind, target = words[0], f"out{len(words)}.{words[0]}"
        done = asked(run, "disk", "export", "web", target, "-p", "p", "--format", *words)
        assert (done["name"], done["target"], done["format"]) == ("web", target, kind)
        assert done["file_bytes"] == Path(target).stat().st_size and done["duration_s"] > 0
        assert_good(Path(target), kind, raw)
        assert asked(run, "disk", "import", target, "--name", target, "-p", "p")["size_bytes"] == SIZE
        assert disk_content(target) == raw.read_bytes()
    code, out, err = run("disk", "export", "web", "more.qcow2", "-p", "p", "--format", "qcow2")
    assert (code, err) == (0, "") and out.startswith("exported more.qcow2, qcow2: ")


def test_a_format_that_the_name_does_not_say_is_asked_for(run: Run, raw: Path) -> None:
    code, _, err = run("disk", "import", "disk.img", "--name", "web", "-p", "p")
    assert code == 1 and "--format qcow2, or --format raw" in err
    asked(run, "disk", "import", "disk.img", "--name", "web", "-p", "p", "--format", "qcow2")
    assert disk_content("web") == raw.read_bytes()
    asked(run, "disk", "import", "disk.img", "--name", "as-is", "-p", "p", "--format", "raw")
    assert disk_content("as-is") == Path("disk.img").read_bytes()


def test_backing_files_need_a_word(run: Run, raw: Path) -> None:
    qemu_img("create", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "top.qcow2")
    code, _, err = run("disk", "import", "top.qcow2", "--name", "web", "-p", "p")
    assert code == 1 and f"--backing-in {os.path.realpath('.')}" in err
    asked(run, "disk", "import", "top.qcow2", "--name", "web", "-p", "p", "--backing-in", ".")
    assert disk_content("web") == raw.read_bytes()


def test_a_snapshot_of_an_image_is_one_of_its_disk(run: Run, raw: Path) -> None:
    first = asked(run, "snapshot", "create", "disk.qcow2", "-r", "r", "--disk", "d")
    assert first["size_bytes"] == SIZE
    # The same disk, so nothing changed.
    assert asked(run, "snapshot", "create", "disk.raw", "-r", "r", "--disk", "d")["changed_bytes"] == 0
    # A raw image of a guest is raw, whatever the guest wrote in front.
    seen = asked(run, "snapshot", "create", "disk.img", "-r", "r", "--disk", "e")
    assert seen["size_bytes"] == Path("disk.img").stat().st_size
    forced = asked(run, "snapshot", "create", "disk.img", "-r", "r", "--disk", "d", "--format", "qcow2")
    assert forced["changed_bytes"] == 0
    code, _, err = run("snapshot", "create", "disk.qcow2", "-r", "r", "--disk", "d", "--allow-changing")
    assert code == 2 and "must not change" in err
    for kind, words in (("qcow2", ["--packing", "zlib"]), ("vhd", []), ("vmdk", []), ("raw", [])):
        done = asked(run, "restore", first["id"], f"back.{kind}", "-r", "r", "--format", kind, *words)
        assert (done["snapshot"], done["target"]) == (first["id"], f"back.{kind}")
        assert_good(Path(f"back.{kind}"), kind, raw)
    assert Repository.open("r").verify().ok


def test_standard_output_takes_an_image(run: Run, raw: Path, tmp_path: Path) -> None:
    asked(run, "disk", "import", "disk.raw", "--name", "web", "-p", "p")
    taken = asked(run, "snapshot", "create", "disk.raw", "-r", "r", "--disk", "d")["id"]
    for words in (["disk", "export", "web", "-", "-p", "p"], ["restore", taken, "-", "-r", "r"]):
        for kind in ("raw", "vhd", "vmdk"):
            called = [sys.executable, "-P", "-m", "snapcore", *words, "--format", kind]
            done = subprocess.run(called, cwd=tmp_path, capture_output=True, check=False)
            assert (done.returncode, done.stderr) == (0, b"")
            image = tmp_path / f"piped.{kind}"
            image.write_bytes(done.stdout)
            assert_good(image, kind, raw)
            with open_image(image) as back:
                assert content(back) == raw.read_bytes()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["-", "--format", "qcow2"], "cannot go to standard output"),
        (["-", "--format", "vmdk", "--packing", "zlib"], "is for qcow2"),
        (["-", "--format", "vmdk", "--json"], "not both"),
        (["out", "--format", "vhd", "--in-place"], "--in-place is for raw"),
        (["out", "--format", "vhd", "--packing", "zlib"], "is for qcow2"),
        (["out", "--packing", "zlib"], "is for qcow2"),
        (["out", "--format", "vhdx"], "'vhdx' is not one of"),
        (["p/out", "--format", "vhd"], "take another target"),
        (["disk.raw", "--format", "vhd"], "exists already"),
    ],
)
def test_what_cannot_be_is_said(words: list[str], error: str, run: Run, raw: Path) -> None:
    asked(run, "disk", "import", "disk.raw", "--name", "web", "-p", "p")
    before = sorted(os.listdir("."))
    code, out, err = run("disk", "export", "web", *words, "-p", "p")
    assert code in (1, 2) and out == "" and error in err
    assert sorted(os.listdir(".")) == before


def test_diff_compares_the_disks_in_images(run: Run, raw: Path) -> None:
    changed = bytearray(raw.read_bytes())
    changed[MIB] ^= 1
    Path("changed.raw").write_bytes(changed)
    rows = asked(run, "diff", "disk.raw", "changed.raw")["extents"]
    assert rows == [[MIB, 4096]]
    assert asked(run, "diff", "disk.qcow2", "changed.raw")["extents"] == rows
    assert asked(run, "diff", "changed.raw", "disk.img", "--format-b", "qcow2")["extents"] == rows
    assert run("diff", "disk.qcow2", "changed.raw") == (0, f"{MIB} 4096\n", "")
    qemu_img("create", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "top.qcow2")
    qemu_img("resize", "top.qcow2", str(8 * MIB))
    assert run("diff", "top.qcow2", "disk.raw")[0] == 1
    tail = asked(run, "diff", "top.qcow2", "disk.raw", "--backing-in", ".", "--block", "512")["extents"]
    assert tail == [[SIZE, 8 * MIB - SIZE]]
    # As they are, byte by byte.
    assert asked(run, "diff", "disk.qcow2", "disk.img", "--format-a", "raw")["extents"] == []


def test_what_is_read_in_place_is_raw_or_refused(run: Run, raw: Path) -> None:
    for name, why in (("disk.qcow2", "is called qcow2"), ("disk.img", "begins as qcow2")):
        words = ("disk", "create", f"over-{name}", "--from", name, "-p", "p")
        code, _, err = run(*words)
        assert code == 1 and why in err and "disk import" in err and "--format raw" in err
        asked(run, *words, "--format", "raw")
        assert disk_content(f"over-{name}") == Path(name).read_bytes()
    code, _, err = run("serve", "--image", "web=disk.qcow2", "--listen", f"unix:{raw.parent / 's'}")
    assert code == 1 and "its name says qcow2" in err


def test_a_new_file_has_the_format_that_its_name_says(run: Run, raw: Path) -> None:
    asked(run, "disk", "import", "disk.raw", "--name", "web", "-p", "p")
    for target, kind in (("a.qcow2", "qcow2"), ("a.vmdk", "vmdk"), ("a.vhd", "vhd"), ("a.bin", "raw")):
        asked(run, "disk", "export", "web", target, "-p", "p")
        assert_good(Path(target), kind, raw)
    asked(run, "disk", "export", "web", "raw.qcow2", "-p", "p", "--format", "raw")
    assert Path("raw.qcow2").read_bytes() == raw.read_bytes()
    code, _, err = run("disk", "export", "web", "a.vhdx", "-p", "p")
    assert code == 2 and "'vhdx' is not written" in err
    code, _, err = run("disk", "export", "web", "a.qcow2", "-p", "p", "--in-place")
    assert code == 2 and "another format" in err
    taken = asked(run, "snapshot", "create", "a.qcow2", "-r", "r", "--disk", "d")
    asked(run, "restore", taken["id"], "b.qcow2", "-r", "r")
    assert_good(Path("b.qcow2"), "qcow2", raw)


def test_a_snapshot_from_python_reads_what_the_name_says(run: Run, raw: Path) -> None:
    repository = Repository.open("r")
    made = repository.snapshot("disk.qcow2", disk="d").snapshot
    assert repository.open_snapshot(made).read() == raw.read_bytes()
    assert repository.snapshot("disk.img", disk="e").snapshot.size_bytes == Path("disk.img").stat().st_size
    shutil.copy("disk.raw", "guest.qcow2")
    with pytest.raises(RefusedError, match="--format raw"):
        repository.snapshot("guest.qcow2", disk="d")
