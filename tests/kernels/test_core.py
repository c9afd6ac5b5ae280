"""The state that kernels share says what has failed, with numbers that mean one thing each."""

from __future__ import annotations

import errno

import pytest

from snapcore import core, log, pages
from snapcore.core import DETACHED, STOPPED
from snapcore.pages import Failure
from snapcore.volume import Volume
from tests.support.cores import new_core


def test_a_result_has_one_meaning() -> None:
    results = [
        value
        for module in (pages, core)
        for name, value in vars(module).items()
        if not name.startswith("_") and type(value) is int and value < 0
    ]
    assert len(results) > 15 and sorted(results) == [*range(-len(results), 0)]


def test_a_core_that_was_stopped_commits_nothing_and_says_why() -> None:
    with new_core() as (stopped, _):
        log.append_event(stopped, b"event")
        stopped.stop(errno.EDQUOT)
        stopped.stop(errno.EIO)
        assert stopped.failed == errno.EDQUOT
        with pytest.raises(Failure) as failed:
            log.commit(stopped)
        assert (failed.value.result, failed.value.code) == (STOPPED, errno.EDQUOT)
        assert (stopped.commits, stopped.log_next) == (0, 0)


def test_a_core_that_was_closed_has_no_volumes() -> None:
    with new_core() as (closed, _):
        before = Volume(closed, root=0, parent=0, size_bytes=4096, version=1, writable=True)
        closed.close()
        after = Volume(closed, root=0, parent=0, size_bytes=4096, version=2, writable=True)
        for volume in (before, after):
            assert not volume.attached
            with pytest.raises(Failure) as failed:
                volume.pread_into(bytearray(1), 0)
            assert failed.value.result == DETACHED
