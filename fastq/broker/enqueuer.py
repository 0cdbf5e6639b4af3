"""The asyncio producer: concurrent calls share round trips, and a lost reply never makes a second job."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import hiredis
import msgspec

from fastq.broker.calls import BATCH_BYTES, Numbers, Replication, Target, gave_up
from fastq.broker.command import Command
from fastq.broker.commands import BATCH, NewJob, Refused, confirm_replicas, enqueue
from fastq.broker.connection import AsyncConnection, is_noscript
from fastq.broker.greeting import error_of
from fastq.errors import BrokerUnavailable, FastQError, QueueFull

__all__ = ["AsyncEnqueuer", "ReplicatedEnqueuer", "SplitEnqueuer"]


PART = 125
"""Jobs that are enough for a call while others are under way."""
MOST_ALOFT = 4
"""Calls under way beyond which jobs wait for the next flight."""


class _Waiting(msgspec.Struct, eq=False):
    """Jobs of one caller on their way, at most one call's worth. (A Struct is made without a frame.)"""

    target: Target
    jobs: list[NewJob]
    future: asyncio.Future[list[Refused]]
    deadline: float
    size: int = 0
    """Bytes of their envelopes, where others may come along."""


class _Call(msgspec.Struct, eq=False):
    """One call of the script: the jobs in it, its number, and whether it is over.

    It waits for its own reply (see :class:`fastq.broker.command.Waiter`), and tells ``landed``: its callers hear of it in the same turn
    of the event loop.
    """

    target: Target
    members: list[_Waiting]
    landed: Callable[[_Call, Any], None]
    number: int
    command: Command[list[Refused]]
    over: bool = False
    doubt: bool = False
    """Whether it may have run."""

    done = staticmethod(bool)
    """False: the reply is wanted even when no caller waits for it any more. (A call without a frame.)"""

    def set_result(self, reply: Any) -> None:
        """The reply, or the error reply, is here."""
        self.landed(self, reply)

    def set_exception(self, error: Exception) -> None:
        """The connection is gone."""
        self.landed(self, error)

    def exception(self) -> None:
        """As of a future; there is nothing to read."""

    def settle(self, refusals: list[Refused]) -> None:
        """Tell every caller what was refused of its jobs."""
        self.over = True
        if not refusals:
            for member in self.members:
                if not member.future.done():
                    member.future.set_result([])
            return
        first = 0
        for member in self.members:
            last = first + len(member.jobs)
            if not member.future.done():
                own = [r._replace(position=r.position - first) for r in refusals if first <= r.position < last]
                member.future.set_result(own)
            first = last

    def fail(self, error: FastQError) -> None:
        """Tell every caller that its jobs were not accepted."""
        self.over = True
        for member in self.members:
            if not member.future.done():
                member.future.set_exception(error)

    def miss(self, replication: Replication, count: int, shown: str) -> None:
        """Tell every caller that too few replicas have its jobs."""
        self.over = True
        for member in self.members:
            if not member.future.done():
                member.future.set_exception(replication.missed(count, shown, member.jobs))

    def expire(self, now: float, error: FastQError) -> None:
        """Tell those whose time is up; the call is over when nobody waits for it any more."""
        for member in self.members:
            if member.deadline <= now and not member.future.done():
                member.future.set_exception(error)
        self.over = self.over or all(member.future.done() for member in self.members)


