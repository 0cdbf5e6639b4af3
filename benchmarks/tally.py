"""What every handler of every candidate does, so that all are measured by the same stopwatch: it counts.

Standard library only: it is imported in every rival's own environment. Each process writes a line ``ns count`` at each
100th job (``ns``: the machine's monotonic clock, one for all processes) into a file of its own in ``BENCH_MARKS``. That
costs 0.1 µs a job, for everybody alike, and asks Redis nothing.
"""

from __future__ import annotations

import itertools
import os
import time

from benchmarks import sampler

STEP = 100
SAMPLED = (20_000, 400_000)
"""From which to which job a process samples its own stack, when it is asked to (benchmarks/sampler.py)."""

_count = itertools.count(1).__next__  # one step of C: threads do not lose any
_file = 0


def _write(line: str) -> None:
    global _file  # noqa: PLW0603 - opened in the process that runs the jobs, after its fork
    if not _file:
        path = os.path.join(os.environ["BENCH_MARKS"], f"{os.getpid()}")
        _file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(_file, line.encode())


def tick() -> None:
    """One job was started."""
    count = _count()
    if count % STEP == 0:
        _write(f"{time.monotonic_ns()} {count}\n")
        if count in SAMPLED and "BENCH_SAMPLES" in os.environ:
            sampler.start() if count == SAMPLED[0] else sampler.write()


def lap(sent: float) -> None:
    """A job that was enqueued at ``sent`` (monotonic seconds) was started."""
    now = time.monotonic()
    _write(f"{int(now * 1e9)} {int((now - sent) * 1e9)}\n")


def note(value: int) -> None:
    """Any number."""
    _write(f"{time.monotonic_ns()} {value}\n")


def fork(processes: int) -> None:
    """Go on as so many processes, for libraries that leave that to a process manager."""
    for _ in range(processes - 1):
        if os.fork() == 0:
            return
