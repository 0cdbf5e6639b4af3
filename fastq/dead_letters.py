"""The dead-letter queues of an application: look, replay, purge."""

from __future__ import annotations

import time
from collections.abc import Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastq.broker.command import Operation
from fastq.errors import InvalidOption
from fastq.job import DeadLetter

if TYPE_CHECKING:
    from fastq.broker.inspector import Inspector
    from fastq.broker.letters import DeadGroup, Filter

__all__ = ["DeadLetters"]

T = TypeVar("T")


class Asker(Protocol):
    """Who runs the operations: the application."""

    @property
    def inspector(self) -> Inspector:
        """The operations."""
        ...

    def queue_or_default(self, queue: str | None) -> str:
        """The queue that is meant; None: the setting ``default_queue``."""
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
        return await self._app.run(self._app.inspector.dead(self._app.queue_or_default(queue), offset, limit))

    def list_sync(self, queue: str | None = None, *, offset: int = 0, limit: int = 50) -> Sequence[DeadLetter]:
        """:meth:`list` from blocking code."""
        return self._app.run_sync(self._app.inspector.dead(self._app.queue_or_default(queue), offset, limit))

    async def groups(self, queue: str | None = None) -> Sequence[DeadGroup]:
        """Dead letters by what they died of: task, type and message without its numbers, ids and quotes; largest first.

        Example::

            for group in await app.dead.groups("emails"):
                print(group.count, group.task, group.error_type, group.message, group.fingerprint)
        """
        from fastq.broker.letters import groups

        return await self._app.run(groups(self._app.inspector, self._app.queue_or_default(queue)))

    def groups_sync(self, queue: str | None = None) -> Sequence[DeadGroup]:
        """:meth:`groups` from blocking code."""
        from fastq.broker.letters import groups

        return self._app.run_sync(groups(self._app.inspector, self._app.queue_or_default(queue)))

    async def replay(
        self,
        queue: str | None = None,
        ids: Iterable[str] | None = None,
        *,
        limit: int = 100,
        task: str | None = None,
        error: str | None = None,
        group: str | None = None,
        rate: float | None = None,
    ) -> int:
        """Send dead letters back with a fresh budget of attempts; twice is once.

        Args:
            ids: which; None: the oldest ones.
            limit: most jobs to send back when no ids are given.
            task, error, group: only those of this task, error type or fingerprint (see :meth:`groups`).
            rate: at most so many a second; the call lasts as long. May be interrupted and called again.

        Returns the number sent back.

        Raises:
            InvalidOption: a rate that is not above 0; a filter together with ids.

        Example::

            await app.dead.replay("emails", task="send_email", error="ConnectionError", limit=10_000, rate=50)
        """
        queue, inspector, count = self._app.queue_or_default(queue), self._app.inspector, 0
        which = _filter(ids, task, error, group, rate)
        if not which and rate is None:
            return await self._app.run(inspector.replay(queue, _listed(ids), limit=limit))
        from fastq.broker.letters import chosen, paced

        wanted = _listed(ids)
        if wanted is None:
            wanted = await self._app.run(chosen(inspector, queue, which, limit))
        for piece, pause in paced(wanted, rate):
            count += await self._app.run(inspector.replay(queue, piece))
            if pause:
                import asyncio

                await asyncio.sleep(pause)
        return count

    def replay_sync(
        self,
        queue: str | None = None,
        ids: Iterable[str] | None = None,
        *,
        limit: int = 100,
        task: str | None = None,
        error: str | None = None,
        group: str | None = None,
        rate: float | None = None,
    ) -> int:
        """:meth:`replay` from blocking code."""
        queue, inspector, count = self._app.queue_or_default(queue), self._app.inspector, 0
        which = _filter(ids, task, error, group, rate)
        if not which and rate is None:
            return self._app.run_sync(inspector.replay(queue, _listed(ids), limit=limit))
        from fastq.broker.letters import chosen, paced

        wanted = _listed(ids)
        if wanted is None:
            wanted = self._app.run_sync(chosen(inspector, queue, which, limit))
        for piece, pause in paced(wanted, rate):
            count += self._app.run_sync(inspector.replay(queue, piece))
            time.sleep(pause)
        return count

    async def purge(
        self, queue: str | None = None, ids: Iterable[str] | None = None, *, older_than: float | None = None
    ) -> int:
        """Delete dead letters: these ids, those older than so many seconds, or all. Returns how many."""
        return await self._app.run(
            self._app.inspector.purge_dead(self._app.queue_or_default(queue), _listed(ids), older_than=older_than)
        )

    def purge_sync(
        self, queue: str | None = None, ids: Iterable[str] | None = None, *, older_than: float | None = None
    ) -> int:
        """:meth:`purge` from blocking code."""
        return self._app.run_sync(
            self._app.inspector.purge_dead(self._app.queue_or_default(queue), _listed(ids), older_than=older_than)
        )


def _listed(ids: Iterable[str] | None) -> list[str] | None:
    return None if ids is None else list(ids)


def _filter(
    ids: Iterable[str] | None, task: str | None, error: str | None, group: str | None, rate: float | None
) -> Filter:
    from fastq.broker.letters import Filter

    which = Filter(task=task, error=error, group=group)
    if which and ids is not None:
        raise InvalidOption("ids and a filter were both given: give one")
    if rate is not None and not 0 < rate <= 1_000_000:
        raise InvalidOption(f"rate={rate!r} must be a number of jobs a second above 0")
    return which
