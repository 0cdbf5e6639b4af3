"""The job: its envelope on the wire, its states and the moves between them, its outcomes and records.

Pure: no clock, no I/O. Times are integer milliseconds of Redis's clock since the epoch.

The envelope is a msgpack array whose first element is the priority, a positive fixint (0 to 10), so that a
script may read it with ``string.byte(envelope, 2)`` without decoding anything.
"""

from __future__ import annotations

import datetime as dt
import enum
import functools
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from fastq._core import PlainCalls, new_id, plain_envelope
from fastq.errors import GivenBack, InvalidJobId, InvalidOption, NewerJob, UndecodableJob

__all__ = [
    "DeadLetter",
    "Envelope",
    "ErrorInfo",
    "Event",
    "Extra",
    "JobPriority",
    "JobRecord",
    "JobResult",
    "JobState",
    "JobStatus",
    "Outcome",
    "PlainCalls",
    "Progress",
    "WorkerCard",
    "culprits",
    "new_id",
    "plain_envelope",
]

Seconds = float | dt.timedelta
"""How durations are given."""

YEAR_MS = 366 * 86_400_000

PLAIN = 1
"""The version of most envelopes."""

SIGNED = 2
"""The version of those that are signed: who does not know them would drop the signature at a retry."""

VERSION = SIGNED
"""The newest version of an envelope that this release reads. An envelope has the version that it needs, not that of who
wrote it; the first five fields, and ``attempt`` and ``due_at``, mean the same in all of them (docs/releases.md)."""

NEWER_DELAY = 2_000
"""Milliseconds until a newer release's job is offered again: its bytes are not ours to change, so nothing can be counted."""

ID_MOST = 120
"""Characters of a job's id."""

TASK_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,200}\Z")
_JOB_ID = re.compile(r"[A-Za-z0-9_.:@/+=-]{1,120}\Z")


class JobState(enum.StrEnum):
    """Where a job is. A member equals its name as a string: ``JobState.SUCCESS == "success"``."""

    SCHEDULED = "scheduled"  # due later; also a retry that waits
    WAITING = "waiting"  # for its parents
    PENDING = "pending"  # ready, not yet reserved
    PARKED = "parked"  # waits for a limit
    RUNNING = "running"  # reserved by a worker
    SUCCESS = "success"
    FAILED = "failed"  # in the dead-letter queue
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether the job will not move any more by itself."""
        return self in FINAL


FINAL = frozenset({JobState.SUCCESS, JobState.FAILED, JobState.CANCELLED})

MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.SCHEDULED: frozenset({JobState.PENDING, JobState.CANCELLED}),
    JobState.WAITING: frozenset({JobState.PENDING, JobState.CANCELLED, JobState.FAILED}),
    JobState.PENDING: frozenset({JobState.RUNNING, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {JobState.SUCCESS, JobState.FAILED, JobState.CANCELLED, JobState.SCHEDULED, JobState.PENDING, JobState.PARKED}
    ),
    JobState.PARKED: frozenset({JobState.RUNNING, JobState.PENDING, JobState.CANCELLED}),
    JobState.FAILED: frozenset({JobState.PENDING}),  # replay
    JobState.SUCCESS: frozenset(),
    JobState.CANCELLED: frozenset(),
}
"""Every legal move; docs/state_machine.md is drawn from it."""


class JobPriority(enum.IntEnum):
    """Named priorities; any whole number from 0 to 10 may be used, higher runs first."""

    LOW = 0
    NORMAL = 5
    HIGH = 8
    CRITICAL = 10


class Outcome(enum.IntEnum):
    """What became of one run of a job. The members are the sections of ``settle.lua``, in its order."""

    SUCCEEDED = 0  # finished, no record kept
    RECORDED = 1  # finished (success, cancelled), a record is kept for result_ttl
    LATER = 2  # due again: a retry (attempt charged) or a snooze (not charged)
    FAILED = 3  # into the dead-letter queue
    RELEASED = 4  # handed back to the front of the queue, nothing charged


# -- envelope -----------------------------------------------------------------------------


class Signature(msgspec.Struct, array_like=True, frozen=True):
    """See :mod:`fastq.signing`."""

    key: str  # its id
    not_before: int  # ms; 0: at once
    expires: int  # ms; 0: never
    mac: bytes = b""


class Extra(msgspec.Struct, omit_defaults=True, rename={
    "timeout": "t", "max_attempts": "m", "expires_at": "x", "result_ttl": "r", "error": "e",
    "due_at": "d", "snoozes": "s", "strays": "u", "schedule": "c", "replayed_from": "p",
    "takes": "w", "signature": "g", "soft_timeout": "o",
}):  # fmt: skip
    """The rare fields of an envelope; absent (one byte) on a job that uses none of them."""

    timeout: float | None = None  # seconds; None: the task's own
    max_attempts: int | None = None
    expires_at: int | None = None  # not started by then: cancelled as expired
    result_ttl: float | None = None
    error: str | None = None  # of the last attempt, "Type: message", shortened
    due_at: int | None = None  # when a delayed job or retry was due; lateness is measured from it
    snoozes: int = 0
    strays: int = 0  # times it was given back because no worker here knows its task
    schedule: str | None = None  # name of the cron or interval that made it
    replayed_from: int | None = None  # time of the death that a replay undid
    takes: int | None = None  # a job of a workflow: the node whose result is its first argument, -1: none
    signature: Signature | None = None
    soft_timeout: float | None = None  # seconds; None: the task's own, 0: none


class Envelope(msgspec.Struct, array_like=True):
    """Header and body of one job as stored; ``body`` is the msgpack of its arguments, opaque to scripts."""

    priority: int
    version: int
    task: str
    body: bytes
    enqueued_at: int
    attempt: int = 0  # failed runs so far
    extra: Extra | None = None


_encoder = msgspec.msgpack.Encoder()
_envelope_decoder = msgspec.msgpack.Decoder(Envelope)
encode = _encoder.encode
_AFTER_PLAIN_HEAD = 5
"""Bytes of an envelope behind its task's name, with an empty body, at time 0: two, one, and one each for attempt and extra."""
read_envelope = _envelope_decoder.decode
"""As :func:`decode_envelope`, with nothing checked and whatever msgspec raises."""


