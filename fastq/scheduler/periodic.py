"""Ticks of cron entries and intervals become jobs: each tick once, whatever number of schedulers there is.

A schedule's last tick is kept in Redis beside its queue. fire.lua compares and sets it in the same call that enqueues the
job, so of all schedulers that fire a tick, one does. The job's id is made of the schedule's name and the tick.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastq.app import FastQ
from fastq.arguments import check_size
from fastq.broker.commands import Command, fire, raw
from fastq.broker.keys import GlobalKeys, QueueKeys
from fastq.cron import SKIP_GRACE, MisfirePolicy, Schedule, due_ticks
from fastq.job import VERSION, Envelope, Extra, encode
from fastq.logs import fields
from fastq.registry import Periodic
from fastq.scheduler.link import CHUNK, Leadership, Link

__all__ = ["Entry", "Ticker", "entries_of", "job_id"]

log = logging.getLogger("fastq.scheduler")

MOST = 100
"""Missed ticks that ``misfire="all"`` makes up for: the newest ones."""

NAP = 1.0
"""Longest sleep: Redis's clock may have been set meanwhile."""

RETRY = 1.0
"""Seconds until a tick is tried again that Redis has refused (out of memory, no permission)."""

BROKEN = 60.0
"""Seconds until a schedule is asked again that has raised an error (``Schedule`` may be the user's own)."""

_NOT_IN_ID = re.compile(r"[^A-Za-z0-9_.:/+=-]+")
_LONGEST_NAME = 80


def job_id(schedule: str, tick_ms: int) -> str:
    """The id of the job of one tick; names that do not fit into an id are shortened and told apart by a digest.

    >>> job_id("nightly", 1_000), job_id("report */5 * * * *", 2_000)
    ('nightly@1000', 'report_/5_-453ce961d4@2000')
    """
    name = _NOT_IN_ID.sub("_", schedule)
    if name != schedule or len(name) > _LONGEST_NAME:
        digest = hashlib.blake2b(schedule.encode("utf-8", "replace"), digest_size=5).hexdigest()
        name = f"{name[:_LONGEST_NAME]}-{digest}"
    return f"{name}@{tick_ms}"


def shown(instant: float) -> str:
    """An instant in seconds since the epoch, for the log."""
    return dt.datetime.fromtimestamp(instant, dt.UTC).isoformat(timespec="milliseconds")


class Entry:
    """One schedule, its job's body encoded, and how far it has come.

    Raises:
        InvalidArguments, BodyTooLarge: the arguments of the schedule do not fit its task.
    """

    def __init__(self, app: FastQ, periodic: Periodic) -> None:
        task = periodic.task
        self.name = periodic.name
        self.schedule: Schedule = periodic.schedule
        self.misfire: MisfirePolicy = periodic.misfire
        self.keys: QueueKeys = app.keys(app.queue_of(task.name, task.defaults.queue))
        self.last: float | None = None  # the newest tick dealt with, as far as known here; seconds since the epoch
        self.due = -math.inf  # when to look again, by Redis's clock; seconds
        self._task = task.name
        self._priority = task.defaults.priority
        self._expires = task.defaults.expires
        self._body = check_size(task.name, task.arguments.encode(periodic.args, periodic.kwargs), app.max_body())

    def envelope(self, tick_ms: int, now_ms: int) -> bytes:
        """The job of one tick. Its ``due_at`` is the tick, its expiry counts from now: it may be late by design."""
        extra = Extra(schedule=self.name, due_at=tick_ms)
        if self._expires is not None:
            extra.expires_at = now_ms + round(self._expires * 1_000)
        return encode(Envelope(self._priority, VERSION, self._task, self._body, now_ms, 0, extra))

    def fire(self, tick: float, now_ms: int) -> Command[bool]:
        """The command that enqueues the job of one tick, unless somebody did."""
        tick_ms = round(tick * 1_000)
        return fire(
            self.keys, self._priority, self.name, tick_ms, job_id(self.name, tick_ms), self.envelope(tick_ms, now_ms)
        )

    def ticks(self, now: float) -> list[float]:
        """The ticks to fire now, by the schedule's policy for missed ones."""
        assert self.last is not None
        ticks = due_ticks(self.schedule, self.last, now, self.misfire, MOST + 1)
        if len(ticks) > MOST:
            ticks = _newest(self.schedule, self.last, now)
        first = self.schedule.next(self.last)
        if first <= now and (not ticks or first < ticks[0] or now - first > SKIP_GRACE):
            late = round(now - first, 1)
            said = fields(schedule=self.name, misfire=self.misfire, since=shown(first), late=late, fired=len(ticks))
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


