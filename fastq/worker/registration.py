"""A worker's name in Redis: its lease in each of its queues, and the card that says what it is and whether it takes jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from msgspec.structs import replace

from fastq.broker.commands import announce, describe, register
from fastq.broker.connection import AsyncConnection
from fastq.broker.keys import GlobalKeys
from fastq.broker.schema import agree
from fastq.config import Settings
from fastq.errors import BrokerError
from fastq.job import WorkerCard, encode
from fastq.worker.pauses import Served
from fastq.worker.ticker import beat

__all__ = ["Registration"]


class Registration:
    """Over the worker's own connection.

    Args:
        connection, settings: the worker's.
        lanes: its queues.
        card: what it says of itself.
        now: its id (an empty one: it has no lease), and its state: ``running``, ``quiet`` or ``draining``.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        settings: Settings,
        lanes: Sequence[Served],
        card: WorkerCard,
        now: Callable[[], tuple[str, str]],
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._lanes = lanes
        self._card = card
        self._now = now

    async def agree(self) -> None:
        """Make sure that the keys are of a version that this release knows: before anything is touched, by anybody for this worker.

        Raises SchemaMismatch, BrokerError.
        """
        await self._connection.run(agree(self._settings.prefix))

    async def begin(self, worker_id: str) -> None:
        """This incarnation may take jobs from now on. Raises BrokerError; may be repeated."""
        self._card = replace(self._card, state=self._now()[1])
        lease_ms, card = round(self._settings.lease * 1_000), encode(self._card)
        for lane in self._lanes:
            await self._connection.call(register(lane.keys, worker_id, lease_ms, card))
            await self._connection.call(announce(GlobalKeys(self._settings.prefix).queues, lane.keys.queue))

    async def run(self) -> None:
        """Let operators see that it takes nothing new, or again. Until cancelled."""
        while True:
            await beat()
            with suppress(BrokerError):  # the loop says it, and connects again; told at the next beat
                await self._tell()

    async def _tell(self) -> None:
        worker_id, state = self._now()
        if not worker_id or state == self._card.state:
            return
        card = replace(self._card, state=state)
        for lane in self._lanes:
            command = describe(lane.keys, worker_id, encode(card))
            await self._connection.finish(command, self._connection.send(command))
        self._card = card
