"""A task: a registered function and its options, and how a call of it becomes a job."""

from __future__ import annotations

import datetime as dt
import functools
import inspect
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import (
    Any,
    Generic,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
)

import msgspec

from fastq.arguments import Arguments, Returned, check_size
from fastq.broker.commands import NewJob, Once
from fastq.broker.tags import check_tags
from fastq.config import Settings
from fastq.context import is_injected
from fastq.errors import InvalidOption, did_you_mean
from fastq.handle import Bulk, JobHandle
from fastq.job import (
    PLAIN,
    YEAR_MS,
    Envelope,
    Extra,
    JobPriority,
    PlainCalls,
    Seconds,
    check_id,
    check_priority,
    encode,
    new_id,
    plain_envelope,
    plain_head,
    seconds,
)
from fastq.many import Many
from fastq.once import IDEMPOTENT_TTL, Unique, Until, as_unique, key_of, unique_key
from fastq.partitions import id_for, queue_of
from fastq.retry import RetryRule, attempts_in_all
from fastq.values import Durability, check_queue_name, is_replicated
from fastq.workflow import Signature
from fastq.workflow_handle import Home

__all__ = ["AsyncTask", "BatchTask", "Call", "JobOptions", "Producer", "SyncTask", "Task", "TaskOptions"]

P = ParamSpec("P")
R = TypeVar("R")
Calls = Iterable[tuple[Any, ...] | Mapping[str, Any]] | AsyncIterable[tuple[Any, ...] | Mapping[str, Any]]

UniqueOption = Until | Seconds | Unique | bool | None

# -- options ----------------------------------------------------------------------------------


class JobOptions(TypedDict, total=False):
    """What may be set for one call; each overrides the task's own.

    ``delay`` seconds or ``at`` (an aware datetime, or seconds since the epoch): when the job is due.
    ``expires`` seconds: if it has not started by then, it is cancelled. ``job_id``: your own id; a second job with
    the id of a live one is not created. ``timeout`` and ``soft_timeout`` seconds:
    its limits, soft 0 for none. ``result_ttl`` seconds that its record is kept, 0 for none. ``unique``: see
    :class:`fastq.Unique`. ``idempotency_key``: your own name for this call; for a day, or ``idempotent`` seconds of the
    task, every call with it gets the job of the first one. ``durability``: "stored", or "replicated": the call returns when
    replicas of Redis have the job, too, and raises :class:`fastq.NotReplicated` otherwise.
    ``tags``: up to 10, by which jobs are cancelled (``app.cancel_tag``); a duplicate's are not the job's that was there.
    """

    queue: str
    priority: int
    delay: Seconds
    at: dt.datetime | float
    expires: Seconds
    job_id: str
    timeout: Seconds
    soft_timeout: Seconds
    max_attempts: int
    max_retries: int
    result_ttl: Seconds
    unique: UniqueOption
    idempotency_key: str
    durability: Durability
    tags: Sequence[str]


_OPTIONS = tuple(JobOptions.__annotations__)


class TaskOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a task is registered with; None means the application's setting. Durations are seconds."""

    queue: str | None = None
    priority: int = JobPriority.NORMAL
    max_attempts: int | None = None
    timeout: float | None = None
    soft_timeout: float | None = None
    isolation: str | None = None  # "process", or None: the worker's own
    max_memory: int = 0  # bytes, 0: unlimited
    result_ttl: float | None = None
    expires: float | None = None
    retry: RetryRule = RetryRule()
    unique: Unique | None = None
    idempotent: float | None = None
    limits: Any = None  # fastq.limiter.options.JobLimits
    batch: int = 0  # most jobs that the handler takes at once, as a list; 0: one by one
    batch_wait: float = 0.0  # seconds that the first of them waits for others


class Call(NamedTuple):
    """A job ready to be sent: to which queue, at which priority. ``strict``: a duplicate is an error.

    ``replicated``: whether replicas must have it before its producer is told; None: as the application says.
    """

    queue: str
    priority: int
    job: NewJob
    strict: bool = False
    replicated: bool | None = None
    tags: tuple[str, ...] = ()


