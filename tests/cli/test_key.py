"""`snapcore key`, and commands on what is under a key."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from snapcore import KeyFile, Passphrase, Repository
from tests.support import disks
from tests.support.command import Run, asked, listed

CHUNK = 64 << 10
SECRET = "correct horse battery"


@pytest.fixture(autouse=True)
def no_keys_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KEY_FILE", "PASSPHRASE_FILE", "PASSPHRASE", "KMS", "REPO"):
        monkeypatch.delenv(f"SNAPCORE_{name}", raising=False)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image `disk.img`; a repository `repo` with the key prod, held by the key file `key` and by `words`."""
    folder = tmp_path_factory.mktemp("prepared")
    disks.image(folder / "disk.img", disks.disk(1, 40))
    (folder / "words").write_text(f"{SECRET}\n")
    (folder / "wrong").write_text("another horse")
    repository = Repository.create(folder / "repo")
    repository.keyring.create("prod", KeyFile.create(folder / "key"))
    repository.keyring.add("prod", Passphrase(SECRET))
    return folder


@pytest.fixture
def image(prepared: Path, tmp_path: Path) -> Path:
    for item in prepared.iterdir():
        copy = shutil.copytree if item.is_dir() else shutil.copy2
        copy(item, tmp_path / item.name)
    return tmp_path / "disk.img"


@pytest.fixture
def snapshot_id(run: Run, image: Path) -> str:
    """One snapshot under the key."""
    words = ("snapshot", "create", str(image), "-r", "repo", "--disk", "d", "--key", "prod", "--key-file", "key")
    return str(asked(run, *words)["id"])


def test_a_key_is_made_with_one_holder_and_given_more(run: Run, image: Path) -> None:
    made = asked(run, "key", "create", "more", "-r", "repo", "--key-file", "made")
    assert (made["name"], made["disabled"], made["holders"][0]["kind"]) == ("more", False, "key-file")
    words = ("key", "add", "more", "-r", "repo", "--key-file", "made", "--new-passphrase-file", "words")
    assert asked(run, *words)["kind"] == "passphrase"
    words = ("snapshot", "create", str(image), "-r", "repo", "--disk", "d", "--key", "more", "--key-file", "made")
    assert asked(run, *words)["key"] == made["id"]


