"""What the features of a job cost: ``make bench-features`` (``python -m benchmarks.features [JOBS] [ROUNDS]``; a minute and a half).

A private server, one producer, one worker process, everything in one run. Per feature: a queue that is paused is filled, the worker is let at
it, and CPU time is read of the producer, of the worker (with the processes that it has) and of Redis, per job. The features take turns;
the median of the rounds counts, and its ratio to a plain job of the same run. Then the time from enqueue to result of an idle
worker, one job at a time, and what the memory engine takes to start and to be emptied.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import redis

import fastq
from fastq.broker.embedded import EmbeddedServer
from fastq.testing import Kit

app = fastq.FastQ(os.environ.get("BENCH_URL", "redis://localhost:6379/0"), result_ttl=0, concurrency=100)


@app.task
async def plain(n: int) -> None:
    """The measure of all others."""


@app.task(result_ttl=600)
async def result(n: int) -> int:
    return n


@app.task
async def progress(n: int, job: fastq.JobContext) -> None:
    await job.progress(n, 100_000)


@app.task
async def context(n: int, job: fastq.JobContext) -> None:
    """What `progress` is to be compared with: it takes the job, and says nothing."""


@app.task(unique="until_executed")
async def unique(n: int) -> None: ...


@app.task(idempotent=600)
async def idempotent(n: int) -> None: ...


@app.task
def thread(n: int) -> None:
    """What `process` is to be compared with: a plain function in a thread of the worker."""


@app.task(isolation="process")
def process(n: int) -> None: ...


class Feature(NamedTuple):
    """One row: the task, of how many jobs one is measured, and the row that it is compared with."""

    task: fastq.Task[..., Any]
    share: int = 1
    beside: str = "plain"


FEATURES = {
    "plain": Feature(plain),
    "result kept": Feature(result),
    "takes the JobContext": Feature(context),
    "progress, once per job": Feature(progress, beside="takes the JobContext"),
    'unique="until_executed"': Feature(unique),
    "idempotent": Feature(idempotent),
    "sync handler": Feature(thread, 4),
    'isolation="process"': Feature(process, 10, "sync handler"),
}
LAPS = 1_000
NUMBERS = itertools.count()  # no job is a duplicate of an earlier round's
PATIENCE = 120.0


class Cost(NamedTuple):
    """Per job: µs of CPU of each, µs of time from the word to begin to the last job's end."""

    producer: float
    worker: float
    redis: float
    wall: float


def cpu_of(pid: int) -> float:
    """Seconds of CPU of a process and of those that live below it."""
    used = time.clock_gettime((~pid << 3) | 2)  # the clock of another process, as clock_getcpuclockid(3) names it
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(OSError):  # gone just now
                used += cpu_of(int(child))
    return used


@contextlib.contextmanager
def worker(url: str) -> Iterator[int]:
    """One worker process that is ready; its pid."""
    environ = {**os.environ, "BENCH_URL": url, "FASTQ_LOG_LEVEL": "error"}
    words = [sys.executable, "-m", "fastq", "worker", "benchmarks.features:app"]
    child = subprocess.Popen(words, env=environ)
    try:
        job = result.enqueue_sync(0)
        job.result_sync(PATIENCE)
        yield child.pid
    finally:
        child.terminate()
        child.wait()


def measure(client: Any, server: int, pid: int, feature: Feature, jobs: int) -> Cost:
    """Fill, let go, read."""
    warm = feature.task.options(result_ttl=60).enqueue_sync(-1)  # its process, its thread and its scripts are there
    warm.result_sync(PATIENCE)
    app.queues.pause_sync()
    calls = [(next(NUMBERS),) for _ in range(jobs)]
    in_redis, here = cpu_of(server), time.process_time()
    feature.task.enqueue_many_sync(calls, ids=False)
    produced = time.process_time() - here
    there, began = cpu_of(pid), time.perf_counter()
    app.queues.resume_sync()
    key = app.keys("default").jobs
    while client.hlen(key) > 1:  # its mark, and the jobs
        time.sleep(0.002)
    wall = time.perf_counter() - began
    return Cost(*(used / jobs * 1e6 for used in (produced, cpu_of(pid) - there, cpu_of(server) - in_redis, wall)))


