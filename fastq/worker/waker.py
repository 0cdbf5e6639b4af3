"""How an idle worker waits: a blocking pop on the wake lists, with the next reserve already behind it in Redis.

Redis keeps the commands that follow a blocking pop on its connection and runs them the moment the pop ends. So the
token and the jobs come in one reply: from enqueue to handler one round trip less than to be woken and then to ask.

It listens to a list of its own in each queue as well: a token there is for this worker alone, as a job that it holds was
cancelled (``cancel.lua``). A token in a wake list is for whoever has room. A worker that has none puts it back, and is deaf to those
lists until it has; a token of its own ends the pop that does not hear them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from fastq.broker.command import Command, Packed, raw
from fastq.broker.commands import Reserved, reserve
from fastq.broker.connection import AsyncConnection, pack
from fastq.errors import BrokerError
from fastq.worker.lane import Lane

__all__ = ["RESERVE_MOST", "Waker", "Wakers"]

IDLE_WAIT = 2.0
"""Longest blocking pop on the wake lists: an idle worker costs Redis one command a second."""

RESERVE_MOST = 2_000
"""Jobs of one reserve."""

Arrived = Callable[[Lane, Reserved | None, int], bool]

TOKEN_MS = 60_000
"""How long a token lies in a worker's own list, should the worker be gone; as in include/wake_holder.lua."""


class _Round:
    """A pop and the reserves behind it, on their way.

    What these bring is taken in the moment it is read; a coroutine that waits for it would be a turn of the event loop later. The
    coroutine hears of the end of it all, by a future with the bare reply of the pop, and sees to what was ``refused``.
    """

    __slots__ = ("again", "arrived", "ask", "due", "pop", "popped", "refused")

    def __init__(self, arrived: Arrived, ask: int, due: int) -> None:
        self.arrived = arrived
        self.ask = ask
        self.due = due  # replies
        self.again = True  # the loop sleeps on
        self.pop: Any = None
        self.popped: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.refused: list[tuple[Lane, Command[Any], Any]] = []


class _Reply:
    """Waits for the reply of one command of a round (see :class:`fastq.broker.command.Waiter`)."""

    __slots__ = ("_command", "_lane", "_round")

    def __init__(self, round_: _Round, lane: Lane | None, command: Command[Any]) -> None:
        self._round = round_
        self._lane = lane
        self._command = command

    done = staticmethod(bool)
    """False: all are counted. (A call without a frame.)"""

    def set_result(self, reply: Any) -> None:
        """The reply, or the error reply."""
        round_, lane = self._round, self._lane
        if round_.popped.done():  # nobody waits any more: the worker leaves
            return
        if lane is None:
            round_.pop = reply
        elif isinstance(reply, Exception):
            round_.refused.append((lane, self._command, reply))
        else:
            try:
                if not round_.arrived(lane, self._command.decode(reply), round_.ask):
                    round_.again = False
            except Exception as error:  # noqa: BLE001 - of the worker, which ends of it; not of the protocol that calls this
                round_.popped.set_exception(error)
                return
        round_.due -= 1
        if not round_.due:
            round_.popped.set_result(round_.pop)

    def set_exception(self, error: Exception) -> None:
        """The connection is gone."""
        if not self._round.popped.done():
            self._round.popped.set_exception(error)

    def exception(self) -> None:
        """As of a future; there is nothing to read."""


