"""Which node of a cluster owns which key, and what a node says when it is another one. Pure: nothing here moves a byte."""

from __future__ import annotations

import binascii
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import hiredis

from fastq.broker.command import Command, raw
from fastq.broker.keys import GlobalKeys
from fastq.broker.url import Endpoint
from fastq.errors import BrokerReplyError, BrokerUnavailable

__all__ = ["BLOCKING", "LAYOUT", "Node", "Redirection", "Topology", "guarded", "key_of", "redirection", "slot_of"]

SLOTS = 16_384
"""Of every cluster."""

REST = 0.1
"""Seconds for which a layout that was just learnt is believed, whatever goes wrong: so often, at most, is it asked for."""

LAYOUT: Command[Any] = raw("CLUSTER", "SLOTS")

BLOCKING = frozenset({"BLPOP", "XREAD"})
"""Commands whose answer a healthy node may keep back."""

GUARDED = frozenset(
    {
        "batch_call",
        "batch_close",
        "flow_cancel",
        "flow_retry",
        "flow_spawn",
        "flow_start",
        "flow_unfold",
        "follow",
        "trace",
    }
)
"""Scripts that name few keys and reach others of their queue; see :func:`guarded`."""

_CUT_SHORT = "access a non local key"
_ANYWHERE = frozenset(
    {"PING", "TIME", "INFO", "CONFIG", "HELLO", "CLIENT", "CLUSTER", "SUBSCRIBE", "PUBLISH", "SCAN", "WAIT"}
)


