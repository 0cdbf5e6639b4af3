"""FastQ: settings, registry and broker in one object - what a user imports and decorates with."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from fastq import config
from fastq.arguments import encode_untyped
from fastq.broker.calls import Numbers, Target, chunks, enqueue_sync
from fastq.broker.commands import Command, NewJob, Operation, Refused, raw
from fastq.broker.connection import AsyncConnection, Clock, SyncConnection
from fastq.broker.keys import GlobalKeys, QueueKeys
from fastq.broker.url import Endpoint, parse_url
from fastq.context import JobContext, running_job
from fastq.errors import BrokerError, ConfigError, InvalidArguments, JobIdReused, TaskDefinitionError, UnknownTask
from fastq.handle import Bulk, JobHandle
from fastq.job import TASK_NAME, DeadLetter, JobStatus, decode_record
from fastq.registry import Tasks
from fastq.task import Call, JobOptions, TaskOptions, check_options, make_call

if TYPE_CHECKING:
    import asyncio

    from fastq.broker.inspector import Inspector
    from fastq.limiter.api import Limiter
    from fastq.limiter.catalogue import Catalogue
    from fastq.limiter.stores import RedisStore

__all__ = ["DeadLetters", "FastQ", "Middleware"]

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


class FastQ(Tasks):
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
        self.settings = loaded.settings
        self.origins = loaded.origins
        self.lifespan_function: Callable[..., AbstractAsyncContextManager[Any]] | None = None
        self.middlewares: list[Middleware] = []
        self._endpoint: Endpoint | None = None
        self._queue_keys: dict[str, QueueKeys] = {}
        self._sides: dict[asyncio.AbstractEventLoop, _AsyncSide] = {}
        self._sync: _SyncSide | None = None
        self._lock = threading.Lock()
        self._clock = Clock()
        self._limits: Catalogue | None = None
        self._limit_store: RedisStore | None = None
        self.endpoint()  # a bad URL is told here, not at the first call

    def adopt(self, settings: config.Settings) -> None:
        """Take the settings that a process was started with (see launch.py); before anything is connected."""
        self.settings = settings
        self._endpoint = None
        self._queue_keys.clear()
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
            return make_call(name, task.arguments.encode(args, kwargs), task.defaults, options, self)
        if not isinstance(name, str) or not TASK_NAME.match(name):
            raise UnknownTask(f"{name!r:.250} is not a task name: 1 to 200 characters of A-Z a-z 0-9 _ . : -")
        if "" in kwargs:
            raise InvalidArguments(f"task {name!r}: an argument cannot have an empty name")
        return make_call(name, encode_untyped(name, args, kwargs), _NO_DEFAULTS, options, self)

    # -- status and dead letters --------------------------------------------------------------

    async def get_status(self, job_id: str, *, queue: str | None = None) -> JobStatus | None:
        """Where a job is; None when its id is unknown or its record has expired.

        Args:
            queue: saves asking all queues.
        """
        return await self._run(self.inspector.status(job_id, queue))

    def get_status_sync(self, job_id: str, *, queue: str | None = None) -> JobStatus | None:
        """:meth:`get_status` from blocking code."""
        return self._run_sync(self.inspector.status(job_id, queue))

    async def cancel(self, job_id: str, *, queue: str | None = None) -> bool:
        """Take a scheduled or pending job out. False when it is unknown, finished, or runs already."""
        return await self._run(self.inspector.cancel(job_id, queue)) == "cancelled"

    def cancel_sync(self, job_id: str, *, queue: str | None = None) -> bool:
        """:meth:`cancel` from blocking code."""
        return self._run_sync(self.inspector.cancel(job_id, queue)) == "cancelled"

    @functools.cached_property
    def dead(self) -> DeadLetters:
        """The dead-letter queues."""
        return DeadLetters(self)

    @functools.cached_property
    def inspector(self) -> Inspector:
        """Operations that look and repair, for both movers."""
        from fastq.broker.inspector import Inspector

        return Inspector(self.settings.prefix)

    # -- limits ---------------------------------------------------------------------------------

    def limiter(self, limiter_id: str, /, **options: Any) -> Limiter:
        """A limit that all processes of this application share, in its Redis and under its prefix.

        Args:
            options: ``rate="100/s burst 200"``, or ``algorithm`` and its own options, ``max_concurrent``, ``timeout``,
                ``on_error``, ``lease``; see docs/limits.md. None at all: the limiter of that name which was defined before.

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
            keys = self._queue_keys[queue] = QueueKeys(self.settings.prefix, config.check_queue_name(queue))
        return keys

    def now_ms(self) -> int:  # noqa: D102 - see Producer
        return self._clock.now_ms()

    def max_body(self) -> int:  # noqa: D102 - see Producer
        return self.settings.max_body

    def default_queue(self) -> str:  # noqa: D102 - see Producer
        return self.settings.default_queue

    async def send(self, call: Call) -> JobHandle[Any]:
        """Enqueue a prepared call."""
        side = self._side()
        target = side.targets.get((call.queue, call.priority)) or side.target(call.queue, call.priority)
        refused = await side.enqueuer.submit(target, [call.job])
        if call.queue not in side.announced or side.epoch != side.connection.connects:
            await side.announce(call.queue)
        return self._handle(call, refused[0] if refused else None)

    def send_sync(self, call: Call) -> JobHandle[Any]:
        """Enqueue a prepared call from blocking code."""
        refused = self._sync_side().send(call.queue, call.priority, [call.job])
        return self._handle(call, refused[0] if refused else None)

    def _handle(self, call: Call, refused: Refused | None) -> JobHandle[Any]:
        if refused is None:
            return JobHandle(self, call.job.id, call.queue)
        return JobHandle(self, _existing(call, refused), call.queue, created=False)

    async def send_many(self, calls: Iterable[Call] | AsyncIterable[Call], *, ids: bool) -> Bulk:
        """Enqueue a stream of prepared calls in bounded chunks."""
        bulk, side = Bulk(), self._side()
        if isinstance(calls, AsyncIterable):
            group: list[Call] = []
            async for call in calls:
                group.append(call)
                if len(group) == _GROUP:
                    await self._send_group(side, group, bulk, ids)
                    group = []
            await self._send_group(side, group, bulk, ids)
            return bulk
        stream = iter(calls)
        while group := [call for _, call in zip(range(_GROUP), stream, strict=False)]:
            await self._send_group(side, group, bulk, ids)
        return bulk

    async def _send_group(self, side: _AsyncSide, group: list[Call], bulk: Bulk, ids: bool) -> None:
        for (queue, priority), members in _by_target(group).items():
            target = side.target(queue, priority)
            for chunk in chunks(call.job for call in members):
                _count(bulk, queue, chunk, await side.enqueuer.submit(target, chunk), priority)
            await side.announce(queue)
        if ids:
            bulk.ids += [call.job.id for call in group]

    def send_many_sync(self, calls: Iterable[Call], *, ids: bool) -> Bulk:
        """:meth:`send_many` from blocking code."""
        bulk, side, stream = Bulk(), self._sync_side(), iter(calls)
        while group := [call for _, call in zip(range(_GROUP), stream, strict=False)]:
            for (queue, priority), members in _by_target(group).items():
                for chunk in chunks(call.job for call in members):
                    _count(bulk, queue, chunk, side.send(queue, priority, chunk), priority)
            if ids:
                bulk.ids += [call.job.id for call in group]
        return bulk

    def _side(self) -> _AsyncSide:
        import asyncio  # 45 ms, which blocking code does not need

        loop = asyncio.get_running_loop()
        side = self._sides.get(loop)
        if side is None or side.pid != os.getpid():
            for old in [old for old in self._sides if old.is_closed()]:
                del self._sides[old]
            side = self._sides[loop] = _AsyncSide(self)
            self._clock = side.connection.clock
        return side

    def _sync_side(self) -> _SyncSide:
        with self._lock:
            if self._sync is None:
                self._sync = _SyncSide(self)
                self._clock = self._sync.connection.clock
            return self._sync

    async def _run(self, operation: Operation[T]) -> T:
        return await self._side().connection.run(operation)

    def _run_sync(self, operation: Operation[T]) -> T:
        return self._sync_side().connection.run(operation)

    async def aclose(self) -> None:
        """Close this event loop's connection; jobs still on their way get BrokerUnavailable."""
        import asyncio

        side = self._sides.pop(asyncio.get_running_loop(), None)
        if side is not None:
            await side.enqueuer.close()
        if self._limit_store is not None:
            await self._limit_store.aclose()

    def close(self) -> None:
        """Close the connection of blocking code."""
        if self._sync is not None:
            self._sync.connection.close()


