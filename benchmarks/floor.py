"""The floors: what CPython and Redis can do at most when nothing else is wanted of them.

Loops that only reserve, run and settle: no lease, no fence, no retry, no timeout, no metrics, one task, one queue. The
commands are of our kind (a job is in Redis until its outcome is, so nothing is lost when the loop dies), 200 jobs a turn,
settle and reserve in one script call. They read what fastq's own ``enqueue_many`` wrote.

``redis-py``   redis-py's asyncio client, an asyncio.Task per job and a gather per batch: the loop that most would write
``protocol``   a bare asyncio.Protocol with hiredis's packer and reader, an asyncio.Task per job
``flat``       the same, the handlers awaited one after the other in the loop itself
``mixed``      latency among other jobs only: as ``flat``, some jobs tell how long ago they were enqueued
``pop``        latency only: a blocking pop that brings the job itself, no job kept while it runs (at most once)
``wake``       latency only: a blocking pop of a token, then a reserve, then a settle, by the bare protocol
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import hiredis
import msgspec
import uvloop

from benchmarks import tally
from fastq.broker.keys import QueueKeys
from fastq.broker.url import parse_url
from fastq.job import Envelope

BATCH = 200
TURN = """
if #ARGV > 1 then
  local done = {}
  for i = 2, #ARGV do done[i - 1] = ARGV[i] end
  redis.call('SREM', KEYS[2], unpack(done))
  redis.call('HDEL', KEYS[3], unpack(done))
end
local ids = redis.call('LPOP', KEYS[1], ARGV[1])
if not ids then return {{}, {}} end
redis.call('SADD', KEYS[2], unpack(ids))
return {ids, redis.call('HMGET', KEYS[3], unpack(ids))}
"""
NOTHING = object()

_keys = QueueKeys("fastq", "default")
LATENCY_LIST = b"floor:jobs"
_envelope = msgspec.msgpack.Decoder(Envelope).decode
_body = msgspec.msgpack.Decoder(tuple[int]).decode
_pack: Callable[[tuple[Any, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]


async def noop(number: int) -> None:
    """The handler."""
    tally.tick()


Turn = Callable[..., Awaitable[Any]]


class Wire(asyncio.Protocol):
    """Commands out, replies in, in order: 25 lines."""

    def __init__(self) -> None:
        self.reader = hiredis.Reader(notEnoughData=NOTHING)
        self.pending: deque[asyncio.Future[Any]] = deque()
        self.loop = asyncio.get_running_loop()
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        while (reply := self.reader.gets()) is not NOTHING:
            self.pending.popleft().set_result(reply)

    def call(self, *words: Any) -> asyncio.Future[Any]:
        future = self.loop.create_future()
        self.pending.append(future)
        self.transport.write(_pack(words))
        return future


async def connect(url: str) -> Wire:
    """A bare connection."""
    endpoint, loop = parse_url(url), asyncio.get_running_loop()
    if endpoint.path:
        _, wire = await loop.create_unix_connection(Wire, endpoint.path)
    else:
        _, wire = await loop.create_connection(Wire, endpoint.host, endpoint.port)
    return wire


async def drain_with_tasks(turn: Turn) -> None:
    """Batches of 200, a Task per job; the last one of a batch wakes the loop."""
    loop = asyncio.get_running_loop()
    done: list[bytes] = []

    async def run(job_id: bytes, data: bytes) -> None:
        await noop(*_body(_envelope(data).body))
        done.append(job_id)
        if len(done) == expected:
            over.set_result(None)

    while True:
        ids, datas = await turn(BATCH, *done)
        if not ids and not done:
            await asyncio.sleep(0.001)
        done.clear()
        if ids:
            over, expected = loop.create_future(), len(ids)
            for job_id, data in zip(ids, datas, strict=True):
                loop.create_task(run(job_id, data))  # noqa: RUF006 - the loop holds what is ready to run
            await over


async def drain_with_gather(turn: Turn) -> None:
    """The same as most people would write it."""
    done: list[bytes] = []

    async def run(job_id: bytes, data: bytes) -> None:
        await noop(*_body(_envelope(data).body))
        done.append(job_id)

    while True:
        ids, datas = await turn(BATCH, *done)
        if not ids and not done:
            await asyncio.sleep(0.001)
        done.clear()
        await asyncio.gather(*map(run, ids, datas))


async def drain_flat(turn: Turn) -> None:
    """The same without Tasks: what a coroutine call costs, and no concurrency."""
    ids: list[bytes] = []
    while True:
        finished = ids
        ids, datas = await turn(BATCH, *finished)
        if not ids and not finished:
            await asyncio.sleep(0.001)
        for data in datas:
            await noop(*_body(_envelope(data).body))


async def redis_py(url: str) -> None:
    """redis-py's asyncio client."""
    import redis.asyncio
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    client = redis.asyncio.from_url(url, socket_timeout=None, retry=Retry(NoBackoff(), 0), protocol=2)
    sha, names = await client.script_load(TURN), keys()
    await drain_with_gather(lambda *words: client.evalsha(sha, 3, *names, *words))


