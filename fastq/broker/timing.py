"""The commands of schedules: one pure function per script, as in :mod:`fastq.broker.commands`."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from fastq.broker.command import Command
from fastq.broker.keys import QueueKeys

__all__ = ["Fired", "fire", "revise", "schedule", "suspend", "trace", "unschedule"]


class Fired(enum.IntEnum):
    """What ``fire.lua`` did."""

    CHANGED = -2  # the definition is another one by now, or gone, or suspended
    HELD = -1  # as many of its jobs live as may
    BEFORE = 0  # dealt with before
    ENQUEUED = 1
    SKIPPED = 2  # dropped, for the reason of HELD


def fire(
    q: QueueKeys,
    priority: int,
    schedule: str,
    tick_ms: int,
    job_id: str,
    envelope: bytes,
    definition: bytes,
    *,
    delay_ms: int = 0,
    overlap: str = "allow",
    most: int = 1,
) -> Command[Fired]:
    """Enqueue the job of one tick, once; ``tick_ms`` 0: by hand."""
    keys = (
        q.ticks, q.jobs, q.ready[priority], q.wake, q.schedules, q.suspended, q.runs, q.due, q.due_wake,
    )  # fmt: skip
    return Command("fire", keys, (schedule, tick_ms, job_id, envelope, definition, delay_ms, overlap, most), Fired)


def schedule(q: QueueKeys, name: str, seen: bytes, definition: bytes, *, begin: bool, most: int) -> Command[int]:
    """Store a definition in place of ``seen``; the reply stands in the head of schedule.lua."""
    return Command("schedule", (q.schedules, q.ticks), (name, seen, definition, int(begin), most), int)


def unschedule(q: QueueKeys, name: str, seen: bytes = b"") -> Command[bool]:
    """Remove a schedule; with ``seen`` only while that is its definition."""
    return Command("unschedule", (q.schedules, q.ticks, q.suspended, q.runs), (name, seen), bool)


def revise(schedules: bytes, queue: str) -> Command[int]:
    """Let the schedulers know (by ``GlobalKeys.schedules``) that the schedules of ``queue`` have changed, whatever the memory."""
    return Command("revise", (schedules,), (queue,), int)


def suspend(q: QueueKeys, name: str, *, pause: bool) -> Command[bool]:
    """Pause or resume a schedule; False: there is none of this name."""
    return Command("suspend", (q.schedules, q.ticks, q.suspended), (name, int(pause)), bool)


def trace(q: QueueKeys, names: Sequence[str]) -> Command[list[int]]:
    """Write down how runs ended; per schedule how many of its jobs live."""
    return Command("trace", (q.runs, q.jobs, q.dead, q.done), names, list)