def test_each_way_to_give_a_key_opens_what_is_under_it(
    run: Run, snapshot_id: str, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (words, variables) in enumerate(
        [
            (("--key-file", "key"), {}),
            (("--passphrase-file", "words"), {}),
            ((), {"KEY_FILE": "key"}),
            ((), {"PASSPHRASE_FILE": "words"}),
            ((), {"PASSPHRASE": SECRET}),
            (("--key-file", "key"), {"PASSPHRASE": "what stands in the words of a command counts more"}),
        ]
    ):
        with monkeypatch.context() as patched:
            for name, value in variables.items():
                patched.setenv(f"SNAPCORE_{name}", value)
            assert run("restore", snapshot_id, f"out{number}", "-r", "repo", *words)[0] == 0
            assert Path(f"out{number}").read_bytes() == image.read_bytes()


def test_every_command_on_a_repository_takes_keys(run: Run, snapshot_id: str) -> None:
    unlock = ("--key-file", "key")
    assert asked(run, "repo", "info", "repo", *unlock)["snapshots"] == 1
    assert asked(run, "verify", "-r", "repo", *unlock)["snapshots"] == 1
    assert asked(run, "snapshot", "show", snapshot_id, "-r", "repo", *unlock)["disk"] == "d"
    assert asked(run, "snapshot", "diff", snapshot_id, snapshot_id, "-r", "repo", *unlock) == {"extents": []}
    assert asked(run, "repo", "rebuild-index", "repo", *unlock)["entries"] > 0
    assert asked(run, "snapshot", "delete", snapshot_id, "-r", "repo", *unlock) == {"deleted": snapshot_id}
    assert asked(run, "repo", "collect", "repo", *unlock)["freed_bytes"] > 0


def test_without_the_key_a_snapshot_is_listed_as_locked(run: Run, snapshot_id: str) -> None:
    (locked,) = listed(run, "snapshot", "list", "-r", "repo")
    key_id = listed(run, "key", "list", "-r", "repo")[0]["id"]
    assert locked == {"id": snapshot_id, "disk": None, "key": key_id, "key_name": "prod", "locked": True}
    code, out, _ = run("snapshot", "list", "-r", "repo")
    assert code == 0 and "(locked)" in out and "prod" in out
    code, out, _ = run("snapshot", "list", "-r", "repo", "--key-file", "key")
    assert code == 0 and "(locked)" not in out and "prod" in out
    assert asked(run, "repo", "info", "repo")["locked_snapshots"] == 1
    assert asked(run, "verify", "-r", "repo")["locked_snapshots"] == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("restore", "ID", "out"), "not unlocked"),
        (("restore", "ID", "out", "--key-file", "other"), "opens no key"),
        (("restore", "ID", "out", "--passphrase-file", "wrong"), "opens no key"),
        (("restore", "ID", "out", "--key-file", "none"), "cannot read the key file none"),
        (("snapshot", "delete", "ID"), "not unlocked"),
        (("snapshot", "create", "disk.img", "--disk", "d"), "--key NAME, or --no-key"),
        (("snapshot", "create", "disk.img", "--disk", "d", "--key", "prod"), "not unlocked"),
        (("snapshot", "create", "disk.img", "--disk", "d", "--no-key", "--key-file", "key"), "stays so"),
        (("snapshot", "create", "disk.img", "--disk", "d", "--no-key", "--key", "prod"), "exclude"),
        (("key", "add", "prod", "--new-passphrase-file", "words"), "not unlocked"),
        (("key", "create", "other"), "name one new holder"),
        (("key", "create", "other", "--key-file", "a", "--passphrase-file", "words"), "name one new holder"),
        (("key", "create", "other", "--passphrase"), "on a terminal"),
        (("key", "create", "prod", "--key-file", "key"), "has a key prod already"),
        (("key", "rotate", "prod", "--key-file", "key", "--new-key-file", "new"), "--holder ID"),
        (("key", "remove", "prod", "--holder", "zz"), "0 holders"),
        (("key", "disable", "none"), "no key 'none'"),
    ],
)
def test_a_missing_or_wrong_key_is_told_before_any_work(
    run: Run, snapshot_id: str, words: tuple[str, ...], says: str
) -> None:
    KeyFile.create("other")
    before = sorted(Path("repo").rglob("*"))
    code, out, err = run(*(snapshot_id if word == "ID" else word for word in words), "-r", "repo")
    assert code in (1, 2) and out == "" and says in err
    assert sorted(Path("repo").rglob("*")) == before and not Path("out").exists()


def test_a_disabled_key_is_refused_by_every_command_until_it_is_enabled(run: Run, snapshot_id: str) -> None:
    assert asked(run, "key", "disable", "prod", "-r", "repo")["disabled"] is True
    code, _, err = run("restore", snapshot_id, "out", "-r", "repo", "--key-file", "key")
    assert code == 1 and "prod is disabled (`snapcore key enable prod` ends that)" in err
    assert "disabled" in run("key", "list", "-r", "repo")[1]
    assert asked(run, "key", "enable", "prod", "-r", "repo")["disabled"] is False
    assert run("restore", snapshot_id, "out", "-r", "repo", "--key-file", "key")[0] == 0


