"""Images of all formats are read as qemu-img reads them, from what qemu-img and qemu-io write."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapcore import (
    ImageError,
    NotFoundError,
    RefusedError,
    SourceChangedError,
    UnsupportedFormatError,
    UsageError,
    extents,
)
from snapcore.pool import Pool
from snapcore.source import mapped, open_image
from tests.support.images import QEMU, as_qemu_reads, content, make_raw, qemu_img, qemu_io
from tests.support.tools import needs

MIB = 1 << 20
KIB = 1 << 10

MATRIX = [
    *(("qcow2", f"compat={compat},cluster_size={size}") for compat in ("v2", "v3") for size in ("512", "64k", "2M")),
    *(("qcow2", f"cluster_size={size},extended_l2=on") for size in ("16k", "64k", "2M")),
    *(("qcow2", f"preallocation={mode}") for mode in ("metadata", "falloc", "full")),
    ("qcow2", "refcount_bits=1"),
    ("qcow2", "lazy_refcounts=on"),
    *(("vhd", f"subformat={kind},force_size={forced}") for kind in ("fixed", "dynamic") for forced in ("off", "on")),
    *(("vhdx", f"block_size={size}") for size in ("1M", "32M", "256M")),
    ("vhdx", "subformat=fixed"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
    ("vmdk", "subformat=streamOptimized"),
]
PACKED = [
    *(f"compression_type={kind},cluster_size={size}" for kind in ("zlib", "zstd") for size in ("512", "64k", "2M")),
    *(f"compression_type={kind},extended_l2=on" for kind in ("zlib", "zstd")),
    "compat=v2",
]


@pytest.fixture(autouse=True)
def tools() -> None:
    needs("qemu-img", "qemu-io")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk that no unit of any format divides."""
    path = tmp_path_factory.mktemp("raw") / "disk.raw"
    make_raw(path, 5 * MIB + 3 * 512, 40)
    return path


def read(path: Path, kind: str | None = None) -> bytes:
    with open_image(path, kind) as source:
        return content(source)


@pytest.mark.parametrize(("kind", "options"), MATRIX)
def test_an_image_that_qemu_img_makes_reads_as_qemu_img_reads_it(
    kind: str, options: str, raw: Path, tmp_path: Path
) -> None:
    image = tmp_path / f"disk.{kind}"
    qemu_img("convert", "-f", "raw", "-O", QEMU[kind], "-o", options, raw, image)
    found = read(image)
    assert found == as_qemu_reads(image, kind)
    assert found[: raw.stat().st_size] == raw.read_bytes()


@pytest.mark.parametrize("options", PACKED)
def test_packed_clusters_read_as_qemu_img_reads_them(options: str, raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, image)
    assert read(image) == raw.read_bytes()
    # Some of them are written over, so packed ones and plain ones lie side by side.
    qemu_io(image, "qcow2", "write -P 7 1000k 100k", "write -z 2M 65k", "discard 3M 128k", "write -P 9 5M 1k")
    assert read(image) == as_qemu_reads(image, "qcow2")


@pytest.mark.parametrize(
    ("kind", "options"), [("qcow2", "cluster_size=4k"), ("qcow2", "extended_l2=on"), ("vhd", ""), ("vhdx", "")]
)
def test_an_image_that_was_written_to_here_and_there_reads_as_qemu_img_reads_it(
    kind: str, options: str, tmp_path: Path
) -> None:
    dice = random.Random(options + kind)
    image = tmp_path / f"disk.{kind}"
    qemu_img("create", "-f", QEMU[kind], *(("-o", options) if options else ()), image, "20M")
    for _ in range(3):
        places = [dice.randrange(40_000) * 512 for _ in range(30)]
        lengths = [min(dice.choice((1, 9, 128, 300)) * 512, 20 * MIB - place) for place in places]
        verbs = [dice.choice(("write -P 1", "write -P 200", "write -z", "write -z -u", "discard")) for _ in places]
        if kind != "qcow2":
            # Their drivers write no zeros.
            verbs = [verb if "-P" in verb else "write -P 0" for verb in verbs]
        qemu_io(image, kind, *(f"{a} {b} {c}" for a, b, c in zip(verbs, places, lengths, strict=True)))
        assert read(image) == as_qemu_reads(image, kind)


