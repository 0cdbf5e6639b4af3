"""Look and repair: what operators, the command line and ``app.dead`` ask of Redis. The worker never comes here.

Every method returns an :data:`~fastq.broker.commands.Operation`, which both movers ``run``::

    info = connection.run(Inspector("fastq").queue("default"))

Reads are bounded (A-07): pages have at most 200 entries, nothing walks the key space, and what can grow without end is
counted or cut, never fetched whole. An id or a queue that nobody knows is ``None``, ``"unknown"`` or an empty list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from fastq.broker import commands, flows
from fastq.broker.commands import Command, Operation, raw
from fastq.broker.keys import PAD, GlobalKeys, QueueKeys
from fastq.broker.pauses import Pause, paused, suspend_task, unpause
from fastq.broker.views import (
    BUCKETS,
    Found,
    Look,
    QueueInfo,
    WorkerInfo,
    clock,
    dead_status,
    finished_statuses,
    fresh,
    leases_of,
    letter_of,
    look_again,
    look_at,
    merged,
    oldest_age,
    scored,
    status_of,
    text_of,
    unfinished,
    with_progress,
    worker_info,
)
from fastq.errors import BrokerReplyError, InvalidOption, InvalidQueueName, UndecodableJob, did_you_mean
from fastq.job import DeadLetter, Envelope, JobRecord, JobState, JobStatus, decode_envelope, encode, is_id
from fastq.values import check_queue_name

__all__ = ["PAGE", "Inspector", "QueueInfo", "Replayed", "WorkerInfo"]

T = TypeVar("T")

PAGE = 200
"""Most entries of one page."""

_CHUNK = 50  # envelopes fetched or replayed at once: at 1 MiB each this process holds 50 MiB for a moment
_STEP = 500  # entries deleted by one script call
_QUEUES = 40  # queues looked at in one round trip
_TRIES = 10  # times that a set of workers may change under an operation's feet
_LOOKS = 20_000  # finished records looked at for one page; deeper pages are empty


class Replayed(NamedTuple):
    """What became of a replay: how many jobs were sent back (or would be), and which could not be."""

    replayed: int
    undecodable: list[str]
    missing: list[str]


class Inspector:
    """The operations on one application's queues.

    Args:
        prefix: the first part of every key.
        result_ttl: seconds that the record of a cancelled job is kept when the job does not say.
    """

    def __init__(self, prefix: str, *, result_ttl: float = 3_600.0) -> None:
        self._prefix = prefix
        self._global = GlobalKeys(prefix)
        self._result_ttl = result_ttl

    @property
    def leader_key(self) -> bytes:
        """Where the leading scheduler says its name."""
        return self._global.leader

    def keys(self, queue: str) -> QueueKeys:
        """The key names of a queue. Raises InvalidQueueName."""
        return self._keys(queue)

    def _keys(self, queue: str) -> QueueKeys:
        return QueueKeys(self._prefix, check_queue_name(queue))

    # -- queues and workers ---------------------------------------------------------------------

    def queues(self) -> Operation[list[str]]:
        """The names of all queues that were ever enqueued to, sorted."""
        names = yield raw("SMEMBERS", self._global.queues)
        return sorted(filter(_is_queue_name, map(text_of, names)))

    def queue(self, name: str) -> Operation[QueueInfo | None]:
        """What there is in one queue; None when nobody ever used it.

        Raises:
            InvalidQueueName: it cannot be the name of a queue.
        """
        keys = self._keys(name)
        known = yield raw("SISMEMBER", self._global.queues, name)
        info = (yield from self._infos([keys]))[0]
        return info if known or info != QueueInfo(name=name) else None

    def overview(self) -> Operation[list[QueueInfo]]:
        """What there is in every queue: three round trips for up to 40 queues."""
        names = yield from self.queues()
        infos: list[QueueInfo] = []
        for chunk in _chunks(names, _QUEUES):
            infos += yield from self._infos([self._keys(name) for name in chunk])
        return infos

    def _infos(self, queues: Sequence[QueueKeys]) -> Operation[list[QueueInfo]]:
        questions = [look_at(q) for q in queues]
        now, *replies = yield [clock(), *(command for look in questions for command in look)]
        stream = iter(replies)
        looks = [Look.read(list(islice(stream, len(look)))) for look in questions]
        second = [look_again(q, look) for q, look in zip(queues, looks, strict=True)]
        stream = iter((yield [command for again in second for command in again]))
        infos = []
        for q, look, again in zip(queues, looks, second, strict=True):
            heads, running, finished = look.divide(list(islice(stream, len(again))))
            if look.pending > 0 and not any(heads):
                heads = yield from self._behind_ghosts(q, look)
            infos.append(look.info(q.queue, now, oldest_age(heads, now), running, finished))
        return infos

    def _behind_ghosts(self, q: QueueKeys, look: Look) -> Operation[list[bytes | None]]:
        """The next envelopes when each list begins with a cancelled job."""
        ranges = yield [raw("LRANGE", q.ready[level], 0, PAGE - 1) for level in look.ready]
        ids = [job_id for ids in ranges for job_id in ids[1:]][:PAGE]
        for chunk in _chunks(ids, _CHUNK):
            found = yield raw("HMGET", q.jobs, *chunk)
            if any(found):
                return list(found)
        return []

    def workers(self, queue: str | None = None) -> Operation[list[WorkerInfo]]:
        """The workers of one queue or of all, those whose lease has run out included."""
        names = [queue] if queue is not None else (yield from self.queues())
        found: dict[str, WorkerInfo] = {}
        for name in names:
            q = self._keys(name)
            now, leases = yield [clock(), leases_of(q)]
            if not leases:
                continue
            sizes: list[Command[int]] = [raw("SCARD", q.running(worker)) for worker in leases]
            cards, *held = yield [raw("HMGET", q.info, *leases), *sizes]
            for (worker, until), card, size in zip(leases.items(), cards, held, strict=True):
                info = worker_info(worker, name, (until - now) / 1_000, max(size - 1, 0), card)
                found[worker] = merged(found[worker], info) if worker in found else info
        return sorted(found.values(), key=lambda worker: (worker.host, worker.pid, worker.id))

    def leader(self) -> Operation[str | None]:
        """The id of the scheduler that leads; None when no scheduler runs."""
        name = yield raw("GET", self._global.leader)
        return None if name is None else text_of(name)

    # -- one job ----------------------------------------------------------------------------------

    def status(self, job_id: str, queue: str | None = None) -> Operation[JobStatus | None]:
        """Where a job is, or a workflow. ``queue`` saves asking all of them.

        Raises:
            UndecodableJob: its record was written by something else.
        """
        found = yield from self._locate(job_id, queue)
        if found is not None:
            return with_progress(status_of(found.queue, job_id, found.reply), found.progress)
        flow = yield from self._workflow(job_id, queue)
        return None if flow is None else flows.status_of(flow[0], job_id, flow[1])

    def _workflow(self, flow: str, queue: str | None) -> Operation[tuple[QueueKeys, flows.FlowView] | None]:
        """The workflow of this id, if it is one's."""
        if flows.is_flow(flow):
            for q in [self._keys(name) for name in ([queue] if queue is not None else (yield from self.queues()))]:
                view = yield from flows.view(q, flow)
                if view is not None:
                    return q, view
        return None

    def cancel(self, job_id: str, queue: str | None = None, *, terminate: bool = False) -> Operation[str]:
        """Take a scheduled, parked or pending job out, or ask the worker that has it to stop it.

        Returns "cancelled"; "requested": a worker has it and will be told, and it will not run again; "unknown": there
        is no such job, or not any more.
        """
        found = yield from self._locate(job_id, queue)
        if found is None and (flow := (yield from self._workflow(job_id, queue))) is not None:
            record, ttl_ms = (
                encode(JobRecord("cancelled", "", 0, 0, (yield clock()), 0)),
                round(self._result_ttl * 1_000),
            )
            stopped = yield from flows.cancel(flow[0], job_id, record, ttl_ms, terminate=terminate)
            return "requested" if stopped else "unknown"
        if found is None or found.state in ("finished", "failed"):
            return "unknown"
        for _ in range(_TRIES):
            now, leases = yield [clock(), leases_of(found.q)]
            record, ttl_ms = self.cancelled(found.reply[1], now)
            answer: str = yield commands.cancel(found.q, job_id, list(leases), record, ttl_ms, terminate=terminate)
            if answer != "again":
                return answer
        raise BrokerReplyError(f"the workers of queue {found.queue!r} come and go: try again")

    def cancelled(self, data: bytes, now: int) -> tuple[bytes, int]:
        """The record of a job that is cancelled now, and its lifetime in ms (0: none is kept)."""
        try:
            envelope = decode_envelope(data)
        except UndecodableJob:
            envelope = Envelope(5, 0, "", b"", 0)
        ttl = envelope.extra.result_ttl if envelope.extra else None
        ttl = self._result_ttl if ttl is None else ttl
        record = JobRecord("cancelled", envelope.task, envelope.enqueued_at, 0, now, envelope.attempt)
        return encode(record), round(ttl * 1_000)

    def logs(self, job_id: str, queue: str) -> Operation[list[str]]:
        """The last lines that a job has logged."""
        if not is_id(job_id):
            return []
        lines = yield raw("LRANGE", self._keys(queue).logs(job_id), 0, -1)
        return [text_of(line) for line in lines]

    def retry(self, job_id: str, queue: str | None = None) -> Operation[str]:
        """Run a job now: a failed one is replayed, a scheduled one is made due.

        Returns "replayed"; "promoted"; "undecodable": its envelope cannot be read; or, when there is nothing to do, the
        state it is in; "unknown".
        """
        found = yield from self._locate(job_id, queue)
        if found is None:
            return "unknown"
        if found.state == "failed":
            report = yield from self.replay_report(found.queue, [job_id])
            return "replayed" if report.replayed else "undecodable" if report.undecodable else "unknown"
        if found.state == "scheduled":
            now = yield clock()
            yield raw("ZADD", found.q.due, "XX", now, job_id)
            yield commands.promote(found.q)
            return "promoted"
        return str(status_of(found.queue, job_id, found.reply).state)

    def _locate(self, job_id: str, queue: str | None) -> Operation[Found | None]:
        """Where a job is; of several queues that know the id, one where it is still to run."""
        if not is_id(job_id):
            return None
        names = [queue] if queue is not None else (yield from self.queues())
        best: Found | None = None
        for chunk in _chunks([self._keys(name) for name in names], _QUEUES):
            for found in (yield from self._ask(chunk, job_id)):
                if best is None or (best.over and not found.over):
                    best = found
        return best

    def _ask(self, queues: Sequence[QueueKeys], job_id: str) -> Operation[list[Found]]:
        """Ask these queues. Who runs a job can be told only while the set of workers is known: ask again if not."""
        leases = yield [leases_of(q) for q in queues]
        replies: list[Any] = []
        progress: list[bytes | None] = []
        for _ in range(_TRIES):
            known = [sorted(found) for found in leases]
            asked = [commands.status(q, job_id, workers) for q, workers in zip(queues, known, strict=True)]
            told: list[Command[bytes | None]] = [raw("GET", q.progress(job_id)) for q in queues]
            answers = iter((yield [*asked, *told, *(leases_of(q) for q in queues)]))
            replies, progress, leases = (list(islice(answers, len(queues))) for _ in range(3))
            if known == [sorted(found) for found in leases]:
                break
        found = [
            Found(q, text_of(reply[0]), reply, said) for q, reply, said in zip(queues, replies, progress, strict=True)
        ]
        return [each for each in found if each.state != "unknown"]

    # -- pages of jobs ------------------------------------------------------------------------------

    def jobs(self, queue: str, state: str, offset: int = 0, limit: int = 50) -> Operation[list[JobStatus]]:
        """A page of the jobs in one state.

        pending: next one first; scheduled: the next due first; parked: by limit; failed: the latest death first; running: in no order;
        success and cancelled: the latest quarter of ``result_ttl`` first, in no order within it.

        Raises:
            InvalidOption: there is no such state.
        """
        q, page = self._keys(queue), _page(offset, limit)
        pages = {
            JobState.PENDING: self._pending,
            JobState.SCHEDULED: self._scheduled,
            JobState.PARKED: self._parked,
            JobState.RUNNING: self._running,
            JobState.FAILED: self._failed,
        }
        wanted = _state(state)
        if wanted is JobState.WAITING:
            return []
        if wanted in pages:
            return (yield from pages[wanted](q, page))
        return (yield from self._finished(q, wanted, page))

    def _pending(self, q: QueueKeys, page: range) -> Operation[list[JobStatus]]:
        counts = yield [raw("LLEN", level) for level in q.levels]
        ranges: list[Command[Any]] = []
        before = 0
        for level, count in zip(q.levels, counts, strict=True):
            first, last = max(page.start - before, 0), min(page.stop - before, count) - 1
            if first <= last:
                ranges.append(raw("LRANGE", level, first, last))
            before += count
        ids = [job_id for ids in (yield ranges) for job_id in ids] if ranges else []
        return (yield from self._with_envelopes(q, JobState.PENDING, [(job_id, {}) for job_id in dict.fromkeys(ids)]))

    def _scheduled(self, q: QueueKeys, page: range) -> Operation[list[JobStatus]]:
        pairs = yield raw("ZRANGE", q.due, page.start, page.stop - 1, "WITHSCORES", decode=scored)
        rows = [(job_id, {"due_at": due / 1_000}) for job_id, due in pairs]
        return (yield from self._with_envelopes(q, JobState.SCHEDULED, rows))

    def _parked(self, q: QueueKeys, page: range) -> Operation[list[JobStatus]]:
        rows: list[tuple[bytes, dict[str, Any]]] = []
        skip = page.start
        for name in (yield raw("ZRANGE", q.parked, 0, PAGE - 1)):
            limit = text_of(name)
            size = yield raw("ZCARD", q.parked_by(limit))
            if skip >= size:
                skip -= size
                continue
            last = skip + len(page) - len(rows) - 1
            rows += [(job_id, {"limit": limit}) for job_id in (yield raw("ZRANGE", q.parked_by(limit), skip, last))]
            skip = 0
            if len(rows) >= len(page):
                break
        return (yield from self._with_envelopes(q, JobState.PARKED, rows))

    def _running(self, q: QueueKeys, page: range) -> Operation[list[JobStatus]]:
        workers = list((yield leases_of(q)))
        rows: list[tuple[bytes, dict[str, Any]]] = []
        skip = page.start
        for worker in workers:
            size = max((yield raw("SCARD", q.running(worker))) - 1, 0)
            if skip >= size:
                skip -= size
                continue
            ids = yield from self._members(q.running(worker), skip + len(page) - len(rows))
            rows += [(job_id, {"worker": worker}) for job_id in ids[skip:]]
            skip = 0
            if len(rows) >= len(page):
                break
        return (yield from self._with_envelopes(q, JobState.RUNNING, rows[: len(page)]))

    def _members(self, key: bytes, enough: int) -> Operation[list[bytes]]:
        """At least ``enough`` job ids of a set, or all."""
        found: dict[bytes, None] = {}
        cursor = b"0"
        while True:
            cursor, ids = yield raw("SSCAN", key, cursor, "COUNT", PAGE)
            found.update(dict.fromkeys(job_id for job_id in ids if job_id != PAD.encode()))
            if len(found) >= enough or cursor == b"0":
                return list(found)

    def _with_envelopes(
        self, q: QueueKeys, state: JobState, rows: Sequence[tuple[bytes, dict[str, Any]]]
    ) -> Operation[list[JobStatus]]:
        """The jobs of these ids; those that have gone meanwhile, and ghosts, are left out."""
        jobs: list[JobStatus] = []
        for chunk in _chunks(rows, _CHUNK):
            envelopes = yield raw("HMGET", q.jobs, *(job_id for job_id, _ in chunk))
            jobs += [
                unfinished(q.queue, text_of(job_id), state, data, **more)
                for (job_id, more), data in zip(chunk, envelopes, strict=True)
                if data is not None
            ]
        return jobs

    def _failed(self, q: QueueKeys, page: range) -> Operation[list[JobStatus]]:
        return [dead_status(letter) for letter in (yield from self._letters(q, page))]

    def _finished(self, q: QueueKeys, state: JobState, page: range) -> Operation[list[JobStatus]]:
        names = yield raw("ZRANGE", q.done, 0, BUCKETS - 1, "REV")
        found: list[JobStatus] = []
        looks = 0
        for name in names:
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

    # -- dead letters -------------------------------------------------------------------------------

    def dead(self, queue: str, offset: int = 0, limit: int = 50) -> Operation[list[DeadLetter]]:
        """A page of a dead-letter queue, the latest death first."""
        return (yield from self._letters(self._keys(queue), _page(offset, limit)))

    def _letters(self, q: QueueKeys, page: range) -> Operation[list[DeadLetter]]:
        pairs = yield raw("ZRANGE", q.dead, page.start, page.stop - 1, "REV", "WITHSCORES", decode=scored)
        letters: list[DeadLetter] = []
        for chunk in _chunks(pairs, _CHUNK):
            ids = [job_id for job_id, _ in chunk]
            envelopes, errors = yield [raw("HMGET", q.dead_jobs, *ids), raw("HMGET", q.dead_errors, *ids)]
            letters += [
                letter_of(q.queue, text_of(job_id), envelope or b"", error or b"", died)
                for (job_id, died), envelope, error in zip(chunk, envelopes, errors, strict=True)
            ]
        return letters

    def dead_show(self, job_id: str, queue: str | None = None) -> Operation[DeadLetter | None]:
        """One dead letter; None when there is none of this id."""
        found = yield from self._locate(job_id, queue)
        if found is None or found.state != "failed":
            return None
        return letter_of(found.queue, job_id, found.reply[1], found.reply[2], float(found.reply[3]))

    def replay(
        self, queue: str, ids: Iterable[str] | None = None, limit: int | None = 100, *, dry_run: bool = False
    ) -> Operation[int]:
        """Send dead letters back; returns how many. See :meth:`replay_report`."""
        return (yield from self.replay_report(queue, ids, limit, dry_run=dry_run)).replayed

    def replay_report(
        self, queue: str, ids: Iterable[str] | None = None, limit: int | None = 100, *, dry_run: bool = False
    ) -> Operation[Replayed]:
        """Send dead letters back with a fresh budget of attempts and no expiry; twice is once.

        ``ids``: which; None: the oldest ``limit`` (None: all) of those that are dead when this begins, so a job that
        fails at once is not sent back again. An envelope that cannot be read stays where it is. ``dry_run`` only counts.
        Interrupted between two batches, it may be called again.
        """
        q, total = self._keys(queue), Replayed(0, [], [])
        now = yield clock()
        if ids is not None:
            wanted = list(dict.fromkeys(ids))
            known = [job_id.encode() for job_id in wanted if is_id(job_id)]
            for chunk in _chunks(known, _CHUNK):
                total = _sum(total, (yield from self._replay_some(q, chunk, now, dry_run=dry_run)))
            return _sum(total, Replayed(0, [], [job_id for job_id in wanted if not is_id(job_id)]))
        skip = 0  # what stays where it is
        while limit is None or total.replayed < limit:
            size = _CHUNK if limit is None else min(_CHUNK, limit - total.replayed)
            chunk = yield raw("ZRANGE", q.dead, "-inf", now, "BYSCORE", "LIMIT", skip, size)
            if not chunk:
                break
            some = yield from self._replay_some(q, chunk, now, dry_run=dry_run)
            skip += len(chunk) if dry_run else len(some.undecodable)
            total = _sum(total, some)
        return total

    def _replay_some(self, q: QueueKeys, ids: Sequence[bytes], now: int, *, dry_run: bool) -> Operation[Replayed]:
        deaths, envelopes = yield [raw("ZMSCORE", q.dead, *ids), raw("HMGET", q.dead_jobs, *ids)]
        entries: list[tuple[str, bytes]] = []
        undecodable, missing = [], []
        for job_id, died, data in zip(map(text_of, ids), deaths, envelopes, strict=True):
            if died is None:
                missing.append(job_id)
                continue
            try:
                entries.append((job_id, fresh(data or b"", round(float(died)), now)))
            except UndecodableJob:
                undecodable.append(job_id)
        count = len(entries)
        if entries and not dry_run:
            count = yield commands.replay(q, entries)
        return Replayed(count, undecodable, missing)

    def purge_dead(
        self, queue: str, ids: Iterable[str] | None = None, older_than: float | None = None
    ) -> Operation[int]:
        """Delete dead letters: these ids, those that died more than ``older_than`` seconds ago, or all there are now."""
        q, count = self._keys(queue), 0
        if ids is not None:
            for chunk in _chunks([job_id for job_id in ids if is_id(job_id)], _STEP):
                count += yield commands.discard(q, ids=chunk)
            return count
        now: int = yield clock()
        before = now - round((older_than or 0) * 1_000)
        while deleted := (yield commands.discard(q, before_ms=before, limit=_STEP)):
            count += deleted
        return count

    # -- a whole queue ------------------------------------------------------------------------------

    def pause(self, queue: str) -> Operation[bool]:
        """Workers take nothing more from this queue; what runs goes on. False when it was paused already."""
        now = yield clock()
        reply = yield raw("SET", self._keys(queue).paused, now, "NX")
        return reply is not None

    def resume(self, queue: str) -> Operation[bool]:
        """Undo :meth:`pause` and wake a worker. False when it was not paused."""
        q = self._keys(queue)
        deleted, waiting = yield [raw("DEL", q.paused), raw("LLEN", q.wake)]
        if not waiting:
            yield raw("RPUSH", q.wake, "1")
        return bool(deleted)

    def pause_task(self, pause: Pause, queues: Iterable[str]) -> Operation[bool]:
        """Workers start no job that ``pause`` means in these queues; what runs goes on. False when all were paused already."""
        changed = yield [suspend_task(self._keys(queue), pause) for queue in queues]
        return any(changed)

    def resume_task(self, pause: Pause, queues: Iterable[str]) -> Operation[bool]:
        """Undo :meth:`pause_task`: the jobs that were put aside are pending again. False when none was paused."""
        changed = False
        for queue in queues:
            left = 1
            while left:
                was, _, left = yield unpause(self._keys(queue), pause)
                changed = changed or was
        return changed

    def paused_tasks(self, queues: Iterable[str] | None = None) -> Operation[dict[str, list[Pause]]]:
        """Queue -> what of it is paused; queues without a pause are left out."""
        names = list((yield from self.queues()) if queues is None else queues)
        found = (yield [paused(self._keys(queue)) for queue in names]) if names else []
        return {queue: pauses for queue, pauses in zip(names, found, strict=True) if pauses}

    def purge(self, queue: str) -> Operation[int]:
        """Delete the pending, scheduled and parked jobs of a queue, for good. Returns how many."""
        q, count, more = self._keys(queue), 0, True
        while more:
            deleted, more = yield commands.purge(q, _STEP)
            count += deleted
        return count


# -- arguments, read ----------------------------------------------------------------------------


def _page(offset: int, limit: int) -> range:
    """Positions of a page, whatever was asked for (A-07)."""
    start = min(max(offset, 0), 2**31)
    return range(start, start + min(max(limit, 1), PAGE))


def _state(name: str) -> JobState:
    try:
        return JobState(name)
    except ValueError:
        states = [state.value for state in JobState]
        raise InvalidOption(
            f"state={name!r:.100} is none of {', '.join(states)}{did_you_mean(str(name), states)}"
        ) from None


def _is_queue_name(text: str) -> bool:
    try:
        check_queue_name(text)
    except InvalidQueueName:
        return False
    return True


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _sum(one: Replayed, other: Replayed) -> Replayed:
    return Replayed(one.replayed + other.replayed, one.undecodable + other.undecodable, one.missing + other.missing)
