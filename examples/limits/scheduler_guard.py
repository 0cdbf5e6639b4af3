"""Pattern 3, with a scheduler in every process (APScheduler, a cron on each host): the job runs once for each firing.

With APScheduler, the function below stays as it is:

    scheduler = AsyncIOScheduler()
    scheduler.scheduled_job("cron", hour=2, minute=0)(cleanup_old_data)

fastq's own schedules (`@app.cron`) need no guard: one scheduler of all hosts leads, and each firing is one job.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from stage import begin, redis, show, together

from fastq import get_or_clone_limiter

logger = logging.getLogger(__name__)
EVERY = 1.75  # seconds between two firings, by the clock that all processes share
FIRINGS = 3


async def cleanup_old_data() -> int | None:
    """Cleanup job - only one instance should run this. The number of records deleted; None: another one does it."""
    limiter = await get_or_clone_limiter("cleanup_job", "all-workers")
    if not await limiter.try_acquire(timeout=0):
        logger.info("Cleanup already running on another worker")
        return None
    try:
        deleted = await asyncio.to_thread(delete_old_records)
        logger.info("Cleanup complete: %d records deleted", deleted)
        return deleted
    finally:
        await limiter.release()  # its slot; the window stays used, so that no other process runs it for this firing


def delete_old_records() -> int:
    with sqlite3.connect(os.environ["DATABASE"], timeout=30) as db:
        return db.execute("DELETE FROM records WHERE id IN (SELECT id FROM records LIMIT 10)").rowcount


async def schedule(job: Callable[[], Awaitable[object]], start: float) -> list[object]:
    """What a scheduler does in each process: fire at the same instants everywhere, more or less."""
    results = []
    for firing in range(FIRINGS):
        await asyncio.sleep(max(0.0, start + firing * EVERY - time.time()))
        results.append(await job())
    return results


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "records.sqlite"
        with sqlite3.connect(database) as db:
            db.execute("CREATE TABLE records (id INTEGER PRIMARY KEY)")
            db.executemany("INSERT INTO records VALUES (?)", ((n,) for n in range(100)))
        with redis(DATABASE=database, CLEANUP_WINDOW=1):
            ran = await together(__file__, 4)
        with sqlite3.connect(database) as db:
            left = db.execute("SELECT count(*) FROM records").fetchone()[0]
    show({"workers": ran, "firings": FIRINGS, "left": left})


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        print(asyncio.run(schedule(cleanup_old_data, begin())))
    else:
        asyncio.run(main())
