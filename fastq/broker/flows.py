"""Workflows in Redis: written down, begun, looked at, cancelled, sent on again; and what a job gets from those before it.

A workflow is one hash and one string in its queue's slot (docs/adr/0011-workflows.md). Its nodes are numbered from 0. A job
waits for one node at most; where several are waited for, a *gather* stands between: it costs a counter, and no job.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from fastq.broker import commands
from fastq.broker.command import Command, Operation, raw
from fastq.broker.keys import QueueKeys
from fastq.broker.views import clock, fresh, leases_of, number_of, text_of
from fastq.errors import BrokerError, BrokerReplyError, Fail, FastQError, InvalidOption
from fastq.job import ErrorInfo, JobRecord, JobState, JobStatus, Progress, decode_error, encode

__all__ = [
    "FlowView",
    "Node",
    "Spawned",
    "cancel",
    "edges",
    "ended_record",
    "first_error",
    "grow",
    "inputs",
    "is_flow",
    "numbers",
    "output",
    "pack",
    "retry",
    "spawn",
    "status_of",
    "submit",
    "view",
]

PART = 400
"""Most nodes in one call: about 1 ms of Redis time, and far fewer words than Lua can unpack."""

PART_BYTES = 1 << 20
AGAIN = 100
"""Jobs in one call of flow_retry.lua: about 1 ms of Redis's time."""

WAITING, GATHER, ACTIVE, SUCCESS, FAILED, CANCELLED, GATHERED, NOTHING = "wgasfcG-"
"""``NOTHING``: room for what a job was about to add."""


class Node(NamedTuple):
    """One node on its way in: a job with its envelope, or (``envelope`` None) a gather of the nodes ``items``."""

    children: Sequence[int]
    envelope: bytes | None = None
    items: Sequence[int] = ()
    parents: int = 0  # that a gather waits for


def pack(nodes: Iterable[int]) -> str:
    """A list of nodes as text; runs are cut short.

    >>> pack([3, 7, 8, 9, 20, 22, 24])
    '3,7-9,20-24/2'
    """
    runs: list[list[int]] = []  # first, last, step
    for node in nodes:
        if runs and runs[-1][0] == runs[-1][1] < node:
            runs[-1][1:] = node, node - runs[-1][0]
        elif runs and node - runs[-1][1] == runs[-1][2]:
            runs[-1][1] = node
        else:
            runs.append([node, node, 0])
    return ",".join(map(_run, runs))


def _run(run: list[int]) -> str:
    first, last, step = run
    if step < 2:
        return str(first) if first == last else f"{first}-{last}"
    return f"{first},{last}" if last == first + step else f"{first}-{last}/{step}"


def numbers(text: str) -> list[int]:
    """The nodes of :func:`pack`.

    >>> numbers("3,7-9,20-24/2")
    [3, 7, 8, 9, 20, 22, 24]
    """
    found: list[int] = []
    for part in filter(None, text.split(",")):
        run, _, step = part.partition("/")
        first, _, last = run.partition("-")
        words = (first, last or first, step or "1")
        if all(word.isascii() and word.isdigit() for word in words):  # whatever a foreigner has written
            start, stop, by = (int(word[:9]) for word in words)
            found += range(start, min(stop, start + 100_000) + 1, by or 1)
    return found


# -- one function per script ---------------------------------------------------------------------


def flow_add(q: QueueKeys, flow: str, first: int, letters: str, words: Sequence[Any]) -> Command[int]:
    """Write down the nodes from number ``first`` on; ``words`` are fields and values. 0: it has begun already."""
    return Command("flow_add", (q.flow(flow), q.flow_states(flow)), (first, letters, *words), int)


def flow_start(q: QueueKeys, flow: str, count: int, roots: Sequence[int], fields: dict[str, Any]) -> Command[int]:
    """Let it begin: 1; 2: and there is more (:func:`flow_unfold`); 0: it has before; -1: a part of it is missing."""
    words = [word for item in fields.items() for word in item]
    return Command("flow_start", (q.groups, q.flow(flow), q.flow_states(flow)), (flow, count, pack(roots), *words), int)


