"""Reads what lies under keys that are not unlocked, and checks that it is as it was stored: checksums, frames, names.

No key is needed for that, so a host that must not read the disks can look after them. What a checksum does not show:
whether a record opens, whether its content is that of its id, and whether all that a snapshot needs is there.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial

from snapcore.errors import DamagedError, NotFoundError, ReadError, UnsupportedFormatError
from snapcore.parallel import in_order
from snapcore.progress import Meter, ProgressCallback
from snapcore.repository import envelope, index, manifest, pack, record, wrap
from snapcore.repository.damage import Bad
from snapcore.repository.domain import PLAIN
from snapcore.repository.envelope import Kind
from snapcore.repository.record import RecordKind
from snapcore.repository.share import Share
from snapcore.store import Store

_PROBLEMS_LIMIT = 1000


@dataclass(slots=True)
class Scrubbed:
    """What was looked at, and what is wrong: (object and offset, what)."""

    snapshots: int = 0
    packs: int = 0
    records: int = 0
    stored_bytes: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)


def scrub(
    store: Store,
    unlocked: frozenset[bytes],
    share: Share,
    progress: ProgressCallback | None,
    hands: Executor,
    in_flight: int | None,
) -> tuple[Scrubbed, list[Bad]]:
    """Check packs, index objects and manifests of other domains than these. Returns also what is to be marked."""
    total = Scrubbed()
    held = {parsed.domain for name, _ in store.list(wrap.PREFIX) if (parsed := wrap.parse_name(name)) is not None}
    for name, _ in list(store.list(manifest.PREFIX)):
        domain = _locked_domain(store, name, unlocked)
        total.snapshots += domain is not None
        if domain is not None and domain.hex() not in held:
            what = f"this snapshot is under the key {domain.hex()}, of which the repository has no holder any more"
            total.problems.append((name, what))
    listed = [(name, size_bytes) for name, size_bytes in store.list(index.PREFIX) if _is_locked(name, unlocked)]
    packs = [
        (name, size_bytes)
        for name, size_bytes in store.list(pack.PREFIX)
        if _is_locked(name, unlocked) and share.holds(bytes.fromhex(name[-32:]))
    ]
    meter = Meter(progress, "scrub", sum(size_bytes for _, size_bytes in [*listed, *packs]))
    bad: list[Bad] = []
    work: list[Callable[[], tuple[Scrubbed, list[Bad]]]] = [partial(_check_index, store, name) for name, _ in listed]
    work += [partial(_check_pack, store, name) for name, _ in packs]
    for found, marked in in_order(hands, _do, work, in_flight):
        meter.advance(found.stored_bytes)
        total.packs += found.packs
        total.records += found.records
        total.stored_bytes += found.stored_bytes
        total.problems += found.problems
        bad += marked
    return total, bad


def _do(work: Callable[[], tuple[Scrubbed, list[Bad]]]) -> tuple[Scrubbed, list[Bad]]:
    return work()


def _is_locked(name: str, unlocked: frozenset[bytes]) -> bool:
    """Whether a pack or an index object is in the folder of a domain that is none of these."""
    parts = name.split("/")
    if len(parts) != 3 or len(parts[1]) != 32 or len(parts[2].rpartition("-")[2]) != 32:
        return False
    try:
        return bytes.fromhex(parts[1]) not in unlocked
    except ValueError:
        return False


def _locked_domain(store: Store, name: str, unlocked: frozenset[bytes]) -> bytes | None:
    """The domain of a manifest when it is none of these; damaged ones are told by who reads the others."""
    try:
        data = store.get(name, envelope.OBJECT_LIMIT_BYTES)
        kind, _, _ = envelope.check_stored(data, name)
    except (DamagedError, NotFoundError, ReadError, UnsupportedFormatError):
        return None
    domain = envelope.domain_of(data)
    return None if kind != Kind.MANIFEST or domain in unlocked else domain


def _check_index(store: Store, name: str) -> tuple[Scrubbed, list[Bad]]:
    found = Scrubbed()
    _, domain, object_id = name.split("/")
    try:
        data = store.get(name, envelope.OBJECT_LIMIT_BYTES)
        found.stored_bytes = len(data)
        kind, _, _ = envelope.check_stored(data, name, bytes.fromhex(object_id.rpartition("-")[2]))
        envelope.expect(kind, Kind.INDEX, name)
        _expect_domain(data, domain, name)
    except NotFoundError:
        # A collection with the key has put another one in its place.
        pass
    except (DamagedError, ReadError, UnsupportedFormatError) as error:
        found.problems.append((name, str(error)))
    return found, []


def _check_pack(store: Store, name: str) -> tuple[Scrubbed, list[Bad]]:
    found = Scrubbed(packs=1)
    _, domain, pack_id = name.split("/")
    bad: list[Bad] = []
    try:
        data = store.get(name, pack.PACK_LIMIT_BYTES)
        found.stored_bytes = len(data)
        kind, _, _ = envelope.check_header(data, name, bytes.fromhex(pack_id), None)
        envelope.expect(kind, Kind.PACK, name)
        _expect_domain(data, domain, name)
        head, payload = pack.stored_directory(store, name, len(data))
        record.check_payload(head, payload, name)
        _check_records(data, name, pack_id, found, bad)
    except NotFoundError:
        pass
    except (DamagedError, ReadError, UnsupportedFormatError) as error:
        found.problems.append((name, str(error)))
    return found, bad


def _check_records(data: bytes, name: str, pack_id: str, found: Scrubbed, bad: list[Bad]) -> None:
    unnamed = 0
    for item in pack.records(data, name):
        where = f"{name} at {item.offset_bytes}"
        try:
            if item.header is None:
                raise DamagedError(item.problem or "unreadable")
            if not item.header.sealed:
                raise DamagedError(f"{where}: an open record in a sealed domain")
            record.check_payload(item.header, item.payload, where)
        except DamagedError as error:
            if item.header is not None:
                bad.append(Bad(pack=pack_id, offset=item.offset_bytes, id=item.header.id.hex()))
            if len(found.problems) < _PROBLEMS_LIMIT:
                found.problems.append((where, str(error)))
            else:
                unnamed += 1
        else:
            found.records += item.header.kind != RecordKind.DIRECTORY
    if unnamed:
        found.problems.append((name, f"{unnamed} more records are damaged"))


def _expect_domain(data: bytes, domain: str, name: str) -> None:
    found = envelope.domain_of(data).hex()
    if found != domain:
        raise DamagedError(f"{name} is of the domain {found if found != PLAIN.id.hex() else 'in the clear'}")