@pytest.mark.parametrize("bottom", ["raw", "qcow2"])
def test_backing_files_show_where_an_image_has_nothing(bottom: str, raw: Path, tmp_path: Path) -> None:
    base, middle, top = (tmp_path / name for name in (f"base.{bottom}", "middle.qcow2", "top.qcow2"))
    qemu_img("convert", "-f", "raw", "-O", bottom, raw, base)
    # The one in the middle is shorter than what is below it, the one on top longer.
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", bottom, "-o", "extended_l2=on", middle, "4M")
    qemu_io(middle, "qcow2", "write -P 5 100k 5k", "write -z 1M 70k", "write -P 6 4090k 6k")
    qemu_img("create", "-f", "qcow2", "-b", middle, "-F", "qcow2", "-o", "cluster_size=4k", top, "7M")
    qemu_io(top, "qcow2", "write -P 8 90k 20k", "write -z 2M 1M", "write -P 9 6M 1k")
    with open_image(top, backing_folders=[tmp_path]) as source:
        assert content(source, 1000 * KIB) == as_qemu_reads(top, "qcow2")
        base.touch()
        with pytest.raises(SourceChangedError, match="base"):
            source.check_unchanged()


def test_backing_files_are_opened_only_where_they_are_allowed(raw: Path, tmp_path: Path) -> None:
    secret = tmp_path / "others" / "secret.raw"
    secret.parent.mkdir()
    shutil.copy(raw, secret)
    image = tmp_path / "mine" / "disk.qcow2"
    image.parent.mkdir()
    (image.parent / "link.raw").symlink_to(secret)
    (tmp_path / "mine-too").mkdir()
    for name in (secret, "../others/secret.raw", "link.raw"):
        qemu_img("create", "-f", "qcow2", "-b", name, "-F", "raw", image)
        for folders in ([], [image.parent], [tmp_path / "mi"]):
            with (
                pytest.raises(RefusedError, match=r"secret\.raw.*--backing-in"),
                open_image(image, backing_folders=folders),
            ):
                pass
        with open_image(image, backing_folders=[image.parent, secret.parent]) as source:
            assert content(source) == raw.read_bytes()
        image.unlink()


@pytest.mark.parametrize(
    ("name", "kind", "error"),
    [
        ('json:{"driver":"file","filename":"base.raw"}', "raw", "only plain paths"),
        ("nbd://localhost/x", "raw", "only plain paths"),
        ("file:base.raw", "raw", "only plain paths"),
        ("base.raw", "", "does not say which format"),
        ("base.raw", "luks", "'luks'"),
        ("base.raw", "qcow2", "no QFI header"),
        ("gone.raw", "raw", "there is no image"),
        ("folder", "raw", "is no file"),
        ("disk.qcow2", "qcow2", "comes back to itself"),
    ],
)
def test_a_backing_file_that_is_not_plain_is_refused(
    name: str, kind: str, error: str, raw: Path, tmp_path: Path
) -> None:
    shutil.copy(raw, tmp_path / "base.raw")
    (tmp_path / "folder").mkdir()
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", image, "6M")
    qemu_img("rebase", "-u", "-b", name, "-F", kind or "raw", image)
    if not kind:
        # The extension that says it becomes one that nobody knows.
        image.write_bytes(image.read_bytes().replace(b"\xe2\x79\x2a\xca", b"\x01\x02\x03\x04", 1))
    with pytest.raises(Exception, match=error) as caught, open_image(image, backing_folders=[tmp_path]):
        pass
    assert isinstance(caught.value, (RefusedError, UnsupportedFormatError, NotFoundError, ImageError))


