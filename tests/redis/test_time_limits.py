"""Soft time limits: raised inside the handler, in every shape that a handler has."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

import fastq
from fastq import FastQ, SoftTimeLimitExceeded
from tests.redis.workshop import working

pytestmark = pytest.mark.versions  # asyncio, signals and forks differ


def make_app(url: str, **settings: Any) -> FastQ:
    return FastQ(url, log_level="critical", **settings)


async def test_an_async_handler_may_tidy_up(redis_url: str) -> None:
    """F262, F263: it catches the error where it awaits; what it makes of it is the outcome."""
    app, seen = make_app(redis_url), []

    @app.task(soft_timeout=0.05, timeout=30, max_attempts=1)
    async def slow(how: str) -> str:
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded as error:
            seen.append((how, type(error).__name__, isinstance(error, asyncio.CancelledError)))
            assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]
            await asyncio.sleep(0)  # a handler may await while it tidies up
            if how == "raise":
                raise
        return "tidy"

    async with working(app) as shop:
        tidy, uncaught = await slow.enqueue("return"), await slow.enqueue("raise")
        status = await shop.ended(tidy)
        assert (status.state, status.result) == ("success", "tidy")
        await shop.ended(uncaught)
        letter = await app.run(app.inspector.dead_show(uncaught.id))
        assert letter is not None
        assert (letter.reason, letter.error_type) == ("timeout", "SoftTimeLimitExceeded")
        assert letter.error_message == "ran longer than its soft_timeout"
        assert "in slow" in letter.traceback
        assert "soft.py" not in letter.traceback
        assert seen == [(how, "SoftTimeLimitExceeded", True) for how in ("return", "raise")]


async def test_it_reaches_through_everything_that_waits(redis_url: str) -> None:
    """F263: task groups take their children along; gather, timeout, shield and a plain future let it through."""
    app, children = make_app(redis_url), []

    async def child() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            children.append("cancelled")
            raise

    async def group() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(child())
            tasks.create_task(child())

    async def limited() -> None:
        async with asyncio.timeout(60):
            await child()

    ways = {
        "group": group,
        "timeout": limited,
        "gather": lambda: asyncio.gather(child(), child()),
        "wait_for": lambda: asyncio.wait_for(child(), 60),
        "future": lambda: asyncio.get_running_loop().create_future(),
    }

    @app.task(soft_timeout=0.05)
    async def waits(how: str) -> str:
        try:
            await ways[how]()
        except SoftTimeLimitExceeded:
            return how
        return "?"

    async with working(app) as shop:
        jobs = {how: await waits.enqueue(how) for how in ways}
        for how, job in jobs.items():
            assert (await shop.ended(job)).result == how
        assert children == ["cancelled"] * 6


async def test_a_thread_is_interrupted_between_two_lines(redis_url: str) -> None:
    """F262, F263: also one that loops in Python; the pool's thread is none the worse for it."""
    app, threads = make_app(redis_url, threads=1), set()

    @app.task(soft_timeout=0.05, timeout=30, max_attempts=1)
    def spins(how: str) -> str:
        threads.add(threading.get_ident())
        try:
            while True:
                time.sleep(0.001)
        except SoftTimeLimitExceeded:
            if how == "raise":
                raise
            return "tidy"

    @app.task(soft_timeout=30)
    def quick(n: int) -> int:
        return n

    async with working(app) as shop:
        tidy, uncaught = await spins.enqueue("return"), await spins.enqueue("raise")
        assert (await shop.ended(tidy)).result == "tidy"
        assert (await shop.ended(uncaught)).state == "failed"
        letter = await app.run(app.inspector.dead_show(uncaught.id))
        assert letter is not None
        assert (letter.reason, letter.error_type) == ("timeout", "SoftTimeLimitExceeded")
        jobs = [await quick.enqueue(n) for n in range(20)]
        assert [(await shop.ended(job)).result for job in jobs] == list(range(20))
        assert len(threads) == 1


async def test_it_never_hits_what_the_thread_does_next(redis_url: str) -> None:
    """Handlers that end at about the moment of their limit: each succeeds or has exceeded it, and the thread lives."""
    app = make_app(redis_url, threads=2, concurrency=2)

    @app.task(soft_timeout=0.1, max_attempts=1)
    def close(n: int) -> int:
        until = time.monotonic() + 0.1 + (n % 10) * 0.012
        while time.monotonic() < until:
            time.sleep(0.0005)
        return n

    async with working(app) as shop:
        jobs = [await close.enqueue(n) for n in range(30)]
        for n, job in enumerate(jobs):
            status = await shop.ended(job, 30)
            assert status.state in ("success", "failed")
            if status.state == "success":
                assert status.result == n
            else:
                letter = await app.run(app.inspector.dead_show(job.id))
                assert letter is not None
                assert letter.error_type == "SoftTimeLimitExceeded"
        assert shop.loop.executor.stops.stuck == 0


