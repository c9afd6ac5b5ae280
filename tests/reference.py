"""The plain-Python twin of each kernel: slow, obvious, and what the kernels are compared with.

`xxh64` follows the xxHash specification (doc/xxhash_spec.md, "XXH64 algorithm description") step by step.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise

_MASK = (1 << 64) - 1
_PRIME_1 = 0x9E3779B185EBCA87
_PRIME_2 = 0xC2B2AE3D27D4EB4F
_PRIME_3 = 0x165667B19E3779F9
_PRIME_4 = 0x85EBCA77C2B2AE63
_PRIME_5 = 0x27D4EB2F165667C5


def blocks(data: bytes, block_bytes: int) -> Iterator[bytes]:
    """The blocks of a buffer; the last one may be short."""
    for start in range(0, len(data), block_bytes):
        yield data[start : start + block_bytes]


def zero_mask(data: bytes, block_bytes: int) -> list[int]:
    """1 where a block is all zero."""
    return [int(not any(block)) for block in blocks(data, block_bytes)]


def differing_mask(a: bytes, b: bytes, block_bytes: int) -> list[int]:
    """1 where the blocks of two buffers of one length differ."""
    pairs = zip(blocks(a, block_bytes), blocks(b, block_bytes), strict=True)
    return [int(block_a != block_b) for block_a, block_b in pairs]


def same_bytes(a: bytes, b: bytes) -> bool:
    """Whether two buffers hold the same bytes."""
    return a == b


def extents(mask: list[int], wanted: int, block_bytes: int, size_bytes: int, offset: int) -> list[list[int]]:
    """Runs of `wanted` in a mask as [offset, length] in bytes, the last one cut at the end of the buffer."""
    rows: list[list[int]] = []
    for number, value in enumerate(mask):
        if value != wanted:
            continue
        start = number * block_bytes
        length = min(block_bytes, size_bytes - start)
        if rows and sum(rows[-1]) == offset + start:
            rows[-1][1] += length
        else:
            rows.append([offset + start, length])
    return rows


def zero_extents(data: bytes, block_bytes: int, offset: int = 0) -> list[list[int]]:
    """Runs of zero blocks."""
    return extents(zero_mask(data, block_bytes), 1, block_bytes, len(data), offset)


def nonzero_extents(data: bytes, block_bytes: int, offset: int = 0) -> list[list[int]]:
    """Runs of blocks that are not all zero."""
    return extents(zero_mask(data, block_bytes), 0, block_bytes, len(data), offset)


def differing_extents(a: bytes, b: bytes, block_bytes: int, offset: int = 0) -> list[list[int]]:
    """Runs of blocks in which two buffers differ."""
    return extents(differing_mask(a, b, block_bytes), 1, block_bytes, len(a), offset)


def differing_in_files(a: bytes, b: bytes, offset: int, size_bytes: int, block_bytes: int) -> list[list[int]]:
    """Runs of blocks in which a range of two files differs, whose bytes these are."""
    stop = offset + size_bytes
    return differing_extents(a[offset:stop], b[offset:stop], block_bytes, offset)


def _rotate_left(value: int, bits: int) -> int:
    return (value << bits | value >> (64 - bits)) & _MASK


def _round(accumulator: int, lane: int) -> int:
    return _rotate_left((accumulator + lane * _PRIME_2) & _MASK, 31) * _PRIME_1 & _MASK


def _merge_accumulator(accumulator: int, lane: int) -> int:
    return ((accumulator ^ _round(0, lane)) * _PRIME_1 + _PRIME_4) & _MASK


def xxh64(data: bytes, seed: int = 0) -> int:
    """XXH64 of a buffer."""
    # Steps 1 to 3: four accumulators take stripes of 32 bytes and converge; short inputs skip them.
    stripes_bytes = len(data) // 32 * 32
    if len(data) < 32:
        accumulator = (seed + _PRIME_5) & _MASK
    else:
        lanes = [seed + _PRIME_1 + _PRIME_2, seed + _PRIME_2, seed, seed - _PRIME_1]
        for start in range(0, stripes_bytes, 8):
            number = start // 8 % 4
            lanes[number] = _round(lanes[number] & _MASK, int.from_bytes(data[start : start + 8], "little"))
        accumulator = sum(map(_rotate_left, lanes, (1, 7, 12, 18))) & _MASK
        for lane in lanes:
            accumulator = _merge_accumulator(accumulator, lane)
    # Step 4: the length. Step 5: what is left, in lanes of 8, of 4 and of single bytes.
    accumulator = (accumulator + len(data)) & _MASK
    rest = data[stripes_bytes:]
    while len(rest) >= 8:
        accumulator ^= _round(0, int.from_bytes(rest[:8], "little"))
        accumulator = (_rotate_left(accumulator, 27) * _PRIME_1 + _PRIME_4) & _MASK
        rest = rest[8:]
    if len(rest) >= 4:
        accumulator ^= int.from_bytes(rest[:4], "little") * _PRIME_1 & _MASK
        accumulator = (_rotate_left(accumulator, 23) * _PRIME_2 + _PRIME_3) & _MASK
        rest = rest[4:]
    for byte in rest:
        accumulator ^= byte * _PRIME_5 & _MASK
        accumulator = _rotate_left(accumulator, 11) * _PRIME_1 & _MASK
    # Step 6: the avalanche.
    accumulator = (accumulator ^ accumulator >> 33) * _PRIME_2 & _MASK
    accumulator = (accumulator ^ accumulator >> 29) * _PRIME_3 & _MASK
    return accumulator ^ accumulator >> 32


def xxh64_blocks(data: bytes, block_bytes: int, seed: int = 0) -> list[int]:
    """XXH64 of each block."""
    return [xxh64(block, seed) for block in blocks(data, block_bytes)]


def read_blocks(data: bytes, offset: int, size_bytes: int, block_bytes: int, seed: int) -> list[tuple[int, bool]]:
    """XXH64 of each block of a range of a file that holds `data`, and whether it is zero; the last one is filled up."""
    whole = (block.ljust(block_bytes, b"\0") for block in blocks(data[offset : offset + size_bytes], block_bytes))
    return [(xxh64(block, seed), not any(block)) for block in whole]


def lz4_hash(data: bytes, at: int) -> int:
    """Fourteen bits of the six bytes at a place."""
    word = int.from_bytes(data[at : at + 6], "little")
    return ((word << 16) * 227718039650203 & _MASK) >> 50


def lz4_sequence(literals: bytes, distance: int, length: int) -> bytes:
    """One sequence of an LZ4 block; without a match where `length` is zero."""
    short, match = min(len(literals), 15), min(max(length - 4, 0), 15)
    out = bytes([short << 4 | match])
    if short == 15:
        out += b"\xff" * ((len(literals) - 15) // 255) + bytes([(len(literals) - 15) % 255])
    out += literals
    if length:
        out += distance.to_bytes(2, "little")
        if match == 15:
            out += b"\xff" * ((length - 19) // 255) + bytes([(length - 19) % 255])
    return out


def lz4_matches(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(place, distance, length) of the matches that the encoder takes."""
    places: dict[int, int] = {}
    at, anchor, last = 1, 0, len(data) - 16

    def seen(place: int) -> int:
        """The latest place before with the same hash, or 0; this one is noted."""
        number = lz4_hash(data, place)
        found = places.get(number, 0)
        places[number] = place
        return found

    while True:
        tries, ahead = 128, at + 1
        while True:
            if ahead > last:
                return
            match = seen(at)
            if data[match : match + 6] == data[at : at + 6]:
                break
            at, ahead, tries = ahead, ahead + (tries >> 6), tries + 1
        while at > anchor and match > 0 and data[at - 1] == data[match - 1]:
            at, match = at - 1, match - 1
        while True:
            length = 6
            while at + length < len(data) - 5 and data[at + length] == data[match + length]:
                length += 1
            yield at, at - match, length
            at += length
            anchor = at
            if at > last:
                return
            seen(at - 2)
            match = seen(at)
            if data[match : match + 6] != data[at : at + 6]:
                break
        at += 1
        if at > last:
            return