class AsyncEnqueuer:
    """The producer of one event loop.

    What is enqueued in one tick of the loop, and while a flight is under way, shares the next flight: a few calls in one
    write. Where nobody came along with the last flight, the next job leaves at once. As soon as :data:`PART` jobs wait they
    leave, also behind others over the same connection: Redis stores them while the next ones are made. Bounded: with
    ``limit`` jobs waiting, :meth:`submit` waits for room, and raises QueueFull at its deadline.

    Args:
        connection: used by this enqueuer alone; its ``response_timeout`` bounds a flight.
        timeout: seconds after which a job that Redis has not confirmed is given up with BrokerUnavailable.
        limit: most jobs waiting in this process.
    """

    _overlaps = True
    """Whether jobs may leave while others of the flight have not been answered."""

    def __init__(self, connection: AsyncConnection, *, timeout: float = 5.0, limit: int = 10_000) -> None:
        self._connection = connection
        self._timeout = timeout
        self._limit = limit
        self._shown = connection.endpoint.shown
        self._numbers = Numbers(connection.clock)
        self._queue: list[_Waiting] = []
        self._waiting = 0  # jobs in the queue
        self._flying = False
        self._boarding = False  # a flight that has not taken off; its first calls may have
        self._aloft = 0  # calls without a reply
        self._sound = False  # no call of this flight has failed so far
        self._epoch = 0  # the connection that this flight goes over
        self._alone = False  # nobody came along with the last one: the next one waits for nobody
        self._calls: list[_Call] = []
        self._room: asyncio.Event | None = None
        self._loop = asyncio.get_running_loop()
        self._repair: asyncio.Task[None] | None = None
        self.round_trips = 0

    def submit(self, target: Target, jobs: list[NewJob]) -> Awaitable[list[Refused]]:
        """Enqueue the jobs of one chunk (see :func:`chunks`); to be awaited for what was not created.

        Raises:
            BrokerUnavailable: not confirmed in time. BrokerOutOfMemory, BrokerReplyError: refused by Redis.
            QueueFull: no room in this process's buffer until the deadline.
        """
        deadline = self._loop.time() + self._timeout
        if self._alone and not self._flying and self._overlaps:
            return self._send_alone(target, jobs, deadline)
        if self._waiting >= self._limit:
            return self._submit_later(target, jobs, deadline)
        return self._enlist(target, jobs, deadline)

    def _send_alone(self, target: Target, jobs: list[NewJob], deadline: float) -> asyncio.Future[list[Refused]]:
        """As _board and _take_off, of one call. Its frames are what a lone caller waits for."""
        connection, number = self._connection, self._numbers.next()
        command = enqueue(
            target.keys, target.priority, self._numbers.producer, number, jobs, target.bound, target.batch
        )
        future: asyncio.Future[list[Refused]] = self._loop.create_future()
        call = _Call(target, [_Waiting(target, jobs, future, deadline)], self._landed, number, command)
        self._flying, self._calls, self._epoch = True, [call], connection.connects
        self._sound = connection.in_order
        self.round_trips += 1
        self._aloft = 1
        try:
            connection.post((command,), (call,))
        except BrokerUnavailable:  # there is no connection any more
            self._aloft, self._sound = 0, False
            self._start_repair()
        return future

    async def _submit_later(self, target: Target, jobs: list[NewJob], deadline: float) -> list[Refused]:
        await self._wait_for_room(deadline)
        return await self._enlist(target, jobs, deadline)

    def _enlist(self, target: Target, jobs: list[NewJob], deadline: float) -> asyncio.Future[list[Refused]]:
        future: asyncio.Future[list[Refused]] = self._loop.create_future()
        size = len(jobs[0].envelope) if len(jobs) == 1 else sum(len(job.envelope) for job in jobs)
        self._queue.append(_Waiting(target, jobs, future, deadline, size))
        self._waiting += len(jobs)
        if not self._flying:
            self._flying = True
            self._board()
        elif self._waiting >= PART and self._sound and self._aloft < MOST_ALOFT:
            self._send_off()
        return future

    async def _wait_for_room(self, deadline: float) -> None:
        while self._waiting >= self._limit:
            if self._room is None:
                self._room = asyncio.Event()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._room.wait()
            except TimeoutError:
                raise QueueFull(
                    f"this process has {self._waiting} jobs waiting to be sent and Redis takes none: "
                    f"no room within {self._timeout:g} s (enqueue_buffer={self._limit})"
                ) from None

    # -- a flight: callbacks only, no task on the way that works -----------------------------

    def _board(self) -> None:
        """Begin a flight; it takes off when the event loop has let everybody come who is about to."""
        self._boarding, self._calls = True, []
        self._begin_on(self._connection)
        self._loop.call_soon(self._take_off)

    def _begin_on(self, connection: AsyncConnection) -> None:
        self._sound = self._overlaps and connection.in_order and connection.connected
        self._epoch = connection.connects

    def _take_off(self) -> None:
        self._boarding = False
        if self._aloft:
            if self._queue and self._sound:
                self._send_off()
        elif not all(call.over for call in self._calls):
            self._start_repair()
        elif not self._queue:
            self._next_flight()  # they have gone, and are back already
        elif self._connection.connected:
            self._begin_on(self._connection)
            self._send(self._taken())
        else:
            self._taken()
            self._start_repair()

    def _send_off(self) -> None:
        """Send what waits behind the calls that are under way, over the same connection."""
        connection = self._connection
        if connection.connected and connection.connects == self._epoch:
            self._send(self._taken())
        else:  # those under way may have to be sent again, and no newer one may overtake them
            self._sound = False

    def _taken(self) -> list[_Call]:
        """What waits, as calls of this flight."""
        members, self._queue, self._waiting = self._queue, [], 0
        if self._room is not None:
            self._room.set()
            self._room = None
        calls = list(self._group(members))
        self._calls = [call for call in self._calls if not call.over] + calls
        return calls

    def _group(self, members: list[_Waiting]) -> Iterator[_Call]:
        by_target: dict[Target, list[_Waiting]] = {}
        if len(members) == 1:
            by_target[members[0].target] = members
        else:
            for member in members:
                by_target.setdefault(member.target, []).append(member)
        for target, group in by_target.items():
            count, size, first = 0, 0, 0
            for index, member in enumerate(group):
                if count and (count + len(member.jobs) > BATCH or size + member.size > BATCH_BYTES):
                    yield self._call(target, group[first:index])
                    count, size, first = 0, 0, index
                count += len(member.jobs)
                size += member.size
            yield self._call(target, group[first:])

    def _call(self, target: Target, members: list[_Waiting]) -> _Call:
        return _Call(target, members, self._landed, *self._numbered(target, members))

    def _numbered(self, target: Target, members: list[_Waiting]) -> tuple[int, Command[list[Refused]]]:
        jobs = members[0].jobs if len(members) == 1 else [job for member in members for job in member.jobs]
        number, (keys, priority, bound, batch) = self._numbers.next(), target
        return number, enqueue(keys, priority, self._numbers.producer, number, jobs, bound, batch)

    def _renumber(self, call: _Call) -> None:
        """Give a call a new number: right after an error reply only, which says that the call did not run."""
        call.number, call.command = self._numbered(call.target, call.members)

    def _send(self, calls: list[_Call]) -> None:
        self.round_trips += 1
        self._aloft += len(calls)
        try:
            self._connection.post([call.command for call in calls], calls)
        except BrokerUnavailable:
            self._aloft -= len(calls)
            self._sound = False
            if not self._aloft and not self._boarding:
                self._start_repair()

    def _landed(self, call: _Call, reply: Any) -> None:
        if not isinstance(reply, Exception):
            call.settle(call.command.decode(reply))
        else:
            self._sound = False
            if isinstance(reply, hiredis.ReplyError):
                if is_noscript(reply) or isinstance(error := error_of(reply, self._shown), BrokerUnavailable):
                    self._renumber(call)
                else:
                    call.fail(error)
            else:
                call.doubt = True
        self._aloft -= 1
        if self._aloft or self._boarding:
            return
        if all(call.over for call in self._calls):
            self._next_flight()
        else:
            self._start_repair()

    def _next_flight(self) -> None:
        if self._queue:
            self._alone = False
            self._board()
        else:
            self._alone = len(self._calls) == 1 and len(self._calls[0].members) == 1
            self._flying, self._sound, self._calls = False, False, []

    # -- the rare ways: first connect, lost connection, unknown script ------------------------

    def _start_repair(self) -> None:
        self._repair = self._loop.create_task(self._finish_flight())

    async def _finish_flight(self) -> None:
        try:
            await self._retry_flight()
        finally:  # also when it was cancelled: nobody may wait for ever
            for call in self._calls:
                if not call.over:
                    call.fail(BrokerUnavailable(f"the producer for {self._shown} ended before Redis confirmed the job"))
            self._next_flight()

    async def _retry_flight(self) -> None:
        """Bring the open calls of this flight to an end, whatever it takes until their deadlines.

        In the order of their numbers: a call whose reply was lost may only be repeated before any newer one runs.
        """
        pause = 0.02
        while open_calls := sorted((call for call in self._calls if not call.over), key=lambda call: call.number):
            try:
                for call in open_calls:
                    await self._resend(call)
            except BrokerUnavailable as error:
                self._give_up_late(open_calls, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.5)

    async def _resend(self, call: _Call) -> None:
        soonest = min(member.deadline for member in call.members)
        try:
            async with asyncio.timeout_at(max(soonest, self._loop.time() + 0.05)):
                await self._connection.connect()
                await self._ask(call)
        except TimeoutError:
            self._connection.drop("no reply before the deadline", call.command)
            raise BrokerUnavailable(f"no reply from {self._shown}") from None
        except BrokerUnavailable:
            raise
        except FastQError as error:
            call.fail(error)

    async def _ask(self, call: _Call) -> None:
        try:
            await self._carry_out(call)
        except BaseException as error:
            call.doubt = call.doubt or not getattr(error, "refused", False)
            raise

    async def _carry_out(self, call: _Call) -> None:
        call.settle(await self._connection.call(call.command))

    def _give_up_late(self, calls: list[_Call], cause: BrokerUnavailable) -> None:
        now = self._loop.time()
        for call in calls:
            call.expire(now, gave_up(cause, self._timeout, doubt=call.doubt))
        late = [member for member in self._queue if member.deadline <= now]
        self._queue = [member for member in self._queue if member.deadline > now]
        self._waiting = sum(len(member.jobs) for member in self._queue)
        for member in late:
            if not member.future.done():
                member.future.set_exception(gave_up(cause, self._timeout, doubt=False))

    async def close(self) -> None:
        """Stop; jobs still waiting get BrokerUnavailable."""
        if self._repair is not None and not self._repair.done():
            self._repair.cancel()
        error = BrokerUnavailable("the producer was closed before Redis confirmed the job")
        for call in self._calls:
            call.fail(error)
        for member in self._queue:
            if not member.future.done():
                member.future.set_exception(error)
        self._queue, self._waiting = [], 0
        await self._connection.close()


