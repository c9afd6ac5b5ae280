"""`snapcore verify --dask ADDRESS` spreads over the workers of a cluster, and finds what it finds alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.support.command import Run


@pytest.mark.filterwarnings("default")
def test_workers_of_a_cluster_verify_what_this_host_would(run: Run, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    image = tmp_path / "disk.img"
    image.write_bytes(random.Random(1).randbytes(1 << 20))
    place = str(tmp_path / "repo")
    assert run("repo", "init", place)[0] == 0
    assert run("snapshot", "create", str(image), "--disk", "d", "-r", place)[0] == 0
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None, worker_dashboard_address=None
    ) as cluster:
        words = ("verify", "-r", place, "--json", "--dask", cluster.scheduler_address)
        status, output, _ = run(*words)
        assert (status, json.loads(output)["ok"]) == (0, True)
        pack = max((tmp_path / "repo" / "packs").iterdir(), key=lambda path: path.stat().st_size)
        data = bytearray(pack.read_bytes())
        data[200] ^= 1
        pack.write_bytes(data)
        status, output, _ = run(*words)
        assert (status, json.loads(output)["ok"]) == (1, False)
