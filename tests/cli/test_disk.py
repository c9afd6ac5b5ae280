"""`snapcore disk` and `snapcore group`: live disks, their snapshots, images in and out."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapcore.pool import Pool
from tests.support.command import Run, asked, listed
from tests.support.pools import quick_folder

MIB = 1 << 20
SIZE = 8 * MIB + 100


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: each command opens and closes the pool, which syncs."""
    made = quick_folder()
    yield made
    shutil.rmtree(made)


@pytest.fixture
def pool(run: Run, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pool, which the environment names."""
    assert run("pool", "init", "p")[0] == 0
    monkeypatch.setenv("SNAPCORE_POOL", "p")
    return "p"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("xb") as file:
        file.write(random.Random(1).randbytes(MIB))
        file.truncate(SIZE)
    return path


@pytest.fixture
def web(run: Run, pool: str, image: Path) -> dict[str, Any]:
    """An imported disk."""
    made: dict[str, Any] = asked(run, "disk", "import", str(image), "--name", "web")
    return made


def write(name: str, data: bytes, offset_bytes: int) -> None:
    with Pool.open("p") as opened:
        opened.open_disk(name).pwrite(data, offset_bytes)


def content(name: str) -> bytes:
    with Pool.open("p", read_only=True) as opened:
        disk = opened.open_disk(name)
        return disk.pread(disk.size_bytes, 0)


def test_an_image_goes_in_and_comes_out(run: Run, web: dict[str, Any], image: Path) -> None:
    assert (web["name"], web["size_bytes"], web["mapped_bytes"], web["from"]) == ("web", SIZE, MIB, None)
    assert web["duration_s"] > 0
    done = asked(run, "disk", "export", "web", "out")
    assert (done["name"], done["target"], done["written_bytes"]) == ("web", "out", MIB)
    assert Path("out").read_bytes() == image.read_bytes()
    code, _, err = run("disk", "export", "web", "out")
    assert code == 1 and "--in-place" in err
    write("web", b"x", 5000)
    assert asked(run, "disk", "export", "web", "out", "--in-place")["written_bytes"] == 4096
    assert Path("out").read_bytes() == content("web")


def test_a_snapshot_is_exported_by_its_name_or_id(run: Run, web: dict[str, Any], image: Path) -> None:
    cut = asked(run, "snapshot", "create", "web", "--name", "before")
    write("web", b"x" * 5000, 5000)
    for number, ref in enumerate(["before", cut["id"]]):
        assert asked(run, "disk", "export", ref, f"out-{number}")["id"] == cut["id"]
        assert Path(f"out-{number}").read_bytes() == image.read_bytes()


def test_a_snapshot_of_a_disk_has_an_id_a_name_and_a_time(run: Run, web: dict[str, Any]) -> None:
    cut = asked(run, "snapshot", "create", "web", "-p", "p", "--name", "before")
    assert (cut["disk"], cut["disk_id"], cut["name"], cut["size_bytes"]) == ("web", web["id"], "before", SIZE)
    assert cut["created"].endswith("+00:00") and cut["duration_s"] > 0 and cut["group"] is None
    plain = asked(run, "snapshot", "create", "web")
    assert plain["name"] is None
    assert [item["id"] for item in listed(run, "snapshot", "list")] == [cut["id"], plain["id"]]
    code, out, _ = run("snapshot", "list")
    assert code == 0 and len(out.splitlines()) == 3 and "before" in out
    shown = asked(run, "snapshot", "show", "before")
    assert (shown["mapped_bytes"], shown["unique_bytes"]) == (MIB, 0)
    code, out, _ = run("snapshot", "show", "before", plain["id"])
    assert code == 0 and "deleting these frees 0 B" in out


def test_diff_of_snapshots_and_disks_names_the_blocks_that_changed(run: Run, web: dict[str, Any]) -> None:
    for name in ("one", "two"):
        assert run("snapshot", "create", "web", "--name", name)[0] == 0
        write("web", b"x", 4096 * 3 + 5)
        write("web", b"x", SIZE - 1)
    rows = [[3 * 4096, 4096], [8 * MIB, 100]]
    for a, b in (("one", "two"), ("two", "one"), ("two", "web")):
        assert asked(run, "snapshot", "diff", a, b) == {"extents": rows}
        assert run("snapshot", "diff", a, b)[1] == "".join(f"{offset} {length}\n" for offset, length in rows)
    assert asked(run, "snapshot", "diff", "one", "one") == {"extents": []}


def test_a_rollback_says_first_what_it_would_do_and_then_does_it(run: Run, web: dict[str, Any], image: Path) -> None:
    cut = asked(run, "snapshot", "create", "web", "--name", "before")
    write("web", b"x" * 4096, 2 * MIB)
    assert run("disk", "resize", "web", "9M")[0] == 0
    asked_first = asked(run, "disk", "rollback", "web", "before", "--dry-run")
    assert asked_first["changed_bytes"] == asked_first["lost_bytes"] == 4096
    assert (asked_first["snapshot"], asked_first["dry_run"]) == (cut["id"], True)
    code, out, _ = run("disk", "rollback", "web", "before", "--dry-run")
    assert code == 0 and "4.0 KiB in 1 place," in out and "8.0 MiB" in out
    assert content("web")[2 * MIB : 2 * MIB + 1] == b"x"
    assert asked(run, "disk", "rollback", "web", cut["id"])["size_bytes"] == SIZE
    assert content("web") == image.read_bytes()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_disk_is_not_rolled_back_to_the_snapshot_of_another(run: Run, web: dict[str, Any], more: list[str]) -> None:
    assert run("disk", "clone", "web", "other")[0] == 0
    foreign = asked(run, "snapshot", "create", "other", "--name", "before")
    for ref in ("before", foreign["id"]):
        code, out, err = run("disk", "rollback", "web", ref, *more)
        assert (code, out) == (1, "") and "'other'" in err
    own = asked(run, "snapshot", "create", "web", "--name", "before")
    assert asked(run, "disk", "rollback", "web", "before", *more)["snapshot"] == own["id"]


def test_disks_are_made_from_snapshots_disks_and_images(run: Run, web: dict[str, Any], image: Path) -> None:
    cut = asked(run, "snapshot", "create", "web", "--name", "before")
    write("web", b"later", 0)
    made = asked(run, "disk", "create", "a", "--from", "before")
    assert (made["size_bytes"], made["from"]) == (SIZE, {"snapshot": cut["id"]})
    assert asked(run, "disk", "create", "b", "--from", "web", "--size", "16M")["from"] == {"disk": web["id"]}
    assert asked(run, "disk", "create", "c", "--from", "image")["from"] == {"image": str(image)}
    assert asked(run, "disk", "create", "d", "--size", "10G")["size_bytes"] == 10 << 30
    assert asked(run, "disk", "clone", "web", "e")["from"] == {"disk": web["id"]}
    assert content("a") == content("c") == image.read_bytes()
    assert content("b")[:5] == content("e")[:5] == b"later" and len(content("b")) == 16 * MIB
    assert [item["name"] for item in listed(run, "disk", "list")] == ["a", "b", "c", "d", "e", "web"]
    code, out, _ = run("disk", "list")
    assert code == 0 and len(out.splitlines()) == 7


def test_a_disk_is_shown_changed_and_deleted(run: Run, web: dict[str, Any], image: Path) -> None:
    cut = asked(run, "snapshot", "create", "web", "--name", "before")
    made = asked(run, "disk", "create", "a", "--from", "before")
    write("a", b"x" * 8192, 0)
    shown = asked(run, "disk", "show", "a")
    assert (shown["id"], shown["mapped_bytes"], shown["unique_bytes"]) == (made["id"], MIB, 8192)
    assert shown["snapshots"] == [] and asked(run, "disk", "show", "web")["snapshots"] == [cut["id"]]
    assert f"snapshot {cut['id']}" in run("disk", "show", "a")[1]
    assert asked(run, "disk", "reset", "a")["name"] == "a"
    assert content("a") == image.read_bytes()
    assert asked(run, "disk", "resize", "a", "9M")["size_bytes"] == 9 * MIB
    assert asked(run, "disk", "rename", "a", "b")["name"] == "b"
    assert asked(run, "disk", "delete", "b") == {"deleted": made["id"], "name": "b"}
    assert run("disk", "show", "b")[0] == 1
    assert run("disk", "delete", "web")[0] == 0
    assert [item["name"] for item in listed(run, "snapshot", "list", "--disk", "web")] == ["before"]
    assert asked(run, "snapshot", "delete", "before") == {"deleted": cut["id"]}
    assert asked(run, "pool", "info")["allocated_bytes"] == 0


def test_snapshots_of_a_renamed_disk_are_found_by_its_new_name(run: Run, web: dict[str, Any]) -> None:
    first = asked(run, "snapshot", "create", "web")
    assert run("disk", "rename", "web", "shop")[0] == 0
    second = asked(run, "snapshot", "create", "shop")
    found = listed(run, "snapshot", "list", "--disk", "shop")
    assert [(item["id"], item["disk"]) for item in found] == [(first["id"], "web"), (second["id"], "shop")]
    code, _, err = run("snapshot", "list", "--disk", "nothing of the kind")
    assert code == 1 and "nothing of the kind" in err


def test_extents_say_what_is_allocated_zero_and_absent(run: Run, web: dict[str, Any]) -> None:
    assert asked(run, "disk", "extents", "web") == {
        "allocated": [[0, MIB]],
        "zero": [],
        "absent": [[MIB, SIZE - MIB]],
    }
    assert run("disk", "create", "lazy", "--from", "image")[0] == 0
    with Pool.open("p") as opened:
        opened.open_disk("lazy").write_zeroes(8192, 4096)
    assert run("disk", "extents", "lazy")[1] == f"0 8192 absent\n8192 4096 zero\n12288 {SIZE - 12288} absent\n"
    assert run("snapshot", "create", "web", "--name", "cut")[0] == 0
    assert asked(run, "disk", "extents", "cut")["allocated"] == [[0, MIB]]


def test_a_group_is_cut_at_one_instant_and_listed(run: Run, web: dict[str, Any]) -> None:
    assert run("disk", "create", "log", "--size", "1M")[0] == 0
    made = asked(run, "group", "create", "web", "log", "--name", "nightly")
    assert [item["disk"] for item in made["snapshots"]] == ["web", "log"]
    assert {item["group"] for item in made["snapshots"]} == {made["id"]}
    assert {item["created"] for item in made["snapshots"]} == {made["created"]}
    (found,) = listed(run, "group", "list")
    assert (found["id"], found["name"]) == (made["id"], "nightly")
    assert found["snapshots"] == made["snapshots"]
    code, out, _ = run("group", "list")
    assert code == 0 and "nightly" in out
    code, _, err = run("snapshot", "show", "nightly")
    assert code == 2 and all(item["id"] in err for item in made["snapshots"])
    code, out, _ = run("group", "create", "log")
    assert code == 0 and out.startswith("snapshot ")
    assert len(listed(run, "group", "list")) == 1


def test_deleting_several_snapshots_is_all_or_nothing(run: Run, web: dict[str, Any]) -> None:
    cuts = [asked(run, "snapshot", "create", "web")["id"] for _ in range(3)]
    assert run("snapshot", "delete", cuts[0], "99", cuts[1])[0] == 1
    assert len(listed(run, "snapshot", "list")) == 3
    assert listed(run, "snapshot", "delete", cuts[0], cuts[2]) == [{"deleted": cuts[0]}, {"deleted": cuts[2]}]
    assert [item["id"] for item in listed(run, "snapshot", "list")] == [cuts[1]]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["disk", "create", "a"], 2, "size"),
        (["disk", "create", "a", "--size", "0"], 2, "size"),
        (["disk", "create", "1a", "--size", "1M"], 2, "no name"),
        (["disk", "create", "web", "--size", "1M"], 1, "already"),
        (["disk", "create", "a", "--from", "nothing"], 1, "nothing"),
        (["disk", "create", "a", "--from", "web", "--size", "1M"], 2, "less than"),
        (["disk", "import", "nowhere", "--name", "a"], 1, "nowhere"),
        (["disk", "import", "image"], 2, "--name"),
        (["disk", "export", "nothing", "out"], 1, "snapcore disk list"),
        (["disk", "resize", "web", "1M"], 2, "only grow"),
        (["disk", "delete", "nothing"], 1, "nothing"),
        (["disk", "rollback", "web", "nothing"], 1, "nothing"),
        (["group", "create", "web", "web"], 2, "once"),
        (["group", "create"], 2, "DISK"),
        (["snapshot", "create", "nothing"], 1, "nothing"),
        (["snapshot", "diff", "web", "nothing"], 1, "nothing"),
    ],
)
def test_mistakes_are_told_on_standard_error(
    run: Run, web: dict[str, Any], words: list[str], code: int, says: str
) -> None:
    got, out, err = run(*words)
    assert (got, out) == (code, "")
    assert says in err


# One place: a repository or a pool


COMMANDS = [["create", "web"], ["list"], ["show", "1"], ["diff", "1", "2"], ["delete", "1"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_snapshot_commands_want_exactly_one_place(
    run: Run, pool: str, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if command[0] != "create":
        both = run("snapshot", *command, "-r", "r", "-p", "p")
        assert (both[0], both[1]) == (2, "") and "one place" in both[2]
    monkeypatch.setenv("SNAPCORE_REPO", "r")
    assert run("snapshot", *command)[0] == 2
    monkeypatch.delenv("SNAPCORE_REPO")
    monkeypatch.delenv("SNAPCORE_POOL")
    none = run("snapshot", *command)
    assert (none[0], none[1]) == (2, "") and "one place" in none[2]


def test_a_place_on_the_command_line_goes_before_the_one_in_the_environment(
    run: Run, web: dict[str, Any], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("repo", "init", "r")[0] == 0
    kept = asked(run, "snapshot", "create", str(image), "-r", "r", "--disk", "web")
    assert [item["id"] for item in listed(run, "snapshot", "list", "-r", "r")] == [kept["id"]]
    monkeypatch.setenv("SNAPCORE_REPO", "r")
    assert listed(run, "snapshot", "list", "-p", "p") == []


@pytest.mark.parametrize("option", [["--parent", "x"], ["--disk", "x"], ["--tag", "a=b"], ["--paranoid"]])
def test_options_for_images_are_refused_for_disks(run: Run, web: dict[str, Any], option: list[str]) -> None:
    code, out, err = run("snapshot", "create", "web", "-p", "p", *option)
    assert (code, out) == (2, "") and option[0] in err
    assert listed(run, "snapshot", "list") == []


def test_names_from_others_do_no_harm_to_a_terminal(run: Run, web: dict[str, Any]) -> None:
    assert run("disk", "rename", "web", "we\u202eb")[0] == 0
    for words in (["disk", "list"], ["disk", "show", "we\u202eb"], ["pool", "usage"]):
        code, out, _ = run(*words)
        assert code == 0 and "\u202e" not in out and "\\u202e" in out
    assert json.loads(run("disk", "show", "we\u202eb", "--json")[1])["name"] == "we\u202eb"


def test_a_disk_is_made_from_a_repository_filled_and_decoupled(
    run: Run, pool: str, image: Path, tmp_path: Path
) -> None:
    asked(run, "repo", "init", str(tmp_path / "repo"))
    taken = asked(run, "snapshot", "create", str(image), "--disk", "d", "-r", str(tmp_path / "repo"))
    source = f"{tmp_path / 'repo'}:{taken['id'][:8]}"
    made = asked(run, "disk", "create", "lazy", "--from", source)
    assert (made["size_bytes"], made["from"]["region"].rpartition(":")[2]) == (SIZE, taken["id"])
    before = asked(run, "disk", "hydrate", "lazy")
    assert before == {"disk": "lazy", "lazy": True, "here_bytes": 0, "total_bytes": SIZE, "percent": 0.0}
    after = asked(run, "disk", "hydrate", "lazy", "--wait")
    assert after["here_bytes"] == SIZE
    assert content("lazy") == image.read_bytes()
    assert asked(run, "disk", "decouple", "lazy") == {"disk": "lazy", "lazy": False}
    shutil.rmtree(tmp_path / "repo")
    assert content("lazy") == image.read_bytes()
    assert "needs no repository" in run("disk", "hydrate", "lazy")[1]
    assert run("disk", "create", "other", "--from", f"{tmp_path / 'repo'}:1234")[0] == 1


def test_lazy_disks_of_a_sealed_region_are_made_exported_and_rolled_back_with_its_key(
    run: Run, pool: str, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, unlock = str(tmp_path / "repo"), ["--passphrase-file", str(tmp_path / "words")]
    (tmp_path / "words").write_text("correct horse\n")
    asked(run, "repo", "init", repo)
    asked(run, "key", "create", "k", *unlock, "-r", repo)
    taken = asked(run, "snapshot", "create", str(image), "--disk", "d", "-r", repo, *unlock, "--key", "k")
    source = f"{repo}:{taken['id']}"
    code, _, err = run("disk", "create", "lazy", "--from", source)
    assert code == 1 and "not unlocked" in err
    asked(run, "disk", "create", "lazy", "--from", source, *unlock, "--hydrate", "off")
    code, _, err = run("disk", "export", "lazy", str(tmp_path / "out.img"))
    assert code == 1 and "could not be fetched" in err
    monkeypatch.setenv("SNAPCORE_PASSPHRASE", "correct horse")
    asked(run, "disk", "export", "lazy", str(tmp_path / "out.img"))
    assert (tmp_path / "out.img").read_bytes() == image.read_bytes()
    # What was read stays.
    assert asked(run, "disk", "hydrate", "lazy")["percent"] > 0
    (pin,) = [json.loads(line) for line in run("pin", "list", "-r", repo, "--json")[1].splitlines()]
    assert (pin["snapshot"], pin["state"]) == (taken["id"], "pin") and pool in pin["who"]
    code, _, err = run("snapshot", "delete", taken["id"], "-r", repo)
    assert code == 1 and pool in err and "snapcore pin remove" in err
    assert taken["id"][:12] in run("pin", "list", "-r", repo)[1]
    asked(run, "disk", "decouple", "lazy")
    assert run("pin", "list", "-r", repo, "--json")[1] == ""
    asked(run, "snapshot", "delete", taken["id"], "-r", repo)


def test_pins_are_removed_and_overruled(run: Run, pool: str, image: Path, tmp_path: Path) -> None:
    repo = str(tmp_path / "repo")
    asked(run, "repo", "init", repo)
    taken = [asked(run, "snapshot", "create", str(image), "--disk", "d", "-r", repo)["id"] for _ in range(2)]
    for number, snapshot in enumerate(taken):
        asked(run, "disk", "create", f"lazy{number}", "--from", f"{repo}:{snapshot}")
    assert asked(run, "snapshot", "delete", taken[0], "-r", repo, "--force") == {"deleted": taken[0]}
    pin = json.loads(run("pin", "list", "-r", repo, "--json")[1])
    assert pin["snapshot"] == taken[1]
    assert asked(run, "pin", "remove", pin["id"][:6], "-r", repo) == {"removed": pin["id"]}
    assert asked(run, "snapshot", "delete", taken[1], "-r", repo) == {"deleted": taken[1]}
    code, _, err = run("disk", "export", "lazy0", str(tmp_path / "out.img"))
    assert code == 1 and "could not be fetched" in err
    assert run("snapshot", "delete", "1", "-p", pool, "--force")[0] == 2
    # They are deleted though what they came from is gone.
    asked_lines = run("disk", "delete", "lazy0", "lazy1", "--json")
    assert asked_lines[0] == 0


def test_a_disk_rolls_back_to_what_is_only_in_a_repository(
    run: Run, pool: str, web: dict[str, Any], tmp_path: Path
) -> None:
    repo = str(tmp_path / "repo")
    asked(run, "repo", "init", repo)
    before = content("web")
    kept = asked(run, "snapshot", "create", "web", "-p", pool, "-r", repo)
    asked(run, "snapshot", "delete", kept["local"]["id"], "-p", pool)
    with Pool.open(pool) as opened:
        opened.open_disk("web").pwrite(b"spoilt" * 999, 5)
    source = f"{repo}:{kept['id']}"
    told = asked(run, "disk", "rollback", "web", source, "--dry-run")
    assert (told["snapshot"], told["dry_run"], content("web") == before) == (kept["id"], True, False)
    asked(run, "disk", "rollback", "web", source)
    assert run("disk", "export", "web", str(tmp_path / "back.img"))[0] == 0
    assert (tmp_path / "back.img").read_bytes() == before
    asked(run, "disk", "create", "other", "--size", "1M")
    code, _, err = run("disk", "rollback", "other", source)
    assert code == 1 and "was not cut from disk 'other'" in err


def test_what_is_no_way_to_hydrate_is_refused(run: Run, pool: str) -> None:
    for word in ("0", "often", "-5"):
        assert run("disk", "create", "lazy", "--size", "1M", f"--hydrate={word}")[0] == 2
