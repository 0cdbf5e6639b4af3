"""All jobs with a tag: cancelled in steps, as an operation that both movers run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastq.broker import commands
from fastq.broker.command import Command, Operation, raw
from fastq.broker.inspector import Inspector
from fastq.broker.keys import QueueKeys
from fastq.broker.tags import CHUNK, check_tag
from fastq.broker.views import clock, leases_of

__all__ = ["cancel_tag"]


def cancel_tag(inspector: Inspector, name: str, queue: str | None = None, *, terminate: bool = False) -> Operation[int]:
    """Cancel every job with this tag that has not ended; see :meth:`fastq.FastQ.cancel_tag`. Returns how many."""
    check_tag(name)
    count = 0
    for q in (yield from inspector.parts(queue)):
        cursor = b"0"
        while True:
            cursor, rows = yield raw("ZSCAN", q.tag(name), cursor, "COUNT", CHUNK)
            count += yield from _cancel_some(inspector, q, name, rows[::2], terminate=terminate)
            if cursor == b"0":
                break
    return count


def _cancel_some(
    inspector: Inspector, q: QueueKeys, name: str, found: Sequence[bytes], *, terminate: bool
) -> Operation[int]:
    if not found:
        return 0
    ids = [job_id.decode("utf-8", "replace") for job_id in found]
    envelopes, now, leases = yield [raw("HMGET", q.jobs, *ids), clock(), leases_of(q)]
    live = [(job_id, data) for job_id, data in zip(ids, envelopes, strict=True) if data is not None]
    asked: list[Command[Any]] = []
    for job_id, data in live:
        record, ttl_ms = inspector.cancelled(data, now)
        asked.append(commands.cancel(q, job_id, list(leases), record, ttl_ms, terminate=terminate))
    count, over = 0, []
    for (job_id, _), reply in zip(live, (yield asked) if asked else [], strict=True):
        answer = reply
        if answer == "again":  # a worker came or went meanwhile
            answer = yield from inspector.cancel(job_id, q.queue, terminate=terminate)
        count += answer != "unknown"
        if answer == "cancelled":
            over.append(job_id)
    if over:
        yield raw("ZREM", q.tag(name), *over)
    return count
