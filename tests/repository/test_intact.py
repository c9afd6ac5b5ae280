"""The short way of a verification says what the long way says, and every pack that is all right goes the short way."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore import Repository, Verified
from snapcore.repository import pack
from snapcore.repository.intact import Content, Intact
from snapcore.repository.record import HEADER_BYTES
from tests.support import forge
from tests.support.forge import Objects, store_of
from tests.support.small import Small, make_small

MADE = {"plain": make_small(4096, 12, "none"), "patched": make_small(8192, 12), "wide": make_small(65536, 4, "zstd")}


def _verified(objects: Objects) -> tuple[Verified, list[Content | None]]:
    """What a verification finds, and what the short way says of each pack."""
    said = []
    with pytest.MonkeyPatch.context() as patched:
        short = Intact.__call__

        def listen(*arguments: object) -> Content | None:
            said.append(short(*arguments))  # type: ignore[arg-type]
            return said[-1]

        patched.setattr(Intact, "__call__", listen)
        return replace(Repository.open(store_of(objects)).verify(), duration_s=0.0), said


def _verified_the_long_way(objects: Objects) -> Verified:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Intact, "__call__", lambda *_: None)
        return replace(Repository.open(store_of(objects)).verify(), duration_s=0.0)


def _same(a: Verified, b: Verified) -> bool:
    """Whether two verifications found the same; extents are arrays, and each store in memory has a name of its own."""
    hits = [
        [(hit.snapshot, hit.disk, hit.ranges.tolist()) for hit in sorted(each.hits, key=lambda hit: hit.snapshot)]
        for each in (a, b)
    ]
    problems = [
        [(problem.where, re.sub("memory:[0-9a-f]+", "", problem.what)) for problem in each.problems] for each in (a, b)
    ]
    rest = [replace(each, hits=[], problems=[]) for each in (a, b)]
    return hits[0] == hits[1] and problems[0] == problems[1] and rest[0] == rest[1]


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_a_repository_that_is_all_right_goes_the_short_way(made: Small) -> None:
    found, said = _verified(made.objects)
    assert found.ok and len(said) == found.packs and None not in said
    assert _same(found, _verified_the_long_way(made.objects))


@given(
    st.sampled_from(sorted(MADE)),
    st.integers(0, 1 << 30),
    st.sampled_from(["anywhere", "head", "tail"]),
    st.integers(0, 1 << 20),
    st.integers(1, 255),
)
def test_damage_is_told_alike_on_both_ways(kind: str, which: int, part: str, place: int, pattern: int) -> None:
    objects = dict(MADE[kind].objects)
    names = forge.names(objects, "packs/")
    name = names[which % len(names)]
    data = bytearray(objects[name])
    # Heads and tails of packs are short and full of fields: they shall not be hit by chance only.
    if part == "head":
        offset = place % (3 * HEADER_BYTES)
    elif part == "tail":
        offset = len(data) - 1 - place % (pack.FOOTER_BYTES + 300)
    else:
        offset = place % len(data)
    data[offset] ^= pattern
    objects[name] = bytes(data)
    found, said = _verified(objects)
    assert _same(found, _verified_the_long_way(objects))
    assert found.ok == (None not in said)


@given(st.sampled_from(sorted(MADE)), st.integers(0, 1 << 30), st.integers(0, 1 << 20))
def test_a_pack_that_was_cut_is_told_alike_on_both_ways(kind: str, which: int, length: int) -> None:
    objects = dict(MADE[kind].objects)
    names = forge.names(objects, "packs/")
    name = names[which % len(names)]
    objects[name] = objects[name][: length % len(objects[name])]
    found, _ = _verified(objects)
    assert not found.ok
    assert _same(found, _verified_the_long_way(objects))


def test_a_pack_that_the_index_says_too_much_of_is_told_alike_on_both_ways() -> None:
    objects = dict(MADE["patched"].objects)
    name = forge.names(objects, "packs/")[0]
    pack_id = bytes.fromhex(name.removeprefix("packs/"))
    objects[name] = forge.packed([], pack_id)[0]
    found, said = _verified(objects)
    assert not found.ok and None in said
    assert _same(found, _verified_the_long_way(objects))
