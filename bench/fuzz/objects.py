"""Fuzzes what reads a repository: changes objects, with all checksums put right again or not, and works on the result.

    python bench/fuzz/objects.py --seconds 600 [--seed N] [--only ITERATION]
    python bench/fuzz/objects.py --atheris [libFuzzer options]     with atheris installed: guided by coverage

Under AddressSanitizer: build the kernels with SNAPCORE_SANITIZE=address,undefined and run with
LD_PRELOAD="$(gcc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0.

An iteration is a finding when anything but snapcore.Error comes out, when a snapshot whose root and size are the
original ones reads other bytes than the original, or when it takes more than 20 seconds of processor time. Each is
named by seed and iteration, from which `--only` makes it again. Exit status 1 when there were findings.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lz4.block
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

if "--atheris" in sys.argv:
    import atheris

    with atheris.instrument_imports(include=["snapcore"]):
        import snapcore.repository  # noqa: F401 - what is imported here counts its branches from now on

import frame

from snapcore import Error, Repository
from snapcore.repository import envelope, table
from snapcore.repository.record import RecordKind
from tests.support import forge
from tests.support.forge import Objects
from tests.support.small import Bytes, Careless, Small, changed_pages, make_small

_NUMBERS = (0, 1, 2, 31, 63, 64, 127, 128, 129, 255, 4095, 4096, 4097, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_WIDE = (*_NUMBERS, 1 << 32, 1 << 40, 1 << 60, (1 << 60) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_MEMBERS: tuple[Any, ...] = (
    *_WIDE, -1, -(1 << 63), 1 << 64, 1.5, None, True, "", "x", "0" * 32, "f" * 64, "zz" * 16, "é", "\x00", "a" * 70000,
    "00 11", [], {}, [1], {"a": "b"}, {"a": 1},
)  # fmt: skip

Mutation = Callable[[Objects, random.Random, Small], None]


def pick(objects: Objects, dice: random.Random, folder: str = "") -> str | None:
    """A random object of a folder."""
    names = forge.names(objects, folder)
    return dice.choice(names) if names else None


def flip(objects: Objects, dice: random.Random, small: Small) -> None:
    """Some bits of an object."""
    name = pick(objects, dice)
    if name is None or not objects[name]:
        return
    data = bytearray(objects[name])
    for _ in range(dice.choice((1, 1, 2, 8))):
        data[dice.randrange(len(data))] ^= dice.choice((1, 2, 4, 8, 16, 32, 64, 128, 255))
    objects[name] = bytes(data)


def cut(objects: Objects, dice: random.Random, small: Small) -> None:
    """Shorter, empty, longer or gone."""
    name = pick(objects, dice)
    if name is None:
        return
    data = objects[name]
    how = dice.randrange(4)
    if how == 0:
        objects[name] = data[: dice.randrange(len(data) + 1)]
    elif how == 1:
        objects[name] = data + dice.randbytes(dice.choice((1, 32, 100)))
    elif how == 2:
        objects[name] = b""
    else:
        del objects[name]


def splice(objects: Objects, dice: random.Random, small: Small) -> None:
    """A part of one object inside another."""
    a, b = pick(objects, dice), pick(objects, dice)
    if a is None or b is None or not objects[a] or not objects[b]:
        return
    start = dice.randrange(len(objects[b]))
    part = objects[b][start : start + dice.choice((8, 32, 64, 500))]
    at = dice.randrange(len(objects[a]))
    objects[a] = objects[a][:at] + part + objects[a][at + (len(part) if dice.random() < 0.7 else 0) :]


def exchange(objects: Objects, dice: random.Random, small: Small) -> None:
    """Two objects under each other's name, a copy under a new name, or an older index."""
    a, b = pick(objects, dice), pick(objects, dice)
    if a is None or b is None:
        return
    how = dice.randrange(4)
    if how == 0:
        objects[a], objects[b] = objects[b], objects[a]
    elif how == 1:
        folder = dice.choice(("packs/", "index/", "sessions/", "damage/"))
        new = dice.randbytes(16)
        objects[folder + new.hex()] = forge.with_header(objects[a], id=new) if len(objects[a]) >= 96 else objects[a]
    elif how == 2:
        objects |= small.older_index
    else:
        objects[dice.choice(("packs/", "index/", "sessions/", "damage/", "snapshots/", "")) + dice.choice(
            ("x", "abcd", "0" * 32, "0123/45", "0" * 33)
        )] = objects[a]  # fmt: skip


