"""Pages of the jobs of one queue, which may lie in several partitions, as operations that both movers run.

What has an order in time comes in that order, whatever partition it is in; else one partition comes after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

from fastq.broker.command import Command, Operation, raw
from fastq.broker.keys import PAD, PRIORITIES, QueueKeys
from fastq.broker.views import (
    BUCKETS,
    dead_status,
    finished_statuses,
    leases_of,
    letter_of,
    scored,
    text_of,
    unfinished,
)
from fastq.job import DeadLetter, JobState, JobStatus

__all__ = ["PAGE", "jobs_of", "letters_of"]

T = TypeVar("T")
_Row = tuple[QueueKeys, bytes, dict[str, Any]]
_Scored = tuple[QueueKeys, bytes, float]

PAGE = 200
"""Most entries of one page."""

_CHUNK = 50  # envelopes fetched at once: at 1 MiB each this process holds 50 MiB for a moment
_LOOKS = 20_000  # finished records, or entries of several partitions, looked at for one page; deeper pages are empty


def jobs_of(parts: Sequence[QueueKeys], state: JobState, page: range) -> Operation[list[JobStatus]]:
    """A page of the jobs in one state; see :meth:`fastq.broker.inspector.Inspector.jobs`."""
    pages = {
        JobState.PENDING: _pending,
        JobState.SCHEDULED: _scheduled,
        JobState.PARKED: _parked,
        JobState.RUNNING: _running,
        JobState.FAILED: _failed,
    }
    if state is JobState.WAITING:
        return []
    if state in pages:
        return (yield from pages[state](parts, page))
    return (yield from _finished(parts, state, page))


def _pending(parts: Sequence[QueueKeys], page: range) -> Operation[list[JobStatus]]:
    lists = [(q, q.levels[level]) for level in range(PRIORITIES) for q in parts]
    counts = yield [raw("LLEN", key) for _, key in lists]
    ranges: list[Command[Any]] = []
    sources: list[QueueKeys] = []
    before = 0
    for (q, key), count in zip(lists, counts, strict=True):
        first, last = max(page.start - before, 0), min(page.stop - before, count) - 1
        if first <= last:
            ranges.append(raw("LRANGE", key, first, last))
            sources.append(q)
        before += count
    found = (yield ranges) if ranges else []
    ids = [(q, job_id) for q, ids in zip(sources, found, strict=True) for job_id in ids]
    return (yield from _with_envelopes(JobState.PENDING, [(*each, {}) for each in dict.fromkeys(ids)]))


def _scheduled(parts: Sequence[QueueKeys], page: range) -> Operation[list[JobStatus]]:
    found = yield from _by_score([(q, q.due) for q in parts], page)
    rows: list[_Row] = [(q, job_id, {"due_at": due / 1_000}) for q, job_id, due in found]
    return (yield from _with_envelopes(JobState.SCHEDULED, rows))


def _parked(parts: Sequence[QueueKeys], page: range) -> Operation[list[JobStatus]]:
    names = yield [raw("ZRANGE", q.parked, 0, PAGE - 1) for q in parts]
    limits = [(q, text_of(name)) for q, found in zip(parts, names, strict=True) for name in found]
    rows: list[_Row] = []
    skip = page.start
    for q, limit in limits:
        size = yield raw("ZCARD", q.parked_by(limit))
        if skip >= size:
            skip -= size
            continue
        last = skip + len(page) - len(rows) - 1
        rows += [(q, job_id, {"limit": limit}) for job_id in (yield raw("ZRANGE", q.parked_by(limit), skip, last))]
        skip = 0
        if len(rows) >= len(page):
            break
    return (yield from _with_envelopes(JobState.PARKED, rows))


def _running(parts: Sequence[QueueKeys], page: range) -> Operation[list[JobStatus]]:
    leases = yield [leases_of(q) for q in parts]
    rows: list[_Row] = []
    skip = page.start
    for q, worker in [(q, worker) for q, found in zip(parts, leases, strict=True) for worker in found]:
        size = max((yield raw("SCARD", q.running(worker))) - 1, 0)
        if skip >= size:
            skip -= size
            continue
        ids = yield from _members(q.running(worker), skip + len(page) - len(rows))
        rows += [(q, job_id, {"worker": worker}) for job_id in ids[skip:]]
        skip = 0
        if len(rows) >= len(page):
            break
    return (yield from _with_envelopes(JobState.RUNNING, rows[: len(page)]))


def _members(key: bytes, enough: int) -> Operation[list[bytes]]:
    """At least ``enough`` job ids of a set, or all."""
    found: dict[bytes, None] = {}
    cursor = b"0"
    while True:
        cursor, ids = yield raw("SSCAN", key, cursor, "COUNT", PAGE)
        found.update(dict.fromkeys(job_id for job_id in ids if job_id != PAD.encode()))
        if len(found) >= enough or cursor == b"0":
            return list(found)


def _with_envelopes(state: JobState, rows: Sequence[_Row]) -> Operation[list[JobStatus]]:
    """The jobs of these ids; those that have gone meanwhile, and ghosts, are left out."""
    jobs: list[JobStatus] = []
    for chunk in _chunks(rows, _CHUNK):
        envelopes = yield from _fields([(q.jobs, job_id) for q, job_id, _ in chunk])
        jobs += [
            unfinished(q.queue, text_of(job_id), state, data, **more)
            for (q, job_id, more), data in zip(chunk, envelopes, strict=True)
            if data is not None
        ]
    return jobs


def _finished(parts: Sequence[QueueKeys], state: JobState, page: range) -> Operation[list[JobStatus]]:
    names = yield [raw("ZRANGE", q.done, 0, BUCKETS - 1, "REV") for q in parts]
    found: list[JobStatus] = []
    looks = 0
    for q, name in [(q, name) for q, buckets in zip(parts, names, strict=True) for name in buckets]:
        cursor = b"0"
        while looks < _LOOKS:
            cursor, pairs = yield raw("HSCAN", q.bucket(text_of(name)), cursor, "COUNT", PAGE)
            looks += len(pairs) // 2
            found += finished_statuses(q.queue, pairs, state)
            if len(found) >= page.stop:
                return found[page.start : page.stop]
            if cursor == b"0":
                break
    return found[page.start : page.stop]


def _failed(parts: Sequence[QueueKeys], page: range) -> Operation[list[JobStatus]]:
    return [dead_status(letter) for letter in (yield from letters_of(parts, page))]


def letters_of(parts: Sequence[QueueKeys], page: range) -> Operation[list[DeadLetter]]:
    """A page of the dead letters of a queue, the latest death first."""
    rows = yield from _by_score([(q, q.dead) for q in parts], page, latest=True)
    letters: list[DeadLetter] = []
    for chunk in _chunks(rows, _CHUNK):
        envelopes = yield from _fields([(q.dead_jobs, job_id) for q, job_id, _ in chunk])
        errors = yield from _fields([(q.dead_errors, job_id) for q, job_id, _ in chunk])
        letters += [
            letter_of(q.queue, text_of(job_id), envelope or b"", error or b"", died)
            for (q, job_id, died), envelope, error in zip(chunk, envelopes, errors, strict=True)
        ]
    return letters


def _by_score(
    sets: Sequence[tuple[QueueKeys, bytes]], page: range, *, latest: bool = False
) -> Operation[list[_Scored]]:
    """A page of several sorted sets as if they were one."""
    begin = page.start if len(sets) == 1 else 0
    if len(sets) > 1 and page.stop > _LOOKS:
        return []
    how = ("REV", "WITHSCORES") if latest else ("WITHSCORES",)
    found = yield [raw("ZRANGE", key, begin, page.stop - 1, *how, decode=scored) for _, key in sets]
    rows = [(q, job_id, score) for (q, _), pairs in zip(sets, found, strict=True) for job_id, score in pairs]
    if len(sets) == 1:
        return rows
    return sorted(rows, key=lambda row: row[2], reverse=latest)[page.start : page.stop]


def _fields(wanted: Sequence[tuple[bytes, bytes]]) -> Operation[list[bytes | None]]:
    """These fields of these hashes."""
    groups = [(key, [field for _, field in group]) for key, group in groupby(wanted, key=lambda each: each[0])]
    found = (yield [raw("HMGET", key, *fields) for key, fields in groups]) if groups else []
    return [value for values in found for value in values]


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
