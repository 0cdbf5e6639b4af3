"""What limiters count: for whom, for which jobs, and that every unit is accounted for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

import fastq
from fastq.board import Board
from fastq.exposition import Exposition
from fastq.logs import log_context
from fastq.metrics import WorkerMetrics, aggregate, count_limits_in
from tests.conftest import eventually_async
from tests.redis.test_limiter import application


class Running:
    """A job, as far as logs and metrics want to know."""

    id, task, queue, attempt = "job-7", "send", "default", 1


@pytest.fixture
def counted() -> Iterator[Board]:
    """The board of a worker that this process is."""
    board = Board(1)
    count_limits_in(WorkerMetrics(board[0]))
    token = log_context.set(Running())
    yield board
    log_context.reset(token)
    count_limits_in(None)


def unaccounted(board: Board) -> int:
    """Units that were granted and did not come back: the used ones."""
    counts = aggregate(board).limiters["counted"]
    return counts["granted"] - counts["returned"] - counts["expired"]


async def test_waits_and_timeouts_are_counted_by_limiter_and_task(redis_url: str, counted: Board, caplog: Any) -> None:
    """F045-F047, F049: the running job's task and id; every unit is accounted for."""
    async with application(redis_url) as app:
        limiter = app.limiter("counted", rate="100/s burst 1")
        for _ in range(20):
            await limiter.for_key("secret-tenant").acquire(timeout=2)
        with pytest.raises(fastq.LimitTimeout):
            await limiter.for_key("secret-tenant").acquire(timeout=0.001)
        with pytest.raises(fastq.LimitTimeout):
            await asyncio.to_thread(limiter.sync.for_key("secret-tenant").acquire, 0.0001)
        await limiter.penalize(5)
        assert not await limiter.try_acquire()
        await eventually_async(lambda: unaccounted(counted) == 20)  # what came for nobody goes back when it is stale
    snapshot = aggregate(counted)
    (waits,) = snapshot.waits
    assert (waits.limiter, waits.job_type, waits.timeouts) == ("counted", "send", 2)
    assert 15 <= waits.all.count <= 20
    counts = snapshot.limiters["counted"]
    assert limiter.counts.units == 20
    assert (counts["penalties"], counts["errors"], counts["passed"]) == (1, 0, 0)
    assert counts["requests"] == limiter.counts.requests >= 20
    assert counts["denied"] >= 1
    timeouts = [record.fields for record in caplog.records if record.message == "Rate limit timeout"]  # type: ignore[attr-defined]
    assert [(t["limiter_id"], t["timeout"], t["job_id"]) for t in timeouts] == [
        ("counted", 0.001, "job-7"),
        ("counted", 0.0001, "job-7"),
    ]
    assert b"secret-tenant" not in Exposition(counted).render()


async def test_monitored_acquire_counts_under_the_type_it_is_told(redis_url: str, counted: Board) -> None:
    """F048: waits above 0.1 s, and timeouts, which are raised all the same."""
    async with application(redis_url) as app:
        app.limiter("monitored", rate="5/s burst 1")
        try:
            await fastq.monitored_acquire("monitored", "sync", timeout=1)
            await fastq.monitored_acquire("monitored", "sync", timeout=1)
            with pytest.raises(TimeoutError):
                await fastq.monitored_acquire("monitored", "sync", timeout=0.01)
            scoped = await fastq.get_or_clone_limiter("monitored", "email-worker")
            assert not await scoped.try_acquire(), "a scope has no quota of its own"
            log_context.set(None)
            await scoped.acquire(timeout=1)
        finally:
            fastq.limiter.catalogue.default()._limiters.pop("monitored", None)  # type: ignore[attr-defined]
            fastq.limiter.catalogue.default()._scoped.clear()  # type: ignore[attr-defined]
    by_type = {waits.job_type: waits for waits in aggregate(counted).waits}
    assert set(by_type) == {"sync", "email-worker"}
    assert (by_type["sync"].noted.count, by_type["sync"].timeouts) == (1, 1)
    assert by_type["email-worker"].noted.count == 1