_GROUP = 2_000
"""Calls of a stream that are held at a time."""


def _by_target(calls: Iterable[Call]) -> dict[tuple[str, int], list[Call]]:
    groups: dict[tuple[str, int], list[Call]] = {}
    for call in calls:
        groups.setdefault((call.queue, call.priority), []).append(call)
    return groups


def _count(bulk: Bulk, queue: str, chunk: list[NewJob], refused: list[Refused], priority: int) -> None:
    for refusal in refused:
        _existing(Call(queue, priority, chunk[refusal.position]), refusal)
    bulk.total += len(chunk)
    bulk.created += len(chunk) - len(refused)


def _existing(call: Call, refused: Refused) -> str:
    """The id of the job that was there already.

    Raises:
        JobIdReused: that job has finished.
    """
    if refused.why == "dead":
        raise JobIdReused(call.job.id, call.queue, "failed")
    if refused.why == "finished":
        raise JobIdReused(call.job.id, call.queue, decode_record(refused.detail).state)
    return refused.detail.decode() if refused.why == "unique" else call.job.id


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


class DeadLetters:
    """The dead-letter queues: jobs that are out of attempts, with their bodies and last errors.

    Every method has a ``_sync`` twin. ``queue`` is the setting ``default_queue`` unless given.
    """

    def __init__(self, app: FastQ) -> None:
        self._app = app

    async def list(self, queue: str | None = None, *, offset: int = 0, limit: int = 50) -> Sequence[DeadLetter]:
        """Dead letters of a queue, the latest first; at most 200 at a time."""
        return await self._app._run(self._app.inspector.dead(queue or self._app.default_queue(), offset, limit))

    def list_sync(self, queue: str | None = None, *, offset: int = 0, limit: int = 50) -> Sequence[DeadLetter]:
        """:meth:`list` from blocking code."""
        return self._app._run_sync(self._app.inspector.dead(queue or self._app.default_queue(), offset, limit))

    async def replay(self, queue: str | None = None, ids: Iterable[str] | None = None, *, limit: int = 100) -> int:
        """Send dead letters back with a fresh budget of attempts; twice is once.

        Args:
            ids: which; None: the oldest ones.
            limit: most jobs to send back when no ids are given.

        Returns the number sent back.
        """
        return await self._app._run(
            self._app.inspector.replay(queue or self._app.default_queue(), _listed(ids), limit=limit)
        )

    def replay_sync(self, queue: str | None = None, ids: Iterable[str] | None = None, *, limit: int = 100) -> int:
        """:meth:`replay` from blocking code."""
        return self._app._run_sync(
            self._app.inspector.replay(queue or self._app.default_queue(), _listed(ids), limit=limit)
        )

    async def purge(
        self, queue: str | None = None, ids: Iterable[str] | None = None, *, older_than: float | None = None
    ) -> int:
        """Delete dead letters: these ids, those older than so many seconds, or all. Returns how many."""
        return await self._app._run(
            self._app.inspector.purge_dead(queue or self._app.default_queue(), _listed(ids), older_than=older_than)
        )

    def purge_sync(
        self, queue: str | None = None, ids: Iterable[str] | None = None, *, older_than: float | None = None
    ) -> int:
        """:meth:`purge` from blocking code."""
        return self._app._run_sync(
            self._app.inspector.purge_dead(queue or self._app.default_queue(), _listed(ids), older_than=older_than)
        )


