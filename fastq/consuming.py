"""What an application does with the jobs of its queues in this very process, without a worker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastq.broker.keys import QueueKeys
from fastq.broker.url import Endpoint
from fastq.config import Settings
from fastq.errors import InvalidOption
from fastq.task import Task

if TYPE_CHECKING:
    from fastq.consumer import Consumer, Message
    from fastq.job import Envelope

__all__ = ["Consuming"]


class Consuming:
    """The part of :class:`fastq.FastQ` that consumes."""

    settings: Settings
    tasks: dict[str, Task[..., Any]]
    partitions: dict[str, int]

    if TYPE_CHECKING:  # what the application has

        def endpoint(self) -> Endpoint:
            """Where Redis is."""
            ...

        def keys(self, queue: str) -> QueueKeys:
            """The key names of a queue."""
            ...

        def spread(self, queue: str) -> tuple[str, ...]:
            """Its partitions."""
            ...

        def opener(self, now_ms: Callable[[], int]) -> Callable[[str, str, bytes], Envelope] | None:
            """What reads an envelope."""
            ...

    def consume(self, queue: str | None = None, *, prefetch: int = 1) -> Consumer:
        """The jobs of a queue, one by one, for a loop of your own; see :class:`fastq.Consumer` and docs/consumer.md.

        Raises:
            InvalidQueueName: it cannot be the name of a queue.
            InvalidOption: an impossible prefetch, or a queue that is split into partitions: name one of them, ``"mail:0"``.

        Example::

            async with app.consume("emails", prefetch=20) as messages:
                async for message in messages:
                    await send(**message.payload)
                    await message.ack()
        """
        from fastq.consumer import Consumer

        queue = self.settings.default_queue if queue is None else queue
        if (count := self.partitions.get(queue)) is not None:
            raise InvalidOption(
                f"queue {queue!r} is split into {count} partitions, and a consumer takes from one: name it, "
                f"{', '.join(map(repr, self.spread(queue)[:2]))} and so on, each with a consumer of its own"
            )
        return Consumer(self, queue, prefetch=prefetch)

    async def process_one(self, handler: Callable[[Message], Awaitable[Any]], queue: str | None = None) -> bool:
        """Run one job of a queue with ``handler``, if there is one; see :meth:`fastq.Consumer.process_one`.

        Returns:
            Whether there was one.
        """
        async with self.consume(queue) as consumer:
            return await consumer.process_one(handler)

    async def drain(self, *queues: str, timeout: float = 30.0) -> Any:
        """Run all that is ready, in this process, and return what ended; see :func:`fastq.testing.drain`.

        A real worker on the running event loop: for tests, scripts and one-off commands.
        """
        testing = import_module("fastq.testing")  # it stands on the worker, which stands above the application
        return await testing.drain(self, *queues, timeout=timeout)
