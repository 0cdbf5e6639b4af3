"""Dramatiq."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from benchmarks import tally

ABOUT = {
    "packages": ["dramatiq[redis]==2.2.1", "hiredis==3.5.0"],
    "guarantee": "at least once (unacknowledged messages of a dead worker are requeued after its heartbeat, 60 s)",
    "settings": "RedisBroker, 1 process with 8 threads, default middleware without Prometheus; no results",
    "handlers": "sync",
}
dramatiq.set_broker(RedisBroker(url=os.environ.get("BENCH_REDIS_URL")))


@dramatiq.actor
def noop(number: int) -> None:
    tally.tick()


@dramatiq.actor
def lap(sent: float) -> None:
    tally.lap(sent)


def many(task: str, calls: Iterable[Any]) -> None:
    """There is no bulk call."""
    send = {"lap": lap}.get(task, noop).send
    for argument in calls:
        send(argument)


one = many


def work(processes: int, task: str) -> None:
    binary = os.path.join(os.path.dirname(sys.executable), "dramatiq")
    os.execv(binary, [binary, "benchmarks.rivals.dramatiq", "-p", str(processes), "-t", "8", "--skip-logging"])
