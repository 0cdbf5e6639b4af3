"""What a queue needs as time passes: due jobs promoted, parked ones not forgotten, jobs of lost workers recovered, old traces pruned."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from fastq.broker.command import Command, raw
from fastq.broker.commands import Pruned, Recovered, clamp, discard, promote, prune, recover, unpark_due
from fastq.broker.keys import PAD, QueueKeys
from fastq.broker.views import number_of
from fastq.config import Settings
from fastq.errors import BrokerError, BrokerUnavailable
from fastq.job import ErrorInfo, WorkerCard, culprits, encode
from fastq.logs import fields
from fastq.scheduler.link import Leadership, Link, Roster, chunks
from fastq.scheduler.shards import PATIENCE, Shards

__all__ = ["Promoter", "Pruner", "Recoverer", "Unparker", "Waker"]

log = logging.getLogger("fastq.scheduler")

_WORKER = re.compile(rb"[A-Za-z0-9_.~-]{1,200}")

BATCH = 250
"""Jobs in one call of promote.lua: about 1 ms of Redis's time, also with a million scheduled."""

UNPARK = 1.0
"""Seconds between two looks for limits whose parked jobs no worker fetches."""

UNPARK_BATCH = 200
"""Limits in one call of unpark_due.lua: about 1 ms of Redis's time."""

SPACING = 0.005
"""Seconds between two promotions of a queue that moved something: a dense queue costs 200 calls a second, not 2,000."""

LOOK = 1.0
"""Seconds between two looks at the heads of all due sets: a lost wake token, or a clock that was set, costs no more."""

WAIT = 1.0
"""Seconds of one blocking pop. Less than the leadership's lease: a leader that was stopped takes no token of its heir."""

RECOVER_BATCH = 200
"""Jobs in one call of recover.lua: 2 ms of Redis's time."""

SHORTEST = 0.05
"""Seconds between two looks at the leases at least."""

PRUNE = 30.0
"""Seconds between two rounds of pruning."""

PRUNE_CALLS = 20
"""Calls per queue and round: a backlog of dead letters goes in several rounds, and Redis serves others in between."""

PRUNE_BATCH = 500

PRODUCER_IDLE_MS = 3_600_000
"""A producer repeats a lost call within seconds (``enqueue_timeout``); after an hour its number is of no use."""