class Producer(Home, Protocol):
    """Who sends jobs: the application. ``R`` of the handles is for the type checker only."""

    settings: Settings
    partitions: dict[str, int]
    """Of the queues that are split, into how many partitions."""

    def max_body(self) -> int:
        """Most bytes of a body."""
        ...

    def queue_of(self, task: str, declared: str | None) -> str:
        """The queue of a task that names this one, or none: routes come first."""
        ...

    def send(self, call: Call) -> Coroutine[Any, Any, JobHandle[Any]]:
        """Enqueue one job."""
        ...

    def send_sync(self, call: Call) -> JobHandle[Any]:
        """Enqueue one job from blocking code."""
        ...

    def send_many(self, calls: Iterable[Call] | AsyncIterable[Call], *, ids: bool) -> Coroutine[Any, Any, Bulk]:
        """Enqueue a stream of jobs in bounded chunks."""
        ...

    def send_many_sync(self, calls: Iterable[Call], *, ids: bool) -> Bulk:
        """The same from blocking code."""
        ...


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


_NOT_ONCE = Once()


def make_call(task: str, body: bytes, defaults: TaskOptions, options: JobOptions, producer: Producer) -> Call:
    """Put header and body together.

    Raises:
        InvalidOption, InvalidQueueName, InvalidJobId, BodyTooLarge: the call cannot be stored as asked.
    """
    now = producer.now_ms()
    check_size(task, body, producer.max_body())
    queue = options.get("queue")
    if queue is None:
        queue = producer.queue_of(task, defaults.queue)
    if not options:
        priority, expires = defaults.priority, defaults.expires
        if expires is None:
            data = plain_envelope(plain_head(priority, task), body, now)
        else:
            data = encode(Envelope(priority, PLAIN, task, body, now, 0, Extra(expires_at=now + round(expires * 1_000))))
        job = NewJob(new_id(), data)
        return Call(producer.partition(queue, job.id), priority, job)
    check_queue_name(queue)
    priority = check_priority(options.get("priority", defaults.priority))
    due = _due_ms(options, now)
    chosen = "job_id" in options
    job_id = check_id(options["job_id"]) if chosen else new_id()
    envelope = Envelope(priority, PLAIN, task, body, now, 0, _extra(defaults, options, now, due))
    job = NewJob(job_id, encode(envelope), due, chosen=chosen)
    if producer.partitions:
        queue = producer.partition(queue, job_id)
    replicated = is_replicated(options["durability"]) if "durability" in options else None
    return Call(queue, priority, job, False, replicated, check_tags(options["tags"]) if "tags" in options else ())


def _extra(defaults: TaskOptions, options: JobOptions, now: int, due: int) -> Extra | None:
    expires = options.get("expires", defaults.expires)
    extra = Extra(
        timeout=seconds("timeout", options["timeout"], least=0.001) if "timeout" in options else None,
        soft_timeout=seconds("soft_timeout", options["soft_timeout"]) if "soft_timeout" in options else None,
        expires_at=None if expires is None else now + max(due, 0) + round(seconds("expires", expires) * 1_000),
        result_ttl=seconds("result_ttl", options["result_ttl"]) if "result_ttl" in options else None,
        due_at=now + due if due > 0 else None,
    )
    if "max_attempts" in options or "max_retries" in options:
        extra.max_attempts = attempts_in_all(options.get("max_attempts"), options.get("max_retries"))
    return None if extra == Extra() else extra


def make_node(
    task: str, body: bytes, defaults: TaskOptions, options: Mapping[str, Any], producer: Producer, takes: int
) -> tuple[str, bytes]:
    """Queue and envelope of a job of a workflow; ``takes``: the node whose result is its first argument, -1: none.

    Raises:
        InvalidOption, InvalidQueueName, BodyTooLarge: the call cannot be stored as asked.
    """
    asked, now = cast(JobOptions, options), producer.now_ms()
    check_size(task, body, producer.max_body())
    queue = asked.get("queue")
    if queue is None:
        queue = producer.queue_of(task, defaults.queue)
    check_queue_name(queue)
    extra = _extra(defaults, asked, now, 0) or Extra()
    extra.takes = takes
    priority = check_priority(asked.get("priority", defaults.priority))
    return queue, encode(Envelope(priority, PLAIN, task, body, now, 0, extra))


Named = Callable[[], Mapping[str, Any]]
"""The arguments of a call by name, defaults filled in; asked for only when a unique key is made of them."""


