"""Sends the jobs of one application: a connection and a producer per event loop, one for all blocking code.

Both run the same calls; nothing is connected before the first one. A forked child makes connections of its own.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

from fastq.broker.calls import Numbers, Replication, Target, chunks, enqueue_sync, insist
from fastq.broker.command import Command, Operation, raw
from fastq.broker.commands import Bound, NewJob, Refused
from fastq.broker.connection import AsyncConnection, SyncConnection
from fastq.broker.greeting import Clock
from fastq.broker.keys import GlobalKeys, QueueKeys
from fastq.broker.tags import tagging
from fastq.broker.url import Endpoint
from fastq.config import Settings
from fastq.errors import BatchClosed, BrokerError, DuplicateJob, FastQError, InvalidOption, JobIdReused, QueueFull
from fastq.handle import Bulk, JobHandle, StatusReader
from fastq.job import state_of
from fastq.partitions import queue_of
from fastq.task import Call

if TYPE_CHECKING:
    import asyncio

    from fastq.broker.enqueuer import AsyncEnqueuer, SplitEnqueuer

    _Sides = dict[asyncio.AbstractEventLoop, "_AsyncSide"]

__all__ = ["Home", "Sender"]

T = TypeVar("T")


class Home(StatusReader, Protocol):
    """Whose jobs are sent: the application."""

    @property
    def settings(self) -> Settings:
        """As they are now."""
        ...

    def endpoint(self) -> Endpoint:
        """Where Redis is."""
        ...

    def keys(self, queue: str) -> QueueKeys:
        """The key names of a queue."""
        ...

    def bound(self, queue: str) -> Bound | None:
        """How many pending jobs it may have."""
        ...

    def spread(self, queue: str) -> tuple[str, ...]:
        """Its partitions, or itself."""
        ...

    def sealer(self) -> Seal | None:
        """What signs an envelope, given its queue and id."""
        ...


class Sender:
    """What an application sends with; see the module."""

    eager = False
    """Whether jobs run where they are enqueued (fastq.testing)."""

    def __init__(self, home: Home) -> None:
        self._home = home
        # Twice: jobs that replicas must have go over a connection of their own, as WAIT blocks the one that it is sent on.
        self._sides: tuple[_Sides, _Sides] = ({}, {})
        self._syncs: list[_SyncSide | None] = [None, None]
        self._replicated = home.settings.durability == "replicated"
        self._lock = threading.Lock()
        self._running_loop: Callable[[], asyncio.AbstractEventLoop] | None = None
        self.clock = Clock()

    def forget_bounds(self) -> None:
        """A queue was given a bound, or partitions that share it: what event loops know of queues is no longer true."""
        for sides in self._sides:
            for side in list(sides.values()):
                side.targets.clear()

    async def send(self, call: Call) -> JobHandle[Any]:
        """Enqueue a prepared call."""
        side = self._side(call.replicated)
        if side.seal is not None:
            call = _sealed(call, side.seal)
        target = side.targets.get((call.queue, call.priority)) or side.target(call.queue, call.priority)
        if call.tags:
            await side.connection.run(_tagging(self._home, [call]))
        refused = await side.enqueuer.submit(target, [call.job])
        if refused and refused[0].why == "full":
            refused = await side.insist(target, [call.job], refused)
        if call.queue not in side.announced or side.epoch != side.connection.connects:
            await side.announce(call.queue)
        if refused:
            return self._handle(call, refused[0])
        return JobHandle(self._home, call.job.id, call.queue)

    def send_sync(self, call: Call) -> JobHandle[Any]:
        """Enqueue a prepared call from blocking code."""
        if call.tags:
            self.run_sync(_tagging(self._home, [call]))
        refused = self._sync_side(call.replicated).send(call.queue, call.priority, [call.job])
        return self._handle(call, refused[0] if refused else None)

    def _handle(self, call: Call, refused: Refused | None) -> JobHandle[Any]:
        if refused is None:
            return JobHandle(self._home, call.job.id, call.queue)
        return JobHandle(self._home, _existing(call, refused), call.queue, created=False)

    async def send_many(self, calls: Iterable[Call] | AsyncIterable[Call], *, ids: bool, batch: str = "") -> Bulk:
        """Enqueue a stream of prepared calls in bounded chunks; ``batch``: the batch that they belong to."""
        convoy = _Convoy(self._side, ids, batch)
        try:
            if isinstance(calls, AsyncIterable):
                group: list[Call] = []
                async for call in calls:
                    group.append(call)
                    if len(group) == _GROUP:
                        await convoy.send(group)
                        group = []
                await convoy.send(group)
            else:
                stream = iter(calls)
                while group := [call for _, call in zip(range(_GROUP), stream, strict=False)]:
                    await convoy.send(group)
            await convoy.arrive()
        except Exception:
            with contextlib.suppress(FastQError):
                await convoy.arrive()  # what was sent before the faulty item is stored when its caller hears of it
            raise
        finally:
            convoy.give_up()
        return convoy.bulk

    def send_many_sync(self, calls: Iterable[Call], *, ids: bool, batch: str = "") -> Bulk:
        """:meth:`send_many` from blocking code."""
        bulk, stream = Bulk(), iter(calls)
        while group := [call for _, call in zip(range(_GROUP), stream, strict=False)]:
            instead: dict[str, str] = {}
            if tagged := [call for call in group if call.tags]:
                self.run_sync(_tagging(self._home, tagged))
            for (queue, priority), members in _by_target(group).items():
                side, sent = self._sync_side(members[0].replicated), 0
                for chunk in chunks(call.job for call in members):
                    refused = side.send(queue, priority, chunk, batch)
                    _count(bulk, members[sent : sent + len(chunk)], refused, instead)
                    sent += len(chunk)
            if ids:
                bulk.ids += [instead.get(call.job.id, call.job.id) for call in group]
        return bulk

    def _side(self, replicated: bool | None) -> _AsyncSide:
        loop = (self._running_loop or self._learn_asyncio())()
        safe = self._replicated if replicated is None else replicated
        sides = self._sides[safe]
        side = sides.get(loop)
        if side is None or side.forks != _forks:
            for old in [old for old in sides if old.is_closed()]:
                del sides[old]
            side = sides[loop] = _AsyncSide(self._home, safe)
            self.clock = side.connection.clock
        return side

    def _learn_asyncio(self) -> Callable[[], asyncio.AbstractEventLoop]:
        import asyncio  # 45 ms, which blocking code does not need

        self._running_loop = asyncio.get_running_loop
        return asyncio.get_running_loop

    def _sync_side(self, replicated: bool | None) -> _SyncSide:
        safe = self._replicated if replicated is None else replicated
        with self._lock:
            side = self._syncs[safe]
            if side is None:
                side = self._syncs[safe] = _SyncSide(self._home, safe)
                self.clock = side.connection.clock
            return side

    async def run(self, operation: Operation[T]) -> T:
        """Run an operation on this event loop's connection."""
        return await self._side(False).connection.run(operation)

    async def store(self, begin: Callable[[], Operation[T]], queue: str, what: str, ident: str, safe: bool | None) -> T:
        """Run an operation that begins something, and wait for replicas where they must have it. ``safe``: None: as the settings say.

        Raises:
            NotReplicated: too few of them have it.
        """
        side = self._side(safe)
        if side.replication is None:
            return await side.connection.run(begin())
        keys = self._home.keys(queue)
        return await side.connection.run(side.replication.confirmed(begin, keys, side.connection, what, ident))

    def store_sync(self, begin: Callable[[], Operation[T]], queue: str, what: str, ident: str, safe: bool | None) -> T:
        """:meth:`store` from blocking code."""
        side = self._sync_side(safe)
        if side.replication is None:
            return side.connection.run(begin())
        keys = self._home.keys(queue)
        return side.connection.run(side.replication.confirmed(begin, keys, side.connection, what, ident))

    async def call(self, command: Command[T]) -> T:
        """Send one command on this event loop's connection."""
        return await self._side(False).connection.call(command)

    def run_sync(self, operation: Operation[T]) -> T:
        """The same from blocking code."""
        return self._sync_side(False).connection.run(operation)

    async def aclose(self) -> None:
        """Close this event loop's connection; jobs still on their way get BrokerUnavailable."""
        import asyncio

        for sides in self._sides:
            side = sides.pop(asyncio.get_running_loop(), None)
            if side is not None:
                await side.close()

    def close(self) -> None:
        """Close the connection of blocking code."""
        for side in self._syncs:
            if side is not None:
                side.connection.close()


