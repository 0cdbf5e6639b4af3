"""Limits on jobs (F023, F024, F025, F026): checked before a slot is taken, parked when they are long, nothing charged."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

import fastq
from fastq import FastQ
from fastq.broker.commands import unpark_due
from fastq.broker.limit_views import LimitInspector
from fastq.errors import ConfigError, TaskDefinitionError
from tests.redis.workshop import Workshop, working


@pytest.fixture
def app(redis_url: str) -> FastQ:
    return FastQ(redis_url, result_ttl=60, concurrency=20, queues="default,emails")


async def parked(shop: Workshop, queue: str = "default") -> int:
    info = await shop.app.run(shop.app.inspector.queue(queue))
    return 0 if info is None else info.parked


async def until(fact: Any, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not (await fact() if asyncio.iscoroutinefunction(fact) else fact()):
        assert time.monotonic() < deadline, f"not within {timeout} s"
        await asyncio.sleep(0.002)


def most_in(stamps: list[float], window: float) -> int:
    """Most events in any window of that length."""
    stamps = sorted(stamps)
    first = most = 0
    for last, stamp in enumerate(stamps):
        while stamp - stamps[first] >= window:
            first += 1
        most = max(most, last - first + 1)
    return most


async def test_a_rate_holds_and_is_used(app: FastQ) -> None:
    """F023: 50/s with a burst of 5: 30 jobs take half a second, and never more than the burst and the rate."""
    stamps: list[float] = []

    @app.task(rate_limit="50/s burst 5")
    async def call(n: int) -> None:
        stamps.append(time.monotonic())

    bulk = await call.enqueue_many([(n,) for n in range(30)])
    async with working(app) as shop:
        await until(lambda: len(stamps) == 30)
        assert shop.counts("call") == {"success": 30} or shop.counts("call")["success"] >= 29
    assert bulk.created == 30
    assert most_in(stamps, 0.1) <= 5 + 5 + 1
    assert 0.4 < stamps[-1] - stamps[0] < 1.5


async def test_parked_and_back_by_priority_then_age(app: FastQ) -> None:
    """More than half a second away: aside in Redis, no attempt charged, highest priority first."""
    order: list[str] = []
    limiter = app.limiter("slow", rate="1000/s")

    @app.task(limits=[limiter])
    async def call(name: str) -> None:
        order.append(name)

    await limiter.penalize(1.5)
    for name, priority in (("old", 5), ("new", 5), ("low", 0), ("high", 10)):
        await call.options(priority=priority).enqueue(name)
        accepted = app.now_ms()
        while app.now_ms() == accepted:  # age is told in milliseconds
            pass
    async with working(app) as shop:

        async def all_parked() -> bool:
            return await parked(shop) == 4

        await until(all_parked)
        page = await app.run(app.inspector.jobs("default", "parked"))
        assert [(job.state, job.limit, job.attempts) for job in page] == [("parked", "slow/~all", 0)] * 4
        await until(lambda: len(order) == 4)
    assert order == ["high", "old", "new", "low"]


@pytest.mark.parametrize("what", ["penalty", "rule", "reset"])
async def test_parked_jobs_learn_what_an_operator_allows(app: FastQ, what: str) -> None:
    """Within a second or two, however far away their limit had said that they were."""
    done: list[int] = []
    elsewhere = FastQ(app.settings.url)
    limiter, remote = (each.limiter("api", rate="1/h" if what != "penalty" else "1000/s") for each in (app, elsewhere))

    @app.task(limits=[limiter])
    async def call(n: int) -> None:
        done.append(n)

    if what == "penalty":
        await remote.penalize(3_600)
    else:
        await remote.acquire()
    await call.enqueue_many([(n,) for n in range(3)])
    async with working(app) as shop:

        async def all_parked() -> bool:
            return await parked(shop) == 3

        await until(all_parked)
        turnstile = shop.loop._turnstile
        await until(lambda: any(door.penalty for door in turnstile._far) if what == "penalty" else turnstile._far)
        assert done == []
        if what == "penalty":
            await remote.penalize(0)
        elif what == "rule":
            await remote.update(rate="1000/s")
        else:
            await elsewhere.run(LimitInspector("fastq", {}).reset("api"))
        await until(lambda: len(done) == (1 if what == "reset" else 3), 5.0)
    await remote.update()
    await elsewhere.aclose()


async def test_nothing_waits_behind_a_limited_job(app: FastQ) -> None:
    """No head-of-line blocking: a full queue of jobs that may not run lets the free ones pass, in no slot's way."""
    done: list[int] = []

    @app.task(rate_limit="1/h")
    async def limited(n: int) -> None: ...

    @app.task
    async def free(n: int) -> None:
        done.append(n)

    await limited.enqueue_many([(n,) for n in range(500)])
    await free.enqueue_many([(n,) for n in range(50)])
    async with working(app) as shop:
        await until(lambda: len(done) == 50)

        async def rest() -> bool:
            return await parked(shop) == 499

        await until(rest)
        assert shop.counts("limited") == {"success": 1}


