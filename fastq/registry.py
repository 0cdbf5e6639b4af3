"""The registry: tasks and schedules under their names, and the decorators that fill it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Literal,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypeVar,
    Unpack,
    overload,
)

from fastq.context import JobContext, takes_state
from fastq.cron import Cron, Every, Schedule
from fastq.depends import resolved
from fastq.errors import ConfigError, FastQError, InvalidOption, TaskDefinitionError, UnknownTask, did_you_mean
from fastq.job import TASK_NAME, JobPriority, Seconds, check_priority, seconds
from fastq.limiter.options import JOB_LIMITS, JobLimits, read_job_limits
from fastq.many import MOST
from fastq.once import IDEMPOTENT_TTL, Unique, as_unique, unique_key
from fastq.partitions import check_count
from fastq.retry import RetryPolicy, RetryRule, as_policy, attempts_in_all
from fastq.task import AsyncTask, BatchTask, Producer, SyncTask, Task, TaskOptions, UniqueOption
from fastq.timetable import CronTrigger, ScheduleOptions, Written, definition, read_table
from fastq.values import check_queue_name, parse_size

if TYPE_CHECKING:
    from fastq.limiter.api import Limiter

__all__ = ["Periodic", "Tasks"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
ErrorTypes = type[BaseException] | tuple[type[BaseException], ...]


class Periodic(NamedTuple):
    """A task that a schedule enqueues."""

    name: str
    task: Task[..., Any]
    schedule: Schedule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: Mapping[str, Any]


class Tasks:
    """A set of tasks. The application is one; a library makes its own and lets applications include it.

    Example (a library)::

        tasks = fastq.Tasks()

        @tasks.task
        async def render(page: str) -> bytes: ...

    and in its ``pyproject.toml``::

        [project.entry-points."fastq.tasks"]
        renderer = "renderer.jobs:tasks"
    """

    def __init__(self) -> None:
        self.tasks: dict[str, Task[..., Any]] = {}
        self.periodic: dict[str, Periodic] = {}
        self.queue_limits: dict[str, JobLimits] = {}
        self.bounds: dict[str, tuple[int, str]] = {}  # queue -> max_pending, when_full
        self.split: dict[str, int] = {}  # queue -> partitions, as the code says
        self.written: dict[str, Written] = {}
        self.attached: Producer | None = None

    def producer(self) -> Producer:
        """Who sends the jobs of these tasks.

        Raises:
            FastQError: no application has included them.
        """
        if self.attached is None:
            raise FastQError("these tasks belong to no application yet: call app.include(tasks) first")
        return self.attached

    def include(self, other: Tasks) -> None:
        """Take the tasks and schedules of another set in.

        Raises:
            TaskDefinitionError: a name is taken.
        """
        for name, task in other.tasks.items():
            self._add(name, task)
        for name, periodic in other.periodic.items():
            self._add_periodic(name, periodic)
        for name, limits in other.queue_limits.items():
            if self.queue_limits.setdefault(name, limits) != limits:
                raise TaskDefinitionError(f"queue {name!r} was given other limits before: {self.queue_limits[name]}")
        for name, bound in other.bounds.items():
            self._bind_queue(name, bound)
        for name, count in other.split.items():
            self._split_queue(name, count)
        self.written.update(other.written)
        other.attached = self.attached

    def _add(self, name: str, task: Task[..., Any]) -> None:
        known = self.tasks.get(name)
        if known is not None and known.fn is not task.fn:
            raise TaskDefinitionError(
                f"task {name!r} is defined twice, by {_where(known.fn)} and {_where(task.fn)}: give one a name="
            )
        self.tasks[name] = task

    def find(self, name: str) -> Task[..., Any]:
        """The task of this name.

        Raises:
            UnknownTask: there is none.
        """
        try:
            return self.tasks[name]
        except KeyError:
            raise UnknownTask(f"no task is named {name!r}{did_you_mean(name, self.tasks)}") from None

    # -- registration -----------------------------------------------------------------------

    # A coroutine function is a function, too: the overloads overlap, and the first that fits is meant.
    @overload
    def task(self, fn: Callable[Concatenate[JobContext, P], Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]  # see above
    @overload
    def task(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]  # see above
    @overload
    def task(self, fn: Callable[Concatenate[JobContext, P], R], /) -> SyncTask[P, R]: ...
    @overload
    def task(self, fn: Callable[P, R], /) -> SyncTask[P, R]: ...
    @overload
    def task(self, *, batch: int, batch_wait: Seconds = 0.2, **options: Any) -> _BatchDecorator: ...
    @overload
    def task(
        self,
        *,
        name: str | None = None,
        queue: str | None = None,
        priority: int = JobPriority.NORMAL,
        max_attempts: int | None = None,
        max_retries: int | None = None,
        timeout: Seconds | None = None,
        soft_timeout: Seconds | None = None,
        isolation: Literal["process"] | None = None,
        max_memory: int | str | None = None,
        expires: Seconds | None = None,
        result_ttl: Seconds | None = None,
        retry: RetryPolicy | Seconds | list[float] | Callable[[int], float] | None = None,
        retry_on: ErrorTypes = Exception,
        never_on: ErrorTypes = (),
        unique: UniqueOption = None,
        idempotent: Seconds | bool | None = None,
        rate_limit: str | None = None,
        concurrency: int | None = None,
        limits: Sequence[str | Limiter] = (),
        limit_key: str | Callable[..., str] | None = None,
        cost: int | Callable[..., int] = 1,
    ) -> _Decorator: ...
    def task(self, fn: Any = None, /, **options: Any) -> Any:  # type: ignore[misc]  # pyright: ignore[reportInconsistentOverload]  # the fifth overload has no fn
        """Register a handler, as a decorator with or without options.

        Coroutine functions run on the worker's event loop, plain functions in threads.

        Args:
            name: unique in the application; default: the function's name.
            queue: where its jobs go; default: the setting ``default_queue``.
            priority: 0 to 10, higher runs first.
            max_attempts: runs in all before a job goes to the dead-letter queue (default 5);
                ``max_retries=n`` means ``max_attempts=n+1``.
            timeout: seconds that one run may take (default 300).
            soft_timeout: seconds after which ``SoftTimeLimitExceeded`` is raised inside the handler, which may tidy up until
                ``timeout`` (default: never). See docs/time_limits.md.
            isolation: ``"process"``: the handler, async or not, runs in a process of its own; a crash, ``timeout`` or
                ``max_memory`` ends that job only. See docs/time_limits.md.
            max_memory: bytes, or text such as ``"512MB"``, that this process may hold; needs ``isolation="process"``.
            expires: seconds after which a job that has not started is cancelled.
            result_ttl: seconds that the record of a finished job is kept (default 3600), 0 for none.
            retry: a policy, seconds, a list of seconds, or a function of the attempt
                (default: exponential, full jitter, at most 10 minutes).
            retry_on, never_on: exception types that are retried, or never.
            unique: when two jobs count as one: ``"until_executed"``, ``"until_started"``, seconds, or
                :class:`fastq.Unique`; see docs/once.md.
            idempotent: seconds for which the same arguments (or the same ``idempotency_key``) name one job, which is run
                once and whose result all callers get; True: a day.
            rate_limit: "100/s", "10/m", "5000/h", "100/s burst 200": how many runs may begin, in the whole fleet.
            concurrency: how many may run at once, in the whole fleet.
            limits: limiters, or their names, that each run has to pass, too; "api:{user_id}" is the partition of
                ``api`` by an argument.
            limit_key: "tenant:{tenant_id}", or a function of the job's arguments: rate_limit and concurrency hold for
                each value alone.
            cost: units that a run takes of each rate, or a function of the job's arguments (default 1).
            batch: most jobs that the handler takes at once, 1 to 10,000: it is called with a list of what each was enqueued
                with, and returns None, or a list with the result or the exception of each; see docs/batches.md.
            batch_wait: seconds that the first job of a list waits for others (default 0.2).

        A job that its limits do not let run now waits in the worker without a slot, or aside in Redis; no attempt is
        charged and no other job waits behind it. See docs/limits.md.

        Raises:
            TaskDefinitionError: an option or the name cannot be used, or the name is taken.

        Example::

            @app.task(queue="emails", max_attempts=5, timeout=30.0)
            async def send_email(to: str, subject: str = "hi") -> str: ...
        """
        if fn is not None:
            return self._register(fn, options)
        return lambda fn: self._register(fn, options)

    def _register(self, fn: Callable[..., Any], options: dict[str, Any]) -> Task[..., Any]:
        if isinstance(fn, Task):
            raise TaskDefinitionError(
                f"task {fn.name!r} is a task already: put @app.task below @app.cron and @app.every"
            )
        if not callable(fn) or inspect.isclass(fn):
            raise TaskDefinitionError(f"@task decorates a function, not {fn!r:.100}")
        if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            raise TaskDefinitionError(
                f"task {_where(fn)} is a generator: nobody would run its body; return a list instead"
            )
        name = options.pop("name", None) or getattr(fn, "__name__", type(fn).__name__)
        if not isinstance(name, str) or not TASK_NAME.match(name):
            raise TaskDefinitionError(f"the task name {name!r:.250} is not 1 to 200 characters of A-Z a-z 0-9 _ . : -")
        kind: type[Task[..., Any]] = AsyncTask if _is_async(fn) else SyncTask
        if options.get("batch") is None:
            fn = resolved(name, fn, is_async=kind is AsyncTask)
        else:
            kind = BatchTask
        running = _while_running(name, options)
        task: Task[..., Any] = kind(self, name, fn, _task_options(name, fn, options))
        if running is not None:
            running.task = task
        if task.defaults.isolation and (taker := takes_state(inspect.signature(fn).parameters.values())):
            raise TaskDefinitionError(
                f"task {name!r}: {taker}=State() needs the lifespan, which runs in the worker and not in the process of "
                "isolation='process': make there what the handler needs"
            )
        self._add(name, task)
        return task

    # -- queues -----------------------------------------------------------------------------

    def queue(
        self,
        name: str,
        *,
        rate_limit: str | None = None,
        concurrency: int | None = None,
        limits: Sequence[str | Limiter] = (),
        max_pending: int | None = None,
        when_full: Literal["raise", "wait", "drop_oldest"] = "raise",
        partitions: int | None = None,
    ) -> None:
        """Set what holds for all jobs of a queue, whatever their task.

        Args:
            rate_limit: "100/m", "50/s burst 200": how many of its jobs may begin, in the whole fleet.
            concurrency: how many may run at once, in the whole fleet.
            limits: limiters, or their names, that each of its jobs has to pass, too.
            max_pending: how many pending jobs there may be; those that are scheduled, parked or running do not count.
                It holds for what this application's code enqueues to be run at once; retries, schedules and replays come in.
            when_full: what becomes of one more: ``"raise"``: ``QueueFull``; ``"wait"``: the caller waits for room, and
                gets ``QueueFull`` after the setting ``enqueue_timeout``; ``"drop_oldest"``: the oldest pending job of the
                lowest priority is cancelled in its favour, unless all have a higher priority than it: ``QueueFull``.
            partitions: up to 64: its jobs are spread over so many parts, each with an order of its own, which lie on different
                masters of a cluster; ``max_pending`` is shared out among them. The setting ``partitions`` comes before this.
                See docs/high_availability.md for when to, and how the number is changed.

        Raises:
            TaskDefinitionError: an option makes no sense, or the queue was given others before.
            InvalidQueueName: it cannot be the name of a queue.

        Example::

            app.queue("emails", rate_limit="100/m", concurrency=20, max_pending=10_000)
        """
        check_queue_name(name)
        given = {"rate_limit": rate_limit, "concurrency": concurrency, "limits": limits or None}
        try:
            options = read_job_limits(given)
        except ConfigError as error:
            raise TaskDefinitionError(f"queue {name!r}: {error}") from None
        if options is not None and self.queue_limits.setdefault(name, options) != options:
            raise TaskDefinitionError(f"queue {name!r} was given other limits before: {self.queue_limits[name]}")
        if when_full not in _WHEN_FULL:
            raise TaskDefinitionError(
                f"queue {name!r}: when_full={when_full!r:.100} is none of {', '.join(_WHEN_FULL)}"
            )
        if max_pending is None and when_full != "raise":
            raise TaskDefinitionError(f"queue {name!r}: when_full={when_full!r} needs max_pending")
        if max_pending is not None:
            if (
                isinstance(max_pending, bool)
                or not isinstance(max_pending, int)
                or not 1 <= max_pending <= _MOST_PENDING
            ):
                raise TaskDefinitionError(
                    f"queue {name!r}: max_pending={max_pending!r:.100} must be a whole number from 1 to {_MOST_PENDING:,}"
                )
            self._bind_queue(name, (max_pending, when_full))
        if partitions is not None:
            try:
                self._split_queue(name, check_count(name, partitions))
            except ConfigError as error:
                raise TaskDefinitionError(str(error)) from None

    def _split_queue(self, name: str, count: int) -> None:
        if self.split.setdefault(name, count) != count:
            raise TaskDefinitionError(f"queue {name!r} was given {self.split[name]} partitions before, and now {count}")

    def _bind_queue(self, name: str, bound: tuple[int, str]) -> None:
        if self.bounds.setdefault(name, bound) != bound:
            raise TaskDefinitionError(f"queue {name!r} was given another max_pending before: {self.bounds[name]}")

    # -- schedules ------------------------------------------------------------------------------

    def cron(
        self,
        expression: str,
        *,
        tz: str = "UTC",
        name: str | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[ScheduleOptions],
    ) -> Callable[[Any], Any]:
        """Enqueue the decorated task at the minutes of a cron expression, once per tick whatever number of
        schedulers runs.

        Args:
            expression: five fields (minute hour day month weekday, 0 = Sunday) or ``@hourly`` and the like.
            tz: the zone of its wall time. A time that the spring change skips fires once, right after the gap;
                one that the autumn change repeats fires once.
            name: of the schedule; default: the task's name and the expression.
            args, kwargs: of the job.
            options: misfire, overlap, jitter and others; see :class:`fastq.ScheduleOptions`.

        Raises:
            TaskDefinitionError: the expression or zone is wrong, or the schedule's name is taken.

        Example::

            @app.cron("30 4 * * 1-5", tz="Europe/Berlin")
            @app.task
            async def report() -> None: ...
        """
        schedule = Cron(expression, tz)
        return self._schedule(schedule, name, expression, args, kwargs, options)

    def every(
        self,
        interval: Seconds,
        *,
        name: str | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[ScheduleOptions],
    ) -> Callable[[Any], Any]:
        """Enqueue the decorated task every so many seconds (at least 0.1), at multiples of the interval since
        the epoch, so that all schedulers agree. Arguments and errors as for :meth:`cron`.

        Example::

            @app.every(30)
            @app.task
            async def sync_stock() -> None: ...
        """
        every = seconds("interval", interval, least=0.1)
        return self._schedule(Every(every), name, f"every {every:g} s", args, kwargs, options)

    def scheduled_job(
        self,
        trigger: Literal["cron", "interval"] | Schedule,
        *,
        id: str | None = None,  # noqa: A002 - APScheduler's word
        seconds: float = 0,
        minutes: float = 0,
        hours: float = 0,
        days: float = 0,
        **fields: Any,
    ) -> Callable[[Any], Any]:
        """APScheduler's decorator: ``"interval"`` with its length, ``"cron"`` with the fields of
        :func:`fastq.CronTrigger`, or a schedule object; policies as for :meth:`cron`.

        Raises:
            TaskDefinitionError: as :meth:`cron`.

        Example::

            @app.scheduled_job("cron", hour=2, minute=0, id="cleanup", misfire_grace_time=300)
            async def cleanup() -> None: ...
        """
        options = {key: fields.pop(key) for key in ScheduleOptions.__annotations__ if key in fields}
        if trigger == "cron":
            schedule: Schedule = CronTrigger(**fields)
        elif fields:
            raise TaskDefinitionError(f"scheduled_job got unknown options: {', '.join(fields)}")
        elif trigger == "interval":
            schedule = Every(seconds + 60 * minutes + 3_600 * hours + 86_400 * days)
        else:
            schedule = trigger
        return self._schedule(schedule, id, schedule.explain(), (), None, options)

    def beat_schedule(self, table: Mapping[str, Mapping[str, Any]]) -> None:
        """Take schedules as Celery's ``beat_schedule`` holds them: name -> ``task``, ``schedule`` (``fastq.crontab(…)``,
        seconds, a ``timedelta``), ``args``, ``kwargs``, ``options``. Tasks are looked up when a scheduler starts.

        Raises:
            ConfigError: an entry that cannot be read. TaskDefinitionError: a name is taken.

        Example::

            app.beat_schedule({"sync": {"task": "tasks.sync_inventory", "schedule": 300.0}})
        """
        for entry in read_table(table, "beat_schedule"):
            if entry.name in self.written or entry.name in self.periodic:
                raise TaskDefinitionError(f"the schedule {entry.name!r} is defined twice")
            self.written[entry.name] = entry

    def _schedule(
        self,
        schedule: Schedule,
        name: str | None,
        label: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> Callable[[Any], Any]:
        try:
            definition(name or label, "", b"", schedule, options)
        except InvalidOption as error:
            raise TaskDefinitionError(str(error)) from None

        def decorate(target: Any) -> Any:
            task = target if isinstance(target, Task) else self._register(target, {})
            full = name or f"{task.name} {label}"
            self._add_periodic(full, Periodic(full, task, schedule, args, dict(kwargs or {}), options))
            return task

        return decorate

    def _add_periodic(self, name: str, periodic: Periodic) -> None:
        if self.periodic.get(name, periodic) != periodic:
            raise TaskDefinitionError(f"the schedule {name!r} is defined twice: give one a name=")
        self.periodic[name] = periodic


_WHEN_FULL = ("raise", "wait", "drop_oldest")
_MOST_PENDING = 10**9


class _Decorator(Protocol):
    """What ``task(...)`` with options returns."""

    @overload
    def __call__(self, fn: Callable[Concatenate[JobContext, P], Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]  # a coroutine function is a function, too
    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]  # a coroutine function is a function, too
    @overload
    def __call__(self, fn: Callable[Concatenate[JobContext, P], R], /) -> SyncTask[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> SyncTask[P, R]: ...


class _BatchDecorator(Protocol):
    """What ``task(batch=…)`` returns."""

    def __call__(self, fn: Callable[Concatenate[list[T], ...], Any], /) -> BatchTask[[T], Any]: ...


class _RunningKey:
    """The partition of a task's limiter for calls that may not run at the same time."""

    task: Task[..., Any]  # once it is made

    def __init__(self, rule: Unique) -> None:
        self.rule = rule

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return unique_key(self.task.name, self.rule, self.task.arguments.named(args, kwargs)).rpartition(":")[2]


