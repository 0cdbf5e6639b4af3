"""What the scheduler's loops share: the connection, the leadership, and the list of queues.

Every loop that acts runs only while this scheduler leads. That saves work and nothing else: each action is a script that
is safe to run from several schedulers at once (docs/adr/0004-one-leader-many-safe.md).
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from fastq.broker.command import Command, raw
from fastq.broker.commands import lead
from fastq.broker.connection import AsyncConnection
from fastq.broker.keys import GlobalKeys, QueueKeys
from fastq.errors import BrokerError, BrokerUnavailable, InvalidQueueName
from fastq.logs import fields
from fastq.metrics import WorkerMetrics
from fastq.partitions import check_partition
from fastq.retry import Exponential
from fastq.service import Service, Step

__all__ = ["Leadership", "Link", "Roster", "chunks", "resilient"]

T = TypeVar("T")
log = logging.getLogger("fastq.scheduler")

LEASE = 5.0
"""Seconds that the leadership outlives its holder; a standby takes over within this and ``STANDBY``."""

TRUST = 4.0
"""Seconds after asking for the lease in which the leader believes in it: less than the lease, for the way of the reply."""

RENEW = 1.5
"""Seconds between two renewals: two may fail before the trust ends."""

PATIENT = 2.0
"""Seconds that the lease's node is given to answer in a cluster: less than the trust, so that who leads does not cease to."""

STANDBY = 0.25
"""Seconds between two tries of a standby."""

LIST_QUEUES = 1.0
"""Seconds after which a queue that nobody here has known is served at the latest."""

CHUNK = 100
"""Commands in one write: well under a millisecond of Redis's time for look-ups and scripts that find nothing to do."""

_FASTEST_FAIR = 0.1
"""Seconds: Redis's TIME is learnt only from a reply that came within it, else the clock would be late by the delay."""

CALM = 5.0
"""Seconds without a failure after which a cluster is told as back: while one node is away, the others answer."""

_BACKOFF = Exponential(base=0.1, factor=2, max_delay=5, jitter="equal")
"""After an error that is no outage: a loop that stands still makes jobs late."""


class Link:
    """One connection for several loops: an outage is told once, an error of one queue stays with that queue.

    ``quiet``: outages are logged at debug level, because another link of the process tells them.
    """

    def __init__(self, connection: AsyncConnection, metrics: WorkerMetrics, *, quiet: bool = False) -> None:
        self.connection = connection
        self.metrics = metrics
        self._quiet = quiet
        self._reconnects = 0
        self._down_since: float | None = None
        self._failed_at = -math.inf
        self._calm = CALM if connection.endpoint.nodes else 0.0
        self._troubled: dict[str, str] = {}  # queue and action -> the error that was told

    def now_ms(self) -> int:
        """Redis's time."""
        return self.connection.clock.now_ms()

    async def call(self, command: Command[T]) -> T:
        """Send one command. Raises as :meth:`fastq.broker.connection.AsyncConnection.call`."""
        self.metrics.count("round_trips")
        reply = await self.connection.call(command)
        self._answered()
        return reply

    async def call_all(self, commands: Sequence[Command[Any]]) -> list[Any]:
        """Send commands in one write; their replies in order. Raises as :meth:`call`, for the first error."""
        self.metrics.count("round_trips")
        replies = await self.connection.call_many(commands)
        self._answered()
        return replies

    async def ask(self, commands: Sequence[Command[Any]]) -> list[Any]:
        """Send commands in one write; their replies in order, an error that one of them caused in its reply's place.

        In a cluster they are for queues on one node (:class:`fastq.scheduler.shards.Shards`).

        Raises:
            BrokerUnavailable: some of them may have run.
        """
        connection = self.connection
        if not connection.connected:
            await connection.connect()
        self.metrics.count("round_trips")
        sent = connection.send_all(commands, near=commands[-1])
        replies: list[Any] = []
        for command, future in zip(commands, sent, strict=True):
            try:
                replies.append(await connection.finish(command, future))
            except BrokerUnavailable:
                raise
            except BrokerError as error:
                replies.append(error)
        self._answered()
        return replies

    def went_well(self, action: str, queue: str, reply: object) -> bool:
        """Whether a reply of :meth:`ask` is none of an error; an error is logged once until it changes or ends."""
        key = f"{action} {queue}"
        if not isinstance(reply, BrokerError):
            self._troubled.pop(key, None)
            return True
        self.metrics.count("redis_errors")
        if self._troubled.get(key) != str(reply):
            self._troubled[key] = str(reply)
            log.error("queue skipped", extra=fields(queue=queue, action=action, error=str(reply)))
        return False

    def outage(self, error: BrokerUnavailable) -> float:
        """Tell an outage, once; seconds until the next try, growing to one second."""
        self.metrics.count("redis_errors")
        now = self._failed_at = time.monotonic()
        first = self._down_since is None
        if self._down_since is None:
            self._down_since = now
        level = logging.WARNING if first and not self._quiet else logging.DEBUG
        log.log(level, "redis unavailable, retrying", extra=fields(error=str(error)))
        return min(max((now - self._down_since) / 2, 0.05), 1.0) * random.uniform(0.5, 1.0)

    def _answered(self) -> None:
        if self._reconnects != self.connection.reconnects:
            self.metrics.count("reconnects")
            self._reconnects = self.connection.reconnects
        if self._down_since is not None and time.monotonic() - self._failed_at >= self._calm:
            level = logging.DEBUG if self._quiet else logging.INFO
            log.log(level, "redis is back", extra=fields(seconds=round(time.monotonic() - self._down_since, 1)))
            self._down_since = None