def entries_of(app: FastQ) -> list[Entry]:
    """An entry for each schedule of the application. Raises as :class:`Entry`."""
    return [Entry(app, periodic) for periodic in app.periodic.values()]


class Ticker:
    """Fires what is due and sleeps until the next tick, by Redis's clock."""

    def __init__(self, leadership: Leadership, link: Link, entries: Iterable[Entry], prefix: str) -> None:
        self.service = leadership.follow("periodic", self.step)
        self._leadership = leadership
        self._link = link
        self._entries = list(entries)
        self._queues = GlobalKeys(prefix).queues
        self._epoch = (0, 0)

    @property
    def upcoming(self) -> list[tuple[str, float]]:
        """Each schedule's name and next tick (seconds since the epoch), the next one first; for the operator."""
        return sorted(
            ((e.name, e.due) for e in self._entries if e.due < math.inf and e.last is not None),
            key=lambda pair: pair[1],
        )

    async def step(self) -> float:
        """Fire what is due; seconds until the next tick."""
        if not self._entries:
            return math.inf
        if self._epoch != self._leadership.epoch:
            self._epoch = self._leadership.epoch
            for entry in self._entries:
                entry.last, entry.due = None, -math.inf
        now = self._now()
        await self._learn([entry for entry in self._entries if entry.last is None and entry.due <= now])
        now = self._now()
        due = [entry for entry in self._entries if entry.last is not None and entry.due <= now]
        await self._fire(self._ticks(due, now))
        for entry in due:
            if entry.due <= now:
                with self._apart(entry):
                    entry.begin(now)
        return min(max(min(entry.due for entry in self._entries) - self._now(), 0.001), NAP)

    def _now(self) -> float:
        return self._link.now_ms() / 1_000

    async def _learn(self, entries: Sequence[Entry]) -> None:
        """Ask how far each schedule has come; one that is new begins now."""
        for start in range(0, len(entries), CHUNK):
            chunk = entries[start : start + CHUNK]
            now = self._link.now_ms()
            asked: list[Command[Any]] = []
            for entry in chunk:
                asked.append(raw("HSETNX", entry.keys.ticks, entry.name, now))
                asked.append(raw("HGET", entry.keys.ticks, entry.name))
                asked.append(raw("SADD", self._queues, entry.keys.queue))
            replies = await self._link.ask(asked)
            for entry, last in zip(chunk, replies[1::3], strict=True):
                if self._link.went_well("ticks", entry.keys.queue, last):
                    with self._apart(entry):
                        entry.begin(int(last) / 1_000)
                else:
                    entry.due = self._now() + RETRY

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
                if not self._link.went_well("fire", entry.keys.queue, reply):
                    entry.due = now_ms / 1_000 + RETRY
                    ticks[entry].clear()
                elif reply:
                    self._fired(entry, tick, now_ms)
                if not ticks[entry]:
                    del ticks[entry]
        for entry in ticks:  # no leader any more
            entry.due = math.inf

    def _fired(self, entry: Entry, tick: float, now_ms: int) -> None:
        self._link.metrics.count("fired")
        job = job_id(entry.name, round(tick * 1_000))
        log.debug("schedule fired", extra=fields(schedule=entry.name, job=job, late=round(now_ms / 1_000 - tick, 3)))

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
