"""What a caller holds after enqueue: the job's id and the way to ask for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Generic, Protocol, TypeVar, cast

from fastq.errors import JobCancelled, JobFailed, ResultExpired, ResultNotKept
from fastq.job import Event, JobState, JobStatus

__all__ = ["Bulk", "JobHandle", "StatusReader"]

R_co = TypeVar("R_co", covariant=True)


class StatusReader(Protocol):
    """Who can look a job up and wait for it (the application)."""

    async def get_status(self, job_id: str, *, queue: str | None = None) -> JobStatus | None:
        """See :meth:`fastq.FastQ.get_status`."""
        ...

    def get_status_sync(self, job_id: str, *, queue: str | None = None) -> JobStatus | None:
        """See :meth:`fastq.FastQ.get_status_sync`."""
        ...

    async def wait_for(
        self, job_id: str, *, timeout: float | None = None, queue: str | None = None
    ) -> JobStatus | None:
        """See :meth:`fastq.FastQ.wait_for`."""
        ...

    def wait_for_sync(self, job_id: str, *, timeout: float | None = None, queue: str | None = None) -> JobStatus | None:
        """See :meth:`fastq.FastQ.wait_for_sync`."""
        ...

    def job_events(self, job_id: str, *, queue: str) -> AsyncIterator[Event]:
        """See :meth:`JobHandle.events`."""
        ...

    def job_events_sync(self, job_id: str, *, queue: str) -> Iterator[Event]:
        """See :meth:`JobHandle.events_sync`."""
        ...

    async def get_logs(self, job_id: str, *, queue: str) -> list[str]:
        """See :meth:`fastq.FastQ.get_logs`."""
        ...

    def get_logs_sync(self, job_id: str, *, queue: str) -> list[str]:
        """See :meth:`fastq.FastQ.get_logs_sync`."""
        ...

    def typed_result(self, status: JobStatus) -> Any:
        """The result in the type that its task's handler is annotated with."""
        ...

    async def cancel(self, job_id: str, *, terminate: bool = False, queue: str | None = None) -> bool:
        """See :meth:`fastq.FastQ.cancel`."""
        ...

    def cancel_sync(self, job_id: str, *, terminate: bool = False, queue: str | None = None) -> bool:
        """See :meth:`fastq.FastQ.cancel_sync`."""
        ...


class JobHandle(Generic[R_co]):
    """One enqueued job. ``R_co`` is the type that its handler returns.

    Attributes:
        id: the job's id, unique within its queue.
        queue: the queue it is in.
        created: False when this call met a job that was there already (same ``job_id`` or unique key).
    """

    __slots__ = ("_reader", "created", "id", "queue")

    def __init__(self, reader: StatusReader, job_id: str, queue: str, *, created: bool = True) -> None:
        self._reader = reader
        self.id = job_id
        self.queue = queue
        self.created = created

    async def status(self) -> JobStatus | None:
        """Where the job is now; None when it has left no trace (``result_ttl``)."""
        return await self._reader.get_status(self.id, queue=self.queue)

    def status_sync(self) -> JobStatus | None:
        """:meth:`status` from blocking code."""
        return self._reader.get_status_sync(self.id, queue=self.queue)

    def events(self) -> AsyncIterator[Event]:
        """What happens to the job, as it happens, up to its end: at once its last event when it has ended before, nothing when
        it left no trace. Survives a lost connection.

        Example::

            async for event in job.events():
                await websocket.send_json(event.to_dict())
        """
        return self._reader.job_events(self.id, queue=self.queue)

    def events_sync(self) -> Iterator[Event]:
        """:meth:`events` from blocking code.

        Example::

            for event in job.events_sync():
                print(event.kind)
        """
        return self._reader.job_events_sync(self.id, queue=self.queue)

    async def logs(self) -> list[str]:
        """The last lines that the handler wrote through ``job.log``, oldest first; an hour long, half a second late.

        Workers keep none unless the setting ``job_log_lines`` says how many.
        """
        return await self._reader.get_logs(self.id, queue=self.queue)

    def logs_sync(self) -> list[str]:
        """:meth:`logs` from blocking code."""
        return self._reader.get_logs_sync(self.id, queue=self.queue)

    async def exists(self) -> bool:
        """Whether anything is known of the job: it is still to run, runs, or its record is kept."""
        return await self.status() is not None

    def exists_sync(self) -> bool:
        """:meth:`exists` from blocking code."""
        return self.status_sync() is not None

    async def result(self, timeout: float | None = None) -> R_co:
        """What the handler returned, in the type that it is annotated with. Waits for the end of the job: told by a message,
        not by polling, and any number of waiters of a process share one connection.

        Args:
            timeout: seconds to wait; None: as long as it takes.

        Raises:
            JobFailed: the job has failed for good, with the error's type, message and traceback as text.
            JobCancelled: it was cancelled, or had expired before it started.
            ResultExpired: it has left no trace (``result_ttl``); at once when it is gone already.
            ResultNotKept: it has succeeded, and its result was too large or could not be encoded.
            WaitTimeout: it had not ended in time; a ``TimeoutError``.
            UndecodableJob: what was stored is not of the annotated type.

        Example::

            job = await render.enqueue("page-1")
            page = await job.result(timeout=60)
        """
        return self._outcome(await self._reader.wait_for(self.id, queue=self.queue, timeout=timeout))

    def result_sync(self, timeout: float | None = None) -> R_co:
        """:meth:`result` from blocking code."""
        return self._outcome(self._reader.wait_for_sync(self.id, queue=self.queue, timeout=timeout))

    def _outcome(self, status: JobStatus | None) -> R_co:
        if status is None:
            raise ResultExpired(
                f"job {self.id!r} of queue {self.queue!r} has left no trace: its result_ttl is over, or was 0"
            )
        if status.state is JobState.CANCELLED:
            raise JobCancelled(f"job {self.id!r} was cancelled{': ' + status.last_error if status.last_error else ''}")
        if status.state is JobState.FAILED:
            raise JobFailed(
                self.id,
                status.error_type or "",
                status.error_message or "",
                status.traceback or "",
                status.attempts,
            )
        if status.last_error:
            raise ResultNotKept(f"job {self.id!r} has succeeded, but {status.last_error}")
        return cast(R_co, self._reader.typed_result(status))

    async def cancel(self, *, terminate: bool = False) -> bool:
        """Cancel the job; see :meth:`fastq.FastQ.cancel`."""
        return await self._reader.cancel(self.id, terminate=terminate, queue=self.queue)

    def cancel_sync(self, *, terminate: bool = False) -> bool:
        """:meth:`cancel` from blocking code."""
        return self._reader.cancel_sync(self.id, terminate=terminate, queue=self.queue)

    def __repr__(self) -> str:
        return f"<JobHandle {self.id} queue={self.queue}{'' if self.created else ' existed'}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JobHandle) and (self.id, self.queue) == (other.id, other.queue)

    def __hash__(self) -> int:
        return hash((self.id, self.queue))


class Bulk:
    """What :meth:`enqueue_many` did.

    Attributes:
        total: calls that were given.
        created: jobs that were created; the others existed (same ``job_id``).
        ids: the ids in the order given, or empty with ``ids=False``.
    """

    __slots__ = ("created", "ids", "total")

    def __init__(self) -> None:
        self.total = 0
        self.created = 0
        self.ids: list[str] = []

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __repr__(self) -> str:
        return f"<Bulk total={self.total} created={self.created}>"
