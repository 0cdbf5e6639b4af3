"""Every exception of fastq, in one tree, and the exit codes of its processes.

A message names the thing, its value and what to do about it. Passwords never appear in one:
whoever formats a URL uses :func:`mask_url`.
"""

from __future__ import annotations

import difflib
import enum
import re
from collections.abc import Iterable

__all__ = [
    "BatchClosed",
    "BodyTooLarge",
    "BrokerError",
    "BrokerOutOfMemory",
    "BrokerReplyError",
    "BrokerUnavailable",
    "ConfigError",
    "DuplicateJob",
    "EnqueueError",
    "ExitCode",
    "Fail",
    "FastQError",
    "InvalidArguments",
    "InvalidJobId",
    "InvalidOption",
    "InvalidQueueName",
    "JobAlreadyRunning",
    "JobCancelled",
    "JobFailed",
    "JobIdReused",
    "JobTimeout",
    "LeaseLost",
    "LeaseTimeout",
    "LimitTimeout",
    "MissingExtra",
    "QueueFull",
    "ResultExpired",
    "ResultNotKept",
    "Retry",
    "SchemaMismatch",
    "Snooze",
    "TaskDefinitionError",
    "UndecodableJob",
    "UnknownBatch",
    "UnknownTask",
    "WaitTimeout",
]


class ExitCode(enum.IntEnum):
    """What the exit status of every fastq process means."""

    OK = 0
    CRASH = 1
    USAGE = 2  # wrong arguments, or the application could not be imported
    UNREACHABLE = 3  # Redis cannot be reached
    PIDFILE = 4  # the pid file is held by a live process
    UNHEALTHY = 5  # `fastq doctor` found a fault


class FastQError(Exception):
    """The root of every error that fastq raises."""


# -- configuration and definition ----------------------------------------------------------


class ConfigError(FastQError, ValueError):
    """A setting, URL or option has a value that cannot be used."""


class TaskDefinitionError(ConfigError):
    """A task, schedule, lifespan or middleware is declared in a way that cannot work."""


class MissingExtra(FastQError, ImportError):
    """A feature needs a library that the core install does not bring."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an extra: pip install 'fastq-jobs[{extra}]'")


class SchemaMismatch(FastQError):
    """The keys in Redis were written by a release whose layout this one does not know; nothing was touched."""


# -- enqueue: raised where the caller is, before anything is sent -----------------------------


class EnqueueError(FastQError):
    """A job was refused; nothing was stored."""


class UnknownBatch(FastQError, LookupError):
    """No batch has this id, or its ``result_ttl`` is over."""


class UnknownSchedule(FastQError, LookupError):
    """No schedule has this name."""


class UnknownTask(EnqueueError, LookupError):
    """No task of this name is registered."""


class UnknownJobError(UnknownTask):
    """A ``JobRegistry`` has no handler of this name."""


class InvalidArguments(EnqueueError, TypeError):
    """The arguments do not fit the task, or cannot be encoded."""


class InvalidOption(EnqueueError, ValueError):
    """A job option has an unknown name or an impossible value."""


class InvalidQueueName(InvalidOption):
    """A queue name is not ``[A-Za-z0-9_-]{1,64}``."""


class InvalidJobId(InvalidOption):
    """A job id is not 1 to 120 characters of ``A-Z a-z 0-9 _ . : @ / + = -``."""


class BodyTooLarge(EnqueueError, ValueError):
    """The encoded arguments exceed ``max_body`` (1 MiB unless configured)."""


class JobIdReused(EnqueueError):
    """A job of this id has already finished, and its record is still kept."""

    def __init__(self, job_id: str, queue: str, state: str) -> None:
        super().__init__(
            f"job id {job_id!r} of queue {queue!r} was used before and that job ended as {state}; "
            "choose another id, or wait until its record has expired"
        )
        self.job_id = job_id
        self.queue = queue
        self.state = state


class BatchClosed(EnqueueError):
    """The batch that jobs were to be added to takes no more: somebody closed or cancelled it."""


class DuplicateJob(EnqueueError):
    """The task is unique with ``on_duplicate="raise"``, and such a job is there: ``job_id``."""

    def __init__(self, task: str, queue: str, job_id: str) -> None:
        super().__init__(
            f"task {task!r}: job {job_id!r} of queue {queue!r} has the same unique key; nothing was enqueued"
        )
        self.job_id = job_id
        self.queue = queue


# -- broker -----------------------------------------------------------------------------------


class BrokerError(FastQError):
    """Redis did not do what it was asked."""


class BrokerUnavailable(BrokerError, ConnectionError):
    """Redis could not be reached, did not answer in time, or said that it does not serve at the moment.

    ``refused``: it was the latter, so what was asked has certainly not run.
    """

    refused = False


class QueueFull(BrokerError):
    """The queue (``max_pending``), or this process's enqueue buffer, holds as much as it may.

    ``enqueued``: how many jobs of the same ``enqueue_many`` were accepted before.
    """

    enqueued = 0


class NotReplicated(BrokerError):
    """Redis has stored the jobs, but too few of its replicas said in time that they have them: a failover now may lose them.

    ``job_ids``: of these jobs, or that of the workflow or batch. To be sure, enqueue jobs again with the same ids
    (``options(job_id=…)``): no second job is created, and the replicas are waited for again.
    """

    def __init__(self, message: str, job_ids: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.job_ids = job_ids


class BrokerOutOfMemory(QueueFull):
    """Redis has reached ``maxmemory`` and takes no new jobs."""


class BrokerReplyError(BrokerError):
    """Redis answered a command with an error; ``code`` is the error's first word."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message.partition(" ")[0]


