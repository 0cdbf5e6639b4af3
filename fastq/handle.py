"""What a caller holds after enqueue: the job's id and the way to ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from fastq.job import JobStatus

__all__ = ["Bulk", "JobHandle", "StatusReader"]

R_co = TypeVar("R_co", covariant=True)


class StatusReader(Protocol):
    """Who can look a job up (the application)."""

    async def get_status(self, job_id: str, *, queue: str | None = None) -> JobStatus | None:
        """See :meth:`fastq.FastQ.get_status`."""
        ...

    def get_status_sync(self, job_id: str, *, queue: str | None = None) -> JobStatus | None:
        """See :meth:`fastq.FastQ.get_status_sync`."""
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
