"""Handlers that take many jobs at once: jobs wait here for each other, and share one call.

Each of them is a job as any other, started by the executor in a slot and a Task of its own; only its handler is common. So whatever
holds for a job - attempts, results, limits, cancellation, its row on the board, its lease - holds for each alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastq.context import JobContext, current
from fastq.many import Many, spread
from fastq.metrics import WorkerMetrics
from fastq.worker.ending import NOT_THE_HANDLERS

if TYPE_CHECKING:
    from fastq.worker.executor import Executor
    from fastq.worker.plan import Plan

__all__ = ["Gatherer", "Gathering"]

log = logging.getLogger("fastq.worker")
NOT_THE_HANDLERS.add(__file__)


class Member:
    """One job on its way through a common call."""

    __slots__ = ("future", "item", "job", "run")

    def __init__(self, job: JobContext, item: Any, future: asyncio.Future[Any]) -> None:
        self.job = job
        self.item = item
        self.future = future
        self.run: Run | None = None  # None: it waits for others


class Run:
    """One call of a handler."""

    __slots__ = ("carrier", "left", "task")

    def __init__(self, members: int) -> None:
        self.left = members  # jobs that wait for it
        self.task: asyncio.Task[None] | None = None
        self.carrier: JobContext | None = None  # of a plain function: it stands in the line for a thread


class Gatherer:
    """The jobs of one task.

    Args:
        executor: calls plain functions.
        metrics: where it stands which jobs a death of this worker is charged to: those whose handler has started.
        slots: jobs that this worker runs at once: more cannot come together.
    """

    def __init__(self, plan: Plan, many: Many, executor: Executor, metrics: WorkerMetrics, slots: int) -> None:
        self._plan = plan
        self._many = many
        self._executor = executor
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._most = min(plan.task.defaults.batch, slots)
        self._wait = plan.task.defaults.batch_wait
        self._waiting: list[Member] = []
        self._timer: asyncio.TimerHandle | None = None
        self._held = False

    async def join(self, job: JobContext, item: Any) -> Any:
        """Wait for others, and for what the handler has to say of this job."""
        member = Member(job, item, self._loop.create_future())
        self._metrics.finish(job.row)  # nothing of it runs yet
        job.deadline = 0.0
        self._waiting.append(member)
        if self._held:
            self._send_back()
        elif len(self._waiting) >= self._most:
            self._begin()
        elif self._timer is None:
            self._timer = self._loop.call_later(self._wait, self._begin)
        try:
            return await member.future
        except asyncio.CancelledError:
            await self._leave(member)
            raise

    def hold(self, held: bool) -> None:
        """Begin nothing more, and give back what waits (True), or go on (False)."""
        self._held = held
        if held:
            self._send_back()

    def _send_back(self) -> None:
        for member in self._take():
            member.job.stopping = member.job.stopping or "drain"
            member.future.cancel()

    def _take(self) -> list[Member]:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        members, self._waiting = self._waiting, []
        return members

    def _begin(self) -> None:
        members: list[Member] = []
        for member in self._take():
            if member.job.stopping:  # it was cancelled while it waited
                member.future.cancel()
            else:
                members.append(member)
        if not members:
            return
        run = Run(len(members))
        for member in members:
            member.run = run
            self._metrics.start(member.job.row, member.job.id)
        run.task = self._loop.create_task(
            self._run(run, members),
            name=f"{self._plan.task.name} of {len(members)}",
            context=self._executor.runner.context.copy(),  # and not that of whoever came last
        )

    @staticmethod
    def _handler_begins(members: Sequence[Member]) -> None:
        """From now on their time counts."""
        now = time.monotonic()
        for member in members:
            member.job.started = now
            member.job.deadline = now + member.job.timeout

    async def _run(self, run: Run, members: Sequence[Member]) -> None:
        current.set(None)  # it is nobody's in particular
        outcomes: Sequence[Any]
        try:
            returned = await self._call(run, members)
            outcomes = spread(self._plan.task.name, returned, len(members))
        except BaseException as error:  # noqa: BLE001 - each job judges it, as it would its own
            outcomes = [error] * len(members)
        for member, outcome in zip(members, outcomes, strict=True):
            if member.future.done():
                continue  # it could not wait: its time was up, it was cancelled, its lease was lost
            if run.carrier is not None and run.carrier.stopping == "drain":  # no thread was free
                member.job.stopping = member.job.stopping or "drain"
            if isinstance(outcome, BaseException):
                wrong = isinstance(outcome, StopIteration)  # no future takes it
                member.future.set_exception(RuntimeError("the handler raised StopIteration") if wrong else outcome)
            else:
                member.future.set_result(outcome)

    async def _call(self, run: Run, members: Sequence[Member]) -> Any:
        plan, items, jobs = self._plan, [member.item for member in members], [member.job for member in members]
        more = self._many.more(jobs)
        if plan.is_async:
            self._handler_begins(members)
            return await plan.fn(items, **more)

        def handler(*args: Any, **kwargs: Any) -> Any:
            self._handler_begins(members)
            return plan.fn(*args, **kwargs)

        run.carrier = JobContext("", "", jobs[0].envelope, timeout=jobs[0].timeout)
        return await self._executor.threads.call(run.carrier, handler, (items,), more)

    async def _leave(self, member: Member) -> None:
        """A job waits no more. The handler goes on for the others; without any it is stopped, and this one waits for that."""
        if member in self._waiting:
            self._waiting.remove(member)
            if not self._waiting:
                self._take()
        run = member.run
        if run is None or run.task is None:
            return
        run.left -= 1
        if run.left == 0 and not run.task.done():
            if run.carrier is not None:
                run.carrier.stopping = "cancel"  # it does not begin any more
            run.task.cancel()
            await asyncio.wait([run.task])


class Gathering:
    """All of them in one worker."""

    def __init__(self, executor: Executor, metrics: WorkerMetrics, slots: int) -> None:
        self._gatherers: list[Gatherer] = []
        for plan in executor.plans.values():
            if plan.task.many is not None:
                plan.gatherer = Gatherer(plan, plan.task.many, executor, metrics, slots)
                self._gatherers.append(plan.gatherer)
                if slots < plan.task.defaults.batch:
                    fields = {"task": plan.task.name, "batch": plan.task.defaults.batch, "concurrency": slots}
                    log.warning("no more jobs than run at once can share a call", extra={"fields": fields})

    def hold(self, held: bool) -> None:
        """This worker stops or pauses: what has not begun goes back."""
        for gatherer in self._gatherers:
            gatherer.hold(held)
