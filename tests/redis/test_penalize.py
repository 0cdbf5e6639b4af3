"""penalize.lua: after a 429 everybody stops until the time it names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fastq.broker.keys import LimitKeys
from fastq.limits import FixedWindow, Rule, SlidingWindow, parse_rate
from tests.redis.limit_lab import LimitLab
from tests.unit.limit_fleet import US

RULES = [Rule(parse_rate("10/s")), Rule(SlidingWindow(9, 60)), Rule(FixedWindow(9, "hour")), Rule(None, 3)]


@pytest.fixture
def lab(redis_url: str, raw: Any) -> Iterator[LimitLab]:
    lab = LimitLab(redis_url, raw)
    yield lab
    lab.conn.close()


@pytest.mark.parametrize("rule", RULES)
def test_nobody_is_granted_anything_until_it_ends(lab: LimitLab, rule: Rule) -> None:
    lab.use(rule)
    assert lab.penalize(30) == 30 * US
    assert lab.after(10).acquire().wait_us == 20 * US
    assert lab.slots("a", most=3).status == b"penalized"
    assert lab.state().penalty_us == 20 * US
    assert lab.after(20).state().penalty_us == 0
    assert lab.acquire().status == (b"short" if lab.terms.kind == "bucket" else b"granted")
    assert lab.slots("a", most=3, cost=0).slots == 1


@pytest.mark.parametrize("rule", RULES)
def test_one_of_the_whole_limiter_holds_for_its_partitions(lab: LimitLab, rule: Rule) -> None:
    """The account is stopped, whoever of its customers asks; a customer's penalty is its own."""
    whole, tenant = lab.keys, LimitKeys("fastq", "api", "tenant")
    lab.use(rule)
    lab.penalize(30)
    lab.keys = tenant
    assert (lab.acquire().status, lab.after(10).acquire().wait_us) == (b"penalized", 20 * US)
    assert lab.slots("a", most=3).status == b"penalized"
    assert lab.state().penalty_us == 20 * US
    lab.penalize(40)
    assert lab.acquire().wait_us == 40 * US
    lab.keys = whole
    assert lab.state().penalty_us == 20 * US
    lab.penalize(0)
    assert lab.state().penalty_us == 0
    lab.keys = LimitKeys("fastq", "api", "another tenant")
    assert lab.acquire().status == b"granted"
    lab.keys = tenant
    assert lab.acquire().wait_us == 40 * US


def test_a_bucket_is_empty_after_it(lab: LimitLab) -> None:
    """The service has just said that it had too much: no burst."""
    lab.use(Rule(parse_rate("10/s")))
    lab.penalize(30)
    lab.after(30)
    assert lab.acquire(1, 9).wait_us == 150_001
    assert lab.after(0.150001).acquire(1, 9).units == 1


@pytest.mark.parametrize("rule", RULES)
def test_a_shorter_one_does_not_end_a_longer_one(lab: LimitLab, rule: Rule) -> None:
    lab.use(rule)
    lab.penalize(30)
    assert lab.after(10).penalize(5) == 20 * US
    assert lab.penalize(25) == 25 * US


@pytest.mark.parametrize("rule", RULES)
def test_it_can_be_lifted(lab: LimitLab, rule: Rule) -> None:
    lab.use(rule)
    lab.penalize(30)
    assert lab.after(1).penalize(0) == 0
    assert lab.acquire(0).status == b"granted"
    lab.after(0.2)
    assert lab.acquire().status == b"granted"


@pytest.mark.parametrize("rule", RULES)
def test_the_state_goes_when_it_is_over_and_not_before(lab: LimitLab, rule: Rule) -> None:
    lab.use(rule)
    lab.acquire(1, 5)
    until = lab.expires(lab.keys.state)
    lab.penalize(0.001)
    assert lab.expires(lab.keys.state) >= until
    lab.penalize(10_000)
    assert lab.expires(lab.keys.state) >= lab.now // 1_000 + 10_000_000


def test_lifting_nothing_leaves_no_key(lab: LimitLab) -> None:
    assert lab.penalize(0) == 0
    assert lab.stored() == {}
