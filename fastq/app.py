"""FastQ: settings, registry and broker in one object - what a user imports and decorates with."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from fastq import config
from fastq.arguments import encode_untyped
from fastq.batches import Batching
from fastq.broker.commands import Command, Operation
from fastq.broker.keys import QueueKeys
from fastq.broker.url import Endpoint, parse_url
from fastq.context import JobContext, running_job
from fastq.dead_letters import DeadLetters
from fastq.errors import ConfigError, InvalidArguments, TaskDefinitionError, UnknownTask
from fastq.handle import Bulk, JobHandle
from fastq.job import TASK_NAME, Event, JobStatus, check_id, is_id
from fastq.queues import Queues
from fastq.registry import Tasks
from fastq.routes import route
from fastq.schedules import Scheduling
from fastq.sender import Sender
from fastq.task import Call, JobOptions, TaskOptions, check_options, make_once
from fastq.values import check_queue_name

if TYPE_CHECKING:
    from fastq.broker.explain import Explanation
    from fastq.broker.inspector import Inspector
    from fastq.lease import Lease
    from fastq.limiter.api import Limiter
    from fastq.limiter.catalogue import Catalogue
    from fastq.limiter.jobs import JobLimiter
    from fastq.limiter.stores import RedisStore
    from fastq.lock import Lock
    from fastq.waiting import Waits
    from fastq.watching import Watches

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


class FastQ(Tasks, Scheduling, Batching):
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
        self._bound = self
        self.arguments = {"url": url, **settings}
        loaded = config.load(arguments=self.arguments)
        self.settings: config.Settings = loaded.settings
        self.origins = loaded.origins
        self.lifespan_function: Callable[..., AbstractAsyncContextManager[Any]] | None = None
        self.middlewares: list[Middleware] = []
        self._endpoint: Endpoint | None = None
        self._queue_keys: dict[str, QueueKeys] = {}
        self._routed: dict[str, str] = {}
        self._sender = Sender(self)
        self._inspector: Inspector | None = None
        self._limits: Catalogue | None = None
        self._limit_store: RedisStore | None = None
        self._lease_store: RedisStore | None = None
        self.endpoint()  # a bad URL is told here, not at the first call

    def adopt(self, settings: config.Settings) -> None:
        """Take the settings that a process was started with (see launch.py); before anything is connected."""
        self.settings = settings
        self._endpoint = self._inspector = None
        self._queue_keys.clear()
        self._routed.clear()
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
        """
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

    # -- status and dead letters --------------------------------------------------------------

    async def get_status(self, job_id: str, *, queue: str | None = None) -> JobStatus | None:
        """Where a job is; None when its id is unknown or its record has expired.

        Args:
            queue: saves asking all queues.
        """
        return await self.run(self.inspector.status(job_id, queue))

    def get_status_sync(self, job_id: str, *, queue: str | None = None) -> JobStatus | None:
        """:meth:`get_status` from blocking code."""
        return self.run_sync(self.inspector.status(job_id, queue))

    async def wait_for(
        self, job_id: str, *, timeout: float | None = None, queue: str | None = None
    ) -> JobStatus | None:
        """How a job has ended, as soon as it has: success, failed or cancelled. None when its id is unknown, its record has
        expired, or it ended without leaving one (``result_ttl=0``).

        The end is pushed by Redis; nothing polls, and workers pay nothing for jobs that nobody waits for.

        Args:
            timeout: seconds to wait; None: as long as it takes. A Redis that is away meanwhile is waited for, too.
            queue: saves asking all queues.

        Raises:
            WaitTimeout: it had not ended in time; a ``TimeoutError``. The job goes on.

        Example::

            status = await app.wait_for(job_id, timeout=60)
            if status is not None and status.state == "success":
                return status.result
        """
        if queue is None:
            status = await self.get_status(job_id)
            if status is None or status.state.final:
                return status
            queue = status.queue
        return await self._waits.wait(queue, job_id, timeout) if is_id(job_id) else None

    def wait_for_sync(self, job_id: str, *, timeout: float | None = None, queue: str | None = None) -> JobStatus | None:
        """:meth:`wait_for` from blocking code; all threads share one connection that listens."""
        if queue is None:
            status = self.get_status_sync(job_id)
            if status is None or status.state.final:
                return status
            queue = status.queue
        return self._waits.wait_sync(queue, job_id, timeout) if is_id(job_id) else None

    @functools.cached_property
    def _waits(self) -> Waits:
        from fastq.waiting import Waits

        return Waits(self, self._sender.aclose)

    def events(self, *, queue: str | None = None) -> AsyncIterator[Event]:
        """What happens to the jobs of a queue (default: the setting ``default_queue``) from now on: started, progress, retried,
        succeeded, failed, cancelled. Survives a lost connection of up to 10 minutes and 10,000 events.

        While somebody watches, and up to two minutes longer, each event costs Redis about 4 µs; while nobody does, nothing.

        Example::

            async for event in app.events(queue="emails"):
                print(event.kind, event.job_id)
        """
        return self._watches.events(queue or self.settings.default_queue, "*")

    def job_events(self, job_id: str, *, queue: str) -> AsyncIterator[Event]:
        """What happens to one job; see :meth:`fastq.JobHandle.events`."""
        return self._watches.events(queue, check_id(job_id))

    @functools.cached_property
    def _watches(self) -> Watches:
        from fastq.watching import Watches

        return Watches(self)

    async def get_logs(self, job_id: str, *, queue: str) -> list[str]:
        """The last lines that a job's handler wrote through ``job.log``; see the setting ``job_log_lines``."""
        return await self.run(self.inspector.logs(job_id, queue))

    def get_logs_sync(self, job_id: str, *, queue: str) -> list[str]:
        """:meth:`get_logs` from blocking code."""
        return self.run_sync(self.inspector.logs(job_id, queue))

    def typed_result(self, status: JobStatus) -> Any:
        """The result of a job in the type that its task's handler is annotated with, if the task is registered here.

        Raises:
            UndecodableJob: it does not fit.
        """
        task = self.tasks.get(status.task or "")
        return status.result if task is None else task.returned.convert(status.result)

    async def cancel(self, job_id: str, *, terminate: bool = False, queue: str | None = None) -> bool:
        """Cancel a job. It is kept in Redis, so no worker has to be there; see docs/time_limits.md.

        A scheduled or pending job is taken out at once. A running one goes on until its handler looks at
        ``job.cancelled``, fails or returns; whatever else happens to it (a retry, a deploy, the death of its worker), it
        does not run again. One that succeeds before it was told has succeeded.

        Args:
            terminate: interrupt a running one: an async handler is cancelled, the process of ``isolation="process"``
                is killed, a handler in a thread can only be told.
            queue: saves asking all queues.

        Returns:
            False when it is unknown or has ended.
        """
        return await self.run(self.inspector.cancel(job_id, queue, terminate=terminate)) != "unknown"

    def cancel_sync(self, job_id: str, *, terminate: bool = False, queue: str | None = None) -> bool:
        """:meth:`cancel` from blocking code."""
        return self.run_sync(self.inspector.cancel(job_id, queue, terminate=terminate)) != "unknown"

    async def explain(self, job_id: str, *, queue: str | None = None) -> Explanation:
        """Why a job does not run: paused, scheduled, parked under a limit, behind others, no worker that knows its task …

        Example::

            print(await app.explain(job.id))
        """
        from fastq.broker.explain import explain

        return await self.run(explain(self.inspector, job_id, queue))

    def explain_sync(self, job_id: str, *, queue: str | None = None) -> Explanation:
        """:meth:`explain` from blocking code."""
        from fastq.broker.explain import explain

        return self.run_sync(explain(self.inspector, job_id, queue))

    @functools.cached_property
    def queues(self) -> Queues:
        """Length, pause, resume and purge of queues."""
        return Queues(self)

    async def queue_length(self, queue: str | None = None) -> int:
        """Pending jobs of a queue."""
        return await self.queues.length(queue)

    async def purge_queue(self, queue: str | None = None) -> int:
        """Delete the pending, scheduled and parked jobs of a queue, for good. Returns how many."""
        return await self.queues.purge(queue)

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

            self._inspector = Inspector(self.settings.prefix)
        return self._inspector

    # -- limits ---------------------------------------------------------------------------------

    def limiter(self, limiter_id: str, /, **options: Any) -> Limiter:
        """A limit that all processes of this application share, in its Redis and under its prefix.

        Args:
            options: ``rate="100/s burst 200"``, or ``algorithm`` and its own options, ``max_concurrent``, ``timeout``,
                ``on_error``, ``lease``, ``adaptive``; see docs/limits.md. None at all: the limiter of that name which was defined before.

        Raises:
            ConfigError: options that make no sense (all that is wrong, in one message), or others than before.

        Example::

            stripe = app.limiter("stripe_api", rate="100/s", timeout=5)
        """
        from fastq.limiter import catalogue

        if self._limits is None:
            self._limits = catalogue.Catalogue()
            self._limit_store = catalogue.redis_store(self.settings, self.endpoint)
        before = self._limits.options(limiter_id)
        if not options and before is None:
            return catalogue.default().find(limiter_id)
        if before is not None and options not in ({}, before):
            raise ConfigError(f"limiter {limiter_id!r} was defined before with other options: {before}")
        if before is None:
            catalogue.default().adopt(self._limits.add_limiter(limiter_id, options, self._limit_store), options)
        return self._limits.find(limiter_id)

    def limits_of(self, task: str, queue: str) -> list[JobLimiter]:
        """The limiters that a task's jobs have to pass in a queue.

        Raises:
            ConfigError: one of them does not exist, or an option does not fit the handler.
        """
        found = self.tasks[task]
        asked = [(f"queue:{queue}", self.queue_limits.get(queue)), (f"task:{task}", found.defaults.limits)]
        if not any(options for _, options in asked):
            return []
        from fastq.limiter.jobs import bind

        bound = []
        for owner, options in asked:
            if options is not None:
                bound += bind(owner, options, self.limiter, found.arguments.signature)
        return bound

    def limiters(self) -> dict[str, Limiter]:
        """Those that this application has defined, by their ids; those of its tasks included. Raises ConfigError."""
        for name, task in self.tasks.items():
            self.limits_of(name, task.defaults.queue or self.default_queue())
        return self._limits.all() if self._limits is not None else {}

    # -- leaders ----------------------------------------------------------------------------------

    def leader(self, name: str, *, ttl: float = 15.0) -> Lease:
        """Who of all processes that ask for ``name`` leads: one at a time, as long as it renews its lease.

        Args:
            ttl: seconds after which another one leads when the leader was killed (0.5 s to a day).

        Raises:
            ConfigError: an impossible name or ttl.

        Example::

            async with app.leader("daily_report", ttl=15) as term:  # waits; the block is cancelled if the lease is lost
                await write_report(fence=term.token)
        """
        from fastq.lease import Lease

        return Lease(self.lease_store(), "leader", name, ttl)

    def lock(self, name: str, *, timeout: float = 60.0, wait: float = 0.0) -> Lock:
        """Let one block of code of the whole fleet at a time hold ``name``: ``async with`` or ``with``.

        Args:
            timeout: seconds after which another one can have it when its holder was killed; it is renewed while it is held,
                however long that is (0.5 s to a day).
            wait: seconds to wait for it.

        Raises:
            ConfigError: an impossible name or time. On entering the block:
            JobAlreadyRunning: somebody else holds it.

        Example::

            async with app.lock("sync:42", timeout=600) as held:
                await sync(42, fence=held.token)
        """
        from fastq.lease import Lease
        from fastq.lock import Lock

        return Lock(Lease(self.lease_store(), "lock", name, timeout), wait)

    def lease_store(self) -> RedisStore:
        """Where leases are kept."""
        if self._lease_store is None:
            from fastq.limiter.catalogue import redis_store

            self._lease_store = redis_store(self.settings, self.endpoint)
        return self._lease_store

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

    def keys(self, queue: str) -> QueueKeys:
        """The key names of a queue."""
        keys = self._queue_keys.get(queue)
        if keys is None:
            keys = self._queue_keys[queue] = QueueKeys(self.settings.prefix, check_queue_name(queue))
        return keys

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

    def result_ttl(self) -> float:  # noqa: D102 - see Producer
        return self.settings.result_ttl

    def send(self, call: Call) -> Coroutine[Any, Any, JobHandle[Any]]:
        """Enqueue a prepared call."""
        return self._sender.send(call)

    def send_sync(self, call: Call) -> JobHandle[Any]:
        """Enqueue a prepared call from blocking code."""
        return self._sender.send_sync(call)

    def send_many(self, calls: Iterable[Call] | AsyncIterable[Call], *, ids: bool) -> Coroutine[Any, Any, Bulk]:
        """Enqueue a stream of prepared calls in bounded chunks."""
        return self._sender.send_many(calls, ids=ids)

    def send_many_sync(self, calls: Iterable[Call], *, ids: bool) -> Bulk:
        """:meth:`send_many` from blocking code."""
        return self._sender.send_many_sync(calls, ids=ids)

    def run(self, operation: Operation[T]) -> Coroutine[Any, Any, T]:
        """Run an operation (see :mod:`fastq.broker.inspector`) on this event loop's connection."""
        return self._sender.run(operation)

    def run_sync(self, operation: Operation[T]) -> T:
        """:meth:`run` from blocking code."""
        return self._sender.run_sync(operation)

    def call(self, command: Command[T]) -> Coroutine[Any, Any, T]:
        """Send one command on this event loop's connection."""
        return self._sender.call(command)

    async def aclose(self) -> None:
        """Close this event loop's connections; jobs still on their way get BrokerUnavailable, waiters are cancelled."""
        if "_watches" in self.__dict__:
            await self._watches.aclose()
        if "_waits" in self.__dict__:
            await self._waits.aclose()
        await self._sender.aclose()
        if self._limit_store is not None:
            await self._limit_store.aclose()

    def close(self) -> None:
        """Close the connections of blocking code and of leases. What is still held goes on being renewed, over a new one."""
        if "_waits" in self.__dict__:
            self._waits.close()
        self._sender.close()
        for store in (self._limit_store, self._lease_store):
            if store is not None:
                store.close()


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