def _while_running(name: str, options: dict[str, Any]) -> _RunningKey | None:
    """Turn ``unique="while_running"`` into what it means: a limit of one run at a time for each key."""
    given = options.get("unique")
    if given != "while_running" and not (isinstance(given, Unique) and given.until == "while_running"):
        return None
    if options.get("concurrency") is not None or options.get("limit_key") is not None:
        raise TaskDefinitionError(f"task {name!r}: while_running is concurrency=1 with a limit_key: give one of both")
    key = _RunningKey(given if isinstance(given, Unique) else Unique("while_running"))
    options |= {"unique": None, "concurrency": 1, "limit_key": key}
    return key


_TASK_OPTIONS = (
    "queue", "priority", "max_attempts", "max_retries", "timeout", "soft_timeout", "isolation", "max_memory", "expires", "result_ttl",
    "retry", "retry_on", "never_on", "unique", "idempotent", "batch", "batch_wait", *JOB_LIMITS,
)  # fmt: skip


def _task_options(name: str, fn: Callable[..., Any], given: dict[str, Any]) -> TaskOptions:
    for option in given:
        if option not in _TASK_OPTIONS:
            raise TaskDefinitionError(
                f"task {name!r} has an unknown option {option!r}{did_you_mean(option, _TASK_OPTIONS)}"
            )
    try:
        return _read_options(fn, given)
    except FastQError as error:
        raise TaskDefinitionError(f"task {name!r}: {error}") from None


