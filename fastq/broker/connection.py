"""The two movers: the same commands over asyncio and over a blocking socket.

Both pack with hiredis's C packer and read with its C reader; both send a script by its SHA-1 and, when Redis does
not know it (NOSCRIPT), once by its text. Neither ever repeats a command by itself after a lost reply: whether that
is safe is known only to the caller (see :mod:`fastq.broker.enqueuer` and :mod:`fastq.worker.loop`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import hiredis

from fastq.broker import scripts
from fastq.broker.command import Command, Operation, Packed, Waiter
from fastq.broker.greeting import (
    MOVED_ON,
    Clock,
    check_handshake,
    client_name,
    error_of,
    find_master,
    last_words,
    locate,
    unreachable,
)
from fastq.broker.url import Endpoint
from fastq.broker.wire import NOTHING, Wire
from fastq.errors import BrokerError, BrokerUnavailable

if TYPE_CHECKING:
    import asyncio

__all__ = ["AsyncConnection", "SyncConnection"]

T = TypeVar("T")

LATE = 1.0
"""Seconds without an answer after which it is asked whether another server leads now, where there is somebody to ask."""

_packed: Callable[[tuple[Any, ...]], bytes] = cast(Any, hiredis.pack_command)  # its stub knows tuples of one element

# -- what both movers share -----------------------------------------------------------------


def pack(command: Command[Any], *, by_text: bool = False) -> bytes:
    """The bytes of a command."""
    words: tuple[Any, ...]
    if type(command) is Packed and not by_text:
        return command.packed
    if command.script is None:
        words = tuple(command.args)
        return _packed(words)
    script = scripts.load(command.script)
    head = (b"EVAL", script.text) if by_text else (b"EVALSHA", script.sha)
    words = (*head, len(command.keys), *command.keys, *command.args)
    return _packed(words)


def is_noscript(reply: Any) -> bool:
    """Whether Redis said that it does not know this script."""
    return isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT")


def is_moved_on(reply: Any) -> bool:
    """Whether Redis said that another server leads now."""
    return isinstance(reply, hiredis.ReplyError) and str(reply).startswith(MOVED_ON)


# -- asyncio ----------------------------------------------------------------------------------


class AsyncConnection:
    """One auto-pipelining connection to Redis on the running event loop.

    Any number of tasks may call at once; their commands leave in the order of the calls. A cancelled caller's reply
    is still read and dropped, so no reply ever reaches another caller. The next call after a loss connects anew.

    Args:
        endpoint: where to connect.
        connect_timeout: seconds for a connect, handshake included.
        response_timeout: seconds without any reply, while one is due, after which the connection counts as dead.
    """

    in_order = True
    """Whether what one connect has sent never arrives out of order."""

    def __init__(self, endpoint: Endpoint, *, connect_timeout: float = 5.0, response_timeout: float = 10.0) -> None:
        self.endpoint = endpoint
        self.clock = Clock()
        self.connects = 0
        self._connect_timeout = connect_timeout
        self._response_timeout = response_timeout
        self._wire: Wire | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._found = endpoint  # which server was chosen, where there is a choice
        self._searching: asyncio.Future[Endpoint] | None = None
        self.on_lost: Callable[[], None] | None = None

    @classmethod
    def to(cls, endpoint: Endpoint, *, connect_timeout: float = 5.0, response_timeout: float = 10.0) -> AsyncConnection:
        """A connection of this kind; where the endpoint is a cluster, one that has such a connection to each of its nodes."""
        if not endpoint.nodes:
            return cls(endpoint, connect_timeout=connect_timeout, response_timeout=response_timeout)
        from fastq.broker.cluster import AsyncCluster

        return AsyncCluster(endpoint, cls, connect_timeout=connect_timeout, response_timeout=response_timeout)

    def split(self, most: int) -> list[AsyncConnection]:
        """Connections for blocking pops on lists of up to ``most`` queues, one of which may block for all lists: this one."""
        return [self] if most else []

    @property
    def connected(self) -> bool:
        """Whether a command would leave at once."""
        return self._wire is not None

    @property
    def reconnects(self) -> int:
        """How often it has connected anew: what was learnt from Redis before may be out of date."""
        return max(self.connects - 1, 0)

    @property
    def silent(self) -> float:
        """Seconds for which an answer has been due."""
        wire = self._wire
        return time.monotonic() - wire.progress if wire is not None and wire.pending else 0.0

    async def connect(self) -> None:
        """Connect unless connected; concurrent callers share one attempt.

        Raises:
            BrokerUnavailable: Redis cannot be reached.
            BrokerReplyError: it refuses the credentials.
        """
        import asyncio

        if self._wire is not None:
            return
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._open())
            self._connecting.add_done_callback(self._opened)
        attempt, caller = self._connecting, asyncio.current_task()
        try:
            await asyncio.shield(attempt)
        except asyncio.CancelledError:
            if attempt.cancelled() and caller is not None and not caller.cancelling():
                raise unreachable(self.endpoint, "closed while connecting") from None  # nobody cancelled the caller
            raise

    def _make_wire(self) -> Wire:
        return Wire(self._lost)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._connecting = None
        if not task.cancelled():
            task.exception()  # read here, so that an abandoned attempt leaves no warning

    async def _open(self) -> None:
        import asyncio

        self._loop = loop = asyncio.get_running_loop()
        wire = self._make_wire()
        try:
            async with asyncio.timeout(self._connect_timeout):
                await self._dial(loop, wire)
                await self._shake_hands(wire, loop)
        except TimeoutError:
            wire.abort("connect timed out")
            raise unreachable(self.endpoint, f"no answer within {self._connect_timeout} s") from None
        except OSError as error:
            wire.abort(str(error))
            raise error if isinstance(error, BrokerUnavailable) else unreachable(self.endpoint, error) from None
        except BaseException:
            wire.abort("handshake failed")
            raise
        self._wire = wire
        self.connects += 1
        self._look_later(loop, self._response_timeout)

    def _look_later(self, loop: asyncio.AbstractEventLoop, left: float) -> None:
        """``left``: seconds until the reply that is due, if one is, is too late."""
        delay = min(self._response_timeout / 4, left)
        self._watch = loop.call_later(min(delay, LATE / 2) if self.endpoint.sentinels else delay, self._check)

    async def _shake_hands(self, wire: Wire, loop: asyncio.AbstractEventLoop) -> None:
        import asyncio

        if wire.lost or wire.transport is None:
            raise ConnectionResetError(wire.failure)
        packed = [_packed(words) for words in self.endpoint.handshake(client_name())]
        sent: list[asyncio.Future[Any]] = [loop.create_future() for _ in packed]
        wire.pending.extend(sent)
        wire.transport.write(
            b"".join(packed)
        )  # in one: after two, a server that hangs up at once resets the connection
        try:
            replies = await asyncio.gather(*sent)
        except ConnectionResetError as error:
            said = last_words([future.result() for future in sent if future.done() and not future.exception()])
            raise ConnectionResetError(said or str(error)) from None
        check_handshake(self.endpoint, replies, self.clock)
        if wire.lost:  # since its last reply; nobody would tell us again
            raise ConnectionResetError(wire.failure)

    async def _dial(self, loop: asyncio.AbstractEventLoop, wire: Wire) -> None:
        endpoint = self.endpoint
        factory: Any = lambda: wire  # noqa: E731 - Any: a protocol by shape, asyncio is not imported in this module
        if endpoint.path:
            await loop.create_unix_connection(factory, endpoint.path)
            return
        if endpoint.sentinels or endpoint.nodes:
            endpoint = self._found = await loop.run_in_executor(None, locate, endpoint)
        context = endpoint.ssl_context()
        name = endpoint.host if context else None
        await loop.create_connection(factory, endpoint.host, endpoint.port, ssl=context, server_hostname=name)
        sock = wire.transport.get_extra_info("socket") if wire.transport else None
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def _lost(self, wire: Wire) -> None:
        if self._wire is wire:
            self._wire = None
            if self._watch is not None:
                self._watch.cancel()
            if self.on_lost is not None:
                self.on_lost()

    def _check(self) -> None:
        wire, loop = self._wire, self._loop
        if wire is None or loop is None:
            return
        left = self._response_timeout
        if wire.pending and (left := wire.progress + left - time.monotonic()) <= 0:
            self.drop(f"no reply within {self._response_timeout} s")
            return
        if self.endpoint.sentinels and self._searching is None and self.silent > LATE:
            self._searching = loop.run_in_executor(None, find_master, self.endpoint)
            self._searching.add_done_callback(self._searched)
        self._look_later(loop, left)

    def _searched(self, search: asyncio.Future[Endpoint]) -> None:
        """The Sentinels have answered whether the server that keeps silent is still the master."""
        self._searching = None
        if not search.cancelled() and search.exception() is None and search.result() != self._found:
            self.drop("another server leads now")

    def _send(self, wire: Wire, data: bytes) -> asyncio.Future[Any]:
        assert self._loop is not None
        future: asyncio.Future[Any] = self._loop.create_future()
        wire.send(data, future)
        return future

    def post(self, commands: Sequence[Command[Any]], waiters: Sequence[Waiter]) -> None:
        """Write commands, in one go: a write of its own for each is a system call here, and may wake Redis once more.

        Each waiter is given the bare reply of its command (an error reply is a value), or the loss of the connection.

        Raises:
            BrokerUnavailable: there is no connection; nothing was sent.
        """
        if self._wire is None:
            raise unreachable(self.endpoint, "not connected")
        self._wire.send(b"".join(map(pack, commands)), *waiters)

    def send_all(self, commands: Sequence[Command[Any]], *, near: Any = None) -> list[asyncio.Future[Any]]:  # noqa: ARG002 - near: a cluster's
        """As :meth:`send`, of several commands in one write."""
        loop = self._loop
        if self._wire is None or loop is None:
            raise unreachable(self.endpoint, "not connected")
        sent: list[asyncio.Future[Any]] = [loop.create_future() for _ in commands]
        self._wire.send(b"".join(map(pack, commands)), *sent)
        return sent

    def place(self, key: bytes) -> Any:  # noqa: ARG002 - a cluster's
        """What tells apart the servers that keys are on: commands of one place fail together. None where there is one server."""
        return None

    def send(self, command: Command[Any], *, by_text: bool = False, near: Any = None) -> asyncio.Future[Any]:  # noqa: ARG002 - near: a cluster's
        """Write a command now and return the future of its bare reply (an error reply is a value).

        ``near``: in a cluster, a command without a key goes where this one goes.

        Raises:
            BrokerUnavailable: there is no connection; nothing was sent.
        """
        if self._wire is None:
            raise unreachable(self.endpoint, "not connected")
        return self._send(self._wire, pack(command, by_text=by_text))

    async def call(self, command: Command[T]) -> T:
        """Send a command, connecting first if need be, and return its decoded reply.

        Raises:
            BrokerUnavailable: no connection, or it broke: the command may or may not have run.
            BrokerReplyError: Redis answered with an error.
        """
        if self._wire is None:
            await self.connect()
        return await self.finish(command, self.send(command))

    async def finish(self, command: Command[T], sent: asyncio.Future[Any]) -> T:
        """Await the reply of a command that :meth:`send` has written, and decode it. Raises like :meth:`call`."""
        try:
            reply = await sent
            if isinstance(reply, hiredis.ReplyError):
                reply = await self._second_answer(command, reply)
        except ConnectionResetError as error:
            raise unreachable(self.endpoint, error) from None
        return command.decode(reply)

    async def _second_answer(self, command: Command[Any], error: Exception) -> Any:
        """After an error reply: that to the script's text, if it was not known by its name."""
        reply = await self.send(command, by_text=True) if is_noscript(error) else error
        if isinstance(reply, hiredis.ReplyError):
            raise self._reply_error(reply)
        return reply

    async def call_many(self, commands: Sequence[Command[Any]]) -> list[Any]:
        """Send several commands back to back; their decoded replies in order. The first error reply is raised."""
        if self._wire is None:
            await self.connect()
        sent, decoded = self.send_all(commands), []
        try:  # as finish, without a coroutine for each: an idle worker's next jobs come this way
            for command, future in zip(commands, sent, strict=True):
                reply = await future
                if isinstance(reply, hiredis.ReplyError):
                    reply = await self._second_answer(command, reply)
                decoded.append(command.decode(reply))
        except ConnectionResetError as error:
            raise unreachable(self.endpoint, error) from None
        return decoded

    async def run(self, operation: Operation[T]) -> T:
        """Drive an operation to its result. What it does not catch of the errors of :meth:`call` is raised here."""
        try:
            step = next(operation)
            while True:
                try:
                    reply = await (self.call_many(step) if isinstance(step, list) else self.call(step))
                except BrokerError as error:
                    step = operation.throw(error)
                else:
                    step = operation.send(reply)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]  # typeshed types it as Any

    def _reply_error(self, reply: Exception) -> BrokerError:
        if is_moved_on(reply):
            self.drop(str(reply))  # a demoted master: look again who leads
        return error_of(reply, self.endpoint.shown)

    def drop(self, why: str = "dropped", after: Command[Any] | None = None) -> None:  # noqa: ARG002 - of a cluster
        """Close at once; callers that wait get BrokerUnavailable. The next call connects anew.

        ``after``: only the connection over which this command went, where there are several.
        """
        if self._wire is not None:
            self._wire.abort(why)
            self._lost(self._wire)

    async def close(self) -> None:
        """Close; further calls would connect anew."""
        if self._connecting is not None:
            self._connecting.cancel()
        self.drop("closed")


