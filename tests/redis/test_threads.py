"""Handlers that are plain functions: threads take the next job by themselves, the event loop hears of many ends at once."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
import weakref
from typing import Any

import pytest

from fastq import FastQ, JobContext, Middleware
from fastq.broker.commands import recover
from tests.redis.workshop import working

pytestmark = pytest.mark.versions


async def until(fact: Any, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not fact():
            await asyncio.sleep(0.002)


async def test_as_many_run_side_by_side_as_there_are_threads(redis_url: str) -> None:
    """And each job runs once, whoever took it."""
    app = FastQ(redis_url, result_ttl=0, threads=4, concurrency=50)
    gate, lock = threading.Event(), threading.Lock()
    inside: set[int] = set()
    runs: list[int] = []

    @app.task
    def hold(n: int) -> None:
        with lock:
            inside.add(threading.get_ident())
        assert gate.wait(10)
        with lock:
            runs.append(n)

    await hold.enqueue_many([(n,) for n in range(400)])
    async with working(app) as shop:
        await until(lambda: len(inside) == 4)
        assert len(shop.loop.executor.running) == 4  # and no more were reserved than can run
        gate.set()
        await until(lambda: len(runs) == 400)
    assert sorted(runs) == list(range(400))
    assert len(inside) <= 4
    assert shop.counts("hold") == {"success": 400}


async def test_no_task_and_no_message_per_job(redis_url: str) -> None:
    """What makes it fast: threads tell the loop once for many jobs, and asyncio knows nothing of them."""
    app = FastQ(redis_url, result_ttl=0)
    done: list[int] = []

    @app.task
    def add(n: int) -> None:
        done.append(n)

    async with working(app):
        loop = asyncio.get_running_loop()
        told, tell = 0, loop.call_soon_threadsafe
        before = {task.get_name() for task in asyncio.all_tasks()}
        new: set[str] = set()

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal told
            told += 1
            new.update(task.get_name() for task in asyncio.all_tasks(loop) if task.get_name() not in before)
            return tell(*args, **kwargs)

        loop.call_soon_threadsafe = counting  # type: ignore[method-assign]
        try:
            await add.enqueue_many([(n,) for n in range(3_000)])
            await until(lambda: len(done) == 3_000)
        finally:
            del loop.call_soon_threadsafe
    assert told < 1_500
    assert not {name for name in new if name.startswith("0")}  # job ids, as a Task of a job would be called


seen: contextvars.ContextVar[str] = contextvars.ContextVar("seen", default="")


@pytest.mark.parametrize("ttl", [0.0, 60.0])
async def test_what_comes_of_a_plain_function(redis_url: str, ttl: float) -> None:
    """As of a coroutine function: a context and a job of its own, its result, its error, and what can be no result."""
    app = FastQ(redis_url, result_ttl=ttl, default_max_attempts=1)
    found: list[tuple[str, str, str]] = []

    @app.task
    def mark(name: str) -> str:
        before = seen.get()
        seen.set(name)
        found.append((before, seen.get(), app.job().id))
        return name * 2

    @app.task
    def fail() -> None:
        raise ValueError("no")

    @app.task
    def lazy() -> Any:
        return (n for n in range(3))

    @app.task
    def odd() -> Any:
        return object()

    jobs = [await mark.enqueue(str(n)) for n in range(30)]
    others = [await task.enqueue() for task in (fail, lazy, odd)]
    async with working(app) as shop:
        ends = [await shop.ended(job) for job in (*jobs, *others)]
        await until(lambda: len(found) == 30 and shop.loop.executor.finished == 33)
    assert {(before, after) for before, after, _ in found} == {("", str(n)) for n in range(30)}
    assert {job_id for _, _, job_id in found} == {job.id for job in jobs}
    assert shop.counts("mark") == {"success": 30}
    assert [shop.counts(name) for name in ("fail", "lazy", "odd")] == [{"failed": 1}, {"failed": 1}, {"success": 1}]
    if ttl:
        assert [end.result for end in ends[:30] if end is not None] == [str(n) * 2 for n in range(30)]
        assert "which nobody would run" in str(ends[31].error if ends[31] else "")


async def test_an_idle_thread_keeps_nothing_alive(redis_url: str) -> None:
    app = FastQ(redis_url, result_ttl=0)
    kept: list[weakref.ref[Any]] = []

    class Big:
        pass

    @app.task(max_attempts=1)
    def fail() -> None:
        big = Big()
        kept.append(weakref.ref(big))
        raise ValueError("with a traceback that holds its frame")

    async with working(app) as shop:
        await shop.ended(await fail.enqueue())
        gc.collect()
        await until(lambda: kept[0]() is None)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, StopIteration, asyncio.CancelledError])
@pytest.mark.parametrize("wrapped", [False, True])
async def test_whatever_a_handler_raises_its_thread_goes_on(
    redis_url: str, error: type[BaseException], wrapped: bool
) -> None:
    app = FastQ(redis_url, result_ttl=60, threads=1, default_max_attempts=1)
    if wrapped:
        app.middleware(Middleware())

    @app.task
    def odd() -> None:
        raise error

    @app.task
    def fine() -> str:
        return threading.current_thread().name

    async with working(app) as shop:
        status = await shop.ended(await odd.enqueue())
        assert status.state == "failed"
        status = await shop.ended(await fine.enqueue())
        assert status.result == "fastq-handler_1"


async def test_injected_and_soft_limited_handlers_need_no_task_either(redis_url: str) -> None:
    app = FastQ(redis_url, result_ttl=60)

    @app.task(soft_timeout=30, timeout=60)
    def who(n: int, job: JobContext) -> list[Any]:
        return [n, job.id, app.job().id, job.runner is None]

    job = await who.enqueue(3)
    async with working(app) as shop:
        status = await shop.ended(job)
    assert status.result == [3, job.id, job.id, True]


@pytest.mark.parametrize("why", ["drain", "lost"])
async def test_a_thread_that_goes_on_is_left_behind(redis_url: str, why: str) -> None:
    """Its job goes back, or is another worker's; what it returns in the end counts for nothing."""
    app = FastQ(redis_url, result_ttl=60, max_deliveries=5)
    go, begun, over = threading.Event(), threading.Event(), threading.Event()
    runs: list[int] = []

    @app.task
    def stubborn() -> str:
        runs.append(len(runs) + 1)
        run = len(runs)
        begun.set()
        assert go.wait(20)
        over.set()
        return f"run {run}"

    @app.task
    def wake() -> None: ...

    job = await stubborn.enqueue()
    try:
        async with working(app, grace=0.0) as shop:
            await until(begun.is_set)
            if why == "lost":
                keys = app.keys("default")
                await shop.helper.call(
                    recover(keys, shop.name, expired=False, charge="none", max_deliveries=3, dead_max=10)
                )
                await wake.enqueue()
                await until(lambda: shop.loop.executor.stops.stuck == 1)
                assert shop.counts("stubborn") == {"lost": 1}
                go.set()
                await until(lambda: shop.loop.executor.stops.stuck == 0)
                status = await shop.ended(job)
                assert (status.result, runs) == ("run 2", [1, 2])
                assert shop.counts("stubborn") == {"lost": 1, "success": 1}
        if why == "drain":
            assert shop.counts("stubborn") == {"released": 1}
            status = await job.status()
            assert status is not None
            assert status.state == "pending"
    finally:
        go.set()
        await app.aclose()
    assert await asyncio.to_thread(over.wait, 10)


async def test_its_time_counts_from_when_it_began(redis_url: str) -> None:
    """Not while it waits for a free thread."""
    app = FastQ(redis_url, result_ttl=60, threads=1, concurrency=4)

    @app.task(timeout=1.0, max_attempts=1)
    def slow() -> float:
        begun = time.monotonic()
        while time.monotonic() - begun < 0.35:
            pass
        return time.monotonic() - app.job().started

    @app.task
    async def makes_it_a_mixed_worker() -> None: ...

    jobs = [await slow.enqueue() for _ in range(3)]
    async with working(app) as shop:
        for job in jobs:
            status = await shop.ended(job)
            assert status.state == "success"
            assert 0.35 <= status.result < 0.7, "the second would have 0.7, the third be timed out"
