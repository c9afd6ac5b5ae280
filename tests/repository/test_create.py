"""What a create accepts from its caller: sources in their own words, and no more than can be read again."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from snapcore import MemoryStore, Repository, UsageError, digest, scan
from snapcore.extents import Extents
from tests.support.disks import disk
from tests.support.small import Bytes, restored

PAGE = 4096


class Unsorted(Bytes):
    """Names its data from the end on, and some of it twice."""

    def data_extents(self) -> Extents:
        third = self.size_bytes // 3
        return np.array([[2 * third, self.size_bytes - 2 * third], [third - 5, third + 5], [0, third], [7, 9]])


class Named(Bytes):
    """Has a name of so many characters."""

    def __init__(self, data: bytes, length: int) -> None:
        super().__init__(data)
        self.name = "n" * length


@pytest.mark.parametrize("listed", [False, True], ids=["all", "changed"])
def test_the_data_of_a_source_may_be_named_in_any_order(listed: bool) -> None:
    repository = Repository.create(MemoryStore(), chunk_bytes=PAGE)
    before, after = disk(1, 30), disk(2, 30)
    repository.snapshot(Unsorted(before), disk="d")
    made = repository.snapshot(Unsorted(after), disk="d", changed=[(0, len(after))] if listed else None).snapshot
    buffer = bytearray(len(after))
    repository.open_snapshot(made).pread_into(buffer, 0)
    assert buffer == after


@pytest.mark.parametrize(
    "tags",
    [{str(number): "" for number in range(65)}, {"k" * 129: ""}, {"k": "v" * 257}, {"k": "\n"}],
    ids=["many", "key", "value", "unprintable"],
)
def test_tags_are_few_and_short(tags: dict[str, str]) -> None:
    repository = Repository.create(MemoryStore(), chunk_bytes=PAGE)
    with pytest.raises(UsageError, match="tag"):
        repository.snapshot(Bytes(disk(1, 2)), disk="d", tags=tags)
    most = {f"{number:0128}": "v" * 256 for number in range(64)}
    assert repository.snapshot(Bytes(disk(1, 2)), disk="d", tags=most).snapshot.tags == most


def test_a_manifest_that_nobody_could_read_is_not_committed() -> None:
    repository = Repository.create(MemoryStore(), chunk_bytes=PAGE)
    with pytest.raises(UsageError, match="most"):
        repository.snapshot(Named(disk(1, 2), 17 << 20), disk="d")
    assert repository.snapshots() == []
    assert repository.sessions() == []


class Digesting(Bytes):
    """A source that digests while it reads."""

    def read_blocks(
        self, target: memoryview, offset_bytes: int, length_bytes: int, block_bytes: int, seed: int
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool]]:
        target[length_bytes:] = bytes(len(target) - length_bytes)
        self.read_into(target[:length_bytes], offset_bytes)
        return digest.xxh64_blocks(target, block_bytes, seed), scan.zero_mask(target, block_bytes).view(np.bool)


@pytest.mark.parametrize("kind", [Bytes, Digesting])
def test_what_becomes_zero_and_what_was_zero_is_told_apart(kind: type[Bytes], tmp_path: Path) -> None:
    content = bytes(8192) + random.Random(1).randbytes(8192) + bytes(100)
    cleared = bytes(12_288) + content[12_288:]
    repository = Repository.create(MemoryStore(), chunk_bytes=4096)
    for data, changed_bytes in ((content, 8192), (content, 0), (cleared, 4096), (cleared, 0), (content, 4096)):
        taken = repository.snapshot(kind(data), disk="disk").snapshot
        assert taken.changed_bytes == changed_bytes
        assert restored(repository, taken.id, tmp_path) == data
    assert repository.verify().ok
