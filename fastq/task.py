"""A task: a registered function and its options; how a call of it becomes a job; the registry of tasks."""

from __future__ import annotations

import datetime as dt
import functools
import inspect
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Mapping
from typing import (
    Any,
    Concatenate,
    Generic,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    get_args,
    overload,
)

import msgspec

from fastq.arguments import Arguments, check_size
from fastq.broker.commands import NewJob
from fastq.config import check_queue_name
from fastq.context import JobContext, is_injected
from fastq.cron import Cron, Every, MisfirePolicy, Schedule
from fastq.errors import FastQError, InvalidOption, TaskDefinitionError, UnknownTask, did_you_mean
from fastq.handle import Bulk, JobHandle
from fastq.job import (
    TASK_NAME,
    VERSION,
    Envelope,
    Extra,
    JobPriority,
    check_id,
    check_priority,
    encode,
    new_id,
)
from fastq.retry import RetryPolicy, RetryRule, as_policy, attempts_in_all

__all__ = ["AsyncTask", "Call", "JobOptions", "Periodic", "SyncTask", "Task", "TaskOptions", "Tasks"]

P = ParamSpec("P")
R = TypeVar("R")
Seconds = float | dt.timedelta
ErrorTypes = type[BaseException] | tuple[type[BaseException], ...]
Calls = Iterable[tuple[Any, ...] | Mapping[str, Any]] | AsyncIterable[tuple[Any, ...] | Mapping[str, Any]]

YEAR_MS = 366 * 86_400_000


# -- options ----------------------------------------------------------------------------------


class JobOptions(TypedDict, total=False):
    """What may be set for one call; each overrides the task's own.

    ``delay`` seconds or ``at`` (an aware datetime, or seconds since the epoch): when the job is due.
    ``expires`` seconds: if it has not started by then, it is cancelled. ``job_id``: your own id; a second job with
    the id of a live one is not created. ``result_ttl`` seconds that its record is kept, 0 for none.
    """

    queue: str
    priority: int
    delay: Seconds
    at: dt.datetime | float
    expires: Seconds
    job_id: str
    timeout: Seconds
    max_attempts: int
    max_retries: int
    result_ttl: Seconds


_OPTIONS = tuple(JobOptions.__annotations__)


class TaskOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a task is registered with; None means the application's setting. Durations are seconds."""

    queue: str | None = None
    priority: int = JobPriority.NORMAL
    max_attempts: int | None = None
    timeout: float | None = None
    result_ttl: float | None = None
    expires: float | None = None
    retry: RetryRule = RetryRule()


class Call(NamedTuple):
    """A job ready to be sent: to which queue, at which priority."""

    queue: str
    priority: int
    job: NewJob


class Producer(Protocol):
    """Who sends jobs: the application. ``R`` of the handles is for the type checker only."""

    def now_ms(self) -> int:
        """Redis's time as this process knows it."""
        ...

    def max_body(self) -> int:
        """Most bytes of a body."""
        ...

    def default_queue(self) -> str:
        """The queue of tasks that name none."""
        ...

    async def send(self, call: Call) -> JobHandle[Any]:
        """Enqueue one job."""
        ...

    def send_sync(self, call: Call) -> JobHandle[Any]:
        """Enqueue one job from blocking code."""
        ...

    async def send_many(self, calls: Iterable[Call] | AsyncIterable[Call], *, ids: bool) -> Bulk:
        """Enqueue a stream of jobs in bounded chunks."""
        ...

    def send_many_sync(self, calls: Iterable[Call], *, ids: bool) -> Bulk:
        """The same from blocking code."""
        ...


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


def _due_ms(options: JobOptions, now_ms: int) -> int:
    """Milliseconds from now until the job is due; 0 or less: at once."""
    if "delay" in options and "at" in options:
        raise InvalidOption("delay and at were both given: give one")
    if "delay" in options:
        return round(seconds("delay", options["delay"]) * 1_000)
    if "at" not in options:
        return 0
    at = options["at"]
    if isinstance(at, dt.datetime):
        if at.tzinfo is None:
            raise InvalidOption(f"at={at.isoformat()} has no time zone: give an aware datetime")
        at = at.timestamp()
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at * 1_000 <= now_ms + YEAR_MS:
        raise InvalidOption(f"at={at!r} must be an aware datetime or seconds since the epoch, at most 366 days ahead")
    return round(at * 1_000) - now_ms


def check_options(options: Mapping[str, Any]) -> JobOptions:
    """The options of one call, names checked.

    Raises:
        InvalidOption: an unknown name.
    """
    for name in options:
        if name not in _OPTIONS:
            raise InvalidOption(
                f"unknown option {name!r}{did_you_mean(name, _OPTIONS)}; options are {', '.join(_OPTIONS)}"
            )
    return cast(JobOptions, options)


