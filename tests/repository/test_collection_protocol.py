"""The protocol of writers and collectors, explored: it is safe as it is, and no rule of it can be left out.

The full exploration is a campaign: every scene below without a limit, with crashes, and some larger ones.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.collection_protocol import Scene, explore

ALONE = Scene(writers=1, tries=2)
TWO = Scene(writers=2, tries=1, crashes=False, rounds=1, merges=True, moves=False)
REVIVED = Scene(writers=1, tries=1, started="revived", moves=False)
TAKEN_OVER = Scene(writers=1, tries=1, collectors=2, rounds=1, deletions=0, started="garbage", moves=False)
ENDED = Scene(writers=2, tries=1, crashes=False, started="garbage", deletions=0, ends=1, adopts=True, parents=False)
PARENTS = Scene(writers=2, tries=1, crashes=False, deletions=2)
COLLECTORS = Scene(writers=1, tries=2, collectors=2, crashes=False)

# In each the rule that is left out is the one that keeps something: the model finds the loss.
TEETH = {
    "no second look": ALONE,
    "no relist": ALONE,
    "no wait": ALONE,
    "no tombstone": ALONE,
    "condemned packs are used": ALONE,
    "condemned at once gone": ALONE,
    "packs before index": ALONE,
    "merges leave out condemned packs": TWO,
    "deleted ones forgotten": PARENTS,
    "deleted ones listed once": PARENTS,
    "doomed packs forgotten": COLLECTORS,
    "doomed packs are used": Scene(writers=2, tries=1, crashes=False, adopts=True, merges=True),
    "late index objects count": COLLECTORS,
    "stale marks are published": replace(COLLECTORS, merges=True, adopts=True, moves=False),
}


@pytest.mark.parametrize("scene", [ALONE, TWO, REVIVED, TAKEN_OVER], ids=["alone", "two", "revived", "taken over"])
def test_whatever_happens_nothing_that_is_reached_is_lost_and_garbage_goes(scene: Scene) -> None:
    found = explore(scene)
    assert found.loss is None, "\n".join([found.loss or "", *found.way])
    assert found.states > 1000 and found.ends > 10


@pytest.mark.parametrize("rule", TEETH)
def test_no_rule_can_be_left_out(rule: str) -> None:
    assert explore(replace(TEETH[rule], broken=rule), limit=200_000).loss is not None


@pytest.mark.campaign
@pytest.mark.parametrize(
    "scene",
    [
        Scene(writers=2, tries=1),
        Scene(writers=2, tries=1, merges=True, adopts=True, moves=False),
        Scene(writers=1, tries=2, collectors=2, moves=False),
        replace(PARENTS, crashes=True),
        replace(PARENTS, started="revived", moves=False),
        replace(ENDED, crashes=True),
        COLLECTORS,
        replace(TAKEN_OVER, rounds=3, adopts=True),
    ],
    ids=lambda scene: str(scene),
)
def test_a_campaign_of_the_protocol(scene: Scene) -> None:
    found = explore(scene)
    assert found.loss is None, "\n".join([found.loss or "", *found.way])
    print(f"{found.states} states, {found.ends} ends")