def flow_unfold(q: QueueKeys, flow: str) -> Command[int]:
    """Let the next of its ripe nodes begin: 1 when there are more."""
    return Command("flow_unfold", (q.groups, q.flow(flow)), (flow,), int)


def flow_grow(q: QueueKeys, flow: str, node: int, name: str, count: int, most: int) -> Command[list[int]]:
    """Make room for nodes that the job ``node`` adds: the first one, how many, 1 when they have begun; or [why not]."""
    return Command(
        "flow_grow", (q.flow(flow), q.flow_states(flow)), (node, name, count, most), lambda r: [*map(int, r)]
    )


def flow_spawn(q: QueueKeys, flow: str, node: int, name: str, first: int, spawned: Spawned) -> Command[int]:
    """Let what the job ``node`` adds begin: as :func:`flow_start`, or why not."""
    words = (first, _letters(spawned.nodes), pack(spawned.roots), f"{first} {node} {spawned.tasks}", spawned.join)
    return Command("flow_spawn", (q.groups, q.flow(flow), q.flow_states(flow)), (flow, node, name, *words), int)


def flow_cancel(q: QueueKeys, flow: str) -> Command[bytes | None]:
    """Let nothing more of it begin. Returns the letters of its nodes; None when it has ended."""
    return Command("flow_cancel", (q.groups, q.flow(flow), q.flow_states(flow)), (flow,), lambda letters: letters)


def flow_retry(q: QueueKeys, flow: str, again: Sequence[tuple[int, bytes]]) -> Command[int]:
    """Let these failed nodes of a failed workflow run again, with these envelopes. Returns how many do."""
    keys = (q.groups, q.flow(flow), q.flow_states(flow), q.dead, q.dead_jobs, q.dead_errors)
    return Command("flow_retry", keys, (flow, *(word for row in again for word in row)), int)


# -- begin -------------------------------------------------------------------------------------


def submit(
    q: QueueKeys, flow: str, nodes: Sequence[Node], roots: Sequence[int], fields: dict[str, Any], queues: bytes
) -> Operation[bool]:
    """Write a workflow down in parts, then let it begin at once. May be repeated as a whole. Returns whether this call began it.

    ``fields``: ``policy``, ``ttl`` (ms) and what describes it; see :func:`view`.
    """
    yield raw("SADD", queues, q.queue)
    for part in _parts(nodes):
        yield _add(q, flow, *part)
    yield flow_add(q, flow, len(nodes), "", ("whole", 1))
    begun = yield flow_start(q, flow, len(nodes), roots, fields)
    if begun < 0:
        raise BrokerReplyError(f"a part of workflow {flow} was gone before it began: nothing of it has run")
    if begun == 2:
        yield from _unfold(q, flow)
    return bool(begun > 0)


def _unfold(q: QueueKeys, flow: str) -> Operation[None]:
    """It has begun; what of it is ripe becomes pending at once instead of when a worker asks for more."""
    with contextlib.suppress(BrokerError):  # then workers do it
        while (yield flow_unfold(q, flow)):
            pass


def _parts(nodes: Sequence[Node]) -> Iterator[tuple[int, Sequence[Node]]]:
    first, size = 0, 0
    for number, node in enumerate(nodes):
        if number - first >= PART or size > PART_BYTES:
            yield first, nodes[first:number]
            first, size = number, 0
        size += len(node.envelope or b"")
    yield first, nodes[first:]


def _add(q: QueueKeys, flow: str, first: int, nodes: Sequence[Node]) -> Command[int]:
    words: list[Any] = []
    for number, node in enumerate(nodes, first):
        if node.children:
            words += (f"c{number}", pack(node.children))
        if node.envelope is not None:
            words += (f"e{number}", node.envelope)
        else:
            words += (f"p{number}", node.parents, f"g{number}", pack(node.items))
    return flow_add(q, flow, first, _letters(nodes), words)


