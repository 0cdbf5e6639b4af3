"""The application of two releases side by side: only what both of them know, so that either can run it.

Written as tests/chaos/jobs.py writes: one line of ``$EVENTS`` per event. ``r 0.1.0-48dc488 …`` says which release a process runs:
the name of the folder that ``fastq`` was imported from.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import fastq

RELEASE = Path(fastq.__file__).parent.parent.name


def note(kind: str, key: str) -> None:
    """Append an event."""
    file = os.open(os.environ["EVENTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, f"{kind} {key} {os.getpid()} {time.monotonic():.6f}\n".encode())
    os.close(file)


app = fastq.FastQ()


@app.task(name="step", result_ttl=0, max_attempts=1)
async def step(key: str) -> None:
    """A short job with one attempt: what is charged to it ends it."""
    note("s", key)
    await asyncio.sleep(0.004)
    note("d", key)


@app.task(name="kept", max_attempts=1)
async def kept(key: str) -> str:
    """A job whose result is kept."""
    note("s", key)
    await asyncio.sleep(0.004)
    note("d", key)
    return f"{key} {RELEASE}"


@app.task(name="twice", result_ttl=0, max_attempts=2, retry=0)
async def twice(key: str) -> None:
    """A job that fails once, so that one release retries what the other may run again."""
    if app.job().attempt == 1:
        raise fastq.Retry(delay=0)
    note("s", key)
    note("d", key)


@app.lifespan
async def lifespan() -> AsyncIterator[None]:
    """Once per worker process."""
    note("r", RELEASE)
    yield


if __name__ == "__main__":  # a producer: mixed.py PREFIX COUNT
    prefix, count = sys.argv[1], int(sys.argv[2])
    for n in range(count):
        task, options = (("step", {}), ("kept", {}), ("twice", {}), ("step", {"delay": 0.3}))[n % 4]
        print(app.options(**options).enqueue_sync(task, f"{prefix}{n}").id, f"{prefix}{n}")
    app.close()