def header(objects: Objects, dice: random.Random, small: Small) -> None:
    """A field of an envelope, the checksum right."""
    name = pick(objects, dice)
    if name is None or len(objects[name]) < 96:
        return
    field = dice.choice(("kind", "version", "incompatible", "compatible", "domain", "id", "body_bytes", "magic"))
    if field in ("domain", "id"):
        value: Any = dice.choice((bytes(16), dice.randbytes(16)))
    elif field == "magic":
        value = dice.choice((b"SNAPCORE", b"SNAPFOOT"))
    elif field == "body_bytes":
        value = dice.choice(_WIDE)
    elif field in ("kind", "version"):
        value = dice.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535))
    else:
        value = dice.choice(_NUMBERS)
    objects[name] = forge.with_header(objects[name], **{field: value})


def member(objects: Objects, dice: random.Random, small: Small) -> None:
    """A member of a JSON body, the checksum right."""
    name = pick(objects, dice, dice.choice(("snapshots/", "snapshots/", "config", "damage/", "sessions/")))
    if name is None or len(objects[name]) < 96:
        return
    try:
        value = json.loads(forge.body_of(objects[name]))
    except ValueError:
        return
    how = dice.random()
    if how < 0.1:
        body = dice.choice(
            (
                b"",
                b"{",
                b"[" * 5000,
                b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}",
                b"null",
                b"[]",
                b"\xff",
                b'{"id":"\\ud800"}',
            )
        )
        objects[name] = forge.with_body(objects[name], body)
        return
    if isinstance(value, dict) and value:
        for _ in range(dice.choice((1, 1, 2))):
            value[dice.choice(list(value))] = dice.choice(_MEMBERS)
    objects[name] = forge.with_body(objects[name], json.dumps(value).encode())


def work(objects: Objects, dice: random.Random, small: Small) -> None:
    """A session or a list of damage that nobody wrote."""
    new = dice.randbytes(16)
    if dice.random() < 0.5:
        session = {
            "id": dice.choice((new.hex(), "x", "../packs")), "work": dice.choice(("create", "collect", "x")),
            "manifest": dice.choice((None, "x", "packs/" + "0" * 32, *forge.names(objects, "snapshots/"))),
            "host": dice.choice((os.uname().nodename, "x")), "kernel": dice.choice(("", "x")),
            "process": dice.choice((0, 1, 1 << 40, -1)), "started": dice.choice((0, -1)), "since": "",
        }  # fmt: skip
        objects["sessions/" + new.hex()] = envelope.sealed(envelope.Kind.SESSION, new, json.dumps(session).encode())
        return
    rows = []
    for name in forge.names(objects, "index/")[: dice.randrange(4)]:
        try:
            contents = table.parse(forge.body_of(objects[name]), name)
        except Error:
            continue
        for entry, object_id in zip(contents.entries, contents.ids(), strict=True):
            if dice.random() < 0.3:
                rows.append(
                    {
                        "pack": contents.packs[entry["pack"]].hex(),
                        "offset": int(entry["offset"]),
                        "id": object_id.tobytes().hex(),
                    }
                )
    if dice.random() < 0.5:
        rows.append(
            {
                "pack": dice.choice(("", "x", "00" * 16)),
                "offset": dice.choice(_WIDE),
                "id": dice.choice(("", "zz", "00" * 32)),
            }
        )
    objects["damage/" + new.hex()] = envelope.sealed(envelope.Kind.DAMAGE, new, json.dumps({"records": rows}).encode())