class Node(NamedTuple):
    """Where a node listens."""

    host: str
    port: int

    def __str__(self) -> str:
        """As in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def slot_of(key: bytes | str) -> int:
    """The slot of a key: of what stands between its first braces, if anything does.

    What ``redis.crc.key_slot`` computes, without the 180 ms that ``import redis`` costs each process.

    >>> slot_of("fastq:{default}:jobs") == slot_of("default")
    True
    """
    name = key.encode() if isinstance(key, str) else key
    start = name.find(b"{")
    if start >= 0:
        end = name.find(b"}", start + 1)
        if end > start + 1:
            name = name[start + 1 : end]
    return binascii.crc_hqx(name, 0) % SLOTS


def key_of(command: Command[Any]) -> bytes | str | None:
    """A key of the command, all of which are in one slot; None: any node can answer it."""
    if command.script is not None:
        return command.keys[0]
    words = command.args
    name = words[0]
    if name in _ANYWHERE:
        return None
    if name == "XREAD":
        return words[list(words).index("STREAMS") + 1]  # type: ignore[no-any-return]  # words of any type
    return words[3 if name == "EVAL" else 1]  # type: ignore[no-any-return]  # words of any type


def guarded(command: Command[Any]) -> Command[Any]:
    """The command with one key more, which never exists.

    While a slot moves key by key, a node runs a script if all the keys that it names are still there, and ends it in the middle
    when it reaches one that is not. With a key that is never there it does not begin: TRYAGAIN. Scripts that name all ready lists
    of a queue, or a dozen keys of which most do not exist most of the time, need none.
    """
    if command.script not in GUARDED:
        return command
    base = command.keys[0].partition(b"}:")[0]
    return Command(command.script, (*command.keys, base + b"}:nothing"), command.args, command.decode)


class Redirection(NamedTuple):
    """What a node says instead of an answer: it has not run the command. ``node`` of MOVED and ASK: who would.

    A script that reached a key which had moved was cut short; every script may be sent twice, and this one is.
    """

    kind: str  # MOVED | ASK | TRYAGAIN
    slot: int = -1
    node: Node = Node("", 0)


def redirection(reply: Any) -> Redirection | None:
    """The redirection that a bare reply is, if it is one."""
    if not isinstance(reply, hiredis.ReplyError):
        return None
    words = str(reply).split()
    if words[0] == "TRYAGAIN" or _CUT_SHORT in str(reply):
        return Redirection("TRYAGAIN")
    if words[0] not in ("MOVED", "ASK") or len(words) < 3:
        return None
    host, _, port = words[2].rpartition(":")
    return Redirection(words[0], int(words[1]), Node(host.strip("[]"), int(port)))


class Topology:
    """The layout of a cluster as this process knows it.

    Args:
        endpoint: its URL; the nodes that it names are asked until one answers, and again when no known one does.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._seeds = [Node(host, port) for host, port in endpoint.nodes]
        self._owners: list[Node | None] = []
        self._first = Node("", 0)  # the master that is asked what any could be
        self._suspects: dict[Node, None] = {}
        self._learnt_at = 0.0
        self._stale = True
        self.masters: tuple[Node, ...] = ()

    @property
    def settled(self) -> bool:
        """Whether nothing speaks against what is known."""
        return not self._stale

    @property
    def rested(self) -> bool:
        """Whether it is time to ask again, should something speak against it."""
        return not self._owners or time.monotonic() - self._learnt_at > REST

    def at(self, node: Node) -> Endpoint:
        """The endpoint of one node."""
        shown = f"{node} of {self._endpoint.shown}"
        return self._endpoint._replace(shown=shown, host=node.host, port=node.port, nodes=())

    def home(self, prefix: str) -> Node:
        """Who knows the version of the keys (schema.py). Raises as :meth:`owner`."""
        return self.owner(raw("GET", GlobalKeys(prefix).schema))

    def forget(self) -> None:
        """Know nothing again, so that nobody sends anything before the next :meth:`learn`."""
        self._owners, self.masters, self._stale = [], (), True

    def owner(self, command: Command[Any], near: Command[Any] | None = None) -> Node:
        """Who answers a command; one without a key goes where ``near`` goes.

        Raises:
            BrokerUnavailable: nobody serves its slot.
        """
        key = key_of(command)
        if key is None and near is not None:
            key = key_of(near)
        if key is None:
            return self._first
        slot = slot_of(key)
        node = self._owners[slot] if self._owners else None
        if node is None:
            self._stale = True
            raise BrokerUnavailable(f"no node of {self._endpoint.shown} serves slot {slot}")
        return node

    def place(self, key: bytes) -> Node | None:
        """Who owns a key, if anybody is known to."""
        return self._owners[slot_of(key)] if self._owners else None

    def asked(self) -> Iterator[Node]:
        """Whom to ask for the layout, one after the other: those first that nothing speaks against."""
        known = list(self.masters)
        random.shuffle(known)
        order = [*(node for node in known if node not in self._suspects), *self._seeds, *known]
        yield from dict.fromkeys([*(node for node in order if node not in self._suspects), *order])

    def learn(self, reply: Any, asked: Node) -> None:
        """Take a reply to :data:`LAYOUT`.

        Raises:
            BrokerUnavailable: this node belongs to no cluster yet.
            BrokerReplyError: it is no node of a cluster.
        """
        if isinstance(reply, hiredis.ReplyError):
            if str(reply).startswith("NOPERM"):
                raise BrokerReplyError(f"{asked} does not tell its layout ({reply}): allow +cluster|slots")
            raise BrokerReplyError(f"{asked} is no node of a cluster ({reply}): use redis://{asked}/0")
        owners: list[Node | None] = [None] * SLOTS
        for first, last, (host, port, *_), *_ in reply:
            # No host: "the one that you have asked" (cluster-preferred-endpoint-type unknown-endpoint).
            node = Node(host.decode() if host else asked.host, port)
            owners[first : last + 1] = [node] * (last + 1 - first)
        masters = tuple(sorted({node for node in owners if node is not None}))
        if not masters:
            raise BrokerUnavailable(f"{asked} knows of no node that serves any slot")
        self._owners, self.masters = owners, masters
        self._first = asked if asked in masters else masters[0]  # that one is up: it has just answered
        self._suspects.clear()
        self._stale = False
        self._learnt_at = time.monotonic()

    def move(self, to: Redirection) -> None:
        """A node has said who owns a slot now. More than this slot may have moved."""
        self._stale = True
        if self._owners:
            self._owners[to.slot] = self.meant(to)

    def meant(self, to: Redirection) -> Node:
        """The node of a redirection; one without a host means the host of the node that said so."""
        owner = self._owners[to.slot] if self._owners else None
        return to.node if to.node.host or owner is None else to.node._replace(host=owner.host)

    def suspect(self, *nodes: Node) -> None:
        """Something is wrong, with these nodes if any are named: ask others what has become of them."""
        self._stale = True
        self._suspects.update(dict.fromkeys(nodes))
        if self._first in self._suspects:
            self._first = next((node for node in self.masters if node not in self._suspects), self._first)

    # -- SCAN walks one node's keys; over a cluster its cursor says which node it has come to ---------------------------

    def spread(self, command: Command[Any]) -> tuple[Node | None, Command[Any]]:
        """The node of a SCAN, and the SCAN of that node whose replies go on over all of them."""
        if command.script is not None or command.args[0] != "SCAN":
            return None, command
        count = len(self.masters)
        cursor, index = divmod(int(command.args[1]), count)

        def decode(reply: Sequence[Any]) -> Any:
            left = int(reply[0])
            place = left * count + index if left else (index + 1) % count
            return command.decode([b"%d" % place, reply[1]])

        return self.masters[index], raw("SCAN", cursor, *command.args[2:], decode=decode)
