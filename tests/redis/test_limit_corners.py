"""What a review of the limiters found: interruptions in the very moment of a grant, other rules, other clocks, broken connections."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

import fastq
from fastq.broker.keys import LimitKeys
from fastq.errors import BrokerReplyError, BrokerUnavailable
from fastq.limiter.stores import MOST_BLOCKING, Process, Slot, Store, _Errand, this_process
from fastq.limits import Rule, parse_rate
from tests.conftest import eventually, eventually_async
from tests.redis.limit_lab import LimitLab, application
from tests.redis.workshop import working
from tests.unit.limit_fleet import US


@pytest.fixture
def lab(redis_url: str, raw: Any) -> Iterator[LimitLab]:
    lab = LimitLab(redis_url, raw)
    yield lab
    lab.conn.close()


# -- who waits is interrupted ------------------------------------------------------------------------


def test_what_was_got_in_the_moment_of_an_interruption_is_undone() -> None:
    """A soft time limit is raised where the thread reads the answer: the answer is there, and nobody has it."""
    loop, undone = this_process().loop(), list[str]()

    async def get(what: str) -> str:
        return what

    errand = _Errand(loop, get("a slot"), undone.append)
    errand.begin()
    assert errand.answer.result(5) == "a slot"
    errand.give_up()
    errand.give_up()  # interrupted once more
    eventually(lambda: undone == ["a slot"])


def test_an_interruption_before_anything_was_asked_asks_for_nothing() -> None:
    loop, asked = this_process().loop(), list[int]()

    async def ask() -> None:
        asked.append(1)

    errand = _Errand(loop, ask(), None)
    errand.give_up()
    errand.begin()
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(5)  # both have been carried out
    assert asked == []


def test_what_comes_although_it_was_cancelled_is_undone() -> None:
    """The answer and the cancellation meet."""
    loop, undone, under_way = this_process().loop(), list[str](), threading.Event()

    async def stubborn() -> str:
        under_way.set()
        try:
            await asyncio.sleep(60)  # is cancelled
        except asyncio.CancelledError:
            return "a slot"
        raise AssertionError

    errand = _Errand(loop, stubborn(), undone.append)
    errand.begin()
    assert under_way.wait(5)
    errand.give_up()
    eventually(lambda: undone == ["a slot"])


@pytest.mark.one_server("two limiters of one store")
async def test_a_cancellation_at_the_end_of_a_block_gives_all_slots_back(redis_url: str) -> None:
    async with application(redis_url) as app:
        pools = [app.limiter(name, max_concurrent=1) for name in "abc"]
        inside, leave, asked = asyncio.Event(), asyncio.Event(), asyncio.Event()
        ask = pools[0]._store.ask

        async def slow(command: Any) -> Any:
            if command.script == "give_back":
                asked.set()
                await asyncio.sleep(0.05)  # of what is tested: a store that takes its time
            return await ask(command)

        async def work() -> None:
            async with fastq.acquire_all(pools, timeout=5):
                inside.set()
                await leave.wait()

        task = asyncio.create_task(work())
        await inside.wait()
        pools[0]._store.ask = slow  # type: ignore[method-assign]  # the real one, late
        leave.set()
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually_async(lambda: not any(pool.here.held for pool in pools))
        for pool in pools:
            assert await pool.try_acquire(timeout=5)
            await pool.release()


async def test_one_object_may_be_entered_by_several(redis_url: str) -> None:
    async with application(redis_url) as app:
        pool = app.limiter("pool", max_concurrent=3)
        both = fastq.acquire_all([pool], timeout=5)

        async def work() -> None:
            async with both:
                await asyncio.sleep(0)

        await asyncio.gather(*(work() for _ in range(3)))
        assert pool.here.held == []


# -- other rules ---------------------------------------------------------------------------------------


async def test_a_rule_that_cannot_be_read_grants_nothing(redis_url: str, raw: Any) -> None:
    """Of a newer release, say: what was configured is not in force any more. It was enforced all the same, from the second request on."""
    async with application(redis_url) as app:
        limiter = app.limiter("api", rate="1000/s")
        await limiter.acquire()
        await eventually_async(lambda: not limiter.here.tokens.left(time.monotonic()))  # units of the known rule
        raw.set(LimitKeys("fastq", "api").rule, b"\x81\xa4rate\x81\xa4type\xa4moon")
        for _ in range(5):
            with pytest.raises(BrokerReplyError, match="cannot be read"):
                await limiter.acquire(timeout=5)
        raw.delete(LimitKeys("fastq", "api").rule)
        await limiter.acquire(timeout=5)


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "sliding_window", "limit": 50, "window_seconds": 3600},
        {"algorithm": "fixed_window", "limit": 50, "every": "day"},
    ],
    ids=["window", "fixed"],
)
async def test_units_of_another_rule_are_not_given_back_to_this_one(redis_url: str, options: dict[str, Any]) -> None:
    """The new rule has not counted them: 84 of 50 were granted."""
    async with application(redis_url) as app, application(redis_url) as other:
        fast, same = app.limiter("api", rate="1000/s"), other.limiter("api", rate="1000/s")
        for _ in range(200):  # it has units at hand then
            await fast.acquire()
        await same.update(**options)
        granted = 0
        while await same.try_acquire():
            granted += 1
        await fast.state()
        await eventually_async(lambda: not fast.here.tokens.left(time.monotonic()) and not fast.here._sweeper)
        while await same.try_acquire():
            granted += 1
        assert granted <= 50


@pytest.mark.parametrize("rate", ["1/s", "100/s burst 20", "100/s"])
def test_units_that_live_long_need_a_burst(rate: str) -> None:
    """It was raised without a word: `1/s` granted 6 at once."""
    with pytest.raises(
        fastq.ConfigError, match=r"use_within=5 is longer than a burst of \d+ leaves room for .+ or burst=\d+"
    ):
        Rule(parse_rate(rate), use_within=5)
    for burst in (2, 20, 1_000):
        bucket = parse_rate(f"10/s burst {burst}")
        for use_within in (0.005, 0.02, 0.095, 1.5, 10):
            try:
                terms = Rule(bucket, use_within=use_within).terms(0)
            except fastq.ConfigError:
                continue
            assert terms.capacity <= burst
            assert terms.use_within == use_within


async def test_a_cost_that_the_rule_in_force_allows(redis_url: str) -> None:
    """It was held against the configured rule, and the job failed for good."""
    app, ran = fastq.FastQ(redis_url), list[int]()
    limiter = app.limiter("api", rate="10/s")

    @app.task(limits=["api"], cost=lambda size: size, max_attempts=1)
    async def send(size: int) -> None:
        ran.append(size)

    await limiter.update(rate="1000/s burst 1000")
    async with working(app) as shop:
        job = await send.enqueue(50)
        assert (await shop.ended(job)).state is fastq.JobState.SUCCESS
    assert ran == [50]
    await app.aclose()


async def test_who_is_served_says_nothing_of_who_waits(redis_url: str) -> None:
    """Rate and slots: the forecast took the cost of the last one that was served for that of the next."""
    async with application(redis_url) as app:
        limiter = app.limiter("both", rate="10/s", max_concurrent=10)
        await limiter.acquire(cost=9)
        first = asyncio.create_task(limiter.acquire(cost=1))
        await asyncio.sleep(0)
        await limiter.acquire(cost=5, timeout=3)
        await first
        for _ in range(3):
            await limiter.release()


# -- other clocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [60, -60])
async def test_a_fixed_window_whose_store_has_another_time(redis_url: str, seconds: int) -> None:
    """Its clock was set since the connection was made: thousands of requests a second, and no unit."""
    async with application(redis_url) as app:
        limiter = app.limiter("window", algorithm="fixed_window", limit=1_000, every=10)
        await limiter.state()
        known = limiter._store.now_us
        limiter._store.now_us = lambda: known() + seconds * US  # type: ignore[method-assign]  # a clock that was set
        before = limiter.counts.requests
        await limiter.acquire(timeout=5)
        assert limiter.counts.requests - before <= 3


def test_a_clock_that_goes_back_makes_no_debt(lab: LimitLab) -> None:
    lab.use(Rule(parse_rate("10/s burst 10")))
    assert lab.acquire(1, 1).units == 1
    assert lab.after(-120).acquire(1, 1).units == 1
    lab.penalize(30)
    assert lab.state().reset_us > 30 * US, "that of a penalty stays"


def test_nothing_is_given_back_into_a_penalty(lab: LimitLab) -> None:
    """A bucket is empty after it; it was full."""
    lab.use(Rule(parse_rate("20/s burst 20")))
    granted = lab.acquire(5, 5)
    lab.penalize(3)
    assert lab.give_back(5, granted.now_us).units == 0
    assert lab.after(3).state().left <= 1


# -- other connections -------------------------------------------------------------------------------------


@pytest.mark.one_server("it kills clients of one server")
async def test_a_lost_connection_of_one_that_waits_for_a_slot_is_no_outage(redis_url: str, raw: Any) -> None:
    """An open limiter let everybody pass, and Redis was well."""
    async with application(redis_url) as app:
        limiter = app.limiter("pool", max_concurrent=1, on_error="open")
        await limiter.acquire()
        waiting = asyncio.create_task(limiter.acquire())
        blocked = await eventually_async(lambda: [c for c in raw.client_list() if c["cmd"] == "blpop"])
        for client in blocked:
            raw.client_kill_filter(_id=client["id"])
        await eventually_async(lambda: [c for c in raw.client_list() if c["cmd"] == "blpop"])  # it has come back
        assert not waiting.done()
        assert limiter.counts.passed == 0
        await limiter.release()
        await waiting
        await limiter.release()


async def test_who_passed_unchecked_gives_nobodys_slot_away(make_server: Any) -> None:
    server = make_server()
    async with application(server.url) as app:
        limiter = app.limiter("pool", max_concurrent=1, on_error="open")
        async with limiter.acquire_context():
            server.pause()
            try:
                await limiter.acquire()
                await limiter.release()
            finally:
                server.resume()
            assert len(limiter.here.held) == 1
        assert limiter.here.held == []


class Counted:
    """A store that notes who asks it."""

    def __init__(self, *, away: bool) -> None:
        self.away = away
        self.calls = 0

    def call(self, command: Any) -> list[bool]:
        self.calls += 1
        if self.away:
            raise BrokerUnavailable("no answer")
        return [True] * (len(command.args) - 1)


def test_leases_in_a_store_that_hangs_do_not_hold_up_those_in_others() -> None:
    """Each of its limiters was waited for: a dozen of them took longer than the leases in the other store."""
    process, hung, well = Process(), Counted(away=True), Counted(away=False)
    terms = Rule(None, 1).terms(0)
    slots = [Slot(cast(Store, hung), LimitKeys("fastq", f"l{n}"), terms, f"h{n}", 15.0, None) for n in range(12)]
    slots.append(Slot(cast(Store, well), LimitKeys("fastq", "pool"), terms, "mine", 15.0, None))
    process._slots = {slot.holder: slot for slot in slots}
    process._renew(slots)
    assert (hung.calls, well.calls) == (1, 1)


def test_an_application_that_is_closed_holds_nothing(redis_url: str, raw: Any) -> None:
    """Its slots were renewed for ever."""
    app, elsewhere = fastq.FastQ(redis_url), fastq.FastQ(redis_url)
    app.limiter("pool", max_concurrent=1).sync.acquire()
    other = elsewhere.limiter("pool", max_concurrent=1).sync
    assert not other.try_acquire()
    app.close()
    begun = time.monotonic()
    assert other.try_acquire(timeout=5)
    assert time.monotonic() - begun < 2
    other.release()
    elsewhere.close()
    assert raw.zcard(LimitKeys("fastq", "pool").slots) == 0


async def test_customers_at_their_limits_do_not_take_a_connection_each(redis_url: str, raw: Any) -> None:
    """Who waits for a slot blocks a connection; beyond 64, one waits for a connection, asks, and has its turn all the same."""
    async with application(redis_url) as app:
        tenants = app.limiter("tenants", max_concurrent=1)
        customers = [tenants.for_key(str(number)) for number in range(100)]
        before = raw.info("clients")["connected_clients"]
        for customer in customers:
            await customer.acquire()
        waiters = [asyncio.ensure_future(customer.acquire()) for customer in customers]
        await eventually_async(lambda: raw.info("clients")["blocked_clients"] >= MOST_BLOCKING)
        assert not any(waiter.done() for waiter in waiters)
        assert raw.info("clients")["connected_clients"] - before <= MOST_BLOCKING + 1  # and the one for requests
        for customer in customers:
            await customer.release()
        await asyncio.gather(*waiters)
        for customer in customers:
            await customer.release()
