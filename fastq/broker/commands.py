"""One pure function per script: arguments in, a :class:`Command` out, its reply decoded.

Nothing here moves a byte or reads a clock; the two movers in :mod:`fastq.broker.connection` do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from fastq._core import pack_listed, pack_plain
from fastq.broker import scripts
from fastq.broker.command import Command, Packed, as_is, raw
from fastq.broker.keys import PAD, GlobalKeys, LeaseKeys, LimitKeys, QueueKeys
from fastq.job import JobRecord, encode
from fastq.limits import Acquired, LimitState, Rule, Terms, check_penalty

T = TypeVar("T")

BATCH = 500
"""Most jobs in one enqueue call: about 1 ms of Redis time, and well below Lua's limit of arguments."""


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


# -- enqueue ------------------------------------------------------------------------------


class Once(NamedTuple):
    """How a unique key is held, and what becomes of the job that there is; the words of enqueue_once.lua."""

    hold: str = "executed"  # executed | started | ttl | both
    ttl_ms: int = 0
    on_duplicate: str = "keep"  # keep | replace
    most_ms: int = 0


class NewJob(NamedTuple):
    """One job on its way in. ``delay_ms`` <= 0: ready at once. ``chosen``: the caller named the id."""

    id: str
    envelope: bytes
    delay_ms: int = 0
    unique: str = ""
    chosen: bool = False
    once: Once = Once()


class Bound(NamedTuple):
    """How many pending jobs a queue may have, and what becomes of one too many: it is refused, or the oldest one goes."""

    most: int
    when_full: str  # raise | wait | drop_oldest: the two first are the same to the script
    keep_ms: int = 0  # how long the record of a dropped job is kept


class Refused(NamedTuple):
    """Why one job of a batch was not created."""

    position: int
    why: str  # unique | replaced | exists | dead | finished | full | closed
    detail: bytes  # the id of the job that is there instead; the record of a finished job


def _refusals(reply: list[Any]) -> list[Refused]:
    if len(reply) == 1:
        return []
    return [Refused(int(position), _text(why), detail) for position, why, detail in reply[1:]]


def _dropped(q: QueueKeys, bound: Bound, now_ms: int) -> bytes:
    error = f"dropped: queue {q.queue} had {bound.most:,} pending jobs (max_pending), and this one was the oldest"
    return encode(JobRecord("cancelled", "", 0, 0, now_ms, 0, error=error))


def _packed(*words: bytes) -> bytes:
    """Words as Redis's protocol has them, without their count."""
    return b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


@functools.lru_cache(maxsize=1_000)
def _start(sha: bytes, keys: tuple[bytes, ...], *more: bytes) -> tuple[bytes, int]:
    """The words of a call of a script up to its keys, and a few more, as Redis's protocol has them, and how many they are."""
    return _packed(b"EVALSHA", sha, b"%d" % len(keys), *keys, *more), 3 + len(keys) + len(more)


def _plain(jobs: Sequence[NewJob]) -> list[Any]:
    return [word for job in jobs for word in (job.id, job.envelope)]


def _none_refused(reply: int) -> list[Refused]:  # noqa: ARG001 - whether it was a repetition is all the same to the caller
    return []


