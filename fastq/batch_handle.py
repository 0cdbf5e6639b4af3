"""A batch: how far it is, its end, what is enqueued then; close and cancel."""

from __future__ import annotations

from typing import Any

import msgspec

from fastq.broker import batches
from fastq.broker.batches import BatchView
from fastq.broker.command import Operation, raw
from fastq.broker.flows import ended_record
from fastq.broker.keys import GlobalKeys, QueueKeys
from fastq.broker.views import text_of
from fastq.errors import InvalidOption, UnknownBatch
from fastq.job import Extra, decode_envelope, encode
from fastq.partitions import queue_of
from fastq.workflow import Signature
from fastq.workflow_handle import Home

__all__ = ["Batch", "BatchStatus", "callback"]


class BatchStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How far a batch is. Times are seconds since the epoch, on Redis's clock.

    Attributes:
        state: filling (more jobs may come), running, then success (every job has succeeded), failed or cancelled.
        total: jobs so far; those that were there before (unique keys) are not counted.
        pending: to run: ready, scheduled, waiting for a retry or a limit.
        running: held by workers.
        success, failed, cancelled: ended so, each counted once; a replay changes nothing.
        incomplete: its producer gave up before the end of its items; it cannot end as success.
        filled_at: when jobs came last. A batch that is filling and has got none for long has lost its producer.
    """

    id: str
    queue: str
    task: str
    state: str
    total: int
    pending: int = 0
    running: int = 0
    success: int = 0
    failed: int = 0
    cancelled: int = 0
    incomplete: bool = False
    started_at: float = 0.0
    filled_at: float | None = None
    finished_at: float | None = None

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.state not in batches.OPEN

    @property
    def done(self) -> int:
        """Jobs that have ended."""
        return self.success + self.failed + self.cancelled

    @property
    def percent(self) -> float:
        """Jobs that have ended, in per cent of those that are there; 100 for an empty batch that has ended."""
        return 100.0 * self.done / self.total if self.total else 100.0 * self.final


class Batch:
    """Jobs that were enqueued together by :meth:`fastq.FastQ.enqueue_batch`.

    Attributes:
        id: the id of its n-th job, from 0, is ``<id>-<n>``.
    """

    __slots__ = ("_home", "_queue", "id")

    def __init__(self, home: Home, batch_id: str, queue: str | None) -> None:
        self._home = home
        self.id = batch_id
        self._queue = queue

    async def status(self) -> BatchStatus | None:
        """How far it is: its counts, whatever its size. None when it is unknown or its time (``result_ttl``) is over."""
        return await self._home.run(self._status())

    def status_sync(self) -> BatchStatus | None:
        """:meth:`status` from blocking code."""
        return self._home.run_sync(self._status())

    async def wait(self, timeout: float | None = None) -> BatchStatus | None:
        """Its status as soon as it has ended: told by a message, not by polling.

        Raises:
            WaitTimeout: it had not ended after ``timeout`` seconds.

        Example::

            batch = await app.enqueue_batch("resize", ({"image": name} for name in names))
            status = await batch.wait(timeout=600)
        """
        keys = await self._home.run(self._find())
        if keys is None:
            return None
        await self._home.wait_for(self.id, timeout=timeout, queue=keys.queue)
        return await self.status()

    def wait_sync(self, timeout: float | None = None) -> BatchStatus | None:
        """:meth:`wait` from blocking code."""
        keys = self._home.run_sync(self._find())
        if keys is None:
            return None
        self._home.wait_for_sync(self.id, timeout=timeout, queue=keys.queue)
        return self.status_sync()

    async def on_complete(self, call: Signature) -> bool:
        """Enqueue a job once all of its jobs have ended, however that is; exactly once, at once when they have.

        ``task.s(…)`` gets the batch's id first, ``task.si(…)`` its own arguments alone. One job per kind of end.

        Returns False when it has ended otherwise (on_success, on_failure).

        Raises:
            UnknownBatch: there is none, or its time is over.
            InvalidOption: there is another such job, or its task's queue is not that of the batch.

        Example::

            await batch.on_complete(report.s())
        """
        return await self._home.run(self._call("complete", call))

    def on_complete_sync(self, call: Signature) -> bool:
        """:meth:`on_complete` from blocking code."""
        return self._home.run_sync(self._call("complete", call))

    async def on_success(self, call: Signature) -> bool:
        """:meth:`on_complete` if every job has succeeded."""
        return await self._home.run(self._call("success", call))

    def on_success_sync(self, call: Signature) -> bool:
        """:meth:`on_success` from blocking code."""
        return self._home.run_sync(self._call("success", call))

    async def on_failure(self, call: Signature) -> bool:
        """:meth:`on_complete` if a job has failed for good, expired or was cancelled, or the batch is incomplete; not when
        the batch was cancelled.
        """
        return await self._home.run(self._call("failure", call))

    def on_failure_sync(self, call: Signature) -> bool:
        """:meth:`on_failure` from blocking code."""
        return self._home.run_sync(self._call("failure", call))

    async def failed(self, most: int = 1_000) -> list[str]:
        """The ids of jobs that have failed, in order; they are in the dead-letter queue."""
        return await self._home.run(self._failed(most))

    def failed_sync(self, most: int = 1_000) -> list[str]:
        """:meth:`failed` from blocking code."""
        return self._home.run_sync(self._failed(most))

    async def close(self) -> bool:
        """Say in place of a producer that has died that no more jobs are coming. The batch ends as failed when those that it
        has have ended. False: it was not filling, or is unknown.
        """
        return await self._home.run(self._close())

    def close_sync(self) -> bool:
        """:meth:`close` from blocking code."""
        return self._home.run_sync(self._close())

    async def cancel(self, *, terminate: bool = False) -> bool:
        """Let it take no more jobs, and cancel those that have not ended as ``job.cancel(terminate=…)`` does. False: it had
        ended.
        """
        return await self._home.run(self._cancel(terminate))

    def cancel_sync(self, *, terminate: bool = False) -> bool:
        """:meth:`cancel` from blocking code."""
        return self._home.run_sync(self._cancel(terminate))

    # -- how -----------------------------------------------------------------------------------------

    def _find(self) -> Operation[QueueKeys | None]:
        if self._queue is None:
            names = sorted((yield raw("SMEMBERS", GlobalKeys(self._home.prefix()).queues)))
            queues = [self._home.keys(text_of(name)) for name in names]
            found = (yield [raw("EXISTS", q.batch(self.id)) for q in queues]) if queues else []
            self._queue = next((q.queue for q, there in zip(queues, found, strict=True) if there), None)
        return None if self._queue is None else self._home.keys(self._queue)

    def _status(self) -> Operation[BatchStatus | None]:
        keys = yield from self._find()
        found = None if keys is None else (yield from batches.view(keys, self.id))
        return None if found is None or keys is None else status_of(self.id, keys.queue, found)

    def _call(self, which: str, call: Signature) -> Operation[bool]:
        keys = yield from self._find()
        reply = -1
        if keys is not None:
            reply = yield batches.batch_call(keys, self.id, which, callback(self.id, which, keys.queue, call))
        if reply == -1:
            raise UnknownBatch(f"no batch {self.id!r}: there was none of this id, or its result_ttl is over")
        if reply == 0:
            raise InvalidOption(f"batch {self.id} has another on_{which} already")
        return bool(reply > 0)

    def _failed(self, most: int) -> Operation[list[str]]:
        keys = yield from self._find()
        return [] if keys is None else (yield from batches.failed(keys, self.id, most))

    def _close(self) -> Operation[bool]:
        keys = yield from self._find()
        if keys is None or (yield raw("HGET", keys.batch(self.id), "state")) != b"filling":
            return False
        yield from batches.close(keys, self.id, "torn")
        return True

    def _cancel(self, terminate: bool) -> Operation[bool]:
        keys = yield from self._find()
        if keys is None:
            return False
        record = ended_record("cancelled", "", self._home.now_ms())
        ttl = round(self._home.result_ttl() * 1_000)
        return (yield from batches.cancel(keys, self.id, record, ttl, terminate=terminate))

    def __repr__(self) -> str:
        return f"<Batch {self.id}>"


def status_of(batch_id: str, queue: str, found: BatchView) -> BatchStatus:
    """A view as people read it."""
    ended = found.success + found.failed + found.cancelled
    return BatchStatus(
        id=batch_id,
        queue=queue,
        task=found.task,
        state=found.state,
        total=found.total,
        pending=found.total - ended - found.running,
        running=found.running,
        success=found.success,
        failed=found.failed,
        cancelled=found.cancelled,
        incomplete=found.torn,
        started_at=found.started_ms / 1_000,
        filled_at=found.filled_ms / 1_000 or None,
        finished_at=found.finished_ms / 1_000 or None,
    )


def callback(batch_id: str, which: str, queue: str, call: Signature) -> bytes:
    """The envelope of a job that is enqueued at the end of a batch. It cannot expire: nobody knows when that is.

    Raises:
        InvalidOption: it would run in another queue. Else as a call of its task.
    """
    if not isinstance(call, Signature):
        raise InvalidOption(f"a batch calls task.s(…) or task.si(…) at its end, not {call!r:.100}")
    args: tuple[Any, ...] = call.args if call.immutable else (batch_id, *call.args)
    its_own, data = call.source.node(args, call.kwargs, call.options, -1)
    if its_own != (whole := queue_of(queue)):
        raise InvalidOption(
            f"the callback {call.source.name!r} of a batch runs in the batch's queue {whole!r}, and its task goes to "
            f"{its_own!r}: say {call.source.name}.options(queue={whole!r}).s(…)"
        )
    envelope = decode_envelope(data)
    extra = msgspec.structs.replace(envelope.extra or Extra(), takes=None, expires_at=None)
    data = encode(msgspec.structs.replace(envelope, extra=None if extra == Extra() else extra))
    seal = call.source.home().sealer()
    return data if seal is None else seal(queue, f"{batch_id}-{which}", data)
