"""Results are waited for: told by a message, whoever waits, however the job ends (F155, F156, F164, F175, F176)."""

from __future__ import annotations

import asyncio
import datetime as dt
import decimal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import fastq
from fastq.broker.embedded import EmbeddedServer
from tests.chaos.proxy import FaultProxy
from tests.conftest import MakeServer, eventually_async
from tests.redis.workshop import working


@dataclass
class Page:
    number: int
    at: dt.datetime
    words: tuple[str, ...]


@pytest.fixture
def app(redis_url: str) -> Iterator[fastq.FastQ]:
    app = fastq.FastQ(redis_url, log_level="error")

    @app.task
    async def add(a: int, b: int) -> int:
        return a + b

    @app.task
    async def page(number: int) -> Page:
        return Page(number, dt.datetime(2026, 1, 2, tzinfo=dt.UTC), ("a", "b"))

    @app.task
    async def exact() -> tuple[decimal.Decimal, uuid.UUID]:
        return decimal.Decimal("1.10"), uuid.UUID(int=7)

    @app.task
    async def liar() -> int:
        return "no number"  # type: ignore[return-value]

    @app.task(max_attempts=2, retry=0.001)
    async def broken() -> None:
        raise KeyError("the one key")

    @app.task
    async def large() -> bytes:
        return bytes(2_000_000)

    @app.task
    async def strange() -> object:
        return object()

    @app.task(result_ttl=0)
    async def traceless() -> int:
        return 1

    @app.task
    def blocking(n: int) -> int:
        return n * 2

    @app.task
    async def structured(order: int) -> fastq.JobResult:
        return fastq.JobResult(success=True, message="charged", details={"order": order})

    yield app
    app.close()


async def test_the_result_of_a_job(app: fastq.FastQ) -> None:
    """F175: enqueued, awaited, run, told; and asked again once it is there."""
    async with working(app):
        job = await app.enqueue("add", 1, 2)
        assert await job.result(timeout=10) == 3
        assert await job.result(timeout=0.5) == 3
        status = await app.wait_for(job.id, timeout=1)
        assert status is not None
        assert (status.state, status.status, status.result) == (fastq.JobState.SUCCESS, "success", 3)
        assert await job.exists()


async def test_a_result_has_the_annotated_type(app: fastq.FastQ) -> None:
    async with working(app):
        job = await app.enqueue("page", 3)
        assert await job.result(10) == Page(3, dt.datetime(2026, 1, 2, tzinfo=dt.UTC), ("a", "b"))
        exact = await (await app.enqueue("exact")).result(10)
        assert exact == (decimal.Decimal("1.10"), uuid.UUID(int=7))
        with pytest.raises(
            fastq.UndecodableJob, match=r"'liar' is not the int that it says: Expected `int`, got `str`"
        ):
            await (await app.enqueue("liar")).result(10)
        result = await (await app.enqueue("structured", 7)).result(10)
        assert result == fastq.JobResult(success=True, message="charged", details={"order": 7})  # F166


async def test_a_failed_job(app: fastq.FastQ) -> None:
    """Only the last failure ends the waiting, and it is told as text."""
    async with working(app) as shop:
        job = await app.enqueue("broken")
        waiting = asyncio.ensure_future(job.result(timeout=10))
        await shop.ended(job)
        with pytest.raises(fastq.JobFailed, match="failed after 2 attempts: KeyError: 'the one key'") as caught:
            await waiting
        error = caught.value
        assert (error.job_id, error.type_name, error.message) == (job.id, "KeyError", "'the one key'")
        assert 'raise KeyError("the one key")' in error.traceback
        status = await app.wait_for(job.id)
        assert status is not None
        assert (status.state, status.error) == ("failed", "KeyError: 'the one key'")


async def test_a_result_that_cannot_be_kept(app: fastq.FastQ) -> None:
    """The job has succeeded; whoever asks for its result is told why there is none."""
    async with working(app):
        with pytest.raises(fastq.ResultNotKept, match=r"takes 2,000,005 bytes, more than max_body"):
            await (await app.enqueue("large")).result(10)
        with pytest.raises(fastq.ResultNotKept, match="of task 'strange' cannot be encoded"):
            await (await app.enqueue("strange")).result(10)


