"""docket (pydocket)."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Iterable
from typing import Any

import uvloop
from docket import Docket, Worker

from benchmarks import tally

ABOUT = {
    "packages": ["pydocket==0.27.0", "uvloop==0.23.0", "hiredis==3.5.0"],
    "guarantee": "at least once (stream with acknowledgement; redelivered after redelivery_timeout, 300 s)",
    "settings": "uvloop, concurrency=50, execution_ttl=0 (no results), add_many",
    "handlers": "both",
}


async def noop(number: int) -> None:
    tally.tick()


def noop_sync(number: int) -> None:
    tally.tick()


async def lap(sent: float) -> None:
    tally.lap(sent)


TASKS: dict[str, Any] = {"noop": noop, "noop_sync": noop_sync, "lap": lap}


def docket() -> Docket:
    made = Docket(name="bench", url=os.environ["BENCH_REDIS_URL"], execution_ttl=dt.timedelta(0))
    for function in (noop, lap):
        made.register(function)
    return made


async def _many(task: str, calls: Iterable[Any]) -> None:
    async with docket() as to:
        await to.add_many(to.call(TASKS[task])(argument) for argument in calls)


async def _one(task: str, calls: Iterable[Any]) -> None:
    async with docket() as to:
        for argument in calls:
            await to.add(TASKS[task])(argument)


def many(task: str, calls: Iterable[Any]) -> None:
    uvloop.run(_many(task, calls))


def one(task: str, calls: Iterable[Any]) -> None:
    uvloop.run(_one(task, calls))


def work(processes: int, task: str) -> None:
    tally.fork(processes)

    async def run() -> None:
        async with docket() as to, Worker(to, concurrency=50) as worker:
            await worker.run_forever()

    uvloop.run(run())
