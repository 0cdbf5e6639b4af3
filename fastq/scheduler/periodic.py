"""Ticks of cron entries and intervals become jobs: each tick once, whatever number of schedulers there is.

A schedule's last tick is kept in Redis beside its queue. fire.lua compares and sets it in the same call that enqueues the
job, so of all schedulers that fire a tick, one does. The job's id is made of the schedule's name and the tick. Definitions
stand in Redis, too: those of the code are declared there when a scheduler starts (:mod:`fastq.broker.planner`).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import heapq
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastq.broker.command import Command, raw
from fastq.broker.inspector import Inspector
from fastq.broker.keys import QueueKeys
from fastq.broker.planner import Declared, Planner
from fastq.broker.timing import Fired, fire, trace
from fastq.broker.views import text_of
from fastq.cron import SKIP_GRACE, Schedule, due_ticks
from fastq.errors import BrokerError, BrokerUnavailable
from fastq.logs import fields
from fastq.scheduler.link import CHUNK, Leadership, Link, chunks, resilient
from fastq.scheduler.shards import Shards
from fastq.timetable import Definition, decode_definition, job_id

__all__ = ["Entry", "Ticker"]

log = logging.getLogger("fastq.scheduler")

Seal = Callable[[str, str, bytes], bytes]

MOST = 100
"""Missed ticks that ``misfire="all"`` makes up for: the newest ones."""

NAP = 1.0
"""Longest sleep: Redis's clock may have been set, and schedules may have been changed meanwhile."""

RELOAD = 30.0
"""Seconds after which every definition is read again, whatever the count of changes says."""

RETRY = 1.0
"""Seconds until a tick is tried again that Redis has refused (out of memory, no permission)."""

HELD = 0.5
"""Seconds until a tick is tried again that waits for the job of an earlier one (``overlap="queue"``)."""

TRACE = 2.0
"""Seconds between two looks at how runs ended; records of jobs live at least a second."""

BROKEN = 60.0
"""Seconds until a schedule is asked again that has raised an error (``Schedule`` may be the user's own)."""


def shown(instant: float) -> str:
    """An instant in seconds since the epoch, for the log."""
    return dt.datetime.fromtimestamp(instant, dt.UTC).isoformat(timespec="milliseconds")


class Entry:
    """One schedule as stored, and how far it has come."""

    __slots__ = ("data", "definition", "due", "keys", "last", "name", "open", "schedule", "seal", "told")

    def __init__(
        self, keys: QueueKeys, definition: Definition, data: bytes, schedule: Schedule, seal: Seal | None = None
    ) -> None:
        self.name = definition.name
        self.keys = keys
        self.definition = definition
        self.data = data
        self.schedule = schedule
        self.seal = seal
        self.last: float | None = None  # the newest tick dealt with, as far as known here; seconds since the epoch
        self.due = -math.inf  # when to look again, by Redis's clock; seconds
        self.open = True  # whether one of its jobs may live
        self.told = -math.inf  # the missed tick that was logged: one that cannot be fired now is met again and again

    def fire(self, tick: float, now_ms: int) -> Command[Fired]:
        """The command that enqueues the job of one tick, unless somebody did."""
        known, tick_ms = self.definition, round(tick * 1_000)
        late, job = known.delay_ms(tick_ms), job_id(self.name, tick_ms)
        envelope = known.envelope(tick_ms, now_ms, late)
        return fire(
            self.keys,
            known.priority,
            self.name,
            tick_ms,
            job,
            envelope if self.seal is None else self.seal(self.keys.queue, job, envelope),
            self.data,
            delay_ms=late,
            overlap="queue" if known.overlap == "cancel" else known.overlap,
            most=known.most,
        )

    def ticks(self, now: float) -> list[float]:
        """The ticks to fire now, by the schedule's policy for missed ones."""
        assert self.last is not None
        known = self.definition
        ticks = due_ticks(self.schedule, self.last, now, known.misfire, MOST + 1, known.grace)
        if len(ticks) > MOST:
            ticks = _newest(self.schedule, self.last, now)
        first = self.schedule.next(self.last)
        waits = known.overlap in ("queue", "cancel")  # ticks that wait for their turn are late on purpose
        if self.told < first <= now and not waits and (not ticks or first < ticks[0] or now - first > SKIP_GRACE):
            self.told, late = first, round(now - first, 1)
            said = fields(schedule=self.name, misfire=known.misfire, since=shown(first), late=late, due=len(ticks))
            log.warning("ticks missed", extra=said)
        return ticks

    def begin(self, last: float) -> None:
        """Every tick up to ``last`` is fired or dropped."""
        self.last, self.due = last, self.schedule.next(last)
        if self.due <= last:
            raise ValueError(f"the tick after {last} is {self.due}")


