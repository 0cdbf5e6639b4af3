"""The application: `fastq supervise census.tasks:app`."""

from __future__ import annotations

import os
import zlib
from collections.abc import AsyncIterator

import fastq
from census.journal import Journal
from census.measure import Measures, measure

app = fastq.FastQ()


@app.lifespan
async def journal_of_this_worker() -> AsyncIterator[Journal]:
    with Journal(os.environ["CENSUS_JOURNAL"]) as journal:
        journal.write("up")
        yield journal


class Stumble(Exception):
    """A failure that was planned."""


@app.task(timeout=60, max_attempts=4, retry=fastq.Exponential(base=0.1, factor=2, jitter="equal"))
def measure_file(
    name: str,
    job: fastq.JobContext,
    journal: Journal = fastq.State(),
) -> Measures:
    """Measure one file, after as many failures as are planned for it."""
    journal.write("start", job.id, job.attempt)
    if job.attempt <= planned_failures(name):
        journal.write("stumble", job.id, job.attempt)
        raise Stumble(f"planned failure {job.attempt} of {name}")
    measures = measure(name)
    journal.write("end", job.id, job.attempt)
    return measures


def planned_failures(name: str) -> int:
    """How often the job of this file fails before it succeeds: 2 times for 2 % of the names, once for 6 %."""
    chance = zlib.crc32(name.encode()) % 100
    return 2 if chance < 2 else 1 if chance < 8 else 0
