"""`python -m benchmarks.load.results`: what results, waiting for them, and events cost. All figures of one run."""

from __future__ import annotations

import argparse
import asyncio
import functools
import statistics
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import uvloop

from benchmarks.load.app import app, noop, noop_kept
from benchmarks.load.candidates import FASTQ, aim, fill_here
from benchmarks.load.lab import Candidate, Drain, Redis, drain, private_server, running, until
from fastq.broker.commands import watch
from fastq.broker.keys import QueueKeys

KEYS = QueueKeys("fastq", "default")


def latency(redis: Redis, laps: int) -> dict[str, tuple[float, float]]:
    """p50 and p99 in ms from the call of enqueue to the result, one worker process that is idle before."""
    redis.clear()
    aim(redis.url)
    with running(FASTQ.worker(redis.url, 1, "noop"), redis.url):
        until(lambda: redis.call("EXISTS", KEYS.workers) == 1)
        return uvloop.run(_latency(laps))


async def _latency(laps: int) -> dict[str, tuple[float, float]]:
    async def one(n: int) -> None:
        assert await (await noop_kept.enqueue(n)).result(timeout=30) == n

    def blocking(n: int) -> None:
        assert noop_kept.enqueue_sync(n).result_sync(timeout=30) == n

    async def hundred(n: int) -> None:
        await asyncio.gather(*(one(n) for _ in range(100)))

    found = {
        "enqueue to result": await _timed(one, laps),
        "enqueue_sync to result_sync, in a thread": await _timed(lambda n: asyncio.to_thread(blocking, n), laps),
        "100 at once, until the last result": await _timed(hundred, laps // 10),
    }
    await app.aclose()
    app.close()
    return found


async def _timed(act: Callable[[int], Awaitable[None]], laps: int) -> tuple[float, float]:
    times = []
    for n in range(laps + 10):
        begun = time.perf_counter()
        await act(n)
        times.append((time.perf_counter() - begun) * 1e3)
    times = sorted(times[10:])  # without the connects and the first imports
    return statistics.median(times), times[len(times) * 99 // 100]


async def _wait_for_another() -> None:
    """Somebody waits in this queue, for a job that does not run."""
    job = await noop.options(delay=3600).enqueue(0)
    waiting = asyncio.ensure_future(job.result())
    while not await app.call(_registered()):  # noqa: ASYNC110 - as Redis sees it
        await asyncio.sleep(0.001)
    waiting.cancel()


def _registered() -> Any:
    from fastq.broker.command import raw

    return raw("HLEN", KEYS.awaited)


async def _watch() -> None:
    """Events are written down, and nobody reads them here."""
    await app.call(watch(KEYS, 120_000, ["*"]))


async def _nothing() -> None: ...


def _fill(before: Callable[[], Coroutine[Any, Any, None]], url: str, task: str, jobs: int) -> None:
    async def run() -> None:
        await fill_here(task, jobs)
        await before()
        await app.aclose()

    aim(url)
    asyncio.run(run())


CASES = {
    "no result": ("noop", _nothing),
    "a result that is kept": ("noop_kept", _nothing),
    "no result, another job is waited for": ("noop", _wait_for_another),
    "no result, events of the queue watched": ("noop", _watch),
}


def drains(redis: Redis, jobs: int, repeats: int) -> dict[str, Drain]:
    """The cases alternate; of each the cheapest run counts: noise only ever adds."""
    found: dict[str, list[Drain]] = {name: [] for name in CASES}
    for _ in range(repeats):
        for name, (task, before) in CASES.items():
            candidate = Candidate(name, functools.partial(_fill, before), FASTQ.worker)
            found[name].append(drain(redis, candidate, jobs, task=task))
    return {name: min(tries, key=lambda d: d.worker_us + d.redis_us) for name, tries in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load.results", description=__doc__)
    parser.add_argument("--jobs", type=int, default=50_000)
    parser.add_argument("--laps", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with private_server() as redis:
        for name, (p50, p99) in latency(redis, options.laps).items():
            print(f"{name:<42} p50 {p50:.2f}  p99 {p99:.2f} ms")
        for name, d in drains(redis, options.jobs, options.repeats).items():
            costs = f"worker {d.worker_us:.2f}  Redis {d.redis_us:.2f} µs, {d.executed:.3f} commands per job"
            print(f"{name:<42} {costs}, {d.jobs_per_second:,.0f} jobs/s")


if __name__ == "__main__":
    main()
