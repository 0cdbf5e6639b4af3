"""What the load driver enqueues; also how an application of the drivers' own would look."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from typing import Any

import fastq
from benchmarks import tally

app = fastq.FastQ(result_ttl=0, metrics_port=0, log_level="warning")


@app.task
async def noop(number: int) -> None:
    """Nothing: what is measured is everything around it."""
    tally.tick()


@app.task
def noop_sync(number: int) -> None:
    """The same in a thread."""
    tally.tick()


@app.task(result_ttl=3600)
async def noop_kept(number: int) -> int:
    """The same with its result kept for an hour."""
    tally.tick()
    return number


@app.task(rate_limit="1000000/s")
async def noop_limited(number: int) -> None:
    """The same under a limit that never denies."""
    tally.tick()


@app.task
async def silent(number: int) -> None:
    """Nothing at all: load beside what is measured."""


@app.task
async def lap(sent: float) -> None:
    """How long ago was it enqueued?"""
    tally.lap(sent)


@app.task
async def hold(number: int) -> None:
    """Runs until its worker ends."""
    await asyncio.Event().wait()


@app.task
async def weigh(number: int) -> None:
    """How many blocks of memory does this process hold?"""
    gc.collect()
    tally.note(sys.getallocatedblocks())


# -- regressions that the gate must find (tests/process/test_bench_gate.py) ----------------------------------------------


class Planted(fastq.Middleware):
    """What somebody might add to every job one day: 60 µs of Python, or a word with Redis."""

    async def before(self, job: fastq.JobContext) -> None:
        if os.environ["BENCH_PLANT"] == "cpu":
            until = time.thread_time_ns() + 60_000
            while time.thread_time_ns() < until:
                pass
        elif os.environ["BENCH_PLANT"] == "chatter":
            await app.get_status("nobody", queue="default")
        else:
            job.state = [[n] for n in range(50)]

    async def after(self, job: fastq.JobContext, result: Any) -> None:
        """Nothing."""


if "BENCH_PLANT" in os.environ:
    app.middleware(Planted())