def make_once(
    task: str, body: bytes, defaults: TaskOptions, options: JobOptions, producer: Producer, arguments: Named
) -> Call:
    """:func:`make_call` of a job that may be unique or idempotent.

    Raises:
        InvalidOption: also a key that cannot be made, or two of them.
    """
    rule = as_unique(options["unique"]) if "unique" in options else defaults.unique
    given = options.get("idempotency_key")
    if given is not None and (not isinstance(given, str) or not 1 <= len(given) <= 500):
        raise InvalidOption(f"idempotency_key={given!r:.100} is not a text of 1 to 500 characters")
    if given is not None or defaults.idempotent is not None:
        if options.get("unique"):
            raise InvalidOption(f"task {task!r}: unique and idempotent were both asked for: choose one")
        ttl = IDEMPOTENT_TTL if defaults.idempotent is None else defaults.idempotent
        key = unique_key(task, Unique(), arguments()) if given is None else key_of(task, given.encode())
        kept = options.get("result_ttl", defaults.result_ttl)
        kept = producer.result_ttl() if kept is None else seconds("result_ttl", kept)
        call = make_call(task, body, defaults, options | {"result_ttl": max(kept, ttl)}, producer)
        once = Once("both", round(ttl * 1_000))
        return _placed(call._replace(job=call.job._replace(unique="~" + key, once=once)), producer)
    if rule is None:
        return make_call(task, body, defaults, options, producer)
    if rule.until == "while_running":
        raise InvalidOption(f"task {task!r}: while_running is an option of a task, not of a call")
    if rule.debounce is not None:
        options = options | {"delay": rule.debounce}
    call = make_call(task, body, defaults, options, producer)
    ttl_ms = 0 if isinstance(rule.until, str) else round(seconds("unique", rule.until) * 1_000)
    most_ms = 0 if rule.at_most is None else round(seconds("at_most", rule.at_most) * 1_000)
    once = Once(rule.hold, ttl_ms, "replace" if rule.replaces else "keep", most_ms)
    job = call.job._replace(unique=unique_key(task, rule, arguments()), once=once)
    return _placed(call._replace(job=job, strict=rule.on_duplicate == "raise"), producer)


def _placed(call: Call, producer: Producer) -> Call:
    """The same call in the partition of its unique key: with an id that leads there, too.

    Raises:
        InvalidOption: it has an id of its caller's.
    """
    queue = queue_of(call.queue)
    count = producer.partitions.get(queue)
    if count is None:
        return call
    if call.job.chosen:
        raise InvalidOption(
            f"job_id={call.job.id!r} together with a unique or idempotency key: queue {queue!r} is split into {count} "
            "partitions, and the two may lead to different ones: give one of them"
        )
    where = producer.partition(queue, call.job.unique)
    return call._replace(queue=where, job=call.job._replace(id=id_for(queue, count, where, new_id)))


class Owner(Protocol):
    """Where a task is registered."""

    attached: Producer | None
    """The application that has included it, if any."""

    def producer(self) -> Producer:
        """Who sends its jobs; raises FastQError when no application has included it."""
        ...


# -- tasks ------------------------------------------------------------------------------------


