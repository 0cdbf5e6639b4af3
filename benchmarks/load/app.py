"""What the load driver enqueues; also how an application of the drivers' own would look."""

from __future__ import annotations

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


@app.task
async def lap(sent: float) -> None:
    """How long ago was it enqueued?"""
    tally.lap(sent)
