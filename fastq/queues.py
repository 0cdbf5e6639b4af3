"""The queues of an application: how long they are, pause and resume, purge."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastq.broker.commands import Operation

if TYPE_CHECKING:
    from fastq.broker.inspector import Inspector, QueueInfo

__all__ = ["Queues"]

T = TypeVar("T")


class Asker(Protocol):
    """Who runs the operations: the application."""

    @property
    def inspector(self) -> Inspector:
        """The operations."""
        ...

    def default_queue(self) -> str:
        """The queue that is meant when none is named."""
        ...

    def run(self, operation: Operation[T]) -> Coroutine[Any, Any, T]:
        """Run one on this event loop's connection."""
        ...

    def run_sync(self, operation: Operation[T]) -> T:
        """Run one from blocking code."""
        ...


class Queues:
    """The queues of an application. Every method has a ``_sync`` twin; ``queue`` is ``default_queue`` unless given.

    Raises InvalidQueueName (a name that cannot be one) and BrokerError.
    """

    def __init__(self, app: Asker) -> None:
        self._app = app

    async def info(self, queue: str | None = None) -> QueueInfo | None:
        """What there is in a queue: pending, scheduled, parked, running, dead, paused …; None: nobody ever used it."""
        return await self._app.run(self._app.inspector.queue(queue or self._app.default_queue()))

    def info_sync(self, queue: str | None = None) -> QueueInfo | None:
        """:meth:`info` from blocking code."""
        return self._app.run_sync(self._app.inspector.queue(queue or self._app.default_queue()))

    async def length(self, queue: str | None = None) -> int:
        """Pending jobs: those that would run now if a worker had room."""
        return _pending(await self.info(queue))

    def length_sync(self, queue: str | None = None) -> int:
        """:meth:`length` from blocking code."""
        return _pending(self.info_sync(queue))

    async def pause(self, queue: str | None = None) -> bool:
        """Let workers take nothing more from it; what runs goes on. False: it was paused already."""
        return await self._app.run(self._app.inspector.pause(queue or self._app.default_queue()))

    def pause_sync(self, queue: str | None = None) -> bool:
        """:meth:`pause` from blocking code."""
        return self._app.run_sync(self._app.inspector.pause(queue or self._app.default_queue()))

    async def resume(self, queue: str | None = None) -> bool:
        """Undo :meth:`pause`. False: it was not paused."""
        return await self._app.run(self._app.inspector.resume(queue or self._app.default_queue()))

    def resume_sync(self, queue: str | None = None) -> bool:
        """:meth:`resume` from blocking code."""
        return self._app.run_sync(self._app.inspector.resume(queue or self._app.default_queue()))

    async def purge(self, queue: str | None = None) -> int:
        """Delete its pending, scheduled and parked jobs, for good. Returns how many."""
        return await self._app.run(self._app.inspector.purge(queue or self._app.default_queue()))

    def purge_sync(self, queue: str | None = None) -> int:
        """:meth:`purge` from blocking code."""
        return self._app.run_sync(self._app.inspector.purge(queue or self._app.default_queue()))


def _pending(info: QueueInfo | None) -> int:
    return 0 if info is None else info.pending
