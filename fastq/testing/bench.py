"""A worker on the event loop of whoever asks: everything but the fork and the signals is what runs in production."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import socket
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from fastq.app import FastQ, Middleware
from fastq.board import Board
from fastq.broker.command import Command, raw
from fastq.broker.commands import extend, promote, recover
from fastq.broker.connection import AsyncConnection
from fastq.broker.keys import PAD, GlobalKeys, QueueKeys
from fastq.context import JobContext
from fastq.errors import BrokerError, BrokerUnavailable, FastQError, InvalidOption
from fastq.job import ErrorInfo, WorkerCard, encode
from fastq.metrics import STATUSES, WorkerMetrics, aggregate, count_limits_in
from fastq.partitions import queue_of
from fastq.values import QueueOrder, parse_queues
from fastq.worker.loop import WorkerLoop

__all__ = ["Bench", "DrainTimeout", "Drained", "Faults", "Moment", "bench", "drain"]

Moment = Literal["before_handler", "after_handler"]

LOOK = 0.001
"""Seconds between two looks whether a handler has ended."""

GRACE = 1.0
"""Seconds that running handlers have when the worker is stopped over a timeout."""

_numbers = itertools.count(1)


class DrainTimeout(FastQError, TimeoutError):
    """Jobs were still running, or still to run, when the time for a drain was over."""


class Drained(msgspec.Struct, frozen=True):
    """What ended in a drain: runs, not jobs (a job that was retried at once counts for each run).

    ``retried`` and ``snoozed`` runs left a job that is due later; ``failed`` ones are in the dead-letter queue.
    ``lost``: their worker was killed (:meth:`fastq.testing.Kit.kill_worker_at`) or lost its lease.
    """

    success: int = 0
    retried: int = 0
    failed: int = 0
    cancelled: int = 0
    snoozed: int = 0
    released: int = 0
    lost: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(msgspec.structs.astuple(self))

    def __add__(self, other: Drained) -> Drained:
        return Drained(*map(int.__add__, msgspec.structs.astuple(self), msgspec.structs.astuple(other)))


async def drain(app: FastQ, *queues: str, timeout: float = 30.0) -> Drained:
    """Run every job that is ready in this process, with those that they enqueue, until none is left.

    A real worker does it on the running event loop: arguments are decoded, middleware, lifespan, limits, retries, results
    and dead letters are what they are in production. What is due later (delays, retries), paused or parked stays.
    A handler with ``isolation="process"`` runs in this process.

    Args:
        queues: only these; default: all that the application or Redis knows.
        timeout: seconds.

    Raises:
        DrainTimeout: jobs were left; a ``TimeoutError`` that names them.

    Example::

        await send_welcome.enqueue("a@example.org")
        assert (await drain(app)).success == 1
    """
    return await drain_with(None, app, *queues, timeout=timeout)


async def drain_with(faults: Faults | None, app: FastQ, *queues: str, timeout: float) -> Drained:
    """:func:`drain`, with what is to go wrong meanwhile."""
    done = Drained()
    deadline = time.monotonic() + timeout
    while True:
        names = list(queues) or await known_queues(app)
        async with bench(app, names, faults) as worker:
            await worker.drain(deadline, timeout)
        done += worker.drained()
        if queues or set(names) >= set(await known_queues(app)):
            return done


async def known_queues(app: FastQ) -> list[str]:
    """Those of the settings and the tasks, and those that anybody has announced in Redis."""
    named = {app.queue_of(task.name, task.defaults.queue) for task in app.tasks.values()}
    listed: list[bytes] = await app.call(raw("SMEMBERS", GlobalKeys(app.settings.prefix).queues))
    announced = {name.decode() for name in listed}
    return sorted(named | announced | set(parse_queues(app.settings.queues).names))


@contextlib.asynccontextmanager
async def bench(
    app: FastQ, queues: Iterable[str], faults: Faults | None = None, *, quiet: bool = False
) -> AsyncIterator[Bench]:
    """A worker for the length of the block, inside the application's lifespan. ``quiet``: it takes no job, not even once."""
    async with _lifespan(app) as state:
        worker = Bench(app, tuple(queues), f"testing.{os.getpid()}.{next(_numbers)}", faults or Faults())
        worker.state = state
        worker.loop.set_quiet(quiet)
        try:
            worker.start()
            yield worker
        finally:
            await worker.stop()