@functools.lru_cache(maxsize=1_000)
def plain_head(priority: int, task: str) -> bytes:
    """What the envelopes of a task's jobs at this priority begin with, for :func:`fastq._core.plain_envelope`."""
    return encode(Envelope(priority, PLAIN, task, b"", 0))[:-_AFTER_PLAIN_HEAD]


def decode_envelope(data: bytes) -> Envelope:
    """Read an envelope.

    Raises:
        UndecodableJob: the bytes are not an envelope. Whatever msgspec raises (also UnicodeDecodeError and
            RecursionError) ends here.
        NewerJob: they are one that only a newer release can read.
    """
    try:
        envelope = _envelope_decoder.decode(data)
    except Exception as error:
        raise UndecodableJob(f"the envelope cannot be decoded: {type(error).__name__}: {error}") from error
    if envelope.version > VERSION:
        said = f"the envelope has version {envelope.version}, this release reads version {VERSION}"
        raise NewerJob(said, (envelope.extra and envelope.extra.due_at) or envelope.enqueued_at, NEWER_DELAY)
    if envelope.version < 1:
        raise UndecodableJob(f"no envelope has version {envelope.version}")
    return envelope


def delay_of(error: UndecodableJob, now_ms: int, ttl: float) -> int:
    """In how many ms a job that cannot be read here is to be offered again; 0: not any more."""
    if isinstance(error, NewerJob) and abs(now_ms - error.since) >= ttl * 1_000:  # also a time that is yet to come
        return 0
    return error.delay_ms if isinstance(error, GivenBack) else 0


def priority_of(data: bytes) -> int:
    """The priority byte of an encoded envelope, as the scripts read it; NORMAL when it is not one."""
    return data[1] if len(data) > 1 and data[1] <= 10 else JobPriority.NORMAL


# -- ids and options ----------------------------------------------------------------------


def check_id(job_id: str) -> str:
    """The id itself.

    Raises:
        InvalidJobId: see there for what is allowed.
    """
    if not is_id(job_id):
        raise InvalidJobId(f"job_id={job_id!r:.150} is not 1 to 120 characters of A-Z a-z 0-9 _ . : @ / + = -")
    return job_id