def pings(client: Any, laps: int) -> list[float]:
    """Milliseconds of one round trip by redis-py: what this machine is worth just now."""
    took = []
    for _ in range(laps):
        began = time.perf_counter()
        client.ping()
        took.append((time.perf_counter() - began) * 1e3)
    return sorted(took)


async def latencies(laps: int) -> list[float]:
    """Milliseconds from the call of enqueue to the result, one job at a time."""
    took = []
    for n in range(laps):
        began = time.perf_counter()
        await (await result.enqueue(n)).result(PATIENCE)
        took.append((time.perf_counter() - began) * 1e3)
    await app.aclose()
    return sorted(took)


def show(costs: dict[str, list[Cost]]) -> None:
    """The table."""
    middle = {
        name: Cost(*(statistics.median(column) for column in zip(*runs, strict=True))) for name, runs in costs.items()
    }
    print(f"\n{'µs per job':28}{'producer':>10}{'worker':>10}{'Redis':>10}{'time':>10}   in all, against")
    for name, cost in middle.items():
        other = FEATURES[name].beside
        ratio = sum(cost[:3]) / sum(middle[other][:3])
        print(
            f"{name:28}{cost.producer:10.1f}{cost.worker:10.1f}{cost.redis:10.1f}{cost.wall:10.1f}   {ratio:5.2f} x {other}"
        )


def engine() -> None:
    """What `FastQ("memory://")` and `Kit` take."""
    starts = []
    for _ in range(7):
        began = time.perf_counter()
        server = EmbeddedServer().start()
        starts.append((time.perf_counter() - began) * 1e3)
        server.stop()
    print(f"memory engine: start {statistics.median(starts):.1f} ms (of 7: {min(starts):.1f} to {max(starts):.1f})")
    resets, tests = [], fastq.FastQ("memory://")
    server = EmbeddedServer().start()
    for _ in range(300):
        with Kit(tests, server=server):
            for n in range(10):
                tests.enqueue_sync("anything", n)
            began = time.perf_counter()
            server.ask(b"FLUSHALL")
            resets.append((time.perf_counter() - began) * 1e3)
    began = time.perf_counter()
    for _ in range(300):
        with Kit(tests, server=server):
            pass
    whole = (time.perf_counter() - began) / 300 * 1e3
    server.stop()
    print(
        f"memory engine: reset {statistics.median(resets):.3f} ms with 10 jobs in it; a Kit opened and closed {whole:.3f} ms"
    )


def main(jobs: int, rounds: int) -> None:
    """Everything."""
    server = EmbeddedServer().start()
    client = redis.Redis.from_url(server.url)
    app.adopt(fastq.FastQ(server.url, result_ttl=0, concurrency=100).settings)
    costs: dict[str, list[Cost]] = {name: [] for name in FEATURES}
    try:
        with worker(server.url) as pid:
            for _ in range(rounds):
                for name, feature in FEATURES.items():
                    costs[name].append(
                        measure(client, int(client.info("server")["process_id"]), pid, feature, jobs // feature.share)
                    )
            took, bare = asyncio.run(latencies(LAPS)), pings(client, LAPS)
    finally:
        app.close()
        server.stop()
    show(costs)
    p50, p99 = took[len(took) // 2], took[len(took) * 99 // 100]
    print(
        f"\nfrom enqueue to result, idle worker, {LAPS:,} laps: p50 {p50:.2f} ms, p99 {p99:.2f} ms"
        f" (a PING by redis-py: {bare[LAPS // 2]:.2f} and {bare[LAPS * 99 // 100]:.2f} ms)"
    )
    engine()


if __name__ == "__main__":
    # By the name under which the worker imports it, and its tasks with it.
    numbers = [int(word) for word in sys.argv[1:]]
    importlib.import_module("benchmarks.features").main(*(numbers + [40_000, 3][len(numbers) :]))