@contextlib.asynccontextmanager
async def _lifespan(app: FastQ) -> AsyncIterator[Any]:
    function = app.lifespan_function
    if function is None:
        yield None
        return
    wants_app = len(inspect.signature(function).parameters) > 0
    async with function(app) if wants_app else function() as state:
        yield state


class _Fault(NamedTuple):
    kind: Literal["kill", "twice"]
    moment: Moment
    task: str | None


class Faults(Middleware):
    """What is to go wrong, each once; the outermost middleware of the application while there is something."""

    def __init__(self) -> None:
        self.armed: list[_Fault] = []
        self.killed = False
        self.worker: Bench | None = None

    def kill(self, moment: Moment, task: str | None) -> None:
        """The worker dies at that moment of the next job."""
        if moment not in get_args(Moment):
            raise InvalidOption(f"a worker is killed at one of {', '.join(get_args(Moment))}, not at {moment!r:.100}")
        self.armed.append(_Fault("kill", moment, task))

    def twice(self, task: str | None) -> None:
        """The next job is run by a worker that loses its lease meanwhile."""
        self.armed.append(_Fault("twice", "after_handler", task))

    async def before(self, job: JobContext) -> None:  # noqa: D102 - see Middleware
        await self._strike("before_handler", job)

    async def after(self, job: JobContext, result: Any) -> None:  # noqa: D102 - see Middleware
        await self._strike("after_handler", job)

    async def on_error(self, job: JobContext, error: BaseException) -> None:  # noqa: D102 - see Middleware
        if not isinstance(error, asyncio.CancelledError):
            await self._strike("after_handler", job)

    async def _strike(self, moment: Moment, job: JobContext) -> None:
        for fault in self.armed:
            if fault.moment == moment and fault.task in (None, job.task) and self.worker is not None:
                self.armed.remove(fault)
                if fault.kind == "twice":
                    await self.worker.recover()
                    return
                self.killed = True
                await asyncio.Event().wait()  # whoever drains ends it here


