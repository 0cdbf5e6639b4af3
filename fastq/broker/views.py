"""What the inspector returns, and how the replies of Redis become it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from fastq.broker.command import Command, raw
from fastq.broker.keys import PRIORITIES, QueueKeys
from fastq.errors import UndecodableJob
from fastq.job import (
    DeadLetter,
    Envelope,
    Extra,
    JobState,
    JobStatus,
    WorkerCard,
    decode_envelope,
    decode_error,
    decode_progress,
    decode_record,
    encode,
)

__all__ = ["QueueInfo", "WorkerInfo"]

BUCKETS = 60
"""Buckets of finished records that are looked at, the newest ones."""


class QueueInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What there is in one queue. The numbers are read one after the other: under load they may be off by a few.

    ``ready`` holds the priorities that have jobs; a cancelled job stays counted there until a worker has skipped it,
    ``pending`` is without those. ``parked`` jobs wait for a limit. ``running`` also counts what a worker has reserved and not started. ``finished``
    counts the records kept (``result_ttl``). ``oldest_age``: seconds that the next jobs have been ready, or due.
    ``partitions``: what there is in each, where the queue is split; the rest is in the queue's home.
    """

    name: str
    pending: int = 0
    ready: dict[int, int] = {}
    scheduled: int = 0
    parked: int = 0
    running: int = 0
    dead: int = 0
    finished: int = 0
    paused: bool = False
    oldest_age: float | None = None
    workers: int = 0
    partitions: list[QueueInfo] = []


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One worker. ``lease_left`` is in seconds, negative once the lease has run out; ``started_at`` since the epoch.

    ``state``: ``quiet`` and ``draining`` ones take no new jobs; the latter never again.
    """

    id: str
    queues: list[str]
    running: int
    lease_left: float
    host: str = ""
    pid: int = 0
    concurrency: int = 0
    started_at: float | None = None
    version: str = ""
    state: str = "running"


class Found(NamedTuple):
    """A job that a queue knows, with the reply of status.lua."""

    q: QueueKeys
    state: str  # finished | failed | scheduled | parked | running | pending
    reply: list[Any]
    progress: bytes | None = None

    @property
    def queue(self) -> str:
        """The queue's name."""
        return self.q.queue

    @property
    def over(self) -> bool:
        """Whether it will not run any more by itself."""
        return self.state in ("finished", "failed")


class Look(NamedTuple):
    """The first replies about a queue."""

    ready: dict[int, int]
    heads: list[bytes]
    scheduled: int
    parked: int
    dead: int
    paused: bool
    ghosts: int
    leases: dict[str, float]
    buckets: list[bytes]

    @classmethod
    def read(cls, replies: list[Any]) -> Look:
        counts, heads, rest = replies[:PRIORITIES], replies[PRIORITIES : 2 * PRIORITIES], replies[2 * PRIORITIES :]
        scheduled, parked, dead, paused, ghosts, leases, buckets = rest
        ready = {level: count for level, count in reversed(list(enumerate(counts))) if count}
        heads = [head for head in heads if head]
        return cls(ready, heads, scheduled, parked, dead, paused == 1, ghosts, leases, buckets)

    @property
    def pending(self) -> int:
        return max(sum(self.ready.values()) - self.ghosts, 0)

    def divide(self, replies: list[Any]) -> tuple[list[bytes | None], int, int]:
        """The second replies: envelopes of the heads, jobs held by workers, records kept."""
        envelopes = replies.pop(0) if self.heads else []
        held, kept = replies[: len(self.leases)], replies[len(self.leases) :]
        return envelopes, sum(max(size - 1, 0) for size in held), sum(kept)

    def info(self, name: str, now: int, oldest_age: float | None, running: int, finished: int) -> QueueInfo:
        return QueueInfo(
            name=name,
            pending=self.pending,
            ready=self.ready,
            scheduled=self.scheduled,
            parked=self.parked,
            running=running,
            dead=self.dead,
            finished=finished,
            paused=self.paused,
            oldest_age=oldest_age,
            workers=sum(until > now for until in self.leases.values()),
        )


def look_at(q: QueueKeys) -> list[Command[Any]]:
    """The first questions about a queue, in the order of :meth:`Look.read`."""
    return [
        *(raw("LLEN", level) for level in q.ready),
        *(raw("LINDEX", level, 0) for level in q.ready),
        raw("ZCARD", q.due),
        raw("HLEN", q.parked_of),
        raw("ZCARD", q.dead),
        raw("EXISTS", q.paused),
        raw("HLEN", q.ghosts),
        leases_of(q),
        raw("ZRANGE", q.done, 0, BUCKETS - 1, "REV"),
    ]


