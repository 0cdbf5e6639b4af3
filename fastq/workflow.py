"""Workflows as data: signatures, chain, group, chord and free graphs, and how all of them become one kind of graph.

A graph has numbered nodes. A job waits for one node at most, and what that has returned is its first argument; a *gather*
waits for many and stands for the list of what they have returned. So a chain is a line, a chord is jobs with a gather behind
them, and nothing is ever copied into a message: it names a node.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import msgspec

from fastq.broker import flows
from fastq.broker.command import Operation
from fastq.broker.flows import Node
from fastq.broker.keys import GlobalKeys, QueueKeys
from fastq.errors import InvalidOption
from fastq.job import seconds
from fastq.values import Durability, check_queue_name, is_replicated
from fastq.workflow_handle import Home, Workflow

__all__ = [
    "Added",
    "Chain",
    "Flow",
    "Graph",
    "Group",
    "OnError",
    "Signature",
    "Work",
    "chain",
    "chord",
    "group",
    "spawning",
]

OnError = Literal["fail", "continue", "ignore"]

MOST_NODES = 100_000
MOST_DEPTH = 100
_NOT_HERE = ("delay", "at", "job_id", "unique", "idempotency_key", "durability", "tags")


class Source(Protocol):
    """What a signature calls: a task, or a name."""

    name: str

    def home(self) -> Home:
        """The application."""
        ...

    def node(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any], takes: int
    ) -> tuple[str, bytes]:
        """Queue and envelope of a job whose first argument comes from node ``takes`` (-1: it takes none)."""
        ...


# -- what people write -------------------------------------------------------------------------


class Work:
    """Something that a workflow can be made of: a signature, a chain, a group, a chord."""

    def _lower(self, graph: Graph, after: int, depth: int) -> int:
        """Add it behind node ``after`` (-1: at the start); returns the node that stands for its result."""
        raise NotImplementedError

    def graph(self) -> Graph:
        """The graph that this becomes.

        Raises:
            InvalidArguments, BodyTooLarge: a call in it. InvalidOption: it is empty, too large or too deep.
        """
        graph = Graph()
        graph.exit = self._lower(graph, -1, 0)
        return graph

    async def enqueue(
        self,
        *,
        name: str = "",
        queue: str | None = None,
        on_error: OnError = "fail",
        on_failure: Signature | None = None,
        result_ttl: float | None = None,
        durability: Durability | None = None,
    ) -> Workflow:
        """Start it. Once this has returned, it reaches a final state, whatever dies; see docs/workflows.md.

        Args:
            name: for people.
            queue: where all its jobs run; needed when its tasks name several.
            on_error: what a job that has failed for good means for those behind it. ``"fail"``: they do not run.
                ``"continue"``: they run, and get ``{"job": …, "error": …}`` in place of its result; the workflow has failed
                in the end. ``"ignore"``: they run, a group's list is without it, a chain's next gets None.
            on_failure: a call that is enqueued once when the workflow has failed; ``.s()`` gets its id first.
            result_ttl: seconds that the results are kept once it has ended (default: the setting ``result_ttl``).
            durability: ``"replicated"``: returns when replicas have it (default: the setting ``durability``).

        Raises:
            InvalidArguments, BodyTooLarge, InvalidOption: nothing was stored. BrokerUnavailable: Redis did not confirm it.
            NotReplicated: it has begun, and a failover may lose it; its id is in ``job_ids``.

        Example::

            flow = await chain(download.s(url), parse.s(), store.s()).enqueue()
            print(await flow.result(timeout=60))
        """
        start = Start(self.graph(), name, queue, on_error, on_failure, result_ttl, durability)
        await start.home.store(start.operation, start.queue, "the workflow", start.id, safe=start.safe)
        return start.workflow

    def enqueue_sync(
        self,
        *,
        name: str = "",
        queue: str | None = None,
        on_error: OnError = "fail",
        on_failure: Signature | None = None,
        result_ttl: float | None = None,
        durability: Durability | None = None,
    ) -> Workflow:
        """:meth:`enqueue` from blocking code."""
        start = Start(self.graph(), name, queue, on_error, on_failure, result_ttl, durability)
        start.home.store_sync(start.operation, start.queue, "the workflow", start.id, safe=start.safe)
        return start.workflow


class Signature(Work):
    """A call that is made later: ``task.s(…)``, ``task.si(…)``."""

    __slots__ = ("args", "immutable", "kwargs", "options", "source")

    def __init__(
        self,
        source: Source,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        immutable: bool,
    ) -> None:
        for option in _NOT_HERE:
            if option in options:
                raise InvalidOption(f"task {source.name!r}: {option} is no option of a job of a workflow")
        self.source = source
        self.args = args
        self.kwargs = kwargs
        self.options = options
        self.immutable = immutable

    def _lower(self, graph: Graph, after: int, depth: int) -> int:
        del depth
        return graph.add_job(self, after)

    def __repr__(self) -> str:
        return f"<Signature {self.source.name}>"


class Chain(Work):
    """Jobs one after the other; what one returns is the first argument of the next."""

    def __init__(self, parts: Sequence[Work]) -> None:
        self.parts = _works("chain", parts)
        if not self.parts:
            raise InvalidOption("a chain needs at least one job")

    def _lower(self, graph: Graph, after: int, depth: int) -> int:
        for part in self.parts:
            after = part._lower(graph, after, _deeper(depth))
        return after


class Group(Work):
    """Jobs side by side; its result is the list of theirs, in the order in which they were given."""

    def __init__(self, parts: Sequence[Work]) -> None:
        self.parts = _works("group", parts)

    def _lower(self, graph: Graph, after: int, depth: int) -> int:
        exits = [part._lower(graph, after, _deeper(depth)) for part in self.parts]
        return graph.add_gather(exits, after)


def chain(*parts: Work | Iterable[Work]) -> Chain:
    """Run these one after the other; what one returns is the first argument of the next (``.si()``: it is not).

    Example::

        flow = await fastq.chain(download.s(url), parse.s(), store.s()).enqueue()
    """
    return Chain(_flat(parts))


def group(*parts: Work | Iterable[Work]) -> Group:
    """Run these side by side.

    Example::

        flow = await fastq.group(thumbnail.s(image) for image in images).enqueue()
    """
    return Group(_flat(parts))


def chord(header: Iterable[Work] | Group, callback: Work) -> Chain:
    """Run the header's jobs side by side, then the callback, once, with the list of what they have returned.

    Example::

        flow = await fastq.chord([count.s(page) for page in pages], total.s()).enqueue()
    """
    return Chain([header if isinstance(header, Group) else Group(list(header)), callback])


def _flat(parts: Sequence[Work | Iterable[Work]]) -> list[Work]:
    if len(parts) == 1 and isinstance(parts[0], Iterable):
        return list(parts[0])
    return cast("list[Work]", list(parts))  # _works says what does not belong there


def _works(kind: str, parts: Sequence[Work]) -> Sequence[Work]:
    for part in parts:
        if not isinstance(part, Work):
            raise InvalidOption(f"a {kind} is made of task.s(…), chains, groups and chords, not of {part!r:.100}")
    return parts


def _deeper(depth: int) -> int:
    if depth >= MOST_DEPTH:
        raise InvalidOption(f"a workflow is nested at most {MOST_DEPTH} deep")
    return depth + 1


class Flow(Work):
    """A graph of one's own; see :meth:`fastq.FastQ.workflow`."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._graph = Graph()
        self._gathers: dict[tuple[int, ...], int] = {}
        self._ends: dict[int, None] = {}

    def add(self, work: Work, *, after: Iterable[Added] | Added = ()) -> Added:
        """Add work that begins when all of ``after`` has ended. What the one parent has returned is its first argument;
        of several parents, the list.

        Raises:
            InvalidOption: ``after`` belongs to another graph. InvalidArguments, BodyTooLarge: the call is wrong.

        Example::

            wf = app.workflow("order")
            paid = wf.add(pay.s(42))
            packed = wf.add(pack.si(42))
            wf.add(ship.s(), after=[paid, packed])
            await wf.enqueue()
        """
        parents = [after] if isinstance(after, Added) else list(after)
        if any(not isinstance(each, Added) or each.flow is not self for each in parents):
            raise InvalidOption("after= names what wf.add of the same workflow has returned")
        nodes = tuple(dict.fromkeys(each.node for each in parents))
        before = -1 if not nodes else nodes[0]
        if len(nodes) > 1:
            before = self._gathers.get(nodes, -1)
            if before < 0:
                before = self._gathers[nodes] = self._graph.add_gather(list(nodes), -1)
        for node in nodes:
            self._ends.pop(node, None)
        added = work._lower(self._graph, before, 0)
        self._ends[added] = None
        return Added(self, added)

    def _lower(self, graph: Graph, after: int, depth: int) -> int:  # noqa: ARG002 - see Work
        raise InvalidOption("a free graph cannot be a part of another workflow")

    def graph(self) -> Graph:
        """The graph; its result is that of the one job behind which there is none, or the list of theirs."""
        graph = self._graph.copy()
        ends = list(self._ends)
        graph.exit = ends[0] if len(ends) == 1 else graph.add_gather(ends, -1)
        graph.name = self._name
        return graph


