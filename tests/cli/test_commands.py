"""The command line: what it prints for people and for programs, and how it ends."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from snapcore import Manifest, Repository, Restored
from snapcore.repository import session
from snapcore.store import LocalStore
from tests.support.command import Run

CHUNK = 64 << 10


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(4 * CHUNK) + bytes(4 * CHUNK) + random.Random(2).randbytes(CHUNK // 2))
    return path


@pytest.fixture
def taken(run: Run, image: Path) -> list[dict[str, Any]]:
    """A repository `repo` with two snapshots of one disk, the second one with one changed page."""
    assert run("repo", "init", "repo")[0] == 0
    found = []
    for generation in range(2):
        if generation:
            with open(image, "r+b") as file:
                file.seek(CHUNK + 4096)
                file.write(b"changed")
        code, out, err = run("snapshot", "create", str(image), "-r", "repo", "--disk", "d", "--json")
        assert (code, err) == (0, "")
        found.append(json.loads(out))
    return found


def test_create_reports_what_it_read_changed_and_stored(taken: list[dict[str, Any]], image: Path) -> None:
    first, second = taken
    assert first["size_bytes"] == image.stat().st_size
    assert first["written_bytes"] == 5 * CHUNK
    assert first["parent"] is None and second["parent"] == first["id"]
    assert second["changed_bytes"] == CHUNK
    assert second["new_bytes"] < CHUNK / 2
    assert 0 < second["stored_bytes"] < first["stored_bytes"]
    assert second["fallback_reason"] is None
    assert second["duration_s"] > 0


def test_list_prints_one_object_a_line_in_the_order_of_the_chain(run: Run, taken: list[dict[str, Any]]) -> None:
    code, out, _ = run("snapshot", "list", "-r", "repo", "--json")
    assert code == 0
    assert [json.loads(line)["id"] for line in out.splitlines()] == [item["id"] for item in taken]
    code, out, _ = run("snapshot", "list", "-r", "repo", "--disk", "other")
    assert code == 0 and len(out.splitlines()) == 1


def test_the_repository_comes_from_the_environment_too(
    run: Run, taken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPCORE_REPO", "repo")
    assert run("snapshot", "list")[0] == 0
    assert run("repo", "info")[0] == 0


def test_ids_may_be_shortened_and_labels_used(run: Run, taken: list[dict[str, Any]], image: Path) -> None:
    assert run("snapshot", "show", taken[0]["id"][:8], "-r", "repo")[0] == 0
    assert run("snapshot", "create", str(image), "-r", "repo", "--disk", "d", "--name", "before upgrade")[0] == 0
    code, out, _ = run("snapshot", "show", "before upgrade", "-r", "repo", "--json")
    assert code == 0 and json.loads(out)["label"] == "before upgrade"
    assert run("snapshot", "show", "nothing of the kind", "-r", "repo")[0] == 1


@pytest.mark.parametrize("label", ["", "cafe", "0123456789abcdef", "two\nlines"])
def test_a_name_that_looks_like_an_id_is_refused(
    run: Run, taken: list[dict[str, Any]], image: Path, label: str
) -> None:
    code, out, err = run("snapshot", "create", str(image), "-r", "repo", "--disk", "d", "--name", label)
    assert (code, out) == (2, "") and "name" in err


def test_snapshot_diff_names_the_chunk_that_changed(run: Run, taken: list[dict[str, Any]]) -> None:
    code, out, _ = run("snapshot", "diff", taken[0]["id"], taken[1]["id"], "-r", "repo", "--json")
    assert code == 0
    assert json.loads(out) == {"extents": [[CHUNK, CHUNK]]}


def test_image_diff_names_the_block_that_changed(run: Run, image: Path) -> None:
    other = image.with_name("other.img")
    data = bytearray(image.read_bytes())
    data[5000] ^= 1
    other.write_bytes(data)
    assert json.loads(run("diff", str(image), str(other), "--json")[1]) == {"extents": [[4096, 4096]]}
    assert run("diff", str(image), str(other), "--block", "512")[1] == "4608 512\n"
    assert run("diff", str(image), str(other), "--block", "1000")[0] == 2


def test_a_diff_is_a_list_of_changes_for_the_next_snapshot(run: Run, taken: list[dict[str, Any]], image: Path) -> None:
    before = image.with_name("before.img")
    before.write_bytes(image.read_bytes())
    with open(image, "r+b") as file:
        file.seek(3 * CHUNK)
        file.write(b"x")
    changes = image.with_name("changes.json")
    changes.write_text(run("diff", str(before), str(image), "--json")[1])
    code, out, _ = run(
        "snapshot", "create", str(image), "-r", "repo", "--disk", "d", "--changed", str(changes), "--json"
    )
    assert code == 0
    assert (json.loads(out)["read_bytes"], json.loads(out)["changed_bytes"]) == (CHUNK, CHUNK)
    assert run("restore", json.loads(out)["id"], "out.img", "-r", "repo")[0] == 0
    assert Path("out.img").read_bytes() == image.read_bytes()


def test_restore_writes_a_new_file_and_into_an_existing_one(run: Run, taken: list[dict[str, Any]], image: Path) -> None:
    code, out, _ = run("restore", taken[1]["id"], "out.img", "-r", "repo", "--json")
    assert code == 0
    assert Path("out.img").read_bytes() == image.read_bytes()
    assert json.loads(out)["missing"] == []
    code, _, err = run("restore", taken[0]["id"], "out.img", "-r", "repo")
    assert code == 1 and "--in-place" in err
    code, out, _ = run("restore", taken[0]["id"], "out.img", "-r", "repo", "--in-place", "--json")
    assert code == 0 and json.loads(out)["written_bytes"] == 4096


def test_delete_and_collect_free_space(run: Run, taken: list[dict[str, Any]]) -> None:
    unique = json.loads(run("snapshot", "show", taken[0]["id"], "-r", "repo", "--json")[1])["unique_stored_bytes"]
    code, out, _ = run("snapshot", "delete", taken[0]["id"], "-r", "repo", "--json")
    assert code == 0 and json.loads(out) == {"deleted": taken[0]["id"]}
    code, out, _ = run("repo", "collect", "repo", "--json")
    assert code == 0 and json.loads(out)["live_bytes"] > 0
    assert unique >= 0
    assert json.loads(run("verify", "-r", "repo", "--json")[1])["ok"] is True
    assert run("snapshot", "delete", taken[0]["id"], "-r", "repo")[0] == 1


def test_a_collection_says_for_whom_what_it_may_not_remove_yet_waits(run: Run, taken: list[dict[str, Any]]) -> None:
    store = LocalStore("repo")
    own = session.register(store, session.CREATE)
    for snapshot in taken:
        run("snapshot", "delete", snapshot["id"], "-r", "repo")
    code, out, _ = run("repo", "collect", "repo", "--json")
    found = json.loads(out)
    assert code == 0 and found["waiting_for"] == [own.id] and found["removed_packs"] == 0 < found["condemned_packs"]
    code, out, _ = run("repo", "collect", "repo", "--wait", "0.01")
    assert code == 0 and f"create {own.id} of process" in out
    code, out, _ = run("repo", "collect", "repo", "--patience", "0", "--json")
    assert code == 0 and json.loads(out)["live_bytes"] == 0


def test_parts_of_a_verification_read_all_between_them(run: Run, taken: list[dict[str, Any]]) -> None:
    whole = json.loads(run("verify", "-r", "repo", "--json")[1])
    parts = [json.loads(run("verify", "-r", "repo", "--part", f"{number}/3", "--json")[1]) for number in (1, 2, 3)]
    assert sum(part["packs"] for part in parts) == whole["packs"] and all(part["ok"] for part in parts)
    assert json.loads(run("verify", "-r", "repo", "--sample", "100%", "--json")[1])["packs"] == whole["packs"]
    for wrong in (["--part", "4/3"], ["--part", "x"], ["--sample", "0%"], ["--part", "1/2", "--sample", "1%"]):
        assert run("verify", "-r", "repo", *wrong)[0] == 2


def test_verify_names_damage_and_fails(run: Run, taken: list[dict[str, Any]]) -> None:
    packs = sorted(Path("repo/packs").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(packs[-1].read_bytes())
    data[200] ^= 0x40
    packs[-1].write_bytes(data)
    code, out, _ = run("verify", "-r", "repo", "--json")
    found = json.loads(out)
    assert code == 1 and found["ok"] is False
    assert {hit["snapshot"] for hit in found["hits"]} <= {item["id"] for item in taken}
    assert found["hits"] and packs[-1].name in found["problems"][0]["where"]
    code, out, _ = run("restore", taken[0]["id"], "out.img", "-r", "repo", "--allow-damaged", "--json")
    assert code == 1 and json.loads(out)["missing"]


def test_a_snapshot_whose_manifest_is_damaged_is_named_and_can_be_deleted(
    run: Run, taken: list[dict[str, Any]]
) -> None:
    (path,) = Path("repo/snapshots").glob(f"*/*{taken[0]['id']}")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    code, _, err = run("snapshot", "list", "-r", "repo")
    assert code == 1 and f"snapshot delete {taken[0]['id']}" in err
    assert run("repo", "collect", "repo")[0] == 1
    assert run("snapshot", "delete", taken[0]["id"], "-r", "repo")[0] == 0
    assert run("repo", "collect", "repo")[0] == 0
    assert run("verify", "-r", "repo")[0] == 0


def test_an_image_whose_name_is_no_text_can_be_taken(run: Run, taken: list[dict[str, Any]]) -> None:
    name = os.fsdecode(b"disk-\xff.img")
    Path(name).write_bytes(b"content")
    assert run("snapshot", "create", name, "-r", "repo", "--disk", "odd", "--json")[0] == 0
    code, out, _ = run("snapshot", "list", "-r", "repo", "--disk", "odd", "--json")
    assert code == 0 and json.loads(out)["source"] == "disk-\\udcff.img"
    assert run("snapshot", "create", name, "-r", "repo", "--disk", "odd", "--tag", "a=\x1b[31m")[0] == 2


def test_sessions_are_listed_and_ended(run: Run, taken: list[dict[str, Any]]) -> None:
    assert run("repo", "sessions", "repo", "--json") == (0, "", "")
    code, _, err = run("repo", "sessions", "repo", "--end", "abcd")
    assert code == 1 and "abcd" in err


def test_the_index_is_made_anew(run: Run, taken: list[dict[str, Any]], image: Path) -> None:
    for path in Path("repo/index").iterdir():
        path.unlink()
    code, out, _ = run("repo", "rebuild-index", "repo", "--json")
    assert code == 0 and json.loads(out)["entries"] > 0
    assert run("restore", taken[1]["id"], "out.img", "-r", "repo")[0] == 0
    assert Path("out.img").read_bytes() == image.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["repo", "init"], 2, "PLACE"),
        (["snapshot", "create", "x", "-r", "nowhere"], 2, "--disk"),
        (["snapshot", "list", "-r", "nowhere"], 1, "snapcore repo init"),
        (["repo", "init", "new", "--chunk-size", "5000"], 2, "power of two"),
        (["repo", "init", "new", "--chunk-size", "lots"], 2, "no size"),
        (["diff", "a", "b"], 1, "there is no image a"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_mistakes_are_told_on_standard_error(run: Run, arguments: list[str], code: int, says: str) -> None:
    got, out, err = run(*arguments)
    assert (got, out) == (code, "")
    assert says in err


def test_output_into_a_closed_pipe_ends_quietly(taken: list[dict[str, Any]], tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = 'snapcore snapshot list -r repo --json'.split(); from snapcore.cli import main; main()"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_difference_is_printed_alike_with_options_and_without(run: Run, image: Path, tmp_path: Path) -> None:
    content = bytearray(image.read_bytes())
    content[5000] ^= 1
    content[-1] ^= 1
    (tmp_path / "other.img").write_bytes(content)
    rows = [[4096, 4096], [len(content) - 4096, 4096]]
    for options in ([], ["--block", "4K"], ["--block=4096"]):
        code, out, err = run("diff", str(image), "other.img", *options)
        assert (code, out, err) == (0, "".join(f"{offset} {length}\n" for offset, length in rows), "")
    code, out, err = run("diff", str(image), "other.img", "--json")
    assert (code, json.loads(out), err) == (0, {"extents": rows}, "")


@pytest.mark.parametrize(("words", "spared"), [("--version", "numpy msgspec rich"), ("diff a b", "numpy click rich")])
def test_a_short_command_does_not_wait_for_libraries_that_it_does_not_use(
    words: str, spared: str, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"same")
    script = f"""
        import atexit, sys
        from snapcore.cli import main

        sys.argv = "snapcore {words}".split()
        atexit.register(lambda: print("imported:", sorted(set("{spared}".split()) & set(sys.modules))))
        main()
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("imported: []\n")


