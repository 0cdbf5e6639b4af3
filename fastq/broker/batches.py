"""Batches in Redis: opened, closed, looked at, cancelled, and what is enqueued when they have ended.

A batch is one hash and one string of two bits per job in its queue's slot (docs/adr/0015-batches.md). The script that stores
its jobs counts them, and the script that ends a job counts that, so the numbers agree with the queue at every moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fastq.broker import commands
from fastq.broker.command import Command, Operation, raw
from fastq.broker.flows import ended_record
from fastq.broker.keys import QueueKeys
from fastq.broker.views import leases_of, number_of, text_of
from fastq.errors import BrokerUnavailable

__all__ = [
    "BatchView",
    "Which",
    "batch_call",
    "batch_close",
    "batch_open",
    "cancel",
    "close",
    "failed",
    "open_",
    "view",
]

OPEN = ("filling", "running")
WORDS = ("open", "success", "failed", "cancelled")
"""What the two bits of a job mean."""

PART = 4_000
"""Jobs whose bits are read at a time."""

TRIES = 3
"""How often what opens and closes a batch is sent before a lost connection is the caller's."""

Which = str
"""complete | success | failure: the end that a callback is for."""


# -- one function per script -----------------------------------------------------------------------


def batch_open(q: QueueKeys, batch: str, fields: dict[str, Any]) -> Command[int]:
    """Let it begin: 1; 0: it has before."""
    words = [word for item in fields.items() for word in item]
    return Command("batch_open", (q.groups, q.batch(batch)), (batch, *words), int)


def batch_close(q: QueueKeys, batch: str, how: str) -> Command[str | None]:
    """No more jobs are coming: ``how`` "whole", "torn" (its producer gave up) or "stop" (it is cancelled). Returns its state
    then; None when it is unknown.
    """
    return Command("batch_close", (q.groups, q.batch(batch)), (batch, how), lambda state: state and text_of(state))


def batch_call(q: QueueKeys, batch: str, which: Which, envelope: bytes) -> Command[int]:
    """Enqueue this job once at its end: 1; 2: it was, now; 0: there is another one; -1: unknown; -2: it ended the other way."""
    return Command("batch_call", (q.groups, q.batch(batch)), (batch, which, envelope), int)


# -- begin and end -----------------------------------------------------------------------------


def _insist(command: Command[Any]) -> Operation[Any]:
    """Once more after a lost connection: the script may be sent twice."""
    for last in range(TRIES, 0, -1):
        try:
            return (yield command)
        except BrokerUnavailable:
            if last == 1:
                raise
    raise AssertionError("unreachable")


def open_(q: QueueKeys, batch: str, fields: dict[str, Any], queues: bytes, now_ms: int) -> Operation[None]:
    """Begin a batch; its jobs may be enqueued then. ``fields``: ``task``, ``ttl`` (ms), ``on:<which>``."""
    name = f"batch of {fields['task']}"
    records = {
        "is:success": ended_record("success", name, now_ms),
        "is:failed": ended_record("failed", name, now_ms, "not every job of the batch has succeeded"),
        "is:cancelled": ended_record("cancelled", name, now_ms),
    }
    yield from _insist(raw("SADD", queues, q.queue))
    yield from _insist(batch_open(q, batch, fields | records))


def close(q: QueueKeys, batch: str, how: str) -> Operation[str | None]:
    """See :func:`batch_close`."""
    state: str | None = yield from _insist(batch_close(q, batch, how))
    return state


# -- look --------------------------------------------------------------------------------------


class BatchView(NamedTuple):
    """A batch as it is; times in ms. ``running``: its jobs that workers hold."""

    task: str
    state: str
    total: int
    success: int
    failed: int
    cancelled: int
    running: int
    torn: bool
    started_ms: int
    filled_ms: int
    finished_ms: int


_FIELDS = ("task", "state", "total", "success", "failed", "cancelled", "torn", "started", "filled", "finished")