def _read_options(fn: Callable[..., Any], given: Mapping[str, Any]) -> TaskOptions:
    def duration(option: str, least: float) -> float | None:
        return None if given.get(option) is None else seconds(option, given[option], least=least)

    attempts = None
    if given.get("max_attempts") is not None or given.get("max_retries") is not None:
        attempts = attempts_in_all(given.get("max_attempts"), given.get("max_retries"))
    rule = RetryRule(
        as_policy(given.get("retry")), retry_on=given.get("retry_on", Exception), never_on=given.get("never_on", ())
    )
    idempotent = given.get("idempotent")
    if idempotent is not None and not isinstance(idempotent, bool):
        idempotent = duration("idempotent", 1.0)
    elif idempotent is not None:
        idempotent = IDEMPOTENT_TTL if idempotent else None
    if given.get("unique") and idempotent:
        raise InvalidOption("unique and idempotent were both asked for: choose one")
    signature, unique = inspect.signature(fn), as_unique(given.get("unique"))
    for one in (unique, getattr(given.get("limit_key"), "rule", None)):  # that of while_running
        if isinstance(one, Unique) and given.get("batch") is None:
            one.check(signature)
    return TaskOptions(
        queue=None if given.get("queue") is None else check_queue_name(given["queue"]),
        priority=check_priority(given.get("priority", JobPriority.NORMAL)),
        max_attempts=attempts,
        timeout=duration("timeout", 0.001),
        soft_timeout=duration("soft_timeout", 0.0),
        isolation=_isolation(given),
        max_memory=0 if given.get("max_memory") is None else parse_size(given["max_memory"]),
        result_ttl=duration("result_ttl", 0.0),
        expires=duration("expires", 0.0),
        retry=rule,
        unique=unique,
        idempotent=idempotent,
        limits=read_job_limits(given, signature),
        batch=_batch(given),
        batch_wait=(seconds("batch_wait", given.get("batch_wait", 0.2)) if given.get("batch") is not None else 0.0),
    )


def _batch(given: Mapping[str, Any]) -> int:
    batch = given.get("batch")
    if batch is None:
        if given.get("batch_wait") is not None:
            raise InvalidOption("batch_wait needs batch=: how many jobs the handler takes at once")
        return 0
    if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= MOST:
        raise InvalidOption(f"batch={batch!r:.100} must be a whole number from 1 to {MOST:,}")
    for other in ("isolation", "soft_timeout"):
        if given.get(other):
            raise InvalidOption(
                f"batch and {other} were both asked for: a handler that takes many jobs at once has none"
            )
    return batch


def _isolation(given: Mapping[str, Any]) -> str | None:
    isolation: str | None = given.get("isolation")
    if isolation not in (None, "process"):
        raise InvalidOption(f"isolation={isolation!r:.100} must be 'process', or not be given")
    if isolation is None and given.get("max_memory") is not None:
        raise InvalidOption("max_memory needs isolation='process': a limit for the whole worker is its setting max_rss")
    return isolation


def _is_async(fn: Callable[..., Any]) -> bool:
    inner = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004 - looks for `async def __call__`


def _where(fn: Callable[..., Any]) -> str:
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', fn)}"