def lz4_packed(data: bytes) -> bytes:
    """The LZ4 block that the kernel makes of at most 65,536 bytes."""
    out, done = b"", 0
    for at, distance, length in lz4_matches(data):
        out += lz4_sequence(data[done:at], distance, length)
        done = at + length
    return out + lz4_sequence(data[done:], 0, 0)


def pack_blocks(many: list[bytes], gain_divisor: int) -> list[bytes | None]:
    """The LZ4 block of each, None where it gains too little."""
    packed = [(data, lz4_packed(data)) for data in many]
    return [block if len(block) <= len(data) - len(data) // gain_divisor else None for data, block in packed]


def is_packed(packed: bytes, data: bytes) -> bool:
    """Whether an LZ4 block decodes to `data`."""
    return lz4_unpacked(packed) == data


def lz4_unpacked(packed: bytes) -> bytes | None:
    """What an LZ4 block decodes to; None where it is none."""
    out = bytearray()
    rest = iter(packed)

    def long(length: int) -> int:
        if length < 15:
            return length
        while True:
            more = next(rest)
            length += more
            if more < 255:
                return length

    try:
        while True:
            token = next(rest)
            count = long(token >> 4)
            literals = bytes(islice(rest, count))
            if len(literals) < count:
                return None
            out += literals
            low = next(rest, None)
            if low is None:
                return bytes(out)
            distance = low | next(rest) << 8
            length = long(token & 15) + 4
            if not 0 < distance <= len(out):
                return None
            for _ in range(length):
                out.append(out[-distance])
    except StopIteration:
        return None


# The pool's trees

Run = tuple[int, int, int]
# What is mapped, in order: (position, count, entry); 1 for zeros, 2 for what is lost, else the first of consecutive
# blocks. Never two that could be one.
Tree = tuple[Run, ...]

POSITIONS = 1 << 35
_PAGE_BYTES = 1024


def _joined(runs: Iterable[Run]) -> Tree:
    """Runs in order as a tree: those that continue the one before are put together."""
    out: list[Run] = []
    for first, count, entry in runs:
        if out and first == sum(out[-1][:2]) and entry == _entry_in(out[-1], first):
            out[-1] = (out[-1][0], out[-1][1] + count, out[-1][2])
        elif count and entry:
            out.append((first, count, entry))
    return tuple(out)


def _entry_in(run: Run, position: int) -> int:
    """What a run holds at a position, or would hold behind its end."""
    return run[2] if run[2] <= 2 else run[2] + position - run[0]


def _cut(tree: Tree, first: int, last: int) -> Tree:
    """What a tree holds from `first` up to `last`."""
    parts = ((run, max(first, run[0]), min(last, run[0] + run[1])) for run in tree)
    return tuple((start, stop - start, _entry_in(run, start)) for run, start, stop in parts if start < stop)


def _aligned(trees: Sequence[Tree], first: int, last: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(position, count, what each tree holds at the position), at every border of any of their runs."""
    edges = {first, last}
    for tree in trees:
        for start, count, _ in _cut(tree, first, last):
            edges |= {start, start + count}
    borders = sorted(edges)
    parts = [deque(_cut(tree, first, last)) for tree in trees]
    for start, stop in pairwise(borders):
        held = []
        for part in parts:
            while part and sum(part[0][:2]) <= start:
                part.popleft()
            held.append(_entry_in(part[0], start) if part and part[0][0] <= start else 0)
        yield start, stop - start, tuple(held)


class PageFile:
    """Pages of the pool that are no trees', kept as what they hold."""

    def __init__(self) -> None:
        self._others: list[tuple[int, bytes]] = []

    def put(self, kind: int, payload: bytes) -> int:
        """A page with other bytes."""
        self._others.append((kind, payload))
        return len(self._others) - 1

    def get(self, kind: int, ref: int) -> bytes:
        """The bytes of such a page, with zeros behind them."""
        assert self._others[ref][0] == kind
        return self._others[ref][1].ljust(_PAGE_BYTES, b"\0")

    def stage(self, slot: int, seed: int, generation: int, kind: int, payload: bytes) -> bytes:
        """The bytes of a slot of the map file."""
        body = struct.pack("<Q", generation | kind << 56) + payload.ljust(_PAGE_BYTES, b"\0")
        return struct.pack("<Q", xxh64(body, (seed + slot) & _MASK)) + body


class Trees(PageFile):
    """Trees of the pool, kept as what they hold. A root is a tree itself."""

    def lookup(self, root: Tree, first: int, count: int) -> list[int]:
        """Entries of `count` positions."""
        out = [0] * count
        for start, length, entry in _cut(root, first, first + count):
            for at in range(start, start + length):
                out[at - first] = _entry_in((start, length, entry), at)
        return out

    def assign(self, root: Tree, parent: Tree, first: int, count: int, entry: int) -> tuple[Tree, set[int]]:
        """The tree with blocks mapped, and the blocks that it lost and the parent does not hold there."""
        now = _joined([*_cut(root, 0, first), (first, count, entry), *_cut(root, first + count, POSITIONS)])
        freed = set()
        for _, length, (was, is_now, beside) in _aligned([root, now, parent], first, first + count):
            if was > 2 and was not in (is_now, beside):
                freed |= set(range(was, was + length))
        return now, freed

    def fill(self, root: Tree, parent: Tree, first: int, count: int, entry: int) -> tuple[Tree, set[int]]:
        """The tree with a range absent or zero; and blocks, as for `assign`."""
        return self.assign(root, parent, first, count, entry)

    def difference(self, a: Tree, b: Tree, first: int, last: int, limit: int) -> tuple[list[tuple[int, int]], int]:
        """Runs of positions at which two trees differ, and where to go on."""
        out: list[tuple[int, int]] = []
        for start, count, (one, other) in _aligned([a, b], first, last):
            if one != other:
                if out and sum(out[-1]) == start:
                    out[-1] = (out[-1][0], out[-1][1] + count)
                elif len(out) == limit:
                    return out, start
                else:
                    out.append((start, count))
        return out, last

    def runs(self, root: Tree, first: int, last: int, limit: int) -> tuple[list[Run], int]:
        """What a tree maps, and where to go on."""
        out = _cut(root, first, last)
        return list(out[:limit]), out[limit][0] if len(out) > limit else last

    def tally(self, root: Tree) -> int:
        """How many blocks a tree holds."""
        return sum(count for _, count, entry in root if entry > 2)

    def exclusive(self, root: Tree, others: Sequence[Tree]) -> set[int]:
        """Blocks that a tree holds and no other holds at the same position."""
        out = set()
        for _, count, (mine, *theirs) in _aligned([root, *others], 0, POSITIONS):
            if mine > 2 and mine not in theirs:
                out |= set(range(mine, mine + count))
        return out

    def prune(self, root: Tree, others: Sequence[Tree]) -> Tree:
        """What of a tree others hold at the same position; zeros need not be kept, and are not."""
        return _joined(
            (start, count, mine)
            for start, count, (mine, *theirs) in _aligned([root, *others], 0, POSITIONS)
            if mine > 2 and mine in theirs
        )


def log_sectors(payload: bytes, first: int, commit: int, seed: int) -> list[bytes]:
    """The sectors of one commit (docs/FORMAT.md, "Log sector")."""
    parts = [payload[start : start + 488] for start in range(0, len(payload), 488)]
    sectors = []
    for number, part in enumerate(parts, first):
        last = number == first + len(parts) - 1
        body = struct.pack("<QIHH", number, commit % (1 << 32), len(part), last) + part.ljust(488, b"\0")
        sectors.append(struct.pack("<Q", xxh64(body, seed)) + body)
    return sectors


def read_sectors(data: bytes, seed: int) -> list[list[int]]:
    """State (0 zeros, 1 whole, 2 damaged), number, commit, used bytes and flags of each sector."""
    found = []
    for sector in blocks(data, 512):
        checksum, number, *rest = struct.unpack_from("<QqIHH", sector)
        state = 1 if checksum == xxh64(sector[8:], seed) else 2 if any(sector) else 0
        found.append([state, number, *rest])
    return found


class Presence:
    """A set of chunks that are here."""

    def __init__(self, size_bytes: int, chunk_bytes: int) -> None:
        self.chunks = -(-size_bytes // chunk_bytes)
        self.held: set[int] = set()

    @property
    def here(self) -> int:
        """How many."""
        return len(self.held)

    def add(self, first: int, count: int) -> None:
        """These are here."""
        self.held.update(range(first, first + count))

    def missing(self, first: int, count: int) -> list[list[int]]:
        """Runs of those that are not."""
        runs: list[list[int]] = []
        for chunk in range(first, min(first + count, self.chunks)):
            if chunk in self.held:
                continue
            if runs and sum(runs[-1]) == chunk:
                runs[-1][1] += 1
            else:
                runs.append([chunk, 1])
        return runs

    def to_bytes(self) -> bytes:
        """Bit by bit."""
        words = -(-self.chunks // 64)
        return sum(1 << chunk for chunk in self.held).to_bytes(words * 8, "little")

    def load(self, data: bytes) -> None:
        """Take the bits of `to_bytes`."""
        bits = int.from_bytes(data, "little")
        self.held = {chunk for chunk in range(self.chunks) if bits >> chunk & 1}