_forks = 0
"""How many forks this process is away from the one that imported this module; its pid would be a system call per job."""


def _forked() -> None:
    global _forks  # noqa: PLW0603 - there is one process
    _forks += 1


os.register_at_fork(after_in_child=_forked)

_GROUP = 2_000
"""Calls of a stream that are held at a time."""


Seal = Callable[[str, str, bytes], bytes]


def _sealed(call: Call, seal: Seal) -> Call:
    return call._replace(job=_sealed_job(call.job, call.queue, seal))


def _sealed_job(job: NewJob, queue: str, seal: Seal) -> NewJob:
    if job.once.on_duplicate == "replace":
        raise InvalidOption(
            "jobs are signed for their id (signing_keys): one cannot get the arguments of another (replace)"
        )
    return job._replace(envelope=seal(queue, job.id, job.envelope))


def _tagging(home: Home, calls: Sequence[Call]) -> Operation[None]:
    """Tags are written before the jobs that carry them."""
    by_queue: dict[str, list[tuple[str, Sequence[str], int]]] = {}
    for call in calls:
        by_queue.setdefault(call.queue, []).append((call.job.id, call.tags, call.job.delay_ms))
    for queue, tagged in by_queue.items():
        yield list(tagging(home.keys(queue), tagged))


def _by_target(calls: list[Call]) -> dict[tuple[str, int], list[Call]]:
    if not calls:
        return {}
    first = calls[0][:2]
    if all(call[:2] == first for call in calls):
        return {first: calls}
    groups: dict[tuple[str, int], list[Call]] = {}
    for call in calls:
        groups.setdefault((call.queue, call.priority), []).append(call)
    return groups


