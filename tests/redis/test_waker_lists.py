"""What a worker at rest hears: that there are jobs, unless it is full, and that a job which it holds was cancelled."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from fastq import FastQ
from fastq.worker.waker import IDLE_WAIT
from tests.conftest import eventually_async
from tests.redis.workshop import Workshop, working


def pops(raw: Any) -> int:
    return int(raw.info("commandstats").get("cmdstat_blpop", {"calls": 0})["calls"])


async def ticks(shop: Workshop, count: int) -> None:
    """Let the worker live for so many tenths of a second."""
    for _ in range(count):
        last = shop.slot.ticked_at
        await eventually_async(lambda last=last: shop.slot.ticked_at != last)


async def test_a_full_worker_leaves_the_token_to_others(redis_url: str, raw: Any) -> None:
    """It asked for it and put it back 9,000 times a second; as soon as it has room it hears of jobs again."""
    app, gate, starts = FastQ(redis_url, concurrency=2, log_level="error"), asyncio.Event(), {}

    @app.task
    async def held(n: int) -> None:
        starts[n] = time.monotonic()
        await gate.wait()

    async with working(app) as shop:
        for n in range(5):
            await held.enqueue(n)
        await eventually_async(lambda: len(starts) == 2)
        await ticks(shop, 2)
        before = pops(raw)
        await ticks(shop, 4)
        assert pops(raw) - before <= 1, "a full worker rests"
        assert raw.llen("fastq:{default}:wake") == 1, "another worker would take the other three"
        gate.set()
        await eventually_async(lambda: len(starts) == 5 and not shop.loop.executor.running)
        await ticks(shop, 1)
        for n in range(5, 10):
            enqueued = time.monotonic()
            await held.enqueue(n)
            await eventually_async(lambda n=n: n in starts)
            assert starts[n] - enqueued < IDLE_WAIT / 4, "it hears the wake list again"


@pytest.mark.parametrize("full", [False, True])
async def test_a_cancelled_job_is_told_at_once(
    redis_url: str, raw: Any, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """F178: pushed, not found by the next look, whether the worker has room or not."""
    monkeypatch.setattr("fastq.worker.cancels.beat", lambda: asyncio.sleep(60.0))
    app, started = FastQ(redis_url, concurrency=1 if full else 5, log_level="error"), asyncio.Event()

    @app.task
    async def endless() -> None:
        started.set()
        await asyncio.Event().wait()

    async with working(app) as shop:
        job = await endless.enqueue()
        behind = await endless.enqueue() if full else None
        await started.wait()
        if full:
            await eventually_async(lambda: shop.loop._waker._each[0]._deaf)
        assert await job.cancel(terminate=True)
        ended = await app.wait_for(job.id, timeout=IDLE_WAIT / 2, queue="default")
        assert ended is not None
        assert ended.state == "cancelled"
        if behind is not None:  # the worker goes on with what was behind it, and hears of that, too
            await eventually_async(lambda: len(shop.loop.executor.running) == 1)
            assert await behind.cancel(terminate=True)
            assert (await app.wait_for(behind.id, timeout=IDLE_WAIT / 2, queue="default")).state == "cancelled"  # type: ignore[union-attr]
        left = [key for key in raw.scan_iter("fastq:{default}:wake:*") if raw.ttl(key) < 0]
        assert left == [], "a token for a worker that is gone goes by itself"


async def test_a_token_for_a_busy_worker_waits_for_its_rest(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled while its worker does not listen: it has the token, and acts on it, as soon as it rests."""
    monkeypatch.setattr("fastq.worker.cancels.beat", lambda: asyncio.sleep(60.0))
    app, started = FastQ(redis_url, concurrency=5, log_level="error"), asyncio.Event()

    @app.task
    async def endless() -> None:
        started.set()
        await asyncio.Event().wait()

    async with working(app) as shop:
        job = await endless.enqueue()
        await started.wait()
        shop.waker.drop("as if it were away")  # it pauses before it listens again
        assert await job.cancel(terminate=True)
        ended = await app.wait_for(job.id, timeout=IDLE_WAIT, queue="default")
        assert ended is not None
        assert ended.state == "cancelled"