def make_call(
    task: str, body: bytes, defaults: TaskOptions, options: JobOptions, producer: Producer, *, plain_id: str = ""
) -> Call:
    """Put header and body together.

    Raises:
        InvalidOption, InvalidQueueName, InvalidJobId, BodyTooLarge: the call cannot be stored as asked.
    """
    now = producer.now_ms()
    check_size(task, body, producer.max_body())
    queue = options.get("queue") or defaults.queue or producer.default_queue()
    if not options:
        extra = None if defaults.expires is None else Extra(expires_at=now + round(defaults.expires * 1_000))
        envelope = Envelope(defaults.priority, VERSION, task, body, now, 0, extra)
        return Call(queue, defaults.priority, NewJob(plain_id or new_id(), encode(envelope)))
    check_queue_name(queue)
    priority = check_priority(options.get("priority", defaults.priority))
    due = _due_ms(options, now)
    chosen = "job_id" in options
    job_id = check_id(options["job_id"]) if chosen else new_id()
    envelope = Envelope(priority, VERSION, task, body, now, 0, _extra(defaults, options, now, due))
    return Call(queue, priority, NewJob(job_id, encode(envelope), due, chosen=chosen))


def _extra(defaults: TaskOptions, options: JobOptions, now: int, due: int) -> Extra | None:
    expires = options.get("expires", defaults.expires)
    extra = Extra(
        timeout=seconds("timeout", options["timeout"], least=0.001) if "timeout" in options else None,
        expires_at=None if expires is None else now + max(due, 0) + round(seconds("expires", expires) * 1_000),
        result_ttl=seconds("result_ttl", options["result_ttl"]) if "result_ttl" in options else None,
        due_at=now + due if due > 0 else None,
    )
    if "max_attempts" in options or "max_retries" in options:
        extra.max_attempts = attempts_in_all(options.get("max_attempts"), options.get("max_retries"))
    return None if extra == Extra() else extra


# -- tasks ------------------------------------------------------------------------------------


class _Enqueues(Generic[P, R]):
    """The ways to enqueue that a task and a configured task share."""

    name: str

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        raise NotImplementedError

    def _producer(self) -> Producer:
        raise NotImplementedError

    async def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]:
        """Store a job that calls this task with these arguments.

        Calls made within one tick of the event loop share a round trip.

        Raises:
            InvalidArguments: they do not fit the signature, its types, or msgpack; nothing was sent.
            BodyTooLarge: more than ``max_body`` bytes; nothing was sent.
            JobIdReused: the ``job_id`` belongs to a finished job.
            BrokerUnavailable: Redis did not confirm within ``enqueue_timeout``.
            BrokerOutOfMemory, QueueFull: Redis, or this process's buffer, is full.

        Example::

            job = await send_email.enqueue("a@example.org", subject="hello")
        """
        return await self._producer().send(self._call(args, kwargs))

    def enqueue_sync(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]:
        """:meth:`enqueue` from blocking code (Django views, scripts)."""
        return self._producer().send_sync(self._call(args, kwargs))

    async def enqueue_many(self, calls: Calls, *, ids: bool = True) -> Bulk:
        """Enqueue one job per item of any iterable, in chunks of bounded size; memory does not grow with it.

        Args:
            calls: tuples of positional arguments, or mappings of keyword arguments.
            ids: False: do not collect the ids (for millions of jobs).

        Raises:
            As :meth:`enqueue`; the chunks before the faulty item are stored.

        Example::

            await send_email.enqueue_many([("a@example.org",), ("b@example.org", "x")])
        """
        producer = self._producer()
        if isinstance(calls, AsyncIterable):
            return await producer.send_many((self._item(item) async for item in calls), ids=ids)
        return await producer.send_many(map(self._item, calls), ids=ids)

    def enqueue_many_sync(self, calls: Iterable[tuple[Any, ...] | Mapping[str, Any]], *, ids: bool = True) -> Bulk:
        """:meth:`enqueue_many` from blocking code."""
        return self._producer().send_many_sync(map(self._item, calls), ids=ids)

    def _item(self, item: tuple[Any, ...] | Mapping[str, Any]) -> Call:
        if isinstance(item, Mapping):
            return self._call((), item)
        if isinstance(item, tuple | list):
            return self._call(tuple(item), {})
        raise InvalidOption(
            f"enqueue_many of task {self.name!r} got {item!r:.100}: give tuples of arguments or mappings of keywords"
        )


