"""limit_state.lua: what is left, when it is all back, who holds; and it changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fastq.broker import commands
from fastq.limits import FixedWindow, LimitState, Rule, SlidingWindow, parse_rate
from tests.redis.limit_lab import LimitLab
from tests.unit.limit_fleet import START, US


@pytest.fixture
def lab(redis_url: str, raw: Any) -> Iterator[LimitLab]:
    lab = LimitLab(redis_url, raw)
    yield lab
    lab.conn.close()


@pytest.mark.parametrize(
    ("rule", "left", "reset"),
    [
        (Rule(parse_rate("10/s")), 4, 500_000),
        (Rule(SlidingWindow(10, 60)), 5, 60_700_000),
        (Rule(FixedWindow(10, "minute")), 5, 60 * US),
        (Rule(None, 3), -1, 0),
    ],
)
def test_what_is_left_and_when_it_is_back(lab: LimitLab, rule: Rule, left: int, reset: int) -> None:
    lab.use(rule)
    lab.acquire(5)
    assert lab.state() == LimitState(START, left, reset, 0, 0, 0, b"")
    lab.after(reset / US).use(rule)
    assert lab.state()[1:3] == (left + 5 if left >= 0 else -1, 0)


def test_nothing_was_granted_yet(lab: LimitLab) -> None:
    lab.use(Rule(SlidingWindow(10, 60)))
    assert lab.state() == LimitState(START, 10, 0, 0, 0, 0, b"")


def test_holders_are_those_with_a_lease(lab: LimitLab) -> None:
    lab.slots("a", lease_ms=1_000)
    lab.slots("b", lease_ms=3_000)
    assert lab.state()[4:6] == (2, US)
    assert lab.after(2).state().holders == 1


def test_an_override_is_shown(lab: LimitLab) -> None:
    rule = Rule(parse_rate("5/s"))
    lab.call(commands.override_rule(lab.keys, rule))
    assert Rule.decode(lab.state().rule) == rule


def test_a_reset_forgets_what_was_granted_and_no_holder(lab: LimitLab) -> None:
    lab.use(Rule(parse_rate("10/s")))
    lab.acquire(9)
    lab.slots("a", cost=0)
    lab.penalize(30)
    lab.call(commands.reset_limit(lab.keys))
    assert lab.state()[1:5] == (9, 0, 0, 1)


@pytest.mark.parametrize("seconds", [0, 30, 100])
def test_it_changes_nothing(lab: LimitLab, seconds: float) -> None:
    """Not even what has expired in a window: reading is for replicas, too."""
    lab.use(Rule(SlidingWindow(10, 60)))
    lab.acquire(3)
    lab.slots("a")
    lab.after(seconds)
    before = lab.stored()
    lab.state()
    assert lab.stored() == before
