"""One job, asked for by its id: where it is, how it ended, what happens to it, why it does not run; and cancel."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastq.broker.command import Operation
from fastq.config import Settings
from fastq.job import Event, JobStatus, check_id, is_id
from fastq.task import Task

if TYPE_CHECKING:
    from fastq.broker.explain import Explanation
    from fastq.broker.inspector import Inspector
    from fastq.sender import Sender
    from fastq.waiting import Home, Waits
    from fastq.watching import Home as Watched
    from fastq.watching import Watches

__all__ = ["Asking"]

T = TypeVar("T")


class Asking:
    """The part of :class:`fastq.FastQ` that asks about jobs, and cancels them."""

    settings: Settings
    tasks: dict[str, Task[..., Any]]
    partitions: dict[str, int]
    _sender: Sender

    if TYPE_CHECKING:  # what the application has

        @property
        def inspector(self) -> Inspector:
            """The operations."""
            ...

        def partition(self, queue: str, key: str) -> str:
            """Where a job with this id lies."""
            ...

        def served(self, queue: str) -> list[str]:
            """A queue and its partitions."""
            ...

        def run(self, operation: Operation[T]) -> Coroutine[Any, Any, T]:
            """Run one on this event loop's connection."""
            ...

        def run_sync(self, operation: Operation[T]) -> T:
            """Run one from blocking code."""
            ...

    async def get_status(self, job_id: str, *, queue: str | None = None) -> JobStatus | None:
        """Where a job is; None when its id is unknown or its record has expired.

        The id may be that of a workflow: ``task`` is then its name, and ``progress`` counts its jobs; more is told by
        ``await app.get_workflow(id).status()`` and its handle.

        Args:
            queue: saves asking all queues.
        """
        return await self.run(self.inspector.status(job_id, queue))

    def get_status_sync(self, job_id: str, *, queue: str | None = None) -> JobStatus | None:
        """:meth:`get_status` from blocking code."""
        return self.run_sync(self.inspector.status(job_id, queue))

    async def wait_for(
        self, job_id: str, *, timeout: float | None = None, queue: str | None = None
    ) -> JobStatus | None:
        """How a job has ended, as soon as it has: success, failed or cancelled. None when its id is unknown, its record has
        expired, or it ended without leaving one (``result_ttl=0``).

        The end is pushed by Redis; nothing polls, and workers pay nothing for jobs that nobody waits for.

        Args:
            timeout: seconds to wait; None: as long as it takes. A Redis that is away meanwhile is waited for, too.
            queue: saves asking all queues.

        Raises:
            WaitTimeout: it had not ended in time; a ``TimeoutError``. The job goes on.

        Example::

            status = await app.wait_for(job_id, timeout=60)
            if status is not None and status.state == "success":
                return status.result
        """
        if queue is None or queue in self.partitions:
            status = await self.get_status(job_id, queue=queue)
            if status is None or status.state.final:
                return status
            queue = status.queue
        return await self._waits.wait(queue, job_id, timeout) if is_id(job_id) else None

    def wait_for_sync(self, job_id: str, *, timeout: float | None = None, queue: str | None = None) -> JobStatus | None:
        """:meth:`wait_for` from blocking code; all threads share one connection that listens."""
        if queue is None or queue in self.partitions:
            status = self.get_status_sync(job_id, queue=queue)
            if status is None or status.state.final:
                return status
            queue = status.queue
        return self._waits.wait_sync(queue, job_id, timeout) if is_id(job_id) else None

    @functools.cached_property
    def _waits(self) -> Waits:
        from fastq.waiting import Waits

        return Waits(cast("Home", self), self._leave)

    async def _leave(self) -> None:
        """Close what blocking code has on the event loop that waits for it."""
        if "_watches" in self.__dict__:
            await self._watches.aclose()
        await self._sender.aclose()

    def events(self, *, queue: str | None = None) -> AsyncIterator[Event]:
        """What happens to the jobs of a queue (default: the setting ``default_queue``) from now on: started, progress, retried,
        succeeded, failed, cancelled. Survives a lost connection of up to 10 minutes and 10,000 events.

        While somebody watches, and up to two minutes longer, each event costs Redis about 4 µs; while nobody does, nothing.

        Example::

            async for event in app.events(queue="emails"):
                print(event.kind, event.job_id)
        """
        return self._watches.events(self.served(self.settings.default_queue if queue is None else queue), "*")

    def events_sync(self, *, queue: str | None = None) -> Iterator[Event]:
        """:meth:`events` from blocking code: a loop over it waits for the next one."""
        return self._waits.backstage().iterate(self.events(queue=queue))

    def job_events_sync(self, job_id: str, *, queue: str) -> Iterator[Event]:
        """:meth:`job_events` from blocking code."""
        return self._waits.backstage().iterate(self.job_events(job_id, queue=queue))

    def job_events(self, job_id: str, *, queue: str) -> AsyncIterator[Event]:
        """What happens to one job; see :meth:`fastq.JobHandle.events`."""
        return self._watches.events([self.partition(queue, check_id(job_id))], job_id)

    @functools.cached_property
    def _watches(self) -> Watches:
        from fastq.watching import Watches

        return Watches(cast("Watched", self))

    async def get_logs(self, job_id: str, *, queue: str) -> list[str]:
        """The last lines that a job's handler wrote through ``job.log``; see the setting ``job_log_lines``."""
        return await self.run(self.inspector.logs(job_id, queue))

    def get_logs_sync(self, job_id: str, *, queue: str) -> list[str]:
        """:meth:`get_logs` from blocking code."""
        return self.run_sync(self.inspector.logs(job_id, queue))

    def typed_result(self, status: JobStatus) -> Any:
        """The result of a job in the type that its task's handler is annotated with, if the task is registered here.

        Raises:
            UndecodableJob: it does not fit.
        """
        task = self.tasks.get(status.task or "")
        return status.result if task is None else task.returned.convert(status.result)

    async def cancel(self, job_id: str, *, terminate: bool = False, queue: str | None = None) -> bool:
        """Cancel a job, or a workflow with all its jobs. It is kept in Redis, so no worker has to be there; see docs/time_limits.md.

        A scheduled or pending job is taken out at once. A running one goes on until its handler looks at
        ``job.cancelled``, fails or returns; whatever else happens to it (a retry, a deploy, the death of its worker), it
        does not run again. One that succeeds before it was told has succeeded.

        Args:
            terminate: interrupt a running one: an async handler is cancelled, the process of ``isolation="process"``
                is killed, a handler in a thread can only be told.
            queue: saves asking all queues.

        Returns:
            False when it is unknown or has ended.
        """
        return await self.run(self.inspector.cancel(job_id, queue, terminate=terminate)) != "unknown"

    def cancel_sync(self, job_id: str, *, terminate: bool = False, queue: str | None = None) -> bool:
        """:meth:`cancel` from blocking code."""
        return self.run_sync(self.inspector.cancel(job_id, queue, terminate=terminate)) != "unknown"

    async def cancel_tag(self, tag: str, *, terminate: bool = False, queue: str | None = None) -> int:
        """Cancel every job that was enqueued with this tag and has not ended, as :meth:`cancel` does.

        Goes through them in steps of 500; may be interrupted, and called again. What is enqueued with the tag meanwhile may be cancelled or
        not. A tag is remembered for 30 days after its last job was due; a dead letter that is replayed has lost it.

        Args:
            terminate: interrupt those that run.
            queue: of this queue only; default: all queues.

        Returns:
            How many were cancelled or, where a worker has them, asked to stop.

        Raises:
            InvalidOption: it cannot be a tag.

        Example::

            await send.options(tags=["tenant:42"]).enqueue("ann@example.org")
            await app.cancel_tag("tenant:42")
        """
        from fastq.broker.tagged import cancel_tag

        return await self.run(cancel_tag(self.inspector, tag, queue, terminate=terminate))

    def cancel_tag_sync(self, tag: str, *, terminate: bool = False, queue: str | None = None) -> int:
        """:meth:`cancel_tag` from blocking code."""
        from fastq.broker.tagged import cancel_tag

        return self.run_sync(cancel_tag(self.inspector, tag, queue, terminate=terminate))

    async def explain(self, job_id: str, *, queue: str | None = None) -> Explanation:
        """Why a job does not run: paused, scheduled, parked under a limit, behind others, no worker that knows its task …

        Example::

            print(await app.explain(job.id))
        """
        from fastq.broker.explain import explain

        return await self.run(explain(self.inspector, job_id, queue))

    def explain_sync(self, job_id: str, *, queue: str | None = None) -> Explanation:
        """:meth:`explain` from blocking code."""
        from fastq.broker.explain import explain

        return self.run_sync(explain(self.inspector, job_id, queue))

    async def _aclose_waits(self) -> None:
        """Close what waits and watches on this event loop."""
        if "_watches" in self.__dict__:
            await self._watches.aclose()
        if "_waits" in self.__dict__:
            await self._waits.aclose()

    def _close_waits(self) -> None:
        """Close what waits in blocking code."""
        if "_waits" in self.__dict__:
            self._waits.close()
