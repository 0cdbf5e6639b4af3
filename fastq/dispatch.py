"""Handlers by name, for applications that dispatch jobs themselves, and a loop that feeds them."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

from fastq.errors import (
    BrokerError,
    FastQError,
    JobTimeoutError,
    LeaseLost,
    TaskDefinitionError,
    UnknownJobError,
    did_you_mean,
)
from fastq.job import JobResult, seconds
from fastq.logs import fields

if TYPE_CHECKING:
    from fastq.consumer import Consumer, Message

__all__ = ["JobRegistry", "WorkerRunner"]

log = logging.getLogger("fastq.consumer")
Handler = Callable[[Any], Any]


class JobRegistry:
    """Handlers by the names of jobs. New code has it simpler with ``@app.task``; this is the shape that some come with.

    A handler takes the job (a :class:`fastq.Message`, or whatever has a ``name`` or a ``task``) and may be a plain function,
    which runs in a thread.

    Example::

        registry = fastq.JobRegistry()

        @registry.handler("send_email")
        async def send_email(job: fastq.Message) -> fastq.JobResult:
            await mail.send(job.payload["to"])
            return fastq.JobResult(success=True, message="sent")

        await app.process_one(registry.run, "emails")

    Args:
        metric_prefix: count the dispatches of this process in prometheus_client's default registry, if that is installed:
            ``<prefix>_processed_total`` (job_name, status), ``<prefix>_duration_seconds`` (job_name) and
            ``<prefix>_failures_total`` (job_name, error_type). None: nothing is counted.

    Raises:
        TaskDefinitionError: the prefix cannot begin the name of a metric.
    """

    def __init__(self, *, metric_prefix: str | None = None) -> None:
        if metric_prefix is not None and not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]{0,100}", metric_prefix):
            raise TaskDefinitionError(f"metric_prefix={metric_prefix!r:.150} cannot begin the name of a metric")
        self._handlers: dict[str, Handler] = {}
        self._prefix = metric_prefix

    def register(self, name: str, handler: Handler) -> None:
        """Register a handler.

        Raises:
            TaskDefinitionError: the name is taken by another one, or it is no function.
        """
        if not callable(handler):
            raise TaskDefinitionError(f"the handler of job {name!r} is not a function but {handler!r:.100}")
        if self._handlers.setdefault(name, handler) is not handler:
            raise TaskDefinitionError(f"job {name!r} has a handler already: {self._handlers[name]!r:.100}")

    def handler(self, name: str) -> Callable[[Handler], Handler]:
        """:meth:`register` as a decorator."""

        def decorate(handler: Handler) -> Handler:
            self.register(name, handler)
            return handler

        return decorate

    def has_handler(self, name: str) -> bool:
        """Whether there is a handler of this name."""
        return name in self._handlers

    def get_handler(self, name: str) -> Handler | None:
        """The handler of this name, or None."""
        return self._handlers.get(name)

    def list_handlers(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._handlers)

    async def dispatch(self, job: Any, timeout: float | None = 300.0) -> JobResult:
        """Run the handler of a job. What it returns is its :class:`fastq.JobResult`; None counts as success, any other value
        is ``details["result"]`` of one. Its exceptions are the caller's.

        Args:
            timeout: seconds; None: as long as it takes. A plain function cannot be interrupted, it is left behind.

        Raises:
            UnknownJobError: no handler has the job's name.
            JobTimeoutError: it took longer.
        """
        name = str(getattr(job, "name", None) or getattr(job, "task", ""))
        handler = self._handlers.get(name)
        if handler is None:
            raise UnknownJobError(f"no handler is registered for job {name!r}{did_you_mean(name, self._handlers)}")
        limit = None if timeout is None else seconds("timeout", timeout)
        if self._prefix is None:
            return await self._run(name, handler, job, limit)
        from fastq.exposition import handler_metrics

        began, ok, error = time.perf_counter(), False, ""
        try:
            result = await self._run(name, handler, job, limit)
            ok = result.success
        except BaseException as raised:
            error = type(raised).__name__
            raise
        finally:
            metrics = handler_metrics(self._prefix)
            if metrics is not None:
                metrics.note(name, time.perf_counter() - began, ok=ok, error=error)
        return result

    async def _run(self, name: str, handler: Handler, job: Any, limit: float | None) -> JobResult:
        clock = asyncio.timeout(limit)
        try:
            async with clock:
                returned = await self._call(handler, job)
        except TimeoutError:
            if not clock.expired():
                raise  # the handler's own
            raise JobTimeoutError(f"job {name!r} ran longer than its timeout of {limit:g} s") from None
        if isinstance(returned, JobResult):
            return returned
        return JobResult(success=True, details=None if returned is None else {"result": returned})

    async def run(self, job: Any) -> JobResult:
        """:meth:`dispatch`, where a result without success is an exception: a handler for :meth:`fastq.Consumer.process`.

        Raises:
            FastQError: the handler returned ``success=False``; the message is its. And all that :meth:`dispatch` raises.
        """
        result = await self.dispatch(job)
        if not result.success:
            raise FastQError(result.message or "the handler returned success=False")
        return result

    async def _call(self, handler: Handler, job: Any) -> Any:
        if inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None)):  # noqa: B004
            return await handler(job)
        returned = await asyncio.to_thread(handler, job)
        return await returned if inspect.isawaitable(returned) else returned


class Source(Protocol):
    """Whose jobs are run: the application."""

    def consume(self, queue: str | None = None, *, prefetch: int = 1) -> Consumer:
        """The jobs of a queue."""
        ...


class WorkerRunner:
    """Runs one function on all jobs of a queue, inside an event loop that is yours: ``fastq worker`` without the process.

    Args:
        handler: takes a :class:`fastq.Message`; what it returns is the result, what it raises a failed run. ``registry.run``, say.
        queue: default: the setting ``default_queue``.
        concurrency: how many run at once.

    Example::

        runner = fastq.WorkerRunner(app, registry.run, queue="emails", concurrency=10)
        task = runner.start()
        ...
        await runner.stop(grace_seconds=10)
    """

    def __init__(
        self,
        app: Source,
        handler: Callable[[Message], Awaitable[Any]],
        *,
        queue: str | None = None,
        concurrency: int = 1,
    ) -> None:
        self._app = app
        self._handler = handler
        self._queue = queue
        self._concurrency = concurrency
        self._feeding: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._grace = 10.0

    def start(self) -> asyncio.Task[None]:
        """Begin, unless it has. The task ends when the runner is stopped."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        return self._task

    async def stop(self, grace_seconds: float = 10.0) -> None:
        """Take nothing new; after so many seconds interrupt what still runs. That goes back to the queue, uncharged."""
        if self._task is None:
            return
        self._grace = grace_seconds
        if self._feeding is not None:
            self._feeding.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        async with self._app.consume(self._queue, prefetch=self._concurrency) as consumer:
            self._feeding = asyncio.create_task(self._feed(consumer))
            try:
                await asyncio.wait([self._feeding])
            except asyncio.CancelledError:
                self._feeding.cancel()
                self._grace = 0.0
                await self._end()
                raise
            await self._end()
        if not self._feeding.cancelled():
            self._feeding.result()

    async def _end(self) -> None:
        if self._running:
            await asyncio.wait(self._running, timeout=self._grace)
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _feed(self, consumer: Consumer) -> None:
        async for message in consumer:
            task = asyncio.create_task(self._one(consumer, message))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _one(self, consumer: Consumer, message: Message) -> None:
        try:
            await consumer.process(message, self._handler)
        except (LeaseLost, BrokerError) as error:
            log.error("outcome lost", extra=fields(job=message.id, task=message.name, error=str(error)))
