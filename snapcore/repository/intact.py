"""Whether all of a pack is as it should be: the short way of `verify`, for packs that are.

The headers of all records are compared with the pack's directory at once, and so are the index entries; what is left
to do for a record is to check its sums, to decode and to hash it. Whatever is not as it should be ends it with a no:
the long way (verify.py) is taken then, and names what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from snapcore.errors import DamagedError, UnsupportedFormatError
from snapcore.persist import Buffer
from snapcore.repository import codec, envelope, pack, record
from snapcore.repository.domain import ID_BYTES, PLAIN, Domain
from snapcore.repository.envelope import Kind
from snapcore.repository.objects import Objects
from snapcore.repository.record import HEADER_BYTES, UNIT_BYTES, Form, RecordKind
from snapcore.repository.table import Entries, Ids, Table, entry_ids
from snapcore.repository.tree import NODE_BYTES
from snapcore.store.interface import Reader

_HEADER = np.dtype(
    [
        ("magic", "S4"),
        ("kind", "u1"),
        ("codec", "u1"),
        ("form", "u1"),
        ("seal", "u1"),
        ("payload", "<u4"),
        ("plain", "<u4"),
        ("id", "V32"),
        ("checksum", "<u8"),
        ("check", "<u8"),
    ]
)
_CHECKED_BYTES = HEADER_BYTES - 8


# Codec, payload, length after decoding, id.
_Payload = tuple[int, Buffer, int, bytes]


class Content(NamedTuple):
    """What lies in a pack: records, and the bytes of the chunks among them after decoding."""

    records: int
    plain_bytes: int


class Intact:
    """Looks through packs; safe on many threads at once. The bases of patches are read from their own packs."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._domain = objects.domain
        self._sizes = {RecordKind.CHUNK: objects.chunk_bytes, RecordKind.NODE: NODE_BYTES}

    def __call__(self, data: bytes, stored: Reader, pack_id: bytes, named: Sequence[Entries]) -> Content | None:
        """What lies in a pack that is all right; None for any other.

        Parameters
        ----------
        data : bytes
            The whole pack.
        stored : Reader
            The same, as a store.
        named : sequence of structured arrays of dtype ENTRY
            What the index says of the pack.
        """
        try:
            directory = opened(data, stored, pack_id, self._domain)
            rows = directory.entries[np.argsort(directory.entries["offset"])]
            if not _are_all(data, rows, self._domain) or not all(_are_among(entries, rows) for entries in named):
                return None
            for kind in self._sizes:
                part = rows[rows["kind"] == kind]
                full = part["form"] == Form.FULL
                if not self._are_full(data, part[full], kind):
                    return None
                if not self._are_patches(data, part[~full], kind, directory.bases):
                    return None
        except (DamagedError, UnsupportedFormatError):
            return None
        return Content(len(rows), int((rows["kind"] == RecordKind.CHUNK).sum()) * self._objects.chunk_bytes)

    def _are_full(self, data: bytes, rows: Entries, kind: RecordKind) -> bool:
        """Whether all these records hold what their ids say."""
        identify, size_bytes = self._objects.identify, self._sizes[kind]
        for how, payload, plain_bytes, record_id in _payloads(data, rows, self._domain):
            if plain_bytes != size_bytes or identify(kind, codec.decode(how, payload, plain_bytes)) != record_id:
                return False
        return True

    def _are_patches(self, data: bytes, rows: Entries, kind: RecordKind, bases: Ids) -> bool:
        """Whether all these patches, with the bases that the directory names, make what their ids say."""
        unit_bytes = UNIT_BYTES[kind]
        limit_bytes = record.patch_limit_bytes(self._sizes[kind], unit_bytes)
        if (rows["plain"] > limit_bytes).any():
            return False
        resting: dict[int, list[_Payload]] = {}
        for base, item in zip(rows["base"].tolist(), _payloads(data, rows, self._domain), strict=True):
            resting.setdefault(base, []).append(item)
        places = list(resting)
        for number, base in self._objects.full(kind, bases[places]):
            if isinstance(base, DamagedError):
                return False
            base_id = bases[places[number]].tobytes()
            for how, payload, plain_bytes, record_id in resting[places[number]]:
                patch = codec.decode(how, payload, plain_bytes)
                if record.patch_base(patch, "") != base_id:
                    return False
                if self._objects.identify(kind, record.apply_patch(patch, base, unit_bytes, "")) != record_id:
                    return False
        return True


