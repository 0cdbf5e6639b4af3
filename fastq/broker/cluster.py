"""The movers for a cluster: the same calls, each sent to the node that owns its key's slot.

A node that is not the owner (any more, or not yet) says so instead of running the command: MOVED, ASK, TRYAGAIN. Those are
followed here, and the layout is asked for anew whenever something speaks against it: a redirection, a lost connection, an
answer that is late, CLUSTERDOWN. What else goes wrong is told to the caller as with one server: after a lost reply it
alone knows whether a command may be repeated. See docs/adr/0014-cluster.md.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar, cast

import hiredis

from fastq.broker.command import Command, Waiter, raw
from fastq.broker.connection import LATE, AsyncConnection, SyncConnection, is_noscript, pack
from fastq.broker.greeting import error_of, unreachable
from fastq.broker.topology import BLOCKING, LAYOUT, Node, Redirection, Topology, guarded, redirection
from fastq.broker.url import Endpoint
from fastq.errors import BrokerError, BrokerUnavailable, SchemaMismatch

__all__ = ["AsyncCluster", "SyncCluster"]

T = TypeVar("T")

ASKING: Command[Any] = raw("ASKING")
"""Precedes a command that was sent here by ASK."""

FOLLOWED = 8
"""Redirections of one command that are followed; with their pauses a quarter of a second."""

SCOUT = 1.0
"""Most seconds that one node is given to tell the layout."""


def _pause(turn: int) -> float:
    """Seconds before a command is repeated that TRYAGAIN has answered: a slot is on its way to another node."""
    return float(min(0.005 * 2**turn, 0.05))


class AsyncCluster(AsyncConnection):
    """An :class:`AsyncConnection` per node, behind the same calls. Commands for one slot leave in the order of the calls.

    Args:
        endpoint: of the cluster.
        kind: of the connections to the nodes.
        connect_timeout, response_timeout: of each of them.
        topology: what is known of the cluster; shared with others by :meth:`split`.
    """

    in_order = False  # a slot may have moved between two commands, and the first one of them be sent again

    def __init__(
        self,
        endpoint: Endpoint,
        kind: type[AsyncConnection] = AsyncConnection,
        *,
        connect_timeout: float = 5.0,
        response_timeout: float = 10.0,
        topology: Topology | None = None,
    ) -> None:
        super().__init__(endpoint, connect_timeout=connect_timeout, response_timeout=response_timeout)
        self._kind = kind
        self._topology = topology or Topology(endpoint)
        self._links: dict[Node, AsyncConnection] = {}
        self._blocked: set[Node] = set()  # to these a command was sent that may block
        self._counted: dict[Node, int] = {}
        self._learning: asyncio.Task[None] | None = None
        self._agreed = False
        self._under_way: set[asyncio.Task[Any]] = set()

    def split(self, most: int) -> list[AsyncConnection]:
        """One for each list: a blocking pop serves one slot only."""
        others = [
            AsyncCluster(
                self.endpoint,
                self._kind,
                connect_timeout=self._connect_timeout,
                response_timeout=self._response_timeout,
                topology=self._topology,
            )
            for _ in range(most - 1)
        ]
        return [self, *others]

    @property
    def connected(self) -> bool:
        """Whether the layout is known, and a node is connected; one that is not will be when it is needed."""
        return self._topology.settled and any(link.connected for link in self._links.values())

    @property
    def reconnects(self) -> int:
        """How often a connection was lost or made anew; a first one to a node brings no news."""
        return self.connects - len(self._counted)

    @property
    def silent(self) -> float:
        """Seconds for which the slowest node's answer has been due."""
        return max((link.silent for link in self._links.values()), default=0.0)

    async def connect(self) -> None:
        """Learn the layout, unless it is known, and connect to one node. Raises like :meth:`AsyncConnection.connect`."""
        await self._learn()
        if any(link.connected for link in self._links.values()):
            return
        failure: BrokerUnavailable | None = None
        for node in self._topology.masters:
            try:
                await self._reach(node)
            except BrokerUnavailable as error:
                failure = error
            else:
                return
        raise failure or unreachable(self.endpoint, "no node is known")

    # -- the layout -----------------------------------------------------------------------------

    async def _learn(self) -> None:
        """Ask for the layout if something speaks against what is known; concurrent callers share one attempt."""
        if self._topology.settled or not self._topology.rested:
            return
        if self._learning is None:
            self._loop = asyncio.get_running_loop()
            self._learning = self._loop.create_task(self._survey())
            self._learning.add_done_callback(self._learnt)
        attempt, caller = self._learning, asyncio.current_task()
        try:
            await asyncio.shield(attempt)
        except asyncio.CancelledError:
            if attempt.cancelled() and caller is not None and not caller.cancelling():
                raise unreachable(self.endpoint, "closed while connecting") from None
            raise

    def _learnt(self, task: asyncio.Task[None]) -> None:
        self._learning = None
        _read(task)

    async def _survey(self) -> None:
        failure: BrokerError | None = None
        for node in self._topology.asked():
            timeout = min(self._connect_timeout, SCOUT)
            scout = AsyncConnection(self._topology.at(node), connect_timeout=timeout, response_timeout=SCOUT)
            scout.clock = self.clock
            try:
                await scout.connect()
                self._topology.learn(await scout.send(LAYOUT), node)
                await self._agree()
            except (BrokerUnavailable, ConnectionResetError) as error:
                failure = error if isinstance(error, BrokerError) else unreachable(scout.endpoint, error)
            else:
                self._tidy()
                return
            finally:
                await scout.close()
        raise failure or unreachable(self.endpoint, "no node is known")

    async def _agree(self) -> None:
        """Once: ask the node that knows the version of the keys, which jobs of other slots would not lead to."""
        if self.endpoint.prefix and not self._agreed:
            try:
                await self._reach(self._topology.home(self.endpoint.prefix))
                self._agreed = True
            except BrokerUnavailable:
                pass  # it is asked with the next layout; nobody waits for it until then
            except SchemaMismatch:
                self._topology.forget()
                raise

    def _tidy(self) -> None:
        """Leave nodes that own no slot any more, but for those whose answer may still come."""
        for node in self._links.keys() - set(self._topology.masters):
            if self._links[node].silent == 0.0 or self._links[node].silent > LATE:
                self._links.pop(node).drop("its node serves no slot any more")

    # -- the nodes ------------------------------------------------------------------------------

    async def _reach(self, node: Node) -> AsyncConnection:
        """The connection to a node."""
        link = self._links.get(node)
        if link is None:
            link = self._links[node] = self._kind(
                self._topology.at(node), connect_timeout=self._connect_timeout, response_timeout=self._response_timeout
            )
            link.clock = self.clock
            link.on_lost = lambda: self._gone(node)
        if not link.connected:
            before = link.connects
            try:
                await link.connect()
            except BrokerUnavailable:
                self._topology.suspect(node)
                raise
            if link.connects != before and self._counted.get(node) != link.connects:
                self._counted[node] = link.connects
                self.connects += 1
            self._watch_over(asyncio.get_running_loop())
        return link

    def _gone(self, node: Node) -> None:
        self._topology.suspect(node)
        self.connects += 1  # what was learnt over it may be out of date

    def _watch_over(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        if self._watch is None:
            self._watch = loop.call_later(LATE / 2, self._check)

    def _check(self) -> None:
        """When a node keeps silent, others are asked whether it still owns anything."""
        self._watch = None
        loop = self._loop
        if loop is None or not any(link.connected for link in self._links.values()):
            return
        late = [node for node, link in self._links.items() if link.silent > LATE and node not in self._blocked]
        if late and self._learning is None:
            self._topology.suspect(*late)
            self._begin(self._learn())
        self._watch_over(loop)

    # -- commands -------------------------------------------------------------------------------

    def place(self, key: bytes) -> Any:
        """The node that owns a key, as far as is known; None: nobody is known to."""
        return self._topology.place(key)

    def send(
        self, command: Command[Any], *, by_text: bool = False, near: Command[Any] | None = None
    ) -> asyncio.Future[Any]:
        """Write a command now, or as soon as its node is known and connected. The future is of its bare reply.

        ``near``: a command without a key goes where this one goes.
        """
        link = self._ready(command, near)
        if link is not None:
            return link.send(guarded(command), by_text=by_text)
        return self._begin(self._send_later(command, by_text, near))

    def post(self, commands: Sequence[Command[Any]], waiters: Sequence[Waiter]) -> None:
        """As :meth:`AsyncConnection.post`, in one write where all go to one node, else each by itself. One that is not
        connected will be.
        """
        together = self._ready_for_all(commands)
        if together is not None:
            together.post([guarded(command) for command in commands], waiters)
            return
        for command, waiter in zip(commands, waiters, strict=True):
            link = self._ready(command)
            if link is not None:
                link.post([guarded(command)], [waiter])
            else:
                sent = self._begin(self._send_later(command, False, None))
                sent.add_done_callback(functools.partial(_hand_on, waiter))

    def send_all(
        self, commands: Sequence[Command[Any]], *, near: Command[Any] | None = None
    ) -> list[asyncio.Future[Any]]:
        """As :meth:`AsyncConnection.send_all`, in one write where all go to one node, else each by itself."""
        together = self._ready_for_all(commands, near)
        if together is not None:
            return together.send_all([guarded(command) for command in commands])
        return [self.send(command, near=near) for command in commands]

    def _ready_for_all(
        self, commands: Sequence[Command[Any]], near: Command[Any] | None = None
    ) -> AsyncConnection | None:
        """The connection over which all of them can leave now; None: there is no such one."""
        links = [self._ready(command, near) for command in commands]
        return links[0] if links and links.count(links[0]) == len(links) else None

    def _ready(self, command: Command[Any], near: Command[Any] | None = None) -> AsyncConnection | None:
        """The connection over which the command can leave now."""
        if not self._topology.settled:
            return None
        node = self._owner_of(command, near)
        link = None if node is None else self._links.get(node)
        if node is None or link is None or not link.connected:
            return None
        self._mark(node, command)
        return link

    def _begin(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._under_way.add(task)  # the event loop itself keeps no hold of it
        task.add_done_callback(self._under_way.discard)
        return _quiet(task)

    def _owner_of(self, command: Command[Any], near: Command[Any] | None = None) -> Node | None:
        try:
            return self._topology.owner(command, near)
        except BrokerUnavailable:
            return None  # the same will be said where a reply is waited for

    async def _send_later(self, command: Command[Any], by_text: bool, near: Command[Any] | None) -> Any:
        await self._learn()
        node = self._topology.owner(command, near)
        link = await self._reach(node)
        self._mark(node, command)
        return await link.send(guarded(command), by_text=by_text)

    def _mark(self, node: Node, command: Command[Any]) -> None:
        if command.script is None and command.args[0] in BLOCKING:
            self._blocked.add(node)

    async def _ask(self, node: Node, command: Command[Any], by_text: bool) -> Any:
        link = await self._reach(node)
        _quiet(link.send(ASKING))
        return await link.send(guarded(command), by_text=by_text)

    async def call(self, command: Command[T]) -> T:
        """Send a command and return its decoded reply, following redirections. Raises like :meth:`AsyncConnection.call`."""
        replies: list[T] = await self.call_many([command])
        return replies[0]

    async def call_many(self, commands: Sequence[Command[Any]]) -> list[Any]:
        """Send several commands, to each node its own back to back; their decoded replies in order."""
        if not self.connected:
            await self.connect()
        near = commands[0] if commands else None
        placed = [self._topology.spread(command) for command in commands]
        if any(node is not None for node, _ in placed):  # a SCAN
            sent = [self.send(cmd, near=near) if node is None else self._to(node, cmd) for node, cmd in placed]
        else:
            sent = self.send_all(commands, near=near)
        return [await self.finish(command, future) for (_, command), future in zip(placed, sent, strict=True)]

    def _to(self, node: Node, command: Command[Any]) -> asyncio.Future[Any]:
        async def reached() -> Any:
            return await (await self._reach(node)).send(command)

        return self._begin(reached())

    async def finish(self, command: Command[T], sent: asyncio.Future[Any]) -> T:
        """Await the reply, following redirections, and decode it. Raises like :meth:`AsyncConnection.call`."""
        by_text = False
        for turn in range(FOLLOWED):
            try:
                reply = await sent
            except ConnectionResetError as error:
                raise unreachable(self.endpoint, error) from None
            to = redirection(reply)
            if to is None and not is_noscript(reply):
                if isinstance(reply, hiredis.ReplyError):
                    raise self._reply_error(reply)
                return command.decode(reply)
            by_text = by_text or to is None
            sent = await self._follow(command, to, by_text, turn)
        raise error_of(hiredis.ReplyError(f"TRYAGAIN {FOLLOWED} times"), self.endpoint.shown)

    async def _follow(
        self, command: Command[Any], to: Redirection | None, by_text: bool, turn: int
    ) -> asyncio.Future[Any]:
        """Send a command again that was not run."""
        if to is not None and to.kind == "ASK":
            return self._begin(self._ask(self._topology.meant(to), command, by_text))
        if to is not None and to.kind == "MOVED":
            self._topology.move(to)
        elif to is not None:
            await asyncio.sleep(_pause(turn))
        return self.send(command, by_text=by_text)

    def _reply_error(self, reply: Exception) -> BrokerError:
        error = error_of(reply, self.endpoint.shown)
        if isinstance(error, BrokerUnavailable):
            self._topology.suspect()
        return error

    # -- the end --------------------------------------------------------------------------------

    def drop(self, why: str = "dropped", after: Command[Any] | None = None) -> None:
        """Close every connection at once; callers that wait get BrokerUnavailable. The next call connects anew."""
        only = None if after is None else self._owner_of(after)
        for node, link in self._links.items():
            if only in (None, node):
                link.drop(why)

    async def close(self) -> None:
        """Close; further calls would connect anew."""
        if self._learning is not None:
            self._learning.cancel()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        for link in self._links.values():
            await link.close()
        self._links.clear()


def _read(future: asyncio.Future[Any]) -> None:
    """A caller that went away must not leave a warning."""
    if not future.cancelled():
        future.exception()


def _hand_on(waiter: Waiter, sent: asyncio.Future[Any]) -> None:
    if waiter.done():
        return
    failure = ConnectionResetError("closed") if sent.cancelled() else sent.exception()
    if isinstance(failure, Exception):
        waiter.set_exception(failure)
        waiter.exception()
    else:
        waiter.set_result(sent.result())


def _quiet(future: asyncio.Future[Any]) -> asyncio.Future[Any]:
    future.add_done_callback(_read)
    return future


class SyncCluster(SyncConnection):
    """A :class:`SyncConnection` per node, behind the same calls; safe to share between threads and across a fork."""

    def __init__(self, endpoint: Endpoint, *, connect_timeout: float = 5.0, response_timeout: float = 10.0) -> None:
        super().__init__(endpoint, connect_timeout=connect_timeout, response_timeout=response_timeout)
        self._topology = Topology(endpoint)
        self._links: dict[Node, SyncConnection] = {}
        self._agreed = False

    def connect(self) -> None:
        """Learn the layout and Redis's clock, unless they are known. Raises like :meth:`AsyncConnection.connect`."""
        if self._topology.settled or not self._topology.rested:
            return
        failure: BrokerError | None = None
        for node in self._topology.asked():
            timeout = min(self._connect_timeout, SCOUT)
            scout = SyncConnection(self._topology.at(node), connect_timeout=timeout, response_timeout=SCOUT)
            scout.clock = self.clock
            try:
                self._topology.learn(scout.ask([LAYOUT])[0], node)
                self._agree()
            except BrokerUnavailable as error:
                failure = error
            else:
                return
            finally:
                scout.close()
        raise failure or unreachable(self.endpoint, "no node is known")

    def _agree(self) -> None:
        """As of :class:`AsyncCluster`."""
        if self.endpoint.prefix and not self._agreed:
            try:
                self._reach(self._topology.home(self.endpoint.prefix)).connect()
                self._agreed = True
            except BrokerUnavailable:
                pass
            except SchemaMismatch:
                self._topology.forget()
                raise

    @property
    def reconnects(self) -> int:
        """As of :class:`AsyncCluster`."""
        return sum(link.reconnects for link in list(self._links.values()))

    def _reach(self, node: Node) -> SyncConnection:
        link = self._links.get(node)
        if link is None:
            link = SyncConnection(
                self._topology.at(node), connect_timeout=self._connect_timeout, response_timeout=self._response_timeout
            )
            link.clock = self.clock
            link = self._links.setdefault(node, link)  # another thread may have been first
        return link

    def _ask_all(self, commands: Sequence[Command[Any]]) -> list[Any]:
        """The bare replies, redirections followed. A node that is away does not keep the others' commands back.

        Raises:
            BrokerUnavailable: some of them may have run.
        """
        round_ = _Round(commands)
        for turn in range(FOLLOWED):
            self.connect()
            failure: BrokerUnavailable | None = None
            for (node, asking), indexes in round_.groups(self._topology).items():
                try:
                    answered = self._reach(node).ask(
                        [guarded(commands[i]) for i in indexes], before=pack(ASKING) if asking else b""
                    )
                except BrokerUnavailable as error:
                    self._topology.suspect(node)
                    failure = failure or error
                else:
                    round_.take(indexes, answered, self._topology)
            self.connects = sum(link.connects for link in self._links.values())
            if failure is not None:
                raise failure
            if not round_.left:
                break
            if round_.waits:
                time.sleep(_pause(turn))
        return round_.replies

    def call(self, command: Command[T]) -> T:
        """As of :class:`SyncConnection`, redirections followed."""
        return cast(T, self.call_many([command])[0])

    def call_many(self, commands: Sequence[Command[Any]]) -> list[Any]:
        """Send several commands, to each node its own in one write; their decoded replies in order."""
        self.connect()
        placed = [self._topology.spread(command) for command in commands]
        replies: list[Any] = []
        if any(node is not None for node, _ in placed):  # a SCAN, of which there is one at a time
            for node, command in placed:
                replies += self._ask_all([command]) if node is None else self._reach(node).ask([command])
        else:
            replies = self._ask_all(commands)
        if any(isinstance(reply, hiredis.ReplyError) for reply in replies):
            self._topology.suspect()
        return self._decoded([command for _, command in placed], replies)

    def close(self) -> None:
        """Close; the next call would connect anew."""
        for link in self._links.values():
            link.close()


class _Round:
    """Commands on their way to several nodes: which ones have no answer yet, and where each goes next."""

    def __init__(self, commands: Sequence[Command[Any]]) -> None:
        self.replies: list[Any] = [None] * len(commands)
        self.left = list(range(len(commands)))
        self.waits = False  # one was answered TRYAGAIN
        self._commands = commands
        self._asks: dict[int, Node] = {}

    def groups(self, topology: Topology) -> dict[tuple[Node, bool], list[int]]:
        """Where what is left goes; True: by ASK."""
        groups: dict[tuple[Node, bool], list[int]] = {}
        for i in self.left:
            asked = self._asks.pop(i, None)
            node = asked or topology.owner(self._commands[i], self._commands[0])
            groups.setdefault((node, asked is not None), []).append(i)
        self.left, self.waits = [], False
        return groups

    def take(self, indexes: Sequence[int], replies: Sequence[Any], topology: Topology) -> None:
        """Keep the answers; what was redirected is left."""
        for i, reply in zip(indexes, replies, strict=True):
            self.replies[i] = reply
            to = redirection(reply)
            if to is None:
                continue
            self.left.append(i)
            self.waits = self.waits or to.kind == "TRYAGAIN"
            if to.kind == "ASK":
                self._asks[i] = topology.meant(to)
            elif to.kind == "MOVED":
                topology.move(to)
