"""Pattern 7: a resource that only so many may use at once, in all worker processes together.

A slot is a lease that the process renews: one of a killed worker is free again after 15 s (`lease=`).
"""

from __future__ import annotations

import asyncio
import os

from stage import Api, ended, post, redis, show, workers

import fastq
from fastq import get_or_clone_limiter

app = fastq.FastQ(concurrency=10)


@app.task
async def process_with_resource_limit(job_data: int) -> None:
    """Process job with max concurrent limit."""
    limiter = await get_or_clone_limiter("concurrent_jobs", "all-workers")
    try:
        async with limiter.acquire_context(timeout=0.5):
            await post(os.environ["EXPENSIVE_URL"], job_data)
    except TimeoutError:
        fastq.requeue(delay=0.2)  # too many concurrent jobs


async def main() -> None:
    async with Api(seconds=0.05) as api:
        with redis(EXPENSIVE_URL=api.url, POOL_SIZE=3):
            producer = fastq.FastQ()
            async with workers("resource_pool:app"):
                jobs = [await producer.enqueue("process_with_resource_limit", n) for n in range(80)]
                states = await ended(jobs)
            await producer.aclose()
    show({"jobs": states, "expensive": api.facts()})


if __name__ == "__main__":
    asyncio.run(main())
