"""Cancelling jobs that a worker has: told or interrupted, ended once, and never run again."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

import fastq
from fastq import FastQ
from fastq.worker import stopping as stopping_module
from tests.conftest import eventually_async
from tests.redis.workshop import working

CANCELS = "fastq:{default}:cancels"


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastq.worker.cancels.beat", lambda: asyncio.sleep(0.02))


def make_app(url: str, **settings: Any) -> FastQ:
    return FastQ(url, log_level="critical", **settings)


async def test_a_handler_is_told_and_decides(redis_url: str, raw: Any) -> None:
    """F-46: without terminate nothing is interrupted; a handler that stops by itself has been cancelled."""
    app, started = make_app(redis_url), asyncio.Event()

    @app.task(max_attempts=3)
    async def polite(how: str, job: fastq.JobContext) -> str:
        started.set()
        while not job.cancelled:
            await asyncio.sleep(0.005)
        if how == "raise":
            raise RuntimeError("stopped half-way")
        if how == "snooze":
            job.snooze(0)
        return "done"

    async with working(app) as shop:
        for how, state in (("raise", "cancelled"), ("snooze", "cancelled"), ("return", "success")):
            started.clear()
            job = await polite.enqueue(how)
            await started.wait()
            assert await job.cancel()
            status = await shop.ended(job)
            assert (status.state, status.attempts) == (state, 1), how
            assert status.enqueued_at <= status.started_at <= status.finished_at
            assert not await job.cancel(), "it has ended"
            assert not raw.exists(CANCELS)
        assert shop.counts("polite") == {"cancelled": 2, "success": 1}
        assert shop.loop.executor.running == {}


async def test_terminate_interrupts(redis_url: str, raw: Any) -> None:
    """F-46: an async handler gets a CancelledError; one that ends anyhow has succeeded."""
    app, started, interrupted = make_app(redis_url), asyncio.Event(), []

    @app.task
    async def sleeper(*, clean_up: bool = False) -> str:
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            interrupted.append(clean_up)
            if not clean_up:
                raise
        return "cleaned up"

    async with working(app) as shop:
        for clean_up, state in ((False, "cancelled"), (True, "success")):
            started.clear()
            job = await sleeper.enqueue(clean_up=clean_up)
            await started.wait()
            assert await app.cancel(job.id), "told first"
            assert await app.cancel(job.id, terminate=True)
            status = await shop.ended(job)
            assert status.state == state
        assert interrupted == [False, True]
        assert not raw.exists(CANCELS)


async def test_a_thread_is_told_then_given_up(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """F-13: a thread cannot be interrupted: it is told, its job ends, its worker is to be replaced."""
    monkeypatch.setattr(stopping_module, "CANCEL_GRACE", 0.1)
    app, gate, started = make_app(redis_url), threading.Event(), threading.Event()

    @app.task
    def deaf() -> None:
        started.set()
        gate.wait(10)

    @app.task
    def polite(job: fastq.JobContext) -> None:
        while not job.cancelled:
            gate.wait(0.005)
        raise fastq.Retry

    async with working(app) as shop:
        jobs = [await deaf.enqueue(), await polite.enqueue()]
        await eventually_async(started.is_set)
        for job in jobs:
            assert await job.cancel(terminate=True)
        for job in jobs:
            assert (await shop.ended(job)).state == "cancelled"
        assert shop.loop.executor.stops.stuck == 1
        gate.set()
        await eventually_async(lambda: shop.loop.executor.stops.stuck == 0)
        assert shop.counts("deaf") == shop.counts("polite") == {"cancelled": 1}


async def test_what_was_reserved_does_not_start(redis_url: str, raw: Any) -> None:
    """A job that waits in a worker for a free slot is gone at once, and is never run."""
    app, gate, ran = make_app(redis_url, concurrency=1), asyncio.Event(), []

    @app.task
    async def first() -> None:
        await gate.wait()

    @app.task
    async def second() -> None:
        ran.append("second")

    async with working(app) as shop:
        blocker = await first.enqueue()
        await eventually_async(lambda: shop.loop.executor.running)
        held = await second.enqueue()
        lane = shop.loop._lanes[0]
        await shop.loop._turn(lane, 1)  # more than there is room for, as with a prefetch
        assert [job.id for job in shop.loop._backlog] == [held.id]
        assert await held.cancel()
        status = await shop.ended(held)
        assert (status.state, status.last_error) == ("cancelled", "cancelled before it started")
        gate.set()
        assert (await shop.ended(blocker)).state == "success"
        assert ran == []
        assert not raw.exists(CANCELS)


async def test_a_drain_ends_what_was_cancelled(redis_url: str, raw: Any) -> None:
    """The worker leaves before it was told: the job is not handed back, it is over."""
    app, started = make_app(redis_url), asyncio.Event()

    @app.task
    async def sleeper() -> None:
        started.set()
        await asyncio.sleep(60)

    async with working(app, grace=0.0) as shop:
        job = await sleeper.enqueue()
        await started.wait()
        assert await job.cancel()
        shop.loop.stop(0.0, "deploy")
    status = await job.status()
    assert status is not None
    assert status.state == "cancelled"
    assert raw.keys("fastq:{default}:ready:*") == []
    assert not raw.exists(CANCELS)
    await app.aclose()


async def test_no_worker_is_needed(redis_url: str) -> None:
    """A pending and a scheduled job are gone at once; one of an unknown id, or of another queue, is not there."""
    app = make_app(redis_url)

    @app.task
    async def task() -> None: ...

    jobs = [await task.enqueue(), await task.options(delay=60).enqueue()]
    assert not await app.cancel("nobody")
    assert not await app.cancel(jobs[0].id, queue="other")
    for job in jobs:
        assert await app.cancel(job.id, terminate=True)
        status = await job.status()
        assert status is not None
        assert status.state == "cancelled"
    app.close()
    await app.aclose()


async def test_races_have_one_end(redis_url: str, raw: Any) -> None:
    """F-46: cancels against reserve, success, failure and retry: one final state, nothing left over."""
    app, count = make_app(redis_url, concurrency=20, result_ttl=60), 400
    runs: dict[int, int] = {}

    @app.task(max_attempts=2, retry=0)
    async def racer(n: int) -> None:
        runs[n] = runs.get(n, 0) + 1
        await asyncio.sleep(n % 7 * 0.001)
        if n % 3 == 0:
            raise RuntimeError

    async def race(n: int) -> tuple[fastq.JobHandle[None], bool]:
        job = await racer.enqueue(n)
        await asyncio.sleep(n % 11 * 0.002)
        return job, await job.cancel(terminate=n % 2 == 0)

    async with working(app) as shop:
        jobs, answers = zip(*await asyncio.gather(*map(race, range(count))), strict=True)
        ends = [await shop.ended(job, 20) for job in jobs]
        for n, (answer, end) in enumerate(zip(answers, ends, strict=True)):
            assert end is not None
            assert end.state.final
            if end.state == "cancelled":
                assert answer
            if not answer:
                assert end.state in ("success", "failed")
            assert runs.get(n, 0) <= 2
        assert not raw.exists(CANCELS)
        assert {end.state.value for end in ends} >= {"cancelled"}
        await eventually_async(lambda: raw.hlen("fastq:{default}:jobs") == 1)  # the pad


async def test_nobody_is_asked_while_nothing_runs(redis_url: str, raw: Any) -> None:
    """An idle worker does not look, and a busy one looks once per queue and half second whatever it runs."""
    app, gate = make_app(redis_url), asyncio.Event()

    @app.task
    async def waits() -> None:
        await gate.wait()

    def looks() -> tuple[int, int]:
        stats = raw.info("commandstats")
        return tuple(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("exists", "hmget"))

    async with working(app) as shop:
        await asyncio.sleep(0.1)
        idle = looks()
        await asyncio.sleep(0.1)
        assert looks() == idle
        jobs = [await waits.enqueue() for _ in range(50)]
        await eventually_async(lambda: len(shop.loop.executor.running) == 50)
        before = looks()
        await asyncio.sleep(0.2)
        after = looks()
        assert 3 <= after[0] - before[0] <= 11, "one in 20 ms here"
        assert after[1] == before[1]
        gate.set()
        for job in jobs:
            await shop.ended(job)
