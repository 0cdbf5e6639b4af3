"""The load driver: real processes, a private server, every figure of one run on one machine."""

from __future__ import annotations

import asyncio
import os
import platform
import statistics
import time
from typing import NamedTuple

import uvloop

from benchmarks.load.app import app, lap, noop
from benchmarks.load.candidates import FASTQ, FLOORS, aim, fill
from benchmarks.load.lab import Drain, Redis, drain, private_server, running, until
from fastq.broker.keys import QueueKeys

KEYS = QueueKeys("fastq", "default")


class Enqueue(NamedTuple):
    """Jobs per second of one producer process."""

    one_by_one: float
    concurrent: float
    many: float
    sync: float
    round_trips: float  # per job, 500 concurrent callers


def enqueue_rates(redis: Redis, jobs: int) -> Enqueue:
    """One by one, 500 at a time, in bulk; on uvloop, no worker running."""
    redis.clear()
    return uvloop.run(_enqueue_rates(redis, jobs))


async def _enqueue_rates(redis: Redis, jobs: int) -> Enqueue:
    await noop.enqueue(0)
    few = jobs // 10
    start = time.perf_counter()
    for n in range(few):
        await noop.enqueue(n)
    one = few / (time.perf_counter() - start)
    calls = redis.sent()
    start = time.perf_counter()
    for _ in range(few // 500):
        await asyncio.gather(*(noop.enqueue(n) for n in range(500)))
    rounds = few // 500 * 500
    concurrent = rounds / (time.perf_counter() - start)
    trips = (redis.sent() - calls) / rounds
    start = time.perf_counter()
    await noop.enqueue_many(((n,) for n in range(jobs)), ids=False)
    many = jobs / (time.perf_counter() - start)
    start = time.perf_counter()
    for n in range(few):
        noop.enqueue_sync(n)
    sync = few / (time.perf_counter() - start)
    await app.aclose()
    return Enqueue(one, concurrent, many, sync, trips)


def latency(redis: Redis, laps: int) -> tuple[float, float]:
    """p50 and p99 in ms from the call of enqueue to the first line of the handler, one idle worker, 100 jobs/s."""
    redis.clear()
    with running(FASTQ.worker(redis.url, 1, "lap"), redis.url) as (_, marks):
        until(lambda: redis.call("EXISTS", KEYS.workers) == 1)
        uvloop.run(_laps(laps))
        until(lambda: len(marks.laps()) == laps, 20)
        times = marks.laps()
    return statistics.median(times) * 1e3, times[len(times) * 99 // 100] * 1e3


async def _laps(laps: int) -> None:
    for _ in range(laps):
        await lap.enqueue(time.monotonic())
        await asyncio.sleep(0.01)
    await app.aclose()


def bytes_per_job(redis: Redis, jobs: int) -> float:
    """Memory of Redis per pending job."""
    redis.clear()
    before = redis.memory()
    fill(redis.url, "noop", jobs)
    return (redis.memory() - before) / jobs


class Figures(NamedTuple):
    """Everything that one run measures."""

    machine: str
    server: str
    fastq: Drain
    bare: Drain
    enqueue: Enqueue
    p50_ms: float
    p99_ms: float
    bytes_per_job: float


def measure(jobs: int = 100_000, laps: int = 400, repeats: int = 3) -> Figures:
    """One run: the drains alternate, the best of each counts (the machine's noise only ever slows down)."""
    with private_server() as redis:
        aim(redis.url)
        ours, theirs = [], []
        for _ in range(repeats):
            ours.append(drain(redis, FASTQ, jobs))
            theirs.append(drain(redis, FLOORS["redis-py"], jobs))
        return Figures(
            f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.machine()}",
            redis.name(),
            max(ours),
            max(theirs),
            enqueue_rates(redis, jobs // 2),
            *latency(redis, laps),
            bytes_per_job(redis, jobs // 5),
        )


def report(f: Figures) -> str:
    """The table that `make bench` prints."""
    rows = [
        ("drain, 1 worker process, no-op jobs", f"{f.fastq.jobs_per_second:,.0f} jobs/s"),
        ("the bare loop", f"{f.bare.jobs_per_second:,.0f} jobs/s"),
        ("ratio", f"{f.fastq.jobs_per_second / f.bare.jobs_per_second:.2f}"),
        ("worker CPU per job (bare loop)", f"{f.fastq.worker_us:.1f} µs ({f.bare.worker_us:.1f})"),
        ("Redis CPU per job (bare loop)", f"{f.fastq.redis_us:.1f} µs ({f.bare.redis_us:.1f})"),
        ("commands from the client per job", f"{f.fastq.sent:.3f}"),
        ("enqueue one by one", f"{f.enqueue.one_by_one:,.0f} jobs/s"),
        ("enqueue_sync one by one", f"{f.enqueue.sync:,.0f} jobs/s"),
        ("enqueue, 500 concurrent callers", f"{f.enqueue.concurrent:,.0f} jobs/s"),
        ("  round trips per job of these", f"{f.enqueue.round_trips:.4f}"),
        ("enqueue_many", f"{f.enqueue.many:,.0f} jobs/s"),
        ("enqueue to start, idle worker, p50 / p99", f"{f.p50_ms:.2f} / {f.p99_ms:.2f} ms"),
        ("Redis memory per pending job", f"{f.bytes_per_job:.0f} bytes"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join([f"{f.machine}, {f.server}, one run", "", *lines])
