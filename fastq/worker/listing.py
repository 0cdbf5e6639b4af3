"""Which partitions of its queues a worker serves: those of its own number, and those that others have announced."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastq.broker.command import Command, raw
from fastq.broker.connection import AsyncConnection
from fastq.broker.keys import GlobalKeys
from fastq.errors import BrokerError
from fastq.partitions import is_partition, queue_of
from fastq.worker.ticker import beat

if TYPE_CHECKING:
    from fastq.app import FastQ

__all__ = ["Listing"]

log = logging.getLogger("fastq.worker")

LOOK = 5.0
"""Seconds between two looks for partitions that this worker does not serve: somebody has changed their number."""

PATIENCE = 1.0
"""Seconds that a worker waits for the list before it begins without."""


class Listing:
    """The partitions that others have announced of this worker's queues, whatever number its own code says.

    A worker serves those that there are when it begins; when more of them appear, it is replaced.

    Args:
        app: is told what is announced (``listed``).
        connection: the worker's own; its turns use it at the same time.
        queues: that it serves.

    Attributes:
        unserved: what it has seen since, and does not serve.
    """

    def __init__(self, app: FastQ, connection: AsyncConnection, queues: Iterable[str]) -> None:
        self._app = app
        self._connection = connection
        self._queues = frozenset(queues)
        self._command: Command[Iterable[bytes]] = raw("SMEMBERS", GlobalKeys(app.settings.prefix).queues)
        self.unserved: list[str] = []

    async def learn(self) -> None:
        """Before the worker begins. A Redis that is away is no reason to wait: what it lists is found by a look."""
        try:
            async with asyncio.timeout(PATIENCE):
                listed = self._ours(await self._connection.call(self._command))
        except (BrokerError, TimeoutError):
            return
        own = {name for queue in self._queues for name in self._app.served(queue)}
        self._app.listed = listed
        if others := sorted(listed - own):
            numbers = {queue: self._app.partitions.get(queue, 1) for queue in sorted(set(map(queue_of, others)))}
            log.warning("partitions of another number", extra={"fields": {"served": others, "partitions": numbers}})

    async def run(self) -> None:
        """Look every ``LOOK`` seconds, until cancelled."""
        await asyncio.sleep(LOOK * random.random())
        while True:
            await beat()
            await self.look()
            await asyncio.sleep(LOOK)

    async def look(self) -> None:
        """Once. Never connects: after a loss the worker's loop does."""
        try:
            listed = await self._connection.finish(self._command, self._connection.send(self._command))
        except BrokerError:
            return
        served = {name for queue in self._queues for name in self._app.served(queue)}
        self.unserved = sorted(self._ours(listed) - served)

    def _ours(self, listed: Iterable[bytes]) -> frozenset[str]:
        names = (name.decode("utf-8", "replace") for name in listed)
        return frozenset(name for name in names if is_partition(name) and queue_of(name) in self._queues)
