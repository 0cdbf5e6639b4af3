"""How a worker learns that a job it holds was cancelled: it is told while it rests (waker.py), and looks into Redis twice a second
while it holds any job, should it be busy or the token be lost.

The request lies in the queue's ``cancels`` hash until the job has ended, so nothing depends on this worker being told:
``settle.lua`` and ``recover.lua`` end a cancelled job instead of letting it run again. Looking is one command per queue
and half second when nobody cancels, whatever the number of jobs, and none while the worker is idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from fastq.broker.command import Command, raw
from fastq.broker.connection import AsyncConnection
from fastq.broker.keys import QueueKeys
from fastq.context import JobContext
from fastq.errors import BrokerError
from fastq.worker.ticker import beat

__all__ = ["Cancels"]


class Holding(Protocol):
    """A queue and the jobs that this worker holds in it."""

    @property
    def keys(self) -> QueueKeys:
        """The names of its keys."""
        ...

    @property
    def held(self) -> Mapping[str, JobContext | None]:
        """Job id -> the job, None where there is nothing to run."""
        ...


class Cancels:
    """Looks for requests.

    Args:
        connection: the worker's own; its turns use it at the same time.
        lanes: what the worker holds.
        stop: called with a job and whether to interrupt it, perhaps more than once.
    """

    def __init__(
        self, connection: AsyncConnection, lanes: Iterable[Holding], stop: Callable[[JobContext, bool], None]
    ) -> None:
        self._connection = connection
        self._lanes = lanes
        self._stop = stop

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await beat()  # so long a running job may take to be told by a worker that does not rest
            try:
                await self.look()
            except BrokerError:
                pass  # the loop says it, and connects again

    async def look(self) -> None:
        """Once: tell the jobs that were cancelled."""
        for lane in self._lanes:
            if lane.held and await self._ask("EXISTS", lane.keys.cancels):
                await self._tell(lane)

    async def _tell(self, lane: Holding) -> None:
        ids = [job_id for job_id, job in lane.held.items() if job is not None]
        requests = await self._ask("HMGET", lane.keys.cancels, *ids) if ids else []
        for job_id, request in zip(ids, requests, strict=True):
            job = lane.held.get(job_id)
            if request is not None and job is not None:
                self._stop(job, request[:1] == b"t")

    async def _ask(self, *words: Any) -> Any:
        """Never connects: after a loss the worker's loop does, and finds out first what it still holds."""
        command: Command[Any] = raw(*words)
        return await self._connection.finish(command, self._connection.send(command))