async def test_the_hard_limit_follows(redis_url: str) -> None:
    """F262, F264: a handler that goes on after its soft limit is stopped by the hard one, and is retried."""
    app, runs = make_app(redis_url), []

    @app.task(soft_timeout=0.05, timeout=0.3, retry=0, max_attempts=2)
    async def stubborn() -> None:
        runs.append(time.monotonic())
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            runs.append(time.monotonic())
        await asyncio.sleep(60)

    async with working(app) as shop:
        job = await stubborn.enqueue()
        assert (await shop.ended(job)).state == "failed"
        letter = await app.run(app.inspector.dead_show(job.id))
        assert letter is not None
        assert (letter.error_type, letter.attempts, len(runs)) == ("JobTimeout", 2, 4)


@pytest.mark.parametrize("own", [None, 60.0], ids=["a task without one", "a task with one"])
async def test_a_soft_limit_of_one_call(redis_url: str, own: float | None) -> None:
    """F262: shorter or none for one call, in a task that is async and in a thread; its retry has it, too."""
    app, told = make_app(redis_url), []

    @app.task(soft_timeout=own, max_attempts=2, retry=0)
    async def waits() -> None:
        try:
            await asyncio.sleep(30)
        except SoftTimeLimitExceeded:
            told.append("async")
            raise

    @app.task(soft_timeout=own, max_attempts=1)
    def spins() -> None:
        while True:
            time.sleep(0.001)

    @app.task(soft_timeout=0.05, max_attempts=1)
    async def patient() -> str:
        await asyncio.sleep(0.3)
        return "had its time"

    async with working(app) as shop:
        quick = await waits.options(soft_timeout=0.05).enqueue()
        thread = await spins.options(soft_timeout=0.05).enqueue()
        unhurried = await patient.options(soft_timeout=0).enqueue()
        assert (await shop.ended(quick)).last_error == "SoftTimeLimitExceeded: ran longer than its soft_timeout"
        assert told == ["async", "async"]
        assert (await shop.ended(thread)).state == "failed"
        assert (await shop.ended(unhurried)).result == "had its time"
        with pytest.raises(fastq.InvalidOption, match="soft_timeout"):
            waits.options(soft_timeout=-1)  # told where the call is made
            await waits.options(soft_timeout=-1).enqueue()


@pytest.mark.parametrize(
    ("options", "runs"),
    [({}, 2), ({"retry_on": ValueError}, 2), ({"never_on": SoftTimeLimitExceeded}, 1)],
    ids=["default", "retry_on", "never_on"],
)
async def test_it_is_retried_like_a_time_limit(redis_url: str, options: dict[str, Any], runs: int) -> None:
    """F264."""
    app, begun = make_app(redis_url), []

    @app.task(soft_timeout=0.02, retry=0, max_attempts=2, **options)
    async def slow() -> None:
        begun.append(1)
        await asyncio.sleep(60)

    async with working(app) as shop:
        job = await slow.enqueue()
        assert (await shop.ended(job)).state == "failed"
        assert len(begun) == runs


async def test_the_default_of_the_application(redis_url: str) -> None:
    """F262; and a soft limit that is not shorter than the hard one does nothing."""
    app = make_app(redis_url, default_soft_timeout=0.05)

    @app.task
    async def slow() -> str:
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            return "soft"
        return "?"

    @app.task(soft_timeout=60, timeout=0.05, max_attempts=1)
    async def harder() -> None:
        await asyncio.sleep(60)

    async with working(app) as shop:
        assert (await shop.ended(await slow.enqueue())).result == "soft"
        job = await harder.enqueue()
        await shop.ended(job)
        letter = await app.run(app.inspector.dead_show(job.id))
        assert letter is not None
        assert letter.error_type == "JobTimeout"


async def test_a_limit_in_a_middleware(redis_url: str) -> None:
    """What is not the handler sees a cancellation; the job has exceeded its limit all the same."""
    app = make_app(redis_url)

    class Slow(fastq.Middleware):
        async def before(self, job: fastq.JobContext) -> None:
            await asyncio.sleep(60)

    app.middleware(Slow())

    @app.task(soft_timeout=0.05, max_attempts=1)
    async def task() -> None: ...

    async with working(app) as shop:
        job = await task.enqueue()
        await shop.ended(job)
        letter = await app.run(app.inspector.dead_show(job.id))
        assert letter is not None
        assert letter.error_type == "SoftTimeLimitExceeded"