def opened(data: bytes, stored: Reader, pack_id: bytes, domain: Domain = PLAIN) -> Table:
    """The directory of a pack whose frame is right; DamagedError, UnsupportedFormatError for any other."""
    name = pack.name(pack_id, domain)
    kind, _, body_bytes = envelope.check_header(data, name, pack_id, domain)
    envelope.expect(kind, Kind.PACK, name)
    if body_bytes:
        raise DamagedError(f"{name}: its header gives a length of {body_bytes} bytes")
    return pack.read_directory(stored, pack_id, len(data), domain)


def _are_all(data: bytes, rows: Entries, domain: Domain) -> bool:
    """Whether records as in these rows, in the order of their places, fill a pack up to its directory."""
    ends = rows["offset"].astype(np.int64) + rows["stored"]
    # Where the directory begins: the second field of the footer.
    end = int.from_bytes(data[-pack.FOOTER_BYTES :][8:16], "little")
    places = np.concatenate(([envelope.HEADER_BYTES], ends))
    if (places[:-1] != rows["offset"]).any() or places[-1] != end:
        return False
    headers = _headers(data, rows)
    right = (
        (headers["magic"] == b"SREC")
        & (headers["seal"] == (domain.sealing is not None))
        & (headers["payload"] == rows["stored"] - HEADER_BYTES)
        & (headers["id"] == entry_ids(rows))
    )
    for field in ("kind", "form", "codec", "plain"):
        right &= headers[field] == rows[field]
    checked = headers.tobytes()
    sums = [xxhash.xxh3_64_intdigest(checked[at : at + _CHECKED_BYTES]) for at in range(0, len(checked), HEADER_BYTES)]
    return bool(right.all()) and headers["check"].tolist() == sums


def _headers(data: bytes, rows: Entries) -> Entries:
    """The headers of records: structured array of dtype _HEADER."""
    places = rows["offset"].astype(np.int64)[:, np.newaxis] + np.arange(HEADER_BYTES)
    headers: Entries = np.frombuffer(data, dtype=np.uint8)[places].view(_HEADER)[:, 0]
    return headers


def _are_among(entries: Entries, rows: Entries) -> bool:
    """Whether index entries say of records what these rows, in the order of their places, say."""
    if len(rows) == 0:
        return len(entries) == 0
    found = rows[np.minimum(np.searchsorted(rows["offset"], entries["offset"]), len(rows) - 1)]
    right = entry_ids(entries) == entry_ids(found)
    for field in ("offset", "kind", "form", "stored", "plain"):
        right &= entries[field] == found[field]
    return bool(right.all())


def _payloads(data: bytes, rows: Entries, domain: Domain) -> Iterator[_Payload]:
    """The payload of each record, opened; DamagedError where it does not match its checksum or does not open."""
    view = memoryview(data)
    sealing = domain.sealing
    checksums = _headers(data, rows)["checksum"].tolist()
    ids = entry_ids(rows).tobytes()
    fields = zip(
        rows["offset"].tolist(), rows["stored"].tolist(), rows["plain"].tolist(), rows["codec"].tolist(), strict=True
    )
    for number, (offset, stored, plain_bytes, how) in enumerate(fields):
        payload: Buffer = view[offset + HEADER_BYTES : offset + stored]
        if xxhash.xxh3_64_intdigest(payload) != checksums[number]:
            raise DamagedError("a payload does not match its checksum")
        if sealing is not None:
            payload = sealing.open_record(payload, data[offset : offset + record.BOUND_BYTES] + domain.id)
        yield how, payload, plain_bytes, ids[number * ID_BYTES : (number + 1) * ID_BYTES]
