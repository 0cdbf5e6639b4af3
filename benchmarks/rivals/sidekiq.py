"""Sidekiq on the system's Ruby: sidekiq.rb does it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

ABOUT = {
    "packages": ["sidekiq (the system's)"],
    "runtime": "ruby",
    "guarantee": "at most once (a killed process loses the jobs it runs; Pro's super_fetch does not)",
    "settings": "concurrency 10 (threads), push_bulk by 1,000",
    "handlers": "sync",
}
SCRIPT = str(Path(__file__).with_suffix(".rb"))


def _send(task: str, calls: Iterable[Any], together: int) -> None:
    """Ruby reads the arguments, a line for each round trip."""
    rest = iter(calls)
    with Popen(["ruby", SCRIPT, task], stdin=PIPE, stdout=PIPE, text=True) as child:
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
    binary = shutil.which("sidekiq") or "sidekiq"
    os.execv(binary, [binary, "-r", SCRIPT, "-c", "10", "-q", "default"])