def index(objects: Objects, dice: random.Random, small: Small) -> None:
    """Fields of the table in an index object, the checksum right."""
    name = pick(objects, dice, "index/")
    if name is None or len(objects[name]) < 120:
        return
    body = bytearray(forge.body_of(objects[name]))
    if dice.random() < 0.2:
        at, width = dice.choice(((0, 8), (8, 4), (12, 4), (16, 4), (20, 4)))
        body[at : at + width] = (dice.choice(_WIDE) % (1 << 8 * width)).to_bytes(width, "little")
        objects[name] = forge.with_body(objects[name], bytes(body))
        return
    try:
        contents = table.parse(bytes(body), name)
    except Error:
        return
    objects[name] = forge.with_body(objects[name], wrong_table(contents, dice))


def wrong_table(contents: table.Table, dice: random.Random) -> bytes:
    """A table with fields that do not tell the truth."""
    entries = contents.entries.copy()
    packs = list(contents.packs)
    bases = [base.tobytes() for base in contents.bases]
    for _ in range(dice.choice((1, 1, 3, 20))):
        if not len(entries):
            break
        row = dice.randrange(len(entries))
        field = dice.choice(("key", "rest", "pack", "offset", "stored", "plain", "kind", "form", "codec", "base"))
        other = entries[dice.randrange(len(entries))]
        if dice.random() < 0.5:
            entries[field][row] = other[field]
        elif field == "key":
            entries["key"][row] = dice.choice(_WIDE)
        elif field == "rest":
            entries["rest"][row] = dice.randbytes(24)
        elif field in ("kind", "form", "codec"):
            entries[field][row] = dice.choice((0, 1, 2, 3, 255))
        else:
            entries[field][row] = dice.choice(_NUMBERS)
    if dice.random() < 0.7:
        entries = entries[np.argsort(entries["key"], kind="stable")]
    if bases and dice.random() < 0.2:
        bases[dice.randrange(len(bases))] = dice.choice((dice.randbytes(32), bytes(32)))
    if packs and dice.random() < 0.2:
        packs[dice.randrange(len(packs))] = dice.randbytes(16)
    return forge.table_bytes(entries, packs, bases)


def records(objects: Objects, dice: random.Random, small: Small) -> None:
    """Records of a pack, their checksums right; the index follows or not."""
    name = pick(objects, dice, "packs/")
    if name is None:
        return
    try:
        found = forge.records_of(objects[name])
    except Error:
        return
    if not found:
        return
    for _ in range(dice.choice((1, 1, 2, 5))):
        wrong_record(dice.choice(found), found, dice)
    if dice.random() < 0.3:
        found += [dice.choice(found)] * dice.choice((1, 3))
    try:
        pack_id = bytes.fromhex(name.removeprefix("packs/"))
        data, entries = forge.packed(found, pack_id)
    except (ValueError, OverflowError):
        return
    base = next((item.payload[:32] for item in found if item.form), bytes(32)).ljust(32, b"\0")
    directory = forge.table_bytes(entries, [pack_id], [base])
    if dice.random() < 0.3 and len(entries):
        contents = table.Table((pack_id,), entries, np.frombuffer(base, dtype="V32"))
        directory = wrong_table(contents, dice)
    objects[name] = forge.finished(data, directory)
    if dice.random() < 0.2:
        objects[name] = objects[name][:-32] + forge.footer(dice.choice(_WIDE), dice.choice(_WIDE))
    if dice.random() < 0.6:
        new = dice.randbytes(16)
        objects["index/" + new.hex()] = forge.indexed(entries, [pack_id], [base], new)
    if dice.random() < 0.3:
        for old in forge.names(objects, "index/")[: dice.randrange(1, 8)]:
            del objects[old]


