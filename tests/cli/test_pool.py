"""`snapcore pool`: making a pool, what it says of itself, checking, tidying."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapcore.pool import Pool
from tests.support.command import Run, asked
from tests.support.pools import quick_folder

MIB = 1 << 20


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: each command opens and closes the pool, which syncs."""
    made = quick_folder()
    yield made
    shutil.rmtree(made)


@pytest.fixture
def pool(run: Run) -> str:
    """A pool with a disk of 2 MiB of data and two snapshots, between which a MiB was written."""
    assert asked(run, "pool", "init", "p", "--limit", "1G") == {"path": "p", "limit_bytes": 1 << 30}
    with Pool.open("p") as made:
        disk = made.create_disk("web", 64 * MIB)
        disk.pwrite(b"a" * 2 * MIB, 0)
        disk.snapshot("one")
        disk.pwrite(b"b" * MIB, 0)
        disk.snapshot("two")
    return "p"


def test_info_counts_disks_snapshots_and_bytes(run: Run, pool: str) -> None:
    facts = asked(run, "pool", "info", "p")
    assert (facts["path"], facts["disks"], facts["snapshots"]) == ("p", 1, 2)
    assert (facts["disks_bytes"], facts["allocated_bytes"]) == (64 * MIB, 3 * MIB)
    assert facts["free_bytes"] == (1 << 30) - 3 * MIB - facts["held_bytes"]
    code, out, _ = run("pool", "info", "p")
    assert code == 0 and "1 disks and 2 snapshots" in out and "3.0 MiB in use" in out


def test_usage_says_what_each_would_free(run: Run, pool: str) -> None:
    facts = asked(run, "pool", "usage", "p")
    assert facts["allocated_bytes"] == 3 * MIB
    assert [(item["name"], item["mapped_bytes"], item["unique_bytes"]) for item in facts["disks"]] == [
        ("web", 2 * MIB, 0)
    ]
    assert [(item["name"], item["disk"], item["unique_bytes"]) for item in facts["snapshots"]] == [
        ("one", "web", MIB),
        ("two", "web", 0),
    ]
    code, out, _ = run("pool", "usage", "p")
    assert code == 0 and len([line for line in out.splitlines() if "of web" in line]) == 2


def test_the_pool_comes_from_the_environment_too(run: Run, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPCORE_POOL", "p")
    for words in (["pool", "info"], ["pool", "check"], ["disk", "list"], ["snapshot", "list"], ["group", "list"]):
        assert run(*words)[0] == 0


def test_check_finds_nothing_in_a_sound_pool(run: Run, pool: str) -> None:
    found = asked(run, "pool", "check", "p")
    assert (found["ok"], found["problems"], found["lost"], found["repaired"]) == (True, [], [], False)
    assert run("pool", "check", "p")[1].startswith("all is well")


def test_check_names_damage_and_fails_and_a_repair_lists_what_is_lost(run: Run, pool: str) -> None:
    data = Path("p/map").read_bytes()
    # One slot after the other, until one holds a page of a disk's tree.
    for slot in range(3, len(data) // 1040):
        damaged = bytearray(data)
        damaged[slot * 1040 + 100] ^= 1
        Path("p/map").write_bytes(damaged)
        code, out, err = run("pool", "check", "p", "--json")
        assert code == 1
        assert json.loads(out)["problems"] or err
        if out and json.loads(out)["problems"] and not err and "page" in json.loads(out)["problems"][0]:
            break
    else:
        pytest.fail("no page of a tree was damaged")
    code, out, _ = run("pool", "check", "p")
    assert code == 1 and "problem: " in out and "--repair" in out
    code, out, _ = run("pool", "check", "p", "--repair", "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["repaired"]) == (1, False, True)
    assert found["problems"] and any("of disk web" in lost for lost in found["lost"])
    # What is lost stays lost, and a later check says so.
    code, out, _ = run("pool", "check", "p", "--json")
    again = json.loads(out)
    assert (code, again["ok"], again["problems"], again["lost"]) == (1, False, [], found["lost"])
    code, out, _ = run("pool", "check", "p")
    assert code == 1 and "lost: " in out and "--repair" not in out


def test_a_damaged_copy_of_the_superblock_is_repaired_without_loss(run: Run, pool: str) -> None:
    data = bytearray(Path("p/superblock").read_bytes())
    data[4096 + 30] ^= 1
    Path("p/superblock").write_bytes(data)
    code, out, _ = run("pool", "check", "p", "--json")
    assert code == 1 and "superblock" in json.loads(out)["problems"][0]
    code, out, _ = run("pool", "check", "p", "--repair")
    assert code == 0 and "repaired: " in out
    assert asked(run, "pool", "check", "p")["ok"] is True


def test_compact_gives_back_what_is_not_used(run: Run, pool: str) -> None:
    assert run("snapshot", "delete", "one", "-p", "p")[0] == 0
    done = asked(run, "pool", "compact", "p")
    assert done["freed_bytes"] >= 0 and done["data_bytes"] <= 3 * MIB and done["map_bytes"] > 0
    code, out, _ = run("pool", "compact", "p")
    assert code == 0 and out.startswith("freed ")
    assert asked(run, "pool", "check", "p")["ok"] is True


def test_a_pool_in_use_is_told_so(run: Run, pool: str) -> None:
    with Pool.open("p"):
        for words in (["info"], ["usage"], ["check"], ["compact"]):
            code, out, err = run("pool", *words, "p")
            assert (code, out) == (1, "") and "open elsewhere" in err


def test_many_may_look_at_once(run: Run, pool: str) -> None:
    with Pool.open("p", read_only=True):
        for words in (
            ["pool", "info", "p"],
            ["disk", "list", "-p", "p"],
            ["snapshot", "diff", "one", "two", "-p", "p"],
        ):
            assert run(*words)[0] == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["pool", "init"], 2, "DIR"),
        (["pool", "init", "."], 1, "not empty"),
        (["pool", "init", "new", "--limit", "much"], 2, "no size"),
        (["pool", "info", "nowhere"], 1, "snapcore pool init nowhere"),
        (["pool", "check", "nowhere"], 1, "snapcore pool init nowhere"),
        (["disk", "list"], 2, "--pool"),
        (["disk", "list", "-p", "nowhere"], 1, "snapcore pool init"),
    ],
)
def test_mistakes_are_told_on_standard_error(run: Run, pool: str, words: list[str], code: int, says: str) -> None:
    got, out, err = run(*words)
    assert (got, out) == (code, "")
    assert says in err