def is_id(job_id: str) -> bool:
    """Whether a job can have this id."""
    return isinstance(job_id, str) and _JOB_ID.match(job_id) is not None


def check_priority(priority: int) -> int:
    """The priority as a plain int.

    Raises:
        InvalidOption: it is not a whole number from 0 to 10.
    """
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= 10:
        raise InvalidOption(f"priority={priority!r} is not a whole number from 0 (LOW) to 10 (CRITICAL)")
    return int(priority)


def seconds(name: str, value: object, *, least: float = 0.0) -> float:
    """A duration given as seconds or timedelta.

    Raises:
        InvalidOption: it is neither, or not between ``least`` and 366 days.
    """
    if isinstance(value, dt.timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= YEAR_MS / 1_000:
        raise InvalidOption(f"{name}={value!r} must be a number of seconds from {least:g} to 366 days")
    return float(value)


# -- records --------------------------------------------------------------------------------


def culprits(jobs: Sequence[str], deaths: Sequence[int], max_deliveries: int) -> list[str]:
    """Which jobs a dead worker's end is charged to, of those it may have died of; ``deaths``: workers that each has lost.

    A worker holds one job on its last life at a time: if there is one, it is the culprit, and its neighbours go free.

    >>> culprits(["a", "b"], [0, 1], 3), culprits(["a", "b"], [1, 2], 3)
    (['a', 'b'], ['b'])
    """
    last = [job for job, count in zip(jobs, deaths, strict=True) if count >= max(max_deliveries - 1, 1)]
    return last or list(jobs)


class ErrorInfo(msgspec.Struct, array_like=True):
    """Why a run failed, as text only: error classes are never imported from data."""

    reason: str  # exception | fail | timeout | crash | poison | undecodable | signature | arguments | unknown_task
    type: str
    message: str
    traceback: str
    attempts: int
    failed_at: int
    host: str
    started_at: int = 0  # of the run that failed; 0: there was none, or it is not known


class JobRecord(msgspec.Struct, array_like=True):
    """What is kept of a finished job for ``result_ttl`` seconds."""

    state: str
    task: str
    enqueued_at: int
    started_at: int
    finished_at: int
    attempts: int
    result: msgspec.Raw = msgspec.Raw(b"\xc0")  # msgpack of the returned value
    error: str | None = None


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a dead-letter queue. Times are seconds since the epoch."""

    id: str
    queue: str
    task: str | None  # None: the envelope could not be read
    attempts: int
    failed_at: float
    enqueued_at: float | None
    started_at: float | None = None  # the run that failed; None: there was none, or nobody knows
    reason: str
    error_type: str
    error_message: str
    traceback: str
    host: str
    body: bytes


class WorkerCard(msgspec.Struct, array_like=True):
    """What a worker tells of itself in the info hash of its queues."""

    host: str
    pid: int
    concurrency: int
    started_at: int
    version: str
    lease: int = 0  # ms that its leases last; 0: not said
    tasks: list[str] = []  # names of those that it knows; empty: not said
    state: str = "running"  # or "quiet": takes nothing new until it is told to go on; "draining": never again


class Progress(msgspec.Struct, omit_defaults=True):
    """How far a running job is, as its handler said last.

    Attributes:
        state: "PROGRESS", or the handler's own word (``job.update_state``).
        current, total: of whatever is counted; ``total`` may be unknown.
        message: for people.
        meta: what else the handler tells.
        attempt: the run that said it, 1 for the first.
        at: seconds since the epoch, on Redis's clock.
    """

    state: str = "PROGRESS"
    current: float | None = None
    total: float | None = None
    message: str = ""
    meta: dict[str, Any] = {}
    attempt: int = 1
    at: float = 0.0

    @property
    def percent(self) -> float | None:
        """0 to 100; None when it cannot be known."""
        if self.current is None or not self.total:
            return None
        return max(0.0, min(100.0, 100.0 * self.current / self.total))

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; what ``meta`` holds lies beside the rest."""
        shown: dict[str, Any] = msgspec.to_builtins(self.meta, str_keys=True)
        shown |= {"state": self.state, "message": self.message, "percent": self.percent, "at": self.at}
        return shown | {"current": self.current, "total": self.total, "attempt": self.attempt}


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a job. Times are seconds since the epoch, on Redis's clock.

    ``result`` is what the handler returned as msgpack gives it back (``job.result()`` has the annotated type).
    ``error_type``, ``error_message`` and ``traceback`` are there for a failed job. ``progress`` is what its handler said
    last, up to an hour ago.
    """

    id: str
    queue: str
    state: JobState
    task: str | None = None
    priority: int | None = None
    attempts: int = 0  # runs that ended, failed ones included
    enqueued_at: float | None = None
    due_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    result: Any = None
    last_error: str | None = None
    worker: str | None = None
    limit: str | None = None  # for which a parked job waits
    error_type: str | None = None
    error_message: str | None = None
    traceback: str | None = None
    progress: Progress | None = None

    @property
    def status(self) -> JobState:
        """The same as ``state``: ``status.status == "success"``."""
        return self.state

    @property
    def error(self) -> str | None:
        """The same as ``last_error``: "Type: message" of the last run that failed; why a result was not kept."""
        return self.last_error

    def ready(self) -> bool:
        """Whether the job has ended, well or not."""
        return self.state.final

    def to_dict(self) -> dict[str, Any]:
        """What an HTTP endpoint answers: JSON types only, times in seconds since the epoch, no traceback.

        ``result`` is None until the job has succeeded; bytes in it become base64 text.

        Example::

            status = await app.get_status(job_id)
            if status is None:
                raise HTTPException(404)
            return status.to_dict()
        """
        return {
            "id": self.id,
            "status": self.state.value,
            "queue": self.queue,
            "task": self.task,
            "result": msgspec.to_builtins(self.result, str_keys=True) if self.state is JobState.SUCCESS else None,
            "error": self.last_error,
            "progress": self.progress.to_dict() if self.progress and not self.state.final else None,
            "attempts": self.attempts,
            "priority": self.priority,
            "limit": self.limit,
            "enqueued_at": self.enqueued_at,
            "due_at": self.due_at,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
        }


class Event(msgspec.Struct, frozen=True):
    """One thing that happened to a job.

    Attributes:
        kind: started (a worker has taken it), progress, retried (it will run again: a failure, a snooze), succeeded, failed,
            cancelled.
        job_id, queue: which job.
        at: seconds since the epoch, on Redis's clock.
        progress: with ``progress``, the latest that the handler said.
    """

    kind: str
    job_id: str
    queue: str
    at: float
    progress: Progress | None = None

    @property
    def final(self) -> bool:
        """Whether it is the job's last one."""
        return self.kind in ("succeeded", "failed", "cancelled")

    def to_dict(self) -> dict[str, Any]:
        """JSON types only, for a websocket or server-sent events."""
        shown = {"event": self.kind, "id": self.job_id, "queue": self.queue, "at": self.at}
        return shown | {"progress": self.progress.to_dict() if self.progress else None}


class JobResult(msgspec.Struct, kw_only=True):
    """A shape for what handlers return, for those who have none of their own.

    Example::

        @app.task
        async def charge(order: int) -> fastq.JobResult:
            return fastq.JobResult(success=True, message="charged", details={"order": order})
    """

    success: bool
    message: str = ""
    details: dict[str, Any] | None = None


_record_decoder = msgspec.msgpack.Decoder(JobRecord)
decode_progress = msgspec.msgpack.Decoder(Progress).decode
_error_decoder = msgspec.msgpack.Decoder(ErrorInfo)
decode_record = _record_decoder.decode


def state_of(record: bytes) -> str:
    """The state in which a job has ended; "finished" when nobody knows: its record is gone, or cannot be read."""
    try:
        return decode_record(record).state if record else "finished"
    except Exception:  # noqa: BLE001 - see decode_envelope
        return "finished"


def decode_error(data: bytes) -> ErrorInfo:
    """The error of a dead letter; a placeholder when even that cannot be read (foreign writers)."""
    try:
        return _error_decoder.decode(data)
    except Exception:  # noqa: BLE001 - see decode_envelope: msgspec raises more than its own errors
        return ErrorInfo("unknown", "", "the error record cannot be read", "", 0, 0, "")
