"""BullMQ on Node: bullmq.cjs does it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

ABOUT = {
    "packages": ["bullmq==6.7.0", "ioredis==5.8.2"],
    "runtime": "node",
    "guarantee": "at least once (stalled jobs are found by their lock, 30 s)",
    "settings": "concurrency=200 in one Node process, removeOnComplete, addBulk by 1,000",
    "handlers": "async",
}
SCRIPT = str(Path(__file__).with_suffix(".cjs"))


def _send(task: str, calls: Iterable[Any], together: int) -> None:
    """Node reads the arguments, a line for each round trip."""
    rest = iter(calls)
    with Popen(["node", SCRIPT, "send", task], stdin=PIPE, stdout=PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        while chunk := list(islice(rest, together)):
            child.stdin.write(" ".join(map(repr, chunk)) + "\n")
            child.stdin.flush()
            child.stdout.readline()
        child.stdin.close()


def many(task: str, calls: Iterable[Any]) -> None:
    _send(task, calls, 1_000)


def one(task: str, calls: Iterable[Any]) -> None:
    _send(task, calls, 1)


def work(processes: int, task: str) -> None:
    for _ in range(processes - 1):
        if os.fork() == 0:
            break
    os.execvp("node", ["node", SCRIPT, "work", task])
