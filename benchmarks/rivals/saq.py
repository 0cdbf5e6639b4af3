"""SAQ."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from itertools import islice
from typing import Any

import uvloop
from saq import Job, Queue, Worker

from benchmarks import tally

ABOUT = {
    "packages": ["saq[redis,hiredis]==0.26.4", "typing_extensions==4.16.0", "uvloop==0.23.0"],
    "guarantee": "at least once (a sweep finds jobs that are active without a sign of life)",
    "settings": "uvloop, concurrency=100, jobs with ttl=-1 (no results); 100 enqueues at a time",
    "handlers": "async",
}


async def noop(ctx: dict[str, Any], *, argument: int) -> None:
    tally.tick()


async def lap(ctx: dict[str, Any], *, argument: float) -> None:
    tally.lap(argument)


def queue() -> Any:
    return Queue.from_url(os.environ["BENCH_REDIS_URL"], max_concurrent_ops=100)


async def _send(task: str, calls: Iterable[Any], together: int) -> None:
    to = queue()
    rest = iter(calls)
    while chunk := list(islice(rest, together)):
        await asyncio.gather(*(to.enqueue(Job(task, kwargs={"argument": a}, ttl=-1)) for a in chunk))
    await to.disconnect()


def many(task: str, calls: Iterable[Any]) -> None:
    """There is no bulk call."""
    uvloop.run(_send(task, calls, 100))


def one(task: str, calls: Iterable[Any]) -> None:
    uvloop.run(_send(task, calls, 1))


def work(processes: int, task: str) -> None:
    tally.fork(processes)

    async def run() -> None:
        await Worker(queue(), functions=[noop, lap], concurrency=100).start()

    uvloop.run(run())
