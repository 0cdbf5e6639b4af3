"""What isolation="process" costs: a no-op there and back, against the same call in this process; a new process."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from typing import Any

import pytest

from fastq import FastQ
from fastq.context import JobContext
from fastq.job import Envelope, encode
from fastq.worker.isolated import live
from fastq.worker.isolation import Pool
from fastq.worker.nursery import Nursery

JOBS = 200

app = FastQ("redis://localhost:1/0", log_level="critical")


@app.task(isolation="process")
def nothing() -> None: ...


def job(n: int) -> JobContext:
    return JobContext(f"j{n}", "default", Envelope(5, 1, "nothing", encode([]), 0), timeout=60.0)


@pytest.fixture
def runner() -> Iterator[tuple[asyncio.Runner, Any]]:
    nursery = Nursery(lambda: app, functools.partial(live, app.settings))
    nursery.open()
    with asyncio.Runner() as runner:

        async def pool(jobs_each: int) -> Pool:
            return Pool(nursery, 2, jobs_each)

        made: list[Pool] = []

        def make(jobs_each: int) -> Pool:
            made.append(runner.run(pool(jobs_each)))
            return made[-1]

        yield runner, make

        async def close() -> None:
            made[0].close()

        runner.run(close())


async def one_after_the_other(pool: Pool, count: int) -> None:
    for n in range(count):
        assert (await pool.run(job(n), 0)).how == "result"


@pytest.mark.benchmark(group=f"isolation: {JOBS} jobs, one after the other")
def test_used_again(benchmark: Any, runner: tuple[asyncio.Runner, Any]) -> None:
    loop, make = runner
    pool = make(10**9)
    benchmark(lambda: loop.run(one_after_the_other(pool, JOBS)))


@pytest.mark.benchmark(group="isolation: 20 jobs, a new process for each")
def test_new_each_time(benchmark: Any, runner: tuple[asyncio.Runner, Any]) -> None:
    loop, make = runner
    pool = make(1)
    benchmark(lambda: loop.run(one_after_the_other(pool, 20)))
