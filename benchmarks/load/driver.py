"""The load driver: real processes, a private server, every figure of one run on one machine."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import uvloop

from benchmarks.load.app import app, lap, noop
from fastq.broker.commands import raw
from fastq.broker.connection import SyncConnection
from fastq.broker.embedded import EmbeddedServer
from fastq.broker.keys import QueueKeys
from fastq.broker.url import parse_url

KEYS = QueueKeys("fastq", "default")
ROOT = Path(__file__).parent.parent.parent


class Drain(NamedTuple):
    """One process emptying the queue."""

    jobs_per_second: float
    worker_us: float  # CPU of the worker per job
    redis_us: float  # CPU of Redis per job
    commands: float  # commands from the client per job


class Redis:
    """The private server and what the driver asks of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection = SyncConnection(parse_url(url))

    def call(self, *words: Any) -> Any:
        return self._connection.call(raw(*words))

    def info(self, section: str) -> dict[str, str]:
        lines = self.call("INFO", section).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def cpu(self) -> float:
        info = self.info("cpu")
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

    def client_commands(self) -> int:
        """What clients sent; the commands inside the scripts are not counted."""
        stats = self.info("commandstats")
        names = ("evalsha", "eval", "blpop", "fcall", "multi", "exec")
        return sum(
            int(stats[f"cmdstat_{n}"].split("calls=")[1].split(",")[0]) for n in names if f"cmdstat_{n}" in stats
        )

    def memory(self) -> int:
        return int(self.info("memory")["used_memory"])

    def pending(self) -> int:
        return int(self.call("LLEN", KEYS.ready[5]))

    def left(self) -> int:
        return int(self.call("HLEN", KEYS.jobs))

    def clear(self) -> None:
        self.call("FLUSHALL")
        self.call("CONFIG", "RESETSTAT")


@contextmanager
def process(*words: str, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended by its pid at the end of the block."""
    environ = os.environ | {"FASTQ_REDIS_URL": url, "PYTHONPATH": str(ROOT), "FASTQ_METRICS_PORT": "0"}
    child = subprocess.Popen([sys.executable, *words], env=environ, cwd=ROOT)
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def worker(url: str) -> Any:
    """One worker process as users start it."""
    return process("-m", "fastq", "worker", "benchmarks.load.app:app", "--log-level", "error", url=url)


def bare(url: str) -> Any:
    """The yardstick."""
    return process("-m", "benchmarks.load.bare", url, url=url)


def drain(redis: Redis, start: Any, jobs: int) -> Drain:
    """Fill the queue, start one process and time it from 10 % to 90 % of the jobs."""
    redis.clear()
    asyncio.run(_fill(jobs))
    high, low = jobs * 9 // 10, jobs // 10
    with start(redis.url) as child:
        _until(lambda: redis.left() <= high)
        begun, commands, cpu, own = time.perf_counter(), redis.client_commands(), redis.cpu(), _cpu(child.pid)
        first = redis.left()
        _until(lambda: redis.left() <= low)
        last = redis.left()
        seconds, done = time.perf_counter() - begun, first - last
        spent, redis_spent = _cpu(child.pid) - own, redis.cpu() - cpu
        sent = redis.client_commands() - commands
        _until(lambda: redis.pending() == 0)
    return Drain(done / seconds, spent / done * 1e6, redis_spent / done * 1e6, sent / done)


async def _fill(jobs: int) -> None:
    await noop.enqueue_many(((n,) for n in range(jobs)), ids=False)
    await app.aclose()


def _until(fact: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > deadline:
            raise SystemExit("the benchmark does not get on")
        time.sleep(0.002)


def _cpu(pid: int) -> float:
    """Seconds of CPU of one process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
    calls = redis.client_commands()
    start = time.perf_counter()
    for _ in range(few // 500):
        await asyncio.gather(*(noop.enqueue(n) for n in range(500)))
    rounds = few // 500 * 500
    concurrent = rounds / (time.perf_counter() - start)
    trips = (redis.client_commands() - calls) / rounds
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
    """p50 and p99 in ms from the call of enqueue to the first line of the handler, one idle worker."""
    redis.clear()
    with tempfile.TemporaryDirectory() as folder, worker(redis.url):
        _until(lambda: redis.call("EXISTS", KEYS.workers) == 1)
        path = Path(folder) / "laps"
        uvloop.run(_laps(redis, laps, str(path)))
        _until(path.exists, 20)
        _until(lambda: path.read_text().endswith("]"), 5)
        times = sorted(json.loads(path.read_text()))
    return statistics.median(times) * 1e3, times[len(times) * 99 // 100] * 1e3


async def _laps(redis: Redis, laps: int, path: str) -> None:
    for _ in range(laps):
        await lap.enqueue(time.monotonic(), laps, path)
        while redis.left() > 1:  # noqa: ASYNC110 - until the worker is idle again, as another process sees it
            await asyncio.sleep(0.001)
    await app.aclose()


def bytes_per_job(redis: Redis, jobs: int) -> float:
    """Memory of Redis per pending job."""
    redis.clear()
    before = redis.memory()
    asyncio.run(_fill(jobs))
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
    with EmbeddedServer() as server:
        redis = Redis(server.url)
        app.adopt(app.settings.__class__(**{**_fields(app.settings), "url": server.url}))
        ours, theirs = [], []
        for _ in range(repeats):
            ours.append(drain(redis, worker, jobs))
            theirs.append(drain(redis, bare, jobs))
        info = redis.info("server")
        version = info.get("valkey_version") or info["redis_version"]
        return Figures(
            f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.machine()}",
            f"{'Valkey' if 'valkey_version' in info else 'Redis'} {version.strip()}",
            max(ours),
            max(theirs),
            enqueue_rates(redis, jobs // 2),
            *latency(redis, laps),
            bytes_per_job(redis, jobs // 5),
        )


def _fields(settings: Any) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__struct_fields__}


def report(f: Figures) -> str:
    """The table that `make bench` prints."""
    rows = [
        ("drain, 1 worker process, no-op jobs", f"{f.fastq.jobs_per_second:,.0f} jobs/s"),
        ("the bare loop", f"{f.bare.jobs_per_second:,.0f} jobs/s"),
        ("ratio", f"{f.fastq.jobs_per_second / f.bare.jobs_per_second:.2f}"),
        ("worker CPU per job (bare loop)", f"{f.fastq.worker_us:.1f} µs ({f.bare.worker_us:.1f})"),
        ("Redis CPU per job (bare loop)", f"{f.fastq.redis_us:.1f} µs ({f.bare.redis_us:.1f})"),
        ("commands from the client per job", f"{f.fastq.commands:.3f}"),
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
