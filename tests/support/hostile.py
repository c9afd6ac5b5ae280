"""Pools that nobody made: structures with right checksums and values that no pool has.

Everything works on the files of a pool as bytes (`Pieces`) and a source of chance, which may be hypothesis'.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from snapcore import Error
from snapcore.persist import Medium
from snapcore.pool import Disk, Pool, Snapshot, superblock
from snapcore.pool.check import check
from snapcore.pool.superblock import COPY_OFFSETS, Superblock, checksum
from tests.support.recorder import FastMedium

SLOT_BYTES = 1040
SECTOR_BYTES = 512
_PAYLOAD_BYTES = 488
_PIECE_BYTES = 1016
_KIND_CATALOG = 32
_KINDS = (0, 1, 2, 3, 4, 16, 32)
_SLOT_MASK = (1 << 48) - 1
_MOST_SLOTS = 1 << 13
NAMES = ("superblock", "map", "log", "data")
NUMBERS = (
    0, 1, 2, 3, 4, 5, 7, 15, 16, 63, 64, 127, 128, 129, 255, 4095, 4096, 65535, 65536, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 32, (1 << 35) - 1, 1 << 35, (1 << 40) - 1, 1 << 40, 1 << 47, (1 << 47) + 1, (1 << 48) - 1,
    1 << 56, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
_MEMBERS: tuple[Any, ...] = (
    *NUMBERS, -1, -(1 << 31), -(1 << 63), 1.5, None, True, "", "x", "head", "snapshot", "ghost", "disk", "image", "\0",
    "é" * 300, "/dev/null", "/", "/nowhere/\0", [], {}, [[]], b"", b"\xff" * 20, [[1, 2, "x"]],
)  # fmt: skip

Pieces = dict[str, bytes]


def pieces_of(folder: Path) -> Pieces:
    """The files of a pool; the map up to its last slot."""
    pieces = {name: (folder / name).read_bytes() for name in NAMES}
    block = block_of(pieces)
    assert block is not None
    pieces["map"] = pieces["map"][: block.slots * SLOT_BYTES]
    return pieces


def build(pieces: Pieces, folder: Path) -> Path:
    """A pool's folder from its files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*NAMES, "lock"):
        (folder / name).write_bytes(pieces.get(name, b""))
    return folder


def small_pool(folder: Path) -> tuple[Pieces, Pieces]:
    """A pool with all kinds of versions: closed, and as a crash leaves it, with commits in the log."""
    dice = random.Random(1)
    image = folder / "image"
    image.write_bytes(dice.randbytes(3 * 4096))
    os.utime(image, ns=(1, 1))
    pool = Pool.create(folder / "pool", log_bytes=65536, medium=FastMedium(), background=False)
    first = pool.create_disk("first", 150 * 4096)
    first.pwrite(dice.randbytes(9000), 0)
    first.pwrite(dice.randbytes(9000), 128 * 4096 - 100)
    base = first.snapshot("base")
    first.pwrite(dice.randbytes(5000), 4096)
    second = pool.create_disk("second", source=base)
    second.pwrite(dice.randbytes(100), 5000)
    pool.snapshot_group([first, second], "pair")
    first.discard(4096, 8192)
    clone = first.clone("clone")
    clone.pwrite(dice.randbytes(4096), 8192)
    over = pool.create_disk("over", source=image)
    over.pwrite(b"over", 4096)
    over.discard(8192, 4096)
    pool.close()
    closed = pieces_of(folder / "pool")
    pool = Pool.open(folder / "pool", medium=FastMedium(), background=False)
    first, second = pool.open_disk("first"), pool.open_disk("second")
    first.pwrite(dice.randbytes(20000), 12288)
    second.pwrite(dice.randbytes(600), 0)
    late = second.snapshot("late")
    first.rollback("base")
    first.pwrite(dice.randbytes(4096), 0)
    pool.delete_snapshot(late)
    pool.delete_disk("clone")
    first.discard(0, 8192)
    first.resize(200 * 4096)
    pool.flush()
    pool._engine.abandon()
    return closed, pieces_of(folder / "pool")


def blocks_of(pieces: Pieces) -> list[Superblock | None]:
    """The copies of the superblock."""
    data = pieces["superblock"]
    found = []
    for offset in COPY_OFFSETS:
        try:
            found.append(superblock.decode(data[offset : offset + 512], "superblock"))
        except Exception:  # noqa: BLE001 - a forged one is none
            found.append(None)
    return found


