"""One queue of a worker: its outcomes on their way to Redis, and what it holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from fastq._core import forget
from fastq.broker.command import Command
from fastq.broker.commands import Batch, park, settle
from fastq.broker.keys import QueueKeys
from fastq.context import JobContext
from fastq.errors import UndecodableJob, safe_text
from fastq.job import ID_MOST, PLAIN, Envelope, decode_envelope

if TYPE_CHECKING:
    from fastq.app import FastQ
    from fastq.values import QueueOrder
    from fastq.worker.executor import Executor

__all__ = ["Lane", "Turns", "hungry", "key_of", "lanes_of", "unsettled"]

Opener = Callable[[str, str, bytes], Envelope]


class Lane:
    """One queue of this worker, or a partition of one: its keys, the outcomes to settle, the jobs held in it."""

    __slots__ = (
        "asked_at",
        "batch",
        "doubt",
        "held",
        "hungry",
        "keys",
        "name",
        "opener",
        "plain",
        "rank",
        "sent",
        "weight",
    )

    def __init__(self, keys: QueueKeys, rank: int, weight: float, opener: Opener | None = None) -> None:
        self.keys = keys
        self.name = keys.queue
        self.rank = rank  # in strict order; partitions of one queue share it
        self.weight = weight
        self.batch = Batch()
        self.sent: Batch | None = None  # written, its reply not seen yet
        self.held: dict[str, JobContext | None] = {}  # every id that Redis should have in our running set
        self.hungry = True  # whether the queue may have something for us
        self.doubt = False  # whether Redis may hold more or less for us than ``held`` says
        self.asked_at = 0.0  # monotonic time of the last reserve
        self.opener = opener
        self.plain = PLAIN if opener is None else 0  # the version that needs no second look

    def read(self, job_id: str, data: bytes) -> Envelope:
        """The envelope of a job; verified, if jobs are signed. Raises UndecodableJob and what it stands for."""
        return decode_envelope(data) if self.opener is None else self.opener(self.name, job_id, data)

    def outcomes(self, batches: dict[str, Batch], worker: str, dead_max: int) -> list[Command[Any]]:
        """The commands that write the outcomes so far; new ones go into a new batch, which ``batches`` learns of."""
        batch = self.batch
        if not batch:
            return []
        self.sent, self.batch = batch, Batch()
        batches[self.name] = self.batch
        commands: list[Command[Any]] = []
        if not batch.parked or batch.to_settle():
            commands.append(settle(self.keys, worker, batch, dead_max))
        if batch.parked:
            commands.append(park(self.keys, worker, batch.parked))
        return commands

    def confirm(self) -> None:
        """What was sent has been written: this worker holds those jobs no more."""
        if self.sent is not None:
            forget(self.held, self.sent.ids())
        self.sent = None

    def taken_anew(self, ids: Iterable[bytes]) -> None:
        """Redis has given us these jobs again, before we have its reply to what was sent: what it said of them is old."""
        if self.sent is not None:
            self.sent.forget(job_id.decode("utf-8", "replace") for job_id in ids)

    def set_aside(self, executor: Executor, raw_id: bytes, data: bytes | None) -> None:
        """A foreign producer's id, which the board cannot hold: a dead letter, under its own bytes."""
        key = cast(str, raw_id)  # Redis knows no other name for it
        self.held[key] = None
        error = UndecodableJob(f"its id is not 1 to {ID_MOST} ASCII characters: {raw_id[:40]!r}")
        executor.undecodable(safe_text(raw_id.decode("utf-8", "replace"), 60), self.name, data or b"", error)
        self.batch.failed[-1] = (key, *self.batch.failed[-1][1:])

    def put_back(self, theirs: Container[str | bytes]) -> None:
        """After a lost reply: outcomes of jobs that Redis still has in our running set are written again."""
        batch, new = self.sent, self.batch
        self.sent = None
        if batch is None:
            return
        new.succeeded += [job_id for job_id in batch.succeeded if job_id in theirs]
        new.recorded += [row for row in batch.recorded if row[2] in theirs]
        new.later += [row for row in batch.later if row[0] in theirs]
        new.failed += [row for row in batch.failed if row[0] in theirs]
        new.parked += [row for row in batch.parked if row.id in theirs]
        new.outputs += [row for row in batch.outputs if row[0] in theirs]
        new.released += [job_id for job_id in batch.released if job_id in theirs]


def key_of(raw_id: bytes) -> str | bytes:
    """By what the worker knows a job: a foreign producer's id that cannot be one by its bytes, so that they are settled."""
    return raw_id.decode() if raw_id.isascii() and len(raw_id) <= ID_MOST else raw_id


# Loops where others have `any`: each frame of a generator is cold when a single job wakes an idle worker, and costs 3 µs.


def unsettled(lanes: Sequence[Lane]) -> bool:
    """Whether there are outcomes to be written."""
    for lane in lanes:  # noqa: SIM110 - see above
        if lane.batch:
            return True
    return False


def hungry(lanes: Sequence[Lane]) -> bool:
    """Whether one of the queues may have something for the worker."""
    for lane in lanes:  # noqa: SIM110 - see above
        if lane.hungry:
            return True
    return False


class Turns:
    """In which order a worker turns to its lanes: the strict one, or shuffled by weight: a lane is first in proportion to it.

    Partitions of one queue take turns by chance: each time another one is the first of them.
    """

    def __init__(self, lanes: Sequence[Lane], *, weighted: bool) -> None:
        self._lanes = lanes
        self._weighted = weighted
        self._split = len({lane.rank for lane in lanes}) < len(lanes)
        self._random = random.Random()

    def __call__(self) -> Sequence[Lane]:
        """The order of this turn."""
        if len(self._lanes) == 1 or not (self._weighted or self._split):
            return self._lanes
        if self._weighted:
            return sorted(self._lanes, key=lambda lane: self._random.random() ** (1.0 / lane.weight), reverse=True)
        return sorted(self._lanes, key=lambda lane: (lane.rank, self._random.random()))


def lanes_of(app: FastQ, order: QueueOrder, now_ms: Callable[[], int]) -> list[Lane]:
    """A lane for each queue that a worker serves, and for each partition of one; they share its rank and its weight."""
    weights = order.weights or (0,) * len(order.names)
    opener = app.opener(now_ms)
    lanes: dict[str, Lane] = {}
    for rank, (queue, weight) in enumerate(zip(order.names, weights, strict=True)):
        names = app.served(queue)
        for name in names:
            lanes.setdefault(name, Lane(app.keys(name), rank, weight / len(names), opener))
    return list(lanes.values())
