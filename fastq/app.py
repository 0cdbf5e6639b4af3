"""FastQ: settings, registry and broker in one object - what a user imports and decorates with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from fastq import config
from fastq.arguments import encode_untyped
from fastq.asking import Asking
from fastq.batches import Batching
from fastq.broker.command import Command, Operation
from fastq.broker.commands import Bound
from fastq.broker.keys import QueueKeys
from fastq.broker.url import Endpoint, parse_url
from fastq.consuming import Consuming
from fastq.context import JobContext, running_job
from fastq.dead_letters import DeadLetters
from fastq.errors import InvalidArguments, TaskDefinitionError, UnknownTask
from fastq.fleet import Fleet
from fastq.flows import Flows
from fastq.handle import Bulk, JobHandle
from fastq.job import TASK_NAME, Envelope
from fastq.partitions import check_partition, parse_partitions, partition_for, queue_of, served, spread
from fastq.queues import Queues
from fastq.registry import Tasks
from fastq.routes import route
from fastq.schedules import Scheduling
from fastq.sender import Sender
from fastq.task import Call, JobOptions, TaskOptions, check_options, make_once

if TYPE_CHECKING:
    from fastq.broker.inspector import Inspector

__all__ = ["FastQ", "Middleware"]

T = TypeVar("T")

_NO_DEFAULTS = TaskOptions()


class Middleware:
    """Hooks around every job of a worker; override what you need. They run in the worker's event loop.

    An exception in ``before`` counts as the handler's; one in ``after`` or ``on_error`` is logged and changes nothing.

    Example::

        class Timing(fastq.Middleware):
            async def after(self, job, result):
                ...

        app.middleware(Timing())
    """

    async def before(self, job: JobContext) -> None:
        """Before the handler runs."""

    async def after(self, job: JobContext, result: Any) -> None:
        """After it has returned ``result``."""

    async def on_error(self, job: JobContext, error: BaseException) -> None:
        """After it has raised ``error`` (also Retry, Snooze, Fail and timeouts)."""


class FastQ(Tasks, Scheduling, Batching, Flows, Asking, Fleet, Consuming):
    """An application: its tasks, and the Redis that its jobs live in.

    Nothing is connected until the first call. One object serves any number of threads and event loops, and
    survives a fork.

    Args:
        url: default: ``FASTQ_REDIS_URL``, then ``REDIS_URL``, then ``redis://localhost:6379/0``.
        settings: any field of :class:`fastq.Settings` by name; see docs/settings.md.

    Raises:
        ConfigError: a URL or setting that cannot be used.

    Example::

        app = fastq.FastQ("redis://localhost:6379/0")
    """

    def __init__(self, url: str | None = None, **settings: Any) -> None:
        super().__init__()
        self.attached = self
        self.arguments = {"url": url, **settings}
        loaded = config.load(arguments=self.arguments)
        self.settings: config.Settings = loaded.settings
        self.origins = loaded.origins
        self.lifespan_function: Callable[..., AbstractAsyncContextManager[Any]] | None = None
        self.middlewares: list[Middleware] = []
        self._endpoint: Endpoint | None = None
        self._queue_keys: dict[str, QueueKeys] = {}
        self._routed: dict[str, str] = {}
        self.partitions: dict[str, int] = {}
        self.listed: frozenset[str] = frozenset()
        self._count_partitions()
        self._sender = Sender(self)
        self._inspector: Inspector | None = None
        self.endpoint()  # a bad URL is told here, not at the first call

    def adopt(self, settings: config.Settings) -> None:
        """Take the settings that a process was started with (see launch.py); before anything is connected."""
        self.settings = settings
        self._endpoint = self._inspector = None
        self._queue_keys.clear()
        self._routed.clear()
        self._count_partitions()
        self.endpoint()

    # -- inside handlers ------------------------------------------------------------------

    def job(self) -> JobContext:
        """The job whose handler is running.

        Raises:
            FastQError: called outside a handler.
        """
        return running_job()

    # -- definition -----------------------------------------------------------------------

    def lifespan(self, fn: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        """Decorate an async generator that sets a worker process up and, after its ``yield``, cleans up.

        It takes no argument, or the application. What it yields is ``JobContext.state`` and, by
        ``fastq.State()``, a handler's parameter.

        Example::

            @app.lifespan
            async def resources():
                async with create_pool() as pool:
                    yield {"pool": pool}

        Raises:
            TaskDefinitionError: it is no async generator function, or the second lifespan of this application.
        """
        if not inspect.isasyncgenfunction(fn):
            raise TaskDefinitionError(f"the lifespan {fn!r:.100} is no async generator: 'async def' with one 'yield'")
        if self.lifespan_function is not None:
            raise TaskDefinitionError("this application has a lifespan already: put both into one")
        self.lifespan_function = asynccontextmanager(fn)
        return fn

    def middleware(self, middleware: Middleware) -> Middleware:
        """Add hooks around every job; the first added is the outermost."""
        if not isinstance(middleware, Middleware):
            raise TaskDefinitionError(f"middleware {middleware!r:.100} is not a fastq.Middleware object")
        self.middlewares.append(middleware)
        return middleware

    def load_entry_points(self) -> list[str]:
        """Include the tasks that installed libraries announce (entry points of the group ``fastq.tasks``).

        Returns the entry points' names.

        Raises:
            TaskDefinitionError: one of them is not a ``fastq.Tasks`` or ``fastq.FastQ`` object.
        """
        from importlib.metadata import entry_points

        names = []
        for point in sorted(entry_points(group="fastq.tasks"), key=lambda point: point.name):
            try:
                tasks = point.load()
            except Exception as error:
                source = f" of {point.dist.name}" if point.dist else ""
                error.add_note(f"while loading the entry point {point.name!r}{source} ({point.value})")
                raise
            if not isinstance(tasks, Tasks):
                raise TaskDefinitionError(
                    f"the entry point {point.name!r} ({point.value}) of group 'fastq.tasks' is not a fastq.Tasks"
                )
            self.include(tasks)
            names.append(point.name)
        return names

    def discover(self, *modules: str) -> list[str]:
        """Import modules, so that the tasks that they define are registered; of a package, every module in it.

        ``fastq.Tasks`` objects that they define are included. Returns the names of the tasks that came.

        Raises:
            ImportError: there is no such module, or it cannot be imported. TaskDefinitionError: a name is taken.

        Example::

            app.discover("shop.tasks", "shop.reports")
        """
        from importlib import import_module
        from pkgutil import walk_packages

        before = set(self.tasks)
        for name in modules:
            module = import_module(name)
            inner = walk_packages(getattr(module, "__path__", ()), f"{name}.")
            for each in (module, *(import_module(found.name) for found in inner)):
                for value in list(vars(each).values()):
                    if isinstance(value, Tasks) and value.attached is None:
                        self.include(value)
        return sorted(set(self.tasks) - before)

    # -- enqueue by name --------------------------------------------------------------------

    async def enqueue(self, name: str, /, *args: Any, **kwargs: Any) -> JobHandle[Any]:
        """Enqueue a job by its task's name; the handler need not be importable here.

        The arguments of a task that is registered here are checked; those of another are only encoded.
        Options of the call: ``app.options(delay=60).enqueue(name, …)``.

        Raises:
            As :meth:`fastq.Task.enqueue`.

        Example::

            await app.enqueue("send_email", to="a@example.org")
        """
        return await self.send(self._named(name, args, kwargs, {}))

    def enqueue_sync(self, name: str, /, *args: Any, **kwargs: Any) -> JobHandle[Any]:
        """:meth:`enqueue` from blocking code."""
        return self.send_sync(self._named(name, args, kwargs, {}))

    def options(self, **options: Unpack[JobOptions]) -> ByName:
        """Options for calls by name; see :class:`fastq.JobOptions`.

        Raises:
            InvalidOption: an unknown option.
        """
        return ByName(self, check_options(options))

    def _named(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: JobOptions) -> Call:
        task = self.tasks.get(name) if isinstance(name, str) else None
        if task is not None:
            body = task.arguments.encode(args, kwargs)
            return make_once(
                name, body, task.defaults, options, self, functools.partial(task.arguments.named, args, kwargs)
            )
        if not isinstance(name, str) or not TASK_NAME.match(name):
            raise UnknownTask(f"{name!r:.250} is not a task name: 1 to 200 characters of A-Z a-z 0-9 _ . : -")
        if "" in kwargs:
            raise InvalidArguments(f"task {name!r}: an argument cannot have an empty name")
        body = encode_untyped(name, args, kwargs)
        return make_once(
            name, body, _NO_DEFAULTS, options, self, lambda: {"": list(args), **kwargs} if args else kwargs
        )

    # -- queues and dead letters --------------------------------------------------------------

    @functools.cached_property
    def queues(self) -> Queues:
        """Length, pause, resume and purge of queues."""
        return Queues(self)

    async def queue_length(self, queue: str | None = None) -> int:
        """Pending jobs of a queue."""
        return await self.queues.length(queue)

    def queue_length_sync(self, queue: str | None = None) -> int:
        """:meth:`queue_length` from blocking code."""
        return self.queues.length_sync(queue)

    async def purge_queue(self, queue: str | None = None) -> int:
        """Delete the pending, scheduled and parked jobs of a queue, for good. Returns how many."""
        return await self.queues.purge(queue)

    def purge_queue_sync(self, queue: str | None = None) -> int:
        """:meth:`purge_queue` from blocking code."""
        return self.queues.purge_sync(queue)

    @functools.cached_property
    def dead(self) -> DeadLetters:
        """The dead-letter queues."""
        return DeadLetters(self)

    # -- operations -------------------------------------------------------------------------------

    @property
    def inspector(self) -> Inspector:
        """Operations that look and repair, for both movers."""
        if self._inspector is None:
            from fastq.broker.inspector import Inspector

            self._inspector = Inspector(self.settings.prefix, partitions=self.partitions)
        return self._inspector

    # -- the broker -------------------------------------------------------------------------------

    def endpoint(self) -> Endpoint:
        """Where Redis is. ``memory://`` starts a private server for this process (extra ``embedded``)."""
        if self._endpoint is None:
            url = self.settings.url
            if url == "memory://":
                from fastq.broker.embedded import shared_server

                url = shared_server().url
            self._endpoint = parse_url(url)
        return self._endpoint

    def _split_queue(self, name: str, count: int) -> None:
        super()._split_queue(name, count)
        self._count_partitions()
        self._sender.forget_bounds()

    def _bind_queue(self, name: str, bound: tuple[int, str]) -> None:
        super()._bind_queue(name, bound)
        self._sender.forget_bounds()

    def _count_partitions(self) -> None:
        """Queue -> how many partitions its jobs are spread over, of those that are split; the setting comes first."""
        counts = self.split | parse_partitions(self.settings.partitions)
        self.partitions = {name: count for name, count in counts.items() if count > 1}
        self._inspector = None

    def partition(self, queue: str, key: str) -> str:
        """Where a job with this id, or unique key, lies: a partition of the queue, or the queue itself if it is not split."""
        count = self.partitions.get(queue)
        return queue if count is None else partition_for(queue, count, key)

    def spread(self, queue: str) -> tuple[str, ...]:
        """The partitions that the jobs of a queue are spread over; the queue itself if it is not split, or is a partition."""
        return spread(queue, self.partitions.get(queue, 1))

    def served(self, queue: str) -> list[str]:
        """What a worker serves who serves this queue: it, its partitions, and those of another number (``listed``)."""
        return served(queue, self.partitions.get(queue, 1), self.listed)

    def keys(self, queue: str) -> QueueKeys:
        """The key names of a queue, or of a partition of one."""
        keys = self._queue_keys.get(queue)
        if keys is None:
            keys = self._queue_keys[queue] = QueueKeys(self.settings.prefix, check_partition(queue))
        return keys

    def bound(self, queue: str) -> Bound | None:
        """How many pending jobs a queue may have; None: any number. A partition has its share of those of its queue."""
        whole = queue_of(queue)
        found = self.bounds.get(whole)
        if found is None:
            return None
        most = -(-found[0] // self.partitions.get(whole, 1))
        return Bound(most, found[1], round(self.settings.result_ttl * 1_000))

    def sealer(self) -> Callable[[str, str, bytes], bytes] | None:
        """What signs an envelope, given its queue and id; None: jobs are not signed (setting ``signing_keys``).

        Raises:
            ConfigError: the keys cannot be used.
        """
        if not self.settings.signing_keys:
            return None
        from fastq.signing import signer_of

        signer = signer_of(self.settings.signing_keys, self.now_ms)
        return None if signer is None else signer.seal

    def opener(self, now_ms: Callable[[], int]) -> Callable[[str, str, bytes], Envelope] | None:
        """What reads an envelope, given its queue and id, if it is signed as it must be; None: nothing is verified.

        Raises:
            ConfigError: the keys cannot be used.
        """
        if not self.settings.signing_keys:
            return None
        from fastq.signing import reader

        return reader(self.settings.signing_keys, now_ms, required=self.settings.signing_required)

    def now_ms(self) -> int:  # noqa: D102 - see Producer
        return self._sender.clock.now_ms()

    def max_body(self) -> int:  # noqa: D102 - see Producer
        return self.settings.max_body

    def queue_of(self, task: str, declared: str | None) -> str:
        """Where the jobs of a task go whose definition names this queue, or none: the setting ``routes`` comes first."""
        if not self.settings.routes:
            return declared or self.settings.default_queue
        found = self._routed.get(task)
        if found is None:
            if len(self._routed) > 10_000:  # calls by name may name anything
                self._routed.clear()
            found = self._routed[task] = route(self.settings.routes, task) or ""
        return found or declared or self.settings.default_queue

    def default_queue(self) -> str:  # noqa: D102 - see Producer
        return self.settings.default_queue

    def queue_or_default(self, queue: str | None) -> str:
        """``queue``; None: the setting ``default_queue``."""
        return self.settings.default_queue if queue is None else queue

    def result_ttl(self) -> float:  # noqa: D102 - see Producer
        return self.settings.result_ttl

    def send(self, call: Call) -> Coroutine[Any, Any, JobHandle[Any]]:
        """Enqueue a prepared call."""
        return self._sender.send(call)

    def send_sync(self, call: Call) -> JobHandle[Any]:
        """Enqueue a prepared call from blocking code."""
        return self._sender.send_sync(call)

    def send_many(
        self, calls: Iterable[Call] | AsyncIterable[Call], *, ids: bool, batch: str = ""
    ) -> Coroutine[Any, Any, Bulk]:
        """Enqueue a stream of prepared calls in bounded chunks."""
        return self._sender.send_many(calls, ids=ids, batch=batch)

    def send_many_sync(self, calls: Iterable[Call], *, ids: bool, batch: str = "") -> Bulk:
        """:meth:`send_many` from blocking code."""
        return self._sender.send_many_sync(calls, ids=ids, batch=batch)

    def run(self, operation: Operation[T]) -> Coroutine[Any, Any, T]:
        """Run an operation (see :mod:`fastq.broker.inspector`) on this event loop's connection."""
        return self._sender.run(operation)

    def run_sync(self, operation: Operation[T]) -> T:
        """:meth:`run` from blocking code."""
        return self._sender.run_sync(operation)

    def store(
        self, begin: Callable[[], Operation[T]], queue: str, what: str, ident: str, *, safe: bool | None = None
    ) -> Coroutine[Any, Any, T]:
        """Run what begins a workflow or ends the filling of a batch; replicas have it then, where they must."""
        return self._sender.store(begin, queue, what, ident, safe)

    def store_sync(
        self, begin: Callable[[], Operation[T]], queue: str, what: str, ident: str, *, safe: bool | None = None
    ) -> T:
        """:meth:`store` from blocking code."""
        return self._sender.store_sync(begin, queue, what, ident, safe)

    def call(self, command: Command[T]) -> Coroutine[Any, Any, T]:
        """Send one command on this event loop's connection."""
        return self._sender.call(command)

    async def aclose(self) -> None:
        """Close this event loop's connections; jobs still on their way get BrokerUnavailable, waiters are cancelled."""
        await self._aclose_waits()
        await self._sender.aclose()
        await self._aclose_limits()

    def close(self) -> None:
        """Close the connections of blocking code and of leases. What is still held goes on being renewed, over a new one."""
        self._close_waits()
        self._sender.close()
        self._close_limits()


class ByName:
    """Calls by name with options; see :meth:`FastQ.options`."""

    __slots__ = ("_app", "_options")

    def __init__(self, app: FastQ, options: JobOptions) -> None:
        self._app = app
        self._options = options

    async def enqueue(self, name: str, /, *args: Any, **kwargs: Any) -> JobHandle[Any]:
        """As :meth:`FastQ.enqueue`."""
        return await self._app.send(self._app._named(name, args, kwargs, self._options))

    def enqueue_sync(self, name: str, /, *args: Any, **kwargs: Any) -> JobHandle[Any]:
        """As :meth:`FastQ.enqueue_sync`."""
        return self._app.send_sync(self._app._named(name, args, kwargs, self._options))