async def protocol(url: str, drain: Callable[[Turn], Awaitable[None]] = drain_with_tasks) -> None:
    """The bare protocol."""
    wire = await connect(url)
    sha, names = await wire.call("SCRIPT", "LOAD", TURN), keys()
    await drain(lambda *words: wire.call("EVALSHA", sha, 3, *names, *words))


async def flat(url: str) -> None:
    """The bare protocol, no Tasks."""
    await protocol(url, drain_flat)


async def pop(url: str) -> None:
    """The list is the queue: one hop."""
    wire = await connect(url)
    while True:
        _, sent = await wire.call("BLPOP", LATENCY_LIST, 0)
        tally.lap(float(sent))


async def mixed(url: str) -> None:
    """Jobs that do nothing and jobs that are timed, as ``flat``."""
    wire, sent = await connect(url), msgspec.msgpack.Decoder(tuple[float]).decode
    sha, names, ids = await wire.call("SCRIPT", "LOAD", TURN), keys(), list[bytes]()
    while True:
        finished = ids
        ids, datas = await wire.call("EVALSHA", sha, 3, *names, BATCH, *finished)
        if not ids and not finished:
            await asyncio.sleep(0.001)
        for data in datas:
            envelope = _envelope(data)
            if envelope.task == "lap":
                tally.lap(*sent(envelope.body))


async def wake(url: str) -> None:
    """A token wakes, the jobs are reserved and, after they ran, settled."""
    wire = await connect(url)
    sha, names = await wire.call("SCRIPT", "LOAD", TURN), keys()
    decode = msgspec.msgpack.Decoder(tuple[float]).decode
    while True:
        await wire.call("BLPOP", _keys.wake, 0)
        done: list[bytes] = []
        while True:
            ids, datas = await wire.call("EVALSHA", sha, 3, *names, BATCH, *done)
            for data in datas:
                tally.lap(*decode(_envelope(data).body))
            done = ids
            if not ids:
                break


# -- producers --------------------------------------------------------------------------------


async def enqueue(wire: Wire, jobs: int) -> None:
    """The floor of a bulk enqueue: ids and envelopes made and packed, stored 500 at a time by two commands, one round trip."""
    encode = msgspec.msgpack.Encoder().encode
    for start in range(0, jobs, 500):
        ids = [os.urandom(12).hex() for _ in range(min(500, jobs - start))]
        rows: list[Any] = []
        for number, job_id in enumerate(ids):
            rows += (job_id, encode(Envelope(5, 1, "noop", encode((number,)), 1_700_000_000_000)))
        stored = wire.call("HSET", _keys.jobs, *rows)
        await wire.call("RPUSH", _keys.ready[5], *ids)
        await stored


