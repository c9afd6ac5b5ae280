"""Fuzzes the NBD server: sessions that are right but for some changes, on real sockets, several at once.

    python bench/fuzz/nbd.py --seconds 600 [--seed N] [--only ITERATION]

Under AddressSanitizer: `bench/sanitize.sh --fuzz nbd --seconds 600`.

A finding is a server that dies, a thread that raises, a session that does not end when its client has, or a
well-behaved client that reads other bytes of a snapshot than there are.
"""

from __future__ import annotations

import faulthandler
import os
import random
import shutil
import socket
import struct
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

import frame

from snapcore.pool import Pool
from snapcore.server import NbdServer
from snapcore.server.nbd.protocol import Option
from tests.support.nbd import BOTH, SIZE_BYTES, Peer, contexts, eventually, flags, go, option
from tests.support.pools import check_space

_EXPORTS = ("web", "@one", "web@one", "web@one?cow", "web@one?cow=x", "over", "raw", "", "nothing")
_CONTEXTS = ("base:allocation", "snapcore:changed:one", "snapcore:", "base:", "snapcore:changed:", "qemu:x", "")
_SMALL = (0, 1, 511, 512, 4095, 4096, 4097, 65535, 65536, 1 << 20, 1 << 25, (1 << 25) + 1, 1 << 31, (1 << 32) - 1)
_NUMBERS = (*_SMALL, SIZE_BYTES - 1, SIZE_BYTES, SIZE_BYTES + 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def options_of(dice: random.Random, name: str) -> tuple[list[bytes], bool]:
    """The options of a session, and whether they ask for extended headers."""
    parts = [flags(dice.choice((BOTH, BOTH, BOTH, 1, 0, 7)))]
    extended = False
    for _ in range(dice.randrange(5)):
        kind = dice.randrange(7)
        if kind == 0:
            parts.append(option(Option.STRUCTURED_REPLY))
        elif kind == 1:
            parts.append(option(Option.EXTENDED_HEADERS))
            extended = True
        elif kind == 2:
            parts.append(option(Option.LIST))
        elif kind == 3:
            wanted = dice.choices(_CONTEXTS, k=dice.randrange(4))
            number = dice.choice((Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT))
            parts.append(contexts(dice.choice((name, *_EXPORTS)), *wanted, number=number))
        elif kind == 4:
            parts.append(go(name, *range(dice.randrange(5)), number=Option.INFO))
        elif kind == 5:
            parts.append(option(dice.randrange(20), dice.randbytes(dice.randrange(40))))
        else:
            length = dice.choice(_SMALL)
            parts.append(option(dice.choice((1, 3, 6, 7, 10)), b"x" * dice.choice((0, 9)), length=length))
    if dice.random() < 0.1:
        parts.append(option(Option.EXPORT_NAME, name.encode()))
    else:
        parts.append(go(name, *range(dice.randrange(4))))
    return parts, extended


def request(dice: random.Random, *, extended: bool) -> bytes:
    """A request, mostly one that can be."""
    kind = dice.choice((0, 0, 1, 1, 3, 4, 5, 6, 7, 7, 8, 99)) if dice.random() < 0.98 else 2
    wild = dice.random() < 0.2
    offset = dice.choice(_NUMBERS) if wild else dice.randrange(SIZE_BYTES)
    length = dice.choice(_NUMBERS) if wild else dice.choice((1, 512, 4096, 10000, 70000, 300000))
    mark = dice.randrange(64) if dice.random() < 0.3 else dice.choice((0, 0, 1))
    data = b""
    if kind == 1:
        length = min(length, 400_000) if dice.random() < 0.95 else length
        data = bytes(min(length, 400_000))
        mark |= 32 if extended else 0
    if extended:
        return struct.pack(">IHHQQQ", 0x21E41C71, mark, kind, dice.getrandbits(64), offset, length) + data
    return struct.pack(">IHHQQI", 0x25609513, mark, kind, dice.getrandbits(64), offset, length & 0xFFFFFFFF) + data


def changed(dice: random.Random, parts: list[bytes]) -> bytes:
    """All parts together, after some changes."""
    for _ in range(dice.choice((0, 0, 1, 1, 2, 4))):
        place = dice.randrange(len(parts))
        part = bytearray(parts[place])
        how = dice.randrange(7)
        if how == 0 and part:
            part[dice.randrange(min(len(part), 64))] ^= 1 << dice.randrange(8)
        elif how == 1 and len(part) >= 8:
            at = dice.randrange(min(len(part) - 7, 40))
            part[at : at + 8] = dice.choice(_NUMBERS).to_bytes(8)
        elif how == 2:
            part = part[: dice.randrange(len(part) + 1)]
        elif how == 3:
            part += dice.randbytes(dice.randrange(40))
        elif how == 4:
            part = part * 2
        elif how == 5:
            other = dice.randrange(len(parts))
            parts[place], parts[other] = parts[other], parts[place]
            continue
        else:
            part = bytearray()
        parts[place] = bytes(part)
    return b"".join(parts)


class Target:
    """A server that lives through all iterations."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "image").write_bytes(random.Random(1).randbytes(SIZE_BYTES // 2))
        shutil.copy(folder / "image", folder / "raw")
        self.pool = Pool.create(folder / "pool")
        web = self.pool.create_disk("web", SIZE_BYTES)
        web.pwrite(random.Random(2).randbytes(SIZE_BYTES // 4), 4096)
        self.one = web.snapshot("one")
        self.truth = self.one.pread(SIZE_BYTES, 0)
        self.pool.create_disk("over", source=folder / "image", size_bytes=SIZE_BYTES)
        self.path = folder / "socket"
        self.server = NbdServer(
            self.pool,
            listen=[f"unix:{self.path}"],
            images={"raw": folder / "raw"},
            handshake_timeout_s=2,
            idle_timeout_s=2,
            request_timeout_s=5,
        )
        self.server.start()
        self.raised: list[str] = []
        threading.excepthook = lambda found: self.raised.append(f"{found.exc_type.__name__}: {found.exc_value}")

    def attack(self, dice: random.Random) -> str:
        """One session. Returns how it ended."""
        name = dice.choice(_EXPORTS)
        parts, extended = options_of(dice, name)
        parts += [request(dice, extended=extended) for _ in range(dice.randrange(12))]
        data = changed(dice, parts)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(5)
            peer.connect(str(self.path))
            try:
                while data:
                    # In pieces, as a network may; what comes back is taken, or not.
                    piece = dice.choice((len(data), len(data), 1, 7, 100))
                    peer.sendall(data[:piece] if len(data) < 2000 else data)
                    data = data[piece:] if len(data) < 2000 else b""
                    if dice.random() < 0.05:
                        return "left in the middle"
                if dice.random() < 0.3:
                    return "left without looking"
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(1 << 16):
                    pass
            except (TimeoutError, OSError) as error:
                return type(error).__name__
        return "heard to the end"

    def check(self, dice: random.Random) -> None:
        """A client that behaves is served, and the snapshot is what it was."""
        with Peer(self.path) as peer:
            if peer.enter("@one") != SIZE_BYTES:
                raise AssertionError("the snapshot has another size")
            offset = dice.randrange(SIZE_BYTES - 70_000)
            if peer.read(offset, 70_000) != self.truth[offset : offset + 70_000]:
                raise AssertionError("the snapshot reads other bytes")
        if self.raised:
            raise AssertionError(f"a thread raised: {self.raised.pop()}")

    def iteration(self, dice: random.Random) -> Counter[str]:
        """A few sessions side by side, then a look at the server."""
        outcomes: Counter[str] = Counter()
        seeds = [dice.getrandbits(64) for _ in range(4)]
        threads = [
            threading.Thread(target=lambda seed=seed: outcomes.update([self.attack(random.Random(seed))]))
            for seed in seeds
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.check(dice)
        eventually(lambda: self.server.connections == 0)
        return outcomes

    def close(self) -> None:
        """The end: the pool is whole."""
        self.server.stop()
        self.pool.close()
        with Pool.open(self.folder / "pool") as again:
            check_space(again)
            if again.snapshot("one").pread(SIZE_BYTES, 0) != self.truth:
                raise AssertionError("the snapshot reads other bytes at the end")


def main() -> None:
    options = frame.parser(__doc__).parse_args()
    faulthandler.enable()
    memory = "/dev/shm"
    folder = Path(tempfile.mkdtemp(prefix="snapcore-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        target = Target(folder)
        findings = frame.run(target.iteration, options)
        target.close()
        if findings:
            sys.exit(1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
