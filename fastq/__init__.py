"""fastq: the job queue that is fast and loses nothing.

Public names only; everything else is an implementation detail. A name is imported when it is first used (PEP 562), so that
a command that does not need the application starts in half the time.

One name a line, in three places: a checker's imports, where a name lives, and what is public.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastq.app import (
        FastQ,
        Middleware,
    )
    from fastq.batch_handle import (
        Batch,
        BatchStatus,
    )
    from fastq.batches import (
        BatchResult,
    )
    from fastq.config import (
        Settings,
    )
    from fastq.consumer import (
        Consumer,
        Message,
    )
    from fastq.context import (
        Depends,
        JobContext,
        State,
        requeue,
    )
    from fastq.dispatch import (
        JobRegistry,
        WorkerRunner,
    )
    from fastq.errors import (
        BatchClosed,
        BodyTooLarge,
        BrokerError,
        BrokerOutOfMemory,
        BrokerReplyError,
        BrokerUnavailable,
        ConfigError,
        DuplicateJob,
        EnqueueError,
        Fail,
        FastQError,
        InvalidArguments,
        InvalidJobId,
        InvalidOption,
        InvalidQueueName,
        JobAlreadyRunning,
        JobCancelled,
        JobCrashed,
        JobFailed,
        JobIdReused,
        JobTimeout,
        JobTimeoutError,
        LeaseLost,
        LeaseTimeout,
        LimitTimeout,
        MissingExtra,
        NotReplicated,
        QueueFull,
        ResultExpired,
        ResultNotKept,
        Retry,
        Snooze,
        SoftTimeLimitExceeded,
        TaskDefinitionError,
        UndecodableJob,
        UnknownBatch,
        UnknownJobError,
        UnknownSchedule,
        UnknownTask,
        WaitTimeout,
    )
    from fastq.handle import (
        Bulk,
        JobHandle,
    )
    from fastq.in_memory import (
        InMemoryScheduler,
    )
    from fastq.job import (
        DeadLetter,
        Event,
        JobPriority,
        JobResult,
        JobState,
        JobStatus,
        Progress,
    )
    from fastq.lease import (
        Lease,
        SyncLease,
        SyncTerm,
        Term,
    )
    from fastq.limiter.api import (
        Limiter,
        LimiterState,
        SyncLimiter,
        acquire_all,
        acquire_all_sync,
    )
    from fastq.limiter.catalogue import (
        configure_limiter,
        configure_store,
        get_or_clone_limiter,
        monitored_acquire,
        rate_limited,
    )
    from fastq.limits import (
        CostTooHigh,
    )
    from fastq.lock import (
        Lock,
    )
    from fastq.once import (
        Unique,
        make_idempotency_key,
    )
    from fastq.registry import (
        Tasks,
    )
    from fastq.retry import (
        Additive,
        Custom,
        Exponential,
        Fixed,
        Linear,
        RetryPolicy,
        Steps,
    )
    from fastq.task import (
        JobOptions,
        Task,
    )
    from fastq.timetable import (
        CronTrigger,
        ScheduleInfo,
        ScheduleOptions,
        ScheduleRun,
        crontab,
    )
    from fastq.workflow import (
        Signature,
        chain,
        chord,
        group,
    )
    from fastq.workflow_handle import (
        Workflow,
        WorkflowStatus,
    )


__version__ = "0.1.0"

_HOMES = {
    "fastq.app": (
        "FastQ",
        "Middleware",
    ),
    "fastq.batch_handle": ("Batch", "BatchStatus"),
    "fastq.batches": ("BatchResult",),
    "fastq.config": ("Settings",),
    "fastq.consumer": (
        "Consumer",
        "Message",
    ),
    "fastq.context": (
        "Depends",
        "JobContext",
        "State",
        "requeue",
    ),
    "fastq.dispatch": (
        "JobRegistry",
        "WorkerRunner",
    ),
    "fastq.errors": (
        "BodyTooLarge",
        "BatchClosed",
        "BrokerError",
        "BrokerOutOfMemory",
        "BrokerReplyError",
        "BrokerUnavailable",
        "ConfigError",
        "DuplicateJob",
        "EnqueueError",
        "Fail",
        "FastQError",
        "InvalidArguments",
        "InvalidJobId",
        "InvalidOption",
        "InvalidQueueName",
        "JobAlreadyRunning",
        "JobCancelled",
        "JobCrashed",
        "JobFailed",
        "JobIdReused",
        "JobTimeout",
        "JobTimeoutError",
        "LeaseLost",
        "LeaseTimeout",
        "LimitTimeout",
        "NotReplicated",
        "MissingExtra",
        "QueueFull",
        "ResultExpired",
        "ResultNotKept",
        "Retry",
        "Snooze",
        "SoftTimeLimitExceeded",
        "TaskDefinitionError",
        "UndecodableJob",
        "UnknownJobError",
        "UnknownBatch",
        "UnknownSchedule",
        "UnknownTask",
        "WaitTimeout",
    ),
    "fastq.in_memory": ("InMemoryScheduler",),
    "fastq.handle": (
        "Bulk",
        "JobHandle",
    ),
    "fastq.job": (
        "DeadLetter",
        "Event",
        "JobPriority",
        "JobResult",
        "JobState",
        "JobStatus",
        "Progress",
    ),
    "fastq.lease": (
        "Lease",
        "SyncLease",
        "SyncTerm",
        "Term",
    ),
    "fastq.limiter.api": (
        "Limiter",
        "LimiterState",
        "SyncLimiter",
        "acquire_all",
        "acquire_all_sync",
    ),
    "fastq.limiter.catalogue": (
        "configure_limiter",
        "configure_store",
        "get_or_clone_limiter",
        "monitored_acquire",
        "rate_limited",
    ),
    "fastq.limits": ("CostTooHigh",),
    "fastq.lock": ("Lock",),
    "fastq.once": (
        "Unique",
        "make_idempotency_key",
    ),
    "fastq.registry": ("Tasks",),
    "fastq.retry": (
        "Additive",
        "Custom",
        "Exponential",
        "Fixed",
        "Linear",
        "RetryPolicy",
        "Steps",
    ),
    "fastq.task": (
        "JobOptions",
        "Task",
    ),
    "fastq.timetable": (
        "CronTrigger",
        "ScheduleInfo",
        "ScheduleOptions",
        "ScheduleRun",
        "crontab",
    ),
    "fastq.workflow": (
        "Signature",
        "chain",
        "chord",
        "group",
    ),
    "fastq.workflow_handle": (
        "Workflow",
        "WorkflowStatus",
    ),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Additive",
    "Batch",
    "BatchClosed",
    "BatchResult",
    "BatchStatus",
    "BodyTooLarge",
    "BrokerError",
    "BrokerOutOfMemory",
    "BrokerReplyError",
    "BrokerUnavailable",
    "Bulk",
    "ConfigError",
    "Consumer",
    "CostTooHigh",
    "CronTrigger",
    "Custom",
    "DeadLetter",
    "Depends",
    "DuplicateJob",
    "EnqueueError",
    "Event",
    "Exponential",
    "Fail",
    "FastQ",
    "FastQError",
    "Fixed",
    "InMemoryScheduler",
    "InvalidArguments",
    "InvalidJobId",
    "InvalidOption",
    "InvalidQueueName",
    "JobAlreadyRunning",
    "JobCancelled",
    "JobContext",
    "JobCrashed",
    "JobFailed",
    "JobHandle",
    "JobIdReused",
    "JobOptions",
    "JobPriority",
    "JobRegistry",
    "JobResult",
    "JobState",
    "JobStatus",
    "JobTimeout",
    "JobTimeoutError",
    "Lease",
    "LeaseLost",
    "LeaseTimeout",
    "LimitTimeout",
    "Limiter",
    "LimiterState",
    "Linear",
    "Lock",
    "Message",
    "Middleware",
    "MissingExtra",
    "NotReplicated",
    "Progress",
    "QueueFull",
    "ResultExpired",
    "ResultNotKept",
    "Retry",
    "RetryPolicy",
    "ScheduleInfo",
    "ScheduleOptions",
    "ScheduleRun",
    "Settings",
    "Signature",
    "Snooze",
    "SoftTimeLimitExceeded",
    "State",
    "Steps",
    "SyncLease",
    "SyncLimiter",
    "SyncTerm",
    "Task",
    "TaskDefinitionError",
    "Tasks",
    "Term",
    "UndecodableJob",
    "Unique",
    "UnknownBatch",
    "UnknownJobError",
    "UnknownSchedule",
    "UnknownTask",
    "WaitTimeout",
    "WorkerRunner",
    "Workflow",
    "WorkflowStatus",
    "acquire_all",
    "acquire_all_sync",
    "chain",
    "chord",
    "configure_limiter",
    "configure_store",
    "crontab",
    "get_or_clone_limiter",
    "group",
    "make_idempotency_key",
    "monitored_acquire",
    "rate_limited",
    "requeue",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'fastq' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
