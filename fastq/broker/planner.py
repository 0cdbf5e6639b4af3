"""Schedules in Redis: store, list, remove, pause, run now - operations that both movers run.

A definition lies beside the queue of its jobs (``{q}:schedules``), where ``fire.lua`` compares it in the call that
enqueues: what was removed or paused does not fire, whatever a scheduler still believes. ``<prefix>:schedules`` counts the
changes of each queue, so that a scheduler learns of all of them with one command.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fastq.broker import timing
from fastq.broker.command import Command, Operation, raw
from fastq.broker.commands import announce
from fastq.broker.keys import GlobalKeys, QueueKeys
from fastq.broker.views import clock, text_of
from fastq.cron import Schedule
from fastq.errors import BrokerReplyError, InvalidOption, InvalidQueueName, UnknownSchedule, did_you_mean
from fastq.job import encode
from fastq.timetable import Definition, ScheduleInfo, ScheduleRun, decode_definition, job_id
from fastq.values import check_queue_name

__all__ = ["Changes", "Declared", "Planner", "Stored"]

MOST = 50_000
"""Schedules of one queue: a leader holds them all in memory."""

_PAGE = 500
_TRIES = 10


class Declared(NamedTuple):
    """A schedule of an application's code: the queue of its jobs, and the object that only the code has, if any."""

    queue: str
    definition: Definition
    own: Schedule | None = None


class Stored(NamedTuple):
    """One definition as it lies in Redis."""

    q: QueueKeys
    name: str
    data: bytes


class Changes(NamedTuple):
    """What ``<prefix>:schedules`` says: changes by queue, and which applications have declared theirs."""

    queues: dict[str, int]
    sources: frozenset[str]


