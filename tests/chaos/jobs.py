"""The application of the fleet tests: handlers that append what they do to a file.

One line of ``$EVENTS`` per event, in one write: ``s key pid monotonic`` when a handler starts, ``d …`` when it is done, ``c …``
when it was cancelled. Nothing else is believed: what the tests prove is read from this file afterwards (tests/process/fleet.py).
Handlers that have to last do so until a file exists (``gate``).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import fastq

POLL = 0.005  # seconds between two looks at a gate

tasks = fastq.Tasks()
_file = -1
_hoard: list[bytes] = []


def note(kind: str, key: str, at: float | None = None) -> None:
    """Append an event; ``at``: if it was not now, a monotonic time."""
    global _file  # noqa: PLW0603 - opened by the first event: the test's own process has none
    if _file < 0:
        _file = os.open(os.environ["EVENTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(_file, f"{kind} {key} {os.getpid()} {at or time.monotonic():.6f}\n".encode())


@tasks.task(result_ttl=0, max_attempts=3, retry=0)
async def step(key: str, seconds: float = 0.005) -> None:
    """A short job."""
    note("s", key)
    await asyncio.sleep(seconds)
    note("d", key)


@tasks.task(result_ttl=0, max_attempts=1)
async def once(key: str, seconds: float = 0.005) -> None:
    """A short job that gets one attempt: what is charged to it ends it."""
    note("s", key)
    await asyncio.sleep(seconds)
    note("d", key)


@tasks.task(max_attempts=1)
async def piece(number: int, seconds: float = 0.01) -> int:
    """A part of a whole."""
    note("s", str(number))
    await asyncio.sleep(seconds)
    note("d", str(number))
    return number


@tasks.task(max_attempts=1)
async def whole(numbers: list[int], key: str) -> int:
    """What is made of the pieces."""
    note("s", key)
    note("d", key)
    return sum(numbers)


@tasks.task(result_ttl=0, max_attempts=1)
async def beat(job: fastq.JobContext) -> None:
    """One tick of a schedule: its id says which."""
    note("d", job.id)


@tasks.task(result_ttl=0, max_attempts=1)
async def quiet(key: str, seconds: float = 0.0) -> None:
    """Notes nothing: its arguments may be whatever a foreign producer wrote."""


def pay(key: str) -> int:
    """What must not happen twice."""
    note("p", key)
    return os.getpid()


@tasks.task(idempotent=3_600, max_attempts=2, retry=0)
async def charged(key: str, gate: str, job: fastq.JobContext) -> int:
    """Charges once, whatever kills its worker after that; what it returns is the process that charged."""
    note("s", key)
    payer = await job.once("charge", pay, key)
    while not Path(gate).exists():
        await asyncio.sleep(POLL)
    note("d", key)
    return int(payer)


@tasks.task(result_ttl=0, max_attempts=1)
async def gated(key: str, gate: str) -> None:
    """Runs until the gate is open."""
    note("s", key)
    try:
        while not Path(gate).exists():
            await asyncio.sleep(POLL)
    except asyncio.CancelledError:
        note("c", key)
        raise
    note("d", key)


@tasks.task(result_ttl=0, max_attempts=1)
def gated_thread(key: str, gate: str) -> None:
    """The same in a thread: it does not notice that it is to stop."""
    note("s", key)
    while not Path(gate).exists():
        time.sleep(POLL)
    note("d", key)


@tasks.task(result_ttl=0, max_attempts=1)
def obedient_thread(key: str, gate: str, job: fastq.JobContext) -> None:
    """In a thread, but it looks whether it is to stop."""
    note("s", key)
    while not Path(gate).exists():
        if job.cancelled:
            note("c", key)
            return
        time.sleep(POLL)
    note("d", key)


@tasks.task(result_ttl=0, max_attempts=1, timeout=0.2)
def overtime(key: str, gate: str) -> None:
    """In a thread, longer than its timeout, and deaf."""
    note("s", key)
    while not Path(gate).exists():
        time.sleep(POLL)


@tasks.task(result_ttl=0, max_attempts=1)
async def spin(key: str, seconds: float) -> None:
    """Blocks the event loop with Python code (F-04)."""
    note("s", key)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    note("d", key)


@tasks.task(result_ttl=0, max_attempts=1)
async def backtrack(key: str) -> None:
    """Holds the GIL for longer than anybody lives, but only in the first run (F-05)."""
    note("s", key)
    try:
        Path(f"{os.environ['EVENTS']}-{key}").touch(exist_ok=False)
    except FileExistsError:
        note("d", key)
        return
    re.match("(a+)+$", "a" * 60 + "b")


@tasks.task(result_ttl=0, max_attempts=1)
async def deadly(key: str, how: str) -> None:
    """Ends its process: a signal's name, or ``segfault`` (F-06, F-07)."""
    note("s", key)
    if how == "segfault":
        ctypes.string_at(0)
    os.kill(os.getpid(), signal.Signals[how])
    signal.pause()


@tasks.task(result_ttl=0, max_attempts=1)
async def leak(key: str, megabytes: int) -> None:
    """Keeps memory for ever (F-15)."""
    note("s", key)
    _hoard.append(os.urandom(1 << 20) * megabytes)
    note("d", key)


@tasks.task(result_ttl=0, max_attempts=2, retry=0)
async def second_try(key: str) -> None:
    """Fails once, then succeeds."""
    note("s", key)
    if app.job().attempt == 1:
        raise fastq.Retry(delay=0)
    note("d", key)


@tasks.task(result_ttl=0, max_attempts=9, retry=0)
async def gated_retry(key: str, gate: str) -> None:
    """Runs until the gate is open; where ``$LOSER`` is set it then fails."""
    note("s", key)
    while not Path(gate).exists():
        await asyncio.sleep(POLL)
    if os.environ.get("LOSER"):
        raise fastq.Retry(delay=0)
    note("d", key)


fastq.configure_limiter("window", algorithm="sliding_window", limit=40, window_seconds=2)
fastq.configure_limiter("pool", max_concurrent=7, lease=1.5)


@tasks.task(result_ttl=0, max_attempts=1, rate_limit="100/s burst 10")
async def rated(job: fastq.JobContext, key: str) -> None:
    """Notes when its limit let it pass, which is when it was started."""
    note("s", key, job.started)
    note("d", key)


@tasks.task(result_ttl=0, max_attempts=1, limits=["window"])
async def windowed(job: fastq.JobContext, key: str) -> None:
    """The same behind a sliding window."""
    note("s", key, job.started)
    note("d", key)


@tasks.task(result_ttl=0, max_attempts=1, limits=["pool"])
async def pooled(key: str) -> None:
    """Holds a slot for a moment."""
    note("s", key)
    await asyncio.sleep(0.02)
    note("d", key)


@tasks.task(result_ttl=0, max_attempts=1)
async def injected(key: str, pid: int = fastq.State("pid")) -> None:
    """Tells whose lifespan it was given."""
    note("s" if pid == os.getpid() else "foreign", key)
    note("d", key)


app = fastq.FastQ()
app.include(tasks)


@app.lifespan
async def lifespan() -> AsyncIterator[dict[str, int]]:
    """Once per worker process."""
    note("up", "lifespan")
    yield {"pid": os.getpid()}
    note("down", "lifespan")