def wrong_record(item: forge.Rec, found: list[forge.Rec], dice: random.Random) -> None:
    """Make something of a record wrong."""
    how = dice.randrange(9)
    if how == 0:
        item.kind = dice.choice((0, 1, 2, 3, 255))
    elif how == 1:
        item.codec = dice.choice((0, 1, 2, 3, 255))
    elif how == 2:
        item.form = dice.choice((0, 1, 2))
    elif how == 3:
        item.plain_bytes = dice.choice(_NUMBERS)
    elif how == 4:
        item.payload_bytes = dice.choice(_NUMBERS)
    elif how == 5:
        data = bytearray(item.payload or b"\0")
        for _ in range(dice.choice((1, 4, 30))):
            data[dice.randrange(len(data))] = dice.randrange(256)
        item.payload = bytes(data)
    elif how == 6:
        # A bomb: decodes to far more than it says.
        plain = bytes(dice.choice((1 << 16, 1 << 24)))
        item.codec, item.payload = 1, lz4.block.compress(plain, store_size=False)
        item.plain_bytes = dice.choice((4096, len(plain), (1 << 32) - 1))
    elif how == 7:
        # A patch of itself, of a patch, or of something that is not there.
        base = dice.choice((item.id, dice.choice(found).id, dice.randbytes(32)))
        unit, units = dice.choice(((4096, 1), (4096, 2), (4096, 16), (32, 128), (0, 0), ((1 << 32) - 1, (1 << 32) - 1)))
        patch = forge.patch(RecordKind.CHUNK, item.id, base, unit, units, bytes(dice.choice((1, 2, 16))), b"")
        item.codec, item.form, item.payload, item.plain_bytes = 0, dice.choice((0, 1)), patch.payload, patch.plain_bytes
    else:
        item.id = dice.choice((dice.choice(found).id, dice.randbytes(32), bytes(32)))


def wild_tree(objects: Objects, dice: random.Random, small: Small) -> None:
    """A snapshot whose tree nobody would write: wide, deep, of nodes on wrong levels, or larger than its disk."""
    name = pick(objects, dice, "snapshots/")
    if name is None or len(objects[name]) < 96:
        return
    try:
        found = [item for other in forge.names(objects, "packs/") for item in forge.records_of(objects[other])]
        value = json.loads(forge.body_of(objects[name]))
    except (Error, ValueError):
        return
    ids = [item.id for item in found] or [bytes(32)]
    made: list[forge.Rec] = []
    below = ids
    for _ in range(dice.choice((1, 2, 3))):
        filled = dice.choice((1, 3, 128))
        slots = [dice.choice(below) for _ in range(filled)] + [bytes(32)] * (128 - filled)
        if dice.random() < 0.5:
            dice.shuffle(slots)
        made.append(forge.full(RecordKind.NODE, b"".join(slots)))
        below = [made[-1].id, *([bytes(32)] if dice.random() < 0.3 else [])]
    pack_id, new = dice.randbytes(16), dice.randbytes(16)
    data, entries = forge.packed(made, pack_id)
    objects["packs/" + pack_id.hex()] = forge.finished(data, forge.table_bytes(entries, [pack_id]))
    objects["index/" + new.hex()] = forge.indexed(entries, [pack_id], (), new)
    if not isinstance(value, dict):
        return
    chunk = value.get("chunk_bytes")
    chunk = chunk if isinstance(chunk, int) and chunk > 0 else 4096
    chunks = dice.choice((1, 2, 127, 128, 129, 300, 128 * 128, 128 * 128 + 1))
    levels = 1 if chunks <= 128 else 2 if chunks <= 128 * 128 else 3
    value |= {"root": made[-1].id.hex(), "levels": levels, "size_bytes": chunks * chunk}
    objects[name] = forge.with_body(objects[name], json.dumps(value).encode())


