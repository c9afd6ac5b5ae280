"""`snapcore copy` as people and scripts call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command import Run, asked, listed
from tests.support.disks import changed, disk, image


def test_copies_with_a_key_and_without(run: Run, tmp_path: Path) -> None:
    data = disk(1, 60)
    for name, content in (("one.img", data), ("two.img", changed(data, 1))):
        image(tmp_path / name, content)
    for name in ("a", "b", "c"):
        asked(run, "repo", "init", name)
    asked(run, "key", "create", "k", "-r", "c", "--key-file", "k")
    ids = [asked(run, "snapshot", "create", name, "--disk", "d", "-r", "a")["id"] for name in ("one.img", "two.img")]
    done = listed(run, "copy", ids[1], "--from", "a", "--to", "b", "--chain")
    assert [item["source_id"] for item in done] == ids
    assert {"id", "new_bytes", "stored_bytes", "moved_bytes", "fallback_reason"} <= done[0].keys()
    assert done[1]["moved_bytes"] < done[0]["moved_bytes"] and done[1]["parent"] == done[0]["id"]
    sealed = listed(
        run, "copy", *ids, "--from", "a", "--to", "c", "--key", "k", "--key-file", "k", "--limit-rate", "1G"
    )
    for made, repository, more in ((done[1], "b", ()), (sealed[1], "c", ("--key-file", "k"))):
        asked_out = tmp_path / f"{repository}.img"
        code, _, err = run("restore", made["id"], str(asked_out), "-r", repository, *more)
        assert (code, err) == (0, "")
        assert asked_out.read_bytes() == changed(data, 1)
    code, out, err = run("copy", ids[0], "--from", "a", "--to", "b")
    assert code == 0 and ids[0] in out and "moved" in out and err == ""


def test_what_is_refused_says_why_and_what_to_do(run: Run, tmp_path: Path) -> None:
    image(tmp_path / "one.img", disk(1, 20))
    for name in ("a", "b"):
        asked(run, "repo", "init", name)
    asked(run, "key", "create", "k", "-r", "a", "--key-file", "k")
    key = ("--key-file", "k")
    made = asked(run, "snapshot", "create", "one.img", "--disk", "d", "-r", "a", "--key", "k", *key)["id"]
    for words, said in (
        (("--to", "b"), "not unlocked"),
        (("--to", "b", *key), "snapcore key share"),
        (("--to", "b", "--no-key", *key), "stays so"),
        (("--to", "a", *key), "under another key"),
        (("--to", "b", "--key", "k", "--no-key"), "exclude"),
    ):
        code, out, err = run("copy", made, "--from", "a", *words)
        assert code != 0 and out == "" and said in err
    asked(run, "key", "share", "k", "-r", "a", "--to", "b", *key, "--new-key-file", "of-b")
    assert listed(run, "copy", made, "--from", "a", "--to", "b", *key)[0]["key"] is not None


@pytest.mark.parametrize("rate", ["0", "-1", "fast"])
def test_a_rate_is_a_size_from_one_byte_on(run: Run, tmp_path: Path, rate: str) -> None:
    image(tmp_path / "one.img", disk(1, 20))
    asked(run, "repo", "init", "a")
    asked(run, "repo", "init", "b")
    made = asked(run, "snapshot", "create", "one.img", "--disk", "d", "-r", "a")
    code, out, _ = run("copy", made["id"], "--from", "a", "--to", "b", "--limit-rate", rate)
    assert code != 0 and out == ""
    assert json.dumps(made)
