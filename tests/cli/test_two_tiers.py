"""The commands that have a pool and a repository, with --json."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import sys
from pathlib import Path

import pytest

from snapcore import Repository
from snapcore.pool import Pool
from snapcore.repository import Group, Member
from tests.support.command import Run, asked, listed

MIB = 1 << 20


@pytest.fixture
def places(run: Run) -> Run:
    """A pool with two disks, and a repository."""
    for name in ("web", "log"):
        Path(f"{name}.img").write_bytes(os.urandom(MIB))
    asked(run, "pool", "init", "pool")
    asked(run, "repo", "init", "repo")
    for name in ("web", "log"):
        asked(run, "disk", "import", f"{name}.img", "--name", name, "-p", "pool")
    return run


def write(disk: str, data: bytes, offset_bytes: int) -> None:
    """Into a disk of the pool."""
    with Pool.open("pool") as pool:
        pool.open_disk(disk).pwrite(data, offset_bytes)


def test_a_disk_is_archived_changed_archived_again_and_restored(places: Run) -> None:
    run = places
    first = asked(run, "snapshot", "create", "web", "-p", "pool", "-r", "repo", "--name", "first", "--tag", "a=b")
    assert (first["name"], first["read_bytes"], first["base"], first["state"]) == ("first", MIB, None, "accomplished")
    assert first["fallback_reason"] is None and first["local"]["disk"] == "web"
    before = Path("web.img").read_bytes()
    write("web", b"changed", 3 * 65536)
    second = asked(run, "snapshot", "create", "web", "-p", "pool", "-r", "repo", "--keep-local", "1")
    assert second["read_bytes"] == 65536 and second["deleted_local"] == [first["local"]["id"]]
    assert second["base"] == {"local": first["local"]["id"], "archived": first["id"]}
    (local,) = listed(run, "snapshot", "list", "-p", "pool")
    assert [(item["snapshot"], item["state"]) for item in local["archives"]] == [(second["id"], "accomplished")]

    done = asked(run, "restore", first["id"], "web", "-r", "repo", "-p", "pool", "--in-place")
    assert done["written_bytes"] == 4096 and done["looked_at_bytes"] == 65536
    asked(run, "disk", "export", "web", "out.img", "-p", "pool")
    assert Path("out.img").read_bytes() == before
    asked(run, "restore", "first", "new", "-r", "repo", "-p", "pool")
    asked(run, "disk", "export", "new", "new.img", "-p", "pool")
    assert Path("new.img").read_bytes() == before
    code, _, err = run("restore", "first", "new", "-r", "repo", "-p", "pool")
    assert code == 1 and "--in-place" in err


def test_what_was_not_finished_is_finished_by_name_or_by_the_next_one(places: Run) -> None:
    run = places
    cut = asked(run, "snapshot", "create", "web", "-p", "pool", "--name", "cut")
    (done,) = listed(run, "snapshot", "archive", "cut", "-p", "pool", "-r", "repo")
    assert done["local"]["id"] == cut["id"] and done["name"] == "cut"
    assert listed(run, "snapshot", "archive", "-p", "pool", "-r", "repo") == []
    moved = Path("repo/packs").rename("repo/away")
    Path("repo/packs").write_bytes(b"no folder")
    code, _, _ = run("snapshot", "create", "log", "-p", "pool", "-r", "repo", "--json")
    assert code == 1
    states = [item["archives"] for item in listed(run, "snapshot", "list", "-p", "pool", "--disk", "log")]
    assert [[item["state"] for item in archives] for archives in states] == [["failed"]]
    Path("repo/packs").unlink()
    moved.rename("repo/packs")
    again = asked(run, "snapshot", "create", "web", "-p", "pool", "-r", "repo")
    assert again["earlier"] == {"finished": 1, "failed": []}
    assert len(listed(run, "snapshot", "list", "-r", "repo")) == 3


def test_options_that_say_nothing_there_are_refused(places: Run) -> None:
    for words in (
        ("snapshot", "create", "web", "-p", "pool", "--rate", "1M"),
        ("snapshot", "create", "web", "-p", "pool", "-r", "repo", "--paranoid"),
        ("snapshot", "create", "web.img", "-r", "repo", "--disk", "web", "--keep-local", "2"),
        ("snapshot", "create", "web"),
        ("restore", "x", "web", "-r", "repo", "-p", "pool", "--allow-damaged"),
    ):
        assert places(*words)[0] in (1, 2), words


def test_a_group_goes_all_the_way_and_back(places: Run) -> None:
    run = places
    made = asked(
        run, "group", "create", "web", "log", "-p", "pool", "-r", "repo", "--name", "nightly",
        "--freeze", "exit 4", "--thaw", "exit 0", "--timeout", "5",
    )  # fmt: skip
    assert made["freeze"]["exit_code"] == 4 and made["thaw"]["exit_code"] == 0 and made["consistency"] == "crash"
    (local,) = listed(run, "group", "list", "-p", "pool")
    assert local["id"] == made["id"] and local["freeze"]["exit_code"] == 4
    (stored,) = listed(run, "group", "list", "-r", "repo")
    assert stored == made["archived"] and stored["consistency"] == "crash"
    assert asked(run, "group", "show", "nightly", "-r", "repo")["missing"] == []
    assert len(asked(run, "group", "show", "nightly", "-p", "pool")["snapshots"]) == 2

    for name in ("web", "log"):
        write(name, b"changed", 5)
    assert [item["name"] for item in listed(run, "group", "rollback", "nightly", "-p", "pool", "--disk", "log")] == [
        "log"
    ]
    restored = listed(run, "group", "restore", "nightly", "-r", "repo", "-p", "pool", "--in-place")
    assert [item["written_bytes"] for item in restored] == [4096, 0]
    for name in ("web", "log"):
        asked(run, "disk", "export", name, f"{name}.out", "-p", "pool")
        assert Path(f"{name}.out").read_bytes() == Path(f"{name}.img").read_bytes()
    assert run("group", "restore", "nightly", "-r", "repo", "-p", "pool", "--disk", "other", "--in-place")[0] == 1

    assert len(asked(run, "group", "delete", stored["id"], "-r", "repo")["snapshots"]) == 2
    assert len(asked(run, "group", "delete", made["id"], "-p", "pool")["snapshots"]) == 2
    assert listed(run, "snapshot", "list", "-r", "repo") == listed(run, "group", "list", "-r", "repo") == []


def test_blocks_are_listed_compared_read_and_written(places: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = places
    monkeypatch.setenv("XDG_STATE_HOME", str(Path.cwd() / "state"))
    first = asked(run, "snapshot", "create", "web", "-p", "pool", "-r", "repo")
    write("web", b"changed", 5 * 65536)
    second = asked(run, "snapshot", "create", "web", "-p", "pool", "-r", "repo")
    pages = listed(run, "block", "list", first["id"], "-r", "repo", "--limit", "10")
    assert [len(page["blocks"]) for page in pages] == [10, 6] and pages[0]["next_block"] == 10
    for a, b in (
        (f"repo:{first['id']}", f"repo:{second['id']}"),
        (f"pool:{first['local']['id']}", f"repo:{second['id']}"),
        (f"repo:{first['id']}", "pool:web"),
    ):
        (page,) = listed(run, "block", "diff", a, b, "--block-size", "64K")
        assert page["blocks"] == [5], (a, b)
    (block,) = listed(run, "block", "read", second["id"], "5", "-r", "repo")
    data = base64.b64decode(block["data"])
    assert data.startswith(b"changed") and base64.b64decode(block["checksum"]) == hashlib.sha256(data).digest()

    session = asked(run, "block", "start", "-r", "repo", "--disk", "copy", "--parent", first["id"])
    assert [item["id"] for item in listed(run, "block", "sessions", "-r", "repo")] == [session["id"]]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(block).encode() + b"\n")))
    assert listed(run, "block", "put", session["id"], "-r", "repo")[0]["index"] == 5
    code, _, err = run("block", "complete", session["id"], "-r", "repo", "--count", "2")
    assert code == 1 and "1 blocks" in err
    made = asked(run, "block", "complete", session["id"], "-r", "repo", "--count", "1")
    assert made["root"] == asked(run, "snapshot", "show", second["id"], "-r", "repo")["root"]
    other = asked(run, "block", "start", "-r", "repo", "--disk", "copy", "--size", "1M")
    assert asked(run, "block", "cancel", other["id"], "-r", "repo") == {"cancelled": other["id"]}
    assert run("block", "list", "5")[0] == 2


def test_a_group_is_restored_into_image_files_all_of_them_or_none(places: Run) -> None:
    run = places
    asked(run, "group", "create", "web", "log", "-p", "pool", "-r", "repo", "--name", "nightly")
    os.mkdir("out")
    done = listed(run, "group", "restore", "nightly", "-r", "repo", "--to", "out")
    assert [item["target"] for item in done] == ["out/web.img", "out/log.img"]
    for name in ("web", "log"):
        assert Path(f"out/{name}.img").read_bytes() == Path(f"{name}.img").read_bytes()
    code, _, err = run("group", "restore", "nightly", "-r", "repo", "--to", "out")
    assert code == 1 and "out/web.img exists already" in err
    Path("out/web.img").unlink()
    assert run("group", "restore", "nightly", "-r", "repo", "--to", "out")[0] == 1
    assert sorted(os.listdir("out")) == ["log.img"]
    (one,) = listed(
        run, "group", "restore", "nightly", "-r", "repo", "--to", "out", "--disk", "web", "--format", "vmdk"
    )
    assert (one["disk"], one["format"]) == ("web", "vmdk")
    asked(run, "disk", "import", "out/web.vmdk", "--name", "again", "-p", "pool")
    asked(run, "disk", "export", "again", "again.img", "-p", "pool")
    assert Path("again.img").read_bytes() == Path("web.img").read_bytes()


def test_a_group_is_restored_into_image_files_that_exist_as_far_as_they_differ(places: Run) -> None:
    run = places
    asked(run, "group", "create", "web", "log", "-p", "pool", "-r", "repo", "--name", "nightly")
    os.mkdir("out")
    words = ("group", "restore", "nightly", "-r", "repo", "--to", "out", "--in-place")
    Path("out/web.img").write_bytes(b"x" + Path("web.img").read_bytes()[1:])
    code, _, err = run(*words)
    assert code == 1 and "out/log.img" in err and Path("out/web.img").read_bytes()[:1] == b"x"
    Path("out/log.img").write_bytes(Path("log.img").read_bytes())
    assert [item["written_bytes"] for item in listed(run, *words)] == [4096, 0]
    assert Path("out/web.img").read_bytes() == Path("web.img").read_bytes()
    for wrong in (("--format", "vhd"), ("--packing", "zlib"), ("-p", "pool")):
        assert run(*words, *wrong)[0] == 2
    assert run("group", "restore", "nightly", "-r", "repo")[0] == 2
    assert run("group", "restore", "nightly", "-r", "repo", "-p", "pool", "--format", "raw")[0] == 2
    code, _, err = run(*words, "--disk", "unknown")
    assert code == 1 and "no snapshot of unknown" in err


def test_a_disk_whose_name_is_no_files_name_is_left_to_the_user(run: Run) -> None:
    repository = Repository.create("repo")
    Path("web.img").write_bytes(os.urandom(MIB))
    group_id = "ab" * 16
    members = []
    for name in ("../outside", ".hidden"):
        taken = repository.snapshot("web.img", disk=name, group=group_id).snapshot
        members.append(Member(disk=name, snapshot=taken.id))
    repository.put_group(Group(id=group_id, name=None, created="", members=members))
    os.mkdir("out")
    for name in ("../outside", ".hidden"):
        code, _, err = run("group", "restore", group_id, "-r", "repo", "--to", "out", "--disk", name)
        assert code == 1 and "cannot be a file of that name" in err
    assert os.listdir("out") == [] and not Path("outside.img").exists()
