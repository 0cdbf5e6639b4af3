"""Jobs behind limits, by real workers: what a limit costs, what it holds, and whom it keeps waiting.

``python -m benchmarks.limits.jobs`` prints the table; ``make bench-limits`` runs it after the limiters alone.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks.limits import app as application
from benchmarks.limits.forks import over_bucket
from benchmarks.load.lab import Candidate, Marks, Redis, drain, module, private_server, running, until

app = application.app
BACKLOG = 100_000


class Use(NamedTuple):
    """A rate under backlog."""

    rate: int
    processes: int
    jobs: int
    share: float  # of what the rate yields from the first job on
    excess: float  # above burst + rate × L in the worst of all spans; 0 or less: none
    commands: float  # of clients per job, everything from the worker's start on


class Figures(NamedTuple):
    """Everything that one run measures."""

    free: float  # jobs a second without a limit
    wide: float  # with one that never denies
    behind: float  # jobs a second without a limit, behind 100,000 that may not run, which are parked meanwhile
    aside: float  # the same when these are parked already
    alone_ms: tuple[float, float]  # p50, p99 from enqueue to start, at 200 a second, nothing else there
    beside_ms: tuple[float, float]  # the same beside 100,000 parked jobs
    parking_us: float  # worker CPU per job that is parked
    uses: list[Use]


def _fill(url: str, task: str, jobs: int) -> None:
    async def run() -> None:
        await app.tasks[task].enqueue_many(((n,) for n in range(jobs)), ids=False)
        await app.aclose()

    app.adopt(msgspec.structs.replace(app.settings, url=url))
    asyncio.run(run())


def _words(url: str, processes: int, task: str) -> list[str]:
    name = "benchmarks.limits.app:app"
    if processes == 1:
        return module("fastq", "worker", name, "--log-level", "error")
    return module("fastq", "supervise", name, "--log-level", "error", "--workers", str(processes))


CANDIDATE = Candidate("fastq", _fill, _words)


def _behind(url: str, task: str, jobs: int) -> None:
    _fill(url, "shut", BACKLOG)
    _fill(url, "free", jobs)


def use(redis: Redis, rate: int, processes: int, seconds: float) -> Use:
    """Workers with more than enough jobs of one rate for some seconds."""
    redis.clear()
    _fill(redis.url, f"at_{rate}", int(rate * (seconds + 3)) + 100)
    redis.call("CONFIG", "RESETSTAT")
    with running(_words(redis.url, processes, ""), redis.url) as (_, marks):
        until(lambda: _times(marks))
        begun = time.monotonic()
        until(lambda: time.monotonic() >= begun + seconds, seconds + 5, pause=0.05)
        sent = redis.sent()
        times = _times(marks)
    filled = [at for at in times if at > times[0] + 1.0]  # the burst, and what the workers' start cost, are over
    share = (len(filled) - 1) / (rate * (filled[-1] - filled[0]))
    return Use(rate, processes, len(times), share, over_bucket(times, rate, rate), sent / len(times))


def _times(marks: Marks) -> list[float]:
    found = array("d")
    for path in Path(marks._folder).glob("*.times"):
        data = path.read_bytes()
        found.frombytes(data[: len(data) // 8 * 8])
    return sorted(found)


def _parked(redis: Redis) -> int:
    return int(redis.call("HLEN", b"fastq:{default}:parked:of"))


def _latency(redis: Redis, laps: int, backlog: int) -> tuple[float, float]:
    redis.clear()
    if backlog:
        _fill(redis.url, "shut", backlog)
    with running(_words(redis.url, 1, ""), redis.url) as (_, marks):
        until(lambda: redis.call("ZCARD", b"fastq:{default}:workers") and _parked(redis) >= backlog - 1)
        _send_laps(redis.url, laps)
        until(lambda: len(marks.laps()) >= laps)
        taken = marks.laps()
    return taken[len(taken) // 2] * 1e3, taken[len(taken) * 99 // 100] * 1e3


def _send_laps(url: str, laps: int) -> None:
    async def run() -> None:
        for _ in range(laps):
            await app.enqueue("lap", time.monotonic())
            await asyncio.sleep(0.005)
        await app.aclose()

    app.adopt(msgspec.structs.replace(app.settings, url=url))
    asyncio.run(run())


def _aside(redis: Redis, jobs: int) -> tuple[float, float]:
    """Jobs a second beside parked ones, and the worker's CPU per job that it parks, in µs."""
    redis.clear()
    _fill(redis.url, "shut", BACKLOG)
    with running(_words(redis.url, 1, ""), redis.url) as (process, marks):
        until(lambda: _parked(redis) > BACKLOG // 10)
        first, cpu = _parked(redis), process.cpu()
        until(lambda: _parked(redis) >= BACKLOG * 9 // 10)
        parking = (process.cpu() - cpu) / (_parked(redis) - first) * 1e6
        until(lambda: _parked(redis) >= BACKLOG - 1)
        _fill(redis.url, "free", jobs)
        until(lambda: marks.count() >= jobs * 9 // 10)
        spent, done = marks.between(jobs // 10, jobs * 9 // 10)
    return done / spent, parking


def measure(jobs: int = 60_000, seconds: float = 5.0, repeats: int = 3) -> Figures:
    """Run everything, candidates in turn."""
    with private_server() as redis:
        rates: dict[str, list[float]] = {"free": [], "wide": [], "behind": [], "aside": []}
        parking: list[float] = []
        for _ in range(repeats):
            rates["free"].append(drain(redis, CANDIDATE, jobs, task="free").jobs_per_second)
            rates["wide"].append(drain(redis, CANDIDATE, jobs, task="wide").jobs_per_second)
            behind = CANDIDATE._replace(fill=_behind)
            rates["behind"].append(drain(redis, behind, jobs, task="free").jobs_per_second)
            aside, cost = _aside(redis, jobs)
            rates["aside"].append(aside)
            parking.append(cost)
        best = {name: statistics.median(found) for name, found in rates.items()}
        return Figures(
            **best,
            alone_ms=_latency(redis, 600, 0),
            beside_ms=_latency(redis, 600, BACKLOG),
            parking_us=statistics.median(parking),
            uses=[use(redis, rate, processes, seconds) for rate in (10, 1_000, 10_000) for processes in (1, 4)],
        )


def report(f: Figures) -> str:
    """The table."""
    lines = [
        "jobs behind limits                                   jobs/s   ratio",
        f"no limit                                          {f.free:>9,.0f}    1.00",
        f"one that never denies                             {f.wide:>9,.0f}    {f.wide / f.free:.2f}",
        f"no limit, behind {BACKLOG:,} that may not run, at once {f.behind:>8,.0f}    {f.behind / f.free:.2f}",
        f"no limit, {BACKLOG:,} parked                        {f.aside:>9,.0f}    {f.aside / f.free:.2f}",
        f"latency p50/p99, alone: {f.alone_ms[0]:.2f}/{f.alone_ms[1]:.2f} ms",
        f"beside {BACKLOG:,} parked: {f.beside_ms[0]:.2f}/{f.beside_ms[1]:.2f} ms",
        f"worker CPU per job that is parked: {f.parking_us:.1f} µs",
        "rate  processes   jobs   share   excess  commands/job",
    ]
    lines += [
        f"{u.rate:>6}/s {u.processes:>3} {u.jobs:>9,} {u.share:>7.1%} {u.excess:>8.2f} {u.commands:>8.2f}"
        for u in f.uses
    ]
    return "\n".join(lines)


def faults(figures: Sequence[Use]) -> list[str]:
    """What must not be."""
    return [f"{u.rate}/s by {u.processes}: {u.excess:.2f} units over" for u in figures if u.excess > 0]


if __name__ == "__main__":
    figures = measure()
    sys.stdout.write(report(figures) + "\n")
    sys.exit(1 if faults(figures.uses) else 0)
