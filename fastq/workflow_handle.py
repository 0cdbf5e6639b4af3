"""A workflow that was started: its status, its end, its result; cancel and retry."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec

from fastq.broker import flows
from fastq.broker.command import Operation
from fastq.broker.flows import FlowView
from fastq.broker.keys import QueueKeys
from fastq.errors import JobCancelled, JobFailed, ResultExpired
from fastq.job import JobState, JobStatus

__all__ = ["Home", "Workflow", "WorkflowStatus"]

T = TypeVar("T")


class Home(Protocol):
    """Who starts workflows and looks after them (the application)."""

    def keys(self, queue: str) -> QueueKeys:
        """The key names of a queue."""
        ...

    def partition(self, queue: str, key: str) -> str:
        """Where a job with this id, or unique key, lies: a partition of the queue, or the queue itself."""
        ...

    def prefix(self) -> str:
        """The first part of every key."""
        ...

    def result_ttl(self) -> float:
        """Seconds that results are kept where nothing else is said."""
        ...

    def sealer(self) -> Callable[[str, str, bytes], bytes] | None:
        """What signs an envelope, given its queue and id; None: jobs are not signed."""
        ...

    def now_ms(self) -> int:
        """Redis's time as this process knows it."""
        ...

    def run(self, operation: Operation[T]) -> Coroutine[Any, Any, T]:
        """Run an operation on this event loop's connection."""
        ...

    def run_sync(self, operation: Operation[T]) -> T:
        """The same from blocking code."""
        ...

    def store(
        self, begin: Callable[[], Operation[T]], queue: str, what: str, ident: str, *, safe: bool | None = None
    ) -> Coroutine[Any, Any, T]:
        """Run an operation that begins something, and wait for replicas where they must have it."""
        ...

    def store_sync(
        self, begin: Callable[[], Operation[T]], queue: str, what: str, ident: str, *, safe: bool | None = None
    ) -> T:
        """The same from blocking code."""
        ...

    async def wait_for(
        self, job_id: str, *, timeout: float | None = None, queue: str | None = None
    ) -> JobStatus | None:
        """See :meth:`fastq.FastQ.wait_for`."""
        ...

    def wait_for_sync(self, job_id: str, *, timeout: float | None = None, queue: str | None = None) -> JobStatus | None:
        """See :meth:`fastq.FastQ.wait_for_sync`."""
        ...


class WorkflowStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How far a workflow is. Times are seconds since the epoch, on Redis's clock; counts are of jobs.

    ``state``: running, success, failed or cancelled. ``waiting`` jobs wait for others; those that a workflow which has ended
    never ran are ``skipped``. ``active``: scheduled, pending, parked or running.
    """

    id: str
    queue: str
    name: str
    state: str
    total: int
    waiting: int = 0
    active: int = 0
    success: int = 0
    failed: int = 0
    cancelled: int = 0
    skipped: int = 0
    started_at: float = 0.0
    finished_at: float | None = None

    @property
    def final(self) -> bool:
        """Whether it has ended. A failed one may be sent on with ``retry()``."""
        return self.state != "running"


class Workflow:
    """A workflow that was started.

    Attributes:
        id, queue: which one. The id of the job of node 3 is ``<id>.3``.
    """

    __slots__ = ("_home", "id", "queue")

    def __init__(self, home: Home, flow_id: str, queue: str) -> None:
        self._home = home
        self.id = flow_id
        self.queue = queue

    async def status(self) -> WorkflowStatus | None:
        """How far it is; None when it is unknown or its time (``result_ttl``) is over."""
        return self._status(await self._home.run(flows.view(self._keys, self.id)))

    def status_sync(self) -> WorkflowStatus | None:
        """:meth:`status` from blocking code."""
        return self._status(self._home.run_sync(flows.view(self._keys, self.id)))

    async def wait(self, timeout: float | None = None) -> WorkflowStatus | None:
        """Its status as soon as it has ended: told by a message, not by polling.

        Raises:
            WaitTimeout: it had not ended after ``timeout`` seconds.
        """
        await self._home.wait_for(self.id, timeout=timeout, queue=self.queue)
        return await self.status()

    def wait_sync(self, timeout: float | None = None) -> WorkflowStatus | None:
        """:meth:`wait` from blocking code."""
        self._home.wait_for_sync(self.id, timeout=timeout, queue=self.queue)
        return self.status_sync()

    async def result(self, timeout: float | None = None) -> Any:
        """What its last job has returned; of a group, the list. Waits for the end.

        Raises:
            JobFailed: it has failed: the error is that of its first failed job. JobCancelled: it was cancelled.
            ResultExpired: its time is over. WaitTimeout: it had not ended after ``timeout`` seconds.
        """
        self._check(await self._home.wait_for(self.id, timeout=timeout, queue=self.queue))
        return await self._home.run(self._outcome())

    def result_sync(self, timeout: float | None = None) -> Any:
        """:meth:`result` from blocking code."""
        self._check(self._home.wait_for_sync(self.id, timeout=timeout, queue=self.queue))
        return self._home.run_sync(self._outcome())

    async def cancel(self, *, terminate: bool = False) -> bool:
        """Let nothing more of it begin, and cancel its jobs as ``job.cancel(terminate=…)`` does. False: it had ended."""
        return await self._home.run(self._cancel(terminate))

    def cancel_sync(self, *, terminate: bool = False) -> bool:
        """:meth:`cancel` from blocking code."""
        return self._home.run_sync(self._cancel(terminate))

    async def retry(self) -> int:
        """Send a workflow that has failed on, from its failed jobs; what has succeeded does not run again.

        Returns how many jobs run again, 0 when it has not failed or they are no dead letters any more.
        """
        return await self._home.run(flows.retry(self._keys, self.id))

    def retry_sync(self) -> int:
        """:meth:`retry` from blocking code."""
        return self._home.run_sync(flows.retry(self._keys, self.id))

    @property
    def _keys(self) -> QueueKeys:
        return self._home.keys(self.queue)

    def _cancel(self, terminate: bool) -> Operation[bool]:
        record = flows.ended_record("cancelled", "", self._home.now_ms())
        return flows.cancel(self._keys, self.id, record, round(self._home.result_ttl() * 1_000), terminate=terminate)

    def _check(self, ended: JobStatus | None) -> None:
        if ended is None:
            raise ResultExpired(
                f"workflow {self.id!r} of queue {self.queue!r} has left no trace: its result_ttl is over"
            )
        if ended.state is JobState.CANCELLED:
            raise JobCancelled(f"workflow {self.id!r} was cancelled")

    def _outcome(self) -> Operation[Any]:
        found = yield from flows.view(self._keys, self.id)
        if found is None:
            raise ResultExpired(
                f"workflow {self.id!r} of queue {self.queue!r} has left no trace: its result_ttl is over"
            )
        if found.state == "failed":
            job_id, error = yield from flows.first_error(self._keys, self.id, found.letters)
            raise JobFailed(job_id, error.type, error.message, error.traceback, error.attempts)
        value = yield from flows.output(self._keys, self.id, int(found.fields["exit"]))
        return msgspec.msgpack.decode(msgspec.msgpack.encode(value))

    def _status(self, found: FlowView | None) -> WorkflowStatus | None:
        if found is None:
            return None
        count = found.letters.count
        waiting, over = count("w"), found.state != "running"
        return WorkflowStatus(
            id=self.id,
            queue=self.queue,
            name=found.fields.get("name", ""),
            state=found.state,
            total=len(found.letters) - count("g") - count("G") - count("-"),
            waiting=0 if over else waiting,
            skipped=waiting if over else 0,
            active=count("a"),
            success=count("s"),
            failed=count("f"),
            cancelled=count("c"),
            started_at=found.started_ms / 1_000,
            finished_at=found.finished_ms / 1_000 or None,
        )

    def __repr__(self) -> str:
        return f"<Workflow {self.id} queue={self.queue}>"
