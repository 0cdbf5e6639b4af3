"""A TCP proxy before Redis that loses replies, holds them back or up, or goes silent (F-30, F-31, F-33, F-37).

It runs in a thread of the test. It knows the scripts in a client's bytes by their SHA-1, so that a test says which ones
are to suffer. A lost reply is the worst kind: Redis has run the script and answered, then the connection breaks.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self

from fastq.broker import scripts
from fastq.broker.url import parse_url

PASS, DROP, HOLD, CUT = "pass", "drop", "hold", "cut"
Rule = Callable[[list[str]], str]
"""The names of what is in a client's bytes (see ``MARKS``; others are let through) -> what becomes of the reply; CUT: the
connection breaks before Redis has any of these bytes, or of what follows them."""

MARKED = ("enqueue", "enqueue_once", "register", "reserve", "settle", "recover", "extend", "lease", "penalize")
MARKS = {scripts.load(name).sha: name for name in MARKED}
MARKS[scripts.load("enqueue_plain").sha] = "enqueue"
MARKS[b"\r\nSADD\r\n"] = "announce"  # of a queue, after an enqueue


class Line:
    """One client's connection and its other half to the server."""

    def __init__(self, proxy: FaultProxy, to: str | tuple[str, int], client: Any, server: Any) -> None:
        self.proxy = proxy
        self.to = to
        self.client_reader, self.client = client
        self.server_reader, self.server = server
        self.dropping: list[str] = []
        self.open = asyncio.Event()
        self.open.set()
        self.silent = False

    async def up(self) -> None:
        while data := await self.client_reader.read(1 << 20):
            names = [name for mark, name in MARKS.items() if mark in data]
            what = self.proxy.judge(names)
            if what == CUT:
                return
            if what == DROP:
                self.dropping = names
            elif what == HOLD:
                self.open.clear()
                self.proxy.held.append(self)
            if not (self.silent or self.proxy.is_away(self.to)):
                self.server.write(data)

    async def down(self) -> None:
        while data := await self.server_reader.read(1 << 20):
            await self.open.wait()
            if self.proxy.delay:
                await asyncio.sleep(self.proxy.delay)
            if self.dropping:
                if not data.startswith(b"-"):  # NOSCRIPT: nothing has run
                    self.proxy.dropped.update(self.dropping)
                    return
                self.dropping = []
            if not (self.silent or self.proxy.is_away(self.to)):
                self.client.write(self.proxy.renamed(data))

    async def run(self) -> None:
        halves = [asyncio.ensure_future(half) for half in (self.up(), self.down())]
        try:
            await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for half in halves:
                half.cancel()
            await asyncio.gather(*halves, return_exceptions=True)
            self.client.transport.abort()  # not a polite end: the client gets a reset
            self.server.transport.abort()


class FaultProxy:
    """Listens on a free port and relays to a server; before a cluster on a port per node, which it tells instead of the node's own.

    ``rule`` may be replaced at any time. ``tls``: to be spoken with its clients. ``known_as``: ports of
    nodes that call themselves by others.
    """

    def __init__(
        self, url: str, tls: ssl.SSLContext | None = None, known_as: Mapping[int, int] = MappingProxyType({})
    ) -> None:
        endpoint = parse_url(url)
        self._tls = tls
        self._known_as = known_as
        self._away: set[tuple[str, int] | str] = set()
        self._nodes = list(endpoint.nodes)
        self._to: list[str | tuple[str, int]] = [*self._nodes] or [endpoint.path or (endpoint.host, endpoint.port)]
        self.rule: Rule = lambda names: PASS
        self.seen: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.held: list[Line] = []
        self.delay = 0.0
        """Seconds by which every reply is late."""
        self._lines: set[Line] = set()
        self._clients: set[asyncio.StreamWriter] = set()
        self._listeners: list[asyncio.Server] = []
        self._ports: list[int] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)

    @property
    def url(self) -> str:
        """Where clients are to connect."""
        scheme = "redis" if self._tls is None else "rediss"
        if not self._nodes:
            return f"{scheme}://127.0.0.1:{self._ports[0]}/0"
        return f"{scheme}+cluster://" + ",".join(f"127.0.0.1:{port}" for port in self._ports) + "/"

    def renamed(self, data: bytes) -> bytes:
        """A node's reply in which the nodes (of the layout, of a redirection) are where this proxy listens for them."""
        for (_, port), own in zip(self._nodes, self._ports, strict=False):
            data = data.replace(b":%d\r\n" % self._known_as.get(port, port), b":%d\r\n" % own)
        return data

    def cut(self, *ports: int) -> None:
        """These nodes are cut off from the clients: nothing passes, and nobody is told."""
        self._away = {node for node in self._nodes if node[1] in ports}

    def is_away(self, node: str | tuple[str, int]) -> bool:
        """Whether a node is cut off."""
        return node in self._away

    def heal(self) -> None:
        """Whoever was cut off has to connect anew, and can."""
        lines = [line for line in self._lines if line.to in self._away]
        self._away = set()
        self._loop.call_soon_threadsafe(lambda: [line.client.transport.abort() for line in lines])

    def judge(self, names: list[str]) -> str:
        """What the rule says; counts what went through."""
        self.seen.update(names)
        return self.rule(names) if names else PASS

    def silence(self) -> int:
        """Half-open: nothing passes on the connections that exist, and nobody is told; new ones work. How many."""
        lines = list(self._lines)
        for line in lines:
            line.silent = True
        return len(lines)

    def release(self) -> None:
        """Let the held replies go."""
        self.rule = lambda names: PASS
        while self.held:
            self._loop.call_soon_threadsafe(self.held.pop().open.set)

    async def _serve(
        self, to: str | tuple[str, int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._clients.add(writer)
        line = None
        try:
            there = await (asyncio.open_unix_connection(to) if isinstance(to, str) else asyncio.open_connection(*to))
            line = Line(self, to, (reader, writer), there)
            self._lines.add(line)
            await line.run()
        except OSError:
            pass
        finally:
            writer.transport.abort()
            self._clients.discard(writer)
            self._lines.discard(line)  # type: ignore[arg-type]

    async def _open(self) -> None:
        for to in self._to:
            listener = await asyncio.start_server(functools.partial(self._serve, to), "127.0.0.1", 0, ssl=self._tls)
            self._listeners.append(listener)
            self._ports.append(int(listener.sockets[0].getsockname()[1]))

    async def _close(self) -> None:
        """Ends every line as its client would: a task that is cancelled while it connects leaves an open socket behind."""
        for listener in self._listeners:
            listener.close()
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for writer in self._clients:
                writer.transport.abort()
            await asyncio.wait(tasks, timeout=0.1)
        await asyncio.sleep(0)  # the transports' own callbacks

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


def every_other(proxy: FaultProxy, **most: int) -> Rule:
    """Lose every second reply that carries one of these, until each has suffered so many times."""

    def rule(found: list[str]) -> str:
        due = [name for name in found if proxy.dropped[name] < most.get(name, 0)]
        return DROP if due and min(proxy.seen[name] for name in due) % 2 else PASS

    return rule
