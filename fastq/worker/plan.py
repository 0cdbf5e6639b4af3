"""What running a task's jobs needs, looked up once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastq.app import FastQ
from fastq.broker.keys import bucket_of
from fastq.errors import LimitTimeout
from fastq.job import encode
from fastq.task import Task

if TYPE_CHECKING:
    from fastq.worker.gathering import Gatherer

__all__ = ["Plan", "slots"]

log = logging.getLogger("fastq.worker")


class Plan:
    """What running a task's jobs needs, looked up once."""

    __slots__ = (
        "bucket",
        "bucket_until",
        "decoders",
        "direct",
        "doors",
        "encode",
        "fn",
        "gatherer",
        "hands_back",
        "injected",
        "is_async",
        "isolated",
        "keeps",
        "least",
        "max_attempts",
        "max_memory",
        "most",
        "most_kept",
        "plain",
        "result_ttl",
        "rule",
        "series",
        "soft_timeout",
        "task",
        "threaded",
        "timeout",
        "traceless",
    )

    def __init__(self, task: Task[..., Any], app: FastQ, series: dict[str, int]) -> None:
        settings, defaults = app.settings, task.defaults
        self.task = task
        self.max_memory = defaults.max_memory
        self.injected = bool(task.arguments.injected)
        self.rule = defaults.retry
        # A limiter without room is no failure, unless the task has a word on such errors itself.
        own_word = (*self.rule.retry_on, *self.rule.never_on)
        self.hands_back = not any(kind is not Exception and issubclass(LimitTimeout, kind) for kind in own_word)
        self.timeout = settings.default_timeout if defaults.timeout is None else defaults.timeout
        limit = defaults.soft_timeout
        self.soft_timeout = settings.default_soft_timeout if limit is None else limit
        self.gatherer: Gatherer | None = None  # of a task whose handler takes many jobs at once
        if defaults.batch:
            self.soft_timeout = 0.0
        self.max_attempts = defaults.max_attempts or settings.default_max_attempts
        self.result_ttl = settings.result_ttl if defaults.result_ttl is None else defaults.result_ttl
        self.series = series
        # What the compiled Runner needs of it, beside `plain` and `threaded`.
        self.fn = task.fn
        self.doors: dict[
            str, tuple[Any, int]
        ] = {}  # queue -> the door and the cost of a task with one limit for all jobs
        self.decoders, self.least, self.most = task.arguments.decoders
        quiet = not log.isEnabledFor(logging.DEBUG)  # a line per job is for development
        self.traceless = self.result_ttl == 0 and quiet
        self.keeps = self.result_ttl > 0 and quiet
        self.encode = encode
        self.most_kept = settings.max_body  # of the whole record; what is near it is judged by its result alone
        self.bucket: tuple[str, int] = ("", 0)
        self.bucket_until = 0

        self.choose(app, isolated=defaults.isolation is not None)

    def choose(self, app: FastQ, *, isolated: bool) -> None:
        """How its handler is called."""
        task = self.task
        self.isolated = isolated
        self.is_async = task.is_async and not isolated  # whether it runs on this event loop
        bare = not (isolated or task.defaults.batch)
        simple = not self.injected and not self.soft_timeout
        self.direct = bare and self.is_async and simple  # nothing between it and its call
        self.threaded = bare and not self.is_async and not app.middlewares  # in a thread, and nothing is awaited
        self.plain = not app.middlewares and (self.direct or (self.threaded and simple))

    def begin_bucket(self, now_ms: int) -> None:
        """Take the bucket of records that is written at this time."""
        self.bucket = bucket_of(self.result_ttl, now_ms)
        self.bucket_until = self.bucket[1] - max(1_000, round(self.result_ttl * 1_000))


def slots(app: FastQ) -> int:
    """How many jobs run at once: where every handler needs a thread, more jobs than threads would only wait here."""
    settings = app.settings
    threads_only = bool(app.tasks) and not any(task.is_async or task.many for task in app.tasks.values())
    return min(settings.concurrency, settings.threads) if threads_only else settings.concurrency
