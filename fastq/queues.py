"""The queues of an application: how long they are, pause and resume, purge."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastq.broker.command import Operation
from fastq.broker.pauses import Pause, plain
from fastq.errors import InvalidOption
from fastq.task import Task

if TYPE_CHECKING:
    from fastq.broker.inspector import Inspector, QueueInfo

__all__ = ["Queues"]

T = TypeVar("T")


class Asker(Protocol):
    """Who runs the operations: the application."""

    tasks: dict[str, Task[..., Any]]

    @property
    def inspector(self) -> Inspector:
        """The operations."""
        ...

    def queue_of(self, task: str, declared: str | None) -> str:
        """Where the jobs of a task go."""
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


class Queues:
    """The queues of an application. Every method has a ``_sync`` twin; ``queue`` is ``default_queue`` unless given.

    Raises InvalidQueueName (a name that cannot be one) and BrokerError.
    """

    def __init__(self, app: Asker) -> None:
        self._app = app

    async def info(self, queue: str | None = None) -> QueueInfo | None:
        """What there is in a queue: pending, scheduled, parked, running, dead, paused …; None: nobody ever used it."""
        return await self._app.run(self._app.inspector.queue(self._app.queue_or_default(queue)))

    def info_sync(self, queue: str | None = None) -> QueueInfo | None:
        """:meth:`info` from blocking code."""
        return self._app.run_sync(self._app.inspector.queue(self._app.queue_or_default(queue)))

    async def length(self, queue: str | None = None) -> int:
        """Pending jobs: those that would run now if a worker had room."""
        return _pending(await self.info(queue))

    def length_sync(self, queue: str | None = None) -> int:
        """:meth:`length` from blocking code."""
        return _pending(self.info_sync(queue))

    async def pause(
        self,
        queue: str | None = None,
        *,
        task: str | Task[..., Any] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> bool:
        """Let workers take nothing more from a queue, or start no more jobs of a task; what runs goes on.

        Args:
            queue: with ``task``: this one only; default: all queues that there are, and the task's own.
            task: pause this task; its jobs are put aside (state parked), others go on. In force within a second.
            where: of the task, only the calls with these arguments, by name.

        Returns:
            False: it was paused already.

        Raises:
            InvalidOption: ``where`` without a task, or with what is no argument of it.

        Example::

            await app.queues.pause(task=send_email, where={"tenant_id": 42})
        """
        return await self._app.run(self._pausing(queue, task, where, begin=True))

    def pause_sync(
        self,
        queue: str | None = None,
        *,
        task: str | Task[..., Any] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> bool:
        """:meth:`pause` from blocking code."""
        return self._app.run_sync(self._pausing(queue, task, where, begin=True))

    async def resume(
        self,
        queue: str | None = None,
        *,
        task: str | Task[..., Any] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> bool:
        """Undo the same :meth:`pause`; jobs that were put aside are pending again. False: it was not paused."""
        return await self._app.run(self._pausing(queue, task, where, begin=False))

    def resume_sync(
        self,
        queue: str | None = None,
        *,
        task: str | Task[..., Any] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> bool:
        """:meth:`resume` from blocking code."""
        return self._app.run_sync(self._pausing(queue, task, where, begin=False))

    async def paused_tasks(self, queue: str | None = None) -> dict[str, list[Pause]]:
        """Queue -> the tasks, or some of their calls, that are paused in it; of all queues unless one is named."""
        return await self._app.run(self._app.inspector.paused_tasks([queue] if queue else None))

    def paused_tasks_sync(self, queue: str | None = None) -> dict[str, list[Pause]]:
        """:meth:`paused_tasks` from blocking code."""
        return self._app.run_sync(self._app.inspector.paused_tasks([queue] if queue else None))

    def _pausing(
        self, queue: str | None, task: str | Task[..., Any] | None, where: Mapping[str, Any] | None, *, begin: bool
    ) -> Operation[bool]:
        inspector = self._app.inspector
        if task is None:
            if where:
                raise InvalidOption("where= chooses calls of a task: say which task=")
            name = self._app.queue_or_default(queue)
            return (yield from inspector.pause(name) if begin else inspector.resume(name))
        pause = self._pause_of(task, where or {})
        queues = {queue} if queue else {*(yield from inspector.queues()), self._home_of(pause.task)}
        change = inspector.pause_task if begin else inspector.resume_task
        return (yield from change(pause, sorted(queues)))

    def _pause_of(self, task: str | Task[..., Any], where: Mapping[str, Any]) -> Pause:
        name = task if isinstance(task, str) else task.name
        known = self._app.tasks.get(name)
        if known is not None:
            for argument in where:
                if argument not in known.arguments.signature.parameters:
                    raise InvalidOption(f"task {name!r} has no argument {argument!r}: {known.arguments.signature}")
        return Pause(name, {argument: plain(value) for argument, value in where.items()})

    def _home_of(self, task: str) -> str:
        known = self._app.tasks.get(task)
        return self._app.queue_of(task, None if known is None else known.defaults.queue)

    async def purge(self, queue: str | None = None) -> int:
        """Delete its pending, scheduled and parked jobs, for good. Returns how many."""
        return await self._app.run(self._app.inspector.purge(self._app.queue_or_default(queue)))

    def purge_sync(self, queue: str | None = None) -> int:
        """:meth:`purge` from blocking code."""
        return self._app.run_sync(self._app.inspector.purge(self._app.queue_or_default(queue)))


def _pending(info: QueueInfo | None) -> int:
    return 0 if info is None else info.pending
