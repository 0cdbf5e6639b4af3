"""In which order jobs were enqueued: of those of one millisecond, Redis does not know."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any

from fastq.handle import Bulk, JobHandle
from fastq.sender import Home, Sender
from fastq.task import Call

__all__ = ["OrderedSender"]


class OrderedSender(Sender):
    """Sends as any other, and notes which came first."""

    def __init__(self, home: Home) -> None:
        super().__init__(home)
        self.order: dict[str, int] = {}
        """Job id -> its number. What others enqueue (a schedule, a workflow that goes on) is not in here."""

    def _note(self, call: Call) -> Call:
        self.order.setdefault(call.job.id, len(self.order))
        return call

    async def _note_each(self, calls: AsyncIterable[Call]) -> AsyncIterator[Call]:
        async for call in calls:
            yield self._note(call)

    async def send(self, call: Call) -> JobHandle[Any]:
        """As :class:`fastq.sender.Sender`."""
        return await super().send(self._note(call))

    def send_sync(self, call: Call) -> JobHandle[Any]:
        """As :class:`fastq.sender.Sender`."""
        return super().send_sync(self._note(call))

    async def send_many(self, calls: Iterable[Call] | AsyncIterable[Call], *, ids: bool, batch: str = "") -> Bulk:
        """As :class:`fastq.sender.Sender`."""
        noted = self._note_each(calls) if isinstance(calls, AsyncIterable) else map(self._note, calls)
        return await super().send_many(noted, ids=ids, batch=batch)

    def send_many_sync(self, calls: Iterable[Call], *, ids: bool, batch: str = "") -> Bulk:
        """As :class:`fastq.sender.Sender`."""
        return super().send_many_sync(map(self._note, calls), ids=ids, batch=batch)