async def test_a_cancelled_and_an_expired_job(app: fastq.FastQ) -> None:
    job = await app.enqueue("add", 1, 2)
    waiting = asyncio.ensure_future(job.result(timeout=10))
    await eventually_async(lambda: _awaited(app, job.id))
    assert await app.cancel(job.id)
    with pytest.raises(fastq.JobCancelled, match="was cancelled"):
        await waiting
    late = await app.options(expires=0.001).enqueue("add", 1, 2)
    await asyncio.sleep(0.01)
    async with working(app):
        with pytest.raises(fastq.JobCancelled, match="was cancelled: expired"):
            await late.result(10)


async def _awaited(app: fastq.FastQ, job_id: str) -> bool:
    from fastq.broker.command import raw

    return bool(await app.call(raw("HEXISTS", app.keys("default").awaited, job_id)))


async def test_what_leaves_no_trace(app: fastq.FastQ) -> None:
    """F-44: ResultExpired: at once when the trace is gone, at the end of a job that leaves none; unknown ids are None (F164)."""
    job = await app.enqueue("traceless")
    waiting = asyncio.ensure_future(job.result(timeout=10))
    await eventually_async(lambda: _awaited(app, job.id))
    async with working(app):
        with pytest.raises(fastq.ResultExpired, match="has left no trace"):
            await waiting
        begun = time.monotonic()
        with pytest.raises(fastq.ResultExpired):
            await job.result(timeout=10)
        assert time.monotonic() - begun < 5
        assert await app.wait_for("unknown", timeout=10) is None
        assert await app.wait_for("no id", queue="default", timeout=10) is None
        assert await app.get_status("unknown") is None
        assert not await job.exists()


async def test_a_purged_queue(app: fastq.FastQ) -> None:
    job = await app.enqueue("add", 1, 2)
    waiting = asyncio.ensure_future(job.result(timeout=10))
    await eventually_async(lambda: _awaited(app, job.id))
    await app.run(app.inspector.purge("default"))
    with pytest.raises(fastq.ResultExpired):
        await waiting
    await app.aclose()


async def test_the_time_to_wait_is_over(app: fastq.FastQ) -> None:
    job = await app.enqueue("add", 1, 2)
    with pytest.raises(TimeoutError, match=f"job '{job.id}' of queue 'default' had not ended after 0.01 s") as caught:
        await job.result(timeout=0.01)
    assert isinstance(caught.value, fastq.WaitTimeout)
    assert await job.exists()
    async with working(app):
        assert await job.result(10) == 3


async def test_many_waiters_share_one_subscription(app: fastq.FastQ, raw: Any) -> None:
    """500 jobs, two waiters each: one connection listens, and the questions are batched."""
    jobs = [await app.enqueue("add", n, 1) for n in range(500)]
    waiting = [asyncio.ensure_future(job.result(20)) for job in jobs * 2]
    await eventually_async(lambda: _awaited(app, jobs[-1].id))
    assert len(raw.pubsub_channels()) == 1
    before = raw.info("commandstats")["cmdstat_evalsha"]["calls"]
    async with working(app):
        assert await asyncio.gather(*waiting) == [n + 1 for n in range(500)] * 2
        asked = raw.info("commandstats")["cmdstat_evalsha"]["calls"] - before
        assert asked < 250  # settle, reserve and follow for 500 jobs
        assert not app._waits._rooms[asyncio.get_running_loop()]._waiters


async def test_a_cancelled_waiter_leaves_nothing_here(app: fastq.FastQ) -> None:
    job = await app.enqueue("add", 1, 2)
    waiting = asyncio.ensure_future(job.result())
    await eventually_async(lambda: _awaited(app, job.id))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not app._waits._rooms[asyncio.get_running_loop()]._waiters
    async with working(app):
        assert await job.result(10) == 3


async def test_blocking_code_waits(app: fastq.FastQ) -> None:
    """F176: 20 threads, one listener; the loop of the caller is not blocked."""
    async with working(app):
        jobs = [await app.enqueue("blocking", n) for n in range(20)]
        results = await asyncio.gather(*(asyncio.to_thread(job.result_sync, 10) for job in jobs))
        assert results == [n * 2 for n in range(20)]
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("fastq-waiting") == 1
        status = await asyncio.to_thread(app.wait_for_sync, jobs[0].id, timeout=5)
        assert status is not None
        assert status.state == "success"
        assert await asyncio.to_thread(jobs[0].exists_sync)
        with pytest.raises(fastq.WaitTimeout):
            await asyncio.to_thread((await app.options(delay=60).enqueue("add", 1, 2)).result_sync, 0.01)
    assert "fastq-waiting" not in [thread.name for thread in threading.enumerate()]


