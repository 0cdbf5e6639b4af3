"""What a script costs a server that slept: ``python -m benchmarks.cold`` (half a minute).

At 100 jobs a second whatever a job touches has left the caches since the last one. What costs then is distinct code, and hardly how
often it runs. Each row is called once every 10 ms, all in turn; the median of what Redis's slow log says, in whole µs, and of the round
trip, which has the words of the call in it, too. Compare rows of one run only: all of it doubles and halves with the machine's minute.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import uvloop

from benchmarks import floor
from benchmarks.load.lab import private_server
from fastq.broker import scripts
from fastq.broker.command import Command
from fastq.broker.commands import Batch, NewJob, enqueue, register, reserve, settle
from fastq.broker.keys import QueueKeys

ROUNDS = 100
Q = QueueKeys("fastq", "default")
FIVE = (
    "call('EXISTS', 'a') call('SADD', 's', 'x') call('HSET', 'h', 'f', 'v') call('RPUSH', 'l', 'x') call('LPOP', 'l')"
)
BARE = {
    "nothing": "return 0",
    "one command": "local call = redis.call call('EXISTS', 'a') return 0",
    "the same five times": "local call = redis.call for _ = 1, 5 do call('EXISTS', 'a') end return 0",
    "one command, 16 keys": f"redis.call('EXISTS', {', '.join(map(repr, 'abcdefghijklmnop'))}) return 0",
    "five commands": f"local call = redis.call {FIVE} return 0",
    "five commands, twice": f"local call = redis.call for _ = 1, 2 do {FIVE} end return 0",
    "a reply of tables": "return {1, {'a'}, {'b'}, {}}",
}
WORDS = {"nothing, 8 keys": 8, "nothing, 24 keys": 24}


async def run(wire: floor.Wire) -> None:
    first = register(Q, "w", 600_000, b"")
    await wire.call("EVAL", _text(first), len(first.keys), *first.keys, *first.args)
    calls: dict[str, Callable[[], tuple[Any, ...]]] = {}
    for name, text in BARE.items():
        sha = await wire.call("SCRIPT", "LOAD", text)
        calls[name] = lambda sha=sha: ("EVALSHA", sha, 0)
    nothing = await wire.call("SCRIPT", "LOAD", BARE["nothing"])
    for name, count in WORDS.items():
        keys = [f"fastq:{{default}}:key:{n}" for n in range(count)]
        calls[name] = lambda keys=keys: ("EVALSHA", nothing, len(keys), *keys)
    taken: list[str] = []

    def stored() -> Command[Any]:
        taken.append(os.urandom(12).hex())
        return enqueue(Q, 5, "p", time.time_ns() // 1_000, [NewJob(taken[-1], b"\x05" + b"x" * 67)])

    def done() -> Command[Any]:
        batch = Batch()
        batch.succeeded = [taken.pop()]
        return settle(Q, "w", batch, 9)

    for name, make in {"enqueue": stored, "reserve": lambda: reserve(Q, "w", 100), "settle": done}.items():
        sha = await wire.call("SCRIPT", "LOAD", _text(make()))
        calls[f"fastq: {name}"] = lambda make=make, sha=sha: _words(make(), sha)
    taken.clear()
    await measure(wire, calls)


def _text(command: Command[Any]) -> bytes:
    return scripts.load(str(command.script)).text


def _words(command: Command[Any], sha: bytes) -> tuple[Any, ...]:
    return ("EVALSHA", sha, len(command.keys), *command.keys, *command.args)


async def measure(wire: floor.Wire, calls: dict[str, Callable[[], tuple[Any, ...]]]) -> None:
    server: dict[str, list[float]] = {name: [] for name in calls}
    trip: dict[str, list[float]] = {name: [] for name in calls}
    await wire.call("CONFIG", "SET", "slowlog-log-slower-than", "0")
    for _ in range(ROUNDS):
        for name, words in calls.items():
            call = words()
            await asyncio.sleep(0.01)
            begun = time.perf_counter()
            reply = await wire.call(*call)
            trip[name].append((time.perf_counter() - begun) * 1e6)
            if isinstance(reply, Exception):
                raise reply
            server[name].append((await wire.call("SLOWLOG", "GET", "1"))[0][2])
    print(f"{'':24}{'in Redis':>10}{'round trip':>12}")
    for name in calls:
        print(f"{name:24}{statistics.median(server[name]):>7.0f} µs{statistics.median(trip[name]):>9.0f} µs")


async def main(url: str) -> None:
    await run(await floor.connect(url))


if __name__ == "__main__":
    with private_server() as redis:
        uvloop.run(main(redis.url))