class _Enqueues(Generic[P, R]):
    """The ways to enqueue that a task and a configured task share."""

    name: str

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], producer: Producer) -> Call:
        raise NotImplementedError

    def _producer(self) -> Producer:
        raise NotImplementedError

    async def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]:
        """Store a job that calls this task with these arguments.

        Calls that are made at about the same time share round trips.

        Raises:
            InvalidArguments: they do not fit the signature, its types, or msgpack; nothing was sent.
            BodyTooLarge: more than ``max_body`` bytes; nothing was sent.
            JobIdReused: the ``job_id`` belongs to a finished job.
            DuplicateJob: the task is unique with ``on_duplicate="raise"``, and there is such a job.
            BrokerUnavailable: Redis did not confirm within ``enqueue_timeout``.
            BrokerOutOfMemory, QueueFull: Redis, or this process's buffer, is full.

        Example::

            job = await send_email.enqueue("a@example.org", subject="hello")
        """
        producer = self._producer()
        return await producer.send(self._call(args, kwargs, producer))

    def enqueue_sync(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]:
        """:meth:`enqueue` from blocking code (Django views, scripts)."""
        producer = self._producer()
        return producer.send_sync(self._call(args, kwargs, producer))

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
            return await producer.send_many((self._item(item, producer) async for item in calls), ids=ids)
        return await producer.send_many((self._item(item, producer) for item in calls), ids=ids)

    def enqueue_many_sync(self, calls: Iterable[tuple[Any, ...] | Mapping[str, Any]], *, ids: bool = True) -> Bulk:
        """:meth:`enqueue_many` from blocking code."""
        producer = self._producer()
        return producer.send_many_sync((self._item(item, producer) for item in calls), ids=ids)

    def s(self, *args: Any, **kwargs: Any) -> Signature:
        """This call as a part of a workflow. Behind other jobs, what they have returned comes before these arguments.

        The arguments are checked when the workflow is started; one that is filled in later, when the job runs.

        Example::

            await fastq.chain(download.s(url), parse.s(), store.s(table="pages")).enqueue()
        """
        return self._signature(args, kwargs, immutable=False)

    def si(self, *args: Any, **kwargs: Any) -> Signature:
        """As :meth:`s`, but immutable: it gets these arguments and nothing else."""
        return self._signature(args, kwargs, immutable=True)

    def _signature(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, immutable: bool) -> Signature:
        raise NotImplementedError

    def _item(self, item: tuple[Any, ...] | Mapping[str, Any], producer: Producer) -> Call:
        if isinstance(item, tuple | list):
            return self._call(tuple(item), {}, producer)
        if isinstance(item, Mapping):
            return self._call((), item, producer)
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

    def __init__(self, owner: Owner, name: str, fn: Callable[..., Any], options: TaskOptions) -> None:
        functools.update_wrapper(cast(Any, self), fn)
        self.owner = owner
        self.name = name
        self.fn = fn
        self.defaults = options
        # In one attribute: threads that enqueue see both or neither.
        self._plain: tuple[Settings | None, PlainCalls[Call] | None] = (None, None)

    @functools.cached_property
    def arguments(self) -> Arguments:
        """The signature as a codec; built at first use, when forward references can be resolved."""
        return Arguments(self.name, self.fn if self.many is None else self.many.shape(), is_injected)

    @functools.cached_property
    def many(self) -> Many | None:
        """How its handler takes many jobs at once; None: it takes them one by one."""
        return Many(self.name, self.fn) if self.defaults.batch else None

    @functools.cached_property
    def returned(self) -> Returned:
        """The return annotation as a codec."""
        return Returned(self.name, self.fn if self.many is None else self.many.shape())

    def _producer(self) -> Producer:
        return self.owner.attached or self.owner.producer()

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], producer: Producer) -> Call:
        body = self.arguments.encode(args, kwargs)
        settings, plain = self._plain
        if plain is None or settings is not producer.settings:
            plain = self._plain_calls(producer)
        if len(body) <= plain.max_body and not producer.partitions:
            return plain.make(body, producer.now_ms())
        defaults = self.defaults
        if defaults.unique is not None or defaults.idempotent is not None:
            named = functools.partial(self.arguments.named, args, kwargs)
            return make_once(self.name, body, defaults, {}, producer, named)
        return make_call(self.name, body, defaults, {}, producer)

    def _plain_calls(self, producer: Producer) -> PlainCalls[Call]:
        """What makes the calls without options, as long as the settings are these; -1: a task of which none is that simple."""
        defaults, settings = self.defaults, producer.settings
        simple = defaults.expires is None and defaults.unique is None and defaults.idempotent is None
        queue, most = producer.queue_of(self.name, defaults.queue), producer.max_body() if simple else -1
        example = Call(queue, defaults.priority, NewJob("", b""))
        made = PlainCalls(example, plain_head(defaults.priority, self.name), most)
        self._plain = (settings, made)
        return made

    def home(self) -> Home:
        """The application, for workflows."""
        return self.owner.producer()

    def node(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any], takes: int
    ) -> tuple[str, bytes]:
        """Queue and envelope of a job of a workflow; see :class:`fastq.workflow.Source`."""
        body = self.arguments.encode(args, kwargs) if takes < 0 else self.arguments.encode_rest(args, kwargs)
        return make_node(self.name, body, self.defaults, options, self.owner.producer(), takes)

    def _signature(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, immutable: bool) -> Signature:
        return Signature(self, args, kwargs, {}, immutable=immutable)

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


class BatchTask(Task[P, R]):
    """A task whose handler takes many jobs at once: ``enqueue`` takes what one job is called with, the handler a list of it."""

    def __init__(self, owner: Owner, name: str, fn: Callable[..., Any], options: TaskOptions) -> None:
        super().__init__(owner, name, fn, options)
        self.is_async = inspect.iscoroutinefunction(fn)

    def __call__(self, items: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Run the function here, with a list."""
        return self.fn(items, *args, **kwargs)


class Configured(_Enqueues[P, R]):
    """A task with options; see :meth:`Task.options`."""

    __slots__ = ("_options", "name", "task")

    def __init__(self, task: Task[P, R], options: JobOptions) -> None:
        self.task = task
        self.name = task.name
        self._options = options

    def _producer(self) -> Producer:
        return self.task.owner.producer()

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], producer: Producer) -> Call:
        task = self.task
        body = task.arguments.encode(args, kwargs)
        named = functools.partial(task.arguments.named, args, kwargs)
        return make_once(task.name, body, task.defaults, self._options, producer, named)

    def _signature(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, immutable: bool) -> Signature:
        return Signature(self.task, args, kwargs, self._options, immutable=immutable)
