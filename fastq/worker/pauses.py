"""How a worker learns of paused tasks: before it takes its first job, and once a second.

One command per queue and second, whatever is paused; what that means for jobs is the turnstile's part.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from fastq.broker.connection import AsyncConnection
from fastq.broker.keys import QueueKeys
from fastq.broker.pauses import paused
from fastq.errors import BrokerError
from fastq.worker.ticker import beat
from fastq.worker.turnstile import Turnstile

__all__ = ["LOOK", "Pauses"]

LOOK = 2
"""Beats (of half a second) between two looks: how long a pause may take to be in force."""


class Served(Protocol):
    """A queue that this worker serves."""

    @property
    def keys(self) -> QueueKeys:
        """The names of its keys."""
        ...


class Pauses:
    """Looks for paused tasks, over the worker's own connection, and tells its turnstile."""

    def __init__(self, connection: AsyncConnection, lanes: Iterable[Served], turnstile: Turnstile) -> None:
        self._connection = connection
        self._lanes = lanes
        self._turnstile = turnstile

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            for _ in range(LOOK):
                await beat()
            try:
                await self.look()
            except BrokerError:
                pass  # the loop says it, and connects again

    async def look(self) -> None:
        """Once. Never connects: after a loss the worker's loop does."""
        for lane in self._lanes:
            command = paused(lane.keys)
            found = await self._connection.finish(command, self._connection.send(command))
            self._turnstile.pause(lane.keys.queue, found)