# -- blocking ---------------------------------------------------------------------------------


class SyncConnection:
    """The blocking twin, safe to share between threads and across a fork (a child connects anew)."""

    def __init__(self, endpoint: Endpoint, *, connect_timeout: float = 5.0, response_timeout: float = 10.0) -> None:
        self.endpoint = endpoint
        self.clock = Clock()
        self.connects = 0
        self._connect_timeout = connect_timeout
        self._response_timeout = response_timeout
        self._socket: socket.socket | None = None
        self._greeted = False  # the handshake over this socket is done; before, a socket may be there
        self._reader: Any = None
        self._lock = threading.Lock()
        _blocking.add(self)

    @classmethod
    def to(cls, endpoint: Endpoint, *, connect_timeout: float = 5.0, response_timeout: float = 10.0) -> SyncConnection:
        """A connection; to every node where the endpoint is a cluster."""
        if not endpoint.nodes:
            return cls(endpoint, connect_timeout=connect_timeout, response_timeout=response_timeout)
        from fastq.broker.cluster import SyncCluster

        return SyncCluster(endpoint, connect_timeout=connect_timeout, response_timeout=response_timeout)

    def connect(self) -> None:
        """Connect unless connected. Raises like :meth:`AsyncConnection.connect`."""
        if not self._greeted:  # else no lock: who enqueues one job after another asks each time
            with self._lock:
                self._ensure()

    @property
    def reconnects(self) -> int:
        """As of :class:`AsyncConnection`."""
        return max(self.connects - 1, 0)

    def call(self, command: Command[T]) -> T:
        """Send one command and return its decoded reply. Raises like :meth:`AsyncConnection.call`."""
        reply = self.ask((command,))[0]
        if isinstance(reply, hiredis.ReplyError):
            raise error_of(reply, self.endpoint.shown)
        return command.decode(reply)

    def call_many(self, commands: Sequence[Command[Any]]) -> list[Any]:
        """Send several commands in one write; their decoded replies in order. The first error reply is raised."""
        return self._decoded(commands, self.ask(commands))

    def ask(self, commands: Sequence[Command[Any]], *, before: bytes = b"") -> list[Any]:
        """The bare replies; an error reply is a value. ``before``: the bytes of a command that precedes each of them.

        Raises:
            BrokerUnavailable, BrokerReplyError: as :meth:`connect`, or the connection broke: some of them may have run.
        """
        each = 2 if before else 1
        with self._lock:
            self._ensure()
            begun = time.monotonic() if self.endpoint.sentinels else 0.0
            data = pack(commands[0]) if len(commands) == each == 1 else b"".join([before + pack(c) for c in commands])
            replies = self._exchange(data, len(commands), each)
            moved_on = False
            for i, reply in enumerate(replies):
                if isinstance(reply, hiredis.ReplyError):
                    if is_noscript(reply):
                        (replies[i],) = self._exchange(before + pack(commands[i], by_text=True), 1, each)
                    moved_on = moved_on or is_moved_on(replies[i])
            if moved_on or (begun and time.monotonic() - begun > LATE):
                self._drop()  # perhaps a demoted master: look again who leads. Under the lock: another thread may be next
        return replies

    def _decoded(self, commands: Sequence[Command[Any]], replies: Sequence[Any]) -> list[Any]:
        for reply in replies:
            if isinstance(reply, hiredis.ReplyError):
                raise error_of(reply, self.endpoint.shown)
        return [command.decode(reply) for command, reply in zip(commands, replies, strict=True)]

    def run(self, operation: Operation[T]) -> T:
        """Drive an operation to its result. What it does not catch of the errors of :meth:`call` is raised here."""
        try:
            step = next(operation)
            while True:
                try:
                    reply = self.call_many(step) if isinstance(step, list) else self.call(step)
                except BrokerError as error:
                    step = operation.throw(error)
                else:
                    step = operation.send(reply)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]  # typeshed types it as Any

    def close(self) -> None:
        """Close; the next call would connect anew. One under way in another thread ends with BrokerUnavailable."""
        if (sock := self._socket) is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # closing alone would not wake that thread
        self._drop()

    def _drop(self) -> None:
        sock, self._socket, self._greeted = self._socket, None, False
        if sock is not None:
            sock.close()

    def forked(self) -> None:
        """In a child: the socket is the parent's, whose connection stays open, and so may be a held lock."""
        self._lock = threading.Lock()
        self._drop()

    def _ensure(self) -> None:
        if self._greeted:
            return
        self._drop()  # of a handshake that was interrupted
        try:
            self._socket = sock = self._dial()
        except OSError as error:
            raise error if isinstance(error, BrokerUnavailable) else unreachable(self.endpoint, error) from None
        self._reader = hiredis.Reader(notEnoughData=NOTHING)
        words = self.endpoint.handshake(client_name())
        try:
            replies = self._exchange(b"".join(map(_packed, words)), len(words), 1)
            check_handshake(self.endpoint, replies, self.clock)
            sock.settimeout(self._response_timeout)  # until here it was the connect timeout
        except BaseException as error:
            self._drop()
            if isinstance(error, OSError) and not isinstance(
                error, BrokerUnavailable
            ):  # settimeout, of a closed socket
                raise unreachable(self.endpoint, "closed meanwhile") from None
            raise
        self.connects += 1
        self._greeted = self._socket is sock  # not if it was closed meanwhile

    def _dial(self) -> socket.socket:
        if self.endpoint.path:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(self._connect_timeout)
            try:
                sock.connect(self.endpoint.path)
            except BaseException:
                sock.close()
                raise
            return sock
        endpoint = locate(self.endpoint)
        context = endpoint.ssl_context()  # may raise: before there is a socket to close
        sock = socket.create_connection((endpoint.host, endpoint.port), self._connect_timeout)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return context.wrap_socket(sock, server_hostname=endpoint.host) if context else sock

    def _exchange(self, data: bytes, count: int, each: int) -> list[Any]:
        """Send ``count`` commands and return their replies; of ``each`` replies to one of them the last one counts."""
        sock, gets, replies = self._socket, self._reader.gets, list[Any]()
        if sock is None:
            raise unreachable(self.endpoint, "closed meanwhile")
        try:
            sock.sendall(data)
            while len(replies) < count * each:
                reply = gets()
                if reply is not NOTHING:
                    replies.append(reply)
                    continue
                received = sock.recv(65_536)
                if not received:
                    raise ConnectionResetError("the connection was closed")
                self._reader.feed(received)
            if self._reader.has_data():
                raise ConnectionResetError("a reply to nothing")
        except BaseException as error:
            timeout = sock.gettimeout()
            self._drop()  # also on KeyboardInterrupt: a half-read reply must not reach the next caller
            if isinstance(error, TimeoutError):
                raise unreachable(self.endpoint, f"no reply within {timeout} s") from None
            if isinstance(error, OSError | hiredis.ProtocolError):
                raise unreachable(self.endpoint, last_words(replies) or error) from None
            raise
        return replies if each == 1 else replies[each - 1 :: each]


_blocking: weakref.WeakSet[SyncConnection] = weakref.WeakSet()
"""Those of this process, for its children: asking for the pid instead would be a system call for each job."""


def _forked() -> None:
    for connection in list(_blocking):
        connection.forked()


os.register_at_fork(after_in_child=_forked)
