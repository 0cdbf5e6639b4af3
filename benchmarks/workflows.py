"""What workflows cost: ``python -m benchmarks.workflows [NODES]``. A private server, one worker process, everything in one run.

Commands are counted by the server (INFO commandstats), those within scripts included; a plain job is measured the same way,
first while no workflow lives, then while one does.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import redis

import fastq
from fastq.broker.embedded import EmbeddedServer
from fastq.errors import WaitTimeout

app = fastq.FastQ(os.environ.get("BENCH_URL", "redis://localhost:6379/0"), result_ttl=600, concurrency=100)
PATIENCE = 600.0


@app.task
async def number(value: int) -> int:
    return value


@app.task
async def total(values: list[int]) -> int:
    return sum(values)


@app.task(result_ttl=0)
async def plain(value: int) -> None:
    del value


@app.task
async def asleep(value: int) -> None:
    del value
    await asyncio.sleep(3_600)


@contextlib.contextmanager
def worker(url: str) -> Iterator[None]:
    """One worker process."""
    environ = {**os.environ, "BENCH_URL": url, "FASTQ_LOG_LEVEL": "error"}
    words = [sys.executable, "-m", "fastq", "worker", "benchmarks.workflows:app"]
    process = subprocess.Popen(words, env=environ)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


class Meter:
    """What the server did between two looks."""

    def __init__(self, client: Any) -> None:
        self._client = client
        client.config_set("slowlog-log-slower-than", 1_000)
        client.config_set("slowlog-max-len", 1_000)
        client.slowlog_reset()
        self._commands, self._cpu, self._at = self._count(), self._used(), time.perf_counter()
        self._memory = client.info("memory")["used_memory"]

    def _count(self) -> int:
        return sum(int(stat["calls"]) for stat in self._client.info("commandstats").values())

    def _used(self) -> float:
        cpu = self._client.info("cpu")
        return float(cpu["used_cpu_user"] + cpu["used_cpu_sys"])

    def read(self, nodes: int) -> str:
        """One line per node."""
        seconds, cpu = time.perf_counter() - self._at, self._used() - self._cpu
        commands = (self._count() - self._commands) / nodes
        longest = max((entry["duration"] for entry in self._client.slowlog_get(1_000)), default=0) / 1_000
        size = (self._client.info("memory")["used_memory"] - self._memory) / nodes
        return (
            f"{seconds:7.2f} s  {commands:6.1f} commands  {cpu / nodes * 1e6:6.1f} µs of Redis  {size:6.0f} bytes per node"
            f"  longest call {longest:5.1f} ms"
        )


def measure(client: Any, what: str, work: Any, nodes: int, url: str) -> None:
    """Write it down without a worker, then let one run it."""
    client.flushall()
    meter = Meter(client)
    flow = work.enqueue_sync()
    print(f"{what}: stored   {meter.read(nodes)}")
    meter = Meter(client)
    with worker(url):
        flow.wait_sync(PATIENCE)
        print(f"{what}: run      {meter.read(nodes)}")
    print(f"{what}: result {str(flow.result_sync(PATIENCE))[:20]}, ends {flow.status_sync().state}")


def plain_jobs(client: Any, url: str, jobs: int, *, beside: bool) -> None:
    """Plain jobs, with or without a workflow that lives in the same queue."""
    client.flushall()
    client.config_set("slowlog-log-slower-than", -1)
    if beside:
        fastq.chain(asleep.s(1), total.s()).enqueue_sync()
    plain.enqueue_many_sync([(n,) for n in range(jobs)], ids=False)
    last = number.enqueue_sync(1)
    before = sum(int(stat["calls"]) for stat in client.info("commandstats").values())
    began = float(client.info("cpu")["used_cpu_user"])
    with worker(url):
        start = time.perf_counter()
        with contextlib.suppress(WaitTimeout):
            last.result_sync(PATIENCE)
        seconds = time.perf_counter() - start
    calls = (sum(int(stat["calls"]) for stat in client.info("commandstats").values()) - before) / jobs
    cpu = (float(client.info("cpu")["used_cpu_user"]) - began) / jobs * 1e6
    where = "beside a workflow" if beside else "without workflows"
    print(f"plain jobs {where}: {jobs / seconds:9,.0f} jobs/s  {calls:.3f} commands  {cpu:.2f} µs of Redis per job")


def main(nodes: int) -> None:
    """Everything."""
    server = EmbeddedServer().start()
    try:
        app.adopt(_settings(server.url))
        client = redis.Redis.from_url(server.url)
        header = [number.s(n) for n in range(nodes)]
        measure(client, f"chord of {nodes:,}", fastq.chord(header, total.s()), nodes, server.url)
        line = [number.s(1), *(number.s() for _ in range(nodes - 1))]
        measure(client, f"chain of {nodes:,}", fastq.chain(*line), nodes, server.url)
        for _ in range(3):
            for beside in (False, True):
                plain_jobs(client, server.url, 100_000, beside=beside)
    finally:
        app.close()
        server.stop()


def _settings(url: str) -> Any:
    return fastq.FastQ(url, result_ttl=600, concurrency=100).settings


if __name__ == "__main__":
    # By the name under which the worker imports it, and its tasks with it.
    importlib.import_module("benchmarks.workflows").main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