async def test_concurrency_across_two_workers(app: FastQ) -> None:
    running, most, done = 0, 0, 0

    @app.task(concurrency=3)
    async def hold(n: int) -> None:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        done += 1

    await hold.enqueue_many([(n,) for n in range(60)])
    async with working(app), working(app):
        await until(lambda: done == 60)
    assert most == 3


async def test_a_failing_job_gives_its_slot_back(app: FastQ) -> None:
    ran: list[int] = []

    @app.task(concurrency=1, max_attempts=1)
    async def fail(n: int) -> None:
        ran.append(n)
        raise ValueError(n)

    await fail.enqueue_many([(n,) for n in range(5)])
    async with working(app):
        await until(lambda: len(ran) == 5)
    assert sorted(ran) == [0, 1, 2, 3, 4]


async def test_a_limit_per_argument(app: FastQ) -> None:
    """limit_key: each tenant has the limit for itself."""
    done: list[str] = []

    @app.task(rate_limit="1/h", limit_key="tenant:{tenant}")
    async def sync(tenant: str, n: int = 0) -> None:
        done.append(tenant)

    @app.task(rate_limit="1/h", limit_key=lambda tenant: tenant.upper())
    async def other(job: fastq.JobContext, tenant: str) -> None:
        done.append(f"other {tenant}")

    for n in range(3):
        for tenant in ("a", "b"):
            await sync.enqueue(tenant, n)
    await other.enqueue("x")
    await other.enqueue(tenant="X")
    async with working(app) as shop:

        async def rest() -> bool:
            return len(done) == 3 and await parked(shop) == 5

        await until(rest)
    assert sorted(done)[:2] == ["a", "b"]


async def test_cost(app: FastQ) -> None:
    done: list[int] = []

    @app.task(rate_limit="10/h burst 10", cost=lambda size: size)
    async def send(size: int) -> None:
        done.append(size)

    await send.enqueue(6)
    await send.enqueue(11)  # more than the limit can ever grant
    await send.enqueue(5)
    async with working(app) as shop:

        async def rest() -> bool:
            return done == [6] and await parked(shop) == 1 and len(await app.dead.list()) == 1

        await until(rest)
    (letter,) = await app.dead.list()
    assert "11" in letter.error_message
    await app.aclose()


async def test_all_or_nothing(app: FastQ) -> None:
    """F026: several limiters; a job that one of them stops takes nothing of the other."""
    done: list[int] = []
    wide, narrow = app.limiter("wide", rate="2/h burst 10"), app.limiter("narrow", rate="1/h")

    @app.task(limits=[wide, "narrow"])
    async def both(n: int) -> None:
        done.append(n)

    await both.enqueue_many([(n,) for n in range(4)])
    async with working(app) as shop:

        async def rest() -> bool:
            return len(done) == 1 and await parked(shop) == 3

        await until(rest)
        assert (await narrow.state()).remaining == 0

        async def given_back() -> bool:
            return (await wide.state()).remaining == 9

        await until(given_back)


