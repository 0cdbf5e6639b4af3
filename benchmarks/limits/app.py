"""The application of benchmarks/limits/jobs.py: jobs behind limits, and what they write down."""

from __future__ import annotations

import asyncio
import os
import time
from array import array

import fastq
from benchmarks import tally

app = fastq.FastQ(result_ttl=0, metrics_port=0, log_level="warning")
_file = -1


def passed(job: fastq.JobContext) -> None:
    """Append when a job was let pass (CLOCK_MONOTONIC, one for all processes) to this process's file."""
    global _file  # noqa: PLW0603 - opened in the process that runs the jobs, after its fork
    if _file < 0:
        path = os.path.join(os.environ["BENCH_MARKS"], f"{os.getpid()}.times")
        _file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(_file, array("d", [job.started or time.monotonic()]).tobytes())


@app.task
async def free(number: int) -> None:
    """No limit."""
    tally.tick()


@app.task(rate_limit="1000000/s")
async def wide(number: int) -> None:
    """A limit that never denies."""
    tally.tick()


@app.task(rate_limit="1/h")
async def shut(number: int) -> None:
    """A limit that lets one pass."""


@app.task(rate_limit="10/s")
async def at_10(job: fastq.JobContext, number: int) -> None:
    """10 a second."""
    passed(job)


@app.task(rate_limit="1000/s")
async def at_1000(job: fastq.JobContext, number: int) -> None:
    """1,000 a second."""
    passed(job)


@app.task(rate_limit="10000/s")
async def at_10000(job: fastq.JobContext, number: int) -> None:
    """10,000 a second."""
    passed(job)


@app.task(concurrency=7)
async def seven(job: fastq.JobContext, number: int) -> None:
    """Seven at once."""
    passed(job)
    await asyncio.sleep(0.005)


@app.task
async def lap(sent: float) -> None:
    """How long ago was it enqueued?"""
    tally.lap(sent)
