"""What snapshots reach: the bases of patches are kept, and are no substitute for what lies below them."""

from __future__ import annotations

import os
from pathlib import Path

from snapcore import Repository
from snapcore.store import MemoryStore

CHUNK_BYTES = 4096


def _disks_of_which_one_was_made_from_the_other(folder: Path) -> tuple[Repository, str, str, bytes]:
    """Original "z" and its clone "a": the clone's root node is a patch of the original's, and is marked first."""
    repository = Repository.create(MemoryStore(), chunk_bytes=CHUNK_BYTES)
    image = folder / "image"
    original = os.urandom(64 * CHUNK_BYTES)
    image.write_bytes(original)
    first = repository.snapshot(image, disk="z").snapshot
    image.write_bytes(os.urandom(CHUNK_BYTES) + original[CHUNK_BYTES:])
    second = repository.snapshot(image, disk="a", parent=first).snapshot
    return repository, first.id, second.id, original


def test_collect_keeps_the_chunks_below_a_node_that_it_met_first_as_the_base_of_a_patch(tmp_path: Path) -> None:
    repository, first, _, original = _disks_of_which_one_was_made_from_the_other(tmp_path)
    repository.collect()
    assert repository.verify().ok
    repository.restore(first, tmp_path / "restored")
    assert (tmp_path / "restored").read_bytes() == original


def test_the_chunks_below_the_base_of_another_snapshots_node_are_unique_all_the_same(tmp_path: Path) -> None:
    repository, first, second, _ = _disks_of_which_one_was_made_from_the_other(tmp_path)
    assert repository.unique([first]).plain_bytes == CHUNK_BYTES
    assert repository.unique([second]).plain_bytes == CHUNK_BYTES
    assert repository.unique([first, second]).plain_bytes == 65 * CHUNK_BYTES
