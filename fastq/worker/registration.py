"""A worker's name in Redis: its lease in each of its queues, and the card that says what it is and whether it takes jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec.structs import replace

from fastq.broker.commands import announce, describe, register
from fastq.broker.connection import AsyncConnection
from fastq.broker.keys import GlobalKeys, QueueKeys
from fastq.broker.schema import agree
from fastq.config import Settings
from fastq.job import WorkerCard, encode

__all__ = ["Registration"]


class Served(Protocol):
    """A queue that this worker serves."""

    @property
    def keys(self) -> QueueKeys:
        """The names of its keys."""
        ...


class Registration:
    """Over the worker's own connection; each call raises BrokerError and may be repeated."""

    def __init__(
        self, connection: AsyncConnection, settings: Settings, lanes: Sequence[Served], card: WorkerCard
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._lanes = lanes
        self._card = card

    async def begin(self, worker_id: str, state: str) -> None:
        """This incarnation may take jobs from now on."""
        await self._connection.run(agree(self._settings.prefix))  # before anything is touched
        self._card = replace(self._card, state=state)
        lease_ms, card = round(self._settings.lease * 1_000), encode(self._card)
        for lane in self._lanes:
            await self._connection.call(register(lane.keys, worker_id, lease_ms, card))
            await self._connection.call(announce(GlobalKeys(self._settings.prefix).queues, lane.keys.queue))

    async def tell(self, worker_id: str, state: str) -> None:
        """Let operators see that it takes nothing new, or again; nothing to do when they know."""
        if state == self._card.state:
            return
        card = replace(self._card, state=state)
        for lane in self._lanes:
            await self._connection.call(describe(lane.keys, worker_id, encode(card)))
        self._card = card