async def test_a_lost_connection_loses_no_end(app: fastq.FastQ, raw: Any) -> None:
    """The listener is cut off again and again while jobs end: the waiters ask again (F-33)."""
    async with working(app):
        for _ in range(5):
            waiting = [asyncio.ensure_future((await app.enqueue("add", n, 1)).result(20)) for n in range(40)]
            raw.client_kill_filter(_type="pubsub")
            assert await asyncio.gather(*waiting) == [n + 1 for n in range(40)]


async def test_a_connection_that_the_network_has_forgotten(
    redis_server: EmbeddedServer, app: fastq.FastQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-open: no message comes and nobody is told (F-30); the sign of life that is missing tells it."""
    monkeypatch.setattr("fastq.waiting.RENEW", 0.1)
    with FaultProxy(redis_server.url) as proxy:
        caller = fastq.FastQ(proxy.url, response_timeout=0.3, enqueue_timeout=0.5)
        job = await caller.enqueue("add", 1, 2)
        waiting = asyncio.ensure_future(job.result(timeout=20))
        await eventually_async(lambda: _awaited(app, job.id))
        assert proxy.silence() >= 2  # in a cluster it has one to every node that it has needed
        async with working(app) as shop:
            await shop.ended(fastq.JobHandle(app, job.id, "default"))
            assert await waiting == 3
        await caller.aclose()


async def test_redis_comes_back_empty(make_server: MakeServer) -> None:
    """What is gone with Redis is told as gone, not waited for for ever."""
    server = make_server()
    app = fastq.FastQ(server.url)
    job = await app.enqueue("add", 1, 2)
    waiting = asyncio.ensure_future(job.result(timeout=30))
    await eventually_async(lambda: _awaited(app, job.id))
    server.restart()
    with pytest.raises(fastq.ResultExpired):
        await waiting
    await app.aclose()


async def test_a_user_who_may_not_subscribe_is_told(make_server: MakeServer) -> None:
    server = make_server()
    app = fastq.FastQ(server.url)
    job = await app.enqueue("add", 1, 2)
    assert server.ask(b"ACL", b"SETUSER", b"default", b"resetchannels") == b"+OK\r\n"
    with pytest.raises(fastq.BrokerReplyError, match="NOPERM"):
        await job.result(timeout=10)
    await app.aclose()


async def test_the_end_is_pushed(app: fastq.FastQ) -> None:
    """Enqueue to result is far below the shortest polling interval anybody would choose; no wait is 30 s long by chance."""
    async with working(app):
        await (await app.enqueue("add", 1, 2)).result(10)
        laps = []
        for n in range(50):
            begun = time.perf_counter()
            await (await app.enqueue("add", n, 2)).result(10)
            laps.append(time.perf_counter() - begun)
        assert sorted(laps)[25] < 0.05


async def test_status_as_json(app: fastq.FastQ) -> None:
    """F155 to F165: one view for HTTP, with JSON types only."""
    import json

    async with working(app) as shop:
        job = await app.enqueue("page", 3)
        await job.result(10)
        status = await job.status()
        assert status is not None
        shown = json.loads(json.dumps(status.to_dict()))
        assert shown["id"] == job.id
        assert (shown["status"], shown["queue"], shown["task"]) == ("success", "default", "page")
        assert (shown["attempts"], shown["error"]) == (1, None)
        assert shown["result"] == {"number": 3, "at": "2026-01-02T00:00:00Z", "words": ["a", "b"]}
        assert shown["enqueued_at"] <= shown["started_at"] <= shown["finished_at"]
        assert status.ready()
        failed = await app.enqueue("broken")
        ended = await shop.ended(failed)
        shown = json.loads(json.dumps(ended.to_dict()))
        assert (shown["status"], shown["error"], shown["result"]) == ("failed", "KeyError: 'the one key'", None)
        assert "traceback" not in shown
    waiting = await app.options(delay=60).enqueue("add", 1, 2)
    scheduled = await waiting.status()
    assert scheduled is not None
    assert not scheduled.ready()
    assert scheduled.to_dict()["status"] == "scheduled"
    await app.aclose()
