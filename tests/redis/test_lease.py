"""lease.lua: one holder at a time, by Redis's clock; a token that grows; every call may be sent twice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from fastq.broker import leases
from fastq.broker.connection import SyncConnection
from fastq.broker.keys import LeaseKeys
from fastq.broker.leases import Leased
from fastq.broker.url import parse_url
from fastq.errors import ConfigError
from tests.redis.limit_lab import SetClock
from tests.unit.limit_fleet import START

TTL = 5_000
KEYS = LeaseKeys("fastq", "leader", "daily report")


class LeaseLab:
    """``now`` is the clock of the script, in µs."""

    def __init__(self, url: str, raw: Any) -> None:
        self.raw = raw
        self.conn = SyncConnection.to(parse_url(url))
        self.clocked = SetClock(self.conn)
        self.now = START

    def after(self, seconds: float) -> LeaseLab:
        self.now += round(seconds * 1_000_000)
        return self

    def take(self, owner: str, ttl_ms: int = TTL) -> Leased:
        return self.clocked(leases.take_lease(KEYS, owner, ttl_ms), self.now)

    def renew(self, owner: str, ttl_ms: int = TTL) -> Leased:
        return self.clocked(leases.renew_lease(KEYS, owner, ttl_ms), self.now)

    def release(self, owner: str) -> Leased:
        return self.clocked(leases.release_lease(KEYS, owner), self.now)

    def stored(self) -> dict[str, Any]:
        return {key.decode(): self.raw.dump(key) for key in self.raw.keys("*")}


@pytest.fixture
def lab(redis_url: str, raw: Any) -> Iterator[LeaseLab]:
    lab = LeaseLab(redis_url, raw)
    yield lab
    lab.conn.close()


def test_one_holder_until_it_ends(lab: LeaseLab) -> None:
    assert lab.take("a") == (START, TTL)
    assert lab.after(1).take("b") == (0, 4_000)
    assert lab.renew("a") == (START, TTL)
    assert lab.after(4.999).take("b") == (0, 1)
    assert lab.after(0.001).take("b").token == lab.now
    assert lab.renew("a") == (0, TTL)


def test_what_has_ended_is_not_renewed_even_if_nobody_took_it(lab: LeaseLab) -> None:
    """Somebody may have had it and given it up meanwhile: the holder cannot know."""
    lab.take("a")
    assert lab.after(5).renew("a") == (0, 0)
    assert lab.take("a").token == lab.now


def test_given_up_it_is_free_at_once_and_one_is_woken(lab: LeaseLab) -> None:
    first = lab.take("a").token
    assert lab.release("b") == (0, TTL)
    assert lab.raw.llen(KEYS.wake) == 0
    assert lab.release("a") == (0, 0)
    assert lab.release("a") == (0, 0)
    assert lab.raw.llen(KEYS.wake) == 1
    assert lab.renew("a") == (0, 0)
    assert lab.take("b").token > first


def test_the_token_grows_whatever_the_clock_does(lab: LeaseLab) -> None:
    """Faster than the clock's microseconds; after the clock was set back; after the key has gone."""
    tokens = []
    for n in range(5):
        tokens.append(lab.take(f"fast{n}").token)
        lab.release(f"fast{n}")
    lab.now -= 300_000_000
    tokens.append(lab.take("set back").token)
    lab.now += 3_600_000_000
    lab.raw.flushdb()
    tokens.append(lab.take("later").token)
    assert tokens == sorted(set(tokens))
    assert tokens[:6] == [START + n for n in range(6)]


def test_the_key_goes_ten_minutes_after_the_end(lab: LeaseLab) -> None:
    lab.take("a")
    assert lab.raw.execute_command("PEXPIRETIME", KEYS.lease) == lab.now // 1_000 + TTL + 600_000


def test_sent_twice_is_the_same(lab: LeaseLab) -> None:
    for call in (lab.take, lab.renew, lab.release):
        first = call("a")
        before = lab.stored()
        assert call("a") == first
        assert lab.stored() == before


def test_names_of_any_text_fit_into_a_key(lab: LeaseLab) -> None:
    names = ["sync:42", "Zürich {x}", "a b", "x" * 200]
    assert len({LeaseKeys("fastq", "lock", name).lease for name in names}) == 4
    for name in names:
        assert lab.clocked(leases.take_lease(LeaseKeys("fastq", "lock", name), "o", TTL), lab.now).token
    for bad in ("", "x" * 201):
        with pytest.raises(ConfigError):
            LeaseKeys("fastq", "lock", bad)


class Model:
    """What the script's head says, in Python."""

    def __init__(self) -> None:
        self.owner = ""
        self.until = self.token = 0

    def call(self, what: str, owner: str, ttl: int, now_us: int) -> tuple[int, int]:
        now = now_us // 1_000
        left = max(0, self.until - now) if self.owner else 0
        if what == "release":
            if self.owner != owner:
                return 0, left
            self.owner = ""
            return 0, 0
        mine = left > 0 and self.owner == owner
        if not mine and (what == "renew" or left > 0):
            return 0, left
        if not mine:
            self.token = max(now_us, self.token + 1)
        self.owner, self.until = owner, now + ttl
        return self.token, ttl


@pytest.mark.parametrize("seed", range(10))
def test_the_script_does_what_the_model_does(lab: LeaseLab, seed: int) -> None:
    choose, model, holdings = random.Random(seed), Model(), []
    for _ in range(300):
        lab.after(choose.choice([0, 0, 0.0005, 0.3, 1.0, 2.5, -0.2]))
        what, owner, ttl = (
            choose.choice(["take", "renew", "release"]),
            choose.choice("abc"),
            choose.choice([500, 2_000]),
        )
        command = {"take": lab.take, "renew": lab.renew}.get(what)
        reply = command(owner, ttl) if command else lab.release(owner)
        assert reply == model.call(what, owner, ttl, lab.now)
        if what == "take" and reply.token and (not holdings or holdings[-1] != reply.token):
            holdings.append(reply.token)
    assert holdings == sorted(set(holdings))
    assert len(holdings) > 30
