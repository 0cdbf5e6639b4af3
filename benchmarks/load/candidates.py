"""fastq and the floors, as things that can be drained."""

from __future__ import annotations

import asyncio

import msgspec

from benchmarks.load import app as application
from benchmarks.load.lab import Candidate, module

__all__ = ["FASTQ", "FLOORS", "aim", "fill"]

app = application.app


def aim(url: str) -> None:
    """Let the application of this process talk to the server at ``url``."""
    app.adopt(msgspec.structs.replace(app.settings, url=url))


async def fill_here(task: str, jobs: int) -> None:
    """Enqueue in bulk on the running loop."""
    await app.tasks[task].enqueue_many(zip(range(jobs), strict=False), ids=False)


def fill(url: str, task: str, jobs: int) -> None:
    """Enqueue in bulk."""

    async def run() -> None:
        await fill_here(task, jobs)
        await app.aclose()

    aim(url)
    asyncio.run(run())


def _workers(url: str, processes: int, task: str) -> list[str]:
    """One process as users start it; several under their supervisor."""
    name = "benchmarks.load.app:app"
    quiet = ("--log-level", "error")
    if processes == 1:
        return module("fastq", "worker", name, *quiet)
    return module("fastq", "supervise", name, *quiet, "--workers", str(processes))


def _floor(kind: str) -> Candidate:
    return Candidate(kind, fill, lambda url, processes, task: module("benchmarks.floor", kind, url, str(processes)))


FASTQ = Candidate("fastq", fill, _workers)
FLOORS = {kind: _floor(kind) for kind in ("redis-py", "protocol", "flat")}
