"""Forked processes that use one limiter as hard as they can: ``python -m benchmarks.limits.forks`` with JSON as argument.

It prints ``ready`` once every process has asked Redis something, and begins when it reads a line. Each process then writes
down the instants (CLOCK_MONOTONIC, which all processes of a machine share) at which ``acquire`` had returned.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop

import fastq

ROOT = Path(__file__).parent.parent.parent


# -- the side that starts them --------------------------------------------------------------------------------------------


class Forks:
    """``processes`` forks with ``tasks`` coroutines each that acquire for ``seconds``."""

    def __init__(self, url: str, options: dict[str, Any], folder: str, order: dict[str, Any]) -> None:
        self._folder = Path(folder)
        self._order = {"url": url, "options": options, "folder": folder, "tasks": 1, **order}
        command = [sys.executable, "-m", "benchmarks.limits.forks", json.dumps(self._order)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit("the forks did not start")

    def go(self) -> None:
        """Begin; all at once."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def uses(self) -> list[array[float]]:
        """Wait for their end; the instants of each process."""
        self.process.communicate(timeout=60)
        if self.process.returncode:
            raise SystemExit("a fork has failed")
        return [_read(path) for path in sorted(self._folder.glob("*.uses"))]


@contextmanager
def forks(processes: int, url: str, options: dict[str, Any], seconds: float, **order: Any) -> Iterator[Forks]:
    """Start them; they are gone at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="fastq-") as folder:
        made = Forks(url, options, folder, {"processes": processes, "seconds": seconds, **order})
        try:
            yield made
        finally:
            made.process.kill()  # its forks end with their pipe
            made.process.communicate()


def used(processes: int, url: str, options: dict[str, Any], seconds: float, **order: Any) -> list[array[float]]:
    """Run them from the beginning to the end."""
    with forks(processes, url, options, seconds, **order) as made:
        made.go()
        return made.uses()


def _read(path: Path) -> array[float]:
    times = array("d")
    times.frombytes(path.read_bytes())
    return times


# -- judging --------------------------------------------------------------------------------------------------------------


def over_bucket(times: list[float], rate: float, burst: float) -> float:
    """By how many units the worst of all spans of L seconds holds more than ``burst + rate × L``; 0 or less: none does.

    A burst so small that calls cannot be spaced as evenly over a network counts as docs/limits.md says.
    """
    if rate > 2:
        burst = max(burst, 1 + rate * 0.01)
    worst, lowest = float("-inf"), float("inf")
    for n, at in enumerate(sorted(times)):
        lowest = min(lowest, n - rate * at)
        worst = max(worst, n + 1 - rate * at - lowest - burst)
    return worst


def over_window(times: list[float], limit: int, seconds: float) -> int:
    """The same for a window: more than ``limit`` in any span of ``seconds``."""
    ordered, first, worst = sorted(times), 0, -limit
    for n, at in enumerate(ordered):
        while ordered[first] < at - seconds:
            first += 1
        worst = max(worst, n - first + 1 - limit)
    return worst


# -- the forks ------------------------------------------------------------------------------------------------------------


async def use(order: dict[str, Any], told: int, go: int) -> tuple[array[float], int]:
    app = fastq.FastQ(order["url"])
    limiter = app.limiter("shared", **order["options"])
    await limiter.state()
    os.write(told, b".")
    await asyncio.get_running_loop().run_in_executor(None, os.read, go, 1)
    times, end = array("d"), time.monotonic() + order["seconds"]

    async def one() -> None:
        note, clock, acquire = times.append, time.monotonic, limiter.acquire
        try:
            while (left := end - clock()) > 0:
                await acquire(left)
                note(clock())
        except TimeoutError:
            return

    await asyncio.gather(*(one() for _ in range(order["tasks"])))
    await app.aclose()
    return times, limiter.counts.requests


def child(number: int, order: dict[str, Any], told: int, go: int) -> None:
    times, _requests = uvloop.run(use(order, told, go))
    (Path(order["folder"]) / f"{number:04}.uses").write_bytes(times.tobytes())


def main(order: dict[str, Any]) -> int:
    heard, told = os.pipe()
    go, gone = os.pipe()
    pids = []
    for number in range(order["processes"]):
        pid = os.fork()
        if pid == 0:
            os.close(gone)
            child(number, order, told, go)
            os._exit(0)
        pids.append(pid)
    os.close(told)
    ready = 0
    while ready < len(pids):
        ready += len(os.read(heard, 100))
    print("ready", flush=True)
    sys.stdin.readline()
    os.close(gone)  # all of them read its end at once
    return max(os.waitpid(pid, 0)[1] for pid in pids)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])) != 0)
