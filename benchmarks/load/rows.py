"""The rows: each measures one thing once and writes it into the book; the driver repeats and interleaves them."""

from __future__ import annotations

import asyncio
import compileall
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop

from benchmarks import floor
from benchmarks.load.app import app, lap, noop, silent
from benchmarks.load.book import Book
from benchmarks.load.candidates import FASTQ, FLOORS, Rival, aim, fill, fill_here
from benchmarks.load.lab import Candidate, Marks, Redis, Stuck, drain, module, private_server, running, until
from fastq.broker import scripts
from fastq.broker.keys import QueueKeys

KEYS = QueueKeys("fastq", "default")
DRAIN = "drain, 1 worker process"
TWO = "drain, 2 worker processes"
SYNC = "drain, sync handlers"
KEPT = "drain, results kept for 1 h"
LIMITED = "drain, one rate limit that never denies"
TOGETHER = "producer and worker together"
MANY, BURST, ONE = "enqueue many", "enqueue, 500 concurrent callers", "enqueue one at a time"
P50, P99 = "latency of an idle worker at 100/s, p50", "latency of an idle worker at 100/s, p99"
HALF, OFFERED = "latency under half load, p99", "jobs that were offered under half load"
SENT, TRIPS = "commands per job from the client", "round trips per job"
WORKER_US, REDIS_US = "worker CPU per job", "Redis CPU per job, reserve and settle"
STORED_US = "Redis CPU per job, enqueue"
IDLE_COMMANDS, IDLE_CPU, BUSY_CPU = "idle worker, commands", "idle worker, CPU", "worker at 100 jobs/s, CPU"
BYTES = "Redis memory per pending job"
BACKLOG = "drain beside a backlog"
PROMOTED = "promotion of due jobs"
RSS, SLOPE = "worker RSS after its jobs", "growth of worker RSS in the second half"
RAW = "Redis alone, redis-benchmark"
IMPORT, FIRST = "import time", "start of a worker to its first job"


def drained(book: Book, redis: Redis, who: Candidate, jobs: int, row: str = DRAIN, **how: int | str) -> None:
    """One drain, with what it cost."""
    found = drain(redis, who, jobs, **how)  # type: ignore[arg-type]
    book.add(row, who.name, found.jobs_per_second, "jobs/s")
    if row == DRAIN:
        book.add(WORKER_US, who.name, found.worker_us, "µs")
        book.add(REDIS_US, who.name, found.redis_us, "µs")
        book.add(STORED_US, who.name, found.stored_us, "µs")
        if who is FASTQ or who.name in FLOORS:
            book.add(SENT, who.name, found.sent, "commands")
            book.add(TRIPS, who.name, found.reads, "round trips")


def together(book: Book, redis: Redis, who: Candidate, producer: list[str], seconds: float) -> None:
    """Jobs started per second while a producer enqueues as fast as it can."""
    redis.clear()
    words = who.worker(redis.url, 1, "noop")
    with (
        running(words, redis.url, **who.environ) as (_, marks),
        running(producer, redis.url, **who.environ) as _,
    ):
        until(lambda: marks.count() > 0, 30)
        time.sleep(0.5)
        first, begun = marks.count(), time.monotonic()
        time.sleep(seconds)
        done, spent = marks.count() - first, time.monotonic() - begun
    book.add(TOGETHER, who.name, done / spent, "jobs/s")


def own_producer() -> list[str]:
    """The side of fastq in :func:`together`."""
    return module("benchmarks.load", "produce")


async def produce() -> None:
    """Enqueue in bulk until ended."""
    while True:
        await fill_here("noop", 20_000)


# -- enqueue ----------------------------------------------------------------------------------


def enqueue_rates(book: Book, redis: Redis, jobs: int) -> None:
    """One producer process, no worker; with the rate of a bare round trip beside it."""
    redis.clear()
    aim(redis.url)
    uvloop.run(_enqueue_rates(book, redis, jobs))


