"""A reader with a rate: it hands out what the reader inside does, counts it, and waits as long as it must."""

from __future__ import annotations

import pytest

from snapcore.errors import UsageError
from snapcore.store import MemoryStore, rate
from snapcore.store.rate import RateReader


def test_bytes_are_counted_and_handed_on() -> None:
    store = MemoryStore()
    store.put_new("packs/a", [b"0123456789"])
    reader = RateReader(store)
    assert reader.get("packs/a", 100) == b"0123456789"
    assert reader.get_range("packs/a", 2, 3) == b"234"
    assert reader.size("packs/a") == 10
    assert reader.read_bytes == 13


def test_who_asks_for_more_than_the_rate_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(rate.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(rate.time, "sleep", lambda wait_s: now.__setitem__(0, now[0] + wait_s))
    store = MemoryStore()
    store.put_new("packs/a", [bytes(1000)])
    reader = RateReader(store, 100)
    for _ in range(5):
        reader.get_range("packs/a", 0, 200)
    assert now[0] == pytest.approx(110)
    now[0] += 50
    reader.get_range("packs/a", 0, 100)
    assert now[0] == pytest.approx(161)


def test_a_rate_below_a_byte_is_refused() -> None:
    with pytest.raises(UsageError):
        RateReader(MemoryStore(), 0)
