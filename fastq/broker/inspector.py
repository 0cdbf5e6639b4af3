"""Look and repair: what operators, the command line and ``app.dead`` ask of Redis. The worker never comes here.

Every method returns an :data:`~fastq.broker.Operation`, which both movers ``run``::

    info = connection.run(Inspector("fastq").queue("default"))

A queue that is split into partitions is one queue here: its name means all of them, ``mail:3`` means one. What is told of a
single job names the partition.

Reads are bounded (A-07): pages have at most 200 entries, nothing walks the key space, and what can grow without end is
counted or cut, never fetched whole. An id or a queue that nobody knows is ``None``, ``"unknown"`` or an empty list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from fastq.broker import commands, flows
from fastq.broker.command import Command, Operation, raw
from fastq.broker.keys import GlobalKeys, QueueKeys
from fastq.broker.pages import PAGE, jobs_of, letters_of
from fastq.broker.pauses import Pause, paused, suspend_queue, suspend_task, unpause
from fastq.broker.views import (
    Found,
    Look,
    QueueInfo,
    WorkerInfo,
    clock,
    fresh,
    leases_of,
    letter_of,
    look_again,
    look_at,
    merged,
    oldest_age,
    status_of,
    text_of,
    whole,
    with_progress,
    worker_info,
)
from fastq.errors import BrokerReplyError, InvalidOption, UndecodableJob, did_you_mean
from fastq.job import DeadLetter, Envelope, JobRecord, JobState, JobStatus, decode_envelope, encode, is_id
from fastq.partitions import check_partition, is_partition, partition_for, queue_of, served

__all__ = ["PAGE", "Inspector", "QueueInfo", "Replayed", "WorkerInfo"]

T = TypeVar("T")

_CHUNK = 50  # envelopes fetched or replayed at once: at 1 MiB each this process holds 50 MiB for a moment
_STEP = 500  # entries deleted by one script call
_QUEUES = 40  # queues looked at in one round trip
_TRIES = 10  # times that a set of workers may change under an operation's feet


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
        partitions: of the queues that are split, into how many; those that are announced are found without.
    """

    def __init__(
        self, prefix: str, *, result_ttl: float = 3_600.0, partitions: Mapping[str, int] | None = None
    ) -> None:
        self._prefix = prefix
        self._partitions = partitions if partitions is not None else {}
        self._global = GlobalKeys(prefix)
        self._result_ttl = result_ttl

    @property
    def leader_key(self) -> bytes:
        """Where the leading scheduler says its name."""
        return self._global.leader

    def keys(self, queue: str) -> QueueKeys:
        """The key names of a queue, or of a partition of one. Raises InvalidQueueName."""
        return QueueKeys(self._prefix, check_partition(queue))

    def parts(self, queue: str | None) -> Operation[list[QueueKeys]]:
        """The queue and its partitions; a partition alone; None: all that there are. Raises InvalidQueueName."""
        if queue is not None and check_partition(queue) != queue_of(queue):
            return [self.keys(queue)]
        return self._parts_of(queue, (yield from self._listed()))

    def _parts_of(self, queue: str | None, listed: Sequence[str]) -> list[QueueKeys]:
        names: Iterable[str] = listed
        if queue is not None:
            names = served(queue, self._partitions.get(queue, 1), listed) if queue == queue_of(queue) else (queue,)
        return [self.keys(name) for name in names]

    def _listed(self) -> Operation[list[str]]:
        """What is announced: queues and partitions."""
        return sorted(filter(is_partition, map(text_of, (yield raw("SMEMBERS", self._global.queues)))))

    # -- queues and workers ---------------------------------------------------------------------

    def queues(self) -> Operation[list[str]]:
        """The names of all queues that were ever enqueued to, sorted."""
        return sorted({queue_of(name) for name in (yield from self._listed())})

    def queue(self, name: str) -> Operation[QueueInfo | None]:
        """What there is in one queue, all of its partitions together, or in one of them; None when nobody ever used it.

        Raises:
            InvalidQueueName: it cannot be the name of a queue.
        """
        check_partition(name)
        listed = yield from self._listed()
        parts = self._parts_of(name, listed)
        info = whole(name, (yield from self._infos(parts)))
        known = any(q.queue in listed for q in parts)
        return info if known or info != whole(name, [QueueInfo(name=q.queue) for q in parts]) else None

    def overview(self) -> Operation[list[QueueInfo]]:
        """What there is in every queue: three round trips for up to 40 queues and partitions."""
        listed = yield from self._listed()
        queues = {name: self._parts_of(name, listed) for name in sorted(set(map(queue_of, listed)))}
        found: list[QueueInfo] = []
        for chunk in _chunks([q for parts in queues.values() for q in parts], _QUEUES):
            found += yield from self._infos(chunk)
        infos = iter(found)
        return [whole(name, list(islice(infos, len(parts)))) for name, parts in queues.items()]

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
        found: dict[str, WorkerInfo] = {}
        for q in (yield from self.parts(queue)):
            now, leases = yield [clock(), leases_of(q)]
            if not leases:
                continue
            sizes: list[Command[int]] = [raw("SCARD", q.running(worker)) for worker in leases]
            cards, *held = yield [raw("HMGET", q.info, *leases), *sizes]
            for (worker, until), card, size in zip(leases.items(), cards, held, strict=True):
                info = worker_info(worker, queue_of(q.queue), (until - now) / 1_000, max(size - 1, 0), card)
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
            first = self._first(flow, queue)
            for q in first:
                view = yield from flows.view(q, flow)
                if view is not None:
                    return q, view
            for q in (yield from self._others(first, queue)):
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
        parts = (yield from self.parts(queue)) if queue in self._partitions else [self.keys(queue)]
        found = yield [raw("LRANGE", q.logs(job_id), 0, -1) for q in parts]
        return [text_of(line) for lines in found for line in lines]

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
        first = self._first(job_id, queue)
        found = yield from self._best(first, job_id)
        if found is not None:
            return found
        return (yield from self._best((yield from self._others(first, queue)), job_id))

    def _first(self, key: str, queue: str | None) -> list[QueueKeys]:
        """Where a job of a queue is asked for first: where its id leads."""
        if queue is None:
            return []
        return [self.keys(partition_for(queue, self._partitions.get(check_partition(queue), 1), key))]

    def _others(self, asked: Sequence[QueueKeys], queue: str | None) -> Operation[list[QueueKeys]]:
        """Where else it may be: it has a schedule's id, say, or was enqueued before the number of partitions was changed."""
        before = {q.base for q in asked}
        return [q for q in (yield from self.parts(queue)) if q.base not in before]

    def _best(self, parts: Sequence[QueueKeys], job_id: str) -> Operation[Found | None]:
        best: Found | None = None
        for chunk in _chunks(parts, _QUEUES):
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
        wanted = _state(state)
        return (yield from jobs_of((yield from self.parts(queue)), wanted, _page(offset, limit)))

    # -- dead letters -------------------------------------------------------------------------------

    def dead(self, queue: str, offset: int = 0, limit: int = 50) -> Operation[list[DeadLetter]]:
        """A page of a dead-letter queue, the latest death first."""
        return (yield from letters_of((yield from self.parts(queue)), _page(offset, limit)))

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
        parts, total = (yield from self.parts(queue)), Replayed(0, [], [])
        now = yield clock()
        if ids is not None:
            wanted = list(dict.fromkeys(ids))
            left = [job_id for job_id in wanted if is_id(job_id)]
            for q in parts:
                missing: list[str] = []
                for chunk in _chunks([job_id.encode() for job_id in left], _CHUNK):
                    some = yield from self._replay_some(q, chunk, now, dry_run=dry_run)
                    missing += some.missing
                    total = _sum(total, some._replace(missing=[]))
                left = missing  # they may be in another partition
            return total._replace(missing=[*left, *(job_id for job_id in wanted if not is_id(job_id))])
        for q in parts:
            most = None if limit is None else limit - total.replayed
            total = _sum(total, (yield from self._replay_oldest(q, most, now, dry_run=dry_run)))
        return total

    def _replay_oldest(self, q: QueueKeys, limit: int | None, now: int, *, dry_run: bool) -> Operation[Replayed]:
        skip, total = 0, Replayed(0, [], [])  # skip: what stays where it is
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
        parts, count = (yield from self.parts(queue)), 0
        if ids is not None:
            for chunk in _chunks([job_id for job_id in ids if is_id(job_id)], _STEP):
                count += sum((yield [commands.discard(q, ids=chunk) for q in parts]))
            return count
        now: int = yield clock()
        before = now - round((older_than or 0) * 1_000)
        for q in parts:
            while deleted := (yield commands.discard(q, before_ms=before, limit=_STEP)):
                count += deleted
        return count

    # -- a whole queue ------------------------------------------------------------------------------

    def pause(self, queue: str) -> Operation[bool]:
        """Workers take nothing more from this queue; what runs goes on. False when it was paused already."""
        parts = yield from self.parts(queue)
        yield from self._announce(parts)
        return any((yield [suspend_queue(q) for q in parts]))

    def _announce(self, parts: Sequence[QueueKeys]) -> Operation[None]:
        """Let everybody see these queues: one may be paused before its first job."""
        if parts:
            yield commands.announce(self._global.queues, *(q.queue for q in parts))

    def resume(self, queue: str) -> Operation[bool]:
        """Undo :meth:`pause` and wake a worker. False when it was not paused."""
        parts = yield from self.parts(queue)
        replies = yield [raw(word, key) for q in parts for word, key in (("DEL", q.paused), ("LLEN", q.wake))]
        unheard = [q for q, was, waiting in zip(parts, replies[::2], replies[1::2], strict=True) if was and not waiting]
        if unheard:
            yield [raw("RPUSH", q.wake, "1") for q in unheard]
        return any(replies[::2])

    def pause_task(self, pause: Pause, queues: Iterable[str]) -> Operation[bool]:
        """Workers start no job that ``pause`` means in these queues; what runs goes on. False when all were paused already."""
        parts = yield from self._parts_of_all(queues)
        yield from self._announce(parts)
        return any((yield [suspend_task(q, pause) for q in parts]))

    def resume_task(self, pause: Pause, queues: Iterable[str]) -> Operation[bool]:
        """Undo :meth:`pause_task`: the jobs that were put aside are pending again. False when none was paused."""
        changed = False
        for q in (yield from self._parts_of_all(queues)):
            left = 1
            while left:
                was, _, left = yield unpause(q, pause)
                changed = changed or was
        return changed

    def paused_tasks(self, queues: Iterable[str] | None = None) -> Operation[dict[str, list[Pause]]]:
        """Queue -> what of it is paused; queues without a pause are left out."""
        parts = (yield from self.parts(None)) if queues is None else (yield from self._parts_of_all(queues))
        found = (yield [paused(q) for q in parts]) if parts else []
        by_queue: dict[str, dict[str, Pause]] = {}
        for q, pauses in zip(parts, found, strict=True):
            by_queue.setdefault(queue_of(q.queue), {}).update((pause.name, pause) for pause in pauses)
        return {queue: list(pauses.values()) for queue, pauses in by_queue.items() if pauses}

    def _parts_of_all(self, queues: Iterable[str]) -> Operation[list[QueueKeys]]:
        listed = yield from self._listed()
        return [q for queue in queues for q in self._parts_of(check_partition(queue), listed)]

    def purge(self, queue: str) -> Operation[int]:
        """Delete the pending, scheduled and parked jobs of a queue, for good. Returns how many."""
        count = 0
        for q in (yield from self.parts(queue)):
            more = True
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


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _sum(one: Replayed, other: Replayed) -> Replayed:
    return Replayed(one.replayed + other.replayed, one.undecodable + other.undecodable, one.missing + other.missing)