def _letters(nodes: Iterable[Node]) -> str:
    return "".join(GATHER if node.envelope is None else WAITING for node in nodes)


# -- more of it --------------------------------------------------------------------------------


class Spawned(NamedTuple):
    """What a running job adds: numbered nodes, those that begin at once, the tasks as :meth:`FlowView.tasks` reads them, and
    the node whose result joins the lists of those that wait for the job (-1: none).
    """

    nodes: Sequence[Node]
    roots: Sequence[int]
    tasks: str
    join: int


_REFUSALS = {
    -1: "its workflow has ended, or was cancelled",
    -2: "this job does not run any more",
    -3: "its workflow would have more than {most:,} jobs and gathers",
}


def grow(q: QueueKeys, flow: str, node: int, name: str, count: int, most: int) -> Operation[tuple[int, int, bool]]:
    """Room for what the job ``node`` adds under this name: the first node, how many, whether they have begun before."""
    first, *rest = yield flow_grow(q, flow, node, name, count, most)
    if not rest:
        raise FastQError(f"job {flow}.{node} cannot add to its workflow: {_REFUSALS[first].format(most=most)}")
    return first, rest[0], rest[1] == 1


def spawn(q: QueueKeys, flow: str, node: int, name: str, first: int, spawned: Spawned) -> Operation[None]:
    """Write down what the job ``node`` adds, in the room that :func:`grow` has made, and let it begin."""
    for part, nodes in _parts(spawned.nodes):
        yield _add(q, flow, first + part, nodes)
    begun = yield flow_spawn(q, flow, node, name, first, spawned)
    if begun == -3:
        raise InvalidOption(f"join=True: behind job {flow}.{node} stands no group whose list its result could join")
    if begun < 0:
        raise FastQError(f"job {flow}.{node} cannot add to its workflow: {_REFUSALS[begun]}")
    if begun == 2:
        yield from _unfold(q, flow)


# -- what a job gets ---------------------------------------------------------------------------


def inputs(q: QueueKeys, job_id: str, node: int) -> Operation[Any]:
    """What the parent of a job of a workflow has returned, as msgpack that need not be decoded: a gather's is a list.

    Raises:
        Fail: it is not there any more.
    """
    return (yield from output(q, job_id.partition(".")[0], node))


def output(q: QueueKeys, flow: str, node: int) -> Operation[Any]:
    """What a node has returned, gathers within gathers as lists within lists. Under ``on_error="ignore"`` a failed item of a
    gather is left out, under ``"continue"`` it is ``{"error": …, "job": …}``.

    Raises:
        Fail: it is not there any more.
    """
    (policy, value, items), letter = yield [
        raw("HMGET", q.flow(flow), "policy", f"r{node}", f"g{node}"),
        raw("GETRANGE", q.flow_states(flow), node, node),
    ]
    if policy is None or not letter:
        raise Fail(f"the results of workflow {flow} have expired")
    letters, lists = {node: text_of(letter)}, dict[int, list[int]]()
    if items is not None:
        letters = dict(enumerate(text_of((yield raw("GET", q.flow_states(flow))) or b"")))
        lists = yield from _lists(q, flow, node, numbers(text_of(items)), letters)
    jobs = sorted({item for items in lists.values() for item in items} - lists.keys()) if lists else [node]
    found = (yield from _fields(q, flow, "r", jobs)) if lists else [value]
    values: dict[int, Any] = {n: msgspec.Raw(data) for n, data in zip(jobs, found, strict=True) if data is not None}
    missing = [number for number in jobs if number not in values]
    if policy == b"continue":
        values |= yield from _excuses(q, flow, missing)
    elif policy != b"ignore":
        for number in missing:
            if letters[number] == SUCCESS:
                raise Fail(f"the result of job {flow}.{number} has expired")
    return _gathered(node, lists, values)


