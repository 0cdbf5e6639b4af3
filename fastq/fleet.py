"""What an application holds together across its fleet: limits, leaders, locks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastq.broker.url import Endpoint
from fastq.config import Settings
from fastq.errors import ConfigError
from fastq.limiter.options import JobLimits
from fastq.partitions import queue_of
from fastq.task import Task

if TYPE_CHECKING:
    from fastq.lease import Lease
    from fastq.limiter.api import Limiter
    from fastq.limiter.catalogue import Catalogue
    from fastq.limiter.jobs import JobLimiter
    from fastq.limiter.stores import RedisStore
    from fastq.lock import Lock

__all__ = ["Fleet"]


class Fleet:
    """The part of :class:`fastq.FastQ` that makes limiters, leaders and locks."""

    settings: Settings
    tasks: dict[str, Task[..., Any]]
    queue_limits: dict[str, JobLimits]
    _limits: Catalogue | None = None
    _limit_store: RedisStore | None = None
    _lease_store: RedisStore | None = None

    if TYPE_CHECKING:  # what the application has

        def endpoint(self) -> Endpoint:
            """Where Redis is."""
            ...

        def default_queue(self) -> str:
            """The queue that is meant when none is named."""
            ...

    # -- limits ---------------------------------------------------------------------------------

    def limiter(self, limiter_id: str, /, **options: Any) -> Limiter:
        """A limit that all processes of this application share, in its Redis and under its prefix.

        Args:
            options: ``rate="100/s burst 200"``, or ``algorithm`` and its own options, ``max_concurrent``, ``timeout``,
                ``on_error``, ``lease``, ``adaptive``; see docs/limits.md. None at all: the limiter of that name which was defined before.

        Raises:
            ConfigError: options that make no sense (all that is wrong, in one message), or others than before.

        Example::

            stripe = app.limiter("stripe_api", rate="100/s", timeout=5)
        """
        from fastq.limiter import catalogue

        if self._limits is None:
            self._limits = catalogue.Catalogue()
            self._limit_store = catalogue.redis_store(self.settings, self.endpoint)
        before = self._limits.options(limiter_id)
        if not options and before is None:
            return catalogue.default().find(limiter_id)
        if before is not None and options not in ({}, before):
            raise ConfigError(f"limiter {limiter_id!r} was defined before with other options: {before}")
        if before is None:
            catalogue.default().adopt(self._limits.add_limiter(limiter_id, options, self._limit_store), options)
        return self._limits.find(limiter_id)

    def limits_of(self, task: str, queue: str) -> list[JobLimiter]:
        """The limiters that a task's jobs have to pass in a queue.

        Raises:
            ConfigError: one of them does not exist, or an option does not fit the handler.
        """
        found = self.tasks[task]
        queue = queue_of(queue)
        asked = [(f"queue:{queue}", self.queue_limits.get(queue)), (f"task:{task}", found.defaults.limits)]
        if not any(options for _, options in asked):
            return []
        from fastq.limiter.jobs import bind

        bound = []
        for owner, options in asked:
            if options is not None:
                bound += bind(owner, options, self.limiter, found.arguments.signature)
        return bound

    def limiters(self) -> dict[str, Limiter]:
        """Those that this application has defined, by their ids; those of its tasks included. Raises ConfigError."""
        for name, task in self.tasks.items():
            self.limits_of(name, task.defaults.queue or self.default_queue())
        return self._limits.all() if self._limits is not None else {}

    # -- leaders ----------------------------------------------------------------------------------

    def leader(self, name: str, *, ttl: float = 15.0) -> Lease:
        """Who of all processes that ask for ``name`` leads: one at a time, as long as it renews its lease.

        Args:
            ttl: seconds after which another one leads when the leader was killed (0.5 s to a day).

        Raises:
            ConfigError: an impossible name or ttl.

        Example::

            async with app.leader("daily_report", ttl=15) as term:  # waits; the block is cancelled if the lease is lost
                await write_report(fence=term.token)
        """
        from fastq.lease import Lease

        return Lease(self.lease_store(), "leader", name, ttl)

    def lock(self, name: str, *, timeout: float = 60.0, wait: float = 0.0) -> Lock:
        """Let one block of code of the whole fleet at a time hold ``name``: ``async with`` or ``with``.

        Args:
            timeout: seconds after which another one can have it when its holder was killed; it is renewed while it is held,
                however long that is (0.5 s to a day).
            wait: seconds to wait for it.

        Raises:
            ConfigError: an impossible name or time. On entering the block:
            JobAlreadyRunning: somebody else holds it.

        Example::

            async with app.lock("sync:42", timeout=600) as held:
                await sync(42, fence=held.token)
        """
        from fastq.lease import Lease
        from fastq.lock import Lock

        return Lock(Lease(self.lease_store(), "lock", name, timeout), wait)

    def lease_store(self) -> RedisStore:
        """Where leases are kept."""
        if self._lease_store is None:
            from fastq.limiter.catalogue import redis_store

            self._lease_store = redis_store(self.settings, self.endpoint)
        return self._lease_store

    async def _aclose_limits(self) -> None:
        """Close the connections of this event loop's limiters."""
        if self._limit_store is not None:
            await self._limit_store.aclose()

    def _close_limits(self) -> None:
        """Close the connections of blocking code and of leases."""
        for store in (self._limit_store, self._lease_store):
            if store is not None:
                store.close()
