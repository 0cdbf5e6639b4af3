"""arq."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from itertools import islice
from typing import Any

import uvloop
from arq import create_pool, run_worker
from arq.connections import RedisSettings

from benchmarks import tally

ABOUT = {
    "packages": ["arq==0.28.0", "uvloop==0.23.0", "hiredis==3.5.0"],
    "guarantee": "at least once (a job of a dead worker is run again when its in-progress key expires)",
    "settings": "uvloop, max_jobs=200, poll_delay=0.05 (default 0.5), keep_result=0; 200 enqueues at a time",
    "handlers": "async",
}
SETTINGS = RedisSettings.from_dsn(os.environ.get("BENCH_REDIS_URL", "redis://"))


async def noop(ctx: dict[str, Any], number: int) -> None:
    tally.tick()


async def lap(ctx: dict[str, Any], sent: float) -> None:
    tally.lap(sent)


class WorkerSettings:
    functions = [noop, lap]  # noqa: RUF012 - as arq's documentation has it
    redis_settings = SETTINGS
    max_jobs = 200
    poll_delay = 0.05
    keep_result = 0
    log_results = False


async def _send(task: str, calls: Iterable[Any], together: int) -> None:
    pool = await create_pool(SETTINGS)
    rest = iter(calls)
    if together == 1:
        for argument in rest:
            await pool.enqueue_job(task, argument)
        return
    while chunk := list(islice(rest, together)):
        await asyncio.gather(*(pool.enqueue_job(task, argument) for argument in chunk))


def many(task: str, calls: Iterable[Any]) -> None:
    """There is no bulk call."""
    uvloop.run(_send(task, calls, 200))


def one(task: str, calls: Iterable[Any]) -> None:
    uvloop.run(_send(task, calls, 1))


def work(processes: int, task: str) -> None:
    tally.fork(processes)
    uvloop.install()
    asyncio.set_event_loop(uvloop.new_event_loop())
    run_worker(WorkerSettings)