class Task(_Enqueues[P, R]):
    """A registered handler. Calling it runs the function right here, as if it were not decorated.

    Attributes:
        name: unique within the application.
        fn: the function.
        options: what it was registered with.
    """

    is_async = False

    def __init__(self, owner: Tasks, name: str, fn: Callable[..., Any], options: TaskOptions) -> None:
        functools.update_wrapper(cast(Any, self), fn)
        self.owner = owner
        self.name = name
        self.fn = fn
        self.defaults = options

    @functools.cached_property
    def arguments(self) -> Arguments:
        """The signature as a codec; built at first use, when forward references can be resolved."""
        return Arguments(self.name, self.fn, is_injected)

    def _producer(self) -> Producer:
        return self.owner.producer()

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        return make_call(self.name, self.arguments.encode(args, kwargs), self.defaults, {}, self.owner.producer())

    def options(self, **options: Unpack[JobOptions]) -> Configured[P, R]:
        """The same task with options for the calls that follow.

        Raises:
            InvalidOption: an unknown option.

        Example::

            await send_email.options(delay=60, priority=fastq.JobPriority.HIGH).enqueue("a@example.org")
        """
        return Configured(self, check_options(options))

    def __repr__(self) -> str:
        return f"<Task {self.name}>"


class AsyncTask(Task[P, R]):
    """A task whose handler is a coroutine function."""

    is_async = True

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Run the function here."""
        return cast("Coroutine[Any, Any, R]", self.fn(*args, **kwargs))


class SyncTask(Task[P, R]):
    """A task whose handler is a plain function; workers run it in a thread."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here."""
        return cast(R, self.fn(*args, **kwargs))


class Configured(_Enqueues[P, R]):
    """A task with options; see :meth:`Task.options`."""

    __slots__ = ("_options", "name", "task")

    def __init__(self, task: Task[P, R], options: JobOptions) -> None:
        self.task = task
        self.name = task.name
        self._options = options

    def _producer(self) -> Producer:
        return self.task.owner.producer()

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        task = self.task
        body = task.arguments.encode(args, kwargs)
        return make_call(task.name, body, task.defaults, self._options, self._producer())