async def _enqueue_rates(book: Book, redis: Redis, jobs: int) -> None:
    few = jobs // 10
    wire = await floor.connect(redis.url)
    smallest = await wire.call("SCRIPT", "LOAD", floor.STORE)
    plain = await wire.call("SCRIPT", "LOAD", scripts.load("enqueue_plain").text)
    await noop.enqueue(0)
    for turn in range(3):
        with _rate(book, ONE, "fastq", few):
            for n in range(few):
                await noop.enqueue(n)
        with _rate(book, ONE, "a bare round trip", few):
            for _n in range(few):
                await wire.call("RPUSH", "bench:list", "x" * 68)
        with _rate(book, ONE, "floor: the smallest script that stores a job", few):
            for _n in range(few):
                await floor.store_one(wire, smallest, b"x" * 68)
        with _rate(book, ONE, "floor: fastq's script", few):
            for n in range(few):
                await floor.call_plain(wire, plain, n + 1 + few * turn, b"x" * 68)
        with _rate(book, ONE, "fastq, enqueue_sync", few):
            for n in range(few):
                noop.enqueue_sync(n)
        with _rate(book, BURST, "fastq", few):
            for _n in range(few // 500):
                await asyncio.gather(*(noop.enqueue(n) for n in range(500)))
        with _rate(book, BURST, "floor: a Task for each, two commands for all", few):
            for _n in range(few // 500):
                await floor.store_at_once(wire, b"x" * 68, 500)
        with _rate(book, MANY, "fastq", jobs):
            await fill_here("noop", jobs)
        with _rate(book, MANY, "floor", jobs):
            await floor.enqueue(wire, jobs)
        redis.clear()
    await app.aclose()


@contextmanager
def _rate(book: Book, row: str, who: str, jobs: int) -> Iterator[None]:
    start = time.perf_counter()
    yield
    book.add(row, who, jobs / (time.perf_counter() - start), "jobs/s")


def raw_rates(book: Book, redis: Redis) -> None:
    """What the server can do at most, by its own tool."""
    redis.clear()
    for name, rate in floor.raw_rates(redis.url).items():
        book.add(RAW, name, rate, "commands/s")
    redis.clear()


# -- latency ----------------------------------------------------------------------------------


def _percentiles(book: Book, who: str, marks: Marks) -> None:
    laps = marks.laps()
    book.add(P50, who, laps[len(laps) // 2] * 1e3, "ms")
    book.add(P99, who, laps[len(laps) * 99 // 100] * 1e3, "ms")


def idle_latency(book: Book, redis: Redis, laps: int) -> None:
    """From the call of enqueue to the first line of the handler; and what the worker burns meanwhile and before."""
    redis.clear()
    aim(redis.url)
    with running(FASTQ.worker(redis.url, 1, "lap"), redis.url) as (process, marks):
        until(lambda: redis.call("EXISTS", KEYS.workers) == 1)
        time.sleep(1.0)
        commands, cpu, begun = redis.sent(), process.cpu(), time.monotonic()
        time.sleep(4.0)
        spent = time.monotonic() - begun
        book.add(IDLE_COMMANDS, "fastq", (redis.sent() - commands) / spent, "commands/s")
        book.add(IDLE_CPU, "fastq", (process.cpu() - cpu) / spent * 100, "% of a core")
        cpu, begun = process.cpu(), time.monotonic()
        uvloop.run(_laps(laps))
        until(lambda: len(marks.laps()) == laps, 20)
        book.add(BUSY_CPU, "fastq", (process.cpu() - cpu) / (time.monotonic() - begun) * 100, "% of a core")
        _percentiles(book, "fastq", marks)


def _at_rest() -> None:
    """This process's garbage collector leaves alone what the benchmark has imported: 15 ms in the middle of a lap, seen here.

    The worker does so by itself, and a rival's producer is a process of its own with little in it.
    """
    gc.collect()
    gc.freeze()


async def _laps(laps: int) -> None:
    _at_rest()
    for _ in range(laps):
        await lap.enqueue(time.monotonic())
        await asyncio.sleep(0.01)
    await app.aclose()


def floor_latency(book: Book, redis: Redis, kind: str, laps: int) -> None:
    """The same of the shortest possible ways."""
    redis.clear()
    with running(module("benchmarks.floor", kind, redis.url), redis.url) as (process, marks):
        until(lambda: redis.info("clients")["blocked_clients"] == "1")  # it has started
        cpu, begun = process.cpu(), time.monotonic()
        _at_rest()
        uvloop.run(floor.send_laps(redis.url, kind, laps))
        until(lambda: len(marks.laps()) == laps, 20)
        book.add(BUSY_CPU, f"floor: {kind}", (process.cpu() - cpu) / (time.monotonic() - begun) * 100, "% of a core")
        _percentiles(book, f"floor: {kind}", marks)


def rival_latency(book: Book, redis: Redis, rival: Rival, laps: int) -> None:
    """The same of a rival."""
    redis.clear()
    who = rival.candidate
    with running(who.worker(redis.url, 1, "lap"), redis.url, **who.environ) as (_, marks):
        rival.send(redis.url, "paced", 20, 10)  # until the first ones are through it was still starting
        until(lambda: len(marks.laps()) == 20, 30)
        rival.send(redis.url, "paced", laps, 100)
        until(lambda: len(marks.lines()[0]) == laps + 20, 20)
        times = sorted(value / 1e9 for rows in marks.lines() for _, value in rows[20:])
        book.add(P50, who.name, times[len(times) // 2] * 1e3, "ms")
        book.add(P99, who.name, times[len(times) * 99 // 100] * 1e3, "ms")


def half_load(book: Book, redis: Redis, jobs: int, seconds: float) -> None:
    """Laps at 100/s among no-ops that arrive evenly at half of the rate at which a worker has just drained ``jobs``."""
    rate = drain(redis, FASTQ, jobs).jobs_per_second / 2
    book.add(OFFERED, "fastq", rate, "jobs/s")
    _under(book, redis, "fastq", FASTQ.worker(redis.url, 1, "lap"), rate, seconds)
    _under(book, redis, "floor: mixed", module("benchmarks.floor", "mixed", redis.url), rate, seconds)


def _under(book: Book, redis: Redis, who: str, worker: list[str], rate: float, seconds: float) -> None:
    redis.clear()
    redis.call("CONFIG", "RESETSTAT")
    aim(redis.url)
    with running(worker, redis.url) as (_, marks):
        until(lambda: "cmdstat_evalsha" in redis.info("commandstats"))  # it has started
        laps = int(seconds * 100)
        uvloop.run(_mixed(laps, rate))
        until(lambda: len(marks.laps()) == laps, 20)
        times = marks.laps()
    book.add(HALF, who, times[len(times) * 99 // 100] * 1e3, "ms")


async def _mixed(laps: int, rate: float) -> None:
    """
    Raises:
        Stuck: this process cannot make so many.
    """
    most = max(int(rate / 100), 1)
    _at_rest()
    begun, sent = time.monotonic(), 0
    for n in range(laps):
        await lap.enqueue(time.monotonic())
        while (spent := time.monotonic() - begun) < (n + 1) / 100:
            due = min(int(spent * rate) - sent, most)
            await silent.enqueue_many(zip(range(due), strict=False), ids=False)
            sent += due
            await asyncio.sleep(0.001)
    await app.aclose()
    if sent < 0.9 * rate * laps / 100:
        raise Stuck(f"{sent / laps * 100:,.0f} jobs a second were enqueued, not {rate:,.0f}")


# -- size -------------------------------------------------------------------------------------


def bytes_per_job(book: Book, redis: Redis, who: Candidate, jobs: int) -> None:
    """Redis memory of a filled queue."""
    redis.clear()
    before = redis.memory()
    who.fill(redis.url, "noop", jobs)
    book.add(BYTES, who.name, (redis.memory() - before) / jobs, "bytes")


def backlog(book: Book, redis: Redis, pending: int, scheduled: int, queues: int, limits: int, jobs: int) -> None:
    """The rate of the first ``jobs`` beside everything else on one server, and on one that has nothing else, in turn, nine times.

    Two servers: piling up takes a minute, and what is compared should be next to each other in time.
    """
    redis.clear()
    aim(redis.url)
    asyncio.run(_pile_up(redis, pending, scheduled, queues, limits))
    name = f"{pending:,} pending, {scheduled:,} scheduled, {queues:,} queues, {limits:,} limit keys"
    with private_server() as empty:
        for _ in range(9):
            empty.clear()
            _beside(book, empty, "empty server", jobs)
            _beside(book, redis, name, jobs)
    redis.clear()


def _beside(book: Book, redis: Redis, name: str, jobs: int) -> None:
    aim(redis.url)
    fill(redis.url, "noop", jobs)
    with running(FASTQ.worker(redis.url, 1, "noop"), redis.url) as (process, marks):
        until(lambda: marks.count() >= jobs * 9 // 10)
        spent, done = marks.between(jobs // 10, jobs * 9 // 10)
        book.add(BACKLOG, name, done / spent, "jobs/s")
        book.add("worker RSS beside a backlog", name, process.rss() / 2**20, "MiB")


async def _pile_up(redis: Redis, pending: int, scheduled: int, queues: int, limits: int) -> None:
    await fill_here("noop", pending)
    await noop.options(delay=86_400).enqueue_many(zip(range(scheduled), strict=False), ids=False)
    for n in range(queues):
        redis.call("RPUSH", f"fastq:{{other-{n}}}:ready:5", "x")
    for n in range(0, limits, 1_000):  # as acquire.lua leaves them
        words = [word for k in range(n, n + 1_000) for word in (f"fastq:{{limit/l/{k}}}:state:", "x" * 40)]
        redis.call("MSET", *words)
    await app.aclose()


def promotion(book: Book, redis: Redis, jobs: int) -> None:
    """Due jobs made ready per second by one scheduler."""
    redis.clear()
    aim(redis.url)

    async def schedule() -> None:
        await noop.options(delay=0.001).enqueue_many(zip(range(jobs), strict=False), ids=False)
        await app.aclose()

    asyncio.run(schedule())
    with running(module("fastq", "scheduler", "benchmarks.load.app:app", "--log-level", "error"), redis.url):
        ready: Callable[[], int] = lambda: redis.call("LLEN", KEYS.ready[5])  # noqa: E731
        until(lambda: ready() > jobs // 10)
        first, begun = ready(), time.monotonic()
        until(lambda: ready() > jobs * 9 // 10)
        book.add(PROMOTED, "fastq", (ready() - first) / (time.monotonic() - begun), "jobs/s")


def memory(book: Book, redis: Redis, jobs: int) -> None:
    """Resident memory of a worker after ``jobs``, and how it grew over the second half of them."""
    redis.clear()
    fill(redis.url, "noop", jobs)
    with running(FASTQ.worker(redis.url, 1, "noop"), redis.url) as (process, marks):
        until(lambda: marks.count() >= jobs // 2, 120)
        half = process.rss()
        until(lambda: marks.count() >= jobs * 99 // 100, 120)
        book.add(RSS, f"fastq, {jobs:,} jobs", process.rss() / 2**20, "MiB")
        book.add(SLOPE, f"fastq, {jobs:,} jobs", (process.rss() - half) / (jobs / 2) * 1e6 / 2**20, "MiB per 1 M jobs")


def starts(book: Book, redis: Redis) -> None:
    """``import fastq`` (without the interpreter's own start), and a cold worker to its first job; compiled, as pip leaves it."""
    compileall.compile_dir(Path(__file__).parents[2] / "fastq", quiet=1)

    def taken(code: str) -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - begun

    book.add(IMPORT, "fastq", (taken("import fastq") - taken("pass")) * 1e3, "ms")
    redis.clear()
    aim(redis.url)
    asyncio.run(_laps(1))
    with running(FASTQ.worker(redis.url, 1, "lap"), redis.url) as (process, marks):
        until(marks.laps)
        book.add(FIRST, "fastq", (marks.lines()[0][0][0] / 1e9 - process.started) * 1e3, "ms")