def enqueue(
    q: QueueKeys,
    priority: int,
    producer: str,
    sequence: int,
    jobs: Sequence[NewJob],
    bound: Bound | None = None,
    batch: str = "",
) -> Command[list[Refused]]:
    """Accept up to :data:`BATCH` jobs of one priority, of the batch of this id. ``sequence`` (µs) grows with every call."""
    if bound is None and not batch:
        few = q.plain_stores[priority]
        packed = pack_plain(*_start(scripts.load("enqueue_plain").sha, few), producer, sequence, jobs)
        if packed is not None:  # all are plain
            return Packed("enqueue_plain", few, lambda: [producer, sequence, *_plain(jobs)], _none_refused, packed)
    keys: tuple[bytes, ...] = q.stores[priority]
    if batch and bound is None and not any(job.delay_ms > 0 or job.unique or job.chosen for job in jobs):
        return Command("enqueue", (*keys, q.batch(batch)), [producer, sequence, "plain", *_plain(jobs)], _refusals)
    args: list[Any] = [producer, sequence]
    if bound is None and not any(job.unique for job in jobs):
        args.append("full")
        for job in jobs:
            args += (job.id, job.envelope, job.delay_ms)
    else:
        keys += (q.unique, q.unique_of, q.unique_start, q.workers, q.said(producer, sequence))
        keys += (q.awaited, q.events, q.groups, q.ghosts, q.deliveries, *q.levels) if bound or batch else ()
        drops = bound is not None and bound.when_full == "drop_oldest"
        dropped = _dropped(q, bound, sequence // 1_000) if bound is not None and drops else ""
        args += (bound.most, int(drops), bound.keep_ms, dropped) if bound is not None else (0, 0, 0, "")
        for job in jobs:
            args += (job.id, job.envelope, job.delay_ms, job.unique, *job.once)
    script = "enqueue" if len(keys) == 8 else "enqueue_once"
    return Command(script, (*keys, q.batch(batch)) if batch else keys, args, _refusals)


def confirm_replicas(q: QueueKeys, replicas: int, timeout_ms: int) -> list[Command[Any]]:
    """Wait until so many replicas have what was written before; the second reply says how many do, at the timeout too.

    WAIT covers a connection's own last write, and a repeated enqueue writes nothing; hence a write of no meaning before it.
    """
    return [raw("SET", q.replicated, "1", "PX", 60_000), raw("WAIT", replicas, timeout_ms, decode=int)]


# -- worker ------------------------------------------------------------------------------------


class Reserved(NamedTuple):
    """A batch from Redis. ``held`` counts all that the worker holds now; -1: its lease is gone."""

    held: int
    ids: list[bytes]
    envelopes: list[bytes | None]
    deliveries: list[int]  # empty, or per job how many workers died with it


def register(q: QueueKeys, worker: str, lease_ms: int, info: bytes) -> Command[int]:
    """A worker incarnation begins. Returns Redis's time in ms."""
    return Command("register", (q.workers, q.running(worker), q.jobs, q.info), (worker, lease_ms, PAD, info), int)


def describe(q: QueueKeys, worker: str, info: bytes) -> Command[bool]:
    """What a worker says of itself has changed. False: it has no lease."""
    return Command("describe", (q.workers, q.info), (worker, info), bool)


def announce(queues: bytes, *names: str) -> Command[int]:
    """Add to the queues that everybody knows of (``GlobalKeys.queues``), whatever the memory. Returns how many were new."""
    return Command("announce", (queues,), names, int)


def _reserved(reply: Any) -> Reserved:
    if type(reply) is bytes:  # of one job
        held, size, rest = reply.split(b" ", 2)
        length = int(size)
        reply = int(held), [rest[:length]], [rest[length:]], []
    return tuple.__new__(Reserved, reply)  # its own __new__ is a frame


def reserve(q: QueueKeys, worker: str, want: int) -> Command[Reserved]:
    """Take up to ``want`` (at most 2,000) jobs under this worker's lease."""
    keys = q.takes(worker)
    start, words = _start(scripts.load("reserve").sha, keys, worker.encode())
    packed = b"*%d\r\n%b%b" % (words + 1, start, _packed(b"%d" % want))
    return Packed("reserve", keys, lambda: (worker, want), _reserved, packed)


class Held(NamedTuple):
    """What a worker holds according to Redis; ``held`` -1: its lease is gone."""

    held: int
    ids: list[bytes]
    envelopes: list[bytes]


def resume(q: QueueKeys, worker: str) -> Command[Held]:
    """Ask what this worker holds, after a reply was lost."""
    return Command("resume", (q.workers, q.running(worker), q.jobs), (worker, PAD), Held._make)


class Parked(NamedTuple):
    """One job that waits for a limit. ``look_ms``: how long the worker itself looks after that limit's jobs."""

    id: str
    limit: str  # LimitKeys.name
    score: float
    look_ms: int


class Batch:
    """Outcomes of one queue on their way to ``settle.lua``, one list of rows per :class:`fastq.job.Outcome`, and to
    ``park.lua``.
    """

    __slots__ = ("failed", "later", "outputs", "parked", "recorded", "released", "succeeded")

    def __init__(self) -> None:
        self.succeeded: list[str] = []
        self.recorded: list[tuple[str, int, str, bytes]] = []  # bucket name, its expiry, id, record
        self.later: list[tuple[str, int, bytes]] = []  # id, delay_ms, envelope
        self.failed: list[tuple[str, bytes, bytes]] = []  # id, envelope, error
        self.released: list[str] = []
        self.parked: list[Parked] = []
        self.outputs: list[
            tuple[str, bytes]
        ] = []  # id, result (b"": none) besides their row above, for workflows and batches

    def __len__(self) -> int:
        return self.to_settle() + len(self.parked)

    def __bool__(self) -> bool:
        return bool(self.succeeded or self.recorded or self.later or self.failed or self.released or self.parked)

    def end_unrecorded(self, job_id: str) -> None:
        """It did not run, and leaves no record that says so: its batch is told."""
        self.succeeded.append(job_id)
        self.outputs.append((job_id, b""))

    def to_settle(self) -> int:
        """How many are for ``settle.lua``."""
        return len(self.succeeded) + len(self.recorded) + len(self.later) + len(self.failed) + len(self.released)

    def all_plain(self) -> bool:
        """Whether all have succeeded, and nobody wants to know with what."""
        return bool(self.succeeded) and not (
            self.recorded or self.later or self.failed or self.released or self.outputs
        )

    def ids(self) -> list[str]:
        """Every job id in the batch."""
        if not (self.recorded or self.later or self.failed or self.released or self.parked):
            return self.succeeded
        return [
            *self.succeeded,
            *(row[2] for row in self.recorded),
            *(row[0] for row in self.later),
            *(row[0] for row in self.failed),
            *self.released,
            *(row.id for row in self.parked),
        ]

    def forget(self, ids: Iterable[str]) -> None:
        """Take the rows of these jobs out that let a job run again."""
        gone = set(ids)
        self.later = [row for row in self.later if row[0] not in gone]
        self.released = [job_id for job_id in self.released if job_id not in gone]
        self.parked = [row for row in self.parked if row.id not in gone]


class Settled(NamedTuple):
    """``held`` as in :class:`Reserved`; ``stale`` are the ids that this worker did not hold any more."""

    held: int
    stale: list[bytes]


_NO_OTHERS = _packed(b"0", b"0", b"0", b"0")
"""The sections of settle.lua behind the first one, when they are empty."""


def _settled(reply: Any) -> Settled:
    return Settled(reply, []) if type(reply) is int else Settled(*reply)


def settle(q: QueueKeys, worker: str, batch: Batch, dead_max: int) -> Command[Settled]:
    """Write a batch of outcomes; the running set of the worker is the fence."""
    keys = q.ends(worker)
    if batch.all_plain():
        start, words = _start(scripts.load("settle").sha, keys, b"%d" % dead_max)
        ids = batch.succeeded.copy()  # the words are asked for later, if at all
        packed = pack_listed(start, words, ids, _NO_OTHERS, 4)
        if packed is not None:
            return Packed("settle", keys, lambda: [dead_max, len(ids), *ids, 0, 0, 0, 0], _settled, packed)
    buckets, last, rows = dict[tuple[str, int], list[Any]](), None, list[Any]()
    for name, expires, job_id, record in batch.recorded:
        if name is not last:  # most often, all are of one
            last, rows = name, buckets.setdefault((name, expires), [])
        rows.append(job_id)
        rows.append(record)
    args: list[Any] = [dead_max, len(batch.succeeded), *batch.succeeded, len(buckets)]
    for (name, expires), recorded in buckets.items():
        args += (name, expires, len(recorded) // 2, *recorded)
    for rows in (batch.later, batch.failed):
        args.append(len(rows))
        for row in rows:
            args += row
    args += (len(batch.released), *batch.released)
    for output in batch.outputs:
        args += output
    return Command("settle", (*keys, *(q.bucket(name) for name, _ in buckets)), args, _settled)


def recall(q: QueueKeys, job_id: str, step: str) -> Command[bytes | None]:
    """What a step of a job returned; None: it has not."""
    return raw("HGET", q.steps(job_id), step)


def remember(q: QueueKeys, job_id: str, step: str, result: bytes, ttl_ms: int) -> Command[bytes]:
    """Keep what a step of a job returned. Returns what is kept: an earlier result, if there is one."""
    return Command("remember", (q.steps(job_id),), (step, result, ttl_ms), bytes)


def _flags(reply: list[int]) -> list[bool]:
    return [flag == 1 for flag in reply]


def park(q: QueueKeys, worker: str, jobs: Sequence[Parked]) -> Command[Settled]:
    """Put jobs that this worker holds aside, each under its limit."""
    looks: dict[str, int] = {}
    for job in jobs:
        looks[job.limit] = max(job.look_ms, looks.get(job.limit, 0))
    args: list[Any] = [word for look in looks.items() for word in look]
    numbers = {limit: number for number, limit in enumerate(looks, 1)}
    for job in jobs:
        args += (job.id, numbers[job.limit], repr(job.score))
    keys = (
        q.running(worker), q.parked, q.parked_of, q.cancels, q.jobs, q.deliveries, q.done, q.unique, q.unique_of,
        q.awaited, q.events, q.groups, q.paused_tasks, *map(q.parked_by, looks),
    )  # fmt: skip
    return Command("park", keys, args, Settled._make)


class Unparked(NamedTuple):
    """Jobs that waited for a limit, as in :class:`Reserved`; ``left`` more of them wait."""

    now_ms: int
    held: int
    ids: list[bytes]
    envelopes: list[bytes | None]
    deliveries: list[int]
    left: int


def unpark(q: QueueKeys, worker: str, limit: str, want: int, look_ms: int) -> Command[Unparked]:
    """Take up to ``want`` (at most 2,000) jobs that wait for ``limit`` under this worker's lease."""
    keys = (
        q.workers, q.running(worker), q.jobs, q.paused, q.deliveries, q.parked, q.parked_of, q.parked_by(limit),
        q.awaited, q.events,
    )  # fmt: skip
    return Command("unpark", keys, (worker, limit, want, look_ms), Unparked._make)


def extend(q: QueueKeys, lease_ms: int, workers: Sequence[str]) -> Command[list[bool]]:
    """Renew leases; False where a lease is gone."""
    return Command("extend", (q.workers,), (lease_ms, *workers), _flags)


class Recovered(NamedTuple):
    """``ready`` jobs handed back, ``dead`` ones buried as poison, ``remaining`` ones for the next call; -1: lease valid."""

    ready: int
    dead: int
    remaining: int


def recover(
    q: QueueKeys,
    worker: str,
    *,
    expired: bool,
    charge: str,
    max_deliveries: int,
    dead_max: int,
    error: bytes = b"",
    started: Iterable[str] = (),
    limit: int = 200,
) -> Command[Recovered]:
    """Hand a worker's jobs back. ``charge`` is "all", "started" (the ids in ``started``) or "none"."""
    keys = (
        q.workers, q.running(worker), q.jobs, q.deliveries, q.wake, q.info, q.dead, q.dead_jobs, q.dead_errors,
        q.unique, q.unique_of, q.done, q.cancels, q.awaited, q.events, q.groups, *q.levels,
    )  # fmt: skip
    when = "expired" if expired else "now"
    args = (worker, when, charge, max_deliveries, limit, PAD, dead_max, error, *started)
    return Command("recover", keys, args, Recovered._make)


def report(
    q: QueueKeys, worker: str, job_id: str, progress: bytes, ttl_ms: int, most: int, lines: Sequence[str]
) -> Command[bool]:
    """Keep a job's progress (b"": none) and log lines, ``most`` of them. Returns whether the worker holds the job."""
    keys = (q.running(worker), q.progress(job_id), q.logs(job_id), q.awaited, q.events)
    return Command("report", keys, (job_id, progress, ttl_ms, most, *lines), bool)


# -- scheduler ---------------------------------------------------------------------------------


class Promoted(NamedTuple):
    """``next_at_ms`` is -1 when nothing is scheduled."""

    moved: int
    now_ms: int
    next_at_ms: int


def promote(q: QueueKeys, limit: int = 500) -> Command[Promoted]:
    """Move due jobs to their ready lists."""
    return Command("promote", (q.due, q.jobs, q.wake, *q.levels), (limit,), Promoted._make)


def unpark_due(q: QueueKeys, limit: int = 500, look_ms: int = 2_000) -> Command[Promoted]:
    """Send one job back for each of up to ``limit`` limits that no worker looks after."""
    return Command(
        "unpark_due",
        (q.parked, q.parked_of, q.jobs, q.wake, q.paused_tasks, *q.levels),
        (limit, look_ms),
        Promoted._make,
    )


def clamp(q: QueueKeys, leases: Iterable[tuple[str, int]]) -> Command[int]:
    """Bring leases (worker, its length in ms) that end further ahead than they are long back. Returns how many did."""
    return Command("clamp", (q.workers,), [word for lease in leases for word in lease], int)


class Pruned(NamedTuple):
    """What was forgotten, and where the next call goes on; ``cursor`` ``b"0"``: the round is over."""

    producers: int
    buckets: int
    cursor: bytes


def prune(q: QueueKeys, idle_ms: int, cursor: bytes = b"0", count: int = 500) -> Command[Pruned]:
    """Forget producers that were idle for ``idle_ms``, about ``count`` looked at, and the names of expired buckets."""
    return Command("prune", (q.producers, q.done), (idle_ms, cursor, count), Pruned._make)


def lead(keys: GlobalKeys, scheduler: str, ttl_ms: int) -> Command[bool]:
    """Take or keep the leadership; ``ttl_ms`` 0 gives it up. Returns whether this scheduler leads."""
    return Command("lead", (keys.leader,), (scheduler, ttl_ms), bool)


# -- operators ---------------------------------------------------------------------------------


def cancel(
    q: QueueKeys, job_id: str, workers: Sequence[str], record: bytes, ttl_ms: int, *, terminate: bool = False
) -> Command[str]:
    """Returns "cancelled", "requested" (a worker has it), "unknown", or "again" when ``workers`` is out of date.

    ``record`` is kept for ``ttl_ms`` once the job is cancelled; 0: not at all.
    """
    keys = (
        q.jobs, q.due, q.ghosts, q.workers, q.unique, q.unique_of, q.deliveries, q.done, q.cancels,
        q.parked, q.parked_of, q.awaited, q.events, q.groups, *(q.running(worker) for worker in workers),
    )  # fmt: skip
    return Command("cancel", keys, (job_id, "t" if terminate else "c", ttl_ms, record), _text)


def status(q: QueueKeys, job_id: str, workers: Sequence[str]) -> Command[list[bytes]]:
    """Where a job is; the reply's shapes stand in the head of status.lua."""
    keys = (
        q.jobs, q.due, q.dead, q.dead_jobs, q.dead_errors, q.done, q.parked_of, q.groups,
        *(q.running(worker) for worker in workers),
    )  # fmt: skip
    return Command("status", keys, (job_id, *workers), as_is)


def follow(q: QueueKeys, channel: str, job_ids: Sequence[str], ttl_ms: int) -> Command[list[list[bytes]]]:
    """How each of these jobs has ended; of an open one, ``channel`` gets a message at its end. Replies as in follow.lua."""
    keys = (q.jobs, q.dead, q.dead_jobs, q.dead_errors, q.done, q.awaited, q.groups)
    return Command("follow", keys, (channel, ttl_ms, *job_ids), as_is)


def watch(q: QueueKeys, ttl_ms: int, targets: Sequence[str]) -> Command[tuple[bytes, list[bool]]]:
    """Let events of these jobs ("*": of all) be written down. Returns the last event's id, and which ones are watched."""
    keys = (q.jobs, q.awaited, q.events)
    return Command("watch", keys, (ttl_ms, *targets), lambda reply: (reply[0], _flags(reply[1:])))


def replay(q: QueueKeys, entries: Iterable[tuple[str, bytes]]) -> Command[int]:
    """Send dead letters back with the envelopes given. Returns how many."""
    args = [word for entry in entries for word in entry]
    return Command("replay", (q.dead, q.dead_jobs, q.dead_errors, q.jobs, q.wake, *q.levels), args, int)


def discard(q: QueueKeys, *, before_ms: int = 0, limit: int = 500, ids: Sequence[str] = ()) -> Command[int]:
    """Purge dead letters: these ids, or up to ``limit`` that died before ``before_ms``."""
    return Command("discard", (q.dead, q.dead_jobs, q.dead_errors), (before_ms, limit, *ids), int)


def purge(q: QueueKeys, limit: int = 500) -> Command[tuple[int, bool]]:
    """Drop pending, scheduled and parked jobs. Returns how many, and whether to call again."""
    keys = (
        q.jobs, q.due, q.ghosts, q.deliveries, q.unique, q.unique_of, q.parked, q.parked_of, q.awaited, q.events,
        q.groups, *q.levels,
    )  # fmt: skip
    return Command("purge", keys, (limit,), lambda reply: (reply[0], reply[1] == 1))


# -- limits ------------------------------------------------------------------------------------


def acquire(
    k: LimitKeys,
    terms: Terms,
    *,
    need: int = 0,
    want: int = 0,
    override: bytes = b"",
    most: int = 0,
    lease_ms: int = 15_000,
    holders: Sequence[tuple[str, int]] = (),
) -> Command[Acquired]:
    """Take from ``need`` to ``want`` units; with ``holders`` (holder id, its cost) a slot and its cost for each instead.

    ``terms`` are those of ``override``, the stored rule that the caller knows of, or of its own rule when it knows of
    none (b""). ``most`` is the rule's max_concurrent, 0 without. A holder id names one holding of a slot by one process
    (``<process id>:<n>``); the same id again is the same slot. Units may be used until ``terms.usable(reply.now_us)``
    seconds after this command was *sent*, and must be given back otherwise. No cost may exceed ``terms.capacity``.
    """
    args: list[Any] = [
        override,
        terms.kind,
        *map(repr, terms[1:4]),
        need,
        max(need, want),
        most if holders else 0,
        lease_ms,
    ]
    for holder, cost in holders:
        args += (holder, cost)
    return Command("acquire", (k.rule, k.state, k.slots, k.wake, *k.whole), args, Acquired._make)


class GivenBack(NamedTuple):
    """Units that can be granted again, and slots that became free."""

    units: int
    slots: int


def give_back(
    k: LimitKeys, terms: Terms, ticket: str, *, units: int = 0, granted_us: int = 0, holders: Sequence[str] = ()
) -> Command[GivenBack]:
    """Return units that were not used, and slots. ``ticket`` is new for each call and the same for its repetition.

    ``granted_us`` is ``Acquired.now_us`` of the units' grant, of several grants the oldest.
    """
    args = (terms.kind, *map(repr, terms[1:4]), units, granted_us, *holders)
    return Command("give_back", (k.state, k.slots, k.wake, k.given(ticket)), args, GivenBack._make)


def hold(k: LimitKeys, lease_ms: int, holders: Sequence[str]) -> Command[list[bool]]:
    """Renew the leases of slots; False where a slot is gone."""
    return Command("hold", (k.slots,), (lease_ms, *holders), _flags)


def wait_for_slot(k: LimitKeys | LeaseKeys, timeout: float) -> Command[bool]:
    """Block the connection until a slot (or a lease) may be free; False after ``timeout`` seconds. Needs a connection of its own."""
    return raw("BLPOP", k.wake, repr(timeout), decode=lambda reply: reply is not None)


def penalize(k: LimitKeys, terms: Terms, duration: float, recovery: float = 0.0) -> Command[int]:
    """Grant nothing for ``duration`` seconds; 0 lifts the penalty. Returns the µs that are left of it.

    Raises ConfigError: it is no number from 0 to 366 days.

    ``recovery``: of an adaptive limiter, the seconds in which its pace would grow from 0 to 1; 0: it is not adaptive.
    """
    args = (terms.kind, *map(repr, terms[1:4]), round(check_penalty(duration) * 1_000_000), round(recovery * 1_000_000))
    return Command("penalize", (k.state,), args, int)


def limit_state(k: LimitKeys, terms: Terms) -> Command[LimitState]:
    """What is left, and who holds it."""
    return Command(
        "limit_state", (k.rule, k.state, k.slots, *k.whole), (terms.kind, *map(repr, terms[1:4])), LimitState._make
    )


def override_rule(k: LimitKeys, rule: Rule | None) -> Command[Any]:
    """Let ``rule`` override what every process has configured; None ends that. In force with each one's next request."""
    return raw("DEL", k.rule) if rule is None else raw("SET", k.rule, rule.encode())


def reset_limit(k: LimitKeys) -> Command[Any]:
    """Forget what was granted, a penalty included. Slots stay with their holders."""
    return raw("DEL", k.state)