def _newest(schedule: Schedule, after: float, now: float) -> list[float]:
    ticks: list[float] = []
    tick = schedule.previous(math.nextafter(now, math.inf))
    while tick > after and len(ticks) < MOST:
        ticks.append(tick)
        tick = schedule.previous(tick)
    return ticks[::-1]


def _key(entry: Entry) -> bytes:
    return entry.keys.schedules


class Agenda:
    """The entries of all queues by name, and in the order in which they are due."""

    def __init__(self) -> None:
        self.queues: dict[str, dict[str, Entry]] = {}
        self._heap: list[tuple[float, int, Entry]] = []
        self._numbers = itertools.count()

    def __iter__(self) -> Iterator[Entry]:
        for entries in self.queues.values():
            yield from entries.values()

    def put(self, entry: Entry) -> None:
        """Take in an entry whose ``due`` was set."""
        heapq.heappush(self._heap, (entry.due, next(self._numbers), entry))

    def take(self, now: float, most: int) -> list[Entry]:
        """Entries that are due, the earliest ones; put them back."""
        found: list[Entry] = []
        while self._heap and self._heap[0][0] <= now and len(found) < most:
            due, _, entry = heapq.heappop(self._heap)
            if self._counts(due, entry):
                found.append(entry)
        return found

    def next_due(self) -> float:
        """When the first one is due."""
        while self._heap and not self._counts(self._heap[0][0], self._heap[0][2]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def _counts(self, due: float, entry: Entry) -> bool:
        return entry.due == due and self.queues.get(entry.keys.queue, {}).get(entry.name) is entry


class Ticker:
    """Fires what is due and sleeps until the next tick, by Redis's clock.

    Args:
        leadership, link: of this scheduler.
        planner: where the schedules are.
        source: the application whose code declares ``declared``.
        declared: its schedules.
        inspector: cancels jobs (``overlap="cancel"``).
        seal: signs the jobs of those schedules that this application's code declares, and of no others: whoever can write
            to Redis can write a schedule, too.
    """

    def __init__(
        self,
        leadership: Leadership,
        link: Link,
        planner: Planner,
        source: str,
        declared: Sequence[Declared],
        inspector: Inspector,
        seal: Seal | None = None,
    ) -> None:
        self.service = leadership.follow("periodic", self.step)
        self.tracer = leadership.follow("trace", self.trace, jitter=0.1)
        self.declaring = resilient(
            "declare", self.declare, link
        )  # also of a standby: the code that started last counts
        self.agenda = Agenda()
        self._leadership = leadership
        self._link = link
        self._planner = planner
        self._source = source
        self._declared = declared
        self._inspector = inspector
        self._seal = seal
        self._own: Mapping[str, Schedule] = {d.definition.name: d.own for d in declared if d.own is not None}
        self._epoch = (0, 0)
        self._changes: dict[str, int] = {}
        self._looked = -math.inf
        self._loaded = -math.inf
        self._outdated = True
        self._lists, self._loads, self._ticking = (Shards(link, late=self.service.wake) for _ in range(3))
        self._traces = Shards(link)

    @property
    def upcoming(self) -> list[tuple[str, float]]:
        """Each schedule's name and next tick (seconds since the epoch), the next one first; for the operator."""
        return sorted(
            ((e.name, e.due) for e in self.agenda if e.due < math.inf and e.last is not None),
            key=lambda pair: pair[1],
        )

    # -- what there is ------------------------------------------------------------------------------

    async def declare(self) -> float:
        """Tell Redis what the code says, once."""
        await self._link.connection.run(self._planner.declare(self._source, self._declared))
        return math.inf

    async def _declare_again(self) -> None:
        try:
            await self.declare()
        except BrokerUnavailable:
            raise
        except BrokerError as error:  # out of memory, say: what is stored goes on
            self._link.went_well("declare", self._source, error)

    async def _look(self) -> None:
        """Take in what was changed; at most one command a second when nothing was."""
        loop = asyncio.get_running_loop().time()
        if self._epoch != self._leadership.epoch:
            (term, _), self._epoch = self._epoch, self._leadership.epoch
            self._outdated = True
            if term != self._epoch[0]:
                self.agenda = Agenda()  # another scheduler may have fired meanwhile
        elif loop - self._looked < NAP * 0.9:
            return
        self._looked = loop
        await self._lists.each([self._planner.listed], lambda key: key, self._take_in)

    async def _take_in(self, _: object) -> None:
        changes = await self._link.call(self._planner.changes())
        if self._source not in changes.sources:  # a Redis that came back empty
            await self._declare_again()
            changes = await self._link.call(self._planner.changes())
        if self._outdated:
            self._outdated = False
            self.agenda = Agenda()
            self._changes.clear()
        loop = asyncio.get_running_loop().time()
        if loop - self._loaded > RELOAD:
            self._loaded = loop
            self._changes.clear()
        for queue in self.agenda.queues.keys() - changes.queues.keys():
            del self.agenda.queues[queue]
        changed = [(queue, count) for queue, count in changes.queues.items() if self._changes.get(queue) != count]
        await self._loads.each(changed, lambda each: self._planner.keys(each[0]).schedules, self._load_each)

    async def _load_each(self, changed: Sequence[tuple[str, int]]) -> None:
        for queue, count in changed:
            await self._load(queue)
            self._changes[queue] = count

    async def _load(self, queue: str) -> None:
        keys = self._planner.keys(queue)
        stored: dict[str, bytes] = await self._link.connection.run(self._planner.stored(queue))
        suspended: list[bytes] = await self._link.call(raw("SMEMBERS", keys.suspended))
        paused = set(map(text_of, suspended))
        entries = self.agenda.queues.setdefault(queue, {})
        for gone in (entries.keys() - stored.keys()) | paused:
            entries.pop(gone, None)
        for name, data in stored.items():
            known = entries.get(name)
            if name in paused or (known is not None and known.data == data):
                continue
            entry = self._entry(keys, data)
            if entry is None:
                entries.pop(name, None)  # only the code of another application can tell its ticks
                continue
            entries[name] = entry
            self.agenda.put(entry)

    def _entry(self, keys: QueueKeys, data: bytes) -> Entry | None:
        definition = decode_definition(data)
        if definition is None:
            return None
        try:
            schedule = definition.schedule(self._own)
        except Exception as error:  # noqa: BLE001 - a zone that this host does not have, say: the others go on
            log.error("schedule failed", extra=fields(schedule=definition.name, error=str(error)))
            return None
        if schedule is None:
            return None
        ours = any(each.queue == keys.queue and each.definition == definition for each in self._declared)
        if self._seal is not None and not ours:
            log.warning("schedule not signed", extra=fields(schedule=definition.name, queue=keys.queue))
        return Entry(keys, definition, data, schedule, self._seal if ours else None)

    # -- firing -------------------------------------------------------------------------------------

    async def step(self) -> float:
        """Fire what is due; seconds until the next tick."""
        await self._look()
        while self._leadership.leading and (due := self.agenda.take(self._now(), CHUNK)):
            for entry in await self._ticking.each(due, _key, self._serve):
                entry.due = self._now() + RETRY
                self.agenda.put(entry)
            await self._look()
        return min(max(self.agenda.next_due() - self._now(), 0.001), NAP)

    async def _serve(self, due: Sequence[Entry]) -> None:
        try:
            await self._learn([entry for entry in due if entry.last is None])
            now = self._now()
            ready = [entry for entry in due if entry.last is not None and entry.due <= now]
            await self._make_room(ready)
            await self._fire(self._ticks(ready, now))
            for entry in ready:
                if entry.due <= now:
                    with self._apart(entry):
                        entry.begin(now)
        finally:
            for entry in due:
                self.agenda.put(entry)

    def _now(self) -> float:
        return self._link.now_ms() / 1_000

    async def _learn(self, entries: Sequence[Entry]) -> None:
        """Ask how far each schedule has come; one that is new begins now."""
        if not entries:
            return
        now = self._link.now_ms()
        asked: list[Command[Any]] = []
        for entry in entries:
            asked.append(raw("HSETNX", entry.keys.ticks, entry.name, now))
            asked.append(raw("HGET", entry.keys.ticks, entry.name))
        replies = await self._link.ask(asked)
        for entry, last in zip(entries, replies[1::2], strict=True):
            if self._link.went_well("ticks", entry.keys.queue, last):
                with self._apart(entry):
                    entry.begin(int(last) / 1_000)
            else:
                entry.due = self._now() + RETRY

    async def _make_room(self, entries: Iterable[Entry]) -> None:
        """``overlap="cancel"``: end the jobs of earlier ticks first. Who dies in between leaves the rest to the heir."""
        for entry in entries:
            if entry.definition.overlap == "cancel" and entry.open:
                for run in await self._link.connection.run(self._planner.history(entry.name)):
                    if run.state == "open":
                        await self._link.connection.run(self._inspector.cancel(run.job_id, entry.keys.queue))

    async def _fire(self, ticks: dict[Entry, list[float]]) -> None:
        """Fire ticks, the first one of each schedule in one write, then the second ones: a later tick of a schedule must
        not overtake one that Redis refuses, or that would never be fired.
        """
        while ticks and self._leadership.leading:
            now_ms = self._link.now_ms()
            batch = [(entry, left[0]) for entry, left in list(ticks.items())[:CHUNK]]
            replies = await self._link.ask([entry.fire(tick, now_ms) for entry, tick in batch])
            for (entry, tick), reply in zip(batch, replies, strict=True):
                del ticks[entry][0]
                again = self._after(entry, tick, now_ms, reply)
                if again is not None:
                    entry.due = now_ms / 1_000 + again
                    ticks[entry].clear()
                if not ticks[entry]:
                    del ticks[entry]
        for entry in ticks:  # no leader any more
            entry.due = math.inf

    def _after(self, entry: Entry, tick: float, now_ms: int, reply: Fired) -> float | None:
        """What a reply means: seconds until the same tick is tried again, or None to go on."""
        if not self._link.went_well("fire", entry.keys.queue, reply):
            return RETRY
        if reply is Fired.CHANGED:
            self._changes.pop(entry.keys.queue, None)
            self._looked = -math.inf
            return RETRY
        if reply is Fired.HELD:
            return HELD
        entry.open = True
        if reply is Fired.ENQUEUED:
            self._link.metrics.count("fired")
            job = job_id(entry.name, round(tick * 1_000))
            late = round(now_ms / 1_000 - tick, 3)
            log.debug("schedule fired", extra=fields(schedule=entry.name, job=job, late=late))
        elif reply is Fired.SKIPPED:
            log.info(
                "tick skipped, its schedule's jobs still live", extra=fields(schedule=entry.name, tick=shown(tick))
            )
        return None

    def _ticks(self, entries: Iterable[Entry], now: float) -> dict[Entry, list[float]]:
        found: dict[Entry, list[float]] = {}
        for entry in entries:
            with self._apart(entry):
                found[entry] = entry.ticks(now)
        return {entry: ticks for entry, ticks in found.items() if ticks}

    @contextmanager
    def _apart(self, entry: Entry) -> Iterator[None]:
        """A schedule may be the user's own object: what it raises must not keep the others from being fired."""
        try:
            yield
        except Exception as error:  # it is told, and the schedule is set aside
            log.error("schedule failed", extra=fields(schedule=entry.name, again_in=BROKEN), exc_info=error)
            entry.last, entry.due = None, self._now() + BROKEN

    # -- how runs ended -----------------------------------------------------------------------------

    async def trace(self) -> float:
        """Write down how the runs since the last look ended."""
        waiting = [entry for entries in self.agenda.queues.values() for entry in entries.values() if entry.open]
        await self._traces.each(waiting, _key, self._trace)
        return TRACE

    async def _trace(self, waiting: Sequence[Entry]) -> None:
        for _, entries in itertools.groupby(waiting, lambda entry: entry.keys.queue):
            for chunk in chunks(entries):
                for entry in chunk:
                    entry.open = False  # a tick that is fired meanwhile sets it again
                alive = await self._link.call(trace(chunk[0].keys, [entry.name for entry in chunk]))
                for entry, count in zip(chunk, alive, strict=True):
                    entry.open = entry.open or count > 0