# -- raised inside handlers -------------------------------------------------------------------


class Retry(FastQError):
    """Raise it in a handler to run the job again; an attempt is charged.

    ``delay`` is in seconds; ``None`` leaves it to the task's retry policy.

    Example::

        raise fastq.Retry(delay=30)
    """

    def __init__(self, message: str = "", *, delay: float | None = None) -> None:
        super().__init__(message or "retry asked for by the handler")
        self.delay = _delay(delay)


class Snooze(FastQError):
    """Raise it in a handler to run the job again in ``delay`` seconds; no attempt is charged.

    Example::

        raise fastq.Snooze(60)
    """

    def __init__(self, delay: float) -> None:
        super().__init__(f"snoozed for {delay} s")
        self.delay: float = _delay(delay) or 0.0


class Fail(FastQError):
    """Raise it in a handler to send the job to the dead-letter queue, whatever attempts are left.

    Example::

        raise fastq.Fail("card declined")
    """

    def __init__(self, message: str = "failed by the handler") -> None:
        super().__init__(message)


class JobTimeout(FastQError, TimeoutError):
    """A handler ran longer than its ``timeout``; recorded as the error of that attempt."""


class JobTimeoutError(JobTimeout):
    """A handler of a ``JobRegistry`` ran longer than the ``timeout`` of its dispatch."""


class JobCrashed(FastQError):
    """The process of a handler with ``isolation="process"`` ended while it ran: a segfault, ``os._exit``, no memory;
    recorded as the error of that attempt.
    """


class SoftTimeLimitExceeded(FastQError, TimeoutError):
    """Raised inside a handler that runs longer than its ``soft_timeout``. It may catch it, tidy up, and return or raise;
    uncaught, it is a failure of that attempt. In an async handler it is an ``asyncio.CancelledError`` as well.

    Example::

        try:
            await crawl(site)
        except fastq.SoftTimeLimitExceeded:
            await save_progress(site)
            raise
    """

    def __init__(self, message: str = "ran longer than its soft_timeout") -> None:
        super().__init__(message)


class LeaseLost(FastQError):
    """A lease has ended that was needed to go on: of a job (another worker runs it now), a leader or a lock."""


class LeaseTimeout(FastQError, TimeoutError):
    """Somebody else had a leader's or a lock's lease for all of ``timeout`` seconds."""

    def __init__(self, label: str, timeout: float) -> None:
        super().__init__(f"{label}: somebody else had it for all of {timeout:.3g} s")
        self.timeout = timeout


class LimitTimeout(FastQError, TimeoutError):
    """A limiter had no room within ``timeout`` seconds; raised at once when the wait is known to be longer.

    ``limiter_id`` and ``key`` (of a partition, else "") say which one. ``retry_after``: seconds until there can be room, None
    when nobody knows.
    """

    def __init__(
        self, limiter_id: str, timeout: float, *, key: str = "", cost: int = 1, retry_after: float | None = None
    ) -> None:
        name = f"limiter {limiter_id!r}" + (f", key {safe_text(key, 200)!r}" if key else "")
        hint = "" if retry_after is None else f"; the next units are there in {retry_after:.3g} s"
        super().__init__(f"{name}: no room for cost={cost} within {timeout:.3g} s{hint}")
        self.limiter_id = limiter_id
        self.key = key
        self.timeout = timeout
        self.cost = cost
        self.retry_after = retry_after


