"""Why a job is where it is, and what it waits for: one operation over everything that can keep a job from running."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from fastq.broker.command import Command, Operation, raw
from fastq.broker.flows import BROKEN, numbers
from fastq.broker.inspector import Inspector
from fastq.broker.keys import PRIORITIES, QueueKeys
from fastq.broker.pauses import Pause, paused
from fastq.broker.views import QueueInfo, clock, leases_of
from fastq.errors import did_you_mean
from fastq.job import JobPriority, JobState, JobStatus, WorkerCard
from fastq.partitions import queue_of

__all__ = ["Cause", "Explanation", "explain", "unheard", "unknown_everywhere"]

DEEPEST = 100_000
"""Entries of a ready list that are looked through for a job's place (about 1 ms of Redis's time)."""

LARGEST = 20_000
"""Nodes of a workflow among which a job's parents are looked for, 1,000 in a round trip."""


class Cause(msgspec.Struct, frozen=True):
    """One thing that is so. ``code`` is for programs: unknown, finished, failed, running, scheduled, retry, no_scheduler,
    parked, waiting, paused, no_worker, quiet, task_unknown, busy, behind, next.
    """

    code: str
    text: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job does not run, or did not; the cause that has to go first stands first."""

    id: str
    queue: str | None = None
    state: JobState | None = None
    task: str | None = None
    causes: list[Cause] = []

    def __str__(self) -> str:
        where = f"job {self.id}" + (f" of queue {self.queue}" if self.queue else "")
        return f"{where}: " + "; ".join(cause.text for cause in self.causes)


def explain(inspector: Inspector, job_id: str, queue: str | None = None) -> Operation[Explanation]:
    """Everything that keeps this job from running now."""
    status = yield from inspector.status(job_id, queue)
    if status is None:
        text = "nobody knows it: never enqueued, or its record has expired (result_ttl)"
        return Explanation(id=job_id, queue=queue, causes=[Cause("unknown", text)])
    if status.state.final:
        causes = [_ended(status)]
    elif status.state is JobState.RUNNING:
        causes = [Cause("running", _running(status))]
    else:
        causes = yield from _held_up(inspector, status)
    return Explanation(id=job_id, queue=status.queue, state=status.state, task=status.task, causes=causes)


def _running(status: JobStatus) -> str:
    if status.worker is not None:
        return f"worker {status.worker} has it"
    done = status.progress  # a workflow: no worker has it as a whole
    how_far = f": {done.current or 0:,.0f} of its {done.total or 0:,.0f} jobs have ended" if done is not None else ""
    return f"it is a workflow under way{how_far}; each job of it has an id of its own, {status.id}.0 and so on"


def _ended(status: JobStatus) -> Cause:
    if status.last_error == BROKEN:
        return Cause("failed", f"{BROKEN}: 'fastq workflow {status.id}' shows which one")
    if status.state is JobState.FAILED:
        return Cause("failed", f"it is in the dead-letter queue after {status.attempts} attempts: {status.last_error}")
    reason = f": {status.last_error}" if status.last_error else ""
    return Cause("finished", f"it has ended as {status.state.value}{reason}")


def _held_up(inspector: Inspector, status: JobStatus) -> Operation[list[Cause]]:
    q = inspector.keys(status.queue)
    info: QueueInfo | None = yield from inspector.queue(queue_of(status.queue))
    now, leader = yield [clock(), raw("GET", inspector.leader_key)]
    causes: list[Cause] = []
    if info is not None and info.paused:
        causes.append(Cause("paused", f"queue {status.queue} is paused"))
    pauses: list[Pause] = yield paused(q)
    named = next((pause for pause in pauses if pause.name == status.limit), None)
    causes += [
        Cause("paused", f"{p} is paused") for p in pauses if p is named or (p.task == status.task and not p.where)
    ]
    if status.state is JobState.WAITING:
        causes.append((yield from _waiting(q, status.id)))
    elif status.state is JobState.SCHEDULED:
        causes += _scheduled(status, now, leader=leader is not None)
    elif status.state is JobState.PARKED and named is None:
        until: float | None = yield raw("ZSCORE", q.parked, status.limit or "", decode=_score)
        again = "" if until is None else f", looked at again in {max(until - now, 0) / 1_000:.1f} s at the latest"
        causes.append(Cause("parked", f"it waits for the limit {status.limit}{again}"))
    live = yield from _live(q)
    if not live:
        causes.append(Cause("no_worker", _unserved(status.queue)))
    elif text := _unknown_to(live, status.queue, status.task or ""):
        causes.append(Cause("task_unknown", text))
    elif resting := [card.state for card in live if card and card.state != "running"]:
        causes += _resting(status.queue, resting, len(live))
    if status.state is JobState.PENDING:
        slots = sum(card.concurrency for card in live if card and card.state == "running")
        causes += yield from _in_line(q, status, info, slots)
    return causes


def unheard(inspector: Inspector, q: QueueKeys, task: str) -> Operation[str]:
    """That no live worker serves a queue, or none that does knows this task; "" if one does or may."""
    live: list[WorkerCard | None] = []
    for part in (yield from inspector.parts(q.queue)):
        live += yield from _live(part)
    if live:
        return _unknown_to(live, q.queue, task)
    queue = queue_of(q.queue)
    others = [name for name in (yield from inspector.queues()) if name != queue]
    return _unserved(queue) + did_you_mean(queue, others)


def unknown_everywhere(queues: Sequence[QueueKeys], task: str) -> Operation[str]:
    """That no live worker of any of these queues knows this task; "" if one does or may, or there is none."""
    live: list[WorkerCard | None] = []
    for q in queues:
        live += yield from _live(q)
    return _unknown_to(live, "", task)


def _unserved(queue: str) -> str:
    return f"no live worker serves queue {queue}"


def _live(q: QueueKeys) -> Operation[list[WorkerCard | None]]:
    """What each live worker of a queue says of itself."""
    now, leases, cards = yield [clock(), leases_of(q), raw("HGETALL", q.info)]
    stream = iter(cards)
    known = {worker.decode("utf-8", "replace"): _card(data) for worker, data in zip(stream, stream, strict=True)}
    return [known.get(worker) for worker, until in leases.items() if until > now]


def _unknown_to(live: Sequence[WorkerCard | None], queue: str, task: str) -> str:
    known: set[str] = set()
    for card in live:
        if card is None or not card.tasks or task in card.tasks:
            return ""
        known.update(card.tasks)
    where = f" of queue {queue}" if queue else ""
    return f"no live worker{where} knows task {task}{did_you_mean(task, known)}" if live else ""


def _resting(queue: str, states: Sequence[str], live: int) -> Iterator[Cause]:
    if len(states) == live:
        how = " or ".join(sorted(set(states)))
        yield Cause(
            "quiet",
            f"no live worker of queue {queue} takes new jobs: {live:,} of {live:,} are {how} (SIGCONT ends quiet)",
        )


def _waiting(q: QueueKeys, job_id: str) -> Operation[Cause]:
    """Which jobs of its workflow it waits for."""
    flow, _, number = job_id.partition(".")
    letters, stopped = yield [raw("GET", q.flow_states(flow)), raw("HGET", q.flow(flow), "stop")]
    states = (letters or b"").decode("utf-8", "replace")
    if stopped:
        return Cause("waiting", f"it waits for its parents, and workflow {flow} is cancelled: it will not run")
    parents: dict[int, list[int]] = defaultdict(list)
    for first in range(0, min(len(states), LARGEST), 1_000):
        nodes = range(first, min(first + 1_000, len(states)))
        lists = yield raw("HMGET", q.flow(flow), *(f"c{node}" for node in nodes))
        for node, children in zip(nodes, lists, strict=True):
            for child in numbers((children or b"").decode("utf-8", "replace")):
                parents[child].append(node)
    left = _unfinished(parents, states, int(number))
    if not left:
        return Cause("waiting", f"it waits for other jobs of workflow {flow}")
    shown = ", ".join(f"{flow}.{node} ({_LETTERS[states[node]]})" for node in left[:5])
    more = f" and {len(left) - 5:,} more" if len(left) > 5 else ""
    return Cause("waiting", f"it waits for {len(left):,} of its parents in workflow {flow}: {shown}{more}")


_LETTERS = {"w": "waiting, too", "a": "under way", "f": "failed", "c": "cancelled"}


def _unfinished(parents: Mapping[int, Sequence[int]], states: str, node: int) -> list[int]:
    """The jobs that have not succeeded and that a node waits for, directly or through gathers."""
    found, seen, ahead = set[int](), set[int](), [node]
    while ahead:
        for parent in parents.get(ahead.pop(), ()):
            if parent in seen:
                continue
            seen.add(parent)
            if states[parent] == "g":
                ahead.append(parent)
            elif states[parent] in _LETTERS:
                found.add(parent)
    return sorted(found)


def _scheduled(status: JobStatus, now: int, *, leader: bool) -> Iterator[Cause]:
    left = (status.due_at or 0.0) - now / 1_000
    when = f"in {left:.1f} s" if left > 0 else f"since {-left:.1f} s"
    if status.last_error:
        yield Cause("retry", f"attempt {status.attempts} failed ({status.last_error}), the next one is due {when}")
    else:
        yield Cause("scheduled", f"it is due {when}")
    if not leader:
        yield Cause("no_scheduler", "no scheduler runs: nothing makes it ready when it is due")


def _in_line(q: QueueKeys, status: JobStatus, info: QueueInfo | None, slots: int) -> Operation[list[Cause]]:
    priority = JobPriority.NORMAL if status.priority is None else status.priority
    above: list[Command[Any]] = [raw("LLEN", q.ready[level]) for level in range(priority + 1, PRIORITIES)]
    *higher, place = yield [*above, raw("LPOS", q.ready[priority], status.id, "MAXLEN", DEEPEST)]
    causes: list[Cause] = []
    if info is not None and 0 < slots <= info.running:
        causes.append(Cause("busy", f"all {slots} slots of the workers are taken"))
    if place is None:
        causes.append(Cause("behind", f"it is behind more than {DEEPEST:,} jobs, or on its way to a worker just now"))
    elif ahead := sum(higher) + int(place):
        causes.append(Cause("behind", f"it is behind {ahead:,} jobs, {sum(higher):,} of them of higher priority"))
    else:
        causes.append(Cause("next", "it is the next one"))
    return causes


def _score(reply: bytes | None) -> float | None:
    return None if reply is None else float(reply)


def _card(data: bytes) -> WorkerCard | None:
    try:
        return msgspec.msgpack.decode(data, type=WorkerCard)
    except Exception:  # noqa: BLE001 - whatever another release or a foreigner has written
        return None