class Added:
    """What :meth:`Flow.add` has added."""

    __slots__ = ("flow", "node")

    def __init__(self, flow: Flow, node: int) -> None:
        self.flow = flow
        self.node = node


# -- what it becomes -----------------------------------------------------------------------------


class Graph:
    """Nodes in the order in which they were added: what a node waits for has a smaller number."""

    def __init__(self) -> None:
        self.jobs: list[Signature | None] = []  # None: a gather
        self.takes: list[int] = []
        self.children: list[list[int]] = []
        self.items: dict[int, list[int]] = {}
        self.parents: dict[int, int] = {}
        self.roots: list[int] = []
        self.exit = -1
        self.name = ""

    def copy(self) -> Graph:
        """Another one with the same nodes."""
        other = Graph()
        other.jobs, other.takes, other.roots = list(self.jobs), list(self.takes), list(self.roots)
        other.children = [list(children) for children in self.children]
        other.items, other.parents, other.name = dict(self.items), dict(self.parents), self.name
        return other

    def add_job(self, signature: Signature, after: int) -> int:
        """A job that waits for node ``after`` (-1: for none)."""
        node = self._add(signature, [] if after < 0 else [after])
        self.takes[node] = -1 if signature.immutable else after
        return node

    def add_gather(self, items: list[int], after: int) -> int:
        """A node for the list of what these have returned; an empty one waits for ``after``."""
        before = list(dict.fromkeys(items)) or ([] if after < 0 else [after])
        node = self._add(None, before)
        self.items[node] = items
        self.parents[node] = max(len(before), 1)  # without any, the start counts as one
        return node

    def _add(self, signature: Signature | None, before: list[int]) -> int:
        if len(self.jobs) >= MOST_NODES:
            raise InvalidOption(f"a workflow has at most {MOST_NODES:,} jobs and gathers")
        node = len(self.jobs)
        self.jobs.append(signature)
        self.takes.append(-1)
        self.children.append([])
        for parent in before:
            self.children[parent].append(node)
        if not before:
            self.roots.append(node)
        return node


