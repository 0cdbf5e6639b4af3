"""What both kinds of producer share: how jobs are cut into calls, how calls are numbered; and the blocking kind.

Every call of the enqueue scripts carries its producer's id and a growing number. After a lost connection the same calls are
sent again, in their order and before anything newer, so the script can tell a repetition from a new call by comparing
numbers - even when the job has run and left no trace meanwhile (docs/adr/0006-sequence-numbers.md).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple, TypeVar

from fastq.broker.command import Command, Operation
from fastq.broker.commands import BATCH, Bound, NewJob, Refused, confirm_replicas, enqueue
from fastq.broker.connection import AsyncConnection, SyncConnection
from fastq.broker.greeting import Clock
from fastq.broker.keys import QueueKeys
from fastq.errors import BrokerUnavailable, NotReplicated

__all__ = [
    "BATCH_BYTES",
    "Insisting",
    "Numbers",
    "Replication",
    "Target",
    "chunks",
    "enqueue_sync",
    "gave_up",
    "insist",
]

T = TypeVar("T")

REPEATS = 3
"""Times that what begins a workflow is sent when the connection is lost before replicas have confirmed it."""

BATCH_BYTES = 1 << 20
"""Most bytes of envelopes in one call, so that one call never keeps Redis or the network busy for long."""


class Target(NamedTuple):
    """Where a job goes: the jobs of one call share it."""

    keys: QueueKeys
    priority: int
    bound: Bound | None = None
    batch: str = ""


class Replication(NamedTuple):
    """How many replicas must have a job before its producer is told that it is stored, and how long they may take."""

    replicas: int
    timeout_ms: int

    def missed(self, count: int, shown: str, jobs: Iterable[NewJob]) -> NotReplicated:
        """What a producer is told when too few of them had it in time."""
        again = "enqueue it again with the same job_id to be sure"
        return self._missed(count, shown, "the job", again, tuple(job.id for job in jobs))

    def _missed(self, count: int, shown: str, what: str, then: str, ids: tuple[str, ...]) -> NotReplicated:
        return NotReplicated(
            f"{shown} has stored {what}, and {count} of {self.replicas} replicas confirmed it within "
            f"{self.timeout_ms / 1_000:g} s: a failover may lose it; {then}",
            ids,
        )

    def confirmed(
        self,
        begin: Callable[[], Operation[T]],
        keys: QueueKeys,
        link: AsyncConnection | SyncConnection,
        what: str,
        ident: str,
    ) -> Operation[T]:
        """An operation that may be repeated as a whole, and then the replicas: over ``link``, which runs this, and no other.

        Raises:
            NotReplicated: it is stored, and too few of them have it. BrokerUnavailable: not confirmed.
        """
        for last in range(REPEATS, 0, -1):
            epoch = link.reconnects
            try:
                begun = yield from begin()
                count: int = (yield confirm_replicas(keys, *self))[1]
                if link.reconnects != epoch:  # perhaps of another master, which may not have it: once more
                    raise BrokerUnavailable(
                        f"the connection to {link.endpoint.shown} was lost: {what} {ident} may be stored"
                    )
            except BrokerUnavailable:
                if last == 1:
                    raise
            else:
                if count >= self.replicas:
                    return begun
                then = f"it is in job_ids ({ident}): look after it, or begin another one"
                raise self._missed(count, link.endpoint.shown, what, then, (ident,))
        raise AssertionError("unreachable")


class Numbers:
    """Numbers that grow: µs of Redis's clock, so that pruning can tell how old a producer is by its last one."""

    def __init__(self, clock: Clock) -> None:
        self.producer = os.urandom(6).hex()
        self._clock = clock
        self._last = 0

    def next(self) -> int:
        """One more than the last, or the present."""
        self._last = max(self._last + 1, self._clock.now_us())
        return self._last