class Leadership:
    """Who of all schedulers acts: the holder of a lease in Redis.

    Args:
        link: for the lease.
        keys: where it is.
        name: of this scheduler, unique.
    """

    def __init__(self, link: Link, keys: GlobalKeys, name: str) -> None:
        self.name = name
        self.answered = False  # whether Redis has ever said who leads
        self.service = resilient("lead", self.step, link, jitter=0.1)
        self._link = link
        self._key = keys
        self._term = 0
        self._leads = False
        self._trusted_until = -math.inf
        self._followers: list[Service] = []

    @property
    def leading(self) -> bool:
        """Whether this scheduler may believe that it leads. Another one may lead all the same: see the module's head."""
        return time.monotonic() < self._trusted_until

    @property
    def epoch(self) -> tuple[int, int]:
        """Changes when what was learnt from Redis may be out of date: a new term, a new connection."""
        return self._term, self._link.connection.reconnects

    def follow(self, name: str, step: Step, *, link: Link | None = None, jitter: float = 0.0) -> Service:
        """A service whose step runs only while this scheduler leads."""

        async def turn() -> float:
            return await step() if self.leading else math.inf

        service = resilient(name, turn, link or self._link, jitter=jitter)
        self._followers.append(service)
        return service

    async def step(self) -> float:
        """Take or renew the lease, and learn Redis's time."""
        asked = time.monotonic()
        try:
            async with asyncio.timeout(PATIENT if self._link.connection.endpoint.nodes else None):
                leads, clock = await self._link.call_all(
                    [lead(self._key, self.name, round(LEASE * 1_000)), raw("TIME")]
                )
        except (TimeoutError, BrokerUnavailable) as error:
            raise self._goes_on(error) from None
        if time.monotonic() - asked < _FASTEST_FAIR:
            self._link.connection.clock.learn(clock)
        if leads:
            self._lead_until(asked + TRUST)
        elif self._leads:
            self._leads, self._trusted_until = False, -math.inf
            log.warning("leadership lost", extra=fields(scheduler=self.name))
        elif not self.answered:
            log.info("scheduler stands by", extra=fields(scheduler=self.name))
        self.answered = True
        return RENEW if leads else STANDBY

    def _goes_on(self, error: Exception) -> BrokerUnavailable:
        """In a cluster the lease's node may be away and the others not: who led goes on, as nobody can take the lease either.

        Should another one lead all the same: see the module's head.
        """
        if self._leads and self._link.connection.endpoint.nodes:
            self._lead_until(time.monotonic() + TRUST)
        if isinstance(error, BrokerUnavailable):
            return error
        return BrokerUnavailable(f"no answer from {self._link.connection.endpoint.shown} within {PATIENT} s")

    def _lead_until(self, trusted_until: float) -> None:
        resumed = not self.leading
        self._trusted_until = trusted_until
        if not self._leads:
            self._leads = True
            log.info("scheduler leads", extra=fields(scheduler=self.name))
        if resumed:  # also after a stall: others may have acted meanwhile
            self._term += 1
            for service in self._followers:
                service.wake()

    async def give_up(self) -> None:
        """Leave the lease to a standby at once. Call it when no service runs any more."""
        self._trusted_until = -math.inf
        if not self._leads:
            return
        self._leads = False
        try:
            async with asyncio.timeout(1.0):
                await self._link.call(lead(self._key, self.name, 0))
        except (TimeoutError, BrokerError) as error:
            log.debug("the leadership will run out", extra=fields(error=str(error)))


def resilient(name: str, step: Step, link: Link, *, jitter: float = 0.0) -> Service:
    """A service to which an outage is nothing new."""

    async def turn() -> float:
        try:
            return await step()
        except BrokerUnavailable as error:
            return link.outage(error)

    return Service(name, turn, jitter=jitter, backoff=_BACKOFF)


def chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """Groups for one write each."""
    stream = iter(items)
    while chunk := list(islice(stream, CHUNK)):
        yield chunk


class Roster:
    """The queues to serve: those that this process knows of, and those that anybody has announced in Redis.

    Args:
        leadership, link: of this scheduler.
        prefix: of the keys.
        known: names of queues that need no announcement.
    """

    def __init__(self, leadership: Leadership, link: Link, prefix: str, known: Iterable[str]) -> None:
        self.service = leadership.follow("queues", self.step)
        self.queues: dict[str, QueueKeys] = {}
        self.on_new: Callable[[], None] = lambda: None
        self._link = link
        self._prefix = prefix
        self._known = frozenset(known)
        self._listed = GlobalKeys(prefix).queues
        self._take_in(())

    async def step(self) -> float:
        """Read the list."""
        if self._take_in(await self._link.call(raw("SMEMBERS", self._listed))):
            self.on_new()
        return LIST_QUEUES

    def _take_in(self, listed: Iterable[bytes]) -> bool:
        """Whether one is new."""
        names = self._known.union(name.decode("utf-8", "replace") for name in listed)
        for gone in self.queues.keys() - names:
            del self.queues[gone]
        before = len(self.queues)
        for name in sorted(names - self.queues.keys()):
            try:
                self.queues[name] = QueueKeys(self._prefix, check_partition(name))
            except InvalidQueueName:
                continue  # written by somebody else: fastq has no such queue
        return len(self.queues) > before