class Start:
    """A workflow on its way in: everything is encoded and checked before anything is sent, and may be sent twice."""

    def __init__(
        self,
        graph: Graph,
        name: str,
        queue: str | None,
        on_error: OnError,
        on_failure: Signature | None,
        result_ttl: float | None,
        durability: str | None = None,
    ) -> None:
        self.safe = None if durability is None else is_replicated(durability)
        if on_error not in ("fail", "continue", "ignore"):
            raise InvalidOption(f"on_error={on_error!r}: choose 'fail', 'continue' or 'ignore'")
        signatures = [signature for signature in graph.jobs if signature is not None]
        if not signatures:
            raise InvalidOption("a workflow needs at least one job")
        self.home = signatures[0].source.home()
        self.id = os.urandom(12).hex()
        self._roots = graph.roots
        self._nodes, queues = _encoded(graph)
        whole = check_queue_name(queue) if queue else _one_queue(queues)
        self.queue = self.home.partition(whole, self.id)  # all of it in one: its jobs begin and end each other
        seal = self.home.sealer()
        if seal is not None:
            self._nodes = _sealed(self._nodes, seal, self.queue, self.id)
        name = name or graph.name
        ttl = seconds("result_ttl", self.home.result_ttl() if result_ttl is None else result_ttl)
        now = self.home.now_ms()
        self._fields: dict[str, Any] = {
            "policy": on_error,
            "ttl": max(1_000, round(ttl * 1_000)),
            "name": name,
            "exit": graph.exit,
            "tasks": _tasks(graph),
            "success": flows.ended_record("success", name, now),
            "failed": flows.ended_record("failed", name, now, "a job of the workflow has failed"),
            "cancelled": flows.ended_record("cancelled", name, now),
        }
        if on_failure is not None and not isinstance(on_failure, Signature):
            raise InvalidOption(f"on_failure={on_failure!r:.100} is not task.s(…): it is one call")
        if on_failure is not None:
            args = on_failure.args if on_failure.immutable else (self.id, *on_failure.args)
            envelope = on_failure.source.node(args, on_failure.kwargs, on_failure.options, -1)[1]
            self._fields["failure"] = envelope if seal is None else seal(self.queue, f"{self.id}.failure", envelope)
        self.workflow = Workflow(self.home, self.id, self.queue)

    def operation(self) -> Operation[bool]:
        """What starts it."""
        keys, queues = self.home.keys(self.queue), GlobalKeys(self.home.prefix()).queues
        return flows.submit(keys, self.id, self._nodes, self._roots, self._fields, queues)


