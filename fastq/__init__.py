"""fastq: the job queue that is fast and loses nothing.

Public names only; everything else is an implementation detail.
"""

from __future__ import annotations

from fastq.app import FastQ, Middleware
from fastq.config import Settings
from fastq.context import JobContext, State
from fastq.errors import (
    BodyTooLarge,
    BrokerError,
    BrokerOutOfMemory,
    BrokerReplyError,
    BrokerUnavailable,
    ConfigError,
    EnqueueError,
    Fail,
    FastQError,
    InvalidArguments,
    InvalidJobId,
    InvalidOption,
    InvalidQueueName,
    JobIdReused,
    JobTimeout,
    LeaseLost,
    MissingExtra,
    QueueFull,
    Retry,
    Snooze,
    TaskDefinitionError,
    UndecodableJob,
    UnknownTask,
)
from fastq.handle import Bulk, JobHandle
from fastq.job import DeadLetter, JobPriority, JobState, JobStatus
from fastq.registry import Tasks
from fastq.retry import Additive, Custom, Exponential, Fixed, Linear, RetryPolicy, Steps
from fastq.task import JobOptions, Task

__version__ = "0.1.0"

__all__ = [
    "Additive",
    "BodyTooLarge",
    "BrokerError",
    "BrokerOutOfMemory",
    "BrokerReplyError",
    "BrokerUnavailable",
    "Bulk",
    "ConfigError",
    "Custom",
    "DeadLetter",
    "EnqueueError",
    "Exponential",
    "Fail",
    "FastQ",
    "FastQError",
    "Fixed",
    "InvalidArguments",
    "InvalidJobId",
    "InvalidOption",
    "InvalidQueueName",
    "JobContext",
    "JobHandle",
    "JobIdReused",
    "JobOptions",
    "JobPriority",
    "JobState",
    "JobStatus",
    "JobTimeout",
    "LeaseLost",
    "Linear",
    "Middleware",
    "MissingExtra",
    "QueueFull",
    "Retry",
    "RetryPolicy",
    "Settings",
    "Snooze",
    "State",
    "Steps",
    "Task",
    "TaskDefinitionError",
    "Tasks",
    "UndecodableJob",
    "UnknownTask",
]
