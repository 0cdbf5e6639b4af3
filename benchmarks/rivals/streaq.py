"""streaQ."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from itertools import islice
from typing import Any

import uvloop
from streaq import Worker

from benchmarks import tally

ABOUT = {
    "packages": ["streaq==7.2.0", "uvloop==0.23.0", "hiredis==3.5.0"],
    "guarantee": "at least once (stream with acknowledgement; idle entries are claimed after 60 s)",
    "settings": "uvloop, concurrency=200, prefetch=200, ttl=0 (no results), silent tasks, enqueue_many by 1,000",
    "handlers": "both",
}
worker: Worker[Any] = Worker(
    redis_url=os.environ.get("BENCH_REDIS_URL", "redis://"), concurrency=200, prefetch=200, sync_concurrency=8,
    anyio_kwargs={"use_uvloop": True},
)  # fmt: skip


@worker.task(ttl=0, silent=True)
async def noop(number: int) -> None:
    tally.tick()


@worker.task(ttl=0, silent=True)
def noop_sync(number: int) -> None:
    tally.tick()


@worker.task(ttl=0, silent=True)
async def lap(sent: float) -> None:
    tally.lap(sent)


TASKS: dict[str, Any] = {"noop": noop, "noop_sync": noop_sync, "lap": lap}


async def _many(task: str, calls: Iterable[Any]) -> None:
    rest = iter(calls)
    async with worker:
        while chunk := list(islice(rest, 1_000)):
            await worker.enqueue_many([TASKS[task].enqueue(argument) for argument in chunk])


async def _one(task: str, calls: Iterable[Any]) -> None:
    async with worker:
        for argument in calls:
            await TASKS[task].enqueue(argument)


def many(task: str, calls: Iterable[Any]) -> None:
    uvloop.run(_many(task, calls))


def one(task: str, calls: Iterable[Any]) -> None:
    uvloop.run(_one(task, calls))


def work(processes: int, task: str) -> None:
    binary = os.path.join(os.path.dirname(sys.executable), "streaq")
    os.execv(binary, [binary, "run", "benchmarks.rivals.streaq:worker", "--workers", str(processes)])
