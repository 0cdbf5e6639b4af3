"""The gate of CI: counts that do not jitter, and ratios between processes that took turns in one run.

Absolute times are not looked at: CI's two cores are shared, and everything may take three times as long from one minute to the
next. What is compared was measured alternately (A B A B), the median of the pairs counts, and a pair shares its weather.

Counts do not depend on the weather: their margins are small. Ratios of CPU time per job move by a quarter either way (caches
are shared with the neighbours), ratios of rates by more: their margins are wide, so that they tell a mistake and never a bad
minute. What they would miss is seen in the history (docs/performance.md).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.load.candidates import FASTQ, FLOORS, fill, rival
from benchmarks.load.lab import Drain, Redis, Stuck, drain, private_server, running, until
from benchmarks.rivals.environment import Missing

__all__ = ["LIMITS", "Figures", "faults", "main", "measure"]

JOBS = 40_000
ROUNDS = 3
RIVALS = {"dramatiq": 3_000, "arq": 1_500}
"""The fastest of the widely used ones that run on any Python, and the best known asyncio one; jobs of a drain."""


class Figures(NamedTuple):
    """What the gate looks at."""

    commands: float  # per job, sent by the worker
    round_trips: float  # per job
    executed: float  # commands per job that Redis ran, scripts included
    bytes_per_job: float  # of Redis, pending
    blocks: float  # of the worker's memory that a running job holds
    cpu: float  # worker CPU per job, as a multiple of the redis-py floor's
    rate: float  # drain rate, as a share of the redis-py floor's
    rivals: dict[str, float]  # drain rate, as a multiple of theirs


class Limit(NamedTuple):
    """The worst that passes, and why there."""

    most: float
    why: str


LIMITS = {
    "commands": Limit(0.05, "the promise of docs/performance.md; 0.02 is usual: two calls for each 100 jobs"),
    "round_trips": Limit(0.03, "one write for each turn of 100 jobs is 0.01, and a large turn takes two reads"),
    "executed": Limit(
        0.25, "0.06 to 0.12: about 20 commands in the two scripts of a turn; one command per job more would be 1.1"
    ),
    "bytes_per_job": Limit(
        175, "153 for 20,000 jobs, hash tables half empty; a field or a key per job costs 50 and more"
    ),
    "blocks": Limit(30, "23 today; an object more per running job is one block, a list of ten is two"),
    "cpu": Limit(2.0, "0.8 to 1.3 between a quiet machine and a busy one; 10 µs of Python per job make it 2.5"),
}
SHARE_OF_FLOOR = 0.5
"""0.9 to 1.5 is usual. Below a half, a round trip or a task more per job is likely."""

TIMES_RIVAL = {"dramatiq": 10.0, "arq": 16.0}
"""24 and 58 on a busy machine, where the scheduler of the kernel favours whoever sleeps most; 70 and 72 on a quiet one."""


def faults(figures: Figures) -> list[str]:
    """What is worse than it may be; empty when all is well."""
    found = [
        f"{name}: {getattr(figures, name):.3f}, must be {limit.most} or less ({limit.why})"
        for name, limit in LIMITS.items()
        if not getattr(figures, name) <= limit.most
    ]
    if not figures.rate >= SHARE_OF_FLOOR:
        found.append(f"rate: {figures.rate:.2f} of the redis-py floor, must be {SHARE_OF_FLOOR} or more")
    for name, times in figures.rivals.items():
        if not times >= TIMES_RIVAL[name]:
            found.append(f"{name}: {times:.1f} times its rate, must be {TIMES_RIVAL[name]} or more")
    return found


def measure(
    redis: Redis, rivals: Sequence[str] = tuple(RIVALS), rounds: int = ROUNDS, jobs: int = JOBS, **environ: str
) -> Figures:
    """Every figure; ``environ`` is the worker's, for planted regressions.

    Raises:
        Stuck: something did not get on.
        Missing: a rival cannot be installed.
    """
    ours = FASTQ._replace(environ=environ)
    others = {name: rival(name).candidate for name in rivals}
    mine: list[Drain] = []
    floor: list[Drain] = []
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        mine.append(drain(redis, ours, jobs))
        floor.append(drain(redis, FLOORS["redis-py"], jobs))
        for name, other in others.items():
            times[name].append(mine[-1].jobs_per_second / drain(redis, other, RIVALS[name]).jobs_per_second)
    pairs = list(zip(mine, floor, strict=True))
    return Figures(
        min(d.sent for d in mine),
        min(d.reads for d in mine),
        min(d.executed for d in mine),
        _bytes_per_job(redis),
        _blocks(redis, environ),
        statistics.median(a.worker_us / b.worker_us for a, b in pairs),
        statistics.median(a.jobs_per_second / b.jobs_per_second for a, b in pairs),
        {name: statistics.median(found) for name, found in times.items()},
    )


def _bytes_per_job(redis: Redis) -> float:
    redis.clear()
    before = redis.memory()
    fill(redis.url, "noop", 20_000)
    return (redis.memory() - before) / 20_000


def _blocks(redis: Redis, environ: dict[str, str]) -> float:
    """Blocks of memory that one running job holds: CPython counts them, and they are the same on every machine.

    (What is allocated and freed again within a job is not counted by any released CPython.)
    """
    redis.clear()
    with running(FASTQ.worker(redis.url, 1, "hold"), redis.url, **environ) as (_, marks):
        found = []
        for step, jobs in enumerate((20, 30, 30)):  # the first ones fill caches
            fill(redis.url, "hold", jobs)
            time.sleep(0.3)
            fill(redis.url, "weigh", 1)
            until(lambda step=step: len(marks.laps()) == step + 1, 20)  # type: ignore[misc]
            found.append(marks.lines()[0][-1][1])
    return (found[2] - found[1]) / 30


def main() -> int:
    """``make bench-gate``: print every figure; 1 when there is a fault."""
    begun = time.monotonic()
    try:
        with private_server() as redis:
            figures = measure(redis)
    except (Stuck, Missing) as error:
        sys.stdout.write(f"FAULT: {error}\n")
        return 1
    for name, limit in LIMITS.items():
        sys.stdout.write(f"bench-gate: {name} {getattr(figures, name):.3f} (at most {limit.most})\n")
    sys.stdout.write(f"bench-gate: rate {figures.rate:.2f} of the redis-py floor (at least {SHARE_OF_FLOOR})\n")
    for name, times in figures.rivals.items():
        sys.stdout.write(f"bench-gate: {times:.1f} times {name} (at least {TIMES_RIVAL[name]})\n")
    for fault in (found := faults(figures)):
        sys.stdout.write(f"FAULT: {fault}\n")
    sys.stdout.write(f"bench-gate: {'FAILED' if found else 'passed'} in {time.monotonic() - begun:.0f} s\n")
    return 1 if found else 0