def view(q: QueueKeys, batch: str) -> Operation[BatchView | None]:
    """How far a batch is; None when it is unknown or its time is over.

    The counts are there; those that run are looked for among the jobs that workers hold, whatever the size of the batch.
    """
    values = yield raw("HMGET", q.batch(batch), *_FIELDS)
    if values[1] is None:
        return None
    task, state = (text_of(value or b"") for value in values[:2])
    total, success, failed, cancelled, torn, started, filled, finished = map(number_of, values[2:])
    left = total - success - failed - cancelled
    running = (yield from _running(q, batch)) if state in OPEN and left else 0
    return BatchView(
        task, state, total, success, failed, cancelled, min(running, left), bool(torn), started, filled, finished
    )


def _running(q: QueueKeys, batch: str) -> Operation[int]:
    leases = yield leases_of(q)
    found, cursors = 0, dict.fromkeys(leases, b"0")
    while cursors:
        replies = yield [
            raw("SSCAN", q.running(worker), cursor, "MATCH", f"{batch}-*", "COUNT", 10_000)
            for worker, cursor in cursors.items()
        ]
        found += sum(len(reply[1]) for reply in replies)
        cursors = {worker: reply[0] for worker, reply in zip(cursors, replies, strict=True) if reply[0] != b"0"}
    return found


def listing(q: QueueKeys) -> Operation[list[tuple[str, BatchView]]]:
    """The batches of a queue that have not ended, the oldest first."""
    ids = [text_of(each) for each in (yield raw("ZRANGE", q.groups, 0, -1))]
    found = []
    for batch in ids:
        seen = yield from view(q, batch)
        if seen is not None:
            found.append((batch, seen))
    return found


def _codes(bits: bytes) -> Iterator[int]:
    for byte in bits:
        yield from (byte >> 6, byte >> 4 & 3, byte >> 2 & 3, byte & 3)


def _chosen(q: QueueKeys, batch: str, code: int, first: int, count: int) -> Operation[list[str]]:
    """The ids of the jobs of one part that have ended like this."""
    bits = yield raw("GETRANGE", q.batch_ends(batch), first // 4, (first + PART) // 4 - 1)
    bits = bits.ljust(PART // 4, b"\0")
    return [f"{batch}-{n}" for n, found in enumerate(_codes(bits), first) if found == code and n < count]


def failed(q: QueueKeys, batch: str, most: int) -> Operation[list[str]]:
    """The ids of jobs of it that have failed, up to ``most``."""
    count, found = int((yield raw("HGET", q.batch(batch), "next")) or 0), list[str]()
    for first in range(0, count, PART):
        found += yield from _chosen(q, batch, WORDS.index("failed"), first, count)
        if len(found) >= most:
            break
    return found[:most]


# -- change ------------------------------------------------------------------------------------


def cancel(q: QueueKeys, batch: str, record: bytes, ttl_ms: int, *, terminate: bool = False) -> Operation[bool]:
    """Let it take no more jobs, and cancel those that have not ended. False when it has ended or is unknown."""
    state = yield from close(q, batch, "stop")
    if state not in (*OPEN, "cancelled"):
        return False
    count = int((yield raw("HGET", q.batch(batch), "next")) or 0)
    for first in range(0, count, PART):
        ids = yield from _chosen(q, batch, WORDS.index("open"), first, count)
        yield from _cancel_jobs(q, ids, record, ttl_ms, terminate)
    return True


def _cancel_jobs(q: QueueKeys, ids: Sequence[str], record: bytes, ttl_ms: int, terminate: bool) -> Operation[None]:
    left = list(ids)
    while left:
        part, left = left[:200], left[200:]
        leases = yield leases_of(q)
        answers = yield [
            commands.cancel(q, job_id, list(leases), record, ttl_ms, terminate=terminate) for job_id in part
        ]
        left += [job_id for job_id, answer in zip(part, answers, strict=True) if answer == "again"]