def _count(bulk: Bulk, calls: list[Call], refused: list[Refused], instead: dict[str, str]) -> None:
    if refused and refused[0].why == "closed":
        raise BatchClosed(
            f"batch {calls[0].job.id.partition('-')[0]} takes no more jobs: it was closed, cancelled or is gone"
        )
    bulk.total += len(calls)
    bulk.created += len(calls) - len(refused)
    full = next((refusal for refusal in refused if refusal.why == "full"), None)
    if full is not None:
        error = _full(calls[full.position])
        error.enqueued = bulk.created
        raise error
    for refusal in refused:
        call = calls[refusal.position]
        instead[call.job.id] = _existing(call, refusal)


def _full(call: Call) -> QueueFull:
    return QueueFull(
        f"queue {call.queue!r} has as many pending jobs as max_pending allows: job {call.job.id} was not stored; "
        "let more workers serve the queue, or raise max_pending"
    )


def _existing(call: Call, refused: Refused) -> str:
    """The id of the job that was there already.

    Raises:
        JobIdReused: that job has finished.
        DuplicateJob: the call wanted to be told so.
        QueueFull: there is no room for it.
    """
    if refused.why == "full":
        raise _full(call)
    if refused.why == "dead":
        raise JobIdReused(call.job.id, call.queue, "failed")
    if refused.why == "finished":
        state = state_of(refused.detail)
        raise JobIdReused(call.job.id, call.queue, state)
    if refused.why == "exists":
        return call.job.id
    holder = refused.detail.decode("utf-8", "replace")
    if call.strict and refused.why == "unique":
        raise DuplicateJob(call.job.unique.rpartition(":")[0], call.queue, holder)
    return holder


