"""tarsk with Redis Streams: supervision and leases in Rust."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from tarsk import App

from benchmarks import tally

ABOUT = {
    "packages": ["tarsk-redis==0.2.1"],
    "guarantee": "at least once (leases by the task's timeout)",
    "settings": "one child with 100 slots (the default), results off",
    "handlers": "both",
}
app = App(broker=os.environ.get("BENCH_REDIS_URL", "redis://127.0.0.1"))


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


def many(task: str, calls: Iterable[Any]) -> None:
    """There is no bulk call."""
    send = TASKS[task].send
    for argument in calls:
        send(argument)


one = many


def work(processes: int, task: str) -> None:
    binary = os.path.join(os.path.dirname(sys.executable), "tarsk")
    words = ["--app", "benchmarks.rivals.tarsk:app", "--broker", os.environ["BENCH_REDIS_URL"], "--queues", "default"]
    os.execv(binary, [binary, "worker", *words, "--children", str(processes)])
