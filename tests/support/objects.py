"""Strategies for ids, records and tables."""

from __future__ import annotations

from hypothesis import strategies as st

from snapcore.repository.codec import Codec
from snapcore.repository.record import Form, Record, RecordKind
from snapcore.repository.table import TableBuilder

Noted = tuple[Record, bytes, int]

# Few keys and few rests: ids that are the same in their first 8 bytes are common.
_keys = st.sampled_from([bytes(8), b"\xff" * 8, *(bytes([number]) + bytes(7) for number in range(1, 12))])
_rests = st.sampled_from([bytes(23) + b"\1", b"\xff" * 24, *(bytes([number]) * 24 for number in range(1, 5))])
ids = st.one_of(st.builds(bytes.__add__, _keys, _rests), st.binary(min_size=32, max_size=32))
pack_ids = st.sampled_from([bytes([number]) * 16 for number in range(5)])
kinds = st.sampled_from([RecordKind.CHUNK, RecordKind.NODE])


@st.composite
def records(draw: st.DrawFn, record_ids: st.SearchStrategy[bytes] = ids) -> Record:
    """A record as a table sees it: the payload is of no matter."""
    base = draw(st.one_of(st.none(), ids))
    return Record(
        draw(kinds),
        Form.FULL if base is None else Form.PATCH,
        draw(record_ids),
        b"",
        bytes(draw(st.integers(0, 100))),
        draw(st.sampled_from(Codec)),
        draw(st.integers(0, 1 << 20)),
        base,
    )


@st.composite
def noted(draw: st.DrawFn, most: int = 12) -> list[Noted]:
    """Records at places: one record a place, one id at several places."""
    places = draw(st.lists(st.tuples(pack_ids, st.integers(0, 2**32 - 1)), max_size=most, unique=True))
    return [(draw(records()), pack, offset) for pack, offset in places]


def built(rows: list[Noted]) -> TableBuilder:
    """A builder with these rows."""
    builder = TableBuilder()
    for item, pack, offset in rows:
        builder.add(item, pack, offset)
    return builder
