"""Somebody else's bytes: right checksums over wrong content end in snapcore.Error, soon and in little memory."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import DamagedError, Error, Repository, UnsupportedFormatError
from snapcore.repository import codec, config, damage, envelope, index, manifest, pack, record, session, table, verify
from snapcore.repository.domain import PLAIN, ZERO_ID
from snapcore.repository.envelope import Kind
from snapcore.repository.record import Form, RecordKind
from snapcore.store import LocalStore, MemoryStore
from tests.support import forge
from tests.support.forge import Objects, objects_of, store_of
from tests.support.small import Bytes, Small, chunks_in, make_small, read_all

NUMBERS = st.sampled_from([0, 1, 63, 64, 127, 128, 4096, 1 << 31, (1 << 32) - 1]) | st.integers(0, (1 << 32) - 1)
WIDE = NUMBERS | st.sampled_from([1 << 60, 1 << 63, (1 << 64) - 1])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40) | WIDE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
DEEP = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
CHUNK = 8192
CHUNKS = b"".join(bytes([number]) * CHUNK for number in range(1, 4))


@cache
def made() -> Small:
    return make_small(CHUNK, 12)


def quiet(job: Callable[[], object]) -> bool:
    """Run a job that may raise snapcore.Error and nothing else. Returns whether it raised none."""
    try:
        job()
    except Error:
        return False
    return True


def peak_bytes(job: Callable[[], object]) -> int:
    """The most memory that Python held for a job that may raise snapcore.Error."""
    tracemalloc.start()
    try:
        quiet(job)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def use_all(objects: Objects) -> None:
    """Everything that works on a repository; nothing may come out but snapcore.Error, nor wrong bytes."""
    read_all(made(), objects)
    repository = Repository.open(store_of(objects))
    ids = list(made().content)
    quiet(lambda: repository.diff(ids[0], ids[-1]))
    quiet(repository.usage)
    quiet(repository.verify)
    quiet(repository.collect)
    quiet(repository.rebuild_index)
    quiet(lambda: [repository.end_session(found.id) for found in repository.sessions()])
    quiet(lambda: repository.snapshot(Bytes(made().newest("two")), disk="two"))


# Envelopes


@given(
    fields=st.dictionaries(st.sampled_from(["kind", "version"]), st.integers(0, 65535), max_size=1),
    wide=st.dictionaries(st.sampled_from(["incompatible", "compatible", "clear"]), NUMBERS, max_size=2),
    body_bytes=st.none() | WIDE,
    ids=st.dictionaries(st.sampled_from(["id", "domain"]), st.binary(min_size=16, max_size=16), max_size=1),
    body=st.binary(max_size=200),
)
def test_an_envelope_is_opened_or_refused(
    fields: dict[str, int], wide: dict[str, int], body_bytes: int | None, ids: dict[str, bytes], body: bytes
) -> None:
    whole = envelope.sealed(Kind.SESSION, bytes(16), body)
    length = {} if body_bytes is None else {"body_bytes": body_bytes}
    changed = forge.with_header(whole, **fields, **wide, **ids, **length)
    try:
        _, _, found = envelope.opened(changed, "it", bytes(16))
    except (DamagedError, UnsupportedFormatError):
        assert changed != whole
    else:
        assert found == body
        assert fields.get("version", 1) == 1 and not wide.get("incompatible")


@given(st.binary(max_size=300))
def test_noise_is_no_envelope(data: bytes) -> None:
    assert not quiet(lambda: envelope.opened(data, "it"))
    assert not quiet(lambda: envelope.opened(b"SNAPCORE" + data, "it"))


def test_a_version_is_believed_only_under_a_right_checksum() -> None:
    whole = envelope.sealed(Kind.SESSION, bytes(16), b"{}")
    with pytest.raises(UnsupportedFormatError):
        envelope.opened(forge.with_header(whole, version=2), "it")
    with pytest.raises(DamagedError):
        envelope.opened(whole[:10] + b"\2" + whole[11:], "it")


# JSON bodies


@pytest.mark.parametrize(
    "body", [b"", b"{", b"null", b"[]", b"\xff", b'{"id":"\\ud800"}', DEEP, b"[" * 100_000, b"9" * 5000]
)
@pytest.mark.parametrize("folder", ["config", "snapshots/", "sessions/", "damage/"])
def test_a_body_that_is_no_json_object_is_damage(folder: str, body: bytes) -> None:
    objects = dict(made().objects)
    if folder in ("config", "snapshots/"):
        name = forge.names(objects, folder)[0]
        objects[name] = forge.with_body(objects[name], body)
    else:
        kind = Kind.SESSION if folder == "sessions/" else Kind.DAMAGE
        objects[folder + "11" * 16] = envelope.sealed(kind, b"\x11" * 16, body)
    store = store_of(objects)
    if folder == "config":
        assert not quiet(lambda: Repository.open(store))
        return
    repository = Repository.open(store)
    if folder == "damage/":
        assert damage.load(store) == []
    else:
        assert not quiet(repository.snapshots if folder == "snapshots/" else repository.sessions)
    use_all(objects)


@given(member=st.sampled_from(["id", "chunk_bytes", "compression"]), value=JSON)
def test_a_config_is_right_or_refused(member: str, value: Any) -> None:
    store = store_of({"config": forge.with_members(made().objects["config"], **{member: value})})
    try:
        found = config.load(store)
    except Error:
        return
    assert found.chunk_bytes in {4096 << shift for shift in range(11)}
    assert found.compression in codec.COMPRESSIONS


MEMBERS = [
    "id", "disk", "sequence", "parent", "created", "size_bytes", "chunk_bytes", "levels", "root", "written_bytes",
    "changed_bytes", "new_bytes", "stored_bytes", "fallback_reason", "label", "tags", "source", "software", "key",
]  # fmt: skip


@given(members=st.dictionaries(st.sampled_from(MEMBERS), JSON, min_size=1, max_size=2), number=st.integers(0, 5))
def test_a_manifest_is_consistent_or_refused(members: dict[str, Any], number: int) -> None:
    objects = dict(made().objects)
    name = forge.names(objects, "snapshots/")[number]
    objects[name] = forge.with_members(objects[name], **members)
    store = store_of(objects)
    try:
        found = manifest.read(store, name, {PLAIN.id: PLAIN}, CHUNK)
    except Error:
        return
    assert found is not None
    assert found.chunk_bytes == CHUNK and 0 <= found.size_bytes <= 1 << 60
    assert len(found.tree.id) == 32 and 128**found.levels >= found.chunks
    if "size_bytes" not in members and "root" not in members:
        use_all(objects)


def test_a_manifest_with_another_chunk_size_than_the_repository_is_refused() -> None:
    objects = dict(made().objects)
    name = forge.names(objects, "snapshots/")[0]
    objects[name] = forge.with_members(objects[name], chunk_bytes=4096)
    with pytest.raises(DamagedError):
        Repository.open(store_of(objects)).snapshots()


def test_a_chain_whose_numbers_are_used_up_takes_no_further_snapshot() -> None:
    store = MemoryStore()
    repository = Repository.create(store, chunk_bytes=CHUNK)
    first = repository.snapshot(Bytes(CHUNKS), disk="d").snapshot
    old = manifest.name(PLAIN, "d", first.sequence, first.id)
    new = manifest.name(PLAIN, "d", 0xFFFFFFFF, first.id)
    objects = objects_of(store)
    objects[new] = forge.with_members(objects.pop(old), sequence=0xFFFFFFFF)
    repository = Repository.open(store_of(objects))
    with pytest.raises(Error):
        repository.snapshot(Bytes(CHUNKS), disk="d")
    assert len(repository.snapshots()) == 1


@given(
    members=st.fixed_dictionaries(
        {
            "id": st.sampled_from(["11" * 16, "../config", "x", ""]),
            "work": st.sampled_from(["create", "collect", "x"]),
            "manifest": st.none() | st.sampled_from(["config", "x", "packs/" + "0" * 32, "snapshots/x", "../../x"]),
            "host": st.text(max_size=5),
            "kernel": st.text(max_size=5),
            "process": st.integers(-1, 1 << 70),
            "started": st.integers(-1, 1 << 64),
            "since": st.text(max_size=5),
        }
    )
)
def test_a_session_that_lies_harms_nothing(members: dict[str, Any]) -> None:
    body = json.dumps(members).encode()
    objects = made().objects | {"sessions/" + "11" * 16: envelope.sealed(Kind.SESSION, b"\x11" * 16, body)}
    store = store_of(objects)
    quiet(lambda: [session.end(store, found) for found in session.sessions(store)])
    for name, data in made().objects.items():
        assert store.get(name, 1 << 30) == data
    assert set(objects_of(store)) <= set(objects)


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "pack": st.text(max_size=5) | st.binary(min_size=16, max_size=16).map(bytes.hex),
                "offset": st.integers(),
                "id": st.text(max_size=5) | st.binary(min_size=32, max_size=32).map(bytes.hex),
            }
        ),
        max_size=4,
    )
)
def test_a_list_of_damage_that_lies_makes_nothing_unreadable(rows: list[dict[str, Any]]) -> None:
    body = json.dumps({"records": rows}).encode()
    objects = made().objects | {"damage/" + "11" * 16: envelope.sealed(Kind.DAMAGE, b"\x11" * 16, body)}
    damage.places(damage.load(store_of(objects)))
    assert not read_all(made(), objects).errors


# Tables


def entries_of(name: str) -> table.Table:
    return table.parse(forge.body_of(made().objects[name]), name)


FIELDS = ("key", "pack", "offset", "stored", "plain", "kind", "form", "codec", "base", "rest")


@given(
    number=st.integers(0, 5),
    changes=st.lists(st.tuples(st.integers(0, 99), st.sampled_from(FIELDS), WIDE, st.booleans()), max_size=8),
    in_order=st.booleans(),
    paged=st.booleans(),
)
def test_an_index_that_lies_leads_to_no_wrong_bytes(
    number: int, changes: list[tuple[int, str, int, bool]], in_order: bool, paged: bool
) -> None:
    name = forge.names(made().objects, "index/")[number]
    contents = entries_of(name)
    entries = contents.entries.copy()
    for row, field, value, from_other in changes:
        row %= len(entries)
        if from_other:
            entries[field][row] = entries[field][value % len(entries)]
        elif field == "rest":
            entries["rest"][row] = value.to_bytes(24, "little")
        else:
            entries[field][row] = value % (1 << 8 * entries.dtype[field].itemsize)
    if in_order:
        entries = entries[np.argsort(entries["key"], kind="stable")]
    bases = [base.tobytes() for base in contents.bases]
    body = forge.table_bytes(entries, contents.packs, bases)
    objects = made().objects | {name: forge.with_body(made().objects[name], body)}
    limit = index.RESIDENT_ENTRIES
    try:
        index.RESIDENT_ENTRIES = 0 if paged else limit
        use_all(objects)
    finally:
        index.RESIDENT_ENTRIES = limit


@given(
    head=st.tuples(WIDE, NUMBERS, NUMBERS, st.just(64) | NUMBERS, st.just(0) | NUMBERS), rest=st.binary(max_size=300)
)
def test_a_table_of_noise_is_refused(head: tuple[int, ...], rest: bytes) -> None:
    data = struct.pack("<QIIII", *(value % (1 << (64 if not place else 32)) for place, value in enumerate(head))) + rest
    assert peak_bytes(lambda: table.parse(data, "it")) < 1 << 20
    assert not quiet(lambda: table.parse(data, "it")) or head[0] <= len(rest) // table.ENTRY.itemsize


def test_an_entry_longer_than_any_record_is_refused() -> None:
    """A read of four gigabytes would be the answer."""
    entries = entries_of(forge.names(made().objects, "index/")[0]).entries[:1].copy()
    entries["stored"] = 0xFFFFFFFF
    with pytest.raises(DamagedError):
        table.parse(forge.table_bytes(entries, [bytes(16)] * (int(entries["pack"][0]) + 1), ()), "it")


# Records


@given(
    kind=st.integers(0, 255), how=st.integers(0, 255), form=st.integers(0, 255), seal=st.integers(0, 1), plain=NUMBERS,
    size=st.none() | NUMBERS, payload=st.binary(max_size=100), limit=st.sampled_from([0, 4096, 1 << 22]),
)  # fmt: skip
def test_a_record_is_decoded_or_refused(
    kind: int, how: int, form: int, seal: int, plain: int, size: int | None, payload: bytes, limit: int
) -> None:
    raw = forge.Rec(kind, how, form, seal, plain, bytes(32), payload, size).to_bytes()
    try:
        head = record.parse_header(raw, "it")
        decoded = record.payload_plain(head, raw[64:], limit, "it")
    except Error:
        return
    assert len(decoded) == plain <= limit


BOMB = bytes(64 << 20)


@pytest.mark.parametrize("claimed", [0, 1, 4096, CHUNK, len(BOMB), (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
@pytest.mark.parametrize("how", ["lz4", "zstd"])
def test_a_bomb_takes_no_more_memory_than_a_chunk(how: str, claimed: int) -> None:
    which, payload = codec.encode(BOMB, how)
    raw = forge.Rec(1, which, 0, 0, claimed, bytes(32), bytes(payload)).to_bytes()

    def read() -> None:
        head = record.parse_header(raw, "it")
        record.payload_plain(head, raw[64:], CHUNK, "it")

    assert peak_bytes(read) < len(raw) + (1 << 16)
    assert not quiet(read)


def test_a_frame_that_asks_for_a_huge_window_is_refused() -> None:
    zstd = codec._zstd()
    options = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}
    packer = zstd.ZstdCompressor(options=options)
    payload = packer.compress(bytes(CHUNK)) + packer.flush()
    assert zstd.decompress(payload) == bytes(CHUNK)
    with pytest.raises(DamagedError):
        codec.decode(codec.Codec.ZSTD, payload, CHUNK)


@given(
    unit=st.just(4096) | NUMBERS, units=st.just(2) | NUMBERS, mask=st.binary(max_size=3), data=st.binary(max_size=40),
    pages=st.integers(0, 3),
)  # fmt: skip
def test_a_patch_is_applied_whole_or_refused(unit: int, units: int, mask: bytes, data: bytes, pages: int) -> None:
    item = forge.patch(RecordKind.CHUNK, bytes(32), bytes(32), unit, units, mask, data + bytes([7]) * 4096 * pages)
    base = bytes([1]) * CHUNK
    try:
        plain = record.apply_patch(item.payload, base, 4096, "it")
    except DamagedError:
        return
    expected, changed = bytearray(base), item.payload[41:]
    for page in range(2):
        if item.payload[40] >> page & 1:
            expected[page * 4096 : (page + 1) * 4096], changed = changed[:4096], changed[4096:]
    assert plain == expected and not changed


def repository_of(records: list[forge.Rec], root: bytes, size_bytes: int, **fields: int) -> Repository:
    """A repository with these records and one snapshot; `fields` go into every index entry."""
    store = MemoryStore()
    Repository.create(store, chunk_bytes=CHUNK)
    pack_id = b"\x22" * 16
    data, entries = forge.packed(records, pack_id)
    for field, value in fields.items():
        entries[field] = value
    bases = [item.payload[:32] for item in records if item.form][:1]
    store._objects[pack.name(pack_id)] = forge.finished(data, forge.table_bytes(entries, [pack_id], bases))
    store._objects["index/" + "33" * 16] = forge.indexed(entries, [pack_id], bases, b"\x33" * 16)
    chunks = -(-size_bytes // CHUNK)
    levels = next(levels for levels in range(1, 10) if 128**levels >= chunks)
    item = manifest.Manifest(
        id="44" * 16, disk="d", sequence=1, parent=None, created="", size_bytes=size_bytes, chunk_bytes=CHUNK,
        levels=levels, root=root.hex(), written_bytes=0, changed_bytes=0, new_bytes=0, stored_bytes=0,
    )  # fmt: skip
    manifest.write(store, manifest.name(PLAIN, "d", 1, item.id), item)
    return Repository.open(store)


def node(*ids: bytes) -> forge.Rec:
    return forge.full(RecordKind.NODE, b"".join(ids).ljust(4096, b"\0"))


@pytest.mark.parametrize("form", [Form.FULL, Form.PATCH])
def test_a_patch_of_itself_is_refused(form: Form) -> None:
    """The index may call it full: then it looks like a base."""
    object_id = PLAIN.chunk_id(CHUNKS[:CHUNK])
    loop = forge.patch(RecordKind.CHUNK, object_id, object_id, 4096, 2, b"\0", b"")
    top = node(object_id)
    fields = {"form": 0, "base": table.NO_BASE} if form == Form.FULL else {}
    repository = repository_of([loop, top], top.id, CHUNK, **fields)
    with pytest.raises(DamagedError):
        repository.open_snapshot("44" * 16).read()
    assert [chunks_in(hit.ranges, CHUNK) for hit in repository.verify().hits] == [{0}]


def test_patches_on_patches_are_refused_however_long_the_chain() -> None:
    ids = [bytes([1, number % 256, number // 256]).ljust(32, b"\1") for number in range(2000)]
    chain = [forge.patch(RecordKind.CHUNK, a, b, 4096, 2, b"\0", b"") for a, b in pairwise(ids)]
    top = node(ids[0])
    repository = repository_of([*chain, top], top.id, CHUNK, form=0, base=table.NO_BASE)
    with pytest.raises(DamagedError):
        repository.open_snapshot("44" * 16).read()
    assert not repository.verify().ok
    quiet(repository.rebuild_index)
    assert not quiet(lambda: repository.open_snapshot("44" * 16).read())


# Packs


@given(
    parts=st.lists(
        st.sampled_from([b"SREC", bytes(60), b"SNAPFOOT", b"\xff" * 7]) | st.binary(max_size=80), max_size=30
    ),
    offset=WIDE,
    length=WIDE,
)
def test_a_pack_of_noise_is_read_to_its_end(parts: list[bytes], offset: int, length: int) -> None:
    data = envelope.header(Kind.PACK, bytes(16), 0) + b"".join(parts) + forge.footer(offset, length)
    assert all(found.header is None for found in pack.records(data, "it"))
    assert len(pack.scan_directory(data, bytes(16)).entries) == 0
    store = store_of({pack.name(bytes(16)): data})
    assert not quiet(lambda: pack.read_directory(store, bytes(16), len(data)))


@given(changes=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["kind", "codec", "form", "plain_bytes", "id",
       "payload", "payload_bytes"]), NUMBERS), min_size=1, max_size=4), number=st.integers(0, 20))  # fmt: skip
def test_a_pack_that_lies_leads_to_no_wrong_bytes(changes: list[tuple[int, str, int]], number: int) -> None:
    names = forge.names(made().objects, "packs/")
    name = names[number % len(names)]
    records = forge.records_of(made().objects[name])
    for place, field, value in changes:
        item = records[place % len(records)]
        other = records[value % len(records)]
        if field in ("id", "payload"):
            setattr(item, field, getattr(other, field))
        else:
            setattr(item, field, value % 256 if field in ("kind", "codec", "form") else value)
    pack_id = bytes.fromhex(name.removeprefix("packs/"))
    data, entries = forge.packed(records, pack_id)
    objects = made().objects | {
        name: forge.finished(data, forge.table_bytes(entries, [pack_id], [bytes(32)])),
        "index/" + "55" * 16: forge.indexed(entries, [pack_id], [bytes(32)], b"\x55" * 16),
    }
    use_all(objects)


def test_false_beginnings_of_records_cost_one_problem() -> None:
    data = envelope.header(Kind.PACK, b"\x66" * 16, 0) + b"SREC" * 50_000
    objects = made().objects | {pack.name(b"\x66" * 16): data}
    assert len(Repository.open(store_of(objects)).verify().problems) < 10


def test_a_pack_of_many_bad_records_is_named_briefly() -> None:
    bad = forge.full(RecordKind.CHUNK, b"", bytes(32)).to_bytes()
    data = envelope.header(Kind.PACK, b"\x66" * 16, 0) + bad * 5000
    objects = made().objects | {pack.name(b"\x66" * 16): data}
    assert len(Repository.open(store_of(objects)).verify().problems) <= verify._PROBLEMS_LIMIT + 10


# Trees


def test_slots_beyond_the_end_of_a_disk_are_not_looked_at(tmp_path: Path) -> None:
    chunk = forge.full(RecordKind.CHUNK, CHUNKS[:CHUNK])
    top = node(chunk.id, *([b"\x77" * 32] * 127))
    repository = repository_of([chunk, top], top.id, CHUNK - 10)
    repository.restore("44" * 16, tmp_path / "disk")
    assert (tmp_path / "disk").read_bytes() == CHUNKS[: CHUNK - 10]
    assert repository.open_snapshot("44" * 16).read() == CHUNKS[: CHUNK - 10]
    assert repository.verify().hits == []
    assert repository.diff("44" * 16, "44" * 16).size == 0


def test_nodes_beyond_the_end_of_a_disk_are_not_looked_at(tmp_path: Path) -> None:
    chunk = forge.full(RecordKind.CHUNK, CHUNKS[:CHUNK])
    leaf = node(*[chunk.id] * 128)
    top = node(leaf.id, leaf.id, *([b"\x77" * 32] * 126))
    size = 129 * CHUNK
    repository = repository_of([chunk, leaf, top], top.id, size)
    done = repository.restore("44" * 16, tmp_path / "disk", allow_damaged=True)
    assert done.missing.size == 0
    assert (tmp_path / "disk").read_bytes() == CHUNKS[:CHUNK] * 129
    assert repository.verify().hits == []


@pytest.mark.parametrize("missing", [1, 2])
def test_a_disk_of_an_exbibyte_in_seven_nodes_is_verified_in_little_memory(missing: int) -> None:
    """Every node 128 times below the one above it: 2**47 chunks, every `missing`-th of them not there."""
    chunk = forge.full(RecordKind.CHUNK, CHUNKS[:CHUNK])
    nodes = [node(*((b"\x77" * 32 if slot % missing == 0 else chunk.id) for slot in range(128)))]
    for _ in range(6):
        nodes.append(node(*[nodes[-1].id] * 128))
    repository = repository_of([chunk, *nodes], nodes[-1].id, 1 << 60)
    assert peak_bytes(repository.verify) < 200 << 20
    (hit,) = repository.verify().hits
    assert int(hit.ranges[0, 0]) == 0
    assert (hit.ranges >= 0).all() and (hit.ranges.sum(axis=1) <= 1 << 60).all()
    buffer = bytearray(CHUNK)
    assert not quiet(lambda: repository.open_snapshot("44" * 16).pread_into(buffer, 0))
    if missing == 2:
        reader = repository.open_snapshot("44" * 16)
        assert reader.pread_into(buffer, (1 << 60) - CHUNK) == CHUNK
        assert buffer == CHUNKS[:CHUNK]


def test_a_node_on_two_levels_is_told_apart() -> None:
    """What is a leaf in one tree is an inner node in another: its children are chunks here and nodes there."""
    chunk = forge.full(RecordKind.CHUNK, CHUNKS[:CHUNK])
    leaf = node(chunk.id)
    top = node(leaf.id, leaf.id)
    high = node(top.id, leaf.id)
    repository = repository_of([chunk, leaf, top, high], high.id, 200 * 128 * CHUNK)
    (hit,) = repository.verify().hits
    # Below slot 1 of the topmost node stands a leaf where a node of leaves belongs.
    assert chunks_in(hit.ranges, CHUNK) == set(range(128 * 128, 128 * 128 + 128))
    assert not quiet(repository.collect)


@given(shape=st.lists(st.integers(0, 6), min_size=1, max_size=12), chunks=st.sampled_from([1, 2, 128, 129, 200, 16384]))
def test_trees_of_any_shape_are_walked_to_an_end(shape: list[int], chunks: int) -> None:
    """Chunks where nodes belong, nodes where chunks belong, ids that are nowhere."""
    chunk = forge.full(RecordKind.CHUNK, CHUNKS[:CHUNK])
    found = [chunk]
    for number, value in enumerate(shape):
        children = [found[(number + step) % len(found)].id for step in range(value)]
        found.append(node(*children, *([ZERO_ID] * 3), b"\x77" * 32) if value % 2 else node(chunk.id, *children))
    repository = repository_of(list({item.id: item for item in found}.values()), found[-1].id, chunks * CHUNK - 5)
    verified = repository.verify()
    lost = set().union(*(chunks_in(hit.ranges, CHUNK) for hit in verified.hits))
    reader = repository.open_snapshot("44" * 16)
    for number in range(min(chunks, 300)):
        buffer = bytearray(min(CHUNK, chunks * CHUNK - 5 - number * CHUNK))
        assert quiet(lambda: reader.pread_into(buffer, number * CHUNK)) == (number not in lost)  # noqa: B023
        if number not in lost:
            assert not any(buffer) or bytes(buffer) == CHUNKS[: len(buffer)]


# What lies in a local folder


def test_what_is_no_file_in_a_local_folder_stops_nobody(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "repository"))
    repository = Repository.create(store, chunk_bytes=CHUNK)
    repository.snapshot(Bytes(CHUNKS), disk="d")
    victim = Path(store.folder) / next(name for name, _ in store.list("packs/"))
    data = victim.read_bytes()
    victim.unlink()
    os.mkfifo(victim)
    repository = Repository.open(store.folder)
    assert not quiet(lambda: repository.open_snapshot(repository.snapshots()[0]).read())
    assert not repository.verify().ok
    victim.unlink()
    victim.write_bytes(data)
    (Path(store.folder) / "config").unlink()
    os.mkfifo(Path(store.folder) / "config")
    assert not quiet(lambda: Repository.open(store.folder))


def test_folders_nested_without_end_are_refused(tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(1500 // 2):
        folder = folder / "a"
        if len(str(folder)) > 3800:
            break
    folder.mkdir(parents=True)
    assert not quiet(lambda: list(LocalStore(str(tmp_path)).list("")))
