"""What an abandoned connection still delivers (FAULTS 2.1, invariant I3): a settle of an earlier turn never counts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fastq.broker import commands
from fastq.broker.command import Command, raw
from fastq.broker.connection import AsyncConnection
from fastq.broker.fence import FencedConnection
from fastq.broker.url import parse_url
from tests.conftest import MakeServer, eventually_async
from tests.redis.lab import Lab, envelope

pytestmark = pytest.mark.one_server("the network between one connection and one server")


class SlowNetwork:
    """Relays to a server; while it is `late`, what clients send is kept, even when they have hung up, until `deliver`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.late = False
        self.kept: list[tuple[asyncio.StreamWriter, bytes]] = []
        self.lines: list[asyncio.StreamWriter] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_unix_connection(self.path)
        self.lines += [writer, here]
        self.tasks.append(asyncio.create_task(self.back(there, writer)))
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if self.late:
                    self.kept.append((here, data))
                else:
                    here.write(data)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.append(asyncio.create_task(self.serve(reader, writer)))

    async def back(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await there.read(1 << 16):
                writer.write(data)

    async def deliver(self) -> None:
        for line, data in self.kept:
            with contextlib.suppress(ConnectionError):
                line.write(data)
                await line.drain()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[SlowNetwork]:
        server = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for line in self.lines:
                line.transport.abort()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            await server.wait_closed()


def settle(lab: Lab) -> Command[commands.Settled]:
    return lab.settle_command(later=[("j", 0, envelope())])


async def two_turns(lab: Lab, network: SlowNetwork, connection: AsyncConnection) -> None:
    """A settle is written and the connection given up; the same worker settles and reserves the job again; then it comes."""
    await connection.call(commands.register(lab.q, "w", 60_000, b"info"))
    lab.enqueue("j")
    assert (await connection.call(commands.reserve(lab.q, "w", 1))).ids == [b"j"]
    network.late = True
    with contextlib.suppress(ConnectionResetError):
        abandoned = connection.send(settle(lab))
        await eventually_async(lambda: network.kept)
        connection.drop("no reply for too long")
        await abandoned
    network.late = False
    assert (await connection.call(commands.resume(lab.q, "w"))).ids == [b"j"], "the settle has not run"
    assert (await connection.call(settle(lab))).stale == []
    assert (await connection.call(commands.reserve(lab.q, "w", 1))).ids == [b"j"]
    before = int(lab.raw.info("commandstats")["cmdstat_evalsha"]["calls"])
    await network.deliver()
    if not isinstance(connection, FencedConnection):
        await eventually_async(lambda: int(lab.raw.info("commandstats")["cmdstat_evalsha"]["calls"]) > before)


async def test_a_late_settle_of_the_same_worker_passes_the_running_set(lab: Lab, redis_server: Any) -> None:
    """What this is about: without the fence the second run loses its job while it goes on, and another worker starts it."""
    async with SlowNetwork(str(redis_server.socket_path)).running() as network:
        connection = AsyncConnection(parse_url(f"redis://127.0.0.1:{network.port}/0"))
        await two_turns(lab, network, connection)
        assert lab.ready() == ["j"]
        lab.register("v")
        assert lab.reserve(1, "v").ids == [b"j"], "two workers run it"
        await connection.close()


async def test_a_fenced_connection_is_the_end_of_the_one_before(lab: Lab, redis_server: Any) -> None:
    """The same bytes at the same moment: Redis has hung up there before anything else was said on the new connection."""
    async with SlowNetwork(str(redis_server.socket_path)).running() as network:
        connection = FencedConnection(parse_url(f"redis://127.0.0.1:{network.port}/0"))
        await two_turns(lab, network, connection)
        for _ in range(20):
            await asyncio.sleep(0.001)
            assert lab.ready() == []
        assert (await connection.call(commands.resume(lab.q, "w"))).ids == [b"j"]
        assert (await connection.call(lab.settle_command(succeeded=["j"]))).stale == []
        await connection.close()
    assert lab.jobs() == set()


async def test_only_its_own_predecessor_is_ended(lab: Lab, redis_url: str) -> None:
    """A restarted server counts from one again: the number may be somebody else's."""
    connection, other = FencedConnection(parse_url(redis_url)), FencedConnection(parse_url(redis_url))
    await connection.connect()
    await other.connect()
    assert connection._before is not None
    assert other._before is not None
    connection._before = (other._before[0], connection._before[1])
    connection.drop()
    await connection.connect()
    assert await other.call(raw("PING")) == b"PONG"
    assert other.connects == 1
    await connection.close()
    await other.close()


async def test_an_acl_that_forbids_it_is_said_once(make_server: MakeServer, caplog: pytest.LogCaptureFixture) -> None:
    server = make_server(port=0)
    server.ask(b"ACL", b"SETUSER", b"app", b"on", b">secret", b"~*", b"&*", b"+@all", b"-client|kill", b"-client|list")
    connection = FencedConnection(parse_url(f"redis://app:secret@127.0.0.1:{server.port}/0"))
    with caplog.at_level(logging.WARNING, "fastq.broker"):
        for _ in range(3):
            await connection.connect()
            connection.drop()
    assert [record.message for record in caplog.records if "cannot be ended" in record.message] == [
        caplog.records[0].message
    ]
    assert "+client|kill" in caplog.records[0].message
    await connection.close()