def block_of(pieces: Pieces) -> Superblock | None:
    """The copy that counts; none when it has too many slots to be worked on here."""
    whole = [block for block in blocks_of(pieces) if block is not None and block.slots < _MOST_SLOTS]
    return max(whole, key=lambda block: (block.generation, not block.clean)) if whole else None


def with_block(pieces: Pieces, block: Superblock) -> None:
    """Both copies."""
    data = bytearray(pieces["superblock"].ljust(8192, b"\0"))
    for offset in COPY_OFFSETS:
        data[offset : offset + 512] = block.encode()
    pieces["superblock"] = bytes(data)


def sealed(body: bytes, seed: int, slot: int) -> bytes:
    """A slot: 1,032 bytes with the right checksum."""
    return checksum(body, (seed + slot) % (1 << 64)).to_bytes(8, "little") + body


def with_slot(pieces: Pieces, seed: int, slot: int, body: bytes) -> None:
    """Put a page into a slot."""
    data = bytearray(pieces["map"])
    if len(data) < (slot + 1) * SLOT_BYTES:
        data.extend(bytes((slot + 1) * SLOT_BYTES - len(data)))
    data[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES] = sealed(body, seed, slot)
    pieces["map"] = bytes(data)


def catalog_of(pieces: Pieces) -> dict[str, Any] | None:
    """The catalog as plain data."""
    block = block_of(pieces)
    if block is None:
        return None
    data, ref = b"", block.catalog_ref
    while ref and len(data) < block.catalog_bytes:
        start = (ref & _SLOT_MASK) * SLOT_BYTES
        page = pieces["map"][start + 16 : start + SLOT_BYTES]
        if len(page) < 1024:
            return None
        data += page[8:]
        ref = int.from_bytes(page[:8], "little")
    try:
        found = msgspec.msgpack.decode(data[: block.catalog_bytes])
    except (msgspec.DecodeError, RecursionError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def with_catalog(pieces: Pieces, data: bytes) -> None:
    """Another catalog, in slots at the end of the map; all checksums right."""
    block = block_of(pieces)
    assert block is not None
    count = max(1, (len(data) + _PIECE_BYTES - 1) // _PIECE_BYTES)
    head = block.generation + 1 | _KIND_CATALOG << 56
    high = (block.generation + 1 & 0xFFFF) << 48
    pieces["map"] = pieces["map"][: block.slots * SLOT_BYTES]
    for number in range(count):
        slot = block.slots + number
        following = slot + 1 | high if number < count - 1 else 0
        piece = data[number * _PIECE_BYTES : (number + 1) * _PIECE_BYTES].ljust(_PIECE_BYTES, b"\0")
        with_slot(pieces, block.seed, slot, head.to_bytes(8, "little") + following.to_bytes(8, "little") + piece)
    with_block(
        pieces,
        dataclasses.replace(
            block,
            catalog_ref=block.slots | high,
            catalog_bytes=len(data),
            catalog_xxh64=checksum(data, block.seed),
            slots=block.slots + count,
        ),
    )


def map_record(version: int, position: int, count: int, entry: int) -> bytes:
    """A MAP record of the log."""
    place = position % (1 << 40) | count % (1 << 24) << 40
    return b"".join(value.to_bytes(width, "little") for value, width in ((1, 4), (version, 4), (place, 8), (entry, 8)))


def event_record(value: Any) -> bytes:
    """An EVENT record of the log."""
    data = msgspec.msgpack.encode(value)
    return (2).to_bytes(4, "little") + len(data).to_bytes(4, "little") + data + bytes(-len(data) % 8)


def sector(seed: int, number: int, commit: int, payload: bytes, used: int, flags: int) -> bytes:
    """A sector of the log, the checksum right."""
    fields = ((number, 8), (commit % (1 << 32), 4), (used, 2), (flags, 2))
    body = b"".join(value.to_bytes(width, "little") for value, width in fields) + payload.ljust(_PAYLOAD_BYTES, b"\0")
    return checksum(body, seed).to_bytes(8, "little") + body


def with_log(pieces: Pieces, payloads: list[bytes]) -> None:
    """These commits and nothing else in the log, which begins where it begins; the pool was not closed."""
    block = block_of(pieces)
    assert block is not None
    data = bytearray(block.log_sectors * SECTOR_BYTES)
    number, commit = block.log_next, block.commit_number
    for payload in payloads:
        parts = [payload[at : at + _PAYLOAD_BYTES] for at in range(0, len(payload), _PAYLOAD_BYTES)] or [b""]
        for index, part in enumerate(parts):
            place = number % block.log_sectors * SECTOR_BYTES
            flags = int(index == len(parts) - 1)
            data[place : place + SECTOR_BYTES] = sector(block.seed, number, commit, part, len(part), flags)
            number += 1
        commit += 1
    pieces["log"] = bytes(data)
    with_block(pieces, dataclasses.replace(block, clean=False))


# Mutations

Mutation = Callable[[Pieces, random.Random], None]


def flip(pieces: Pieces, dice: random.Random) -> None:
    """Some bits of a file, the checksums wrong."""
    name = dice.choice(NAMES[:3])
    data = bytearray(pieces[name])
    if not data:
        return
    for _ in range(dice.choice((1, 1, 2, 8))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    pieces[name] = bytes(data)


def cut(pieces: Pieces, dice: random.Random) -> None:
    """Shorter or longer."""
    name = dice.choice(NAMES)
    data = pieces[name]
    pieces[name] = dice.choice((data[: dice.randrange(len(data) + 1)], b"", data + bytes(dice.choice((1, 1040, 5000)))))


def superblock_fields(pieces: Pieces, dice: random.Random) -> None:
    """Fields of a copy of the superblock, or of both."""
    block = block_of(pieces)
    if block is None:
        return
    fields = [field.name for field in dataclasses.fields(block) if field.name not in ("uuid", "clean")]
    changes: dict[str, Any] = {}
    for _ in range(dice.choice((1, 1, 1, 3))):
        name = dice.choice(fields)
        near = getattr(block, name) + dice.choice((-2, -1, 1, 2, 1 << 48))
        # A field of 32 bits among those of 64.
        most = (1 << 32) - 1 if name == "must_read" else (1 << 64) - 1
        changes[name] = min(most, max(0, dice.choice((near, dice.choice(NUMBERS)))))
    changed = dataclasses.replace(block, **changes, clean=dice.choice((True, False, block.clean)))
    if dice.choice((True, True, False)):
        with_block(pieces, changed)
    else:
        at = dice.choice(COPY_OFFSETS)
        pieces["superblock"] = pieces["superblock"][:at] + changed.encode() + pieces["superblock"][at + 512 :]


def catalog_fields(pieces: Pieces, dice: random.Random) -> None:
    """Fields of records in the catalog; records twice, gone, or of nothing."""
    catalog = catalog_of(pieces)
    if catalog is None:
        return
    block = block_of(pieces)
    assert block is not None
    for _ in range(dice.choice((1, 1, 2, 4))):
        name = dice.choice(("versions", "versions", "versions", "disks", "backings", "groups", "next_id", "slots"))
        value = catalog.get(name)
        if name == "slots" or not isinstance(value, list):
            if name == "slots" and isinstance(value, bytes) and value and dice.choice((True, False)):
                data = bytearray(value)
                data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
                catalog[name] = bytes(data)
            else:
                catalog[name] = dice.choice(_MEMBERS)
            continue
        if not value:
            continue
        record = dice.choice(value)
        how = dice.randrange(10)
        if how == 0:
            value.remove(record)
        elif how == 1:
            value.append(dict(record))
        elif isinstance(record, dict):
            field = dice.choice(sorted(record))
            others = [other.get(field) for other in value if isinstance(other, dict)]
            if field == "root" and dice.choice((True, False)):
                record[field] = any_reference(block, dice)
            elif field in ("parent", "head", "origin", "backing", "disk") and dice.choice((True, False)):
                ids = [other.get("id", 0) for other in (catalog.get("versions") or []) if isinstance(other, dict)]
                record[field] = dice.choice([0, *ids])
            else:
                record[field] = dice.choice((dice.choice(_MEMBERS), dice.choice(others)))
    try:
        with_catalog(pieces, msgspec.msgpack.encode(catalog))
    except (ValueError, OverflowError):
        return


def catalog_bytes(pieces: Pieces, dice: random.Random) -> None:
    """A catalog that is no catalog."""
    if block_of(pieces) is None:
        return
    deep = b"\x91" * dice.choice((10, 5000)) + b"\x00"
    with_catalog(pieces, dice.choice((b"\x80", b"\xc1", deep, dice.randbytes(100), b"\xdd\xff\xff\xff\xff", b"\x00")))


def any_reference(block: Superblock, dice: random.Random) -> int:
    """To a page or a block, that may be there or not."""
    slot = dice.choice((dice.randrange(block.slots), dice.randrange(block.slots), dice.choice(NUMBERS)))
    high = dice.choice((0, 1, block.generation, block.generation, max(0, block.generation - 1))) & 0xFFFF
    return dice.choice((slot, (slot | high << 48) % (1 << 64)))


def page_entries(pieces: Pieces, dice: random.Random) -> None:
    """Entries, kind or generation of a page, the checksum right."""
    block = block_of(pieces)
    if block is None or len(pieces["map"]) < 3 * SLOT_BYTES:
        return
    slots = len(pieces["map"]) // SLOT_BYTES
    for _ in range(dice.choice((1, 1, 3, 10))):
        slot = dice.randrange(2, slots)
        body = bytearray(pieces["map"][slot * SLOT_BYTES + 8 : (slot + 1) * SLOT_BYTES])
        how = dice.randrange(8)
        if how == 0:
            body[7] = dice.choice(_KINDS)
        elif how == 1:
            body[:7] = dice.choice((*NUMBERS, block.generation)).to_bytes(9, "little")[:7]
        elif how == 2:
            other = dice.randrange(2, slots)
            body[8:] = pieces["map"][other * SLOT_BYTES + 16 : (other + 1) * SLOT_BYTES]
        else:
            wanted = dice.choice((any_reference(block, dice), dice.choice(NUMBERS), dice.randrange(64)))
            filled = [at for at in range(8, len(body), 8) if any(body[at : at + 8])]
            places: list[int] = [8 + 8 * dice.randrange(128)]
            if filled and dice.random() < 0.5:
                places = [dice.choice(filled)]
            if how == 3:
                places = [*range(8, len(body), 8)]
            for at in places:
                body[at : at + 8] = (wanted % (1 << 64)).to_bytes(8, "little")
        with_slot(pieces, block.seed, slot, bytes(body))


def shared_pages(pieces: Pieces, dice: random.Random) -> None:
    """A tree in which each page holds the same one many times: small in the map, endless to walk."""
    block, catalog = block_of(pieces), catalog_of(pieces)
    if block is None or not catalog or not isinstance(catalog.get("versions"), list):
        return
    first = len(pieces["map"]) // SLOT_BYTES
    entry = dice.choice((0, 1, dice.randrange(2, 64)))
    for level in range(5):
        head = block.generation | level << 56
        with_slot(pieces, block.seed, first + level, head.to_bytes(8, "little") + entry.to_bytes(8, "little") * 128)
        entry = first + level | (block.generation & 0xFFFF) << 48
    with_block(pieces, dataclasses.replace(block, slots=first + 5))
    for record in catalog["versions"]:
        if isinstance(record, dict) and dice.choice((True, False)):
            record["root"] = entry
            record["size_bytes"] = dice.choice((record.get("size_bytes"), 1 << 40))
    slots = catalog.get("slots")
    if isinstance(slots, bytes):
        bits = int.from_bytes(slots, "little") | 31 << first
        catalog["slots"] = bits.to_bytes((bits.bit_length() + 63) // 64 * 8, "little")
    try:
        with_catalog(pieces, msgspec.msgpack.encode(catalog))
    except (ValueError, OverflowError, TypeError):
        return


def any_event(dice: random.Random, ids: list[int]) -> dict[str, Any]:
    """An event with numbers that are taken, free, or no numbers."""

    def number() -> Any:
        return dice.choice((dice.choice(ids), dice.choice(ids), max(ids) + dice.randrange(4), dice.choice(NUMBERS)))

    name = dice.choice(("x", "first", "é", ""))
    size = dice.choice((4096, 100 * 4096, *NUMBERS))
    value: dict[str, Any] = dice.choice((
        {"type": "disk", "disk": number(), "version": number(), "name": name, "size_bytes": size, "created_ns": 1,
         "parent": dice.choice((0, number())),
         "backing": dice.choice((None, {"id": number(), "path": dice.choice(("/dev/null", "/\0", "", "x" * 5000)),
                                        "size_bytes": size, "mtime_ns": dice.choice(NUMBERS)}))},
        {"type": "cut", "cuts": [[number(), number(), name] for _ in range(dice.randrange(4))], "created_ns": 1,
         "group": dice.choice((0, number())), "group_name": name},
        {"type": "clone", "source": number(), "ghost": number(), "disk": number(), "version": number(), "name": name,
         "created_ns": 1, "size_bytes": size},
        {"type": "rehead", "disk": number(), "version": number(), "parent": dice.choice((0, number())),
         "size_bytes": size, "backing": dice.choice((0, number()))},
        {"type": "resize", "disk": number(), "size_bytes": size},
        {"type": "rename", "disk": number(), "name": name},
        {"type": "delete", "versions": [number() for _ in range(dice.randrange(4))]},
        {"type": "delete-disk", "disk": number()},
        {"type": "sweep", "version": number()},
    ))  # fmt: skip
    if dice.randrange(10) == 0:
        value[dice.choice(sorted(value))] = dice.choice(_MEMBERS)
    return value


def log_records(pieces: Pieces, dice: random.Random) -> None:
    """Commits that nobody wrote, all checksums right."""
    block, catalog = block_of(pieces), catalog_of(pieces)
    if block is None or not catalog or block.log_sectors > 1 << 12:
        return
    versions = catalog.get("versions")
    ids = [1, 2]
    for record in versions if isinstance(versions, list) else []:
        if isinstance(record, dict):
            ids += [value for value in (record.get("id"), record.get("disk")) if isinstance(value, int)]
    payloads = []
    for _ in range(dice.randrange(1, 5)):
        payload = b""
        for _ in range(dice.choice((1, 1, 2, 5))):
            how = dice.randrange(12)
            if how == 0:
                payload += dice.randbytes(dice.choice((1, 8, 24)))
            elif how < 6:
                position = dice.choice((dice.randrange(160), dice.choice(NUMBERS)))
                count = dice.choice((0, 1, 2, 200, (1 << 24) - 1))
                entry = dice.choice((0, 1, 2, dice.randrange(2, 2000), dice.choice(NUMBERS)))
                payload += map_record(dice.choice((*ids, *NUMBERS)) % (1 << 32), position, count, entry)
            else:
                try:
                    payload += event_record(any_event(dice, ids))
                except (ValueError, OverflowError):
                    continue
        payloads.append(payload)
    if sum(len(payload) // _PAYLOAD_BYTES + 1 for payload in payloads) <= block.log_sectors:
        with_log(pieces, payloads)


def log_sectors(pieces: Pieces, dice: random.Random) -> None:
    """Headers of sectors, the checksums right."""
    block = block_of(pieces)
    if block is None or len(pieces["log"]) < SECTOR_BYTES:
        return
    for _ in range(dice.choice((1, 2, 5))):
        at = dice.randrange(len(pieces["log"]) // SECTOR_BYTES)
        old = pieces["log"][at * SECTOR_BYTES : (at + 1) * SECTOR_BYTES]
        number = int.from_bytes(old[8:16], "little")
        number = dice.choice((number, number + 1, block.log_next + at, dice.choice(NUMBERS))) % (1 << 64)
        commit = dice.choice((int.from_bytes(old[16:20], "little"), block.commit_number, dice.choice(NUMBERS)))
        used, flags = dice.choice((int.from_bytes(old[20:22], "little"), 0, 488, 489, 65535)), dice.choice((0, 1, 2))
        new = sector(block.seed, number, commit, old[24:], used, flags)
        pieces["log"] = pieces["log"][: at * SECTOR_BYTES] + new + pieces["log"][(at + 1) * SECTOR_BYTES :]


MUTATIONS: tuple[Mutation, ...] = (
    flip, cut, superblock_fields, superblock_fields, catalog_fields, catalog_fields, catalog_fields, catalog_bytes,
    page_entries, page_entries, page_entries, shared_pages, log_records, log_records, log_records, log_sectors,
)  # fmt: skip


# What is done to them

Contents = dict[str, bytes]
_READ_BYTES = 1 << 20


def contents_of(pool: Pool) -> Contents:
    """What all disks and snapshots hold, up to a MiB each."""
    found = {f"disk {disk.name}": disk.pread(_READ_BYTES, 0) for disk in pool.disks()}
    found.update({f"snapshot {version.id}": version.pread(_READ_BYTES, 0) for version in pool.snapshots()})
    return found


def read_everything(folder: Path, *, read_only: bool = True) -> Contents:
    """Open, read, let go."""
    pool = Pool.open(folder, medium=FastMedium(), background=False, read_only=read_only)
    try:
        return contents_of(pool)
    finally:
        pool._engine.abandon()


class Attack:
    """Does to a pool what users do; counts what comes of it. Only errors of snapcore are let through.

    Parameters
    ----------
    medium : Medium
        The operating system's calls the kernels' own way.
    """

    def __init__(self, folder: Path, dice: random.Random, medium: Medium) -> None:
        self.folder = folder
        self.outcomes: Counter[str] = Counter()
        self._dice = dice
        self._medium = medium

    def _try(self, what: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Error as error:
            self.outcomes[f"{what}: {type(error).__name__}"] += 1
        else:
            self.outcomes[f"{what}: ok"] += 1

    def run(self) -> None:
        """Read it, work on it, check it, repair it, and look again."""
        self._try("open to read", lambda: self._with(self._look, read_only=True))
        if self._dice.randrange(3) == 0:
            self._try("check", lambda: check(self.folder))
        if self._dice.randrange(3) == 0:
            self._try("repair", lambda: check(self.folder, repair=True))
        self._try("open", lambda: self._with(self._work))
        self._try("open again", lambda: self._with(self._look))

    def _with(self, work: Callable[[Pool], None], *, read_only: bool = False) -> None:
        pool = Pool.open(self.folder, medium=self._medium, background=False, read_only=read_only, cache_bytes=1 << 20)
        try:
            work(pool)
            self._try("close", pool.close)
        finally:
            if not pool._closed:
                pool._engine.abandon()

    def _look(self, pool: Pool) -> None:
        versions: list[Disk | Snapshot] = []
        self._try("list", lambda: versions.extend([*pool.disks(), *pool.snapshots()]))
        for version in versions:
            self._try("read", lambda version=version: version.pread(_READ_BYTES, 0))  # type: ignore[misc]
            last = min(version.size_bytes, _READ_BYTES)
            self._try("extents", lambda version=version, last=last: version.extents(0, last))  # type: ignore[misc]
            other = self._dice.choice(versions)
            self._try("diff", lambda one=version, two=other: pool.diff(one, two, 0, _READ_BYTES))  # type: ignore[misc]
        if self._dice.choice((True, False)):
            self._try("usage", pool.usage)

    def _work(self, pool: Pool) -> None:
        self._look(pool)
        for _ in range(self._dice.randrange(8)):
            self._try("change", lambda: self._change(pool))
        if self._dice.choice((True, False)):
            for snapshot in pool.snapshots():
                self._try("delete", lambda snapshot=snapshot: pool.delete_snapshot(snapshot))  # type: ignore[misc]
            for disk in pool.disks():
                self._try("delete disk", lambda disk=disk: pool.delete_disk(disk))  # type: ignore[misc]
        self._look(pool)

    def _change(self, pool: Pool) -> None:
        dice, disks, kept = self._dice, pool.disks(), pool.snapshots()
        what = dice.randrange(9)
        if what == 0 or not disks:
            pool.create_disk(f"new{dice.randrange(1000)}", 40000, source=dice.choice([None, *kept]))
            return
        disk = dice.choice(disks)
        if what < 3:
            disk.pwrite(
                dice.randbytes(dice.choice((1, 4096, 30000))), dice.randrange(max(1, min(disk.size_bytes, 1 << 20)))
            )
        elif what == 3:
            disk.discard(0, min(disk.size_bytes, dice.choice((5000, 1 << 20, disk.size_bytes))))
        elif what == 4:
            disk.snapshot()
        elif what == 5 and kept:
            disk.rollback(dice.choice(kept))
        elif what == 6 and kept:
            dice.choice(kept).delete()
        elif what == 7:
            disk.clone(f"clone{dice.randrange(1000)}")
        else:
            dice.choice((pool.checkpoint, pool.flush, disk.reset))()