_PAUSE = 0.02  # seconds until a full queue is asked again; a drain of 10,000 jobs/s has made room for 200 by then
_LONGEST_PAUSE = 0.25


def chunks(jobs: Iterable[NewJob]) -> Iterator[list[NewJob]]:
    """Cut any stream of jobs into calls of bounded count and bytes."""
    chunk: list[NewJob] = []
    size = 0
    for job in jobs:
        if size >= BATCH_BYTES or len(chunk) >= BATCH:
            yield chunk
            chunk, size = [], 0
        chunk.append(job)
        size += len(job.envelope)
    if chunk:
        yield chunk


def gave_up(cause: object, timeout: float, *, doubt: bool) -> BrokerUnavailable:
    """What a producer is told when Redis did not confirm in time; ``doubt``: a call was sent, and not refused."""
    known = "the job may or may not have been stored" if doubt else "nothing was stored"
    return BrokerUnavailable(f"{cause}; gave up after {timeout:g} s: {known}")


Insisting = Generator[tuple[float, list[NewJob]], list[Refused], list[Refused]]
"""Yields how long to wait and what to send then, is sent what was refused of that, and returns what was refused at last."""


def insist(jobs: list[NewJob], refused: list[Refused], timeout: float) -> Insisting:
    """Ask a full queue again and again for the jobs that it had no room for, until it has taken none for ``timeout`` seconds.

    A new call each time: what it refused was not stored.
    """
    final = [each for each in refused if each.why != "full"]
    positions = [each.position for each in refused if each.why == "full"]
    pause, deadline = _PAUSE, time.monotonic() + timeout
    while positions and time.monotonic() < deadline:
        again = yield pause * random.uniform(0.5, 1.0), [jobs[position] for position in positions]
        left = [positions[each.position] for each in again if each.why == "full"]
        final += [each._replace(position=positions[each.position]) for each in again if each.why != "full"]
        if len(left) < len(positions):
            pause, deadline = _PAUSE, time.monotonic() + timeout
        else:
            pause = min(pause * 2, _LONGEST_PAUSE)
        positions = left
    return sorted(final + [Refused(position, "full", b"") for position in positions])


def enqueue_sync(
    connection: SyncConnection,
    numbers: Numbers,
    target: Target,
    jobs: list[NewJob],
    timeout: float,
    replication: Replication | None = None,
) -> list[Refused]:
    """Send one call from blocking code; after a lost connection it is repeated until ``timeout`` seconds are over.

    ``numbers`` belongs to one thread: a repeated call must not follow a newer one of the same producer.

    Raises:
        BrokerUnavailable: not confirmed in time. BrokerOutOfMemory, BrokerReplyError: refused by Redis.
        NotReplicated: stored, but not by as many replicas as ``replication`` asks for.
    """
    deadline, pause = time.monotonic() + timeout, 0.02
    command: Command[list[Refused]] | None = None
    doubt = False  # whether it may have run
    while True:
        asked = False
        try:
            connection.connect()
            if command is None:  # the number says how old a producer is by Redis's clock, which a connection brings
                command = enqueue(
                    target.keys, target.priority, numbers.producer, numbers.next(), jobs, target.bound, target.batch
                )
            epoch, asked = connection.reconnects, True
            refused = connection.call(command)
            if replication is None:
                return refused
            doubt = True
            count: int = connection.call_many(confirm_replicas(target.keys, *replication))[1]
            if connection.reconnects != epoch:  # perhaps of another master, which may not have the job: once more
                raise BrokerUnavailable(f"the connection to {connection.endpoint.shown} was lost")
        except BrokerUnavailable as error:
            doubt = doubt or (asked and not error.refused)
            if time.monotonic() + pause > deadline:
                raise gave_up(error, timeout, doubt=doubt) from None
        else:
            if count < replication.replicas:
                raise replication.missed(count, connection.endpoint.shown, jobs)
            return refused
        time.sleep(pause)
        pause = min(pause * 2, 0.5)
