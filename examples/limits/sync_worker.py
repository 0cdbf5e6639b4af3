"""Pattern 2, from blocking code: a plain function, its limiter's blocking twin, no event loop to be made or found."""

from __future__ import annotations

import asyncio
import os

from stage import Api, ended, post_blocking, redis, show, workers

import fastq

app = fastq.FastQ(threads=8)


@app.task
def sync_user_data(user_id: str) -> str:
    """Sync user data with an external API: runs in a thread of the worker."""
    limiter = app.limiter("external_api").sync
    try:
        limiter.acquire(timeout=0.3)
    except TimeoutError:
        fastq.requeue(delay=0.5)  # Celery's retry charges an attempt: that is `raise fastq.Retry(delay=60)`
    post_blocking(os.environ["EXTERNAL_URL"], user_id)
    return user_id


async def main() -> None:
    async with Api(limit=20, window=1.0) as api:
        with redis(EXTERNAL_URL=api.url, EXTERNAL_LIMIT=20, EXTERNAL_WINDOW=1.25):
            producer = fastq.FastQ()
            async with workers("sync_worker:app"):
                states = await ended([await producer.enqueue("sync_user_data", f"user-{n}") for n in range(50)])
            await producer.aclose()
    show({"jobs": states, "api": api.facts()})


if __name__ == "__main__":
    asyncio.run(main())
