"""BlitzQ in its reliable mode."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable
from itertools import islice
from typing import Any

from blitzq import Queue

from benchmarks import tally

ABOUT = {
    "packages": ["blitzq==1.1.0", "hiredis==3.5.0", "uvloop==0.23.0"],
    "least": [3, 12],
    "guarantee": "at least once (mode=reliable: stream with acknowledgement, redelivered after 60 s)",
    "settings": "mode=reliable, store_results=False, concurrency=500, batch-size=500, enqueue_many by 1,000",
    "handlers": "both",
}
queue = Queue(
    "bench", redis_url=os.environ.get("BENCH_REDIS_URL"), mode=os.environ.get("BENCH_BLITZQ_MODE", "reliable"),
    store_results=False,
)  # fmt: skip


@queue.task(name="noop")
async def noop(number: int) -> None:
    tally.tick()


@queue.task(name="noop_sync")
def noop_sync(number: int) -> None:
    tally.tick()


@queue.task(name="lap")
async def lap(sent: float) -> None:
    tally.lap(sent)


TASKS: dict[str, Any] = {"noop": noop, "noop_sync": noop_sync, "lap": lap}


async def _many(task: str, calls: Iterable[Any]) -> None:
    rest = iter(calls)
    while chunk := list(islice(rest, 1_000)):
        await TASKS[task].enqueue_many([(argument,) for argument in chunk])


async def _one(task: str, calls: Iterable[Any]) -> None:
    for argument in calls:
        await TASKS[task].enqueue(argument)


def many(task: str, calls: Iterable[Any]) -> None:
    asyncio.run(_many(task, calls))


def one(task: str, calls: Iterable[Any]) -> None:
    asyncio.run(_one(task, calls))


def work(processes: int, task: str) -> None:
    binary = os.path.join(os.path.dirname(sys.executable), "blitzq")
    words = ["-c", "500", "--batch-size", "500", "--workers", str(processes), "--log-level", "ERROR"]
    os.execv(binary, [binary, "worker", "benchmarks.rivals.blitzq:queue", *words])
