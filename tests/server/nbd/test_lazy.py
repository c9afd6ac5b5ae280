"""A disk from a snapshot in a region is served while it fills up: a request that must wait holds up no other."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapcore.pool import Pool
from snapcore.server import NbdServer
from tests.support.lazy_regions import Regions
from tests.support.nbd import Peer
from tests.support.nbd_client import READ, WRITE, Client
from tests.support.pools import BLOCK_BYTES, MIB, quick_folder

DATA = random.Random(1).randbytes(4 * MIB)


@pytest.fixture
def regions() -> Iterator[Regions]:
    made = Regions()
    yield made
    made.go_on.set()


@pytest.fixture
def client(regions: Regions) -> Iterator[Client]:
    folder = quick_folder()
    address = folder / "nbd"
    with Pool.create(folder / "pool", regions=regions) as pool:
        pool.create_disk("web", source=regions.put("one", DATA))
        with NbdServer(pool, listen=[f"unix:{address}"]), Peer(Path(address)) as peer:
            assert peer.enter("web") == len(DATA)
            yield Client(peer.socket, structured=False, extended=False)
    shutil.rmtree(folder)


def test_what_is_read_is_fetched(client: Client, regions: Regions) -> None:
    assert client.wait(client.send(READ, MIB + 7, 100)).data == DATA[MIB + 7 : MIB + 107]
    assert regions.reads == [(MIB, MIB)]
    assert client.wait(client.send(WRITE, 3 * MIB + 1, 4, data=b"part")).error == 0
    assert client.wait(client.send(READ, 3 * MIB, BLOCK_BYTES)).data == (
        DATA[3 * MIB : 3 * MIB + 1] + b"part" + DATA[3 * MIB + 5 : 3 * MIB + BLOCK_BYTES]
    )


def test_a_request_that_waits_for_the_region_holds_up_no_other(client: Client, regions: Regions) -> None:
    regions.stalled = {(2 * MIB, 3 * MIB)}
    stuck = [client.send(READ, 2 * MIB + number * BLOCK_BYTES, BLOCK_BYTES) for number in range(3)]
    assert client.wait(client.send(READ, 0, 10)).data == DATA[:10]
    assert client.wait(client.send(WRITE, 2 * MIB, BLOCK_BYTES, data=bytes(BLOCK_BYTES))).error == 0
    regions.go_on.set()
    answers = [client.wait(cookie) for cookie in stuck]
    assert [answer.error for answer in answers] == [0, 0, 0]
    assert answers[1].data == DATA[2 * MIB + BLOCK_BYTES : 2 * MIB + 2 * BLOCK_BYTES]


def test_a_region_that_fails_is_an_error_of_that_request_alone(client: Client, regions: Regions) -> None:
    regions.failing = True
    assert client.wait(client.send(READ, 0, 10)).error == errno.EIO
    regions.failing = False
    assert client.wait(client.send(READ, 0, 10)).data == DATA[:10]
