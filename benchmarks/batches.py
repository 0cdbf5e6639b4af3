"""What batches, handlers that take many jobs, and schedules cost: ``python -m benchmarks.batches [PART ...]``.

A private server and one worker (or scheduler) process, everything in one run. Parts: fill, belong, handlers, schedules.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import redis

import fastq
from fastq.broker.embedded import EmbeddedServer
from fastq.broker.keys import QueueKeys

app = fastq.FastQ(
    os.environ.get("BENCH_URL", "redis://localhost:6379/0"), result_ttl=600, concurrency=200, prefetch_max=1_000
)
JOBS = 1_000_000
DRAINED = 100_000
CALLS = 20_000
SCHEDULES = 10_000
INTERVAL = 20.0
"""Seconds between two ticks of each schedule."""

CALL = 0.002
"""Seconds that one call of whatever is behind a handler takes, for one item as for a hundred."""


@app.task(result_ttl=0)
async def plain(value: int) -> None:
    del value


@app.task(result_ttl=0)
async def one(value: int) -> None:
    del value
    await asyncio.sleep(CALL)


@app.task(result_ttl=0, batch=100, batch_wait=0.05)
async def many(values: list[int]) -> None:
    del values
    await asyncio.sleep(CALL)


@app.task(result_ttl=0, batch=100, batch_wait=0.05)
async def nothing(values: list[int]) -> None:
    del values


TURN = asyncio.Semaphore(4)  # what is behind the handlers takes four calls at a time, as a pool of four connections


@app.task(result_ttl=0)
async def one_of_four(value: int) -> None:
    del value
    async with TURN:
        await asyncio.sleep(CALL)


@app.task(result_ttl=0, batch=100, batch_wait=0.05)
async def many_of_four(values: list[int]) -> None:
    del values
    async with TURN:
        await asyncio.sleep(CALL)


@contextlib.contextmanager
def process(url: str, role: str) -> Iterator[int]:
    """A worker, or a scheduler."""
    environ = {**os.environ, "BENCH_URL": url, "FASTQ_LOG_LEVEL": "error"}
    child = subprocess.Popen([sys.executable, "-m", "fastq", role, "benchmarks.batches:app"], env=environ)
    try:
        yield child.pid
    finally:
        child.terminate()
        child.wait()


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has taken."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident() -> float:
    """MB of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


class Meter:
    """What Redis did."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._before = self._look()
        self.own = 0.0  # µs of CPU that this process took per job

    def _look(self) -> tuple[float, float, float, float]:
        cpu = self._client.info("cpu")
        calls = sum(int(stat["calls"]) for stat in self._client.info("commandstats").values())
        return time.perf_counter(), float(cpu["used_cpu_user"] + cpu["used_cpu_sys"]), calls, time.process_time()

    def read(self, jobs: int) -> str:
        """Per job."""
        seconds, cpu, calls, own = (now - before for now, before in zip(self._look(), self._before, strict=True))
        self.own = own / jobs * 1e6
        return (
            f"{jobs / seconds:9,.0f} jobs/s  {calls / jobs:6.3f} commands  {cpu / jobs * 1e6:6.2f} µs of Redis per job"
        )


def fill(client: Any, url: str) -> None:
    """A million jobs from a generator."""
    app.enqueue_batch_sync("plain", ((n,) for n in range(1_000)), ids=False)
    client.flushall()
    before, most, meter = resident(), 0.0, Meter(client)

    def watch(result: fastq.BatchResult) -> None:
        nonlocal most
        if result.total % 100_000 == 0:
            most = max(most, resident())

    batch = app.enqueue_batch_sync("plain", ((n,) for n in range(JOBS)), 2_000, ids=False, progress=watch)
    print(
        f"enqueue_batch of {JOBS:,}:          {meter.read(JOBS)}; client {meter.own:.2f} µs, {before:.0f} MB, {most - before:+.1f} MB at most"
    )
    keys, start = QueueKeys("fastq", "default"), time.perf_counter()
    for _ in range(100):
        batch.status_sync()
    print(f"  status(): {(time.perf_counter() - start) * 10:.2f} ms, {client.memory_usage(keys.batch(batch.id))} bytes")
    client.flushall()
    meter = Meter(client)
    plain.enqueue_many_sync(((n,) for n in range(JOBS // 5)), ids=False)
    print(f"enqueue_many of {JOBS // 5:,}:             {meter.read(JOBS // 5)}; client {meter.own:.2f} µs")
    client.flushall()


def belong(client: Any, url: str) -> None:
    """The same jobs, drained as members of a batch and as nobody's."""
    ways: dict[str, Callable[[], Any]] = {
        "members of a batch": lambda: app.enqueue_batch_sync("plain", ((n,) for n in range(DRAINED)), 2_000, ids=False),
        "no batch in the queue": lambda: plain.enqueue_many_sync(((n,) for n in range(DRAINED)), ids=False),
        "beside a batch": lambda: plain.enqueue_many_sync(((n,) for n in range(DRAINED)), ids=False),
    }
    for _ in range(3):
        for what, enqueue in ways.items():
            client.flushall()
            if what == "beside a batch":
                app.options(delay=3_600)
                app.enqueue_batch_sync("plain", [(1,)] * 10, spread=36_000)
            enqueue()
            drain(client, url, DRAINED, f"{what:24}")


