"""A connection that listens: one channel per process, whatever number of jobs it waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastq.broker.command import raw
from fastq.broker.connection import AsyncConnection
from fastq.broker.url import Endpoint
from fastq.broker.wire import Wire

__all__ = ["Listener"]


class Listener(AsyncConnection):
    """Subscribed to one channel of its own.

    Args:
        channel: its name. It needs no hash tag: PUBLISH reaches every node of a cluster.
        on_message: called with the payload of each message.
        on_silence: called when the connection is lost; messages may have been, too.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        channel: str,
        on_message: Callable[[bytes], None],
        on_silence: Callable[[], None],
        *,
        connect_timeout: float = 5.0,
        response_timeout: float = 10.0,
    ) -> None:
        super().__init__(endpoint, connect_timeout=connect_timeout, response_timeout=response_timeout)
        self.channel = channel
        self._on_message = on_message
        self._on_silence = on_silence
        self._subscribed = 0  # the number of the connection that is

    async def listen(self) -> int:
        """Connect and subscribe, unless that is done. Returns the connection's number: a new one may have missed messages.

        Raises:
            BrokerError: as :meth:`AsyncConnection.call`.
        """
        await self.connect()
        number = self.connects
        if number != self._subscribed:
            await self.call(raw("SUBSCRIBE", self.channel))
            self._subscribed = number
        return number

    async def ping(self) -> None:
        """Ask for a sign of life: a connection that the network has forgotten gives none, and is dropped."""
        await self.call(raw("PING"))

    def _make_wire(self) -> Wire:
        return _Ear(self._lost, self._on_message)

    def _lost(self, wire: Wire) -> None:
        super()._lost(wire)
        self._on_silence()


class _Ear(Wire):
    """A wire on which messages come between the replies."""

    __slots__ = ()

    def __init__(self, on_lost: Callable[[Wire], None], on_message: Callable[[bytes], None]) -> None:
        super().__init__(on_lost)
        self._reader = _Sieve(self._reader, on_message)


class _Sieve:
    """A reader that hands messages to a callback; what is left are the replies, in their order."""

    def __init__(self, reader: Any, on_message: Callable[[bytes], None]) -> None:
        self.feed = reader.feed
        self._gets = reader.gets
        self._on_message = on_message

    def gets(self) -> Any:
        while True:
            reply = self._gets()
            if not (isinstance(reply, list) and len(reply) == 3 and reply[0] == b"message"):
                return reply
            self._on_message(reply[2])
