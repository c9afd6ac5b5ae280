"""A pool with a disk, and servers for it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from snapcore.pool import Disk, Pool
from snapcore.server import NbdServer
from tests.support.nbd import SIZE_BYTES, Serve, Served
from tests.support.pools import MIB, quick_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, with a short path: that of a socket has 107 bytes at most."""
    found = quick_folder()
    yield found
    shutil.rmtree(found)


@pytest.fixture
def pool(folder: Path) -> Iterator[Pool]:
    with Pool.create(folder / "pool") as made:
        yield made


@pytest.fixture
def disk(pool: Pool) -> Disk:
    """Data in its second and fourth MiB, of which the snapshot `one` has only the first."""
    made = pool.create_disk("web", SIZE_BYTES)
    made.pwrite(random.Random(1).randbytes(MIB), MIB)
    made.snapshot("one")
    made.pwrite(random.Random(2).randbytes(MIB // 2), 3 * MIB)
    return made


@pytest.fixture
def serve(folder: Path, pool: Pool) -> Iterator[Serve]:
    """Starts a server for the pool; all are stopped at the end of the test."""
    with ExitStack() as servers:

        def start(**options: Any) -> Served:
            path = folder / f"nbd-{len(list(folder.iterdir()))}"
            events: list[Any] = []
            options = {"pool": pool, "listen": [f"unix:{path}"], "on_event": events.append} | options
            return Served(servers.enter_context(NbdServer(**options)), path, events)

        yield start
