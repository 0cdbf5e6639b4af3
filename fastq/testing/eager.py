"""Jobs that run where they are enqueued."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import AsyncIterable, Awaitable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import msgspec

from fastq.app import FastQ
from fastq.context import JobContext, current, injection
from fastq.errors import FastQError
from fastq.handle import Bulk, JobHandle, StatusReader
from fastq.job import JobState, JobStatus, decode_envelope, encode
from fastq.many import Many, spread
from fastq.sender import Sender
from fastq.task import Call

__all__ = ["eagerly"]


@contextmanager
def eagerly(app: FastQ) -> Iterator[None]:
    """See :meth:`fastq.testing.Kit.eager`."""
    before = app._sender
    app._sender = _EagerSender(app)
    try:
        yield
    finally:
        app._sender = before


class _EagerSender(Sender):
    """Runs what it is given. Whatever else is asked of Redis goes there."""

    eager = True

    def __init__(self, app: FastQ) -> None:
        super().__init__(app)
        self._app = app

    async def send(self, call: Call) -> JobHandle[Any]:
        job, outcome = _start(self._app, call)
        return _handle(self._app, job, await outcome if inspect.isawaitable(outcome) else outcome)

    def send_sync(self, call: Call) -> JobHandle[Any]:
        job, outcome = _start(self._app, call, blocking=True)
        return _handle(self._app, job, asyncio.run(outcome) if inspect.iscoroutine(outcome) else outcome)

    async def send_many(self, calls: Iterable[Call] | AsyncIterable[Call], *, ids: bool, batch: str = "") -> Bulk:
        del batch
        bulk = Bulk()
        if isinstance(calls, AsyncIterable):
            async for call in calls:
                _count(bulk, await self.send(call), ids)
            return bulk
        for call in calls:
            _count(bulk, await self.send(call), ids)
        return bulk

    def send_many_sync(self, calls: Iterable[Call], *, ids: bool, batch: str = "") -> Bulk:
        del batch
        bulk = Bulk()
        for call in calls:
            _count(bulk, self.send_sync(call), ids)
        return bulk


def _count(bulk: Bulk, handle: JobHandle[Any], ids: bool) -> None:
    bulk.total += 1
    bulk.created += 1
    if ids:
        bulk.ids.append(handle.id)


def _start(app: FastQ, call: Call, *, blocking: bool = False) -> tuple[JobContext, Any]:
    """Call the handler: its result, or its coroutine."""
    envelope = decode_envelope(call.job.envelope)
    task = app.find(envelope.task)
    job = JobContext(call.job.id, call.queue, envelope, max_attempts=task.defaults.max_attempts or 1, home=app)
    args, kwargs = task.arguments.decode(envelope.body)
    placed, kwargs = task.arguments.place(args, kwargs, lambda parameter: injection(parameter, job))
    if task.many is not None:
        return job, _alone(task.many, job, task.fn(list(args), **task.many.more([job])))
    context = contextvars.copy_context()
    context.run(current.set, job)
    if task.is_async:
        if blocking:
            _refuse_inside_a_loop(job)
        return job, _within(job, task.fn(*placed, **kwargs))
    return job, context.run(task.fn, *placed, **kwargs)


def _alone(many: Many, job: JobContext, returned: Any) -> Any:
    """The one job of a handler that takes many at once."""
    if inspect.isawaitable(returned):
        return _alone_later(many, job, returned)
    outcome = spread(job.task, returned, 1)[0]
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


async def _alone_later(many: Many, job: JobContext, returned: Awaitable[Any]) -> Any:
    return _alone(many, job, await returned)


async def _within(job: JobContext, run: Coroutine[Any, Any, Any]) -> Any:
    token = current.set(job)
    try:
        return await run
    finally:
        current.reset(token)


def _refuse_inside_a_loop(job: JobContext) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise FastQError(
        f"eager: the async handler of {job.task!r} cannot be run inside a running event loop: await enqueue()"
    )


def _handle(app: FastQ, job: JobContext, result: Any) -> JobHandle[Any]:
    known = msgspec.msgpack.decode(encode(result))
    status = JobStatus(
        id=job.id, queue=job.queue, state=JobState.SUCCESS, task=job.task, attempts=1, result=known,
        priority=job.envelope.priority, enqueued_at=job.enqueued_at,
    )  # fmt: skip
    return JobHandle(cast(StatusReader, _Ended(app, status)), job.id, job.queue)


class _Ended:
    """Answers for a job that has ended."""

    def __init__(self, app: FastQ, status: JobStatus) -> None:
        self._app = app
        self._status = status

    async def get_status(self, job_id: str, *, queue: str | None = None) -> JobStatus:
        return self._status

    def get_status_sync(self, job_id: str, *, queue: str | None = None) -> JobStatus:
        return self._status

    async def wait_for(self, job_id: str, *, timeout: float | None = None, queue: str | None = None) -> JobStatus:
        return self._status

    def wait_for_sync(self, job_id: str, *, timeout: float | None = None, queue: str | None = None) -> JobStatus:
        return self._status

    def __getattr__(self, name: str) -> Any:
        return getattr(self._app, name)