def _lists(
    q: QueueKeys, flow: str, node: int, items: list[int], letters: Mapping[int, str]
) -> Operation[dict[int, list[int]]]:
    """The items of a gather and of those within it, level by level: nesting costs round trips, not stack."""
    lists, level = {node: items}, items
    while level:
        gathers = [n for n in dict.fromkeys(level) if letters[n] in (GATHER, GATHERED) and n not in lists]
        for number, text in zip(gathers, (yield from _fields(q, flow, "g", gathers)), strict=True):
            lists[number] = numbers(text_of(text or b""))
        level = [item for number in gathers for item in lists[number]]
    return lists


def _gathered(node: int, lists: Mapping[int, list[int]], values: dict[int, Any]) -> Any:
    """Inner gathers become lists before outer ones."""
    pending = [node]
    while pending:
        number = pending[-1]
        inner = [item for item in lists.get(number, ()) if item in lists and item not in values]
        pending += inner
        if not inner:
            pending.pop()
            if number in lists:
                values[number] = [values[item] for item in lists[number] if item in values]
    return values.get(node)


def _fields(q: QueueKeys, flow: str, letter: str, nodes: Sequence[int]) -> Operation[list[bytes | None]]:
    found: list[bytes | None] = []
    stream = iter(nodes)
    while part := list(islice(stream, 1_000)):
        found += yield raw("HMGET", q.flow(flow), *(f"{letter}{node}" for node in part))
    return found


def _excuses(q: QueueKeys, flow: str, nodes: Sequence[int]) -> Operation[dict[int, dict[str, str]]]:
    """What stands in place of the results of these jobs."""
    excuses: dict[int, dict[str, str]] = {}
    stream = iter(nodes)
    while part := list(islice(stream, 1_000)):
        ids = [f"{flow}.{node}" for node in part]
        for node, job_id, data in zip(part, ids, (yield raw("HMGET", q.dead_errors, *ids)), strict=True):
            error = None if data is None else decode_error(data)
            why = f"{error.type}: {error.message}" if error else "cancelled, or no dead letter any more"
            excuses[node] = {"job": job_id, "error": why}
    return excuses


# -- look --------------------------------------------------------------------------------------


class FlowView(NamedTuple):
    """A workflow as it is: what describes it (text), a letter per node, and when it began and ended (ms).

    ``spawned`` is what its jobs have added: ``first_node its_job task*count task*count;…``, no name for gathers.
    """

    fields: dict[str, str]
    letters: str
    started_ms: int
    finished_ms: int
    runs: bytes  # msgpack: [task, how many nodes in a row], "" for gathers
    spawned: str = ""

    def tasks(self) -> list[str]:
        """The task of each node, "" for gathers and for what was never added."""
        try:
            runs = msgspec.msgpack.decode(self.runs, type=list[tuple[str, int]])
        except Exception:  # noqa: BLE001 - whatever a foreigner has written
            runs = []
        names = [name for name, count in runs for _ in range(min(count, len(self.letters)))]
        names += [""] * (len(self.letters) - len(names))
        for first, _, *parts in self._spawned():
            node = int(first)
            for name, _, count in (part.partition("*") for part in parts):
                names[node : node + int(count)] = [name] * int(count)
                node += int(count)
        return names

    def spawners(self) -> dict[int, int]:
        """The first node of each addition -> the job that has added it."""
        return {int(first): int(by) for first, by, *_ in self._spawned()}

    def _spawned(self) -> list[list[str]]:
        return [each.split(" ") for each in filter(None, self.spawned.split(";"))]

    @property
    def state(self) -> str:
        """running, success, failed or cancelled."""
        return self.fields["state"]


_DESCRIBES = ("state", "name", "policy", "exit", "started", "finished", "stop")


