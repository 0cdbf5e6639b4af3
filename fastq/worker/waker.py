"""How an idle worker waits: a blocking pop on the wake lists, with the next reserve already behind it in Redis.

Redis keeps the commands that follow a blocking pop on its connection and runs them the moment the pop ends. So the
token and the jobs come in one reply: from enqueue to handler one round trip less than to be woken and then to ask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from fastq.broker.commands import Command, Reserved, raw, reserve
from fastq.broker.connection import AsyncConnection
from fastq.errors import BrokerError
from fastq.worker.lane import Lane

__all__ = ["RESERVE_MOST", "Waker"]

IDLE_WAIT = 2.0
"""Longest blocking pop on the wake lists: an idle worker costs Redis one command a second."""

RESERVE_MOST = 2_000
"""Jobs of one reserve."""


class Waker:
    """Waits on the wake lists while the loop has nothing to do.

    The jobs that come here are held by the worker like all others. The counts that the loop compares after every turn
    can differ while a reserve of this connection is on its way (``armed``) or has come meanwhile (``arrivals``); a lane
    in doubt therefore waits with the pop alone.

    Args:
        connection: for this waker alone.
        lanes: the worker's queues.
        ask: the worker's id and how many jobs it has room for; an empty id: it takes nothing now.
        arrived: is given what a lane's reserve brought, out of how many it asked for; None: the lane is worth a look.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        lanes: Sequence[Lane],
        ask: Callable[[], tuple[str, int]],
        arrived: Callable[[Lane, Reserved | None, int], None],
    ) -> None:
        self._connection = connection
        self._lanes = lanes
        self._by_list = {lane.keys.wake: lane for lane in lanes}
        self._ask = ask
        self._arrived = arrived
        self._waiting = asyncio.Event()
        self.armed = False
        self.arrivals = 0

    def wait(self) -> None:
        """The loop sleeps now: wait for what is to wake it. Does nothing while that goes on already."""
        self._waiting.set()

    def drop(self, why: str) -> None:
        """Close the connection: nothing more is taken through it."""
        self._connection.drop(why)

    async def close(self) -> None:
        """Close for good."""
        await self._connection.close()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._waiting.wait()
            self._waiting.clear()
            worker, room = self._ask()
            if not worker:
                continue
            ask = min(room // len(self._lanes), RESERVE_MOST)
            try:
                if ask and not any(lane.doubt for lane in self._lanes):
                    await self._pop_and_reserve(worker, ask)
                else:
                    await self._pop()
            except BrokerError:
                for lane in self._lanes:
                    lane.doubt = True
                self._look(self._lanes)  # jobs may have come with the reply that was lost
                await asyncio.sleep(0.5)

    async def _pop_and_reserve(self, worker: str, ask: int) -> None:
        pop: Command[Any] = raw("BLPOP", *self._by_list, IDLE_WAIT)
        self.armed = True
        try:
            replies = await self._connection.call_many(
                [pop, *(reserve(lane.keys, worker, ask) for lane in self._lanes)]
            )
        finally:
            self.armed = False
            self.arrivals += 1
        for lane, reserved in zip(self._lanes, replies[1:], strict=True):
            self._arrived(lane, reserved, ask)

    async def _pop(self) -> None:
        popped: list[bytes] | None = await self._connection.call(raw("BLPOP", *self._by_list, IDLE_WAIT))
        self._look(self._lanes if popped is None else (self._by_list[popped[0]],))
        if popped is not None and self._ask()[1] < 1:  # filled up meanwhile: the token is for somebody else
            await self._connection.call(raw("RPUSH", popped[0], "1"))

    def _look(self, lanes: Sequence[Lane]) -> None:
        for lane in lanes:
            self._arrived(lane, None, 0)
