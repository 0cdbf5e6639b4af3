"""hold.lua: a holder keeps its slot as long as it says so, or nobody else took it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.redis.limit_lab import LimitLab


@pytest.fixture
def lab(redis_url: str, raw: Any) -> Iterator[LimitLab]:
    lab = LimitLab(redis_url, raw)
    yield lab
    lab.conn.close()


def test_a_renewed_slot_is_kept_and_another_one_is_not(lab: LimitLab) -> None:
    lab.slots("a", "b")
    assert lab.after(10).hold("a", "x") == [True, False]
    assert lab.after(6).slots("c", "d").slots == 1
    assert lab.state().holders == 2
    assert lab.hold("a", "b", "c", "d") == [True, False, True, False]


def test_a_late_holder_has_its_slot_back_if_nobody_took_it(lab: LimitLab) -> None:
    lab.slots("a")
    assert lab.after(50).state().holders == 0
    assert lab.hold("a") == [True]
    assert lab.state().holders == 1
    assert lab.slots("b", "c").slots == 1


def test_a_killed_holders_slot_is_back_when_its_lease_ends(lab: LimitLab) -> None:
    """Figure 4 of the measured faults of other packages: a crashed holder leaks its slot."""
    lab.slots("dead", lease_ms=15_000, most=1)
    assert lab.after(14.999).slots("next", most=1).status == b"full"
    assert lab.after(0.001).slots("next", most=1).slots == 1
    assert lab.hold("dead") == [False]


def test_the_key_outlives_the_last_lease_by_a_minute(lab: LimitLab) -> None:
    lab.slots("a", lease_ms=1_000)
    assert lab.expires(lab.keys.slots) == lab.now // 1_000 + 61_000
    lab.hold("a", lease_ms=20_000)
    assert lab.expires(lab.keys.slots) == lab.now // 1_000 + 80_000


def test_sent_twice_is_the_same(lab: LimitLab) -> None:
    lab.slots("a")
    assert lab.hold("a", "x") == [True, False]
    before = lab.stored()
    assert lab.hold("a", "x") == [True, False]
    assert lab.stored() == before


def test_nobody_to_hold(lab: LimitLab) -> None:
    assert lab.hold("a") == [False]
    assert lab.stored() == {}
