"""watch.lua, and the events that iterators see (F158, F161, F162)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import fastq
from fastq.broker import commands
from fastq.broker.command import raw
from tests.conftest import MakeServer, eventually_async
from tests.redis.lab import Lab
from tests.redis.workshop import working

TTL = 120_000


def watch(lab: Lab, *targets: str) -> tuple[bytes, list[bool]]:
    return lab.call(commands.watch(lab.q, TTL, targets))


def test_what_is_open_can_be_watched(lab: Lab) -> None:
    lab.enqueue("a", "b")
    assert lab.twice(commands.watch(lab.q, TTL, ["a", "gone"])) == ((b"0-0", [True, False]), (b"0-0", [True, False]))
    assert lab.value("awaited") == {"a": b" !"}
    assert 0 < lab.raw.pttl(lab.q.awaited) <= TTL
    lab.register()
    lab.reserve()
    lab.settle(succeeded=["a", "b"])
    rows = lab.raw.xrange(lab.q.events)
    assert [fields for _, fields in rows] == [{b"started": b"a"}, {b"succeeded": b"a"}]
    assert lab.value("awaited") is None
    assert watch(lab, "a") == (rows[-1][0], [False])


def test_a_waiter_and_a_watcher_of_one_job(lab: Lab) -> None:
    lab.enqueue("a")
    watch(lab, "a")
    lab.call(commands.follow(lab.q, "told:1", ["a"], TTL))
    watch(lab, "a")
    assert lab.value("awaited") == {"a": b" ! told:1"}


def test_a_whole_queue(lab: Lab) -> None:
    watch(lab, "*")
    assert abs(int(lab.value("awaited")["*"]) - lab.now() - TTL) < 60_000
    lab.take("a")
    assert [fields for _, fields in lab.raw.xrange(lab.q.events)] == [{b"started": b"a"}]


def test_the_stream_is_bounded(lab: Lab) -> None:
    watch(lab, "*")
    for _ in range(3):
        ids = [f"j{n}" for n in range(2_000)]
        for start in range(0, 2_000, 500):
            lab.enqueue(*ids[start : start + 500])
        lab.register()
        lab.reserve(2_000)
        lab.settle(succeeded=ids)
    assert 10_000 <= lab.raw.xlen(lab.q.events) <= 10_200
    assert 0 < lab.raw.pttl(lab.q.events) <= 600_000


# -- iterators --------------------------------------------------------------------------------------------------------


def make_app(url: str) -> fastq.FastQ:
    app = fastq.FastQ(url, log_level="error")

    @app.task
    async def add(a: int, b: int) -> int:
        return a + b

    @app.task(max_attempts=2, retry=0.001)
    async def broken(job: fastq.JobContext) -> None:
        job.progress(1, 2)
        raise KeyError("x")

    @app.task
    async def counted(job: fastq.JobContext) -> None:
        await job.progress(1, 4, message="one")
        for _ in range(1_000):
            if (status := await app.get_status(job.id)) and status.progress:
                return
            await asyncio.sleep(0.005)

    return app


@asynccontextmanager
async def collected(events: AsyncIterator[fastq.Event]) -> AsyncIterator[list[fastq.Event]]:
    """What an iterator yields, gathered behind one's back."""
    found: list[fastq.Event] = []

    async def gather() -> None:
        async for event in events:
            found.append(event)  # noqa: PERF401 - seen while it grows

    task = asyncio.create_task(gather())
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def watched(app: fastq.FastQ, field: str) -> bool:
    value = await app.call(raw("HGET", app.keys("default").awaited, field))
    return value is not None and (field == "*" or b"!" in value)


def kinds(events: list[fastq.Event], job: fastq.JobHandle[Any]) -> list[str]:
    return [event.kind for event in events if event.job_id == job.id]


async def test_the_events_of_a_job(redis_url: str) -> None:
    """From the start to the end, after which the iterator ends; other jobs of the queue are not in it."""
    app = make_app(redis_url)
    job = await app.enqueue("counted")
    async with collected(job.events()) as events:
        await eventually_async(lambda: watched(app, job.id))
        async with working(app):
            await (await app.enqueue("add", 1, 2)).result(10)
            await job.result(10)
            await eventually_async(lambda: events[-1].final)
            assert [event.kind for event in events] == ["started", "progress", "succeeded"]
            assert {event.job_id for event in events} == {job.id}
            said = events[1].progress
            assert said is not None
            assert (said.current, said.percent, said.message) == (1, 25.0, "one")
            assert events[1].to_dict()["progress"]["percent"] == 25.0
            assert events[0].at <= events[1].at <= events[2].at
            assert [event.kind async for event in job.events()] == ["succeeded"]  # it has ended before


