"""The dead-letter queues of an application: look, replay, purge."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastq.broker.commands import Operation
from fastq.job import DeadLetter

if TYPE_CHECKING:
    from fastq.broker.inspector import Inspector

__all__ = ["DeadLetters"]

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


class DeadLetters:
    """The dead-letter queues: jobs that are out of attempts, with their bodies and last errors.

    Every method has a ``_sync`` twin. ``queue`` is the setting ``default_queue`` unless given.
    """

    def __init__(self, app: Asker) -> None:
        self._app = app

    async def list(self, queue: str | None = None, *, offset: int = 0, limit: int = 50) -> Sequence[DeadLetter]:
        """Dead letters of a queue, the latest first; at most 200 at a time."""
        return await self._app.run(self._app.inspector.dead(queue or self._app.default_queue(), offset, limit))

    def list_sync(self, queue: str | None = None, *, offset: int = 0, limit: int = 50) -> Sequence[DeadLetter]:
        """:meth:`list` from blocking code."""
        return self._app.run_sync(self._app.inspector.dead(queue or self._app.default_queue(), offset, limit))

    async def replay(self, queue: str | None = None, ids: Iterable[str] | None = None, *, limit: int = 100) -> int:
        """Send dead letters back with a fresh budget of attempts; twice is once.

        Args:
            ids: which; None: the oldest ones.
            limit: most jobs to send back when no ids are given.

        Returns the number sent back.
        """
        return await self._app.run(
            self._app.inspector.replay(queue or self._app.default_queue(), _listed(ids), limit=limit)
        )

    def replay_sync(self, queue: str | None = None, ids: Iterable[str] | None = None, *, limit: int = 100) -> int:
        """:meth:`replay` from blocking code."""
        return self._app.run_sync(
            self._app.inspector.replay(queue or self._app.default_queue(), _listed(ids), limit=limit)
        )

    async def purge(
        self, queue: str | None = None, ids: Iterable[str] | None = None, *, older_than: float | None = None
    ) -> int:
        """Delete dead letters: these ids, those older than so many seconds, or all. Returns how many."""
        return await self._app.run(
            self._app.inspector.purge_dead(queue or self._app.default_queue(), _listed(ids), older_than=older_than)
        )

    def purge_sync(
        self, queue: str | None = None, ids: Iterable[str] | None = None, *, older_than: float | None = None
    ) -> int:
        """:meth:`purge` from blocking code."""
        return self._app.run_sync(
            self._app.inspector.purge_dead(queue or self._app.default_queue(), _listed(ids), older_than=older_than)
        )


def _listed(ids: Iterable[str] | None) -> list[str] | None:
    return None if ids is None else list(ids)
