"""The command line on a repository in a bucket, from init to restore."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.command import Run, asked, listed
from tests.support.s3 import new_place


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(3).randbytes(1 << 20) + bytes(1 << 20))
    return path


def test_a_repository_in_a_bucket_does_all_that_one_in_a_folder_does(s3: str, run: Run, image: Path) -> None:
    place = new_place()
    assert asked(run, "repo", "init", place)["url"] == place
    first = asked(run, "snapshot", "create", str(image), "-r", place, "--disk", "web")
    old = image.read_bytes()
    new = b"changed" + old[7:]
    image.write_bytes(new)
    second = asked(run, "snapshot", "create", str(image), "-r", place, "--disk", "web")
    assert second["parent"] == first["id"] and second["changed_bytes"] == 64 << 10
    assert [item["id"] for item in listed(run, "snapshot", "list", "-r", place)] == [first["id"], second["id"]]
    assert asked(run, "snapshot", "diff", first["id"], second["id"], "-r", place) == {"extents": [[0, 64 << 10]]}
    for item, content in ((first, old), (second, new)):
        asked(run, "restore", item["id"], f"{item['id']}.img", "-r", place)
        assert image.with_name(f"{item['id']}.img").read_bytes() == content
    asked(run, "snapshot", "delete", first["id"], "-r", place)
    assert asked(run, "repo", "collect", place)["live_bytes"] > 1 << 20
    assert asked(run, "verify", "-r", place)["ok"]
    assert asked(run, "repo", "info", place)["snapshots"] == 1
    assert listed(run, "repo", "sessions", place) == []


def test_what_is_wrong_with_a_place_is_said_in_a_line(s3: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    place = new_place()
    assert run("snapshot", "list", "-r", place) == (
        1,
        "",
        f"snapcore: {place} holds no repository; `snapcore repo init` makes one\n",
    )
    asked(run, "repo", "init", place)
    code, _, err = run("repo", "init", place)
    assert (code, err) == (1, f"snapcore: {place} is not empty; a new repository needs a place of its own\n")
    code, _, err = run("repo", "init", "s3://no-such-bucket/x")
    assert code == 1 and err.startswith("snapcore: there is no bucket no-such-bucket")
    code, _, err = run("repo", "init", "s3://AK:secret@host/bucket")
    assert code == 2 and "secret" not in err and "environment" in err
