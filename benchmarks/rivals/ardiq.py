"""ArdiQ: loop and Redis traffic in Rust."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable
from itertools import islice
from typing import Any

from ardiq import Ardiq

from benchmarks import tally

ABOUT = {
    "packages": ["ardiq==1.2.0", "uvloop==0.23.0"],
    "least": [3, 12],
    "guarantee": "at least once (stream with acknowledgement; idle entries are claimed)",
    "settings": "concurrency=200, prefetch=200, result_ttl_ms=1 (results cannot be switched off), enqueue_many by 1,000",
    "handlers": "both",
}
app = Ardiq(
    redis_url=os.environ.get("BENCH_REDIS_URL"), queue_name="bench", concurrency=200, prefetch=200, result_ttl_ms=1
)


@app.task(name="noop")
async def noop(number: int) -> None:
    tally.tick()


@app.task(name="noop_sync")
def noop_sync(number: int) -> None:
    tally.tick()


@app.task(name="lap")
async def lap(sent: float) -> None:
    tally.lap(sent)


TASKS: dict[str, Any] = {"noop": noop, "noop_sync": noop_sync, "lap": lap}


async def _many(task: str, calls: Iterable[Any]) -> None:
    rest = iter(calls)
    while chunk := list(islice(rest, 1_000)):
        await app.enqueue_many(TASKS[task].prepare(argument) for argument in chunk)


async def _one(task: str, calls: Iterable[Any]) -> None:
    for argument in calls:
        await TASKS[task].enqueue(argument)


def many(task: str, calls: Iterable[Any]) -> None:
    asyncio.run(_many(task, calls))


def one(task: str, calls: Iterable[Any]) -> None:
    asyncio.run(_one(task, calls))


def work(processes: int, task: str) -> None:
    binary = os.path.join(os.path.dirname(sys.executable), "ardiq")
    os.execv(binary, [binary, "run", "-q", "-w", str(processes), "benchmarks.rivals.ardiq:app"])