STORE = "redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) redis.call('RPUSH', KEYS[2], ARGV[1]) return 0"


_PRODUCER = "bench-producer"


async def store_one(wire: Wire, sha: bytes, envelope: bytes) -> None:
    """The floor of storing one job by a script: nothing tells a repetition, nobody is woken; id and call made, nothing else."""
    await wire.call("EVALSHA", sha, 2, _keys.jobs, _keys.ready[5], os.urandom(12).hex(), envelope)


async def store_at_once(wire: Wire, envelope: bytes, callers: int) -> None:
    """The floor of concurrent callers: a Task for each, which makes its id and waits for an answer of its own; two commands for all."""
    loop = asyncio.get_running_loop()
    rows: list[Any] = []
    waiting: list[asyncio.Future[None]] = []

    async def store() -> None:
        waiter = loop.create_future()
        rows.extend((os.urandom(12).hex(), envelope))
        waiting.append(waiter)
        await waiter

    everybody = asyncio.gather(*(store() for _ in range(callers)))
    await asyncio.sleep(0)
    wire.call("HSET", _keys.jobs, *rows)
    await wire.call("RPUSH", _keys.ready[5], *rows[::2])
    for waiter in waiting:
        waiter.set_result(None)
    await everybody


async def call_plain(wire: Wire, sha: bytes, sequence: int, envelope: bytes) -> None:
    """The script by which fastq stores a plain job, over the bare protocol: the rate that fastq had without its Python."""
    job_id = os.urandom(12).hex()
    await wire.call("EVALSHA", sha, 4, *_keys.plain_stores[5], _PRODUCER, sequence, job_id, envelope)


async def send_laps(url: str, kind: str, laps: int) -> None:
    """100 jobs a second for ``pop`` or ``wake``."""
    wire, encode = await connect(url), msgspec.msgpack.encode
    for n in range(laps):
        now = time.monotonic()
        if kind == "pop":
            await wire.call("RPUSH", LATENCY_LIST, repr(now))
        else:
            envelope = encode(Envelope(5, 1, "lap", encode((now,)), 1_700_000_000_000))
            waiting = wire.call("HSET", _keys.jobs, str(n), envelope), wire.call("RPUSH", _keys.ready[5], str(n))
            await wire.call("RPUSH", _keys.wake, "1")
            await asyncio.gather(*waiting)
        await asyncio.sleep(0.01)


WORKERS = {"redis-py": redis_py, "protocol": protocol, "flat": flat, "mixed": mixed, "pop": pop, "wake": wake}


def keys() -> tuple[bytes, ...]:
    """Each process has a running set of its own."""
    return (_keys.ready[5], _keys.running(f"floor-{os.getpid()}"), _keys.jobs)


RAW = {
    "RPUSH of 68 bytes, one at a time": ("-c", "1", "-P", "1", "-n", "50000"),
    "RPUSH of 68 bytes, 50 connections": ("-c", "50", "-P", "1", "-n", "200000"),
    "RPUSH of 68 bytes, 100 in a write": ("-c", "1", "-P", "100", "-n", "1000000"),
}


def raw_rates(url: str) -> dict[str, float]:
    """Commands per second by redis-benchmark, which comes with the server; nothing without it."""
    tool, where = shutil.which("redis-benchmark") or shutil.which("valkey-benchmark"), urlsplit(url)
    if tool is None:
        return {}
    found = {}
    for name, how in RAW.items():
        words = (tool, "-h", str(where.hostname), "-p", str(where.port), "--csv", *how, "RPUSH", "bench:raw", "x" * 68)
        said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
        found[name] = float(said.splitlines()[-1].split('","')[1])
    return found


def main(kind: str, url: str, processes: str = "1") -> None:
    for _ in range(int(processes) - 1):
        if os.fork() == 0:
            break
    uvloop.run(WORKERS[kind](url))


if __name__ == "__main__":
    main(*sys.argv[1:])
