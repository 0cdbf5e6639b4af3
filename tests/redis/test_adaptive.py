"""Adaptive limiters: after a penalty half the rate, for everybody, and back again in a time that was said before."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

import fastq
from fastq.limits import FixedWindow, Rule, SlidingWindow, TokenBucket, parse_rate
from tests.chaos.proxy import FaultProxy
from tests.redis.limit_lab import LimitLab
from tests.redis.test_limiter import application

US = 1_000_000
RULES = [Rule(parse_rate("100/s")), Rule(SlidingWindow(100, 10)), Rule(FixedWindow(100, "minute"))]


@pytest.fixture
def lab(redis_url: str, raw: Any) -> Iterator[LimitLab]:
    lab = LimitLab(redis_url, raw)
    yield lab
    lab.conn.close()


def pace_after(seconds: float, start: float, recovery: float) -> float:
    """What the docs say."""
    return min(1.0, start + seconds / recovery)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_pace_is_halved_once_per_overload_and_grows_back(lab: LimitLab, rule: Rule) -> None:
    lab.use(rule)
    lab.penalize(5, recovery=60)
    assert lab.state().pace == 500_000
    lab.after(1).penalize(2, recovery=60)  # the same overload, as another process heard of it
    assert lab.state().pace == 500_000
    lab.after(4)
    for seconds in (0, 6, 6, 6):
        lab.after(seconds)
    assert lab.state().pace == pytest.approx(800_000, abs=1)
    lab.penalize(0.5, recovery=60)
    assert lab.state().pace == pytest.approx(400_000, abs=1)
    lab.after(0.6).penalize(0.1, recovery=60)  # over, but within a second: a repetition, maybe
    assert lab.state().pace > 400_000
    for _ in range(20):
        lab.after(2).penalize(1, recovery=60)
    assert lab.state().pace >= US // 32
    lab.after(1 + 60)
    assert lab.state().pace == US


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_call_that_is_repeated_halves_once(lab: LimitLab, rule: Rule) -> None:
    """Its reply was lost; the penalty itself is over by the time of the repetition."""
    lab.use(rule)
    lab.penalize(0.1, recovery=60)
    lab.after(0.7).penalize(0.1, recovery=60)
    assert lab.state().pace == pytest.approx(510_000, abs=2)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_without_the_option_the_rate_stays(lab: LimitLab, rule: Rule) -> None:
    lab.use(rule)
    lab.penalize(1)
    assert lab.state().pace == US
    assert b"pace" not in lab.raw.hgetall(lab.keys.state)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_lifting_the_penalty_and_a_reset_lift_it(lab: LimitLab, rule: Rule) -> None:
    lab.use(rule)
    lab.penalize(5, recovery=60)
    lab.penalize(0, recovery=60)
    assert lab.state().pace == US


def test_an_operators_penalty_neither_halves_nor_ends_a_recovery(lab: LimitLab) -> None:
    lab.use(RULES[0])
    lab.penalize(1, recovery=60)
    lab.after(13).penalize(1)
    assert lab.state().pace == pytest.approx(700_000, abs=1)
    lab.after(1 + 6)
    assert lab.state().pace == pytest.approx(800_000, abs=1)


@pytest.mark.parametrize("rate", [0.5, 7.0, 400.0])
@pytest.mark.parametrize("recovery", [2.0, 30.0])
def test_a_bucket_grants_what_the_pace_allows(lab: LimitLab, rate: float, recovery: float) -> None:
    """Reference: the integral of the pace, from the words of the docs. Waits are exact: not a microsecond too early."""
    lab.use(Rule(TokenBucket(rate, 1)))
    interval, more = lab.terms.a / US, lab.terms.c / US  # an empty bucket lacks the room for a whole burst, too
    lab.penalize(1, recovery=recovery)
    lab.after(1)
    start, granted, waits = lab.now, 0, 0
    while granted < 150 and lab.now < start + 3 * recovery * US:
        reply = lab.acquire(1)
        if reply.status == b"granted":
            granted += 1
            continue
        assert reply.status == b"short"
        if reply.wait_us > 2:
            assert lab.after((reply.wait_us - 2) / US).acquire(1).status == b"short"
            waits += 1
            lab.after(2 / US)
        else:
            lab.after(reply.wait_us / US)
        steps = 2_000
        passed = (lab.now - start) / US
        own = sum(pace_after(passed * (n + 0.5) / steps, 0.5, recovery) for n in range(steps)) * passed / steps
        assert granted + 1 == pytest.approx((own - more) / interval, rel=1e-3, abs=0.01)
    assert waits > 2


def test_a_sliding_window_allows_a_part_of_its_limit(lab: LimitLab) -> None:
    lab.use(Rule(SlidingWindow(100, 10)))
    lab.penalize(1, recovery=60)
    lab.after(1)
    assert lab.acquire(1, 100).units == 50
    lab.after(30)
    assert lab.acquire(1, 100).units == 100


@pytest.mark.parametrize("rule", [Rule(SlidingWindow(100, 10)), Rule(FixedWindow(100, "minute"))], ids=str)
def test_a_window_says_when_more_is_allowed(lab: LimitLab, rule: Rule) -> None:
    lab.use(rule)
    lab.now += 60 * US - lab.now % (60 * US)  # the start of a minute
    lab.use(rule)
    lab.penalize(0.5, recovery=60)
    lab.after(0.5)
    assert lab.acquire(50).units == 50
    reply = lab.acquire(2)
    assert reply.status == b"short"
    assert reply.wait_us == pytest.approx(1.2 * US, abs=2)  # 52 % of the limit
    assert lab.after((reply.wait_us - 2) / US).acquire(2).status == b"short"
    assert lab.after(2 / US).acquire(2).units == 2


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_state_stays_until_the_pace_is_whole(lab: LimitLab, rule: Rule) -> None:
    lab.use(rule)
    lab.penalize(1, recovery=120)
    assert lab.expires(lab.keys.state) >= lab.now // 1_000 + 61_000
    lab.after(2).acquire(1)
    assert lab.expires(lab.keys.state) >= lab.now // 1_000 + 59_000


# -- the limiter ------------------------------------------------------------------------------------------


async def test_everybody_is_slowed_down(redis_url: str) -> None:
    """The API said 429 to one process; all others go at half the rate, and faster again with time."""
    options = {"rate": "200/s burst 5", "adaptive": 8}
    async with application(redis_url) as one, application(redis_url) as two:
        hears, other = one.limiter("api", **options), two.limiter("api", **options)
        await other.acquire()
        await hears.penalize(0.1)
        state = await other.state()
        assert state.pace == pytest.approx(0.5, abs=0.05)
        await other.acquire(timeout=2)
        loop = asyncio.get_running_loop()
        start, units = loop.time(), 0
        while loop.time() < start + 1:
            await other.acquire(timeout=2)
            units += 1
        assert 80 < units < 150  # 100 to 125 a second, less what a busy machine takes
        assert 0.55 < (await hears.state()).pace < 0.8
        await hears.penalize(0)
        assert (await other.state()).pace == 1


async def test_lost_replies_of_penalize(redis_server: Any, redis_url: str) -> None:
    """The caller is told, and calls again: halved once."""
    with FaultProxy(redis_server.url) as proxy:
        async with application(proxy.url) as app:
            limiter = app.limiter("api", rate="10/s", adaptive=True)
            await limiter.penalize(0.01)
            await limiter.penalize(0)
            lost = iter(["drop", "drop"])
            proxy.rule = lambda names: next(lost, "pass") if "penalize" in names else "pass"
            for _ in range(2):
                with pytest.raises(fastq.BrokerError):
                    await limiter.penalize(0.05)
            await limiter.penalize(0.05)
            assert proxy.dropped["penalize"] == 2
            assert (await limiter.state()).pace == pytest.approx(0.5, abs=0.01)


async def test_adaptive_in_memory() -> None:
    fastq.configure_limiter(
        "adaptive", store="memory", algorithm="sliding_window", limit=10, window_seconds=5, adaptive=2
    )
    limiter = await fastq.get_or_clone_limiter("adaptive")
    await limiter.penalize(0.05)
    await limiter.acquire(timeout=1)
    taken = 1
    while await limiter.try_acquire():
        taken += 1
    assert 5 <= taken <= 6
    await limiter.acquire(timeout=2)  # more is allowed long before the window has passed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate": "1/s", "adaptive": 1}, "adaptive=1 must be true, or the seconds"),
        ({"rate": "1/s", "adaptive": "yes"}, "adaptive='yes'"),
        ({"max_concurrent": 3, "adaptive": True}, "adaptive needs a rate"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(fastq.ConfigError, match=words):
        fastq.configure_limiter("nonsense", store="memory", **options)