async def test_retries_and_failure(redis_url: str) -> None:
    app = make_app(redis_url)
    job = await app.enqueue("broken")
    async with collected(job.events()) as events:
        await eventually_async(lambda: watched(app, job.id))
        async with working(app) as shop:
            await shop.ended(job)
            await eventually_async(lambda: events[-1].final)
    assert [event.kind for event in events if event.kind != "progress"] == ["started", "retried", "started", "failed"]


async def test_the_events_of_a_queue(redis_url: str) -> None:
    """All jobs; two iterators share one connection that reads; after the last one nobody reads."""
    app = make_app(redis_url)
    async with collected(app.events()) as events, collected(app.events(queue="default")) as twin:
        await eventually_async(lambda: watched(app, "*"))
        cancelled = await app.options(delay=60).enqueue("add", 1, 2)
        assert await app.cancel(cancelled.id)
        async with working(app):
            jobs = [await app.enqueue("add", n, 1) for n in range(20)]
            await asyncio.gather(*(job.result(10) for job in jobs))
            await eventually_async(lambda: len(events) == 41 == len(twin))
            assert kinds(events, cancelled) == ["cancelled"]
            assert all(kinds(events, job) == ["started", "succeeded"] for job in jobs)
            assert events == twin
            assert len(app._watches._streams) == 1
    assert app._watches._streams == {}


async def test_a_job_that_has_left_no_trace(redis_url: str) -> None:
    app = make_app(redis_url)
    gone: fastq.JobHandle[int] = fastq.JobHandle(app, "gone", "default")
    assert [event async for event in gone.events()] == []
    await app.aclose()


async def test_a_lost_connection(redis_url: str, raw: Any) -> None:
    """It goes on where it was: every event once, in order."""
    app = make_app(redis_url)
    async with collected(app.events()) as events:
        await eventually_async(lambda: watched(app, "*"))
        async with working(app):
            for _ in range(5):
                for client in raw.client_list():
                    if client["cmd"] == "xread":
                        raw.client_kill_filter(_id=client["id"])
                await (await app.enqueue("add", 1, 2)).result(10)
            await eventually_async(lambda: len(events) >= 10)
    assert [event.kind for event in events] == ["started", "succeeded"] * 5


async def test_redis_comes_back_empty(make_server: MakeServer) -> None:
    """The job is gone with it; its iterator ends and the queue's goes on."""
    server = make_server()
    app = make_app(server.url)
    job = await app.enqueue("add", 1, 2)
    ended = asyncio.ensure_future(_all(job.events()))
    async with collected(app.events()) as events:
        await eventually_async(lambda: watched(app, job.id))
        await eventually_async(lambda: watched(app, "*"))
        server.restart()
        assert await asyncio.wait_for(ended, 20) == []
        await eventually_async(lambda: watched(app, "*"))
        async with working(app):
            other = await app.enqueue("add", 1, 2)
            await other.result(10)
            await eventually_async(lambda: kinds(events, other) == ["started", "succeeded"])


async def _all(events: AsyncIterator[fastq.Event]) -> list[fastq.Event]:
    return [event async for event in events]


async def test_closing_the_application_ends_the_iterators(redis_url: str) -> None:
    app = make_app(redis_url)
    task = asyncio.create_task(_all(app.events()))
    await eventually_async(lambda: watched(app, "*"))
    await app.aclose()
    assert await asyncio.wait_for(task, 5) == []
    await app.aclose()


async def test_a_queue_that_cannot_be_read_says_so(redis_url: str, raw: Any) -> None:
    app = make_app(redis_url)
    task = asyncio.create_task(_all(app.events()))
    await eventually_async(lambda: watched(app, "*"))
    raw.set(app.keys("default").events, "not a stream")
    with pytest.raises(fastq.BrokerReplyError, match="WRONGTYPE"):
        await asyncio.wait_for(task, 20)
    raw.delete(app.keys("default").events)
    await app.aclose()
