"""Changed images, and what may come of them: an error of ours, or the bytes that qemu-img reads.

Images are small, and their tables are known, so changes hit what is believed. An image is changed where it stands and
put right again.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snapcore import Error, extents
from snapcore.source import image, open_image, vhd, vhdx, vmdk, write_image
from snapcore.source.raw import RawSource
from tests.support.images import QEMU, make_raw, qemu_img

SIZE_BYTES = 200 << 10
# Of a disk whose size was changed no more is read.
READ_LIMIT_BYTES = 1 << 20
_SMALL_BYTES = 64 << 20
_VALUES = (0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF)


@dataclass(frozen=True)
class Victim:
    """A small image, and which bytes of it are believed."""

    path: Path
    kind: str
    options: str
    places: tuple[int, ...]


Change = tuple[int, bytes]

MADE = (
    ("qcow2", "cluster_size=512"),
    ("qcow2", "cluster_size=4096,compression_type=zstd"),
    ("qcow2", "cluster_size=16k,extended_l2=on"),
    ("qcow2", "cluster_size=64k,compat=v2"),
    ("vhd", "subformat=dynamic"),
    ("vhd", "subformat=fixed"),
    ("vhdx", "block_size=1M"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=streamOptimized"),
    # Written by us: with the header that counts at its end.
    ("vmdk", "footer"),
)


def make_victims(folder: Path) -> list[Victim]:
    """One image of each sort."""
    raw = folder / "disk.raw"
    make_raw(raw, SIZE_BYTES, 12)
    found = []
    for number, (kind, options) in enumerate(MADE):
        path = folder / f"{number}.{kind}"
        if options == "footer":
            with open_image(raw) as source:
                write_image(source, path, kind)
            found.append(Victim(path, kind, options, tuple(_believed(path, kind, options))))
            continue
        packed = ("-c",) if "zstd" in options or "v2" in options else ()
        qemu_img("convert", *packed, "-f", "raw", "-O", QEMU[kind], "-o", options, raw, path)
        found.append(Victim(path, kind, options, tuple(_believed(path, kind, options))))
    return found


def _believed(path: Path, kind: str, options: str) -> Iterator[int]:
    """Places of headers and tables."""
    data = path.read_bytes()
    end = len(data)
    if kind == "qcow2":
        yield from range(min(600, end))
        (directory,) = struct.unpack_from(">Q", data, 40)
        yield from range(directory, min(directory + 64, end))
        (table,) = struct.unpack_from(">Q", data, directory)
        table &= 0x00FF_FFFF_FFFF_FE00
        yield from range(table, min(table + 512, end))
        if "v2" in options or "zstd" in options:
            # Packed data is believed too.
            yield from range(end - 4096, end, 7)
    elif kind == "vhd":
        yield from range(0 if "dynamic" in options else end - 512, min(2048, end) if "dynamic" in options else end)
    elif kind == "vhdx":
        for start in (0, 64 << 10, 128 << 10, 192 << 10, 256 << 10):
            yield from range(start, start + 112)
        start = data.index(b"metadata")
        yield from range(start, start + 200)
        yield from range(start + (64 << 10), start + (64 << 10) + 64)
        yield from range(_block_table(data), _block_table(data) + 24)
    else:
        # The header, the beginning of the text, and of tables what a small disk has.
        yield from [*range(80), *range(512, 800)]
        header = end - vmdk.FOOTER_FROM_END if options == "footer" else 0
        yield from range(header, header + 80)
        directory = struct.unpack_from("<Q", data, header + 56)[0] * 512
        yield from range(directory, directory + 8)
        table = struct.unpack_from("<I", data, directory)[0] * 512
        yield from range(table, table + 16)
        grain = struct.unpack_from("<I", data, table)[0] * 512
        yield from range(grain, grain if "monolithic" in options else grain + 40)


def _block_table(data: bytes) -> int:
    at = data.index(vhdx._BLOCK_TABLE.bytes_le, 192 << 10)
    (offset,) = struct.unpack_from("<Q", data, at + 16)
    return int(offset)


def every_change(victim: Victim) -> Iterator[list[Change]]:
    """Each byte that is believed becomes each of some values."""
    data = victim.path.read_bytes()
    for place in victim.places:
        for value in {*_VALUES, data[place] ^ 1, data[place] ^ 0x10} - {data[place]}:
            yield [(place, bytes([value]))]


def random_changes(victim: Victim, dice: random.Random) -> list[Change]:
    """One to three numbers of any width."""
    found = []
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        place = dice.choice(victim.places)
        width = dice.choice((1, 1, 2, 4, 8))
        value = dice.choice((0, 1, 1 << width * 8 - 1, (1 << width * 8) - 1, dice.getrandbits(width * 8)))
        found.append((place, value.to_bytes(width, dice.choice(("big", "little")))))
    return found


def sealed(victim: Victim, data: bytes) -> list[Change]:
    """What puts checksums right again that stand over changed bytes."""
    found: list[Change] = []
    if victim.kind == "vhd":
        spots = [(len(data) - 512, 512, vhd.CHECKSUM_OFFSET)]
        if "dynamic" in victim.options:
            spots += [(0, 512, vhd.CHECKSUM_OFFSET), (512, 1024, vhd._HEADER_CHECKSUM_OFFSET)]
        for start, length, at in spots:
            total = vhd.checksum(data[start : start + length], at)
            found.append((start + at, struct.pack(">I", total)))
    if victim.kind == "vhdx":
        for start, length in [*((at, 4096) for at in vhdx._HEADERS), *((at, 65536) for at in vhdx._REGIONS)]:
            record = data[start : start + 4] + bytes(4) + data[start + 8 : start + length]
            found.append((start + 4, struct.pack("<I", vhdx._crc32c(record))))
    return found


@contextmanager
def changed(victim: Victim, changes: list[Change], *, seal: bool) -> Iterator[None]:
    """The image with changes, for the time of the block."""
    before = victim.path.read_bytes()
    with victim.path.open("r+b", buffering=0) as file:
        try:
            _write(file.fileno(), changes)
            if seal:
                _write(file.fileno(), sealed(victim, victim.path.read_bytes()))
            yield
        finally:
            file.truncate(len(before))
            for start in range(0, len(before), 1 << 20):
                part = before[start : start + (1 << 20)]
                if os.pread(file.fileno(), len(part), start) != part:
                    os.pwrite(file.fileno(), part, start)


def _write(descriptor: int, changes: list[Change]) -> None:
    for place, data in changes:
        os.pwrite(descriptor, data, place)


def outcome(victim: Victim) -> bytes | Error:
    """The disk, or its beginning; or the error. Anything else that comes out is a finding."""
    descriptor = os.open(victim.path, os.O_RDONLY)
    # Private: the clock that stamps files need not tick between two changes.
    file = RawSource(str(victim.path), descriptor, private=True)
    try:
        with ExitStack() as opened:
            source = image._Chain(opened, ()).layer(file, victim.kind)
            rows = extents.from_pairs(source.data_extents())
            assert not len(rows) or rows[-1].sum() <= source.size_bytes
            data = bytearray(min(source.size_bytes, READ_LIMIT_BYTES))
            source.read_into(memoryview(data), 0)
            last = memoryview(bytearray(min(source.size_bytes, 5000)))
            source.read_into(last, source.size_bytes - len(last))
            for start, length in extents.clipped(extents.gaps(rows, source.size_bytes), 0, len(data)).tolist():
                assert not np.frombuffer(data, np.uint8, length, start).any(), "data lies in no extent"
            return bytes(data)
    except Error as error:
        if str(victim.path) not in str(error):
            raise AssertionError(f"{error} does not name the file") from error
        return error
    finally:
        file.close()


def as_qemu_reads_it(victim: Victim) -> bytes | None:
    """The beginning of the disk; None where qemu-img refuses it, or where it is long."""
    out = victim.path.with_name("by-qemu")
    out.unlink(missing_ok=True)
    kind = QEMU[victim.kind]
    info = subprocess.run(
        ["qemu-img", "info", "--output=json", "-f", kind, str(victim.path)], capture_output=True, text=True, check=False
    )
    sizes = [line.split(":")[1].strip(" ,") for line in info.stdout.splitlines() if '"virtual-size"' in line]
    if info.returncode or not sizes or int(sizes[-1]) > _SMALL_BYTES:
        return None
    done = subprocess.run(
        ["qemu-img", "convert", "-U", "-f", kind, "-O", "raw", str(victim.path), str(out)],
        capture_output=True,
        timeout=60,
        check=False,
    )
    return None if done.returncode else out.read_bytes()[:READ_LIMIT_BYTES]
