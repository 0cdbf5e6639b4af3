"""give_back.lua: what was not used can be granted again, once; slots are free for whoever waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fastq.broker import commands
from fastq.limits import FixedWindow, Rule, SlidingWindow, parse_rate
from tests.redis.limit_lab import LimitLab
from tests.unit.limit_fleet import START, US

RULES = [Rule(parse_rate("10/s")), Rule(SlidingWindow(9, 60)), Rule(FixedWindow(9, "minute"))]


@pytest.fixture
def lab(redis_url: str, raw: Any) -> Iterator[LimitLab]:
    lab = LimitLab(redis_url, raw)
    yield lab
    lab.conn.close()


@pytest.mark.parametrize("rule", RULES)
def test_units_that_come_back_at_once_are_all_there_again(lab: LimitLab, rule: Rule) -> None:
    lab.use(rule)
    reply = lab.acquire(1, 9)
    assert lab.give_back(4, reply.now_us) == (4, 0)
    assert lab.state().left == 4
    assert lab.acquire(1, 9).units == 4


@pytest.mark.parametrize("rule", RULES)
def test_sent_twice_is_once(lab: LimitLab, rule: Rule) -> None:
    """Invariant 6: the ticket remembers for a minute."""
    lab.use(rule)
    reply = lab.acquire(1, 9)
    assert lab.give_back(4, reply.now_us, ticket="p:1").units == 4
    before = lab.stored()
    assert lab.give_back(4, reply.now_us, ticket="p:1").units == 0
    assert lab.stored() == before
    assert 0 < lab.raw.pttl(lab.keys.given("p:1")) <= 60_000


@pytest.mark.parametrize("rule", RULES)
def test_never_more_than_was_granted(lab: LimitLab, rule: Rule) -> None:
    lab.use(rule)
    reply = lab.acquire(1, 3)
    assert lab.give_back(100, reply.now_us).units == 3
    assert lab.give_back(100, reply.now_us).units == 0
    assert lab.state().left == 9


def test_a_bucket_takes_back_less_than_flowed_in_since(lab: LimitLab) -> None:
    """They may have been granted to others: after 0.25 s of 10/s a block of 9 is worth 6."""
    lab.use(Rule(parse_rate("10/s")))
    reply = lab.acquire(1, 9)
    lab.after(0.25)
    assert lab.give_back(9, reply.now_us).units == 6
    lab.after(10)
    assert lab.give_back(9, reply.now_us).units == 0


def test_a_window_takes_back_at_any_time_until_it_has_left(lab: LimitLab) -> None:
    lab.use(Rule(SlidingWindow(9, 60)))
    reply = lab.acquire(1, 9)
    lab.after(55)
    assert lab.give_back(2, reply.now_us).units == 2
    lab.after(10)
    assert lab.give_back(2, reply.now_us).units == 0
    assert lab.acquire(1, 20).units == 9


def test_a_fixed_window_that_is_over_takes_nothing_back(lab: LimitLab) -> None:
    rule = Rule(FixedWindow(9, "minute"))
    lab.use(rule)
    reply = lab.acquire(1, 9)
    lab.after(60).use(rule)
    lab.acquire(1, 9)
    assert lab.give_back(5, reply.now_us).units == 0
    assert lab.state().left == 0


def test_nothing_to_return_to_leaves_no_key(lab: LimitLab) -> None:
    lab.use(Rule(parse_rate("10/s")))
    assert lab.give_back(5, START) == (0, 0)
    lab.use(Rule(None, 3))
    assert lab.give_back(5, START, ("a",)) == (0, 0)
    assert lab.stored() == {}


def test_a_slot_is_free_after_the_first_time(lab: LimitLab) -> None:
    lab.slots("a", "b")
    assert lab.slots("c").status == b"full"
    assert lab.give_back(holders=("a", "x")) == (0, 1)
    assert lab.give_back(holders=("a", "x")) == (0, 0)
    assert lab.slots("c", "d").slots == 1


def test_a_freed_slot_wakes_one_waiter_which_wakes_the_next(lab: LimitLab) -> None:
    lab.slots("a", "b", "c", most=3)
    assert lab.raw.exists(lab.keys.wake) == 0
    lab.give_back(holders=("a",))
    lab.give_back(holders=("b",))
    assert lab.raw.llen(lab.keys.wake) == 1
    assert 0 < lab.raw.pttl(lab.keys.wake) <= 60_000
    assert lab.call(commands.wait_for_slot(lab.keys, 0.01))
    lab.slots("d", most=3)
    assert lab.call(commands.wait_for_slot(lab.keys, 0.01))
    lab.slots("e", most=3)
    assert not lab.call(commands.wait_for_slot(lab.keys, 0.01))


def test_both_at_once(lab: LimitLab) -> None:
    lab.use(Rule(SlidingWindow(9, 60), 1))
    reply = lab.slots("a", most=1, cost=5)
    assert lab.give_back(5, reply.now_us, ("a",)) == (5, 1)
    assert lab.state()[1:6:3] == (9, 0)
    assert lab.state().reset_us == 60 * US + 600_000 + 100_000, "an empty part is told of until it goes"
