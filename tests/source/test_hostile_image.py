"""Broken and hostile images are refused with an error that names them, or read as qemu-img reads them. Nothing else."""

from __future__ import annotations

import os
import random
import resource
import struct
from pathlib import Path

import pytest

from snapcore import Error, ImageError, RefusedError
from snapcore.source import open_image, packing
from tests.support import hostile_images
from tests.support.hostile_images import MADE, Victim, changed, outcome
from tests.support.images import content, make_raw, qemu_img
from tests.support.tools import needs

MIB = 1 << 20
IDS = [f"{kind}-{options}" for kind, options in MADE]


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> list[Victim]:
    needs("qemu-img")
    return hostile_images.make_victims(tmp_path_factory.mktemp("victims"))


@pytest.mark.parametrize("number", range(len(MADE)), ids=IDS)
def test_changed_tables_give_an_error_or_some_bytes(victims: list[Victim], number: int) -> None:
    victim = victims[number]
    good = outcome(victim)
    assert isinstance(good, bytes) and any(good)
    dice = random.Random(number)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rounds = 60 if victim.kind == "vhdx" else 250
    refused = 0
    for _ in range(rounds):
        with changed(victim, hostile_images.random_changes(victim, dice), seal=dice.random() < 0.7):
            refused += isinstance(outcome(victim), Error)
    assert outcome(victim) == good
    assert refused > rounds // 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("number", range(len(MADE)), ids=IDS)
def test_what_is_read_of_a_changed_image_is_what_qemu_img_reads(victims: list[Victim], number: int) -> None:
    victim = victims[number]
    dice = random.Random(number + 100)
    _compare(victim, [hostile_images.random_changes(victim, dice) for _ in range(12)])


@pytest.mark.campaign
@pytest.mark.parametrize("number", range(len(MADE)), ids=IDS)
def test_every_byte_of_every_table_changed(victims: list[Victim], number: int) -> None:
    victim = victims[number]
    _compare(victim, list(hostile_images.every_change(victim)))


def _compare(victim: Victim, all_changes: list[list[hostile_images.Change]]) -> None:
    for changes in all_changes:
        with changed(victim, changes, seal=True):
            found = outcome(victim)
            if isinstance(found, Error):
                continue
            theirs = hostile_images.as_qemu_reads_it(victim)
            if theirs is not None:
                common = min(len(found), len(theirs))
                assert found[:common] == theirs[:common], f"{victim.path.name} {victim.options}: {changes}"


@pytest.mark.parametrize("number", range(len(MADE)), ids=IDS)
def test_a_file_that_was_cut_off_is_refused_or_complete(victims: list[Victim], number: int) -> None:
    """QEMU itself leaves qcow2 files that end within their last cluster: what is cut of that one reads as zeros."""
    victim = victims[number]
    good = outcome(victim)
    assert isinstance(good, bytes)
    size = victim.path.stat().st_size
    dice = random.Random(number)
    for length in [0, 1, 511, 512, *(dice.randrange(size) for _ in range(30)), size - 4097]:
        with changed(victim, [], seal=False):
            with victim.path.open("r+b") as file:
                file.truncate(length)
            found = outcome(victim)
            if isinstance(found, Error):
                continue
            assert victim.kind == "qcow2" or found == good
            differing = [at for at in range(len(good)) if found[at] != good[at]]
            cluster = 64 << 10 if "64k" in victim.options else 16 << 10
            assert not differing or differing[-1] - differing[0] < cluster
            assert all(found[at] == 0 for at in differing)


def test_packed_units_that_would_swell_are_cut_at_a_unit() -> None:
    bomb = packing.deflate(memoryview(bytes(64 * MIB)), packing.QCOW2_WINDOW)
    assert len(packing.inflate(bomb, 65536, packing.QCOW2_WINDOW)) == 65536
    frames = packing.zstd_pack(memoryview(bytes(64 * MIB)))
    assert len(packing.zstd_unpack(frames, 65536)) == 65536
    # Several frames make a unit too, and what is no frame is an error.
    halves = packing.zstd_pack(memoryview(b"a" * 1000)) + packing.zstd_pack(memoryview(b"b" * 1000))
    assert packing.zstd_unpack(halves + bytes(512), 2000) == b"a" * 1000 + b"b" * 1000
    for broken in (b"", b"x" * 100, frames[:-3]):
        with pytest.raises(packing.PackingError) if broken == b"x" * 100 else _nothing():
            assert len(packing.zstd_unpack(broken, 64 * MIB)) < 64 * MIB


class _nothing:  # noqa: N801 - reads as a context
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_one_table_that_many_entries_name_is_refused(tmp_path: Path) -> None:
    """Each entry would cost a look at it: a small file would keep us busy for ever."""
    needs("qemu-img")
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "preallocation=metadata", image, "1G")
    with image.open("r+b") as file:
        (directory,) = struct.unpack(">Q", os.pread(file.fileno(), 8, 40))
        os.pwrite(file.fileno(), os.pread(file.fileno(), 8, directory), directory + 8)
    with pytest.raises(ImageError, match="name one table"), open_image(image):
        pass


def test_a_vhdx_whose_log_was_not_replayed_is_refused(victims: list[Victim]) -> None:
    victim = next(victim for victim in victims if victim.kind == "vhdx")
    # The id of the log, in both headers.
    with changed(victim, [((64 << 10) + 48, b"\1"), ((128 << 10) + 48, b"\1")], seal=True):
        error = outcome(victim)
    assert isinstance(error, RefusedError) and "not replayed" in str(error)


def test_a_chain_may_not_be_too_long(tmp_path: Path) -> None:
    needs("qemu-img")
    make_raw(tmp_path / "0.raw", MIB, 5)
    qemu_img("create", "-f", "qcow2", "-b", "0.raw", "-F", "raw", tmp_path / "1.qcow2")
    for number in range(2, 66):
        below, image = f"{number - 1}.qcow2", tmp_path / f"{number}.qcow2"
        qemu_img("create", "-u", "-f", "qcow2", "-b", below, "-F", "qcow2", image, "1M")
    with open_image(tmp_path / "64.qcow2", backing_folders=[tmp_path]) as source:
        assert content(source) == (tmp_path / "0.raw").read_bytes()
    with (
        pytest.raises(RefusedError, match="more than 64 files"),
        open_image(tmp_path / "65.qcow2", backing_folders=[tmp_path]),
    ):
        pass