class Planner:
    """The schedules of one prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._global = GlobalKeys(prefix)

    def keys(self, queue: str) -> QueueKeys:
        """The key names of a queue."""
        return QueueKeys(self._prefix, check_queue_name(queue))

    # -- reading ----------------------------------------------------------------------------------

    @property
    def listed(self) -> bytes:
        """The key that :meth:`changes` reads."""
        return self._global.schedules

    def changes(self) -> Command[Changes]:
        """How often the schedules of each queue were changed."""
        return raw("HGETALL", self._global.schedules, decode=_changes)

    def stored(self, queue: str) -> Operation[dict[str, bytes]]:
        """Every definition of a queue, undecoded."""
        q, found, cursor = self.keys(queue), dict[str, bytes](), b"0"
        while True:
            cursor, flat = yield raw("HSCAN", q.schedules, cursor, "COUNT", _PAGE)
            found.update((text_of(name), data) for name, data in zip(flat[::2], flat[1::2], strict=True))
            if cursor == b"0":
                return found

    def find(self, name: str) -> Operation[Stored]:
        """The schedule of this name.

        Raises:
            UnknownSchedule: there is none.
        """
        found = yield from self._holders(name)
        if found:
            return found[0]
        names: list[str] = []
        for queue in (yield self.changes()).queues:
            names += yield from self.stored(queue)
        raise UnknownSchedule(f"no schedule is named {name!r:.250}{did_you_mean(name, names)}")

    def _holders(self, name: str) -> Operation[list[Stored]]:
        queues = [self.keys(queue) for queue in (yield self.changes()).queues]
        found = yield [raw("HGET", q.schedules, name) for q in queues]
        return [Stored(q, name, data) for q, data in zip(queues, found, strict=True) if data is not None]

    def list(self, own: Mapping[str, Schedule]) -> Operation[Sequence[ScheduleInfo]]:
        """All schedules, the next one first. ``own``: the objects that this process's code has."""
        infos: list[ScheduleInfo] = []
        for queue in sorted((yield self.changes()).queues):
            q = self.keys(queue)
            stored = yield from self.stored(queue)
            now, suspended = yield [clock(), raw("SMEMBERS", q.suspended)]
            paused = set(map(text_of, suspended))
            names = list(stored)
            for start in range(0, len(names), _PAGE):
                page = names[start : start + _PAGE]
                yield timing.trace(q, page)
                runs = yield raw("HMGET", q.runs, *page)
                for name, text in zip(page, runs, strict=True):
                    entry = decode_definition(stored[name])
                    if entry is not None:
                        infos.append(_info(entry, queue, name in paused, _runs(text), now / 1_000, own))
        return sorted(infos, key=lambda info: (info.next_run is None, info.next_run or 0.0, info.name))

    def history(self, name: str) -> Operation[Sequence[ScheduleRun]]:
        """The last runs of a schedule (20 at most), the newest first.

        Raises:
            UnknownSchedule: there is none of this name.
        """
        q, *_ = yield from self.find(name)
        yield timing.trace(q, [name])
        return _runs((yield raw("HGET", q.runs, name)))

    # -- changing -----------------------------------------------------------------------------------

    def put(self, queue: str, new: Definition) -> Operation[str]:
        """Store a definition made at run time, in place of one of the same name; a changed timing begins anew.

        Raises:
            InvalidOption: the name belongs to the application's code, or the queue has too many.
        """
        for other in (yield from self._holders(new.name)):
            before = decode_definition(other.data)
            if before is not None and before.source:
                raise InvalidOption(
                    f"the schedule {new.name!r} stands in the code of {before.source}: choose another name"
                )
            if other.q.queue != queue:
                yield timing.unschedule(other.q, new.name)
                yield self._bump(other.q.queue)
        # Counted before and after: a caller that dies in between leaves a queue that schedulers know of.
        yield self._bump(queue)
        yield from self._store(self.keys(queue), [new])
        yield [self._bump(queue), announce(self._global.queues, queue)]
        return new.name

    def _store(self, q: QueueKeys, entries: Sequence[Definition]) -> Operation[None]:
        left = list(entries)
        for _ in range(_TRIES * (1 + len(left) // _PAGE)):
            if not left:
                return
            page = left[:_PAGE]
            seen = yield raw("HMGET", q.schedules, *(new.name for new in page))
            replies = yield [_replace(q, data or b"", new) for data, new in zip(seen, page, strict=True)]
            if min(replies) < 0:
                raise InvalidOption(f"the queue {q.queue!r} has {MOST:,} schedules already")
            left = [new for new, stored in zip(page, replies, strict=True) if not stored] + left[_PAGE:]
        raise BrokerReplyError(f"others keep changing the schedules of queue {q.queue!r}: try again")

    def remove(self, name: str) -> Operation[bool]:
        """Remove a schedule; False when there is none of this name."""
        removed = False
        for q, *_ in (yield from self._holders(name)):
            removed = (yield timing.unschedule(q, name)) or removed
            yield self._bump(q.queue)
        return removed

    def pause(self, name: str, *, paused: bool) -> Operation[None]:
        """Pause or resume a schedule.

        Raises:
            UnknownSchedule: there is none of this name.
        """
        q, *_ = yield from self.find(name)
        yield timing.suspend(q, name, pause=paused)
        yield self._bump(q.queue)

    def run_now(self, name: str) -> Operation[str]:
        """Enqueue a job of a schedule at once, whatever its overlap policy says; the job's id.

        Raises:
            UnknownSchedule: there is none of this name.
        """
        for _ in range(_TRIES):
            q, _, data = yield from self.find(name)
            new = decode_definition(data)
            if new is None:
                raise BrokerReplyError(f"the definition of schedule {name!r} cannot be read")
            now = yield clock()
            job = f"{job_id(name, now)}.{os.urandom(3).hex()}"
            envelope = new.envelope(now, now)
            if (yield timing.fire(q, new.priority, name, 0, job, envelope, data)) is not timing.Fired.CHANGED:
                return job
        raise BrokerReplyError(f"others keep changing the schedule {name!r}: try again")

    def declare(self, source: str, declared: Iterable[Declared]) -> Operation[None]:
        """Make what Redis has of an application's code what the code says now: the rest of ``source`` is removed."""
        wanted = {(entry.queue, entry.definition.name): entry.definition for entry in declared}
        changed: set[str] = set()
        for queue in (yield self.changes()).queues:
            for name, data in (yield from self.stored(queue)).items():
                before = decode_definition(data)
                if before is not None and before.source == source and (queue, name) not in wanted:
                    yield timing.unschedule(self.keys(queue), name, data)
                    changed.add(queue)
        for queue in {queue for queue, _ in wanted}:
            yield [self._bump(queue), announce(self._global.queues, queue)]
            yield from self._store(self.keys(queue), [new for (other, _), new in wanted.items() if other == queue])
            changed.add(queue)
        if changed:
            yield [self._bump(queue) for queue in changed]
        now = yield clock()
        yield raw("HSET", self._global.schedules, f"@{source}", now)

    def _bump(self, queue: str) -> Command[int]:
        return timing.revise(self._global.schedules, queue)


def _replace(q: QueueKeys, seen: bytes, new: Definition) -> Command[int]:
    before = decode_definition(seen) if seen else None
    begin = bool(seen) and (before is None or not new.same_ticks(before))
    return timing.schedule(q, new.name, seen, encode(new), begin=begin, most=MOST)


def _changes(reply: list[bytes]) -> Changes:
    pairs = {text_of(field): value for field, value in zip(reply[::2], reply[1::2], strict=True)}
    queues: dict[str, int] = {}
    for name, count in pairs.items():
        try:
            queues[check_queue_name(name)] = int(count)
        except (InvalidQueueName, ValueError):
            continue  # a source, or written by somebody else
    return Changes(queues, frozenset(name[1:] for name in pairs if name.startswith("@")))


def _runs(text: bytes | None) -> list[ScheduleRun]:
    runs = []
    for line in text_of(text or b"").splitlines():
        parts = line.split(" ")
        if len(parts) == 4 and parts[0].isdigit() and parts[2].isdigit():
            tick = int(parts[0]) / 1_000 if parts[0] != "0" else None
            runs.append(ScheduleRun(tick, parts[1], int(parts[2]) / 1_000, parts[3]))
    return runs


def _info(
    entry: Definition, queue: str, paused: bool, runs: list[ScheduleRun], now: float, own: Mapping[str, Schedule]
) -> ScheduleInfo:
    schedule = entry.schedule(own)
    tick = schedule.next(now) if schedule is not None and not paused else None
    last = next((run for run in runs if run.state != "skipped"), None)
    return ScheduleInfo(
        id=entry.name,
        name=entry.name,
        task=entry.task,
        queue=queue,
        schedule=entry.explain(),
        tz=entry.tz,
        misfire=entry.misfire,
        overlap=entry.overlap,
        paused=paused,
        source=entry.source,
        next_run=tick if tick is not None and tick != float("inf") else None,
        last_run=last.at if last else None,
        last_status=last.state if last else None,
        last_job=last.job_id if last else None,
    )