def test_the_demo_shows_the_main_job(run: Run, image: Path) -> None:
    code, out, err = run("demo", str(image), "--keep", "kept")
    assert (code, err) == (0, "")
    assert out.count("every byte is the same") == 2
    assert "÷ cp" in out and "try next" in out
    assert len(list(Path("kept/repo/snapshots").glob("*/*"))) == 2


def test_a_demo_does_not_work_in_a_folder_that_is_there(run: Run, image: Path) -> None:
    Path("kept").mkdir()
    code, out, err = run("demo", str(image), "--keep", "kept")
    assert (code, out) == (1, "")
    assert err == "snapcore: kept exists already; name a new folder\n"


def test_an_error_of_the_operating_system_is_one_line(run: Run, image: Path) -> None:
    code, _, err = run("demo", str(image), "--keep", f"{image}/below")
    assert code == 1
    assert err.startswith("snapcore: ") and err.count("\n") == 1 and str(image) in err


def test_a_restore_tells_its_snapshot_though_it_was_deleted_meanwhile(
    run: Run, taken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = Repository.restore

    def then_delete(repository: Repository, snapshot: Manifest, *rest: Any, **options: Any) -> Restored:
        done = restore(repository, snapshot, *rest, **options)
        repository.delete(taken[0]["id"])
        return done

    monkeypatch.setattr(Repository, "restore", then_delete)
    code, out, err = run("restore", taken[0]["id"][:12], "out.img", "-r", "repo", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["snapshot"] == taken[0]["id"]


def test_who_interrupts_is_not_told_that_nothing_is_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the commit it may be."""

    def interrupt(place: str) -> Repository:
        raise KeyboardInterrupt

    monkeypatch.setattr(Repository, "open", interrupt)
    code, _, err = run("snapshot", "list", "-r", "repo")
    assert (code, err.strip()) == (130, "snapcore: interrupted; run it again to go on")


def test_a_damaged_session_is_removed_by_the_command_that_its_error_names(
    run: Run, taken: list[dict[str, Any]]
) -> None:
    Path("repo/sessions").mkdir(exist_ok=True)
    Path("repo/sessions/abcd").write_bytes(b"no session")
    code, _, err = run("repo", "sessions", "repo")
    assert code == 1
    command = err.split("`")[-2].split()
    assert command[0] == "snapcore"
    assert run(*command[1:]) == (0, "ended abcd\n", "")
    assert run("repo", "sessions", "repo")[0] == 0