MUTATIONS: tuple[Mutation, ...] = (
    flip, flip, cut, splice, exchange, header, member, member, work, index, index, records, records, records, wild_tree,
)  # fmt: skip


class Trial:
    """One iteration: the mutated objects, and all the work on them."""

    def __init__(self, small: Small, objects: Objects, dice: random.Random, folder: Path) -> None:
        self._small = small
        self._original = objects
        self._dice = dice
        self._folder = folder
        self.errors: Counter[str] = Counter()
        # What a writer finds under a name that was signed anew is what somebody else made of it.
        self._forged = any(
            objects.get(name) != data for name, data in small.objects.items() if name.startswith("snapshots/")
        ) or len(forge.names(objects, "snapshots/")) != len(forge.names(small.objects, "snapshots/"))

    def run(self) -> None:
        """All kinds of work, each on the objects as they are after the one before."""
        self._attempt(self._read, forge.store_of(self._original))
        self._attempt(self._maintain, forge.store_of(self._original))
        self._attempt(self._write, forge.store_of(self._original))

    def _attempt(self, job: Callable[[Repository], None], store: Any) -> None:
        with self._expected("open"):
            job(Repository.open(store))

    def _expected(self, step: str) -> _Expected:
        return _Expected(self.errors, step)

    def _ids(self, repository: Repository) -> list[str]:
        ids = set(self._small.content)
        with self._expected("list"):
            ids |= {item.id for item in repository.snapshots()}
        return sorted(ids)

    def _right(self, repository: Repository, snapshot_id: str) -> bytes | None:
        """What the snapshot must hold, where that can be told: its root and size are the original ones."""
        known = self._small.snapshots.get(snapshot_id)
        found = repository.find(snapshot_id)
        same = known is not None and (known.root, known.size_bytes, known.chunk_bytes, known.levels) == (
            found.root, found.size_bytes, found.chunk_bytes, found.levels,
        )  # fmt: skip
        return self._small.content[snapshot_id] if same else None

    def _read(self, repository: Repository) -> None:
        ids = self._ids(repository)
        for snapshot_id in ids:
            with self._expected("read"):
                right = self._right(repository, snapshot_id)
                reader = repository.open_snapshot(snapshot_id)
                for _ in range(6):
                    offset = self._dice.randrange(max(1, reader.size_bytes))
                    data = bytearray(self._dice.choice((1, 512, 5000, 70000)))
                    with self._expected("pread"):
                        count = reader.pread_into(data, offset)
                        if right is not None and data[:count] != right[offset : offset + count]:
                            raise AssertionError(f"wrong bytes at {offset} of {snapshot_id}")
        with self._expected("restore"):
            self._restore(repository, self._dice.choice(ids))
        with self._expected("diff"):
            a, b = self._dice.choice(ids), self._dice.choice(ids)
            rows = repository.diff(a, b)
            whole = max(repository.find(a).size_bytes, repository.find(b).size_bytes)
            if len(rows) and (rows.min() < 0 or (rows.sum(axis=1) > whole).any()):
                raise AssertionError(f"a difference beyond the end: {rows.tolist()}")
        with self._expected("usage"):
            repository.usage()

    def _restore(self, repository: Repository, snapshot_id: str) -> None:
        if repository.find(snapshot_id).size_bytes > 16 << 20:
            return
        right = self._right(repository, snapshot_id)
        target = self._folder / "target"
        for old in self._folder.iterdir():
            old.unlink()
        in_place = self._dice.random() < 0.3
        if in_place:
            target.write_bytes(self._dice.choice(list(self._small.content.values())))
        done = repository.restore(
            snapshot_id, target, in_place=in_place, allow_damaged=self._dice.random() < 0.7, medium=Careless()
        )
        if right is None:
            return
        data = target.read_bytes()
        expected = bytearray(right)
        for start, length in done.missing.tolist():
            expected[start : start + length] = bytes(length)
        if data != expected:
            raise AssertionError(f"wrong bytes restored of {snapshot_id}")

    def _maintain(self, repository: Repository) -> None:
        jobs = [self._verify, self._collect, self._rebuild, self._sessions]
        self._dice.shuffle(jobs)
        for job in jobs:
            with self._expected(job.__name__):
                job(repository)
        self._read(repository)

    @staticmethod
    def _verify(repository: Repository) -> None:
        repository.verify()

    @staticmethod
    def _collect(repository: Repository) -> None:
        repository.collect()

    @staticmethod
    def _rebuild(repository: Repository) -> None:
        repository.rebuild_index()

    @staticmethod
    def _sessions(repository: Repository) -> None:
        for found in repository.sessions():
            repository.end_session(found.id)

    def _write(self, repository: Repository) -> None:
        if self._dice.random() < 0.5:
            with self._expected("verify"):
                repository.verify()
        disk = self._dice.choice(sorted(self._small.disks))
        data = changed_pages(self._small.newest(disk), self._dice, [self._dice.randrange(10)])
        if self._dice.random() < 0.3:
            data = data[: self._dice.randrange(len(data))]
        with self._expected("snapshot"):
            created = repository.snapshot(Bytes(data), disk=disk, paranoid=self._dice.random() < 0.3)
            again = bytearray(len(data))
            repository.open_snapshot(created.snapshot).pread_into(again, 0)
            if again != data and not self._forged:
                raise AssertionError("the new snapshot reads other bytes than its source had")


