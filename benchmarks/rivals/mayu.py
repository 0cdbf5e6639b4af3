"""mayu: a Rust core."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from mayu import App

from benchmarks import tally

ABOUT = {
    "packages": ["mayu==0.2.5"],
    "least": [3, 13],
    "guarantee": "at least once (re-claimed after visibility_timeout, 30 s)",
    "settings": "process mode (a Python with the GIL), one process, no results",
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
def lap(sent: float) -> None:
    tally.lap(sent)


TASKS: dict[str, Any] = {"noop": noop, "noop_sync": noop_sync, "lap": lap}


def many(task: str, calls: Iterable[Any]) -> None:
    """There is no bulk call."""
    send = TASKS[task].send
    for argument in calls:
        send(argument)


one = many


def work(processes: int, task: str) -> None:
    binary = os.path.join(os.path.dirname(sys.executable), "mayu")
    words = ["--mode", "process", "--processes", str(processes), "--prefetch-multiplier", "200", "--log-level", "ERROR"]
    os.execv(binary, [binary, "worker", *words, "benchmarks.rivals.mayu:app"])