def _checked(home: Home) -> Endpoint:
    """Where Redis is; a connection to it is refused where the keys are of a release that this one does not know."""
    return home.endpoint()._replace(prefix=home.settings.prefix)


class _AsyncSide:
    """The connection and producer of one event loop."""

    def __init__(self, app: Home, replicated: bool) -> None:
        settings, endpoint = app.settings, _checked(app)
        self._app = self.home = app
        self.seal = app.sealer()
        self.forks = _forks
        self.replication = _replication(settings, replicated)
        self.connection = AsyncConnection.to(endpoint, **_timeouts(settings, self.replication))
        self.enqueuer = self._split() if endpoint.nodes else self._enqueuer()
        self.targets: dict[tuple[str, int], Target] = {}
        self.announced: set[str] = set()
        self.epoch = 0  # the connection of which ``announced`` is true

    def _enqueuer(self) -> AsyncEnqueuer:
        from fastq.broker.enqueuer import AsyncEnqueuer, ReplicatedEnqueuer

        timeout, limit = self._app.settings.enqueue_timeout, self._app.settings.enqueue_buffer
        if self.replication is None:
            return AsyncEnqueuer(self.connection, timeout=timeout, limit=limit)
        return ReplicatedEnqueuer(self.connection, self.replication, timeout=timeout, limit=limit)

    def _split(self) -> SplitEnqueuer:
        from fastq.broker.enqueuer import SplitEnqueuer

        return SplitEnqueuer(self._enqueuer)

    async def close(self) -> None:
        """End what is under way, and the connection."""
        await self.enqueuer.close()
        await self.connection.close()

    def target(self, queue: str, priority: int, batch: str = "") -> Target:
        target = Target(self._app.keys(queue), priority, self._app.bound(queue), batch)
        if not batch:
            self.targets[queue, priority] = target
        return target

    async def insist(self, target: Target, jobs: list[NewJob], refused: list[Refused]) -> list[Refused]:
        """Wait for room in a full queue, if that is what its callers do."""
        import asyncio

        if target.bound is None or target.bound.when_full != "wait":
            return refused
        steps = insist(jobs, refused, self._app.settings.enqueue_timeout)
        try:
            pause, again = next(steps)
            while True:
                await asyncio.sleep(pause)
                pause, again = steps.send(await self.enqueuer.submit(target, again))
        except StopIteration as end:
            final: list[Refused] = end.value
            return final

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


class _Part(NamedTuple):
    """What is under way to one queue: at most one call of the script."""

    target: Target
    calls: list[Call]
    jobs: list[NewJob]
    refused: Awaitable[list[Refused]]


class _Convoy:
    """The groups of one bulk: the next one is made while Redis takes the last one in."""

    def __init__(self, side: Callable[[bool | None], _AsyncSide], ids: bool, batch: str) -> None:
        self.bulk = Bulk()
        self._choose = side
        self._side = side(None)
        self._ids = ids
        self._batch = batch
        self._group: list[Call] = []
        self._parts: list[_Part] = []

    async def send(self, group: list[Call]) -> None:
        """Send a group, and see the one before it arrive."""
        import asyncio

        if group:  # all calls of a stream have the same options
            self._side = self._choose(group[0].replicated)
        if tagged := [call for call in group if call.tags]:
            await self._side.connection.run(_tagging(self._side.home, tagged))
        if self._side.seal is not None:
            group = [_sealed(call, self._side.seal) for call in group]
        parts = [part for key, calls in _by_target(group).items() for part in self._parts_of(*key, calls)]
        await asyncio.sleep(0)  # it leaves now
        try:
            await self.arrive()
        finally:
            self._group, self._parts = group, parts
        if any(part.target.bound is not None for part in parts):  # for those of the next group there may be no room
            await self.arrive()

    def _parts_of(self, queue: str, priority: int, calls: list[Call]) -> Iterator[_Part]:
        target, sent = self._side.target(queue, priority, self._batch), 0
        for jobs in chunks(call.job for call in calls):
            yield _Part(target, calls[sent : sent + len(jobs)], jobs, self._side.enqueuer.submit(target, jobs))
            sent += len(jobs)

    async def arrive(self) -> None:
        """Wait for the group that is under way, and count it."""
        instead: dict[str, str] = {}
        while self._parts:
            part = self._parts[0]
            refused = await part.refused
            if refused and any(each.why == "full" for each in refused):
                refused = await self._side.insist(part.target, part.jobs, refused)
            del self._parts[0]
            _count(self.bulk, part.calls, refused, instead)
            await self._side.announce(part.calls[0].queue)
        if self._ids:
            self.bulk.ids += [instead.get(call.job.id, call.job.id) for call in self._group]
        self._group = []

    def give_up(self) -> None:
        """After an error: what is under way is nobody's any more."""
        for part in self._parts:
            if isinstance(part.refused, Coroutine):
                part.refused.close()
            else:
                cast("asyncio.Future[list[Refused]]", part.refused).cancel()
        self._parts = []