class _Expected:
    """Counts errors of snapcore and lets everything else through."""

    def __init__(self, errors: Counter[str], step: str) -> None:
        self._errors = errors
        self._step = step

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if kind is None:
            self._errors[f"{self._step}: ok"] += 1
            return False
        if isinstance(error, Error):
            self._errors[f"{self._step}: {kind.__name__}"] += 1
            return True
        return False


def make_repositories(seed: int, folder: Path) -> list[Small]:
    """What is mutated, the same for the same seed; the fingerprints of its disks are saved beside the cache."""
    dice = random.Random(seed)
    with (
        mock.patch("secrets.token_bytes", dice.randbytes),
        mock.patch("secrets.token_hex", lambda count: dice.randbytes(count).hex()),
    ):
        made = [
            make_small(4096, 140, "lz4", seed),
            make_small(8192, 20, "zstd", seed),
            make_small(8192, 12, "none", seed),
            make_small(65536, 5, "zstd", seed),
        ]
    shutil.copytree(folder / "cache", folder / "saved")
    return made


def iteration(smalls: list[Small], dice: random.Random, folder: Path) -> Counter[str]:
    """Mutate one and work on it."""
    shutil.rmtree(folder.parent / "cache", ignore_errors=True)
    shutil.copytree(folder.parent / "saved", folder.parent / "cache")
    small = dice.choice(smalls)
    objects = dict(small.objects)
    for _ in range(dice.choice((1, 1, 2, 3))):
        dice.choice(MUTATIONS)(objects, dice, small)
    trial = Trial(small, objects, dice, folder)
    trial.run()
    return trial.errors


def run_atheris(arguments: list[str], folder: Path) -> None:
    """Guided by coverage: the bytes of the input are the seed of an iteration's mutations."""
    smalls = make_repositories(1, folder.parent)

    def one_input(data: bytes) -> None:
        iteration(smalls, random.Random(data), folder)

    atheris.Setup([sys.argv[0], *arguments], one_input)
    atheris.Fuzz()


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; further arguments are libFuzzer's")
    options, rest = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp(prefix="snapcore-fuzz-"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    targets = folder / "targets"
    targets.mkdir()
    try:
        if options.atheris:
            run_atheris(rest, targets)
            return
        smalls = make_repositories(options.seed, folder)
        if frame.run(lambda dice: iteration(smalls, dice, targets), options):
            sys.exit(1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