def _listed(ids: Iterable[str] | None) -> list[str] | None:
    return None if ids is None else list(ids)


class _AsyncSide:
    """The connection and producer of one event loop."""

    def __init__(self, app: FastQ) -> None:
        from fastq.broker.enqueuer import AsyncEnqueuer

        settings = app.settings
        self._app = app
        self.pid = os.getpid()
        self.connection = AsyncConnection(
            app.endpoint(),
            connect_timeout=min(settings.connect_timeout, settings.enqueue_timeout),
            response_timeout=settings.enqueue_timeout,
        )
        self.enqueuer = AsyncEnqueuer(self.connection, timeout=settings.enqueue_timeout, limit=settings.enqueue_buffer)
        self.targets: dict[tuple[str, int], Target] = {}
        self.announced: set[str] = set()
        self.epoch = 0  # the connection of which ``announced`` is true

    def target(self, queue: str, priority: int) -> Target:
        target = self.targets[queue, priority] = Target(self._app.keys(queue), priority)
        return target

    async def announce(self, queue: str) -> None:
        """Put the queue on the list of queues, once per connection (an empty Redis may have come back).

        Never fails: the jobs are stored by now, and who was told otherwise would enqueue them again.
        """
        if self.epoch != self.connection.connects:
            self.epoch = self.connection.connects
            self.announced.clear()
        if queue not in self.announced:
            try:
                await self.connection.call(_announcement(self._app, queue))
            except BrokerError:
                return  # the next enqueue tries again, and the queue's workers announce it, too
            self.announced.add(queue)


class _SyncSide:
    """The connection of blocking code; every thread is a producer of its own."""

    def __init__(self, app: FastQ) -> None:
        settings = app.settings
        self._app = app
        self._timeout = settings.enqueue_timeout
        self.connection = SyncConnection(
            app.endpoint(),
            connect_timeout=min(settings.connect_timeout, settings.enqueue_timeout),
            response_timeout=settings.enqueue_timeout,
        )
        self._local = threading.local()
        self._announced: set[tuple[int, str]] = set()

    def send(self, queue: str, priority: int, jobs: list[NewJob]) -> list[Refused]:
        sequence = getattr(self._local, "sequence", None)
        if sequence is None or self._local.pid != os.getpid():
            sequence = self._local.sequence = Numbers(self.connection.clock)
            self._local.pid = os.getpid()
        target = Target(self._app.keys(queue), priority)
        refused = enqueue_sync(self.connection, sequence, target, jobs, self._timeout)
        key = (self.connection.connects, queue)
        if key not in self._announced:
            try:
                self.connection.call(_announcement(self._app, queue))
                self._announced.add(key)
            except BrokerError:
                pass  # see _AsyncSide.announce
        return refused


def _announcement(app: FastQ, queue: str) -> Command[int]:
    return raw("SADD", GlobalKeys(app.settings.prefix).queues, queue, decode=int)