class Waker:
    """Waits on the wake lists while the loop has nothing to do.

    The jobs that come here are held by the worker like all others. The counts that the loop compares after every turn
    can differ while a reserve of this connection is on its way (``armed``) or has come meanwhile (``arrivals``); a lane
    in doubt therefore waits with the pop alone.

    Args:
        connection: for this waker alone.
        own: the worker's other connection, which nothing blocks.
        lanes: the worker's queues.
        ask: the worker's id and how many jobs it has room for; an empty id: it takes nothing now.
        arrived: is given what a lane's reserve brought, out of how many it asked for; None: the lane is worth a look. Tells whether
            the loop sleeps on.
        called: told that there was a token for this worker alone.
        share: among how many queues of the worker its room is divided.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        own: AsyncConnection,
        lanes: Sequence[Lane],
        ask: Callable[[], tuple[str, int]],
        arrived: Arrived,
        called: Callable[[], Coroutine[Any, Any, None]],
        share: int,
    ) -> None:
        self._connection = connection
        self._share = share
        self._own = own
        self._lanes = lanes
        self._by_list = {lane.keys.wake: lane for lane in lanes}
        self._ask = ask
        self._arrived = arrived
        self._called = called
        self._waiting = asyncio.Event()
        self._deaf = False
        self._poking: asyncio.Task[None] | None = None
        self.armed = False
        self.arrivals = 0
        self._asked: tuple[str, int] = ("", 0)
        self._asking: list[tuple[Lane | None, Command[Any]]] = []

    def wait(self) -> None:
        """The loop sleeps now: wait for what is to wake it. Does nothing while that goes on already."""
        self._waiting.set()
        if not self._deaf:
            return
        worker, room = self._ask()
        if room > 0 and self._own.connected:  # else the worker's loop connects, and it has to find out things first
            self._deaf = False
            self._poking = asyncio.create_task(self._poke(self._lanes[0].keys.wake_of(worker)))

    async def _poke(self, own: bytes) -> None:
        """There is room again: end the pop that does not hear of jobs."""
        with suppress(BrokerError):  # then it ends within IDLE_WAIT by itself
            await self._own.call_many([raw("RPUSH", own, "1"), raw("PEXPIRE", own, TOKEN_MS)])

    def drop(self, why: str) -> None:
        """Close the connection: nothing more is taken through it."""
        self._connection.drop(why)

    async def close(self) -> None:
        """Close for good."""
        await self._connection.close()

    async def run(self) -> None:
        """Until cancelled."""
        again = False
        while True:
            if not again:
                await self._waiting.wait()
            again = False
            self._waiting.clear()
            worker, room = self._ask()
            if not worker:
                continue
            ask = min(room // self._share, RESERVE_MOST)
            try:
                if ask and not any(lane.doubt for lane in self._lanes):
                    again = await self._pop_and_reserve(worker, ask)
                else:
                    await self._pop(worker)
            except BrokerError:
                for lane in self._lanes:
                    lane.doubt = True
                self._look(self._lanes)  # jobs may have come with the reply that was lost
                await asyncio.sleep(0.5)

    def _block(self, worker: str) -> Command[list[bytes] | None]:
        heard = () if self._deaf else self._by_list
        return raw("BLPOP", *heard, *(lane.keys.wake_of(worker) for lane in self._lanes), IDLE_WAIT)

    async def _pop_and_reserve(self, worker: str, ask: int) -> bool:
        """Whether the loop has slept on: then it is waited for the next ones at once."""
        self._deaf = False
        self.armed = True
        if self._asked != (worker, ask):
            self._asked = (worker, ask)
            self._asking = [(None, _packed(self._block(worker)))]
            self._asking += [(lane, reserve(lane.keys, worker, ask)) for lane in self._lanes]
        round_ = _Round(self._arrived, ask, len(self._asking))
        try:
            await self._carry_out(round_)
        finally:  # a little late; until here its loop would take what has come for what is on its way
            self.armed = False
            self.arrivals += 1
        if round_.pop is not None and round_.pop[0] not in self._by_list:
            await self._called()
        return round_.again

    async def _carry_out(self, round_: _Round) -> None:
        """What the reserves have brought has arrived when this is over."""
        connection = self._connection
        if not connection.connected:
            await connection.connect()
        waiters = [_Reply(round_, lane, command) for lane, command in self._asking]
        connection.post([command for _, command in self._asking], waiters)
        round_.pop = await connection.finish(self._asking[0][1], round_.popped)
        for lane, command, reply in round_.refused:
            answered = asyncio.get_running_loop().create_future()
            answered.set_result(reply)
            if not self._arrived(lane, await connection.finish(command, answered), round_.ask):
                round_.again = False

    async def _pop(self, worker: str) -> None:
        popped = await self._connection.call(self._block(worker))
        if popped is not None and popped[0] not in self._by_list:
            self._look(self._lanes)
            await self._called()
            return
        self._look(self._lanes if popped is None else (self._by_list[popped[0]],))
        if popped is not None and self._ask()[1] < 1:  # filled up meanwhile: the token is for somebody else
            self._deaf = True
            await self._connection.call_many([raw("RPUSH", popped[0], "1"), raw("LTRIM", popped[0], 0, 0)])

    def _look(self, lanes: Sequence[Lane]) -> None:
        for lane in lanes:
            self._arrived(lane, None, 0)


def _packed(command: Command[Any]) -> Command[Any]:
    """The same command, to be sent again and again: its bytes are made here."""
    return Packed(command.script, command.keys, lambda: command.args, command.decode, pack(command))


class Wakers:
    """The waker of a worker: one for all of its queues; one for each in a cluster, where a pop serves the queues of one slot.

    Args:
        connection: for blocking pops; it is split if need be.
        own, lanes, ask, arrived, called: as of :class:`Waker`.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        own: AsyncConnection,
        lanes: Sequence[Lane],
        ask: Callable[[], tuple[str, int]],
        arrived: Arrived,
        called: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        links = connection.split(len(lanes))
        parts = [lanes] if len(links) == 1 else [[lane] for lane in lanes]
        self._each = [
            Waker(link, own, part, ask, arrived, called, len(lanes)) for link, part in zip(links, parts, strict=True)
        ]

    @property
    def armed(self) -> bool:
        """Whether a reserve of one of them is on its way."""
        return any(waker.armed for waker in self._each)

    @property
    def arrivals(self) -> int:
        """How many such reserves have come."""
        return sum([waker.arrivals for waker in self._each])

    def wait(self) -> None:
        """As of each."""
        for waker in self._each:
            waker.wait()

    def drop(self, why: str) -> None:
        """As of each."""
        for waker in self._each:
            waker.drop(why)

    async def run(self) -> None:
        """Until cancelled."""
        await asyncio.gather(*(waker.run() for waker in self._each))

    async def close(self) -> None:
        """Close the connections for good."""
        for waker in self._each:
            await waker.close()
