"""The masters of a cluster, one by one: what the doctor finds at each of them is told once where it is the same everywhere."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from fastq.broker.command import Command, Operation, raw
from fastq.broker.topology import LAYOUT, SLOTS, Node, slot_of
from fastq.broker.url import Endpoint
from fastq.errors import BrokerReplyError, BrokerUnavailable

__all__ = ["Finding", "Level", "Master", "Probe", "allowed", "at", "config", "examine", "of_each"]

Level = Literal["ok", "warn", "fault"]
Probe = Command[Any] | None
"""A command whose key is on the server that is meant; None where there is one server."""

SLOWEST = 15_000
"""Milliseconds of cluster-node-timeout, Redis's default: a producer, too, has given up by then (``enqueue_timeout``)."""

FASTEST = 1_000
"""Milliseconds below which a fork or a slow disk looks like a dead node."""


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at. ``fix`` is the line to change, empty when there is nothing to do."""

    level: Level
    name: str
    message: str
    fix: str = ""


class Master(NamedTuple):
    """A node that serves slots, and a command without effect that it answers."""

    node: Node
    probe: Command[Any]
    replicas: int

    def endpoint(self, cluster: Endpoint) -> Endpoint:
        """As if it alone had been reached."""
        return cluster._replace(host=self.node.host, port=self.node.port, nodes=())


# -- asking one of them ---------------------------------------------------------------------------


def at(command: Command[Any], near: Probe) -> Operation[Any]:
    """The reply of the server that ``near`` goes to."""
    if near is None:
        return (yield command)
    _, reply = yield [near, command]
    return reply


def allowed(command: Command[Any], near: Probe) -> Operation[Any]:
    """The reply; None when this user may not ask, or this server does not know how."""
    try:
        return (yield from at(command, near))
    except BrokerReplyError:
        return None


def config(name: str, near: Probe) -> Operation[str | None]:
    """One directive of the server's configuration; None when it is forbidden."""
    reply = yield from allowed(raw("CONFIG", "GET", name), near)
    return reply[1].decode("utf-8", "replace") if reply and len(reply) > 1 else None


# -- all of them ----------------------------------------------------------------------------------


def examine(
    prefix: str, cluster: Endpoint, look: Callable[[Master], Operation[list[Finding]]]
) -> Operation[list[Finding]]:
    """What ``look`` finds at each master, and what is wrong with the cluster as a whole."""
    layout = yield from _layout(cluster)
    masters = _masters(prefix, cluster, layout)
    found = yield from _each(masters, look)
    return [*_coverage(layout), *(yield from _failover(masters, found)), *_merged(found)]


def of_each(
    prefix: str, cluster: Endpoint, look: Callable[[Master], Operation[list[Finding]]]
) -> Operation[list[Finding]]:
    """What ``look`` finds at each master."""
    masters = _masters(prefix, cluster, (yield from _layout(cluster)))
    return _merged((yield from _each(masters, look)))


def _layout(cluster: Endpoint) -> Operation[Any]:
    """Of any master that answers: the next one is asked when one is away, which is just what is to be found."""
    for _ in range(max(2, len(cluster.nodes) - 1)):  # a URL of one node may name any
        with contextlib.suppress(BrokerUnavailable):
            return (yield LAYOUT)
    return (yield LAYOUT)


def _each(
    masters: Sequence[Master], look: Callable[[Master], Operation[list[Finding]]]
) -> Operation[dict[Node, list[Finding]]]:
    found: dict[Node, list[Finding]] = {}
    for master in masters:
        try:
            found[master.node] = yield from look(master)
        except BrokerUnavailable as error:
            found[master.node] = [_away(error)]
    return found


def _away(error: BrokerUnavailable) -> Finding:
    if error.refused:
        fix = "start the masters that are missing, or CLUSTER FAILOVER on their replicas"
        return Finding("fault", "cluster", f"this master lives and serves nobody ({error})", fix)
    message = f"this master cannot be reached, and its queues stand still ({error})"
    return Finding("fault", "cluster", message, "start it, or CLUSTER FAILOVER on a replica")


def _masters(prefix: str, cluster: Endpoint, layout: Any) -> list[Master]:
    """Of a reply to :data:`LAYOUT`, in which a node without a name is the one that was asked."""
    slots: dict[Node, range] = {}
    replicas: dict[Node, int] = {}
    for first, last, (host, port, *_), *others in layout:
        node = Node(host.decode() if host else cluster.nodes[0][0], port)
        slots.setdefault(node, range(first, last + 1))
        replicas[node] = max(replicas.get(node, 0), len(others))
    return [Master(node, raw("EXISTS", _key_in(prefix, slots[node])), replicas[node]) for node in sorted(slots)]


