"""An encrypted repository: what is in it comes back, nothing of it can be seen, and no change of it goes unnoticed."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import DamagedError, Error, LockedError, Repository
from snapcore.keys.sealing import NUMBER_BYTES, RECORD_OVERHEAD_BYTES, SALT_BYTES
from snapcore.repository import NO_KEY, index, pack, record
from snapcore.repository.context import Context
from snapcore.repository.domain import Domain
from snapcore.repository.pack import PackBuilder
from snapcore.repository.record import HEADER_BYTES, RecordKind
from snapcore.repository.table import ids_of
from snapcore.store import MemoryStore
from tests.support import disks, forge
from tests.support.forge import Objects, objects_of, store_of
from tests.support.holders import Fixed
from tests.support.small import Bytes, restored

CHUNK = 16 << 10
SECRETS = (b"the-disks-name", b"the label", b"tag-key", b"tag-value")


def taken(repository: Repository, key: str | None, contents: list[bytes], disk: str = "the-disks-name") -> list[str]:
    """Ids of snapshots of these contents, one after the other."""
    ids = []
    for content in contents:
        created = repository.snapshot(
            Bytes(content), disk=disk, key=key, label=None if ids else f"the label {key}", tags={"tag-key": "tag-value"}
        )
        ids.append(created.snapshot.id)
    return ids


@cache
def made() -> tuple[Objects, dict[str, bytes]]:
    """A repository under the key K, held by "k": three snapshots with patches and a deletion, and what they hold."""
    store = MemoryStore()
    repository = Repository.create(store, chunk_bytes=CHUNK)
    repository.keyring.create("K", Fixed("k"))
    contents = [disks.disk(1, 60)]
    for seed in range(3):
        contents.append(disks.changed(contents[-1], seed))
    ids = taken(repository, "K", contents)
    repository.delete(ids[0])
    repository.collect()
    return objects_of(store), dict(zip(ids[1:], contents[1:], strict=True))


def opened(objects: Objects) -> Repository:
    """The repository with its key."""
    return Repository.open(store_of(objects), keys=[Fixed("k")])


def context_of(repository: Repository) -> Context:
    """What work under K needs."""
    return repository._of(repository.keyring.find("K"))


def names(folder: str) -> list[str]:
    """Names of the sealed objects of a folder."""
    return list(forge.names(made()[0], folder))


def all_read(objects: Objects) -> dict[str, bytes]:
    """Every snapshot as it is read, chunk by chunk; an Error where one cannot be."""
    repository = opened(objects)
    found = {}
    for snapshot in repository.snapshots():
        with repository.open_snapshot(snapshot) as file:
            found[snapshot.id] = file.read()
    return found


def test_every_snapshot_comes_back_and_all_is_well(tmp_path: Path) -> None:
    objects, held = made()
    repository = opened(objects)
    for snapshot_id, content in held.items():
        assert restored(repository, snapshot_id, tmp_path) == content
    done = repository.verify()
    assert done.ok and done.snapshots == len(held) and done.locked_snapshots == 0
    assert {snapshot.key for snapshot in repository.snapshots()} == {repository.keyring.listed()[0].id}
    assert {entry["form"] for table in context_of(repository).index().tables() for entry in table.entries} == {0, 1}


def test_the_encrypted_snapshot_is_restored_by_another_process(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(disks.disk(3, 20))
    script = """
        import sys
        from snapcore import KeyFile, Repository
        repository = Repository.open("repo", keys=[KeyFile("key")])
        repository.restore(repository.snapshots()[0], "out")
    """
    from snapcore import KeyFile

    repository = Repository.create(tmp_path / "repo")
    repository.keyring.create("K", KeyFile.create(tmp_path / "key"))
    repository.snapshot(tmp_path / "image", disk="d", key="K")
    subprocess.run([sys.executable, "-P", "-c", re.sub(r"(?m)^ {8}", "", script)], cwd=tmp_path, check=True)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "image").read_bytes()


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_no_object_holds_a_piece_of_the_source_or_a_name(compression: str) -> None:
    store = MemoryStore()
    repository = Repository.create(store, chunk_bytes=CHUNK, compression=compression)
    repository.keyring.create("K", Fixed("k"))
    random_ = random.Random(5)
    first = random_.randbytes(8 * CHUNK) + b"an ordinary sentence, again and again; " * 2000
    second = bytearray(first)
    second[CHUNK : CHUNK + 4096] = random_.randbytes(4096)
    taken(repository, "K", [first, bytes(second)])
    stored = b"\n".join(objects_of(store).values())
    assert not [word for word in SECRETS if word in stored]
    windows = {stored[at : at + 16] for at in range(len(stored) - 15)}
    for source in (first, second):
        assert not any(bytes(source[at : at + 16]) in windows for at in range(len(source) - 15))
    for word in (repository.snapshots()[0].root, repository.snapshots()[0].software):
        assert word.encode() not in stored and bytes.fromhex(repository.snapshots()[0].root) != word.encode()


def test_equal_chunks_under_two_keys_and_none_share_no_byte_of_a_record_and_no_id() -> None:
    store = MemoryStore()
    repository = Repository.create(store, chunk_bytes=CHUNK)
    content = disks.disk(1, 40)
    ids: dict[str | None, set[bytes]] = {}
    windows: dict[str | None, set[bytes]] = {}
    for key in ("K", "L", None):
        before = objects_of(store)
        if key is not None:
            repository.keyring.create(key, Fixed(key))
            taken(repository, key, [content], f"disk {key}")
        else:
            repository.snapshot(Bytes(content), disk="plain", key=NO_KEY)
        new = {name: data for name, data in objects_of(store).items() if name not in before and name[:6] == "packs/"}
        records = [item for data in new.values() for item in pack.records(data, "x")]
        found = [item for item in records if item.header is not None and item.header.kind != RecordKind.DIRECTORY]
        ids[key] = {item.header.id for item in found if item.header is not None}
        windows[key] = {bytes(item.payload[at : at + 16]) for item in found for at in range(0, len(item.payload), 16)}
    assert len({len(part) for part in ids.values()}) == 1
    for a, b in (("K", "L"), ("K", None), ("L", None)):
        assert not ids[a] & ids[b] and not windows[a] & windows[b]


def test_no_salt_and_number_is_ever_used_twice() -> None:
    store = MemoryStore()
    repository = Repository.create(store, chunk_bytes=CHUNK)
    repository.keyring.create("K", Fixed("k"))
    contents = [disks.disk(2, 60)]
    for seed in range(4):
        contents.append(disks.changed(contents[-1], seed))
    # Each by another process, as it were.
    for content in contents:
        taken(Repository.open(store, keys=[Fixed("k")]), "K", [content])
    repository.delete(repository.snapshots()[1])
    Repository.open(store, keys=[Fixed("k")]).rebuild_index()
    messages: list[bytes] = []
    salts: list[bytes] = []
    for name, data in objects_of(store).items():
        if name.startswith("packs/"):
            items = list(pack.records(data, name))
            messages += [bytes(item.payload[: SALT_BYTES + NUMBER_BYTES]) for item in items]
        elif name.startswith(("index/", "snapshots/")):
            salts.append(data[forge.HEAD : forge.HEAD + SALT_BYTES])
    assert len(messages) > 40 and len(set(messages)) == len(messages)
    assert len(set(salts) | {message[:SALT_BYTES] for message in messages}) > len(contents)
    assert len(set(salts)) == len(salts) and not set(salts) & {message[:SALT_BYTES] for message in messages}


FOLDERS = ["packs/", "index/", "snapshots/", "keys/"]


def mended(name: str, data: bytes) -> bytes:
    """The object with every checksum that needs no key made right again, as somebody who can write would do."""
    if not name.startswith("packs/"):
        return forge.enveloped(data[: forge.HEAD], data[forge.HEAD : -32])
    out = bytearray(data)
    at = forge.HEAD
    while at + HEADER_BYTES <= len(out) - pack.FOOTER_BYTES and out[at : at + 4] == b"SREC":
        size = int.from_bytes(out[at + 8 : at + 12], "little")
        payload = bytes(out[at + HEADER_BYTES : at + HEADER_BYTES + size])
        if at + HEADER_BYTES + size > len(out):
            break
        out[at + 48 : at + 56] = forge.xxhash.xxh3_64_intdigest(payload).to_bytes(8, "little")
        out[at + 56 : at + 64] = forge.xxhash.xxh3_64_intdigest(bytes(out[at : at + 56])).to_bytes(8, "little")
        at += HEADER_BYTES + size
    return bytes(out)


@pytest.mark.parametrize("mend", [False, True], ids=["a flipped bit", "a flipped bit with all checksums right"])
@pytest.mark.parametrize("folder", FOLDERS)
@given(data=st.data())
def test_a_bit_that_is_changed_anywhere_is_noticed_or_of_no_concern(
    folder: str, mend: bool, data: st.DataObject
) -> None:
    objects, held = made()
    name = data.draw(st.sampled_from(names(folder)))
    changed = bytearray(objects[name])
    at = data.draw(st.integers(0, len(changed) * 8 - 1))
    changed[at // 8] ^= 1 << at % 8
    now = mended(name, bytes(changed)) if mend else bytes(changed)
    try:
        repository = opened(objects | {name: now})
        found = repository.verify()
        read = all_read(objects | {name: now})
    except Error:
        return
    assert all(held[snapshot_id] == content for snapshot_id, content in read.items())
    # The footer and the compatible feature bits are not sealed: what they can do is to be of no concern.
    assert not found.ok or read == held


def record_places(name: str) -> list[tuple[int, int]]:
    """Offset and length of every chunk or node in a pack."""
    return [
        (item.offset_bytes, HEADER_BYTES + item.header.payload_bytes)
        for item in pack.records(made()[0][name], name)
        if item.header is not None and item.header.kind != RecordKind.DIRECTORY
    ]


@pytest.mark.parametrize("what", ["records", "payloads"])
def test_two_sealed_records_that_change_places_are_noticed(what: str) -> None:
    objects, held = made()
    swaps = 0
    for name in names("packs/"):
        data = objects[name]
        places = record_places(name)
        for a, length in places:
            for b, other in places:
                if a >= b or length != other:
                    continue
                skip = HEADER_BYTES if what == "payloads" else 0
                one, two = data[a + skip : a + length], data[b + skip : b + length]
                changed = data[: a + skip] + two + data[a + length : b + skip] + one + data[b + length :]
                now = objects | {name: mended(name, changed)}
                found = opened(now).verify()
                assert not found.ok
                with pytest.raises(DamagedError):
                    assert all_read(now) == held
                swaps += 1
    assert swaps


@pytest.mark.parametrize("folder", ["index/", "snapshots/"])
def test_two_sealed_objects_that_change_names_are_noticed(folder: str) -> None:
    objects, _ = made()
    one, two = (names(folder) * 2)[:2] if len(names(folder)) > 1 else (names("index/")[0], names("snapshots/")[0])
    now = objects | {one: objects[two], two: objects[one]}
    with pytest.raises(DamagedError):
        all_read(now)
    # The ids in their headers made right as well: then they do not open.
    for name, other in ((one, two), (two, one)):
        now[name] = forge.with_header(objects[other], id=bytes.fromhex(name[-32:]))
    with pytest.raises(DamagedError, match=r"does not open|where"):
        all_read(now)


def test_an_object_that_is_cut_at_a_segment_is_noticed() -> None:
    objects, _ = made()
    name = names("index/")[0]
    body = forge.body_of(objects[name])
    with pytest.raises(DamagedError):
        all_read(objects | {name: forge.with_body(objects[name], body[: SALT_BYTES + 16])})


def test_an_open_record_is_taken_in_no_sealed_pack_and_a_sealed_one_in_no_open_pack() -> None:
    repository = opened(made()[0])
    domain = repository.keyring.find("K")
    open_record = record.make(RecordKind.CHUNK, b"i" * 32, b"plain", "none")
    sealed_record = record.make(RecordKind.CHUNK, b"i" * 32, b"plain", "none", domain=domain)
    with pytest.raises(ValueError, match="not sealed as the domain"):
        PackBuilder(domain).add(open_record)
    with pytest.raises(ValueError, match="not sealed as the domain"):
        PackBuilder().add(sealed_record)
    for item, wrong in ((open_record, {"domain": domain}), (sealed_record, {})):
        head = record.parse_header(item.header, "x")
        with pytest.raises(DamagedError, match=r"open record|sealed record"):
            record.payload_plain(head, item.payload, 100, "x", **wrong)


def test_an_open_manifest_under_a_sealed_name_is_noticed() -> None:
    objects, _ = made()
    name = names("snapshots/")[0]
    fake = forge.with_header(objects[name], domain=bytes(16))
    with pytest.raises(DamagedError):
        opened(objects | {name: fake}).snapshots()


def test_without_its_key_a_snapshot_is_listed_as_locked_and_all_work_on_it_is_refused(tmp_path: Path) -> None:
    objects, held = made()
    repository = Repository.open(store_of(objects))
    assert repository.snapshots() == []
    assert {item.id for item in repository.locked_snapshots()} == held.keys()
    snapshot_id = next(iter(held))
    work: list[Callable[[], object]] = [
        lambda: repository.find(snapshot_id),
        lambda: repository.restore(snapshot_id, tmp_path / "out"),
        lambda: repository.open_snapshot(snapshot_id),
        lambda: repository.delete(snapshot_id),
        lambda: repository.unique([snapshot_id]),
        lambda: repository.diff(snapshot_id, snapshot_id),
        lambda: repository.snapshot(Bytes(b"x"), disk="the-disks-name", parent=snapshot_id),
    ]
    for call in work:
        with pytest.raises(LockedError, match="not unlocked"):
            call()
    assert not (tmp_path / "out").exists() and objects_of(repository._context.store) == objects


def test_a_host_without_the_key_finds_every_byte_that_changed_and_nothing_wrong_before() -> None:
    objects, held = made()
    done = Repository.open(store_of(objects)).verify()
    assert done.ok and done.snapshots == 0 and done.locked_snapshots == len(held)
    assert done.records == opened(objects).verify().records
    random_ = random.Random(1)
    for folder in ("packs/", "index/", "snapshots/"):
        for _ in range(20):
            name = random_.choice(names(folder))
            changed = bytearray(objects[name])
            # Feature bits and the length of a pack's body in its header have no checksum.
            at = random_.randrange(forge.HEAD, len(changed))
            changed[at] ^= 1 << random_.randrange(8)
            assert not Repository.open(store_of(objects | {name: bytes(changed)})).verify().ok, (name, at)


def test_damage_found_without_the_key_is_stored_again_by_who_has_it(tmp_path: Path) -> None:
    objects, held = made()
    newest = list(held)[-1]
    name = max(names("packs/"), key=lambda item: len(objects[item]))
    offset, length = record_places(name)[-1]
    changed = bytearray(objects[name])
    changed[offset + length - 1] ^= 1
    store = store_of(objects | {name: bytes(changed)})
    assert Repository.open(store).verify().marked == 1
    repository = Repository.open(store, keys=[Fixed("k")])
    repository.snapshot(Bytes(held[newest]), disk="the-disks-name", paranoid=True)
    assert restored(repository, newest, tmp_path) == held[newest]


def test_a_collection_without_the_key_removes_nothing_that_is_under_it() -> None:
    objects, held = made()
    store = store_of(objects)
    repository = Repository.open(store)
    plain = repository.snapshot(Bytes(disks.disk(9, 30)), disk="plain", key=NO_KEY).snapshot
    repository.delete(plain)
    assert repository.collect().freed_bytes > 0
    assert repository.rebuild_index() == 0
    # That of the plain domain, in the clear, is all that is new.
    left = {name: data for name, data in objects_of(store).items() if not re.fullmatch("generations/[0-9a-f]{8}", name)}
    assert left == objects
    assert all_read(left) == held


def test_a_collection_with_several_keys_frees_what_each_has_deleted_and_keeps_the_rest(tmp_path: Path) -> None:
    store = MemoryStore()
    repository = Repository.create(store, chunk_bytes=CHUNK)
    held: dict[str, bytes] = {}
    gone = []
    for key in ("K", "L"):
        repository.keyring.create(key, Fixed(key))
    for number, key in enumerate(("K", "L", None)):
        contents = [disks.disk(number, 40), disks.disk(number + 10, 40)]
        for content in contents:
            created = repository.snapshot(Bytes(content), disk=f"d{number}", key=key or NO_KEY)
            held[created.snapshot.id] = content
        gone.append(list(held)[-2])
    for snapshot_id in gone:
        repository.delete(snapshot_id)
        del held[snapshot_id]
    before = sum(len(data) for data in objects_of(store).values())
    freed = repository.collect().freed_bytes
    after = sum(len(data) for data in objects_of(store).values())
    assert before - after == freed > 3 * 20 * 4096
    assert repository.verify().ok
    for snapshot_id, content in held.items():
        assert restored(repository, snapshot_id, tmp_path) == content
    assert repository.usage().stored_bytes > repository.unique([next(iter(held))]).stored_bytes > 0


def test_a_large_sealed_index_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "RESIDENT_ENTRIES", 0)
    objects, held = made()
    assert all_read(objects) == held
    context = context_of(opened(objects))
    ids = context.index().tables()[0].ids()
    assert all(place is not None for place in context.index().find_many(ids))


def test_an_index_that_is_lost_is_made_anew_from_sealed_packs() -> None:
    objects, held = made()
    kept = {name: data for name, data in objects.items() if not name.startswith("index/")}
    store = store_of(kept)
    assert Repository.open(store, keys=[Fixed("k")]).rebuild_index() > 0
    assert all_read(objects_of(store)) == held
    # A pack whose directory is lost too is read record by record.
    for name in forge.names(kept, "packs/"):
        kept[name] = kept[name][:-8]
    store = store_of(kept)
    assert Repository.open(store, keys=[Fixed("k")]).rebuild_index() > 0
    assert all_read(objects_of(store)) == held


def test_sealed_records_move_as_they_are_into_another_repository_of_the_same_key() -> None:
    """What copies within a domain build on."""
    objects, _ = made()
    source = opened(objects)
    other = Repository.create(MemoryStore(), chunk_bytes=CHUNK)
    source.keyring.share("K", other.keyring, Fixed("elsewhere"))
    domain = other.keyring.find("K")
    found = context_of(source).objects()
    table = found.index.tables()[0]
    for kind in (RecordKind.CHUNK, RecordKind.NODE):
        ids = ids_of(table.ids()[table.entries["kind"] == kind].tobytes())
        builder = PackBuilder(domain)
        for _, item in found.stored(kind, ids):
            assert not isinstance(item, DamagedError)
            builder.add(item)
        buffers, contents = builder.finish()
        other._context.store.put_new(builder.name, buffers)
        index.write(other._context.store, contents, domain)
    moved = other._of(domain).objects()
    for entry_id, kind in zip(table.ids(), table.entries["kind"].tolist(), strict=True):
        read: Callable[[bytes], object] = moved.chunk if kind == RecordKind.CHUNK else moved.node
        assert read(entry_id.tobytes())
    assert other.verify().ok


def test_sealed_records_are_36_bytes_longer_than_open_ones() -> None:
    domain: Domain = opened(made()[0]).keyring.find("K")
    plain = record.make(RecordKind.CHUNK, b"i" * 32, b"x" * 100, "none")
    sealed = record.make(RecordKind.CHUNK, b"i" * 32, b"x" * 100, "none", domain=domain)
    assert sealed.stored_bytes - plain.stored_bytes == RECORD_OVERHEAD_BYTES == 36


def test_a_session_under_a_key_does_not_tell_its_host() -> None:
    import os

    seen: list[bytes] = []
    store = MemoryStore()
    repository = Repository.create(store, chunk_bytes=CHUNK)
    repository.keyring.create("K", Fixed("k"))

    def look() -> None:
        seen.extend(store.get(name, 1 << 20) for name, _ in store.list("sessions/"))

    repository.snapshot(Bytes(disks.disk(1, 4), look), disk="d", key="K")
    (told,) = {*seen}
    assert os.uname().nodename.encode() not in told
    for path in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
        if Path(path).exists():
            assert Path(path).read_bytes().strip() not in told
    # The host itself still sees that the process lives.
    restored_store = store_of(objects_of(store) | {"sessions/" + told[40:56].hex(): told})
    assert [item.host for item in Repository.open(restored_store).sessions()] == [""]
