"""An open connection of asyncio: bytes out, replies to whoever waits for them, in the order of the commands."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import hiredis

from fastq.broker.command import Waiter
from fastq.broker.greeting import last_words

if TYPE_CHECKING:
    import asyncio

__all__ = ["NOTHING", "Wire"]

NOTHING = object()
"""What hiredis's reader is to answer when a reply is not there yet."""


class Wire:
    """An asyncio protocol: replies are matched to their waiters in the order of the commands."""

    __slots__ = ("_reader", "failure", "lost", "on_lost", "pending", "progress", "transport")

    def __init__(self, on_lost: Callable[[Wire], None]) -> None:
        self._reader: Any = hiredis.Reader(notEnoughData=NOTHING)
        self.pending: deque[Waiter] = deque()
        self.transport: asyncio.Transport | None = None
        self.progress = time.monotonic()
        self.on_lost = on_lost
        self.failure: str = ""
        self.lost = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # noqa: D102 - asyncio's
        self.transport = transport

    def send(self, data: bytes, *waiters: Waiter) -> None:
        """Write the commands that these wait for. They are told so if the connection is lost already."""
        if self.lost or self.transport is None:
            for waiter in waiters:
                waiter.set_exception(ConnectionResetError(self.failure))
            return
        if not self.pending:
            self.progress = time.monotonic()
        self.pending.extend(waiters)
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:  # noqa: D102 - asyncio's
        reader, pending = self._reader, self.pending
        self.progress = time.monotonic()
        reply: Any = None
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not NOTHING:
                waiter = pending.popleft()
                if not waiter.done():
                    waiter.set_result(reply)
        except IndexError:  # nobody has asked: protected mode, too many clients
            self.abort(last_words([reply]) or "a reply to nothing")
        except hiredis.ProtocolError as error:
            self.abort(f"the reply is not of Redis's protocol: {error}")

    def eof_received(self) -> bool:  # noqa: D102 - asyncio's
        return False

    def pause_writing(self) -> None:
        """Commands are bounded by their callers; asyncio's own buffer may grow to that bound."""

    def resume_writing(self) -> None:
        """See :meth:`pause_writing`."""

    def connection_lost(self, error: Exception | None) -> None:  # noqa: D102 - asyncio's
        self.lost = True
        self.failure = self.failure or (str(error) if error else "the connection was closed")
        pending, self.pending = self.pending, deque()
        for waiter in pending:
            if not waiter.done():
                waiter.set_exception(ConnectionResetError(self.failure))
                waiter.exception()  # a caller that went away must not leave a warning
        self.on_lost(self)

    def abort(self, failure: str) -> None:
        """Drop the connection; whoever waits is told why."""
        self.failure = failure
        if self.transport is not None:
            self.transport.abort()