def _key_in(prefix: str, slots: range) -> str:
    """A key that is in one of these slots and never exists; 16,384 tries, 10 ms, where it is one slot."""
    tries = (f"{prefix}:{{{number}}}:nothing" for number in itertools.count())
    return next(key for key in tries if slot_of(key) in slots)


def _coverage(layout: Any) -> Iterator[Finding]:
    served = sum(last + 1 - first for first, last, *_ in layout)
    nodes = len({(host, port) for _, _, (host, port, *_), *_ in layout})
    if served < SLOTS:
        message = f"{SLOTS - served:,} of {SLOTS:,} slots are served by no node"
        yield Finding("fault", "cluster", message, "redis-cli --cluster fix HOST:PORT")
    else:
        yield Finding("ok", "cluster", f"{nodes} masters serve all slots")


def _failover(masters: Sequence[Master], found: dict[Node, list[Finding]]) -> Operation[list[Finding]]:
    """What becomes of the queues of a master that dies."""
    alone = [str(master.node) for master in masters if not master.replicas]
    findings: list[Finding] = []
    if alone:
        message = f"no replica stands by for {_listed(alone)}: until it is back, its queues stand still"
        fix = f"redis-cli --cluster add-node NEW {alone[0]} --cluster-slave --cluster-master-id ID"
        findings.append(Finding("warn", "replicas", message, fix))
    else:
        findings.append(Finding("ok", "replicas", "each master has a replica"))
    reachable = [master for master in masters if not any(each.name == "cluster" for each in found[master.node])]
    values: dict[str, dict[str | None, list[str]]] = {}
    for name in ("cluster-node-timeout", "cluster-require-full-coverage"):
        for master in reachable:
            value = yield from config(name, master.probe)
            values.setdefault(name, {}).setdefault(value, []).append(str(master.node))
    for name, said in values.items():
        findings += _directive(name, said, bool(alone))
    return findings


def _directive(name: str, said: dict[str | None, list[str]], alone: bool) -> Iterator[Finding]:
    if len(said) > 1:
        parts = "; ".join(f"{value or 'unseen'} at {_listed(nodes)}" for value, nodes in said.items())
        yield Finding("warn", name, f"differs between the masters: {parts}", f"the same {name} on all of them")
        return
    (value,) = said
    if value is None:
        yield Finding("ok", name, f"cannot see {name} (CONFIG is forbidden)")
    elif name == "cluster-node-timeout":
        yield _timeout(int(value))
    elif value == "yes" and alone:
        message = "while one master is away, the others refuse, too"
        yield Finding("warn", name, message, f"replicas, or {name} no")
    else:
        yield Finding("ok", name, f"{name} {value}")


def _timeout(milliseconds: int) -> Finding:
    name, seconds = "cluster-node-timeout", milliseconds / 1_000
    if milliseconds > SLOWEST:
        message = f"a dead master is replaced after {seconds:g} s at the earliest, and its queues stand still meanwhile"
        return Finding("warn", name, message, f"{name} 5000")
    if milliseconds < FASTEST:
        message = f"a master that is busy for {seconds:g} s is taken for dead"
        return Finding("warn", name, message, f"{name} 5000")
    return Finding("ok", name, f"{name} {milliseconds}")


# -- telling --------------------------------------------------------------------------------------


def _merged(found: dict[Node, list[Finding]]) -> list[Finding]:
    """What is the same at all masters once; what is well everywhere, but in other words, by one of them; else who it is."""
    names = dict.fromkeys(finding.name for findings in found.values() for finding in findings)
    return [finding for name in names for finding in _of_name(name, found)]


def _of_name(name: str, found: dict[Node, list[Finding]]) -> Iterator[Finding]:
    sayers: dict[Finding, list[str]] = {}
    for node, findings in found.items():
        for finding in findings:
            if finding.name == name:
                sayers.setdefault(finding, []).append(str(node))
    if len(found) > 1 and len(sayers) > 1 and all(finding.level == "ok" for finding in sayers):
        first = next(iter(sayers))
        yield msgspec.structs.replace(
            first, message=f"{first.message} (at {sayers[first][0]}; the others are well, too)"
        )
        return
    for finding, nodes in sayers.items():
        everywhere = len(nodes) == len(found)
        yield (
            finding if everywhere else msgspec.structs.replace(finding, message=f"{_listed(nodes)}: {finding.message}")
        )


def _listed(nodes: Sequence[str]) -> str:
    """A few names, and how many more."""
    more = len(nodes) - 3
    return ", ".join(nodes[:3]) + (f" and {more} more" if more > 0 else "")