def drain(client: Any, url: str, jobs: int, what: str) -> None:
    """Let one worker run what is there, and say what it cost."""
    keys = QueueKeys("fastq", "default")
    with process(url, "worker"):
        while client.llen(keys.ready[5]) == jobs:
            time.sleep(0.001)
        meter = Meter(client)
        left = 0
        while client.exists(keys.ready[5]) or left:
            time.sleep(0.005)
            left = sum(client.scard(key) - 1 for key in client.keys(keys.base + "running:*"))
        print(f"{what}  {meter.read(jobs)}")


def handlers(client: Any, url: str) -> None:
    """One call per job against one per hundred."""
    for task in (one, many, one_of_four, many_of_four, plain, nothing):
        client.flushall()
        task.enqueue_many_sync(((n,) for n in range(CALLS)), ids=False)
        drain(client, url, CALLS, f"{task.name:24}")


def schedules(client: Any, url: str) -> None:
    """Ticks that come evenly, and all in the same instant: those of an interval are its multiples since the epoch."""
    on_time(client, url, "spread", 0.001)
    on_time(client, url, "all at once", 0.0)


def on_time(client: Any, url: str, what: str, apart: float) -> None:
    """10,000 schedules, each every 20 s: how late their ticks become jobs."""
    client.flushall()
    keys = QueueKeys("fastq", "default")
    with process(url, "scheduler") as pid, process(url, "worker"):
        app.schedule_interval_sync("plain", INTERVAL, name="first", args=(0,))
        while not client.hlen(keys.runs):
            time.sleep(0.1)
        start = time.perf_counter()
        for n in range(SCHEDULES):
            app.schedule_interval_sync("plain", INTERVAL + (n - SCHEDULES / 2) * apart, name=f"s{n}", args=(n,))
        print(f"{SCHEDULES:,} schedules, {what}, written in {time.perf_counter() - start:.1f} s")
        time.sleep(2.0)
        seconds, micros = client.time()
        since, meter, used = seconds * 1_000 + micros // 1_000, Meter(client), cpu_of(pid)
        time.sleep(INTERVAL)
        late = []
        for lines in client.hvals(keys.runs):
            for tick, _, at, _ in (line.split() for line in lines.decode().splitlines()):
                if int(tick) >= since:
                    late.append(int(at) - int(tick))
        cost, used = meter.read(len(late)), (cpu_of(pid) - used) / len(late) * 1e6
    late.sort()
    print(
        f"{len(late):,} ticks, lateness p50 {statistics.median(late):.0f} ms, p99 {late[int(len(late) * 0.99)]:,} ms, "
        f"most {late[-1]:,} ms; {cost.replace('job', 'tick')}, "
        f"{used:.0f} µs of the scheduler"
    )


PARTS = {"fill": fill, "belong": belong, "handlers": handlers, "schedules": schedules}


def main(parts: list[str]) -> None:
    """Everything, or what was named."""
    server = EmbeddedServer().start()
    try:
        app.adopt(fastq.FastQ(server.url, result_ttl=600, concurrency=200, prefetch_max=1_000).settings)
        client = redis.Redis.from_url(server.url)
        for part in parts or PARTS:
            PARTS[part](client, server.url)
    finally:
        app.close()
        server.stop()


if __name__ == "__main__":
    # By the name under which the worker imports it, and its tasks with it.
    importlib.import_module("benchmarks.batches").main(sys.argv[1:])
