"""RQ."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from typing import Any

from redis import Redis
from rq import Queue, SimpleWorker

from benchmarks import tally

ABOUT = {
    "packages": ["rq==3.0.0", "hiredis==3.5.0"],
    "guarantee": "jobs of a dead worker are marked failed, not run again (unless retries are asked for)",
    "settings": "SimpleWorker (no fork per job), result_ttl=0, enqueue_many by 1,000",
    "handlers": "sync",
}
connection = Redis.from_url(os.environ.get("BENCH_REDIS_URL", "redis://"))
queue = Queue("bench", connection=connection)


def noop(number: int) -> None:
    tally.tick()


def lap(sent: float) -> None:
    tally.lap(sent)


TASKS = {"lap": "benchmarks.rivals.rq.lap"}
NOOP = "benchmarks.rivals.rq.noop"


def many(task: str, calls: Iterable[Any]) -> None:
    rest = iter(calls)
    while chunk := list(islice(rest, 1_000)):
        queue.enqueue_many(
            [Queue.prepare_data(TASKS.get(task, NOOP), args=(argument,), result_ttl=0) for argument in chunk]
        )


def one(task: str, calls: Iterable[Any]) -> None:
    for argument in calls:
        queue.enqueue(TASKS.get(task, NOOP), argument, result_ttl=0)


def work(processes: int, task: str) -> None:
    tally.fork(processes)
    SimpleWorker([queue], connection=Redis.from_url(os.environ["BENCH_REDIS_URL"])).work(logging_level="ERROR")
