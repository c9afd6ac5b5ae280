"""`snapcore image`, with --json."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from snapcore.pool import Pool
from tests.support.command import Run, asked, listed
from tests.support.images import as_qemu_reads, qemu_img
from tests.support.tools import needs

MIB = 1 << 20


@pytest.fixture
def places(run: Run) -> Run:
    """A pool, a repository, and the files of two disks."""
    for name, size in (("web", 3 * MIB), ("log", MIB)):
        Path(f"{name}.img").write_bytes(os.urandom(MIB) + bytes(size - MIB))
    asked(run, "pool", "init", "pool")
    asked(run, "repo", "init", "repo")
    return run


def test_an_image_is_imported_shown_launched_exported_and_deleted(places: Run) -> None:
    run = places
    made = asked(
        run,
        *("image", "import", "web.img", "--name", "debian 12", "--data", "xvdb=log.img", "--empty", "xvdd=2M"),
        *("--os", "Debian 12", "--boot", "uefi", "--arch", "aarch64", "--min-size", "4M", "--tag", "a=b"),
        *("--checksums", "-r", "repo"),
    )
    assert (made["name"], made["os"], made["boot"], made["architecture"]) == (
        "debian 12",
        "Debian 12",
        "uefi",
        "aarch64",
    )
    assert [item["device"] for item in made["disks"]] == ["/dev/xvda", "/dev/xvdb", "/dev/xvdd"]
    sums = [hashlib.sha256(Path(f"{name}.img").read_bytes()).hexdigest() for name in ("web", "log")]
    assert [item["sha256"] for item in made["disks"]] == [*sums, None]
    del made["duration_s"]
    assert asked(run, "image", "show", "debian 12", "-r", "repo") == made
    assert listed(run, "image", "list", "-r", "repo") == [made]
    code, _, err = run("snapshot", "delete", made["disks"][0]["snapshot"], "-r", "repo")
    assert code == 1 and "in use by the image debian 12" in err and f"snapcore image delete {made['id']}" in err

    machines = listed(
        run, "image", "launch", "debian 12", "--count", "3", "--name", "web-##", "-p", "pool", "-r", "repo"
    )
    assert [item["machine"] for item in machines] == ["web-01", "web-02", "web-03"]
    assert [item["size_bytes"] for item in machines[2]["disks"]] == [4 * MIB, MIB, 2 * MIB]
    asked(run, "disk", "decouple", "web-03-xvdb", "-p", "pool")
    asked(run, "disk", "export", "web-03-xvdb", "out.img", "-p", "pool")
    assert Path("out.img").read_bytes() == Path("log.img").read_bytes()
    whole = ("image", "launch", "debian 12", "--name", "big", "--size", "8M", "--whole", "-p", "pool", "-r", "repo")
    assert listed(run, *whole)[0]["disks"][0]["size_bytes"] == 8 * MIB
    assert run(*whole)[0] == 1

    files = listed(run, "image", "export", "debian 12", "copy.img", "-r", "repo")
    assert [(item["device"], item["target"]) for item in files] == [
        ("/dev/xvda", "copy.img"),
        ("/dev/xvdb", "copy-xvdb.img"),
    ]
    assert Path("copy-xvdb.img").read_bytes() == Path("log.img").read_bytes()
    asked(run, "image", "export", "debian 12", "one.img", "--device", "xvdb", "-r", "repo")
    assert Path("one.img").read_bytes() == Path("log.img").read_bytes()
    assert run("image", "export", "debian 12", "-", "-r", "repo")[0] == 2
    assert run("image", "export", "debian 12", "x.img", "--device", "xvdd", "-r", "repo")[0] == 2

    gone = listed(run, "image", "delete", made["id"][:8], "--with-snapshots", "-r", "repo")
    assert gone == [{"deleted": made["id"], "snapshots": [item["snapshot"] for item in made["disks"][:2]]}]
    assert listed(run, "snapshot", "list", "-r", "repo") == [] and listed(run, "image", "list", "-r", "repo") == []


def test_an_image_is_made_of_snapshots_here_and_of_disks_of_a_pool(places: Run) -> None:
    run = places
    taken = asked(run, "snapshot", "create", "web.img", "--disk", "web", "-r", "repo", "--name", "golden")
    made = asked(
        run, "image", "create", "debian", "--system", "golden", "--data", f"xvdb={taken['id'][:9]}", "-r", "repo"
    )
    assert [item["snapshot"] for item in made["disks"]] == [taken["id"]] * 2
    for name in ("web", "log"):
        asked(run, "disk", "import", f"{name}.img", "--name", name, "-p", "pool")
    cut = asked(run, "snapshot", "create", "log", "-p", "pool", "--name", "cut")
    words = ("image", "create", "pooled", "--system", "web", "--data", "xvdb=cut", "--empty", "xvdc=1M", "-p", "pool")
    pooled = asked(run, *words, "-r", "repo")
    assert [item["disk"] for item in pooled["disks"][:2]] == ["web", "log"]
    assert (
        asked(run, "snapshot", "show", pooled["disks"][1]["snapshot"], "-r", "repo")["origin"].split(":")[2]
        == cut["id"]
    )
    with Pool.open("pool", read_only=True) as pool:
        assert [item.disk for item in pool.snapshots()] == ["log", "web"]


def test_people_read_what_happened(places: Run) -> None:
    run = places
    code, out, err = run("image", "import", "web.img", "--name", "debian", "--data", "xvdb=log.img", "-r", "repo")
    assert (code, err) == (0, "") and "made image debian (" in out and "/dev/xvdb 1.0 MiB, snapshot" in out
    code, out, _ = run("image", "list", "-r", "repo")
    assert code == 0 and "debian" in out.splitlines()[1]
    code, out, _ = run("image", "show", "debian", "-r", "repo")
    assert code == 0 and "/dev/xvda    3.0 MiB, snapshot" in out
    code, out, _ = run("image", "launch", "debian", "--count", "2", "--name", "m#", "-p", "pool", "-r", "repo")
    assert code == 0 and out.startswith("made 4 disks of 2 machines, m1 to m2, in ")
    code, out, _ = run("image", "delete", "debian", "-r", "repo")
    assert code == 0 and out.startswith("deleted image ")


@pytest.mark.parametrize(
    "words",
    [
        ("image", "create", "debian", "--system", "golden", "--data", "xvdb"),
        ("image", "create", "debian", "--system", "golden", "--empty", "xvdb=1M", "--empty", "xvdb=1M"),
        ("image", "create", "debian", "--system", "golden", "--empty", "xvdb=much"),
        ("image", "create", "d", "--system", "golden"),
        ("image", "create", "debian", "--system", "golden", "--key", "prod"),
        ("image", "create", "debian", "--system", "golden", "--boot", "floppy"),
        ("image", "launch", "debian", "--name", "same", "--count", "2", "-p", "pool"),
        ("image", "import", "web.img", "--name", "debian", "--arch", "a b"),
    ],
)
def test_words_that_make_no_sense_are_refused(places: Run, words: tuple[str, ...]) -> None:
    code, out, err = places(*words, "-r", "repo")
    assert code == 2 and out == "" and err


def test_a_qcow2_chain_becomes_an_image_and_qemu_reads_what_comes_out(places: Run) -> None:
    needs("qemu-img", "qemu-io")
    run = places
    qemu_img("convert", "-O", "qcow2", "-c", "web.img", "base.qcow2")
    qemu_img("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    subprocess.run(["qemu-io", "-c", "write -P 7 64k 128k", "top.qcow2"], check=True, capture_output=True)
    refused = ("image", "import", "top.qcow2", "--name", "debian", "-r", "repo")
    code, _, err = run(*refused)
    assert code == 1 and "--backing-in" in err
    asked(run, *refused, "--backing-in", ".")
    expected = as_qemu_reads(Path("top.qcow2"), "qcow2")
    for kind in ("raw", "qcow2", "vhd", "vmdk"):
        asked(run, "image", "export", "debian", f"out.{kind}", "--format", kind, "-r", "repo")
        assert as_qemu_reads(Path(f"out.{kind}"), kind) == expected
    piped = subprocess.run(
        [sys.executable, "-P", "-m", "snapcore", "image", "export", "debian", "-", "-r", "repo"],
        check=True,
        capture_output=True,
    )
    assert piped.stdout == expected
    assert json.loads(json.dumps(asked(run, "image", "show", "debian", "-r", "repo")))["name"] == "debian"
