"""Workers that die, jobs that come twice, a Redis that goes away; handlers run where they are enqueued."""

from __future__ import annotations

import asyncio
import time

import pytest

import fastq
from fastq.testing import Drained, Kit


def make_app() -> tuple[fastq.FastQ, list[int]]:
    app = fastq.FastQ("memory://")
    ran: list[int] = []

    @app.task
    async def charge(order: int) -> int:
        ran.append(order)
        return order

    @app.task
    def in_thread(order: int) -> int:
        ran.append(order)
        if order < 0:
            raise ValueError
        return order

    return app, ran


async def test_a_worker_killed_after_the_handler_has_it_run_again():
    app, ran = make_app()
    async with Kit(app) as kit:
        kit.kill_worker_at("after_handler")
        job = await app.enqueue("charge", 1)
        assert await kit.drain() == Drained(success=1, lost=1)
        assert ran == [1, 1]
        status = await job.status()
        assert status is not None
        assert (status.state, status.attempts) == ("success", 1)  # a death is no failed attempt
        await app.enqueue("charge", 2)
        await kit.drain()
        assert ran == [1, 1, 2]  # once


async def test_a_worker_killed_before_the_handler_of_a_certain_task():
    app, ran = make_app()
    async with Kit(app) as kit:
        kit.kill_worker_at("before_handler", task="in_thread")
        await app.enqueue("charge", 1)
        await kit.drain()
        await app.enqueue("in_thread", 2)
        await kit.drain()
        assert ran == [1, 2]
        with pytest.raises(fastq.InvalidOption, match="one of before_handler, after_handler, not at 'lunch'"):
            kit.kill_worker_at("lunch")  # type: ignore[arg-type]


async def test_a_job_that_kills_its_workers_is_buried():
    app, ran = make_app()
    async with Kit(app) as kit:
        for _ in range(3):
            kit.kill_worker_at("after_handler")
        job = await app.enqueue("in_thread", 7)
        await kit.drain()
        assert ran == [7, 7, 7]
        status = await job.status()
        assert status is not None
        assert (status.state, status.error_type) == ("failed", "WorkerLost")


async def test_a_delivery_too_many():
    """The first outcome is dropped, because its worker holds the job no more."""
    app, ran = make_app()
    async with Kit(app) as kit:
        kit.deliver_twice()
        job = await app.enqueue("charge", 1)
        await kit.drain()
        assert ran == [1, 1]
        assert await job.result() == 1
        assert kit.enqueued() == []


async def test_a_fault_strikes_in_an_advance_too():
    app, ran = make_app()
    async with Kit(app) as kit:
        kit.kill_worker_at("after_handler")
        await app.options(delay=60).enqueue("charge", 1)
        assert (await kit.advance(hours=1)).success == 1
        assert ran == [1, 1]


async def test_redis_goes_away_and_comes_back():
    app, _ = make_app()

    async with Kit(app) as kit:

        @app.task
        async def outage() -> None:
            kit.redis_down(0.3)

        job = await outage.enqueue()
        began = time.monotonic()
        assert (await kit.drain()).total == 1
        assert 0.3 <= time.monotonic() - began < 10
        assert (await job.status()).state == "success"
        with pytest.raises(fastq.BrokerUnavailable):
            kit.redis_down(30)
            await asyncio.wait_for(fastq.FastQ(kit.server.url, enqueue_timeout=0.2).enqueue("charge", 1), 10)
    with Kit(app) as kit:  # the end of a kit ends its outage
        assert kit.enqueued() == []


async def test_eager_jobs_run_where_they_are_enqueued():
    """F382: "tasks execute immediately"; F384."""
    app, ran = make_app()

    @app.task
    async def nested(n: int, job: fastq.JobContext) -> str:
        await app.enqueue("charge", n)
        assert app.job() is job
        return f"{job.task} {n}"

    async with Kit(app) as kit:
        with kit.eager():
            job = await nested.options(delay=60).enqueue(3)
            assert ran == [3]
            assert await job.result() == "nested 3"
            status = await job.status()
            assert status is not None
            assert status.status in ("pending", "success")
            assert app.enqueue_sync("in_thread", 4).result_sync() == 4
            assert len(await app.tasks["charge"].enqueue_many([(1,), (2,)])) == 2
            with pytest.raises(ValueError, match=r"^$"):
                await app.enqueue("in_thread", -1)
            with pytest.raises(fastq.InvalidArguments):
                await app.enqueue("charge", "x")
            with pytest.raises(fastq.FastQError, match="cannot be run inside a running event loop"):
                app.enqueue_sync("charge", 1)
        assert kit.enqueued() == []
        await app.enqueue("charge", 9)
        kit.assert_enqueued("charge", 9)
        assert 9 not in ran


def test_eager_jobs_of_plain_functions():
    app, ran = make_app()
    with Kit(app) as kit, kit.eager():
        assert app.enqueue_sync("charge", 5).result_sync() == 5
    assert ran == [5]