_TIME = raw("TIME", decode=lambda reply: int(reply[0]) * 1_000 + int(reply[1]) // 1_000)


def _key(keys: QueueKeys) -> bytes:
    return keys.jobs


# -- promote ------------------------------------------------------------------------------------


class Promoter:
    """Makes jobs ready when they are due: to the millisecond, without polling.

    It knows for each queue when the next job is due (on this process's monotonic clock) and sleeps until the first of
    these. :class:`Waker` tells when one has come in before that. Where much is due at once, queues get turns of
    :data:`BATCH` jobs.
    """

    def __init__(self, leadership: Leadership, link: Link, roster: Roster) -> None:
        self.service = leadership.follow("promote", self.step)
        self._leadership = leadership
        self._link = link
        self._roster = roster
        self._due: dict[str, float] = {}
        self._noticed: set[str] = set()  # apart from `_due`, which a look that is under way replaces
        self._epoch = (0, 0)
        self._look_at = 0.0
        self._shards = Shards(link, late=self.service.wake)

    def notice(self, queue: str) -> None:
        """The due set of this queue has a new head."""
        self._noticed.add(queue)
        self.service.wake()

    def look_again(self) -> None:
        """Queues may have come, or wake tokens may have been lost."""
        self._look_at = 0.0
        self.service.wake()

    async def step(self) -> float:
        """One batch of each queue that has something due; seconds until the next is."""
        if self._epoch != self._leadership.epoch or time.monotonic() >= self._look_at:
            self._epoch = self._leadership.epoch
            self._look_at = time.monotonic() + LOOK
            queues = self._roster.queues
            self._due = {queue: due for queue, due in self._due.items() if queue in queues}
            await self._shards.each(queues.values(), _key, self._look)
        while self._noticed:
            self._due[self._noticed.pop()] = 0.0
        await self._shards.each(self._ready(), _key, self._promote_each)
        return min([self._look_at, *self._due.values()]) - time.monotonic()

    def _ready(self) -> list[QueueKeys]:
        """Those that have something due; when they have again is not known until they are looked at."""
        now = time.monotonic()
        ready = [queue for queue, due in self._due.items() if due <= now]
        self._due.update(dict.fromkeys(ready, math.inf))
        return [self._roster.queues[queue] for queue in ready if queue in self._roster.queues]

    async def _look(self, queues: list[QueueKeys]) -> None:
        """When each of these queues has something due, as of now."""
        for chunk in chunks(queues):
            heads: list[Command[Any]] = [raw("ZRANGE", keys.due, 0, 0, "WITHSCORES") for keys in chunk]
            now_ms, *replies = await self._link.ask([_TIME, *heads])
            at = time.monotonic()
            for keys, head in zip(chunk, replies, strict=True):
                is_due = self._link.went_well("promote", keys.queue, head) and len(head) > 0
                self._due[keys.queue] = at + (float(head[1]) - now_ms) / 1_000 if is_due else math.inf

    async def _promote_each(self, queues: list[QueueKeys]) -> None:
        for keys in queues:
            if self._leadership.leading:
                self._due[keys.queue] = await self._promote(keys)

    async def _promote(self, keys: QueueKeys) -> float:
        """When the queue is due again."""
        (promoted,) = await self._link.ask([promote(keys, BATCH)])
        at = time.monotonic()
        if not self._link.went_well("promote", keys.queue, promoted):
            return math.inf  # until the next look
        moved, now_ms, next_ms = promoted
        if not moved and next_ms < 0:
            return math.inf
        self._link.metrics.count("promoted", moved)
        if moved >= BATCH:
            return 0.0
        due = at + (next_ms - now_ms) / 1_000 if next_ms >= 0 else math.inf
        return max(due, at + SPACING) if moved else due


class Waker:
    """Waits on a connection of its own for the tokens that say: a due set has a new head."""

    def __init__(self, leadership: Leadership, link: Link, roster: Roster, promoter: Promoter) -> None:
        self.service = leadership.follow("wake", self.step, link=link)
        self._link = link
        self._roster = roster
        self._promoter = promoter
        self._links: dict[bytes, Link] = {}  # in a cluster: of each list
        self._pops = Shards(link, place=lambda key: key, patience=WAIT + PATIENCE)

    async def step(self) -> float:
        """Blocking pops for a while: one over all lists, or one over each in a cluster, where they are in several slots."""
        lists = {keys.due_wake: keys.queue for keys in self._roster.queues.values()}
        if not lists:
            return WAIT
        if not self._link.connection.endpoint.nodes:
            await self._pop(self._link, lists, WAIT)
            return 0.0
        until = time.monotonic() + WAIT

        async def pop(of: list[bytes]) -> None:
            for key in of:
                while (left := until - time.monotonic()) > 0.01:  # a timeout of 0 means for ever
                    await self._pop(self._link_to(key), {key: lists[key]}, left)

        waiting = await self._pops.each(lists, bytes, pop)
        return SHORTEST if len(waiting) == len(lists) else 0.0

    def _link_to(self, key: bytes) -> Link:
        """The link for the pops on one list; those of lists that have gone are closed at the end."""
        if key not in self._links:
            other = self._link.connection.split(2)[1]
            self._links[key] = Link(other, self._link.metrics, quiet=True)
        return self._links[key]

    async def _pop(self, link: Link, lists: dict[bytes, str], seconds: float) -> None:
        try:
            popped: list[bytes] | None = await link.call(raw("BLPOP", *lists, seconds))
        except BrokerUnavailable:  # a token may have been on its way here
            if len(lists) > 1:
                self._promoter.look_again()
            self._promoter.notice(next(iter(lists.values())))
            raise
        if popped is not None:
            self._promoter.notice(lists[popped[0]])

    async def close(self) -> None:
        """Close the connections."""
        for link in (self._link, *self._links.values()):
            await link.connection.close()


# -- recover ------------------------------------------------------------------------------------


class _Leases(NamedTuple):
    """What a look at the leases of some queues has found."""

    expired: list[tuple[QueueKeys, str]]
    foreign: list[tuple[QueueKeys, bytes]]  # no worker has such a name
    ahead: list[tuple[QueueKeys, list[str]]]  # they end further ahead than they can
    next_in: float  # seconds until another one may run out

    def plus(self, keys: QueueKeys, soon: list[bytes], ahead: list[bytes], now_ms: int) -> _Leases:
        """This, and a queue's leases that end soon (with their ends), and those that end too far ahead."""
        names = [*soon[::2], *ahead]
        foreign = [(keys, name) for name in names if not _WORKER.fullmatch(name)]
        pairs = zip(soon[::2], soon[1::2], strict=True)
        ends = [(name.decode(), float(end)) for name, end in pairs if _WORKER.fullmatch(name)]
        next_in = min([self.next_in, *((end - now_ms + 1) / 1_000 for _, end in ends if end > now_ms)])
        expired = [(keys, worker) for worker, end in ends if end <= now_ms]
        far = [worker.decode() for worker in ahead if _WORKER.fullmatch(worker)]
        known = [(keys, far)] if far else []
        return _Leases(self.expired + expired, self.foreign + foreign, self.ahead + known, next_in)


class Recoverer:
    """Hands back the jobs of workers whose lease has run out.

    Nobody is recovered after a silence (F-32): if this scheduler or Redis stood still, or Redis's clock was set forward
    (F-36), workers could not extend their leases either; they get the time of one heartbeat to do it. Leases that end
    further ahead than they are long are brought back: the clock was set back since they were extended (F-36).
    """

    def __init__(self, leadership: Leadership, link: Link, roster: Roster, settings: Settings) -> None:
        self.service = leadership.follow("recover", self.step)
        self._leadership = leadership
        self._link = link
        self._roster = roster
        self._settings = settings
        self._period = min(max(settings.lease / 5, 0.5), 3.0)
        self._heartbeat = settings.lease / 3
        self._patience = max(self._heartbeat, 1.5 * self._period)
        # By place: the last look, in which term, and when by our monotonic clock and by Redis's; and when to act again.
        self._seen: dict[Any, tuple[int, float, float]] = {}
        self._not_before: dict[Any, float] = {}
        self._wait = self._period
        self._shards = Shards(link)

    async def step(self) -> float:
        """Look at the leases of every queue and act on those that are out; seconds until the next look."""
        self._wait = self._period
        await self._shards.each(self._roster.queues.values(), _key, self._care_for)
        return max(self._wait, SHORTEST)

    async def _care_for(self, queues: list[QueueKeys]) -> None:
        place = self._link.connection.place(queues[0].workers) if queues else None
        for chunk in chunks(queues):
            leases = await self._look(chunk, place)
            for keys, workers in leases.ahead:
                await self._clamp(keys, workers)
            if leases.foreign:  # they would fill each look, and hide the leases that have run out
                log.warning("leases of nobody removed", extra=fields(count=len(leases.foreign)))
                await self._link.ask([raw("ZREM", keys.workers, name) for keys, name in leases.foreign])
            self._wait = min(self._wait, leases.next_in)
            patient = self._not_before.get(place, -math.inf) - time.monotonic()
            if patient > 0:
                self._wait = min(self._wait, patient) if leases.expired else self._wait
                continue
            for keys, worker in leases.expired:
                if self._leadership.leading:
                    await self._recover(keys, worker)

    async def _look(self, chunk: Sequence[QueueKeys], place: Any) -> _Leases:
        now = self._link.now_ms()
        soon = now + round(self._period * 1_000)
        far = (
            now + round(self._settings.lease * 1_000) + 1_000
        )  # one second: this process's idea of Redis's time is old
        looks: list[Command[Any]] = []
        for keys in chunk:
            looks.append(raw("ZRANGE", keys.workers, "-inf", soon, "BYSCORE", "LIMIT", 0, 100, "WITHSCORES"))
            looks.append(raw("ZRANGE", keys.workers, f"({far}", "+inf", "BYSCORE", "LIMIT", 0, 100))
        now_ms, *replies = await self._link.ask([_TIME, *looks])
        self._mind_silence(now_ms / 1_000, place)
        leases = _Leases([], [], [], self._period)
        for keys, out, ahead in zip(chunk, replies[::2], replies[1::2], strict=True):
            if self._link.went_well("recover", keys.queue, out):
                leases = leases.plus(keys, out, ahead, now_ms)
        return leases

    def _mind_silence(self, redis_now: float, place: Any) -> None:
        term, _ = self._leadership.epoch
        now, (seen_in, local, remote) = time.monotonic(), self._seen.get(place, (0, 0.0, 0.0))
        self._seen[place] = term, now, redis_now
        silence = max(now - local, redis_now - remote)
        if seen_in == term and silence <= self._patience:
            return
        self._not_before[place] = now + self._heartbeat
        if seen_in == term:
            said = fields(seconds=round(silence, 1), wait=round(self._heartbeat, 1))
            log.warning("redis or scheduler stood still, workers are given time", extra=said)

    async def _recover(self, keys: QueueKeys, worker: str) -> None:
        settings = self._settings
        (card,) = await self._link.ask([raw("HGET", keys.info, worker)])
        host = _host(worker, card)
        charged = await self._culprits(keys, worker)
        command = recover(
            keys, worker, expired=True, charge="started", started=charged, max_deliveries=settings.max_deliveries,
            dead_max=settings.dead_max, error=encode(self._poison(worker, host)), limit=RECOVER_BATCH,
        )  # fmt: skip
        total = Recovered(0, 0, 1)
        while total.remaining > 0:
            (part,) = await self._link.ask([command])
            if not self._link.went_well("recover", keys.queue, part) or part.remaining < 0:
                return  # extended at the last moment
            total = Recovered(total.ready + part.ready, total.dead + part.dead, part.remaining)
        self._link.metrics.count("recovered", total.ready)
        self._link.metrics.count("poisoned", total.dead)
        said = fields(worker=worker, queue=keys.queue, host=host, recovered=total.ready, poisoned=total.dead)
        log.warning("worker lost, its lease ran out", extra=said)

    async def _culprits(self, keys: QueueKeys, worker: str) -> list[str]:
        """Whom to charge: of a lost worker nobody knows which jobs had started, so all that it held are suspects."""
        (held,) = await self._link.ask([raw("SMEMBERS", keys.running(worker))])
        members = [] if isinstance(held, BrokerError) else [job for job in held if job != PAD.encode()]
        jobs = [job.decode() for job in members if job.isascii()]
        if not jobs:
            return []
        (deaths,) = await self._link.ask([raw("HMGET", keys.deliveries, *jobs)])
        counts = [0] * len(jobs) if isinstance(deaths, BrokerError) else [number_of(count) for count in deaths]
        return culprits(jobs, counts, self._settings.max_deliveries)

    def _poison(self, worker: str, host: str) -> ErrorInfo:
        times = self._settings.max_deliveries
        message = (
            f"its worker died {times} times; the last one, {worker}, went silent and its lease ran out: host gone?"
        )
        return ErrorInfo("poison", "WorkerLost", message, "", 0, self._link.now_ms(), host)

    async def _clamp(self, keys: QueueKeys, workers: list[str]) -> None:
        cards = await self._link.ask([raw("HGET", keys.info, worker) for worker in workers])
        own = round(self._settings.lease * 1_000)
        leases = [(worker, _lease(card) or own) for worker, card in zip(workers, cards, strict=True)]
        (clamped,) = await self._link.ask([clamp(keys, leases)])
        if self._link.went_well("clamp", keys.queue, clamped) and clamped:
            said = fields(queue=keys.queue, leases=clamped)
            log.warning("leases ended too far ahead, redis's clock was set back", extra=said)


def _card(data: object) -> WorkerCard | None:
    try:
        return msgspec.msgpack.decode(data, type=WorkerCard) if isinstance(data, bytes) else None
    except Exception:  # noqa: BLE001  # whatever another release or a foreigner has written
        return None


def _host(worker: str, data: object) -> str:
    card = _card(data)
    return card.host if card is not None else worker.partition(".")[0]


def _lease(data: object) -> int:
    card = _card(data)
    return card.lease if card is not None else 0


# -- parked ------------------------------------------------------------------------------------


class Unparker:
    """Sends one job of each limit that no worker looks after back to its queue: the worker that had parked it has gone,
    or has no slot. Whoever gets that job looks after its limit and fetches the others.
    """

    def __init__(self, leadership: Leadership, link: Link, roster: Roster) -> None:
        self.service = leadership.follow("unpark", self.step)
        self._link = link
        self._roster = roster
        self._shards = Shards(link)
        self._more = False

    async def step(self) -> float:
        """One batch of each queue; seconds until the next look."""
        self._more = False
        await self._shards.each(self._roster.queues.values(), _key, self._unpark)
        return SHORTEST if self._more else UNPARK

    async def _unpark(self, queues: list[QueueKeys]) -> None:
        for chunk in chunks(queues):
            replies = await self._link.ask([unpark_due(keys, UNPARK_BATCH) for keys in chunk])
            for keys, unparked in zip(chunk, replies, strict=True):
                if self._link.went_well("unpark_due", keys.queue, unparked) and unparked.moved:
                    log.debug("unparked", extra=fields(queue=keys.queue, jobs=unparked.moved))
                    self._more = self._more or unparked.moved >= UNPARK_BATCH


# -- prune --------------------------------------------------------------------------------------


class Pruner:
    """Deletes dead letters that are too old, and the traces of producers and results that have gone."""

    def __init__(self, leadership: Leadership, link: Link, roster: Roster, settings: Settings) -> None:
        self.service = leadership.follow("prune", self.step, jitter=0.2)
        self._leadership = leadership
        self._link = link
        self._roster = roster
        self._dead_max_age_ms = round(settings.dead_max_age * 1_000)
        self._cursors: dict[str, bytes] = {}  # where the round over a queue's producers goes on
        self._shards = Shards(link)

    async def step(self) -> float:
        """One bounded round over all queues."""
        await self._shards.each(self._roster.queues.values(), _key, self._prune_each)
        return PRUNE

    async def _prune_each(self, queues: list[QueueKeys]) -> None:
        for keys in queues:
            calls = 0
            while calls < PRUNE_CALLS and self._leadership.leading and await self._prune(keys):
                calls += 1

    async def _prune(self, keys: QueueKeys) -> bool:
        """Whether there is more to do."""
        before = self._link.now_ms() - self._dead_max_age_ms
        cursor = self._cursors.get(keys.queue, b"0")
        commands: list[Command[Any]] = [
            discard(keys, before_ms=before, limit=PRUNE_BATCH),
            prune(keys, PRODUCER_IDLE_MS, cursor, PRUNE_BATCH),
        ]
        dead, pruned = await self._link.ask(commands)
        self._cursors[keys.queue] = b"0"
        more = False
        if self._link.went_well("discard", keys.queue, dead):
            self._count(keys, "dead letters", dead)
            more = dead >= PRUNE_BATCH
        if self._link.went_well("prune", keys.queue, pruned):
            return self._forgot(keys, pruned) or more
        return more

    def _forgot(self, keys: QueueKeys, pruned: Pruned) -> bool:
        self._count(keys, "producers", pruned.producers)
        self._count(keys, "buckets", pruned.buckets)
        self._cursors[keys.queue] = pruned.cursor
        return pruned.cursor != b"0"

    def _count(self, keys: QueueKeys, what: str, number: Any) -> None:
        if number:
            self._link.metrics.count("pruned", number)
            log.debug("pruned", extra=fields(queue=keys.queue, what=what, count=number))