class JobAlreadyRunning(FastQError):
    """A lock is held by somebody else; ``name`` says which.

    Example::

        try:
            async with app.lock(f"sync:{user_id}", timeout=600):
                await sync(user_id)
        except fastq.JobAlreadyRunning:
            return {"status": "skipped", "reason": "already_running"}
    """

    def __init__(self, name: str, waited: float = 0.0) -> None:
        super().__init__(
            f"the lock {name!r} is held by somebody else" + (f", still after {waited:g} s" if waited else "")
        )
        self.name = name


class UndecodableJob(FastQError, ValueError):
    """The stored bytes of a job, or of its arguments, cannot be read."""


class BadSignature(UndecodableJob):
    """The job is not signed by anybody who has a key; or the key is not known here any more."""


class GivenBack(UndecodableJob):
    """The job is not for now: ``delay_ms`` until it is to be offered again."""

    def __init__(self, message: str, delay_ms: int) -> None:
        super().__init__(message)
        self.delay_ms = delay_ms


class NewerJob(GivenBack):
    """The job needs a newer release than this one; ``since``: when it became ready, in ms of Redis's clock."""

    def __init__(self, message: str, since: int, delay_ms: int) -> None:
        super().__init__(message, delay_ms)
        self.since = since


# -- raised where a result is waited for --------------------------------------------------------


class JobFailed(FastQError):
    """The job whose result was asked for has failed for good; what is known of its error is text, never a class.

    Attributes:
        job_id: the job.
        type_name, message, traceback: of the error of its last run.
        attempts: runs that it had.
    """

    def __init__(self, job_id: str, type_name: str, message: str, traceback: str = "", attempts: int = 0) -> None:
        said = f"{type_name}: {message}" if type_name else message
        super().__init__(f"job {job_id!r} failed after {attempts} attempts: {said}")
        self.job_id = job_id
        self.type_name = type_name
        self.message = message
        self.traceback = traceback
        self.attempts = attempts


class JobCancelled(FastQError):
    """The job whose result was asked for was cancelled, or had expired before it started."""


class ResultExpired(FastQError, LookupError):
    """The job has left no trace: ``result_ttl`` is over, or 0; or there never was a job of this id."""


class ResultNotKept(FastQError, ValueError):
    """The job has succeeded, and what it returned could not be kept: too large, or no msgpack."""


class WaitTimeout(FastQError, TimeoutError):
    """The job had not ended when the time to wait for it was over. The job goes on."""


def _delay(delay: float | None) -> float | None:
    if delay is not None and not 0 <= delay <= 366 * 86_400:
        raise InvalidOption(f"delay={delay!r} must be between 0 seconds and 366 days")
    return delay


# -- text for people --------------------------------------------------------------------------

_PASSWORD = re.compile(r"\A([\w+.-]*://|(?![\w+.-]*://))([^:]*):.*@", re.DOTALL)


_SECRET = re.compile(r"(?i)((?:password|passwd|pwd|token|secret)=)[^&\s]*")


def mask_url(url: str) -> str:
    """The URL with its password replaced by ``***``.

    The password is taken to reach to the last ``@``: one that should have been percent-encoded (``/``, ``#``, ``@``) is
    not shown either, and neither is one in a URL without a scheme.

    >>> mask_url("redis://app:secret@db:6379/0")
    'redis://app:***@db:6379/0'
    """
    url = _SECRET.sub(r"\1***", url)
    return _PASSWORD.sub(r"\1\2:***@", url)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` - did you mean 'x'?`` when a known name is near, else nothing.

    >>> did_you_mean("proirity", ["priority", "queue"])
    " - did you mean 'priority'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" - did you mean {near[0]!r}?" if near else ""


def safe_text(text: str, limit: int = 1_000) -> str:
    """``text`` on one line: control characters escaped, cut to ``limit`` characters.

    Everything that a job brings along (names, errors) goes through here before a log, a terminal or a page.
    """
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