def look_again(q: QueueKeys, look: Look) -> list[Command[Any]]:
    """The second ones, in the order of :meth:`Look.divide`."""
    return [
        *([raw("HMGET", q.jobs, *look.heads)] if look.heads else []),
        *(raw("SCARD", q.running(worker)) for worker in look.leases),
        *(raw("HLEN", q.bucket(text_of(name))) for name in look.buckets),
    ]


def clock() -> Command[int]:
    """Redis's clock in ms."""
    return raw("TIME", decode=lambda reply: int(reply[0]) * 1_000 + int(reply[1]) // 1_000)


def leases_of(q: QueueKeys) -> Command[dict[str, float]]:
    """Worker id -> end of its lease in ms."""
    return raw("ZRANGE", q.workers, 0, -1, "WITHSCORES", decode=lambda reply: {text_of(k): v for k, v in scored(reply)})


def scored(reply: list[bytes]) -> list[tuple[bytes, float]]:
    """A reply WITHSCORES."""
    stream = iter(reply)
    return [(member, float(score)) for member, score in zip(stream, stream, strict=True)]


def oldest_age(envelopes: Iterable[bytes | None], now: int) -> float | None:
    """Seconds since the oldest of these jobs was ready, or due."""
    since = []
    for data in envelopes:
        try:
            envelope = decode_envelope(data or b"")
        except UndecodableJob:
            continue
        due = envelope.extra.due_at if envelope.extra else None
        since.append(envelope.enqueued_at if due is None else due)
    return max(now - min(since), 0) / 1_000 if since else None


def worker_info(worker: str, queue: str, lease_left: float, running: int, card: bytes | None) -> WorkerInfo:
    """One worker as one of its queues sees it; a card that cannot be read leaves its fields empty."""
    info = WorkerInfo(id=worker, queues=[queue], running=running, lease_left=lease_left)
    try:
        said = msgspec.msgpack.decode(card or b"", type=WorkerCard)
    except Exception:  # noqa: BLE001 - whatever another release or a foreigner has written
        return info
    return msgspec.structs.replace(
        info,
        host=said.host,
        pid=said.pid,
        concurrency=said.concurrency,
        started_at=seconds(said.started_at),
        version=said.version,
        state=said.state,
    )


def whole(name: str, parts: Sequence[QueueInfo]) -> QueueInfo:
    """A queue from what is in its partitions, its home among them."""
    if len(parts) == 1:
        return parts[0]
    ready: Counter[int] = Counter()
    for part in parts:
        ready.update(part.ready)
    ages = [part.oldest_age for part in parts if part.oldest_age is not None]
    return QueueInfo(
        name=name,
        pending=sum(part.pending for part in parts),
        ready=dict(sorted(ready.items())),
        scheduled=sum(part.scheduled for part in parts),
        parked=sum(part.parked for part in parts),
        running=sum(part.running for part in parts),
        dead=sum(part.dead for part in parts),
        finished=sum(part.finished for part in parts),
        paused=any(part.paused for part in parts),
        oldest_age=max(ages, default=None),
        workers=max(part.workers for part in parts),
        partitions=[part for part in parts if part.name != name],
    )


def merged(one: WorkerInfo, other: WorkerInfo) -> WorkerInfo:
    """The same worker, seen from two of its queues."""
    return msgspec.structs.replace(
        one,
        queues=list(dict.fromkeys(one.queues + other.queues)),
        running=one.running + other.running,
        lease_left=min(one.lease_left, other.lease_left),
    )


def status_of(queue: str, job_id: str, reply: list[Any]) -> JobStatus:
    """A reply of status.lua; its shapes stand in the head of the script."""
    state = text_of(reply[0])
    if state == "finished":
        return finished_status(queue, job_id, reply[1])
    if state == "failed":
        return dead_status(letter_of(queue, job_id, reply[1], reply[2], float(reply[3])))
    more: dict[str, Any] = {}
    if state == "scheduled":
        more["due_at"] = float(reply[2]) / 1_000
    elif state == "parked":
        more["limit"] = text_of(reply[2])
    elif state == "running":
        more["worker"] = text_of(reply[2])
    return unfinished(queue, job_id, JobState(state), reply[1], **more)


def with_progress(status: JobStatus, data: bytes | None) -> JobStatus:
    """The same with what the job's handler said last; what cannot be read is left out."""
    if data is None:
        return status
    try:
        return msgspec.structs.replace(status, progress=decode_progress(data))
    except Exception:  # noqa: BLE001 - whatever another release has written
        return status


def ended_status(queue: str, job_id: str, reply: list[Any]) -> JobStatus | None:
    """A reply of follow.lua about a job that is not open; None when nothing is known of it."""
    return None if reply[0] == b"unknown" else status_of(queue, job_id, reply)


def unfinished(queue: str, job_id: str, state: JobState, data: bytes, **more: Any) -> JobStatus:
    """A job that is still to run, by its envelope."""
    try:
        envelope = decode_envelope(data)
    except UndecodableJob as error:
        return JobStatus(id=job_id, queue=queue, state=state, last_error=str(error), **more)
    extra = envelope.extra or Extra()
    more.setdefault("due_at", seconds(extra.due_at))
    return JobStatus(
        id=job_id,
        queue=queue,
        state=state,
        task=envelope.task,
        priority=envelope.priority,
        attempts=envelope.attempt,
        enqueued_at=seconds(envelope.enqueued_at),
        last_error=extra.error,
        **more,
    )


def finished_status(queue: str, job_id: str, data: bytes) -> JobStatus:
    """A job by the record that it has left.

    Raises:
        UndecodableJob: another program, or a later release, has written it.
    """
    try:
        record = decode_record(data)
        state = JobState(record.state)
        result = None if record.result is None else msgspec.msgpack.decode(record.result)
    except Exception as error:
        raise UndecodableJob(f"the record of job {job_id!r} in queue {queue!r} cannot be read: {error}") from error
    return JobStatus(
        id=job_id,
        queue=queue,
        state=state,
        task=record.task or None,
        attempts=record.attempts,
        enqueued_at=seconds(record.enqueued_at),
        started_at=seconds(started := not_before(record.enqueued_at, record.started_at)),
        finished_at=seconds(not_before(started or record.enqueued_at, record.finished_at)),
        result=result,
        last_error=record.error,
    )


def finished_statuses(queue: str, pairs: Sequence[bytes], state: JobState) -> Iterator[JobStatus]:
    """Of a piece of a bucket, the records in one state; what cannot be read is left out."""
    stream = iter(pairs)
    for job_id, data in zip(stream, stream, strict=True):
        try:
            status = finished_status(queue, text_of(job_id), data)
        except UndecodableJob:
            continue
        if status.state is state:
            yield status


def letter_of(queue: str, job_id: str, data: bytes, failure: bytes, died_ms: float) -> DeadLetter:
    """A dead letter; its ``body`` is the whole envelope when that cannot be read."""
    error = decode_error(failure)
    envelope: Envelope | None = None
    try:
        envelope = decode_envelope(data)
    except UndecodableJob:
        pass
    return DeadLetter(
        id=job_id,
        queue=queue,
        task=envelope.task if envelope else None,
        attempts=error.attempts or (envelope.attempt if envelope else 0),
        failed_at=died_ms / 1_000,
        enqueued_at=seconds(envelope.enqueued_at) if envelope else None,
        started_at=seconds(not_before(envelope.enqueued_at, error.started_at) if envelope else error.started_at),
        reason=error.reason,
        error_type=error.type,
        error_message=error.message,
        traceback=error.traceback,
        host=error.host,
        body=envelope.body if envelope else data,
    )


def dead_status(letter: DeadLetter) -> JobStatus:
    """A dead letter as the state of its job."""
    return JobStatus(
        id=letter.id,
        queue=letter.queue,
        state=JobState.FAILED,
        task=letter.task,
        attempts=letter.attempts,
        enqueued_at=letter.enqueued_at,
        started_at=letter.started_at,
        finished_at=letter.failed_at,
        last_error=f"{letter.error_type}: {letter.error_message}" if letter.error_type else letter.error_message,
        error_type=letter.error_type,
        error_message=letter.error_message,
        traceback=letter.traceback,
    )


def fresh(data: bytes, died_ms: int, now: int) -> bytes:
    """The envelope of a replay: all attempts before it, nothing of its past but its time of death.

    It may not expire: whoever replays a job wants it to run. It counts as due now, so no one mistakes the days it was
    dead for waiting.

    Raises:
        UndecodableJob: it cannot be read.
    """
    envelope = decode_envelope(data)
    extra = msgspec.structs.replace(
        envelope.extra or Extra(), error=None, expires_at=None, snoozes=0, strays=0, due_at=now, replayed_from=died_ms
    )
    return encode(msgspec.structs.replace(envelope, attempt=0, extra=extra))


def number_of(value: bytes | None) -> int:
    """What Redis holds as a number; 0 for whatever else somebody has written."""
    try:
        return int(value or 0)
    except ValueError:
        return 0


def text_of(value: bytes) -> str:
    """What Redis holds as text, whoever wrote it."""
    return value.decode("utf-8", "replace")


_APART = 1_000  # ms; by so much no two processes misjudge Redis's clock


def not_before(earlier: int, at: int) -> int:
    """A later step's time on the wire, not before an earlier one's: two processes know Redis's clock to a ms or two.

    >>> not_before(1_714, 1_713), not_before(1_714, 1_800), not_before(1_714, 0), not_before(99_000, 1_713)
    (1714, 1800, 0, 1713)
    """
    return earlier if 0 < at < earlier < at + _APART else at


def seconds(ms: int | None) -> float | None:
    """A time on the wire as people count; the 0 of records means that there is none."""
    return ms / 1_000 if ms else None
