"""A worker inside the test's own event loop: everything but the fork and the signals is real."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

from fastq import FastQ
from fastq.board import Board
from fastq.broker.commands import extend, promote
from fastq.broker.connection import AsyncConnection
from fastq.job import WorkerCard
from fastq.metrics import WorkerMetrics, aggregate, count_limits_in
from fastq.values import parse_queues
from fastq.worker.loop import WorkerLoop

_numbers = itertools.count(1)


class Workshop:
    """One worker and what a test asks of it."""

    def __init__(self, app: FastQ) -> None:
        self.app = app
        self.board = Board(1)
        slot = self.board.claim("worker")
        assert slot is not None
        self.slot = slot
        settings = app.settings
        order = parse_queues(settings.queues)
        self.connection = AsyncConnection.to(app.endpoint(), response_timeout=settings.response_timeout)
        self.waker = AsyncConnection.to(app.endpoint(), response_timeout=settings.response_timeout)
        self.helper = AsyncConnection.to(app.endpoint())
        self.metrics = WorkerMetrics(slot, queues=order.names, tasks=app.tasks)
        count_limits_in(self.metrics)
        card = WorkerCard("test", 1, settings.concurrency, int(time.time() * 1_000), "0", 0, sorted(app.tasks))
        name = f"test.{next(_numbers)}"
        self.loop = WorkerLoop(app, self.connection, self.waker, order, slot, self.metrics, card, name)

    @property
    def name(self) -> str:
        return self.loop.worker_id

    async def promote(self, queue: str = "default") -> None:
        """What the scheduler does: retries and delayed jobs that are due become ready."""
        await self.helper.call(promote(self.app.keys(queue)))

    async def extend(self, queue: str = "default") -> bool:
        return (await self.helper.call(extend(self.app.keys(queue), 15_000, [self.name])))[0]

    async def ended(self, job: Any, timeout: float = 10.0) -> Any:
        """The status of a job once it is final; due jobs are promoted meanwhile."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            await self.promote(job.queue)
            status = await job.status()
            if status is None or status.state.final:
                return status
            await asyncio.sleep(0.005)
        raise AssertionError(f"{job} did not end: {await job.status()}")

    def counts(self, task: str, queue: str = "default") -> dict[str, int]:
        """Runs by status, zeros left out."""
        for counts in aggregate(self.board).tasks:
            if (counts.queue, counts.task) == (queue, task):
                return {status: n for status, n in counts.finished.items() if n}
        return {}

    def counter(self, name: Any) -> int:
        return int(aggregate(self.board).counters[name])


@contextlib.asynccontextmanager
async def working(app: FastQ, *, grace: float = 5.0, state: Any = None) -> AsyncIterator[Workshop]:
    """Run a worker for the length of the block, then drain it."""
    shop = Workshop(app)
    shop.loop.executor.state = state
    task = asyncio.create_task(shop.loop.run())
    try:
        yield shop
    finally:
        shop.loop.stop(grace, "the test is over")
        try:
            await asyncio.wait_for(task, 15)
        finally:
            count_limits_in(None)
            await shop.helper.close()
            await app.aclose()
            app.close()
