"""Huey."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from huey import RedisHuey

from benchmarks import tally

ABOUT = {
    "packages": ["huey==3.5.4", "redis==8.1.0", "hiredis==3.5.0"],
    "guarantee": "at most once (the job is popped before it runs)",
    "settings": "RedisHuey with blocking pop, results off, no periodic tasks, one worker thread per process",
    "handlers": "sync",
}
huey = RedisHuey("bench", url=os.environ.get("BENCH_REDIS_URL"), results=False, immediate=False)


@huey.task(name="noop")
def noop(number: int) -> None:
    tally.tick()


@huey.task(name="lap")
def lap(sent: float) -> None:
    tally.lap(sent)


def many(task: str, calls: Iterable[Any]) -> None:
    """There is no bulk call."""
    call = {"lap": lap}.get(task, noop)
    for argument in calls:
        call(argument)


one = many


def work(processes: int, task: str) -> None:
    kind = "thread" if processes == 1 else "process"
    consumer = huey.create_consumer(workers=processes, worker_type=kind, periodic=False, initial_delay=0.001)
    consumer.run()
