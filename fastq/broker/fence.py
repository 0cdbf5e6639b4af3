"""A connection whose predecessor is ended by Redis before the new one is used: what was under way there never runs.

A worker that gives a connection up (no reply for too long, a broken network) does not know what became of the bytes that it
had written. The kernel, a proxy or the server's own buffer may deliver them after the worker has connected anew, settled, and
reserved the same job again; the running set would let the old outcome through, as the worker does hold the job. So the first
word on a new connection is the end of the old one. See docs/adr/0010-fenced-connections.md.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from fastq.broker.command import raw
from fastq.broker.connection import AsyncConnection, pack
from fastq.broker.greeting import client_name
from fastq.broker.wire import Wire

__all__ = ["FencedConnection"]

log = logging.getLogger("fastq.broker")


class FencedConnection(AsyncConnection):
    """An :class:`AsyncConnection` for what must not run late. Arguments and errors are the same.

    It costs one round trip per connect, and two more after a loss. Where an ACL forbids ``CLIENT LIST`` or ``CLIENT KILL``,
    it works unfenced and says so once.
    """

    _before: tuple[int, str] | None = None  # Redis's number of the last connection, and the name by which we know it
    _told = False

    async def _shake_hands(self, wire: Wire, loop: asyncio.AbstractEventLoop) -> None:
        await super()._shake_hands(wire, loop)
        if self._before is not None:
            await self._end(wire, *self._before)
        name = f"{client_name()}:{os.urandom(8).hex()}"
        named, number = await self._ask(wire, ("CLIENT", "SETNAME", name), ("CLIENT", "ID"))
        self._before = (number, name) if named == b"OK" and isinstance(number, int) else None

    async def _end(self, wire: Wire, number: int, name: str) -> None:
        """End the connection of this number, if it is still ours: a server that was restarted begins to count anew."""
        (shown,) = await self._ask(wire, ("CLIENT", "LIST", "ID", number))
        if isinstance(shown, bytes) and f" name={name} ".encode() in shown:
            (shown,) = await self._ask(wire, ("CLIENT", "KILL", "ID", number))
        if isinstance(shown, Exception) and not self._told:
            self._told = True
            log.warning("a lost connection cannot be ended: %s; allow +client|list +client|kill", shown)

    async def _ask(self, wire: Wire, *commands: tuple[Any, ...]) -> list[Any]:
        """The bare replies; ConnectionResetError when this connection, too, is lost."""
        return list(await asyncio.gather(*[self._send(wire, pack(raw(*words))) for words in commands]))