class Periodic(NamedTuple):
    """A task that a schedule enqueues."""

    name: str
    task: Task[..., Any]
    schedule: Schedule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    misfire: MisfirePolicy


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
        self._bound: Producer | None = None

    def producer(self) -> Producer:
        """Who sends the jobs of these tasks.

        Raises:
            FastQError: no application has included them.
        """
        if self._bound is None:
            raise FastQError("these tasks belong to no application yet: call app.include(tasks) first")
        return self._bound

    def include(self, other: Tasks) -> None:
        """Take the tasks and schedules of another set in.

        Raises:
            TaskDefinitionError: a name is taken.
        """
        for name, task in other.tasks.items():
            self._add(name, task)
        for name, periodic in other.periodic.items():
            self._add_periodic(name, periodic)
        other._bound = self._bound

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
    def task(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]  # see above
    @overload
    def task(self, fn: Callable[Concatenate[JobContext, P], R], /) -> SyncTask[P, R]: ...
    @overload
    def task(self, fn: Callable[P, R], /) -> SyncTask[P, R]: ...
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
        expires: Seconds | None = None,
        result_ttl: Seconds | None = None,
        retry: RetryPolicy | Seconds | list[float] | Callable[[int], float] | None = None,
        retry_on: ErrorTypes = Exception,
        never_on: ErrorTypes = (),
    ) -> _Decorator: ...
    def task(self, fn: Any = None, /, **options: Any) -> Any:  # type: ignore[misc]  # pyright: ignore[reportInconsistentOverload]  # the fifth overload has no fn
        """Register a handler, as a decorator with or without options.

        Coroutine functions run on the worker's event loop, plain functions in threads.

        Args:
            name: unique in the application; default: the function's name.
            queue: where its jobs go; default: the application's first queue.
            priority: 0 to 10, higher runs first.
            max_attempts: runs in all before a job goes to the dead-letter queue (default 5);
                ``max_retries=n`` means ``max_attempts=n+1``.
            timeout: seconds that one run may take (default 300).
            expires: seconds after which a job that has not started is cancelled.
            result_ttl: seconds that the record of a finished job is kept (default 3600), 0 for none.
            retry: a policy, seconds, a list of seconds, or a function of the attempt
                (default: exponential, full jitter, at most 10 minutes).
            retry_on, never_on: exception types that are retried, or never.

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
        if not callable(fn):
            raise TaskDefinitionError(f"@task decorates a function, not {fn!r:.100}")
        name = options.pop("name", None) or getattr(fn, "__name__", type(fn).__name__)
        if not isinstance(name, str) or not TASK_NAME.match(name):
            raise TaskDefinitionError(f"the task name {name!r:.250} is not 1 to 200 characters of A-Z a-z 0-9 _ . : -")
        kind = AsyncTask if _is_async(fn) else SyncTask
        task: Task[..., Any] = kind(self, name, fn, _task_options(name, options))
        self._add(name, task)
        return task

    # -- schedules ------------------------------------------------------------------------------

    def cron(
        self,
        expression: str,
        *,
        tz: str = "UTC",
        name: str | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        misfire: MisfirePolicy = "once",
    ) -> Callable[[Any], Any]:
        """Enqueue the decorated task at the minutes of a cron expression, once per tick whatever number of
        schedulers runs.

        Args:
            expression: five fields (minute hour day month weekday, 0 = Sunday) or ``@hourly`` and the like.
            tz: the zone of its wall time. A time that the spring change skips fires once, right after the gap;
                one that the autumn change repeats fires once.
            name: of the schedule; default: the task's name and the expression.
            args, kwargs: of the job.
            misfire: ticks missed while no scheduler ran: "skip" them, run "once" (the last), or "all" (at most 100).

        Raises:
            TaskDefinitionError: the expression or zone is wrong, or the schedule's name is taken.

        Example::

            @app.cron("30 4 * * 1-5", tz="Europe/Berlin")
            @app.task
            async def report() -> None: ...
        """
        schedule = Cron(expression, tz)
        return self._schedule(schedule, name, expression, args, kwargs, misfire)

    def every(
        self,
        interval: Seconds,
        *,
        name: str | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        misfire: MisfirePolicy = "skip",
    ) -> Callable[[Any], Any]:
        """Enqueue the decorated task every so many seconds (at least 0.1), at multiples of the interval since
        the epoch, so that all schedulers agree. Arguments and errors as for :meth:`cron`.

        Example::

            @app.every(30)
            @app.task
            async def sync_stock() -> None: ...
        """
        every = seconds("interval", interval, least=0.1)
        return self._schedule(Every(every), name, f"every {every:g} s", args, kwargs, misfire)

    def _schedule(
        self,
        schedule: Schedule,
        name: str | None,
        label: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        misfire: MisfirePolicy,
    ) -> Callable[[Any], Any]:
        if misfire not in get_args(MisfirePolicy):
            raise TaskDefinitionError(f"misfire={misfire!r} is not one of {', '.join(get_args(MisfirePolicy))}")

        def decorate(target: Any) -> Any:
            task = target if isinstance(target, Task) else self._register(target, {})
            full = name or f"{task.name} {label}"
            self._add_periodic(full, Periodic(full, task, schedule, args, dict(kwargs or {}), misfire))
            return task

        return decorate

    def _add_periodic(self, name: str, periodic: Periodic) -> None:
        if self.periodic.get(name, periodic) != periodic:
            raise TaskDefinitionError(f"the schedule {name!r} is defined twice: give one a name=")
        self.periodic[name] = periodic


class _Decorator(Protocol):
    """What ``task(...)`` with options returns."""

    @overload
    def __call__(self, fn: Callable[Concatenate[JobContext, P], Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]  # a coroutine function is a function, too
    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]  # a coroutine function is a function, too
    @overload
    def __call__(self, fn: Callable[Concatenate[JobContext, P], R], /) -> SyncTask[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> SyncTask[P, R]: ...


_TASK_OPTIONS = (
    "queue", "priority", "max_attempts", "max_retries", "timeout", "expires", "result_ttl",
    "retry", "retry_on", "never_on",
)  # fmt: skip


def _task_options(name: str, given: dict[str, Any]) -> TaskOptions:
    for option in given:
        if option not in _TASK_OPTIONS:
            raise TaskDefinitionError(
                f"task {name!r} has an unknown option {option!r}{did_you_mean(option, _TASK_OPTIONS)}"
            )
    try:
        return _read_options(given)
    except FastQError as error:
        raise TaskDefinitionError(f"task {name!r}: {error}") from None


def _read_options(given: Mapping[str, Any]) -> TaskOptions:
    def duration(option: str, least: float) -> float | None:
        return None if given.get(option) is None else seconds(option, given[option], least=least)

    attempts = None
    if given.get("max_attempts") is not None or given.get("max_retries") is not None:
        attempts = attempts_in_all(given.get("max_attempts"), given.get("max_retries"))
    rule = RetryRule(
        as_policy(given.get("retry")), retry_on=given.get("retry_on", Exception), never_on=given.get("never_on", ())
    )
    return TaskOptions(
        queue=None if given.get("queue") is None else check_queue_name(given["queue"]),
        priority=check_priority(given.get("priority", JobPriority.NORMAL)),
        max_attempts=attempts,
        timeout=duration("timeout", 0.001),
        result_ttl=duration("result_ttl", 0.0),
        expires=duration("expires", 0.0),
        retry=rule,
    )


def _is_async(fn: Callable[..., Any]) -> bool:
    inner = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004 - looks for `async def __call__`


def _where(fn: Callable[..., Any]) -> str:
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', fn)}"