async def test_a_limit_on_a_queue(app: FastQ) -> None:
    """F025: whatever the task."""
    done: list[str] = []
    app.queue("emails", rate_limit="3/h burst 3")

    @app.task(queue="emails")
    async def welcome() -> None:
        done.append("welcome")

    @app.task
    async def bye() -> None:
        done.append("bye")

    for _ in range(3):
        await welcome.enqueue()
        await bye.options(queue="emails").enqueue()
        await bye.enqueue()
    async with working(app) as shop:

        async def rest() -> bool:
            return len(done) == 6 and await parked(shop, "emails") == 3

        await until(rest)
    assert done.count("bye") >= 3


async def test_a_handler_that_gives_up_on_a_limiter_is_handed_back(app: FastQ) -> None:
    """F022: back-pressure, not failure: no attempt is charged."""
    busy = app.limiter("busy", rate="1/h")

    @app.task(max_attempts=1)
    async def call() -> None:
        await busy.acquire(timeout=0.01)

    @app.task(max_attempts=1, never_on=TimeoutError)
    async def proud() -> None:
        await busy.acquire(timeout=0.01)

    @app.task(max_attempts=1)
    def sync_call() -> None:
        busy.sync.acquire(timeout=0.01)

    await busy.acquire()
    jobs = [await call.enqueue(), await proud.enqueue(), await sync_call.enqueue()]
    async with working(app) as shop:
        await until(lambda: shop.counts("call") and shop.counts("proud") and shop.counts("sync_call"))
        assert shop.counts("call") == {"snoozed": 1}
        assert shop.counts("sync_call") == {"snoozed": 1}
        assert shop.counts("proud") == {"failed": 1}
        status = await jobs[0].status()
        assert status is not None
        assert (status.state, status.attempts) == ("scheduled", 0)


async def test_requeue(app: FastQ) -> None:
    """F042: requeue_job(delay=n) inside a job."""

    @app.task(max_attempts=1)
    async def again() -> None:
        fastq.requeue(delay=60)

    job = await again.enqueue()
    async with working(app) as shop:
        await until(lambda: shop.counts("again") == {"snoozed": 1})
        status = await job.status()
        assert status is not None
        assert status.state == "scheduled"
    with pytest.raises(fastq.FastQError, match="inside a handler"):
        fastq.requeue()


async def test_a_worker_that_stops_leaves_nothing_behind(app: FastQ) -> None:
    """Those that wait here go back uncharged; those that are parked are found by the next worker."""
    done: list[int] = []
    limiter = app.limiter("gate", rate="1000/s")

    @app.task(limits=["gate"])
    async def call(n: int) -> None:
        done.append(n)

    await limiter.penalize(0.8)
    await call.enqueue_many([(n,) for n in range(40)])
    async with working(app) as shop:

        async def some() -> bool:
            return await parked(shop) > 0

        await until(some)
    async with working(app) as shop:

        async def go_on() -> bool:
            keys = app.keys("default")
            await shop.helper.call(unpark_due(keys))  # as the scheduler does
            return len(done) == 40

        await until(go_on)
    assert sorted(done) == list(range(40))


async def test_a_cancelled_parked_job_does_not_run(app: FastQ) -> None:
    done: list[int] = []
    limiter = app.limiter("later", rate="1000/s")

    @app.task(limits=["later"])
    async def call(n: int) -> None:
        done.append(n)

    await limiter.penalize(1.2)
    jobs = [await call.enqueue(n) for n in range(3)]
    async with working(app) as shop:

        async def aside() -> bool:
            return await parked(shop) == 3

        await until(aside)
        assert await app.cancel(jobs[1].id)
        await until(lambda: len(done) == 2)
    assert sorted(done) == [0, 2]