def test_what_is_not_read_is_named(raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'}", image, "6M")
    with pytest.raises(UnsupportedFormatError, match="in another file"), open_image(image):
        pass
    qemu_img("create", "-f", "qcow2", image, "6M")
    for bit, error in ((1, "marked corrupt"), (10, "which are unknown")):
        data = bytearray(image.read_bytes())
        data[79 - bit // 8] |= 1 << bit % 8
        (tmp_path / "changed.qcow2").write_bytes(data)
        with pytest.raises(UnsupportedFormatError, match=error), open_image(tmp_path / "changed.qcow2"):
            pass
    for method in (1, 2):
        data = bytearray(image.read_bytes())
        data[35] = method
        (tmp_path / "changed.qcow2").write_bytes(data)
        with pytest.raises(UnsupportedFormatError, match="is encrypted"), open_image(tmp_path / "changed.qcow2"):
            pass
    qemu_img("create", "-f", "vmdk", "-o", "subformat=monolithicFlat", tmp_path / "flat.vmdk", "1M")
    with pytest.raises(UnsupportedFormatError, match="only VMDK of one file"), open_image(tmp_path / "flat.vmdk"):
        pass
    sparse, child = tmp_path / "a.vmdk", tmp_path / "b.vmdk"
    qemu_img("create", "-f", "vmdk", sparse, "1M")
    qemu_img("create", "-f", "vmdk", "-b", sparse, "-F", "vmdk", child)
    with pytest.raises(UnsupportedFormatError, match="a difference"), open_image(child):
        pass


def test_a_dirty_image_and_one_with_internal_snapshots_read_as_they_are_now(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "lazy_refcounts=on", image, "6M")
    qemu_io(image, "qcow2", "write -P 3 0 3M")
    qemu_img("snapshot", "-c", "old", image)
    qemu_io(image, "qcow2", "write -P 4 1M 1M")
    data = bytearray(image.read_bytes())
    data[79] |= 1
    image.write_bytes(data)
    assert read(image) == bytes([3]) * MIB + bytes([4]) * MIB + bytes([3]) * MIB + bytes(3 * MIB)


def test_name_and_first_bytes_must_agree(raw: Path, tmp_path: Path) -> None:
    images = {kind: tmp_path / f"disk.{kind}" for kind in ("qcow2", "vhd", "vhdx", "vmdk")}
    for kind, image in images.items():
        qemu_img("convert", "-f", "raw", "-O", QEMU[kind], raw, image)
        other = tmp_path / f"{kind}.img"
        shutil.copy(image, other)
        with pytest.raises(RefusedError, match=f"--format {kind}, or --format raw"), open_image(other):
            pass
        assert read(other, kind) == read(image)
        assert read(other, "raw") == image.read_bytes()
        wrong = tmp_path / f"wrong.{kind}"
        shutil.copy(raw, wrong)
        with pytest.raises((RefusedError, ImageError)), open_image(wrong):
            pass
        assert read(wrong, "raw") == raw.read_bytes()
    with pytest.raises(UsageError, match="qcow9"), open_image(raw, "qcow9"):
        pass
    with pytest.raises(UsageError, match="must not change"), open_image(images["vhdx"], allow_changing=True):
        pass
    assert read(raw) == raw.read_bytes()


def test_a_pool_imports_by_name(raw: Path, tmp_path: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", raw, tmp_path / "disk.qcow2")
    with Pool.create(tmp_path / "pool") as pool:
        disk = pool.import_image("web", tmp_path / "disk.qcow2")
        assert disk.pread(disk.size_bytes, 0) == raw.read_bytes()
        shutil.copy(tmp_path / "disk.qcow2", tmp_path / "disk.img")
        with pytest.raises(RefusedError, match="--format"):
            pool.import_image("web2", tmp_path / "disk.img")


def test_a_large_sparse_image_costs_what_is_in_it(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", image, "16T")
    qemu_io(image, "qcow2", "write -P 1 15T 64k", "write -P 2 7T 4k")
    with open_image(image) as source:
        assert source.data_extents().tolist() == [[7 << 40, 64 * KIB], [15 << 40, 64 * KIB]]
        data = bytearray(4096)
        source.read_into(memoryview(data), 7 << 40)
        assert data == bytes([2]) * 4096


def test_pages_of_tables_are_dropped_under_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_PAGES_BYTES", 1000)
    image = tmp_path / "disk.qcow2"
    make_raw(tmp_path / "disk.raw", 3 * MIB, 30)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=512", tmp_path / "disk.raw", image)
    with open_image(image) as source:
        assert content(source, 100_000) == (tmp_path / "disk.raw").read_bytes()
        assert isinstance(source, mapped.MappedImage) and len(source._pages) == 1


@settings(max_examples=30)
@given(st.lists(st.booleans(), max_size=200), st.integers(1, 12))
def test_too_many_extents_are_joined_and_none_is_lost(worth: list[bool], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped, "_ROWS_LIMIT", limit)
        rows = mapped._Rows(512)
        for start in range(0, len(worth), 16):
            rows.add(start, np.array(worth[start : start + 16], dtype=np.bool))
        found = rows.extents()
    wanted = extents.from_pairs([(number * 512, 512) for number, yes in enumerate(worth) if yes])
    assert len(found) <= max(limit, 1)
    assert len(extents.difference(wanted, found, len(worth) * 512)) == 0
    assert not len(found) or (found[0, 0] == wanted[0, 0] and found[-1].sum() == wanted[-1].sum())