def spawning(q: QueueKeys, job_id: str, name: str, work: Work, *, join: bool) -> Operation[list[str]]:
    """A running job adds work to its workflow; the ids of the jobs added.

    Raises:
        InvalidArguments, BodyTooLarge, InvalidOption: nothing was added. FastQError: its workflow has ended, or was cancelled.
    """
    flow, _, node = job_id.partition(".")
    graph = work.graph()
    _encoded(graph)  # what is wrong is said before room is made
    first, count, begun = yield from flows.grow(q, flow, int(node), name, len(graph.jobs), MOST_NODES)
    if not begun:
        nodes, _ = _encoded(graph, first)
        source = next((signature.source for signature in graph.jobs if signature is not None), None)
        seal = source.home().sealer() if source is not None else None
        if seal is not None:
            nodes = _sealed(nodes, seal, q.queue, flow, first)
        roots, exit_node = [first + root for root in graph.roots], first + graph.exit if join else -1
        tasks = " ".join(f"{task}*{times}" for task, times in _runs(graph))
        yield from flows.spawn(q, flow, int(node), name, first, flows.Spawned(nodes, roots, tasks, exit_node))
    elif count != len(graph.jobs):
        return [f"{flow}.{first + n}" for n in range(count)]  # an earlier run has added something else
    return [f"{flow}.{first + n}" for n, signature in enumerate(graph.jobs) if signature is not None]


def _encoded(graph: Graph, first: int = 0) -> tuple[list[Node], dict[str, str]]:
    """The nodes, numbered from ``first``, and the queues that their tasks name."""
    nodes: list[Node] = []
    queues: dict[str, str] = {}
    for number, signature in enumerate(graph.jobs):
        children = [first + child for child in graph.children[number]]
        if signature is None:
            items = [first + item for item in graph.items[number]]
            nodes.append(Node(children, None, items, graph.parents[number]))
            continue
        takes = graph.takes[number]
        queue, envelope = signature.source.node(
            signature.args, signature.kwargs, signature.options, takes + first if takes >= 0 else -1
        )
        queues.setdefault(queue, signature.source.name)
        nodes.append(Node(children, envelope))
    return nodes, queues


def _sealed(
    nodes: list[Node], seal: Callable[[str, str, bytes], bytes], queue: str, flow: str, first: int = 0
) -> list[Node]:
    """The same nodes, signed."""
    return [
        node if node.envelope is None else node._replace(envelope=seal(queue, f"{flow}.{n}", node.envelope))
        for n, node in enumerate(nodes, first)
    ]


def _one_queue(queues: Mapping[str, str]) -> str:
    if len(queues) > 1:
        named = ", ".join(f"{task!r} in {queue!r}" for queue, task in queues.items())
        raise InvalidOption(f"the jobs of a workflow run in one queue, these go to several ({named}): give queue=")
    return next(iter(queues))


def _tasks(graph: Graph) -> bytes:
    """The task names of the nodes, for :class:`fastq.broker.flows.FlowView`."""
    return msgspec.msgpack.encode(_runs(graph))


def _runs(graph: Graph) -> list[list[Any]]:
    """The task names of the nodes, runs cut short: [name, count], "" for gathers."""
    runs: list[list[Any]] = []
    for signature in graph.jobs:
        name = "" if signature is None else signature.source.name
        if runs and runs[-1][0] == name:
            runs[-1][1] += 1
        else:
            runs.append([name, 1])
    return runs