async def test_the_users_own_functions_may_fail(app: FastQ) -> None:
    """limit_key and cost are code: what they raise is the job's failure, classified like any other."""

    @app.task(rate_limit="10/s", limit_key=lambda tenant: tenant["id"], max_attempts=1)
    async def call(tenant: dict[str, str]) -> None: ...

    @app.task(rate_limit="10/s", limit_key=lambda n: n, max_attempts=1)
    async def number(n: int) -> None: ...

    await call.enqueue({})
    await number.enqueue(5)
    async with working(app):

        async def dead() -> bool:
            return len(await app.dead.list()) == 2

        await until(dead)
        letters = {letter.task: letter for letter in await app.dead.list()}
    assert letters["call"].error_type == "KeyError"
    assert "return a string" in letters["number"].error_message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rate_limit": "10/fortnight"}, "10/fortnight"),
        ({"rate_limit": 10}, "10"),
        ({"concurrency": 0}, ": concurrency=0"),
        ({"limits": "api"}, "must be a list"),
        ({"cost": 3}, "no limit to apply it to"),
        ({"limit_key": "{x}"}, "no limit to apply it to"),
        ({"rate_limit": "1/s", "limit_key": "{y}"}, "no parameter 'y'"),
        ({"rate_limit": "1/s", "limit_key": 5}, "limit_key=5"),
        ({"rate_limit": "1/s", "cost": 2}, "cost=2"),
        ({"limits": ["api"], "limit_key": "{x}"}, "shared limiter"),
        ({"ratelimit": "1/s"}, "did you mean 'rate_limit'"),
    ],
)
def test_nonsense_is_told_at_once(app: FastQ, options: dict[str, Any], says: str) -> None:
    async def call(x: int) -> None: ...

    with pytest.raises(TaskDefinitionError, match="call") as told:
        app.task(**options)(call)
    assert says in str(told.value)


def test_unknown_limiters_are_told_before_a_worker_starts(app: FastQ) -> None:
    @app.task(limits=["no_such"])
    async def call() -> None: ...

    @app.task(limits=["api:{who}"])
    async def other() -> None: ...

    app.limiter("api", rate="1/s")
    with pytest.raises(ConfigError, match="no limiter 'no_such'"):
        app.limits_of("call", "default")
    with pytest.raises(ConfigError, match="no parameter 'who'"):
        app.limits_of("other", "default")


def test_limits_of_a_queue_are_said_once(app: FastQ) -> None:
    app.queue("emails", rate_limit="100/m", concurrency=20)
    app.queue("emails", rate_limit="100/m", concurrency=20)
    with pytest.raises(TaskDefinitionError, match="other limits before"):
        app.queue("emails", rate_limit="200/m")
    with pytest.raises(TaskDefinitionError, match="concurrency=-1"):
        app.queue("other", concurrency=-1)
    library = fastq.Tasks()
    library.queue("reports", concurrency=2)
    app.include(library)
    assert app.queue_limits["reports"].concurrency == 2


async def test_a_limit_that_never_denies_is_passed_by_the_compiled_runner_unless_paused(app: FastQ) -> None:
    """Units at hand are taken without Python in between; a paused task is not let pass all the same."""
    done: list[int] = []

    @app.task(rate_limit="1000000/s", result_ttl=0)
    async def call(n: int) -> None:
        done.append(n)

    await call.enqueue_many([(n,) for n in range(300)])
    async with working(app) as shop:
        await until(lambda: len(done) == 300)
        doors = shop.loop.executor.plans["call"].doors
        assert list(doors) == ["default"]
        limiter = doors["default"][0].limiter
        assert limiter.counts.units == 300
        await app.queues.pause(task="call")
        await until(lambda: not doors)
        await call.enqueue_many([(n,) for n in range(20)])

        async def aside() -> bool:
            return await parked(shop) == 20

        await until(aside)
        await app.queues.resume(task="call")

        async def all_done() -> bool:
            await shop.helper.call(unpark_due(app.keys("default")))  # as the scheduler does
            return len(done) == 320

        await until(all_done)
