"""Pattern 2: a queue that is consumed no faster than its limiter allows, ten at a time, and that pushes back.

What the document writes by hand is what a worker does: `async for message in queue.consume()` is the worker's reserve,
`Semaphore(10)` its concurrency, `ack` is returning, `nack(requeue=True, delay=30)` is requeue(delay=30), `nack` is any other
exception (retried by the task's policy, then kept in the dead-letter queue).
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from stage import Api, ended, post, redis, show, workers

import fastq
from fastq import get_or_clone_limiter

app = fastq.FastQ(concurrency=10, queues="messages")


@app.task(queue="messages", max_attempts=1)
async def process_message(message: dict[str, Any]) -> None:
    """Process single message with rate limiting."""
    limiter = await get_or_clone_limiter("external_api", "queue:messages")
    try:
        async with limiter.acquire_context(timeout=0.3):
            await handle_message(message)
    except TimeoutError:
        fastq.requeue(delay=0.5)  # back-pressure, no failure


async def handle_message(message: dict[str, Any]) -> None:
    if message["broken"]:
        raise ValueError("this one cannot be handled")
    await post(os.environ["EXTERNAL_URL"], message["n"])


async def main() -> None:
    async with Api(limit=30, window=1.0, seconds=0.02) as api:
        with redis(EXTERNAL_URL=api.url, EXTERNAL_LIMIT=30, EXTERNAL_WINDOW=1.25):
            producer = fastq.FastQ()
            async with workers("queue_backpressure:app"):
                by_name = producer.options(queue="messages")
                messages = [{"n": n, "broken": n % 30 == 7} for n in range(90)]
                states = await ended([await by_name.enqueue("process_message", message) for message in messages])
            await producer.aclose()
    show({"jobs": states, "api": api.facts()})


if __name__ == "__main__":
    asyncio.run(main())
