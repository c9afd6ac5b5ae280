"""Repositories written by every released format are read for ever: the golden files are never rewritten."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from snapcore import BusyError, KeyFile, LockedError, Passphrase, RefusedError, Repository
from snapcore.repository import generations as generations_
from snapcore.repository import summaries
from snapcore.repository.domain import PLAIN
from snapcore.store import LocalStore
from tests.support.golden import CHUNK_BYTES, IMAGE, KEY_FILE, PASSPHRASE, Generation, generations

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.fixture(params=sorted(path.name for path in GOLDEN.glob("format-*") if path.is_dir()))
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Repository:
    shutil.copytree(GOLDEN / request.param, tmp_path / "repo")
    keys = [Passphrase(PASSPHRASE)] if request.param.endswith("-sealed") else []
    return Repository.open(tmp_path / "repo", keys=keys)


def test_the_golden_key_file_opens_the_sealed_repository_and_nothing_else_does(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / KEY_FILE, tmp_path / "key")
    (tmp_path / "key").chmod(0o600)
    found = Repository.open(GOLDEN / "format-1-sealed", keys=[KeyFile(tmp_path / "key")])
    assert [key.name for key in found.keyring.listed()] == ["golden"] and len(found.snapshots()) == len(generations())
    locked = Repository.open(GOLDEN / "format-1-sealed")
    assert len(locked.locked_snapshots()) == len(generations()) and locked.snapshots() == []
    with pytest.raises(LockedError):
        locked.unlock(Passphrase(PASSPHRASE + "?"))


@pytest.mark.parametrize("wanted", generations(), ids=lambda item: item.label)
def test_every_golden_snapshot_restores(repository: Repository, wanted: Generation, tmp_path: Path) -> None:
    found = repository.find(wanted.label)
    assert (found.disk, found.size_bytes, found.tags) == (wanted.disk, len(wanted.content), {"kind": "golden"})
    repository.restore(found, tmp_path / "out.img")
    assert (tmp_path / "out.img").read_bytes() == wanted.content


def test_golden_repositories_verify_and_hold_what_they_held(repository: Repository) -> None:
    done = repository.verify()
    assert done.ok and done.snapshots == len(generations())
    assert [item.label for item in repository.snapshots("golden")] == ["first", "second", "third"]
    assert repository.diff("first", "second").tolist() == [[CHUNK_BYTES, CHUNK_BYTES], [7 * CHUNK_BYTES, CHUNK_BYTES]]


def test_work_goes_on_in_golden_repositories(repository: Repository, tmp_path: Path) -> None:
    content = bytearray(generations()[2].content)
    content[5] ^= 1
    (tmp_path / "disk.img").write_bytes(content)
    made = repository.snapshot(tmp_path / "disk.img", disk="golden").snapshot
    assert made.parent == repository.find("third").id and made.changed_bytes == CHUNK_BYTES
    repository.delete("first")
    repository.collect()
    repository.restore(made, tmp_path / "out.img")
    assert (tmp_path / "out.img").read_bytes() == bytes(content)
    assert repository.verify().ok


def test_a_golden_image_is_what_it_was(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "format-1-images", tmp_path / "repo")
    repository = Repository.open(tmp_path / "repo")
    (image,) = repository.images()
    system, data, empty = image.disks
    assert (image.name, image.architecture, image.boot, image.os) == (IMAGE, "aarch64", "uefi", "Golden 1")
    assert (image.tags, system.min_size_bytes) == ({"kind": "golden"}, 1 << 24)
    assert (empty.device, empty.min_size_bytes, empty.snapshot) == ("/dev/xvdz", 1 << 20, None)
    wanted = {item.label: item.content for item in generations()}
    for disk, label in ((system, "third"), (data, "second")):
        assert disk.snapshot is not None and disk.sha256 == hashlib.sha256(wanted[label]).hexdigest()
        assert repository.open_snapshot(disk.snapshot).read() == wanted[label]
        with pytest.raises(RefusedError, match=IMAGE):
            repository.delete(label)
    repository.delete("first")
    repository.delete_image(IMAGE)
    repository.delete("third")


def test_a_golden_collection_goes_on(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "format-1-collected", tmp_path / "repo")
    repository = Repository.open(tmp_path / "repo")
    store = LocalStore(str(tmp_path / "repo"))
    assert generations_.latest(store, PLAIN).condemned
    assert len(summaries.load(store)) >= len(generations())
    (waiting,) = repository.collect(patience_s=float("inf")).waiting_for
    assert (waiting.host, waiting.generation) == ("elsewhere", 2)
    done = repository.collect(patience_s=0.0)
    assert (done.waiting_for, done.condemned_packs) == ((), 0) and done.removed_packs > 0
    assert not list(store.list("deleted/"))
    assert repository.verify().ok and len(repository.snapshots()) == len(generations())


def test_golden_pins_hold(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "format-1-pinned", tmp_path / "repo")
    repository = Repository.open(tmp_path / "repo")
    found = {pin.id: pin for pin in repository.pins()}
    assert {pin_id: pin.deletes for pin_id, pin in found.items()} == {"ab" * 16: False, "cd" * 16: True}
    with pytest.raises(RefusedError, match="the pool /srv/pool on host"):
        repository.delete("third")
    with pytest.raises(BusyError, match="being deleted"):
        repository.pin("second", "another")
    repository.delete("second")
    assert [pin.id for pin in repository.pins()] == ["ab" * 16]
