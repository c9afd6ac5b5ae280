"""Work comes back in order, a bounded part of it is under way, and an error leaves no thread behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore.parallel import Daemons, executor_or_own, in_order, usable_cores


class FailedError(Exception):
    """What a piece of work fails with."""


@given(st.lists(st.integers(), max_size=50), st.integers(1, 8), st.one_of(st.none(), st.integers(1, 10)))
def test_results_come_in_the_order_of_the_pieces(pieces: list[int], threads: int, in_flight: int | None) -> None:
    with ThreadPoolExecutor(threads) as hands:
        assert list(in_order(hands, lambda piece: piece * 2, pieces, in_flight)) == [piece * 2 for piece in pieces]


def test_a_result_that_is_ready_early_waits_for_its_turn() -> None:
    last_is_done = threading.Event()

    def work(piece: int) -> int:
        if piece == 2:
            last_is_done.set()
        elif piece == 0:
            assert last_is_done.wait(60)
        return piece

    with ThreadPoolExecutor(3) as hands:
        assert list(in_order(hands, work, range(3), in_flight=3)) == [0, 1, 2]


class _Counting(Executor):
    """Runs nothing until it is asked for a result, and counts what was handed in and not yet fetched."""

    def __init__(self) -> None:
        self.waiting = 0
        self.most = 0

    def submit(self, function, /, *pieces):  # type: ignore[no-untyped-def]
        counter = self

        class Lazy(Future):  # type: ignore[type-arg]
            def result(self, timeout: float | None = None) -> object:
                del timeout
                counter.waiting -= 1
                return function(*pieces)

        self.waiting += 1
        self.most = max(self.most, self.waiting)
        return Lazy()


@given(st.integers(0, 60), st.integers(1, 9))
def test_exactly_as_many_pieces_as_allowed_are_in_flight(count: int, in_flight: int) -> None:
    hands = _Counting()
    assert list(in_order(hands, lambda piece: piece, range(count), in_flight)) == list(range(count))
    assert hands.most == min(count, in_flight)
    assert hands.waiting == 0


def test_pieces_are_taken_only_when_there_is_room_for_them() -> None:
    taken = []

    def pieces() -> Iterator[int]:
        for piece in range(100):
            taken.append(piece)
            yield piece

    with ThreadPoolExecutor(2) as hands:
        results = in_order(hands, lambda piece: piece, pieces(), in_flight=4)
        assert taken == []
        for number, result in enumerate(results):
            assert result == number
            assert len(taken) <= number + 4


class _Work:
    """Piece 0 fails once piece 1 runs; piece 1 runs until it is told to stop; others must never begin."""

    def __init__(self) -> None:
        self.second_runs = threading.Event()
        self.may_end = threading.Event()
        self.second_ended = False
        self.begun: list[int] = []

    def __call__(self, piece: int) -> int:
        self.begun.append(piece)
        if piece == 0:
            assert self.second_runs.wait(60)
            # The error is on its way before the other piece ends.
            threading.Timer(0.05, self.may_end.set).start()
            raise FailedError("piece 0")
        if piece == 1:
            self.second_runs.set()
            assert self.may_end.wait(60)
            self.second_ended = True
        return piece


def test_an_error_cancels_what_has_not_begun_and_waits_for_what_runs() -> None:
    work = _Work()
    # One hand: with piece 1 under way nothing else can begin before it is cancelled.
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:

        class Two(Executor):
            def submit(self, function, /, piece):  # type: ignore[no-untyped-def]
                return (first if piece == 0 else second).submit(function, piece)

        with pytest.raises(FailedError, match="piece 0"):
            list(in_order(Two(), work, range(5), in_flight=5))
        assert work.second_ended
    assert sorted(work.begun) == [0, 1]


def test_a_consumer_that_stops_leaves_nothing_running() -> None:
    running = threading.Event()
    may_end = threading.Event()
    ended = []

    def work(piece: int) -> int:
        if piece:
            running.set()
            assert may_end.wait(60)
            ended.append(piece)
        return piece

    with ThreadPoolExecutor(1) as hands:
        results = in_order(hands, work, range(10), in_flight=4)
        assert next(results) == 0
        assert running.wait(60)
        may_end.set()
        results.close()  # type: ignore[attr-defined]
        count = len(ended)
        hands.submit(lambda: None).result()
        assert len(ended) == count


def test_an_error_of_who_makes_the_pieces_waits_for_what_runs() -> None:
    ended = []

    def pieces() -> Iterator[int]:
        yield 0
        yield 1
        raise FailedError("no more pieces")

    with ThreadPoolExecutor(2) as hands:
        with pytest.raises(FailedError, match="no more pieces"):
            list(in_order(hands, ended.append, pieces(), in_flight=10))
        count = len(ended)
        hands.submit(lambda: None).result()
    assert len(ended) == count


def test_the_callers_executor_is_used_and_stays_open() -> None:
    with ThreadPoolExecutor(1) as hands:
        with executor_or_own(hands) as used:
            assert used is hands
        assert hands.submit(lambda: 1).result() == 1


def test_an_own_executor_ends_with_its_block() -> None:
    with executor_or_own(None) as own:
        name = own.submit(lambda: threading.current_thread().name).result()
        assert name.startswith("snapcore")
    assert not [thread for thread in threading.enumerate() if thread.name == name]
    with pytest.raises(RuntimeError):
        own.submit(lambda: None)


def test_usable_cores_are_those_this_process_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def test_daemons_do_what_they_are_given_and_hand_on_what_fails() -> None:
    hands = Daemons(3, "test")
    try:
        futures = [hands.submit(divmod, 100, number) for number in range(20)]
        with pytest.raises(ZeroDivisionError):
            futures[0].result(60)
        assert [future.result(60) for future in futures[1:]] == [divmod(100, number) for number in range(1, 20)]
        assert len([thread for thread in threading.enumerate() if thread.name == "test"]) <= 3
    finally:
        hands.shutdown()


def test_daemons_work_at_once_and_what_has_not_begun_can_be_cancelled() -> None:
    hands, go_on, met = Daemons(2, "test"), threading.Event(), threading.Barrier(3)

    def work() -> bool:
        met.wait(60)
        return go_on.wait(60)

    running = [hands.submit(work) for _ in range(2)]
    met.wait(60)
    waiting = hands.submit(work)
    hands.shutdown(cancel_futures=True)
    assert waiting.cancelled()
    with pytest.raises(RuntimeError):
        hands.submit(work)
    go_on.set()
    assert [future.result(60) for future in running] == [True, True]


def test_a_process_ends_although_a_daemon_hangs() -> None:
    words = "import threading; from snapcore.parallel import Daemons; Daemons(1, 'd').submit(threading.Event().wait)"
    subprocess.run([sys.executable, "-P", "-c", words], check=True, timeout=60)
