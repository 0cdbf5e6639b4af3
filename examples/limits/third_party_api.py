"""Pattern 1: a third party's quota, shared by all workers; a job that cannot get through in time comes back later.

The API here allows 20 requests in any second and, half-way, has its quota used up by somebody whom our limiter does not
know: it says 429, and one worker's `penalize` stops all of them.
"""

from __future__ import annotations

import asyncio
import logging
import os

from stage import Api, TooManyRequests, ended, post, redis, show, until, workers

import fastq
from fastq import get_or_clone_limiter

logger = logging.getLogger(__name__)
app = fastq.FastQ()


@app.task
async def process_github_webhook(webhook_data: dict[str, int]) -> None:
    """Process GitHub webhook with rate limiting."""
    limiter = await get_or_clone_limiter("github_api", "worker-1")  # a name for the caller: all share one quota
    try:
        await limiter.acquire(timeout=0.5)
        await post(os.environ["GITHUB_URL"], webhook_data)
    except TimeoutError:
        logger.info("GitHub API rate limit timeout - requeueing")
        fastq.requeue(delay=1.0)  # no attempt is charged, no slot is held meanwhile
    except TooManyRequests as error:
        await limiter.penalize(error.retry_after)  # every worker stops until then
        fastq.requeue(delay=error.retry_after)


async def main() -> None:
    async with Api(limit=20, window=1.0, retry_after=2.0) as api:
        # The API counts what arrives, so the window is longer than its own by what a request's way may vary.
        with redis(GITHUB_URL=api.url, GITHUB_LIMIT=20, GITHUB_WINDOW=1.25):
            app = fastq.FastQ()
            async with workers("third_party_api:app"):
                jobs = [await app.enqueue("process_github_webhook", {"issue": n}) for n in range(60)]
                await until(lambda: len(api.accepted) == 20)
                await asyncio.sleep(0.7)  # shortly before our next 20
                api.use_up()
                states = await ended(jobs)
            await app.aclose()
    show({"jobs": states, "github": api.facts()})


if __name__ == "__main__":
    asyncio.run(main())