def test_holders_change_without_a_byte_of_data_written_again(run: Run, snapshot_id: str) -> None:
    def data() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in Path("repo/packs").rglob("*") if path.is_file()}

    before = data()
    holders = {item["kind"]: item["id"] for item in listed(run, "key", "list", "-r", "repo")[0]["holders"]}
    words = ("key", "rotate", "prod", "-r", "repo", "--key-file", "key", "--holder", holders["passphrase"])
    made = asked(run, *words, "--new-key-file", "new")
    assert made["kind"] == "key-file"
    assert run("restore", snapshot_id, "a", "-r", "repo", "--passphrase-file", "words")[0] == 1
    assert run("restore", snapshot_id, "b", "-r", "repo", "--key-file", "new")[0] == 0
    gone = asked(run, "key", "remove", "prod", "-r", "repo", "--holder", holders["key-file"])
    assert gone == {"key": "prod", "removed": holders["key-file"]}
    assert run("restore", snapshot_id, "c", "-r", "repo", "--key-file", "key")[0] == 1
    code, _, err = run("key", "remove", "prod", "-r", "repo", "--holder", made["holder"])
    assert code == 1 and "last holder" in err
    assert run("restore", snapshot_id, "d", "-r", "repo", "--key-file", "new")[0] == 0
    assert data() == before


def test_a_key_is_shared_with_another_repository(run: Run, snapshot_id: str) -> None:
    assert run("repo", "init", "elsewhere")[0] == 0
    words = ("key", "share", "prod", "-r", "repo", "--key-file", "key", "--to", "elsewhere", "--new-key-file", "there")
    assert asked(run, *words)["id"] == listed(run, "key", "list", "-r", "repo")[0]["id"]


def on_a_terminal(words: list[str], folder: Path, *answers: str) -> tuple[int, str]:
    """A command whose questions are answered by somebody at a terminal; what it showed there."""
    parent, child = pty.openpty()
    started = subprocess.Popen(
        [sys.executable, "-P", "-m", "snapcore", *words], cwd=folder, stdin=child, stdout=child, stderr=child
    )
    os.close(child)
    shown = b""
    left = [*answers]
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
        if left and shown.rstrip().endswith(b":"):
            time.sleep(0.05)
            os.write(parent, left.pop(0).encode() + b"\n")
            shown += b"\n"
    os.close(parent)
    return started.wait(), shown.decode()


def test_a_passphrase_is_asked_for_on_a_terminal_and_not_shown(run: Run, image: Path, tmp_path: Path) -> None:
    code, shown = on_a_terminal(["key", "create", "more", "-r", "repo", "--passphrase"], tmp_path, SECRET, SECRET)
    assert code == 0 and SECRET not in shown and "made the key more" in shown
    words = ["snapshot", "create", str(image), "-r", "repo", "--disk", "d", "--key", "more"]
    code, shown = on_a_terminal(words, tmp_path, SECRET)
    assert code == 0 and SECRET not in shown
    code, shown = on_a_terminal(["snapshot", "list", "-r", "repo"], tmp_path, "")
    assert code == 0 and "(locked)" in shown
    code, shown = on_a_terminal(["snapshot", "list", "-r", "repo"], tmp_path, "wrong")
    assert code == 1 and "opens no key" in shown and "wrong" not in shown.replace("wrong passphrase", "")


def test_no_secret_is_in_the_words_or_the_output_of_a_command(run: Run, snapshot_id: str) -> None:
    key = Path("key").read_text().splitlines()[2]
    shown = ""
    for words in (
        ("key", "list", "-r", "repo", "--json"),
        ("snapshot", "list", "-r", "repo", "--json", "--key-file", "key"),
        ("repo", "info", "repo", "--passphrase-file", "words"),
        ("verify", "-r", "repo", "--json", "--key-file", "key"),
        ("restore", "ffff", "x", "-r", "repo", "--passphrase-file", "words"),
        ("key", "--help"),
    ):
        assert SECRET not in words and key not in words
        _, out, err = run(*words)
        shown += out + err
    assert SECRET not in shown and key not in shown
    (row,) = [json.loads(line) for line in run("key", "list", "-r", "repo", "--json")[1].splitlines()]
    assert {*row} == {"id", "name", "holders", "disabled", "unlocked"}
    assert {*row["holders"][0]["parameters"]} <= {"salt", "memory_kib", "passes", "lanes"}
