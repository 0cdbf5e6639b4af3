"""What the load driver enqueues: a no-op, and a stopwatch."""

from __future__ import annotations

import json
import time
from pathlib import Path

import fastq

app = fastq.FastQ(result_ttl=0, metrics_port=0, log_level="warning")
laps: list[float] = []


@app.task
async def noop(number: int) -> None:
    """Nothing: what is measured is everything around it."""


@app.task
async def lap(sent: float, total: int, path: str) -> None:
    """Seconds from the call of enqueue to here; the last one writes them down."""
    laps.append(time.monotonic() - sent)
    if len(laps) == total:
        Path(path).write_text(json.dumps(laps))  # noqa: ASYNC240 - the last job, after everything was measured
