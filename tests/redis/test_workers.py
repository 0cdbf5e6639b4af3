"""register.lua, extend.lua and lead.lua: leases begin, go on and end."""

from __future__ import annotations

import pytest

from fastq.broker import commands
from fastq.broker.keys import PAD, GlobalKeys
from tests.redis.lab import LEASE, Lab

# -- register ---------------------------------------------------------------------------------------


def test_a_worker_begins(lab: Lab) -> None:
    now = lab.register()
    assert lab.near() == now
    assert lab.keys() == {**lab.worker_keys(), "jobs": {PAD: b""}}


def test_registered_twice_is_registered_once(lab: Lab) -> None:
    lab.register()
    lab.register()
    assert lab.keys() == {**lab.worker_keys(), "jobs": {PAD: b""}}


def test_registering_again_takes_nothing_away(lab: Lab) -> None:
    """The repetition of a lost reply may come late."""
    lab.take("a")
    before = lab.keys("workers")
    lab.register()
    assert lab.keys("workers") == before


# -- extend -----------------------------------------------------------------------------------------


def extend(lab: Lab, *workers: str, lease: int = LEASE) -> list[bool]:
    return lab.call(commands.extend(lab.q, lease, workers))


def test_extend(lab: Lab) -> None:
    lab.register("v", lease=1)
    lab.register("w", lease=1)
    lab.register("x", lease=5)
    untouched = lab.raw.zscore(lab.q.workers, "x")
    assert extend(lab, "v", "w") == [True, True]
    assert extend(lab, "v", "w") == [True, True]
    assert dict(lab.value("workers")) == {"v": lab.near(LEASE), "w": lab.near(LEASE), "x": untouched}


def test_a_lease_that_is_gone_stays_gone(lab: Lab) -> None:
    """Invariant 2: extending never makes an owner of one whose jobs were handed back."""
    lab.take("a")
    lab.register("v")
    lab.recover("w")
    assert extend(lab, "w", "v", "nobody") == [False, True, False]
    assert [worker for worker, _ in lab.value("workers")] == ["v"]


def test_a_late_worker_that_nobody_recovered_goes_on(lab: Lab) -> None:
    """F-32: after a stall of Redis the workers come first."""
    lab.register(lease=-5_000)
    assert extend(lab, "w") == [True]
    assert lab.recover(expired=True).remaining == -1


def test_extending_nobody(lab: Lab) -> None:
    assert extend(lab) == []


def test_a_host_full_of_workers(lab: Lab) -> None:
    names = [f"w{i}" for i in range(1_000)]
    for name in names:
        lab.raw.zadd(lab.q.workers, {name: 1})
    assert extend(lab, *names) == [True] * 1_000


# -- lead ---------------------------------------------------------------------------------------------


KEYS = GlobalKeys("fastq")


def lead(lab: Lab, scheduler: str, ttl: int = LEASE) -> bool:
    return lab.call(commands.lead(KEYS, scheduler, ttl))


def test_one_scheduler_leads(lab: Lab) -> None:
    assert lab.twice(commands.lead(KEYS, "s1", LEASE)) == (True, True)
    assert not lead(lab, "s2")
    assert lab.raw.get(KEYS.leader) == b"s1"
    assert 0 < lab.raw.pttl(KEYS.leader) <= LEASE


def test_keeping_it_renews_it(lab: Lab) -> None:
    lead(lab, "s1", 10_000)
    assert lead(lab, "s1", LEASE)
    assert lab.raw.pttl(KEYS.leader) > 10_000


def test_another_one_does_not_shorten_or_end_it(lab: Lab) -> None:
    """F-54."""
    lead(lab, "s1")
    assert not lead(lab, "s2", 1)
    assert not lead(lab, "s2", 0)
    assert lab.raw.get(KEYS.leader) == b"s1"
    assert lab.raw.pttl(KEYS.leader) > 1_000


def test_given_up_it_is_free_at_once(lab: Lab) -> None:
    lead(lab, "s1")
    assert lab.twice(commands.lead(KEYS, "s1", 0)) == (False, False)
    assert lab.raw.get(KEYS.leader) is None
    assert lead(lab, "s2")


@pytest.mark.parametrize("scheduler", ["s1", "s2"])
def test_an_expired_leadership_is_anyones(lab: Lab, scheduler: str) -> None:
    """F-53: the standby takes over when the time of a killed leader has run out."""
    lead(lab, "s1")
    lab.raw.pexpire(KEYS.leader, 0)
    assert lead(lab, scheduler)
