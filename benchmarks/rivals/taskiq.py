"""taskiq with taskiq-redis."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable
from itertools import islice
from typing import Any

import uvloop
from taskiq_redis import RedisStreamBroker

from benchmarks import tally

ABOUT = {
    "packages": ["taskiq==0.13.0", "taskiq-redis==1.2.4", "uvloop==0.23.0", "hiredis==3.5.0", "orjson==3.13.0"],
    "guarantee": "at least once (stream with acknowledgement; pending entries are claimed after idle_timeout, 10 min)",
    "settings": "RedisStreamBroker, acknowledged when executed, 200 tasks at a time, prefetch 200, no result backend",
    "handlers": "both",
}
broker = RedisStreamBroker(url=os.environ.get("BENCH_REDIS_URL", "redis://"), xread_count=200)


@broker.task(task_name="noop")
async def noop(number: int) -> None:
    tally.tick()


@broker.task(task_name="noop_sync")
def noop_sync(number: int) -> None:
    tally.tick()


@broker.task(task_name="lap")
async def lap(sent: float) -> None:
    tally.lap(sent)


async def _send(task: str, calls: Iterable[Any], together: int) -> None:
    await broker.startup()
    call: Any = {"noop": noop, "noop_sync": noop_sync, "lap": lap}[task]
    rest = iter(calls)
    while chunk := list(islice(rest, together)):
        await asyncio.gather(*(call.kiq(argument) for argument in chunk))
    await broker.shutdown()


def many(task: str, calls: Iterable[Any]) -> None:
    """There is no bulk call."""
    uvloop.run(_send(task, calls, 50))


def one(task: str, calls: Iterable[Any]) -> None:
    uvloop.run(_send(task, calls, 1))


def work(processes: int, task: str) -> None:
    binary = os.path.join(os.path.dirname(sys.executable), "taskiq")
    words = ["--workers", str(processes), "--max-async-tasks", "200", "--max-prefetch", "200", "--log-level", "ERROR"]
    os.execv(binary, [binary, "worker", "benchmarks.rivals.taskiq:broker", *words, "--ack-type", "when_executed"])