class Bench:
    """One worker: started, told to run all there is, stopped."""

    def __init__(self, app: FastQ, queues: tuple[str, ...], name: str, faults: Faults) -> None:
        self.app = app
        served = dict.fromkeys(name for queue in queues for name in app.served(queue))
        self.keys: list[QueueKeys] = [app.keys(name) for name in served]
        self._board = Board(1)
        slot = self._board.claim("worker")
        assert slot is not None
        self.metrics = WorkerMetrics(slot, queues=set(map(queue_of, queues)), tasks=app.tasks)
        self._name = name
        self._lives = 0
        self._queues = queues
        self._slot = slot
        self.state: Any = None
        self.faults = faults
        self._tasks: list[asyncio.Task[None]] = []
        self._make()

    def _make(self) -> None:
        """A worker that has not begun."""
        app, settings = self.app, self.app.settings
        self._lives += 1
        name = f"{self._name}.{self._lives}"
        self._connections = [AsyncConnection.to(app.endpoint(), response_timeout=10.0) for _ in range(3)]
        card = WorkerCard(
            socket.gethostname(), os.getpid(), settings.concurrency, int(time.time() * 1_000), "testing",
            round(settings.lease * 1_000), sorted(app.tasks),
        )  # fmt: skip
        connection, waker, self.helper = self._connections
        self.loop = WorkerLoop(app, connection, waker, QueueOrder(self._queues), self._slot, self.metrics, card, name)
        for plan in self.loop.executor.plans.values():
            if plan.isolated:  # there is no nursery that could fork: it was to be made before the first thread
                plan.choose(app, isolated=False)

    def start(self) -> None:
        """Register, and reserve jobs from now on."""
        count_limits_in(self.metrics)
        self.loop.executor.state = self.state
        self.faults.worker = self
        self._tasks = [asyncio.create_task(self.loop.run()), asyncio.create_task(self._extend())]

    async def stop(self, grace: float = GRACE) -> None:
        """Take nothing new; what has not started, or does not end within ``grace`` seconds, goes back to its queue."""
        if not self._tasks:
            return
        run, heart = self._tasks
        self._tasks = []
        self.loop.stop(grace, "drained")
        try:
            await asyncio.wait_for(run, grace + 10.0)
        finally:
            heart.cancel()
            count_limits_in(None)
            await asyncio.gather(heart, *(c.close() for c in self._connections), return_exceptions=True)

    async def die(self) -> None:
        """End as a killed process does: nothing is settled, nothing handed back. Its jobs are still under its lease."""
        for task in self._tasks:
            task.cancel()
        for connection in self._connections:
            connection.drop("killed")
        running = [job.runner for job in self.loop.executor.running if job.runner is not None]
        for job in self.loop.executor.running:
            job.stopping = "lost"  # its end is no failure
        for runner in running:
            runner.cancel()
        await asyncio.gather(*self._tasks, *running, return_exceptions=True)
        self._tasks = []
        count_limits_in(None)

    async def _live_again(self) -> None:
        """The worker was killed: its jobs are handed back as the monitor does it, and another one begins."""
        victims = [job.id for job in self.loop.executor.running]
        await self.die()
        await self.recover(victims)
        self._make()
        self.start()

    async def drain(self, deadline: float, timeout: float) -> None:
        """Until nothing is ready, nothing due and nothing running."""
        while self.faults.killed or not await self._idle():
            if self.faults.killed:
                self.faults.killed = False
                await self._live_again()
            (run, _) = self._tasks
            if run.done():
                run.result()
                raise FastQError("the worker of this test has ended")
            if time.monotonic() > deadline:
                raise DrainTimeout(f"not drained within {timeout:g} s: {await self._left()}")
            await asyncio.sleep(LOOK)

    async def _idle(self) -> bool:
        """:meth:`idle`; a Redis that is away leaves something to do."""
        try:
            return await self.idle()
        except BrokerUnavailable:
            return False

    async def idle(self) -> bool:
        """Whether there is nothing to do now. Jobs that are due are made ready, as a scheduler would."""
        if self.loop.executor.running or any(lane.held for lane in self.loop._lanes):
            return False
        asked: list[Command[Any]] = []
        for keys in self.keys:
            asked += (
                promote(keys),
                raw("EXISTS", *keys.ready),
                raw("EXISTS", keys.paused),
                raw("SISMEMBER", keys.running(self.loop.worker_id), PAD),
                raw("SCARD", keys.running(self.loop.worker_id)),
            )
        replies = await self.helper.call_many(asked)
        for moved, ready, paused, pads, held in zip(*(replies[n::5] for n in range(5)), strict=True):
            if moved.moved or (ready and not paused) or held > pads:  # held: the reply of a reserve is on its way
                return False
        return True

    async def _left(self) -> str:
        running = [f"{job.task} {job.id} runs" for job in self.loop.executor.running]
        held = sum(len(lane.held) for lane in self.loop._lanes) - len(running)
        if held:
            running.append(f"{held} wait for a limit or a slot")
        for keys in self.keys:
            ready = sum(await self.helper.call_many([raw("LLEN", key) for key in keys.ready]))
            running += [f"{ready} ready in queue {keys.queue}"] if ready else []
        return ", ".join(running) or "nothing is left now"

    async def recover(self, started: Sequence[str] = ()) -> None:
        """What the monitor does when this worker has died: all that it held is ready again, a delivery charged to those that
        had started; from the third on that is the dead-letter queue.
        """
        settings = self.app.settings
        error = ErrorInfo(
            "poison", "WorkerLost", "killed by fastq.testing", "", 0, self.loop.executor._now_ms(), "testing"
        )
        for keys in self.keys:
            remaining = 1
            while remaining > 0:
                command = recover(
                    keys, self.loop.worker_id, expired=False, charge="started", started=started, error=encode(error),
                    max_deliveries=settings.max_deliveries, dead_max=settings.dead_max,
                )  # fmt: skip
                remaining = (await self.app.call(command)).remaining

    def drained(self) -> Drained:
        """What has ended here so far."""
        totals: dict[str, int] = dict.fromkeys(STATUSES, 0)
        for counts in aggregate(self._board).tasks:
            for status, count in counts.finished.items():
                totals[status] += count
        return Drained(*(totals[status] for status in STATUSES))

    async def _extend(self) -> None:
        lease = self.app.settings.lease
        while True:
            await asyncio.sleep(lease / 3)
            with contextlib.suppress(BrokerError):
                for keys in self.keys:
                    await self.helper.call(extend(keys, round(lease * 1_000), [self.loop.worker_id]))