def view(q: QueueKeys, flow: str) -> Operation[FlowView | None]:
    """How far a workflow is; None when it is unknown or its time is over."""
    values, (runs, spawned), letters = yield [
        raw("HMGET", q.flow(flow), *_DESCRIBES),
        raw("HMGET", q.flow(flow), "tasks", "spawned"),
        raw("GET", q.flow_states(flow)),
    ]
    if values[0] is None or letters is None:
        return None
    fields = {name: text_of(value) for name, value in zip(_DESCRIBES, values, strict=True) if value is not None}
    began, ended = number_of(values[4]), number_of(values[5])
    return FlowView(fields, text_of(letters), began, ended, runs or b"\x90", text_of(spawned or b""))


def is_flow(text: str) -> bool:
    """Whether this can be the id of a workflow."""
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{24}", text) is not None


BROKEN = "a job of the workflow has failed"


def status_of(q: QueueKeys, flow: str, found: FlowView) -> JobStatus:
    """A workflow as if it were one job: ``task`` is its name, the progress counts its jobs."""
    count = found.letters.count
    total = len(found.letters) - count(GATHER) - count(GATHERED) - count(NOTHING)
    ended = count(SUCCESS) + count(FAILED) + count(CANCELLED)
    return JobStatus(
        id=flow,
        queue=q.queue,
        state=JobState(found.state),
        task=found.fields.get("name") or None,
        started_at=found.started_ms / 1_000,
        finished_at=found.finished_ms / 1_000 or None,
        last_error=BROKEN if found.state == "failed" else None,
        progress=Progress(current=ended, total=total),
    )


def first_error(q: QueueKeys, flow: str, letters: str) -> Operation[tuple[str, ErrorInfo]]:
    """A job of a workflow that has failed, and why, as far as it is known."""
    if FAILED not in letters:
        job_id = f"{flow}.{max(letters.find(CANCELLED), 0)}"
        return job_id, ErrorInfo("cancelled", "", "it was cancelled, or expired", "", 0, 0, "")
    job_id = f"{flow}.{letters.index(FAILED)}"
    data = yield raw("HGET", q.dead_errors, job_id)
    missing = ErrorInfo("exception", "", "its dead letter is gone", "", 0, 0, "")
    return job_id, missing if data is None else decode_error(data)


def edges(q: QueueKeys, flow: str, count: int) -> Operation[list[list[int]]]:
    """The children of each node."""
    found = yield from _fields(q, flow, "c", range(count))
    return [numbers(text_of(text or b"")) for text in found]


# -- change ------------------------------------------------------------------------------------


def cancel(q: QueueKeys, flow: str, record: bytes, ttl_ms: int, *, terminate: bool = False) -> Operation[bool]:
    """Let nothing more of it begin, and cancel what is under way. False when it has ended or is unknown."""
    letters = yield flow_cancel(q, flow)
    if not letters:
        return False
    active = [f"{flow}.{n}" for n, letter in enumerate(text_of(letters)) if letter == ACTIVE]
    while active:
        part, active = active[:200], active[200:]
        leases = yield leases_of(q)
        answers = yield [
            commands.cancel(q, job_id, list(leases), record, ttl_ms, terminate=terminate) for job_id in part
        ]
        active += [job_id for job_id, answer in zip(part, answers, strict=True) if answer == "again"]
    return True


def retry(q: QueueKeys, flow: str) -> Operation[int]:
    """Send a failed workflow on: its failed jobs run again, with a fresh budget. Returns how many."""
    letters = yield raw("GET", q.flow_states(flow))
    stream = iter([n for n, letter in enumerate(text_of(letters or b"")) if letter == FAILED])
    now, sent = (yield clock()), 0
    while part := list(islice(stream, AGAIN)):
        envelopes = yield raw("HMGET", q.dead_jobs, *(f"{flow}.{node}" for node in part))
        again = [(node, fresh(data, now, now)) for node, data in zip(part, envelopes, strict=True) if data is not None]
        if again:
            sent += yield flow_retry(q, flow, again)
    return sent


def ended_record(state: str, name: str, now_ms: int, error: str | None = None) -> bytes:
    """What those are told who wait for the end of a workflow."""
    return encode(JobRecord(state, name, now_ms, now_ms, now_ms, 1, error=error))