class _SyncSide:
    """The connection of blocking code; every thread is a producer of its own."""

    def __init__(self, app: Home, replicated: bool) -> None:
        settings = app.settings
        self._app = app
        self._seal = app.sealer()
        self._timeout = settings.enqueue_timeout
        self.replication = _replication(settings, replicated)
        self.connection = SyncConnection.to(_checked(app), **_timeouts(settings, self.replication))
        self._local = threading.local()
        self._announced: set[tuple[int, str]] = set()

    def send(self, queue: str, priority: int, jobs: list[NewJob], batch: str = "") -> list[Refused]:
        sequence = getattr(self._local, "sequence", None)
        if sequence is None or self._local.forks != _forks:
            sequence = self._local.sequence = Numbers(self.connection.clock)
            self._local.forks = _forks
        if (seal := self._seal) is not None:
            jobs = [_sealed_job(job, queue, seal) for job in jobs]
        target = Target(self._app.keys(queue), priority, self._app.bound(queue), batch)
        refused = enqueue_sync(self.connection, sequence, target, jobs, self._timeout, self.replication)
        if target.bound is not None and target.bound.when_full == "wait":
            refused = self._insist(sequence, target, jobs, refused)
        key = (self.connection.connects, queue)
        if key not in self._announced:
            try:
                self.connection.call(_announcement(self._app, queue))
                self._announced.add(key)
            except BrokerError:
                pass  # see _AsyncSide.announce
        return refused

    def _insist(self, numbers: Numbers, target: Target, jobs: list[NewJob], refused: list[Refused]) -> list[Refused]:
        steps = insist(jobs, refused, self._timeout)
        try:
            pause, again = next(steps)
            while True:
                time.sleep(pause)
                pause, again = steps.send(
                    enqueue_sync(self.connection, numbers, target, again, self._timeout, self.replication)
                )
        except StopIteration as end:
            final: list[Refused] = end.value
            return final


def _replication(settings: Settings, replicated: bool) -> Replication | None:
    return Replication(settings.replicas, round(settings.replication_timeout * 1_000)) if replicated else None


def _timeouts(settings: Settings, replication: Replication | None) -> dict[str, float]:
    """The time that replicas are given comes on top: Redis keeps WAIT's answer back for so long."""
    more = replication.timeout_ms / 1_000 if replication is not None else 0.0
    connect = min(settings.connect_timeout, settings.enqueue_timeout)
    return {"connect_timeout": connect, "response_timeout": settings.enqueue_timeout + more}


def _announcement(app: Home, queue: str) -> Command[int]:
    """Of a partition, all of its queue: whoever serves it is to know of them before they have jobs."""
    whole = queue_of(queue)
    names = (queue,) if whole == queue else (whole, *app.spread(whole))
    return raw("SADD", GlobalKeys(app.settings.prefix).queues, *names, decode=int)
