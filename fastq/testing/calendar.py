"""Moves time from event to event: what the scheduler does in a week, done in a test."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from fastq.app import FastQ
from fastq.broker.command import Command, raw
from fastq.broker.commands import extend, promote, unpark_due
from fastq.broker.connection import AsyncConnection
from fastq.broker.inspector import Inspector
from fastq.broker.keys import GlobalKeys
from fastq.broker.planner import Planner
from fastq.scheduler.link import Leadership, Link
from fastq.scheduler.periodic import Ticker
from fastq.schedules import declared_by
from fastq.testing.bench import Bench, Drained, Faults, bench, known_queues
from fastq.testing.clock import VirtualClock

__all__ = ["advance"]


class _Alone(Leadership):
    """The only scheduler there is."""

    @property
    def leading(self) -> bool:
        return True

    @property
    def epoch(self) -> tuple[int, int]:
        return 1, 1


class _Calendar:
    """What comes next, and how to get there."""

    def __init__(self, app: FastQ, clock: VirtualClock, worker: Bench) -> None:
        settings = app.settings
        self._clock = clock
        self._worker = worker
        self._connection = AsyncConnection.to(app.endpoint(), response_timeout=10.0)
        link = Link(self._connection, worker.metrics)
        planner = Planner(settings.prefix)
        inspector = Inspector(settings.prefix, result_ttl=settings.result_ttl)
        alone = _Alone(link, GlobalKeys(settings.prefix), "testing")
        source = "fastq.testing"
        self._ticker = Ticker(alone, link, planner, source, declared_by(app, source), inspector, app.sealer())
        self._lease_ms = round(settings.lease * 1_000)

    async def begin(self) -> None:
        """Connect, and tell Redis the schedules of the code: new ones begin now."""
        await self._connection.connect()
        await self._ticker.declare()

    async def end(self) -> None:
        """Write down how runs ended."""
        await self._ticker.trace()
        await self._connection.close()

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._connection.clock.now_us() / 1e6

    async def jump(self, to: float) -> None:
        """Let it be ``to``, at least."""
        by = math.ceil((to - self.now()) * 1_000) * 1_000  # whole ms: what lives so long is aged by them
        if by > 0:
            await self._connection.call(self._clock.move(by))
        renew: list[Command[Any]] = [
            extend(k, self._lease_ms, [self._worker.loop.worker_id]) for k in self._worker.keys
        ]
        await self._connection.call_many(renew)

    async def turn(self) -> float:
        """Fire and promote what is due now; when something is due next."""
        self._ticker._looked = -math.inf  # a handler may have made a schedule
        await self._ticker.step()
        asked: list[Command[Any]] = []
        for keys in self._worker.keys:
            asked += (promote(keys), unpark_due(keys, look_ms=0), raw("ZRANGE", keys.parked, 0, 0, "WITHSCORES"))
        replies = await self._connection.call_many(asked)
        instants = [self._ticker.agenda.next_due()]
        instants += [reply.next_at_ms / 1_000 for reply in replies[::3] if reply.next_at_ms >= 0]
        instants += [float(reply[1]) / 1_000 for reply in replies[2::3] if reply]
        return min(instants)


@contextlib.asynccontextmanager
async def _calendar(app: FastQ, clock: VirtualClock, worker: Bench) -> AsyncIterator[_Calendar]:
    calendar = _Calendar(app, clock, worker)
    await calendar.begin()
    try:
        yield calendar
    finally:
        await calendar.end()


async def advance(
    app: FastQ, clock: VirtualClock, faults: Faults, seconds: float, *, run: bool, timeout: float
) -> Drained:
    """See :meth:`fastq.testing.Kit.advance`."""
    clock.install()
    deadline = time.monotonic() + timeout
    async with (
        bench(app, await known_queues(app), faults, quiet=not run) as worker,
        _calendar(app, clock, worker) as calendar,
    ):
        target = calendar.now() + seconds
        while True:
            upcoming = await calendar.turn()
            if run:
                await worker.drain(deadline, timeout)
                upcoming = await calendar.turn()  # what the jobs have left
            if upcoming > target:
                break
            await calendar.jump(upcoming)
        await calendar.jump(target)
        await calendar.turn()
        if run:
            await worker.drain(deadline, timeout)
        await worker.stop()
        return worker.drained()