class ReplicatedEnqueuer(AsyncEnqueuer):
    """A producer whose callers wait until replicas have their jobs, too: one WAIT per call of the script.

    Args:
        connection, timeout, limit: as of :class:`AsyncEnqueuer`; the time for the replicas comes on top.
        replication: how many, and for how long they are waited for.
    """

    _overlaps = False

    def __init__(
        self, connection: AsyncConnection, replication: Replication, *, timeout: float = 5.0, limit: int = 10_000
    ) -> None:
        super().__init__(connection, timeout=timeout + replication.timeout_ms / 1_000, limit=limit)
        self._replication = replication

    def _send(self, calls: list[_Call]) -> None:  # noqa: ARG002 - all there are, as none follows
        self._start_repair()  # call by call: what WAIT says is true of what has been answered before

    async def _carry_out(self, call: _Call) -> None:
        connection, replication = self._connection, self._replication
        await connection.connect()
        epoch = connection.connects
        refused = await connection.call(call.command)
        call.doubt = True
        count: int = (await connection.call_many(confirm_replicas(call.target.keys, *replication)))[1]
        if connection.connects != epoch:  # perhaps of another master, which may not have the job: once more
            raise BrokerUnavailable(f"the connection to {self._shown} was lost")
        if count >= replication.replicas:
            call.settle(refused)
        else:
            call.miss(replication, count, self._shown)


class SplitEnqueuer:
    """A producer for each queue behind the same calls: in a cluster, one node that is away keeps no other's jobs back."""

    def __init__(self, make: Callable[[], AsyncEnqueuer]) -> None:
        self._make = make
        self._each: dict[str, AsyncEnqueuer] = {}

    def submit(self, target: Target, jobs: list[NewJob]) -> Awaitable[list[Refused]]:
        """As :meth:`AsyncEnqueuer.submit`."""
        enqueuer = self._each.get(target.keys.base)
        if enqueuer is None:
            enqueuer = self._each[target.keys.base] = self._make()
        return enqueuer.submit(target, jobs)

    async def close(self) -> None:
        """As :meth:`AsyncEnqueuer.close`."""
        for enqueuer in self._each.values():
            await enqueuer.close()
