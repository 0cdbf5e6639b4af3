"""Celery: the default that most compare with."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from celery import Celery

from benchmarks import tally

ABOUT = {
    "packages": ["celery[redis]==5.7.0", "hiredis==3.5.0"],
    "guarantee": "at least once (acks_late; a killed worker's jobs come back after visibility_timeout, 1 h)",
    "settings": "prefork pool, acks_late, results ignored, prefetch 200, no gossip, mingle, heartbeat or events",
    "handlers": "sync",
}
app = Celery("bench", broker=os.environ.get("BENCH_REDIS_URL"))
app.conf.update(
    task_ignore_result=True, task_acks_late=True, worker_prefetch_multiplier=200, worker_send_task_events=False,
    worker_hijack_root_logger=False,
)  # fmt: skip


@app.task(name="noop")
def noop(number: int) -> None:
    tally.tick()


@app.task(name="lap")
def lap(sent: float) -> None:
    tally.lap(sent)


def many(task: str, calls: Iterable[Any]) -> None:
    """There is no bulk call: one producer for all, as the documentation advises."""
    with app.producer_pool.acquire(block=True) as producer:
        for argument in calls:
            {"lap": lap}.get(task, noop).apply_async((argument,), producer=producer)


one = many


def work(processes: int, task: str) -> None:
    words = ["--pool", "prefork", "--concurrency", str(processes), "--loglevel", "ERROR"]
    app.worker_main(["worker", *words, "--without-gossip", "--without-mingle", "--without-heartbeat"])
